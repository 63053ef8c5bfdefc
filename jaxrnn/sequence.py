"""Running cells: over a sequence, one step, on their own output; and seeing how."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrnn import check
from jaxrnn.cell import Cell, input_size
from jaxrnn.engines import choose, native
from jaxrnn.engines.arrays import accumulator, cast_like, inexact, varying_like, widened, with_rows_of, zero_where_not
from jaxrnn.engines.choose import EngineCall, Implementation
from jaxrnn.engines.loop import final


def scan(
    cell: Cell,
    params: Any,
    carry: Any,
    xs: Any,
    *,
    lengths: Any = None,
    mask: Any = None,
    reset: Any = None,
    reverse: bool = False,
    time_axis: int = 0,
    key: Array | None = None,
    remat_every: int | None = None,
    implementation: Implementation = None,
) -> tuple[Any, Any]:
    """`lax.scan` for cells: runs `cell` over a sequence, or a batch of them.

    Without options it is

        ys = []
        for x in xs:
            carry, y = cell.step(params, carry, x)
            ys.append(y)
        return carry, jnp.stack(ys)

    Shapes: T time, `*batch` any number of axes, none included; xs (T, *batch, D), or with `time_axis=1` (B, T, D).

    Args:
      cell: any cell or composition.
      params: its parameters, as `cell.init` gives them.
      carry: the carry to start from, leaves (*batch, ...), or None for `cell.initial_carry`. A given carry keeps its
        dtypes; None starts in the widest of float32, the params' and floating xs' dtype.
      xs: the inputs.
      lengths: integers (*batch): the steps that are valid, from the first. Beyond T they act as T, below 0 as 0, where
        their values are not known at trace time; else they raise.
      mask: bool, time and batch axes as in xs: the valid steps, in any pattern. An invalid step does nothing at all: no
        input, no reset, the carry stays, ys is 0; NaN in it reaches no number and no gradient.
      reset: bool, time and batch axes as in xs: a new sequence begins at step t. Forward, t starts fresh; in reverse,
        the valid step before t does. Nothing crosses the boundary, in values or in gradients.
      reverse: run from the last valid step to the first; ys stay aligned with xs.
      time_axis: where time lies among time and batch axes, for xs, ys, mask and reset.
      key: a PRNG key: noise (dropout, zoneout) is drawn; None: deterministic.
      remat_every: store one carry every so many steps for the backward pass and compute the rest again, in every layer.
      implementation: None for the fastest correct one; a name for exactly that one; a mapping from engine to name.

    Returns:
      The final carry, and ys (T, *batch, O) with time at `time_axis`, or (*batch, O) from a cell that ends time.

    Raises:
      ValueError, TypeError: for shapes, dtypes, values and names that do not fit, at trace time.

        >>> import jax, jax.numpy as jnp, jaxrnn
        >>> cell = jaxrnn.GRU(3, 16)
        >>> params = cell.init(jax.random.key(0))
        >>> xs = jnp.ones((5, 7, 3))  # batch, time, features
        >>> carry, ys = jaxrnn.scan(cell, params, None, xs, lengths=jnp.array([7, 0, 3, 2, 1]), time_axis=1)
        >>> carry.h.shape, ys.shape
        ((5, 16), (5, 7, 16))
    """
    _check_cell(cell)
    choose.check(implementation)
    if remat_every is not None:
        remat_every = _positive("remat_every", remat_every)
    params = _on_device(params)
    xs, length, batch_shape, time_axis = _sequence(cell, xs, time_axis)
    valid = _valid(lengths, mask, length, batch_shape, time_axis)
    if reset is not None:
        reset = _flags("reset", reset, length, batch_shape, time_axis)
    xs = zero_where_not(valid, xs)
    carry, fresh = _carries(cell, params, carry, xs, batch_shape, 1)
    noise = None if key is None else cell.noise(_key(key), length, batch_shape)
    carry = varying_like(carry, fresh, params, xs, valid, reset, noise)
    with native.reading(batch_major=0 < time_axis == len(batch_shape)):
        carry, ys = cell.scan(
            params,
            carry,
            xs,
            fresh=fresh,
            valid=valid,
            reset=reset,
            reverse=bool(reverse),
            noise=noise,
            remat_every=remat_every,
            implementation=implementation,
        )
    if time_axis and not cell.ends_time:
        ys = jax.tree.map(lambda y: jnp.moveaxis(y, 0, time_axis), ys)
    return carry, ys


def step(
    cell: Cell, params: Any, carry: Any, x: Any, *, noise: Any = None, implementation: Implementation = None
) -> tuple[Any, Any]:
    """One step of `cell`, by the fastest engine: (carry', y).

    Args:
      cell, params: as in `scan`.
      carry: leaves (*batch, ...), or None to start fresh.
      x: (*batch, D).
      noise: None (deterministic), or `(sequence, steps[t])` of `cell.noise(key, length, batch_shape)`.
      implementation: as in `scan`.

    For the least delay jit it, and hand back the carry as it comes. On the CPU the environment variable
    JAXRNN_NUM_THREADS bounds the threads of the kernels, and, before the first computation,
    `jax.config.update("jax_cpu_enable_async_dispatch", False)` spares what is no single kernel (a stack of layers) the
    way to another thread: only the program as a whole can decide on either.

    Raises:
      ValueError, TypeError: for what does not fit, and for cells that cannot run step by step.

        >>> import jax, jax.numpy as jnp, jaxrnn
        >>> cell = jaxrnn.LSTM(3, 4)
        >>> params = cell.init(jax.random.key(0))
        >>> carry, y = jaxrnn.step(cell, params, None, jnp.ones(3))
        >>> carry, y = jaxrnn.step(cell, params, carry, jnp.ones(3))
        >>> y.shape
        (4,)
    """
    _check_cell(cell)
    choose.check(implementation)
    params, x = _on_device(params), jax.tree.map(jnp.asarray, x)
    batch_shape = _batch_shape(cell, "x", x)
    if not cell.causal:
        raise TypeError(
            f"{cell!r} cannot run step by step: a backward cell begins at the end of the sequence. "
            "Run whole sequences with jaxrnn.scan."
        )
    carry, _ = _carries(cell, params, carry, x, batch_shape)

    def one(tree):
        return jax.tree.map(lambda leaf: leaf[None], tree)

    new, ys = cell.scan(
        params,
        carry,
        one(x),
        fresh=carry,
        valid=None,
        reset=None,
        reverse=False,
        noise=None if noise is None else (noise[0], one(noise[1])),
        remat_every=None,
        implementation=implementation,
    )
    return new, ys if cell.ends_time else jax.tree.map(lambda y: y[0], ys)


def rollout(
    cell: Cell,
    params: Any,
    carry: Any,
    x: Any,
    length: int,
    *,
    feedback: Callable[..., tuple[Any, Any]],
    inputs: Any = None,
    key: Array | None = None,
) -> tuple[Any, Any]:
    """Runs `cell` on its own output:

        for t in range(length):
            carry, y = cell.step(params, carry, x)
            x, keep = feedback(y, keys[t])  # with `inputs`, feedback(y, keys[t], inputs[t])
            kept.append(keep)

    Args:
      cell, params: as in `scan`.
      carry: leaves (*batch, ...), or None to start fresh.
      x: the first input, (*batch, D).
      length: the number of steps.
      feedback: `(y, key) -> (next x, what to keep)`, the next x with the shape and dtype of x.
      inputs: a tree of arrays (length, ...), or None. Entry t is the third argument of `feedback` at step t: what is
        known beforehand of the step that follows (covariates, a schedule, targets to feed now and then).
      key: split into one key per step for `feedback`; None hands it None.

    Returns:
      The final carry, and what was kept, stacked, (length, ...).

        >>> import jax, jax.numpy as jnp, jaxrnn
        >>> cell = jaxrnn.GRU(3, 3)
        >>> params = cell.init(jax.random.key(0))
        >>> jaxrnn.rollout(cell, params, None, jnp.ones(3), 5, feedback=lambda y, key: (y, y))[1].shape
        (5, 3)
    """
    _check_cell(cell)
    length = _index("length", length, at_least=0)
    params, x = _on_device(params), jax.tree.map(jnp.asarray, x)
    carry, _ = _carries(cell, params, carry, x, _batch_shape(cell, "x", x))
    keys = None if key is None else jax.random.split(_key(key), length)
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
        _check_feedback(following, x)
        return (cast_like(new, carry, owner=type(cell).__name__), following), keep

    start = varying_like((carry, x), params, keys, inputs)
    (carry, _), kept = lax.scan(body, start, (keys,) if inputs is None else (keys, inputs), length=length)
    return carry, kept


def last(ys: Any, lengths: Any = None, *, mask: Any = None, time_axis: int = 0) -> Any:
    """The outputs of the last valid step, zeros where there is none.

    Args:
      ys: leaves with time and batch axes first, (T, *batch, ...) for `time_axis` 0.
      lengths: integers (*batch), or None for all steps. mask: bool, time and batch axes as in ys.
      time_axis: where time lies.

        >>> import jax.numpy as jnp, jaxrnn
        >>> jaxrnn.last(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1, 0]))
        Array([1., 0.], dtype=float32)
    """
    time_axis = _index("time_axis", time_axis, at_least=0)
    ys = jax.tree.map(lambda y: jnp.moveaxis(jnp.asarray(y), time_axis, 0), ys)
    leaves = jax.tree.leaves(ys)
    length = leaves[0].shape[0]
    if lengths is None and mask is None:
        return jax.tree.map(lambda y: y[-1] if length else jnp.zeros(y.shape[1:], y.dtype), ys)
    batch_ndim = np.ndim(mask) - 1 if lengths is None else np.ndim(lengths)
    valid = _valid(lengths, mask, length, leaves[0].shape[1 : 1 + batch_ndim], time_axis)
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
    cell: Cell, params: Any, carry: Any, xs: Any, *, platform: str | None = None, **keywords: Any
) -> Explanation:
    """Which implementation `scan` with the same arguments runs for each call of an engine, and why not the others.

    Args:
      cell, params, carry, xs, keywords: as in `scan`. Nothing is computed.
      platform: "cpu", "gpu" or "tpu"; None for the default one.

        >>> import jax, jax.numpy as jnp, jaxrnn
        >>> cell = jaxrnn.GRU(3, 4)
        >>> params = cell.init(jax.random.key(0))
        >>> jaxrnn.explain(cell, params, None, jnp.ones((7, 3)), platform="gpu").calls[0].implementation
        'xla'
    """
    if platform not in ("cpu", "gpu", "tpu", None):
        raise ValueError(f"platform: expected 'cpu', 'gpu', 'tpu' or None, got {platform!r}")
    platform = jax.default_backend() if platform is None else platform
    with choose.recording(platform) as calls:
        jax.eval_shape(lambda params, carry, xs: scan(cell, params, carry, xs, **keywords), params, carry, xs)
    return Explanation(platform, tuple(calls))


def _check_cell(cell):
    if not isinstance(cell, Cell):
        hint = " (the class; write e.g. GRU(3, 16))" if isinstance(cell, type) else ""
        raise TypeError(f"cell: expected a jaxrnn.Cell, got {cell!r}{hint}")


def _on_device(params: Any) -> Any:
    """`params` with NumPy arrays as JAX's, so that a cell may index them by what is traced."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, params)


def _index(name: str, value: Any, *, at_least: int) -> int:
    if isinstance(value, bool) or not hasattr(type(value), "__index__") or isinstance(value, jax.core.Tracer):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if operator.index(value) < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, got {value}")
    return operator.index(value)


def _positive(name: str, value: Any) -> int:
    return _index(name, value, at_least=1)


def _key(key: Array) -> Array:
    if not isinstance(key, jax.Array):
        raise TypeError(f"key: expected a jax.random key, got {type(key).__name__}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.ndim != 1:
            raise TypeError(f"key: expected a jax.random key, got {key.dtype}{list(key.shape)}")
        key = jax.random.wrap_key_data(key)
    if key.ndim:
        raise ValueError(f"key: expected a single key, got shape {key.shape}; vmap over keys for one per row")
    return key


def _batch_shape(cell: Cell, name: str, x: Any) -> tuple[int, ...]:
    """The leading axes of x, those that do not belong to one step."""
    ndims = cell.input_ndim
    if isinstance(ndims, int):
        ndims = jax.tree.map(lambda _: cell.input_ndim, x)
    if jax.tree.structure(ndims) != jax.tree.structure(x) or not jax.tree.leaves(x):
        raise ValueError(f"{name}: expected a tree like {cell.input_ndim}, got {jax.tree.structure(x)}")
    shapes = []
    for (path, leaf), ndim in zip(jax.tree_util.tree_leaves_with_path(x), jax.tree.leaves(ndims), strict=True):
        shapes.append(leaf.shape[: leaf.ndim - ndim])
        at = f"{name}{jax.tree_util.keystr(path)}"
        if leaf.ndim < ndim:
            raise ValueError(f"{at}: {cell!r} takes {ndim} axes per step, got shape {leaf.shape}")
        if shapes[-1] != shapes[0]:
            raise ValueError(f"{at}: expected leading axes {shapes[0]} as in the other leaves, got {shapes[-1]}")
    size = input_size(cell)
    if isinstance(x, jax.Array) and size is not None:
        size = size if isinstance(size, tuple) else (size,)
        if x.shape[x.ndim - len(size) :] != size:
            raise ValueError(f"{name}: {cell!r} expects (..., {', '.join(map(str, size))}), got shape {x.shape}")
    return shapes[0]


def _sequence(cell: Cell, xs: Any, time_axis: Any) -> tuple[Any, int, tuple[int, ...], int]:
    """xs with time first, its length, the batch shape, and the time axis."""
    time_axis = _index("time_axis", time_axis, at_least=0)
    xs = jax.tree.map(jnp.asarray, xs)
    shape = _batch_shape(cell, "xs", xs)
    if time_axis >= len(shape):
        raise ValueError(
            f"time_axis: expected less than {len(shape)}, the number of time and batch axes, got {time_axis}"
        )
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, time_axis, 0), xs) if time_axis else xs
    return xs, shape[time_axis], shape[:time_axis] + shape[time_axis + 1 :], time_axis


def _flags(name: str, flags: Any, length: int, batch_shape: tuple[int, ...], time_axis: int) -> Array:
    """Booleans with time first."""
    flags = jnp.asarray(flags)
    if flags.dtype != bool:
        raise TypeError(f"{name}: expected bool, got {flags.dtype}")
    shape = (*batch_shape[:time_axis], length, *batch_shape[time_axis:])
    if flags.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, time and batch axes as in xs, got {flags.shape}")
    return jnp.moveaxis(flags, time_axis, 0)


def _valid(lengths: Any, mask: Any, length: int, batch_shape: tuple[int, ...], time_axis: int) -> Array | None:
    if lengths is not None and mask is not None:
        raise ValueError("mask: give lengths or mask, not both")
    if mask is not None:
        return _flags("mask", mask, length, batch_shape, time_axis)
    if lengths is None:
        return None
    if check.concrete(lengths):
        lengths = np.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    if lengths.shape != batch_shape:
        raise ValueError(f"lengths: expected the batch shape {batch_shape}, got {lengths.shape}")
    if check.concrete(lengths) and lengths.size and (lengths.min() < 0 or lengths.max() > length):
        raise ValueError(f"lengths: expected 0 to {length}, got {lengths.min()} to {lengths.max()}")
    return jnp.arange(length).reshape(length, *(1,) * len(batch_shape)) < lengths[None]


def _carries(
    cell: Cell, params: Any, carry: Any, xs: Any, batch_shape: tuple[int, ...], at: int = 0
) -> tuple[Any, Any]:
    """The carry to start from, and the fresh one in the same dtypes; batch axes begin at axis `at` of xs."""
    fresh = cell.initial_carry(params, batch_shape)
    first = jax.tree.leaves(xs)[0]
    fresh = with_rows_of(fresh, first, at, len(batch_shape))
    if carry is None:
        fresh = _widen(fresh, params, xs)
        return fresh, fresh
    expected, structure = jax.tree_util.tree_flatten_with_path(fresh)
    if jax.tree.structure(carry) != structure:
        fields = getattr(carry, "_fields", ())
        fitting = [f"; carry.{name} has it" for name in fields if jax.tree.structure(getattr(carry, name)) == structure]
        raise ValueError(
            f"carry: {cell!r} expects the structure {structure}, got {jax.tree.structure(carry)}{''.join(fitting)}"
        )
    carry = with_rows_of(jax.tree.map(jnp.asarray, carry), first, at, len(batch_shape))
    for (path, want), have in zip(expected, jax.tree.leaves(carry), strict=True):
        name = f"carry{jax.tree_util.keystr(path)}"
        if have.shape != want.shape:
            raise ValueError(f"{name}: expected shape {want.shape}, got {have.shape}")
        of_a_kind = jnp.iscomplexobj(want) == jnp.iscomplexobj(have)
        if not of_a_kind or not jnp.can_cast(want.dtype, have.dtype, casting="same_kind"):
            raise TypeError(f"{name}: expected {want.dtype} or a dtype of its kind, got {have.dtype}")
    return carry, jax.tree.map(lambda new, old: new.astype(old.dtype), fresh, carry)


def _widen(carry: Any, params: Any, xs: Any) -> Any:
    """`carry` in the widest precision of float32, the params and floating xs."""
    leaves = [leaf for leaf in jax.tree.leaves((params, xs)) if inexact(leaf)]
    real = accumulator(*(jnp.finfo(leaf.dtype).dtype for leaf in leaves))
    return jax.tree.map(lambda leaf: leaf.astype(accumulator(leaf.dtype, real)) if inexact(leaf) else leaf, carry)


def _check_feedback(following: Any, x: Any) -> None:
    def describe(tree):
        return jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree)

    if describe(following) != describe(x):
        raise TypeError(f"feedback: the next x must be like x, {describe(x)}, got {describe(following)}")
