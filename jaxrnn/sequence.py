"""Running cells: over a sequence, one step, on their own output; and seeing how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrnn import check
from jaxrnn.arguments import (
    NAMES,
    Names,
    batch_shape_of,
    carries,
    check_feedback,
    flags_of,
    single_flags,
    single_key,
    time_first,
    to_jax,
    valid_steps,
)
from jaxrnn.cell import Carry, Cell, Params, scan_one_step
from jaxrnn.engines.arrays import cast_like, select, varying_like, widened, zero_where_not
from jaxrnn.engines.walk import EngineCall, Implementation, Question, Walk, checked, final
from jaxrnn.typing import Bools, Integers, Noise, PyTree


def scan(
    cell: Cell[Params, Carry],
    params: Params,
    carry: Carry | None,
    xs: PyTree,
    *,
    lengths: Integers | None = None,
    mask: Bools | None = None,
    reset: Bools | None = None,
    reverse: bool = False,
    time_axis: int = 0,
    key: Array | None = None,
    remat_every: int | None = None,
    implementation: Implementation = None,
) -> tuple[Carry, PyTree]:
    """`lax.scan` for cells: runs `cell` over a sequence, or a batch of them.

    Without options it is

        ys = []
        for x in xs:
            carry, y = cell.step(params, carry, x)
            ys.append(y)
        return carry, jnp.stack(ys)

    Shapes: T time, `*batch` any number of axes, none included; xs (T, *batch, D), or with `time_axis=1` (B, T, D).

    Args:
      cell: Any cell or composition.
      params: Its parameters, as `cell.init` gives them.
      carry: The carry to start from, leaves (*batch, ...), or None for `cell.initial_carry`. A given carry keeps its
        dtypes; None starts in the widest of float32, the params' and floating xs' dtype.
      xs: The inputs.
      lengths: Integers (*batch): the steps that are valid, from the first. Beyond T they act as T, below 0 as 0, where
        their values are not known at trace time; else they raise.
      mask: bool, time and batch axes as in xs: the valid steps, in any pattern. An invalid step does nothing at all: no
        input, no reset, the carry stays, ys is 0; NaN in it reaches no number and no gradient.
      reset: bool, time and batch axes as in xs: a new sequence begins at step t. Forward, t starts fresh; in reverse,
        the valid step before t does. Nothing crosses the boundary, in values or in gradients.
      reverse: Run from the last valid step to the first; ys stay aligned with xs.
      time_axis: Where time lies among time and batch axes, for xs, ys, mask and reset.
      key: A PRNG key: noise (dropout, zoneout) is drawn; None: deterministic.
      remat_every: Gradient checkpointing: keep the carry only every so many steps and recompute the steps between
        during the backward pass, in every layer.
      implementation: None for the fastest correct one; a name for exactly that one; a mapping from engine to name.

    Returns:
      The final carry, and ys (T, *batch, O) with time at `time_axis`, or (*batch, O) from a cell that ends time.

    Raises:
      ValueError: For shapes, dtypes, values and names that do not fit, at trace time.
      TypeError: For shapes, dtypes, values and names that do not fit, at trace time.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.GRU(3, 16)
      >>> params = cell.init(jax.random.key(0))
      >>> xs = jnp.ones((5, 7, 3))  # batch, time, features
      >>> carry, ys = jaxrnn.scan(cell, params, None, xs, lengths=jnp.array([7, 0, 3, 2, 1]), time_axis=1)
      >>> carry.h.shape, ys.shape
      ((5, 16), (5, 7, 16))
    """
    return scan_asked(
        None,
        cell,
        params,
        carry,
        xs,
        lengths=lengths,
        mask=mask,
        reset=reset,
        reverse=reverse,
        time_axis=time_axis,
        key=key,
        remat_every=remat_every,
        implementation=implementation,
    )


def scan_asked(
    question: Question | None,
    cell: Cell,
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    *,
    lengths: Integers | None = None,
    mask: Bools | None = None,
    reset: Bools | None = None,
    reverse: bool = False,
    time_axis: int = 0,
    key: Array | None = None,
    remat_every: int | None = None,
    implementation: Implementation = None,
    names: Names = NAMES,
) -> tuple[PyTree, PyTree]:
    """`scan`, as it would run where the question says; every call of an engine is added to its answers."""
    check.a_cell("cell", cell)
    if remat_every is not None:
        remat_every = check.integer("remat_every", remat_every)
    named = checked(implementation)
    params = to_jax(params)
    xs, length, batch_shape, time_axis = time_first(cell, xs, time_axis)
    valid = valid_steps(lengths, mask, length, batch_shape, time_axis, names.lengths)
    if reset is not None:
        reset = flags_of("reset", reset, length, batch_shape, time_axis)
    batch_major = 0 < time_axis == len(batch_shape)
    walk = Walk(valid, reset, bool(reverse), remat_every, named, batch_major, question)
    carry, ys = walked(cell, params, carry, zero_where_not(valid, xs), key, walk, names.carry)
    if time_axis and not cell.ends_time:
        ys = jax.tree.map(lambda y: jnp.moveaxis(y, 0, time_axis), ys)
    return carry, ys


def walked(
    cell: Cell, params: PyTree, carry: PyTree, xs: PyTree, key: Array | None, walk: Walk, name: str = "carry"
) -> tuple[PyTree, PyTree]:
    """`cell` along `walk`, with the carry to start from, or None, and the noise of a key, or none; time is first."""
    length, *batch = batch_shape_of(cell, "xs", xs)
    carry, fresh = carries(cell, params, carry, xs, tuple(batch), 1, name)
    noise = None if key is None else cell.noise(single_key(key), length, tuple(batch))
    carry = varying_like(carry, fresh, params, xs, walk, noise)
    return cell.scan(params, carry, xs, fresh=fresh, noise=noise, walk=walk)


def step(
    cell: Cell[Params, Carry],
    params: Params,
    carry: Carry | None,
    x: PyTree,
    *,
    reset: Bools | None = None,
    noise: Noise = None,
    implementation: Implementation = None,
) -> tuple[Carry, PyTree]:
    """One step of `cell`, by the fastest engine: (carry', y).

    For the least delay jit it, and hand back the carry as it comes. On the CPU the environment variable
    JAXRNN_NUM_THREADS bounds the threads of the kernels, and, before the first computation,
    `jax.config.update("jax_cpu_enable_async_dispatch", False)` spares what is no single kernel (a stack of layers) the
    way to another thread: only the program as a whole can decide on either.

    Args:
      cell: As in `scan`.
      params: As in `scan`.
      carry: Leaves (*batch, ...), or None to start fresh.
      x: (*batch, D).
      reset: bool (*batch): where it is true a new sequence begins, from the fresh carry; None for nowhere.
      noise: None (deterministic), or `(sequence, steps[t])` of `cell.noise(key, length, batch_shape)`.
      implementation: As in `scan`.

    Raises:
      ValueError: For what does not fit, and for cells that cannot run step by step.
      TypeError: For what does not fit, and for cells that cannot run step by step.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.LSTM(3, 4)
      >>> params = cell.init(jax.random.key(0))
      >>> carry, y = jaxrnn.step(cell, params, None, jnp.ones(3))
      >>> carry, y = jaxrnn.step(cell, params, carry, jnp.ones(3))
      >>> y.shape
      (4,)
    """
    return step_asked(None, cell, params, carry, x, reset=reset, noise=noise, implementation=implementation)


def step_asked(
    question: Question | None,
    cell: Cell,
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    *,
    reset: Bools | None = None,
    noise: Noise = None,
    implementation: Implementation = None,
) -> tuple[PyTree, PyTree]:
    """`step`, as `scan_asked` is `scan`."""
    check.a_cell("cell", cell)
    walk = Walk(implementation=checked(implementation), question=question)
    params, x = to_jax(params), jax.tree.map(jnp.asarray, x)
    batch_shape = batch_shape_of(cell, "x", x)
    if not cell.causal:
        raise TypeError(
            f"{cell!r} cannot run step by step: a backward cell begins at the end of the sequence. "
            "Run whole sequences with jaxrnn.scan."
        )
    carry, fresh = carries(cell, params, carry, x, batch_shape)
    if reset is not None:
        carry = select(single_flags("reset", reset, batch_shape), fresh, carry)
    return scan_one_step(cell, params, carry, x, noise=noise, walk=walk)


def rollout(
    cell: Cell[Params, Carry],
    params: Params,
    carry: Carry | None,
    x: PyTree,
    length: int,
    *,
    feedback: Callable[..., tuple[PyTree, PyTree]],
    inputs: PyTree = None,
    key: Array | None = None,
) -> tuple[PyTree, PyTree]:
    """Runs `cell` on its own output:

        for t in range(length):
            carry, y = cell.step(params, carry, x)
            x, keep = feedback(y, keys[t])  # with `inputs`, feedback(y, keys[t], inputs[t])
            kept.append(keep)

    Args:
      cell: As in `scan`.
      params: As in `scan`.
      carry: Leaves (*batch, ...), or None to start fresh.
      x: The first input, (*batch, D).
      length: The number of steps.
      feedback: `(y, key) -> (next x, what to keep)`, the next x with the shape and dtype of x.
      inputs: A tree of arrays (length, ...), or None. Entry t is the third argument of `feedback` at step t: what is
        known beforehand of the step that follows (covariates, a schedule, targets to feed now and then).
      key: Split into one key per step for `feedback`; None hands it None.

    Returns:
      The final carry, and what was kept, stacked, (length, ...)

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.GRU(3, 3)
      >>> params = cell.init(jax.random.key(0))
      >>> jaxrnn.rollout(cell, params, None, jnp.ones(3), 5, feedback=lambda y, key: (y, y))[1].shape
      (5, 3)
    """
    check.a_cell("cell", cell)
    length = check.integer("length", length, least=0)
    params, x = to_jax(params), jax.tree.map(jnp.asarray, x)
    carry, _ = carries(cell, params, carry, x, batch_shape_of(cell, "x", x))
    keys = None if key is None else jax.random.split(single_key(key), length)
    inputs = jax.tree.map(jnp.asarray, inputs)
    for path, leaf in jax.tree_util.tree_leaves_with_path(inputs):
        if leaf.shape[:1] != (length,):
            at = f"inputs{jax.tree_util.keystr(path)}"
            raise ValueError(f"{at}: expected a leading axis of {length}, the number of steps, got shape {leaf.shape}")
    wide, back = widened(params)

    def body(state, given):
        carry, x = state
        key, *rest = given
        new, y = cell.step(back(wide), carry, x)
        following, keep = feedback(y, key, *rest)
        check_feedback(following, x)
        return (cast_like(new, carry, owner=type(cell).__name__), following), keep

    start = varying_like((carry, x), params, keys, inputs)
    (carry, _), kept = lax.scan(body, start, (keys,) if inputs is None else (keys, inputs), length=length)
    return carry, kept


def last(ys: PyTree, lengths: Integers | None = None, *, mask: Bools | None = None, time_axis: int = 0) -> PyTree:
    """The outputs of the last valid step, zeros where there is none.

    Args:
      ys: Leaves with time and batch axes first, (T, *batch, ...) for `time_axis` 0.
      lengths: Integers (*batch), or None for all steps.
      mask: bool, time and batch axes as in ys.
      time_axis: Where time lies.

    Examples:
      >>> import jax.numpy as jnp, jaxrnn
      >>> jaxrnn.last(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1, 0]))
      Array([1., 0.], dtype=float32)
    """
    time_axis = check.integer("time_axis", time_axis, least=0)
    ys = jax.tree.map(lambda y: jnp.moveaxis(jnp.asarray(y), time_axis, 0), ys)
    leaves = jax.tree.leaves(ys)
    length = leaves[0].shape[0]
    if lengths is not None:
        batch_ndim = np.ndim(lengths)
    elif mask is not None:
        batch_ndim = np.ndim(mask) - 1
    else:
        return jax.tree.map(lambda y: y[-1] if length else jnp.zeros(y.shape[1:], y.dtype), ys)
    valid = valid_steps(lengths, mask, length, leaves[0].shape[1 : 1 + batch_ndim], time_axis)
    if length == 0 or valid is None:
        return jax.tree.map(lambda y: jnp.zeros(y.shape[1:], y.dtype), ys)
    return zero_where_not(valid.any(0), final(ys, valid, reverse=False))


class Explanation(NamedTuple):
    """Which implementation runs each call of an engine, on a platform."""

    platform: str
    calls: tuple[EngineCall, ...]

    def __str__(self):
        return "\n".join([f"on {self.platform}:", *map(str, self.calls)])


def explain(
    cell: Cell,
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    *,
    platform: str | None = None,
    one_step: bool = False,
    **keywords: Any,
) -> Explanation:
    """Which implementation `scan` with the same arguments runs for each call of an engine, and why not the others.

    Args:
      cell: As in `scan`.
      params: As in `scan`.
      carry: As in `scan`.
      xs: As in `scan`.
      platform: "cpu", "gpu" or "tpu"; None for the default one.
      one_step: Whether to explain `step` in place of `scan`; then xs is the x of one step, and keywords are `step`'s.
      keywords: As in `scan`. Nothing is computed.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.MGU(3, 4)
      >>> params = cell.init(jax.random.key(0))
      >>> jaxrnn.explain(cell, params, None, jnp.ones((7, 3)), platform="gpu").calls[0].implementation
      'xla'
      >>> print(jaxrnn.explain(cell, params, None, jnp.ones(3), platform="gpu", one_step=True))
      on gpu:
      gated_scan: xla (loop)  for MGU(input_size=3, hidden_size=4)
        not native: no kernel computes a MGU
        not associative: the recurrence is not linear
        not chunked: the recurrence is not linear
    """
    if platform not in ("cpu", "gpu", "tpu", None):
        raise ValueError(f"platform: expected 'cpu', 'gpu', 'tpu' or None, got {platform!r}")
    platform = jax.default_backend() if platform is None else platform
    question, run = Question(platform), step_asked if one_step else scan_asked
    jax.eval_shape(lambda *arrays: run(question, cell, *arrays, **keywords), params, carry, xs)
    return Explanation(platform, tuple(question.calls))
