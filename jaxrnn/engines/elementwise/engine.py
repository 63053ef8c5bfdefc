"""The engine of linear recurrences of single units with their gates, for cells."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxrnn.engines.elementwise.primitives import run
from jaxrnn.engines.elementwise.programs import Problem, Unit
from jaxrnn.engines.walk import Flags, Walk


class Sums(NamedTuple):
    """What the gates of a sequence are computed from: u (T, *batch, S H), without their bias b (S H,); x
    (T, *batch, H), what else a unit reads of its input; rate (H,), what it reads at every step.
    """

    u: Array
    b: Array | None = None
    x: Array | None = None
    rate: Array | None = None


def elementwise_recurrence(
    unit: Unit, sums: Sums, h: Array, *, begun: Array | None, fresh: Array, flags: Flags, walk: Walk
) -> tuple[Array, Array]:
    """Runs a recurrence of float32 over the first axis: (the last state, ys, 0 at invalid steps).

    Args:
      unit: What a unit does.
      sums: What it reads.
      h: The state before the first step, (*batch, H).
      begun: bool (T, *batch), whether the sequence of a step began before it; None where that makes no difference.
      fresh: The state before a step that starts fresh, like h.
      flags: Which steps are valid, and which start fresh.
      walk: The direction, and whether the kernel was asked for by its name.
    """
    length, *batch, _ = sums.u.shape
    rows, shape = math.prod(batch), (length, *h.shape)
    if math.prod(shape) == 0:
        return h, jnp.zeros(shape, h.dtype)

    def of_flags(flag):
        if flag is None:
            return None
        flag = flag.reshape(flag.shape + (1,) * (1 + len(batch) - flag.ndim))
        return jnp.broadcast_to(flag, (length, *batch)).reshape(length, rows)

    valid, start, begun = map(of_flags, (*flags, begun))
    problem = Problem(
        u=sums.u.reshape(length, rows, -1),
        h=h.reshape(rows, -1),
        b=None if sums.b is None else sums.b.reshape(1, -1),
        x=None if sums.x is None else sums.x.reshape(length, rows, -1),
        rate=None if sums.rate is None else sums.rate.reshape(1, -1),
        valid=valid,
        start=start,
        begun=begun,
        fresh=None if start is None else jnp.broadcast_to(fresh, h.shape).reshape(rows, -1),
        unit=unit,
    )
    ys, last = run(problem, reverse=walk.reverse, named=walk.named("linear_scan") == "native")
    return last.reshape(h.shape), ys.reshape(shape)
