"""The engine of linear recurrences, h_t = a_t h_{t-1} + b_t, elementwise: as a function of arrays, and for cells."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn.engines.arrays import accumulator, select, zero_where_not
from jaxrnn.engines.cpu import library
from jaxrnn.engines.linear.primitive import ELSEWHERE, bind
from jaxrnn.engines.sequence_parallel import added, check_axis_name, part, states
from jaxrnn.engines.walk import Flags, Implementation, Walk, checked, no_kernel_for, no_pallas_for, refusals_of_sizes
from jaxrnn.typing import Bools, PyTree


def linear_scan(
    a: PyTree,
    b: PyTree,
    h0: Any = None,
    *,
    reverse: bool = False,
    reset: Bools | None = None,
    mask: Bools | None = None,
    time_axis: int = 0,
    axis_name: str | None = None,
    implementation: Implementation = None,
) -> tuple[Array, Array]:
    """Runs the linear recurrence h_t = a_t h_{t-1} + b_t, elementwise: (h_T, hs).

    Numbers are real or complex, of any sign and modulus. In half precision, sums are in float32, and so is h_T. The
    gradients are one such recurrence in the other direction; forward mode and second derivatives are exact too.

    Args:
      a: The coefficients, broadcastable to b. They are constant over time, over a batch or over channels where that
        axis is 1 or missing.
      b: The inputs that are added, (T, ...), or with time at `time_axis`.
      h0: The state before the first step, broadcastable to b without its time axis; None for zeros.
      reverse: Whether to run from the last step to the first: h_t = a_t h_{t+1} + b_t.
      reset: bool, with the shape of b's leading axes, time among them: True where a new sequence begins at step t.
        Forward, h_t = b_t there; in reverse, that is so at the valid step before. It is a selection: nothing non-finite
        crosses the boundary.
      mask: bool like `reset`: the valid steps. An invalid step keeps the state, and its hs is 0.
      time_axis: The axis of time in b, and in `reset` and `mask`; also in a, if a has as many axes as b.
      axis_name: Inside `jax.shard_map`, the axis of the mesh that time is divided over: each device gives its part of
        the steps, and the same h0. States and products of coefficients are exchanged, (devices, ...), never steps; the
        last state is that of the whole.
      implementation: None for the fastest; "native" is one pass of a compiled kernel (float32 or float64, on the CPU),
        "xla" goes step by step, "associative" takes logarithmically many parallel passes, and "chunked" does so in
        chunks, one after another. "pallas" is one pass on a TPU or, from Hopper on, an NVIDIA GPU (real numbers, sums
        in float32); it was compiled for them and run by interpreters, not measured. On a CPU it is interpreted.

    Returns:
      The last state, with b's shape without time, and all states, with the shape of b.

    Raises:
      ValueError: If shapes, dtypes or names do not fit. It is raised at trace time.
      TypeError: If shapes, dtypes or names do not fit. It is raised at trace time.

    Examples:
      >>> import jax.numpy as jnp, jaxrnn
      >>> last, hs = jaxrnn.linear_scan(0.5, jnp.ones(4))
      >>> hs
      Array([1.   , 1.5  , 1.75 , 1.875], dtype=float32)
      >>> jaxrnn.linear_scan(0.5, jnp.ones(4), reset=jnp.array([False, False, True, False]))[1]
      Array([1. , 1.5, 1. , 1.5], dtype=float32)

    References:
      Martin and Cundy 2018, arXiv 1709.04057 (in parallel over time).
    """
    b = jnp.asarray(b)
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(a, b)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"b: expected floating or complex numbers, got {b.dtype}")
    a, b = jnp.asarray(a), b.astype(dtype)
    a = a.astype(dtype if jnp.iscomplexobj(a) else jnp.finfo(dtype).dtype)
    if not 0 <= time_axis < b.ndim:
        raise ValueError(f"time_axis: expected 0 to {b.ndim - 1}, an axis of b with shape {b.shape}, got {time_axis}")
    inner = (*b.shape[:time_axis], *b.shape[time_axis + 1 :])
    a = _broadcastable("a", a, b.shape)
    a = a.reshape((1,) * (b.ndim - a.ndim) + a.shape)
    state = accumulator(dtype)
    if h0 is None:
        h = jnp.zeros(inner, state)
    else:
        h = jnp.asarray(h0)
        h = jnp.broadcast_to(_broadcastable("h0", h, inner), inner).astype(accumulator(h.dtype, state))
    valid, reset = (_flags(name, flag, b.shape, time_axis) for name, flag in (("mask", mask), ("reset", reset)))
    if valid is not None and reset is not None and valid.ndim != reset.ndim:
        raise ValueError(f"reset: expected as many axes as mask has, {valid.ndim}, got {reset.ndim}")
    walk = Walk(valid, reset, bool(reverse), implementation=checked(implementation))
    form = linear_form(walk, (b.shape[time_axis], *inner), a.dtype, b.dtype, h.dtype)
    a, b, whole = jnp.moveaxis(a, time_axis, 0), jnp.moveaxis(b, time_axis, 0), None
    if axis_name is not None:
        check_axis_name(axis_name)
        h, whole = linear_states(a, b, h, walk.replace(axis_name=axis_name), form)
    last, hs = linear_recurrence(a, b, h, flags=walk.flags, reverse=walk.reverse, form=form)
    return last if whole is None else whole, jnp.moveaxis(walk.without_padding(hs), 0, time_axis)


def linear_states(a: Array, b: Array, h: Array, walk: Walk, form: str | None, fresh: PyTree = 0) -> tuple[Array, Array]:
    """The state before the steps of this device, and that after the steps of all."""
    run = functools.partial(linear_recurrence, flags=walk.flags, reverse=walk.reverse, form=form)
    (last, _), (total, _) = run(a, b, jnp.zeros_like(h)), run(a, jnp.zeros_like(b), jnp.ones_like(h))
    return states(part(walk, total, last), h, added, walk, fresh)


def linear_form(walk: Walk, shape: Sequence[Any], *dtypes, owner: object = "linear_scan") -> str | None:
    """Returns what runs the recurrence of `owner` on sequences of a shape (T, ...) and arrays of `dtypes`: a name, or
    None for each platform's own.
    """
    refusal = library.absent() if library.takes(*dtypes) else no_kernel_for(*dtypes)
    refusals = ({} if refusal is None else {"native": refusal}) | refusals_of_sizes(shape)
    no_pallas = no_pallas_for(shape, *dtypes)
    chosen, refusals = walk.choose("linear_scan", refusals, cell=owner, elsewhere=ELSEWHERE, no_pallas=no_pallas)
    walk.record("linear_scan", chosen, refusals, cell=owner)
    return walk.form("linear_scan", chosen, refusals)


def kernel_serves(walk: Walk, shape: Sequence[Any], *, owner: object, pays: bool) -> bool:
    """Whether a kernel that computes more than the recurrence of `owner` runs it on sequences of a shape (T, ...),
    because it pays or is named; if so, that is recorded.
    """
    named = walk.named("linear_scan")
    asked = (named == "native" or (named is None and pays)) and walk.platform in (None, "cpu")
    if not asked or library.absent() is not None or refusals_of_sizes(shape):
        return False
    walk.record("linear_scan", "native", {}, cell=owner)
    return True


def linear_recurrence(
    a: Array, b: Array, h: Array, *, flags: Flags, reverse: bool, form: str | None
) -> tuple[Array, Array]:
    """Runs the recurrence over the first axis: (the last h, all h).

    Args:
      a: The coefficients, broadcastable to b.
      b: The inputs that are added, (T, ...), in the dtype of the result.
      h: The state before the first step, with b's shape without time, in a dtype for sums.
      flags: The flags over leading axes of b. An invalid step keeps the state; at a step that starts fresh, h_t = b_t.
      reverse: Whether to run from the last step to the first.
      form: The result of `linear_form`.
    """
    valid, start = flags
    if b.size == 0:
        return h, b
    a = a.reshape((1,) * (b.ndim - a.ndim) + a.shape)
    if valid is not None:
        wide = jnp.broadcast_to(a, jnp.broadcast_shapes(a.shape, valid.shape + (1,) * (b.ndim - valid.ndim)))
        a, b = select(valid, wide, jnp.ones_like(wide)), zero_where_not(valid, b)
    cut = () if start is None else (start.reshape(start.shape + (1,) * (b.ndim - start.ndim)),)
    hs, last = bind(a, b, h, *cut, reverse=reverse, shifted=False, form=form)
    return last, hs


def _broadcastable(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    fits = array.ndim <= len(shape) and all(
        own in (1, whole) for own, whole in zip(array.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, got {array.shape}")
    return array


def _flags(name: str, flag: Any, shape: tuple[int, ...], time_axis: int) -> Array | None:
    """Returns the flag with time first."""
    if flag is None:
        return None
    flag = jnp.asarray(flag)
    if flag.dtype != bool:
        raise TypeError(f"{name}: expected bool, got {flag.dtype}")
    if flag.ndim <= time_axis or flag.shape != shape[: flag.ndim]:
        raise ValueError(f"{name}: expected leading axes of b, {shape}, time among them, got {flag.shape}")
    return jnp.moveaxis(flag, time_axis, 0)
