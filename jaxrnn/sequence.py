"""Runs cells over a sequence, for one step or on their own output, and explains which implementation runs."""

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
    check_divided,
    check_feedback,
    flags_of,
    single_flags,
    single_key,
    time_first,
    to_jax,
    valid_steps,
)
from jaxrnn.cell import Carry, Cell, Params, scan_one_step
from jaxrnn.engines.arrays import cast_like, select, varying_like, widened, with_rows_of, zero_where_not
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
    axis_name: str | None = None,
    implementation: Implementation = None,
) -> tuple[Carry, PyTree]:
    """Runs `cell` over a sequence, or a batch of sequences: `lax.scan` for cells.

    Without options it does the same as

        ys = []
        for x in xs:
            carry, y = cell.step(params, carry, x)
            ys.append(y)
        return carry, jnp.stack(ys)

    Shapes: T is the number of steps, and `*batch` stands for any number of batch axes, including none. xs has shape
    (T, *batch, D), or (B, T, D) with `time_axis=1`.

    Args:
      cell: Any cell or composition.
      params: The parameters of the cell, as `cell.init` returns them.
      carry: The carry to start from, with leaves (*batch, ...), or None for `cell.initial_carry`. A given carry keeps
        its dtypes; with None, the carry has the widest dtype among float32, that of the params and that of floating xs.
      xs: The inputs. Arrays with the batch first need `time_axis=1`: without it the
        recurrence would run along the batch.
      lengths: Integers (*batch): the number of valid steps, counted from the first step. Where the values are not known
        at trace time, a length above T acts as T and one below 0 as 0; where they are known, such a length raises an
        error.
      mask: bool, with time and batch axes as in xs: the valid steps, in any pattern. An invalid step does nothing at
        all: it reads no input and no reset, the carry stays the same, and ys is 0. NaN in it reaches no number and no
        gradient.
      reset: bool, with time and batch axes as in xs: True where a new sequence begins at step t. Forward, step t starts
        from a fresh carry; in reverse, the valid step before t does. Nothing crosses the boundary, neither values nor
        gradients.
      reverse: Whether to run from the last valid step to the first; ys stay aligned with xs.
      time_axis: The position of the time axis among the time and batch axes of xs, ys, mask and reset.
      key: A PRNG key from which noise (dropout, zoneout) is drawn; with None, the run is deterministic.
      remat_every: Gradient checkpointing: keep the carry only every `remat_every` steps and recompute the steps between
        during the backward pass, in every layer.
      axis_name: Inside `jax.shard_map`, the axis of the mesh that time is divided over, for cells that are linear in
        their state and what is made of them: each device gives its part of the steps of xs, mask and reset, and the
        same of all else; `lengths` are of the whole sequences, and so is the final carry. Devices exchange states,
        never steps.
      implementation: None for the fastest correct one; a name for exactly that one; or a mapping from engine to name.

    Returns:
      The final carry, and ys (T, *batch, O) with time at `time_axis`, or (*batch, O) for a cell that gives one output
      per sequence (`ends_time`).

    Raises:
      ValueError: If shapes, dtypes, values or names do not fit. It is raised at trace time.
      TypeError: If shapes, dtypes, values or names do not fit. It is raised at trace time.

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
        axis_name=axis_name,
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
    axis_name: str | None = None,
    implementation: Implementation = None,
    names: Names = NAMES,
) -> tuple[PyTree, PyTree]:
    """Runs `scan`; with a `question`, as on its platform, and every call of an engine is added to its answers."""
    check.a_cell("cell", cell)
    if remat_every is not None:
        remat_every = check.integer("remat_every", remat_every)
    named = checked(implementation)
    params = to_jax(params)
    xs, length, batch_shape, time_axis = time_first(cell, xs, time_axis)
    if axis_name is not None:
        check_divided(cell, axis_name)
        if lengths is not None:
            lengths = jnp.asarray(lengths)
            lengths = lengths - (lax.axis_index(axis_name) * length).astype(lengths.dtype)
    valid = valid_steps(lengths, mask, length, batch_shape, time_axis, names.lengths)
    if reset is not None:
        reset = flags_of("reset", reset, length, batch_shape, time_axis)
    valid, boundaries = with_rows_of((valid, reset), jax.tree.leaves(xs)[0], 0, 1 + len(batch_shape))
    batch_major = 0 < time_axis == len(batch_shape)
    walk = Walk(valid, boundaries, bool(reverse), remat_every, named, batch_major, question, axis_name)
    carry, ys = walked(cell, params, carry, zero_where_not(valid, xs), key, walk, names.carry)
    if time_axis and not cell.ends_time:
        ys = jax.tree.map(lambda y: jnp.moveaxis(y, 0, time_axis), ys)
    return carry, ys


def walked(
    cell: Cell, params: PyTree, carry: PyTree, xs: PyTree, key: Array | None, walk: Walk, name: str = "carry"
) -> tuple[PyTree, PyTree]:
    """Runs `cell` along `walk` from `carry`, or a fresh carry for None, with noise if given a `key`; time is first."""
    length, *batch = batch_shape_of(cell, "xs", xs)
    carry, fresh = carries(cell, params, carry, xs, tuple(batch), 1, name)
    noise = None
    if key is not None:
        sequence, steps = cell.noise(single_key(key), length, tuple(batch))
        if walk.axis_name is not None:  # steps of other devices have other noise
            own = jax.random.fold_in(key, lax.axis_index(walk.axis_name))
            steps = cell.noise(own, length, tuple(batch))[1]
        first = jax.tree.leaves(xs)[0]
        noise = with_rows_of(sequence, first, 1, len(batch)), with_rows_of(steps, first, 0, 1 + len(batch))
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
    """Runs one step of `cell` by the fastest engine: (carry', y).

    For the lowest latency, jit it and pass the carry back as it was returned. On the CPU, the environment variable
    JAXRNN_NUM_THREADS limits the number of threads of the kernels. Calling
    `jax.config.update("jax_cpu_enable_async_dispatch", False)` before the first computation avoids a switch to another
    thread for models that are not a single kernel (a stack of layers). Only the program as a whole can decide on
    either.

    Args:
      cell: As in `scan`.
      params: As in `scan`.
      carry: The carry, with leaves (*batch, ...), or None to start from a fresh carry.
      x: The input of one step, (*batch, D).
      reset: bool (*batch): where it is true, a new sequence begins from the fresh carry. None for nowhere.
      noise: None for a deterministic step, or `(sequence, steps[t])`, where `cell.noise(key, length, batch_shape)`
        returned `(sequence, steps)`.
      implementation: As in `scan`.

    Raises:
      ValueError: If an argument does not fit, or if the cell cannot run step by step.
      TypeError: If an argument does not fit, or if the cell cannot run step by step.

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
    """Runs `step` with a `question`, as `scan_asked` runs `scan`."""
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
      carry: The carry, with leaves (*batch, ...), or None to start from a fresh carry.
      x: The first input, (*batch, D).
      length: The number of steps.
      feedback: A function `(y, key) -> (next x, keep)`. The next x has the shape and dtype of x.
      inputs: A pytree of arrays (length, ...), or None. Entry t is the third argument of `feedback` at step t. It holds
        data of the next step that are known beforehand (covariates, a schedule, or targets for occasional teacher
        forcing).
      key: A PRNG key, which is split into one key per step for `feedback`. With None, `feedback` gets None.

    Returns:
      The final carry, and the values of `keep`, stacked, (length, ...).

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
    """The outputs of the last valid step, or zeros where there is none.

    Args:
      ys: Leaves with time and batch axes first, (T, *batch, ...) for `time_axis` 0.
      lengths: Integers (*batch), the number of valid steps, or None for all steps.
      mask: bool, with time and batch axes as in ys: the valid steps.
      time_axis: The position of the time axis.

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
    """The implementation that runs each call of an engine on one platform."""

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
    """Explains which implementation `scan` runs for each call of an engine, and why it does not run the others.

    The arguments are those of `scan`; nothing is computed. Arrays may be `jax.ShapeDtypeStruct`, with symbols for sizes
    as `jax.export` has them, too.

    Args:
      cell: As in `scan`.
      params: As in `scan`.
      carry: As in `scan`.
      xs: As in `scan`.
      platform: "cpu", "gpu" or "tpu"; None for the default platform.
      one_step: Whether to explain `step` in place of `scan`. Then xs is the input x of one step, and `keywords` are
        those of `step`.
      keywords: As in `scan`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.MGU(3, 4)
      >>> params = cell.init(jax.random.key(0))
      >>> jaxrnn.explain(cell, params, None, jnp.ones((7, 3)), platform="gpu").calls[0].implementation
      'xla'
      >>> print(jaxrnn.explain(cell, params, None, jnp.ones(3), platform="gpu", one_step=True))
      on gpu:
      gated_scan: xla  for MGU(input_size=3, hidden_size=4)
        not native: the kernels are compiled for the CPU
        not associative: the recurrence is not linear
        not chunked: the recurrence is not linear
    """
    if platform not in ("cpu", "gpu", "tpu", None):
        raise ValueError(f"platform: expected 'cpu', 'gpu', 'tpu' or None, got {platform!r}")
    platform = jax.default_backend() if platform is None else platform
    question, run = Question(platform), step_asked if one_step else scan_asked
    shapes = {name: each for name, each in keywords.items() if isinstance(each, jax.ShapeDtypeStruct)}
    known = {name: each for name, each in keywords.items() if name not in shapes}
    jax.eval_shape(lambda given, *arrays: run(question, cell, *arrays, **known, **given), shapes, params, carry, xs)
    return Explanation(platform, tuple(question.calls))
