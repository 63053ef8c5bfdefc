"""The engine of diagonal recurrences that are read by a sum over their states, for cells."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array, lax

from jaxrnn.engines.diagonal.primitives import run
from jaxrnn.engines.diagonal.programs import Problem
from jaxrnn.engines.walk import Flags, Walk


def diagonal_recurrence(
    x: Array,
    a: Array,
    b: Array,
    c: Array,
    step: Array | None,
    h: Array,
    *,
    fresh: Array,
    flags: Flags,
    walk: Walk,
) -> tuple[Array, Array]:
    """Runs a recurrence of float32 or float64 over the first axis: (the last state, ys, 0 at invalid steps).

        selective   h' = exp(Δ a) h + Δ x bᵀ,   y = h' c,   Δ = softplus(step)
        fixed       h' = a h + b x,             y = 2 Re Σ_n c h'      complex

    Args:
      x: The inputs, (T, *batch, D).
      a: (D, N): at most 0 if there is `step`, else complex.
      b: (T, *batch, N), or without `step` (D, N), complex.
      c: Like b.
      step: What the lengths of steps are the softplus of, like x; None for a fixed recurrence.
      h: The state before the first step, (*batch, D, N), complex without `step`.
      fresh: The state before a step that starts fresh, like h.
      flags: Which steps are valid, and which start fresh.
      walk: The direction, and whether the kernel was asked for by its name.
    """
    valid, start = flags
    length, *batch, channels = x.shape
    rows = math.prod(batch)
    if x.size == 0 or h.size == 0:
        return h, jnp.zeros_like(x)

    def parts(array):
        """(..., N or 2N, D) of (..., D, N)."""
        array = jnp.concatenate([array.real, array.imag], -1) if step is None else array
        return jnp.swapaxes(array, -1, -2)

    def of_steps(array):
        return array.reshape(length, rows, array.shape[-1])

    def of_flags(flags):
        if flags is None:
            return None
        flags = flags.reshape(flags.shape + (1,) * (1 + len(batch) - flags.ndim))
        return jnp.broadcast_to(flags, (length, *batch)).reshape(length, rows)

    def of_state(array):
        return parts(array).reshape(rows, -1, channels)

    def of_coefficients(array):
        return parts(array)[None] if step is None else of_steps(array)

    problem = Problem(
        x=of_steps(x),
        a=parts(a)[None],
        b=of_coefficients(b),
        c=of_coefficients(c),
        h=of_state(h),
        step=None if step is None else of_steps(step),
        valid=of_flags(valid),
        start=of_flags(start),
        fresh=None if start is None else of_state(fresh),
    )
    ys, last = run(problem, reverse=walk.reverse, named=walk.named("linear_scan") == "native")
    last = jnp.swapaxes(last, -1, -2).reshape(*batch, channels, -1)
    last = lax.complex(*jnp.split(last, 2, -1)) if step is None else last
    return last, ys.reshape(x.shape)
