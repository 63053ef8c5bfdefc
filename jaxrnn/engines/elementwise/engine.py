"""The engine of linear recurrences of single units with their products and gates, for cells."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxrnn.engines.elementwise.primitives import run
from jaxrnn.engines.elementwise.programs import Problem, Unit
from jaxrnn.engines.walk import Flags, Walk


class UnitWeights(NamedTuple):
    """What gives a unit its sums, x w + b, with w (N, D/N, S H/N) of N heads and b (S H,); θ (K H,), which it reads at
    every step; and where y is a product of its states, w_y (E H, P).
    """

    w: Array
    b: Array | None = None
    theta: Array | None = None
    w_y: Array | None = None


def elementwise_recurrence(
    unit: Unit,
    weights: UnitWeights,
    xs: Array,
    h: Array,
    *,
    taps: int = 1,
    begun: Array | None,
    fresh: Array,
    flags: Flags,
    walk: Walk,
) -> tuple[Array, Array]:
    """Runs a recurrence of float32 or float64 over the first axis: (the last state, ys, 0 at invalid steps).

    Args:
      unit: What a unit does.
      weights: What it does it with.
      xs: The inputs, (T, *batch, D); with several taps (taps − 1 + T, *batch, D).
      h: The state before the first step, (*batch, E H).
      taps: Of how many steps the inputs are read at once. Those before the first come in front of the others, and in
        reverse behind them.
      begun: bool (T, *batch), whether the sequence of a step began before it; None where that makes no difference.
      fresh: The state before a step that starts fresh, like h.
      flags: Which steps are valid, and which start fresh.
      walk: The direction, and whether the kernel was asked for by its name.
    """
    batch, length = xs.shape[1:-1], xs.shape[0] - taps + 1
    w_y = weights.w_y
    rows, shape = math.prod(batch), (length, *batch, h.shape[-1] if w_y is None else w_y.shape[-1])
    if math.prod(shape) == 0:
        return h, jnp.zeros(shape, h.dtype)

    def of_flags(flag):
        if flag is None:
            return None
        flag = flag.reshape(flag.shape + (1,) * (1 + len(batch) - flag.ndim))
        return jnp.broadcast_to(flag, (length, *batch)).reshape(length, rows)

    valid, start, begun = map(of_flags, (*flags, begun))
    b, theta, w_y = (None if each is None else each[None] for each in weights[1:])
    problem = Problem(
        xs=xs.reshape(xs.shape[0], rows, -1),
        w=weights.w[None],
        h=h.reshape(rows, -1),
        b=b,
        theta=theta,
        w_y=w_y,
        valid=valid,
        start=start,
        begun=begun,
        fresh=None if start is None else jnp.broadcast_to(fresh, h.shape).reshape(rows, -1),
        unit=unit,
        taps=taps,
    )
    ys, last = run(problem, reverse=walk.reverse, named=walk.named("linear_scan") == "native")
    return last.reshape(h.shape), ys.reshape(shape)
