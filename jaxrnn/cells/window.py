"""The last inputs before every step, which a causal convolution over time reads."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from jaxrnn.engines.sequence_parallel import part, states
from jaxrnn.engines.walk import Flags, Walk


def step_window(window: Array, x: Array) -> tuple[list[Array], Array]:
    """Returns, for a window (..., K−1, D), the inputs of one step, the oldest first and x last, and the window after
    the step.
    """
    taps = [*jnp.moveaxis(window.astype(x.dtype), -2, 0), x]
    if len(taps) == 1:
        return taps, window
    return taps, jnp.concatenate([window[..., 1:, :], x[..., None, :].astype(window.dtype)], axis=-2)


def with_window(window: Array, xs: Array, reverse: bool) -> tuple[Array, Array]:
    """Returns the steps of a window (*batch, K−1, D) and after them, in reverse before them, those of `xs`; and the
    window after the last step.
    """
    before = jnp.moveaxis(window, -2, 0)
    if reverse:
        whole, last = with_window(window, jnp.flip(xs, 0), False)
        return jnp.flip(whole, 0), last
    whole = jnp.concatenate([before.astype(xs.dtype), xs])
    last = jnp.concatenate([before, xs.astype(window.dtype)])[xs.shape[0] :]  # what was in the window is not rounded
    return whole, jnp.moveaxis(last, 0, -2)


def windows(window: Array, fresh: Array, xs: Array, flags: Flags, reverse: bool) -> tuple[list[Array], Array]:
    """Returns, for every step, the last K valid inputs since its sequence began, and the window after the last step.

    The inputs are K arrays like `xs`, the oldest first; the last one is `xs` itself.

    Args:
      window: The last K−1 valid inputs before `xs`, (*batch, K−1, D).
      fresh: The inputs that a sequence begins with.
      xs: The inputs, (T, *batch, D).
      flags: Which steps are valid, and which are the first of a sequence.
      reverse: Whether to run from the last step to the first.
    """
    if reverse:
        flags = Flags(*(None if each is None else jnp.flip(each, 0) for each in flags))
        taps, after = windows(window, fresh, jnp.flip(xs, 0), flags, False)
        return [jnp.flip(tap, 0) for tap in taps], after
    valid, start = flags
    before, length = window.shape[-2], xs.shape[0]
    if before == 0:
        return [xs], window
    whole, last = with_window(window, xs, False)
    if valid is None and start is None:
        return [whole[k : k + length] for k in range(before + 1)], last
    none = jnp.zeros_like(whole[..., 0], bool)
    valid = jnp.concatenate([~none[:before], ~none[before:] if valid is None else valid])
    start = jnp.concatenate([none[:before], none[before:] if start is None else start])
    time = jnp.arange(before + length).reshape(-1, *[1] * (none.ndim - 1))
    # Of every step, and of one after the last: the valid step before it, and the sequence that it belongs to.
    previous = jnp.concatenate([jnp.zeros_like(none[:1], int), lax.cummax(jnp.where(valid, time, 0), axis=0)])
    sequence = jnp.cumsum(start, axis=0)
    sequence = jnp.concatenate([sequence, sequence[-1:]])

    def at(array, index):
        return jnp.take_along_axis(array, index, 0)

    wide = jnp.concatenate([jnp.moveaxis(window, -2, 0), xs.astype(window.dtype)])
    index, found, same = previous[before:], [], []
    for _ in range(before):
        found.append(at(wide, index[..., None]))
        same.append(at(sequence, index) == sequence[before:])
        index = at(previous, index)
    own = sum(each.astype(int) for each in same)  # how many of these are of the same sequence
    first = jnp.moveaxis(fresh.astype(window.dtype), -2, 0)
    for k in range(before):
        beyond = jnp.clip(before - (k + 1 - own), 0, before - 1)
        found[k] = jnp.where(same[k][..., None], found[k], at(first, beyond[..., None]))
    found = found[::-1]
    return [*(tap[:length].astype(xs.dtype) for tap in found), xs], jnp.stack([tap[-1] for tap in found], axis=-2)


def window_states(window: Array, fresh: Array, xs: Array, walk: Walk) -> tuple[Array, Array]:
    """The window before the steps of this device, and that after the steps of all, where time is divided."""
    steps, *batch, _ = xs.shape
    last = windows(jnp.zeros_like(window), fresh, xs, walk.flags, walk.reverse)[1]
    count = jnp.full(batch, steps) if walk.valid is None else walk.valid.sum(0)
    size = window.shape[-2]

    def function(count, last, window):
        place = jnp.stack([count + k for k in range(size)], axis=-1)  # that inputs of the window come from
        moved = jnp.take_along_axis(window, jnp.minimum(place, size - 1)[..., None], axis=-2)
        return jnp.where((place < size)[..., None], moved, last)

    return states(part(walk, count, last), window, function, walk, fresh)
