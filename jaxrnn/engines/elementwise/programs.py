"""Linear recurrences of single units with their gates, in JAX: what the kernels compute.

    h_t = a_t h_{t-1} + b_t,   (a_t, b_t) = gates(u_t + b, ...),   y_t = read(h_t, ...)

The gates are computed from sums u, so that of a step only sums and states are in memory, also for the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn.engines.arrays import lifted, select, zero_where_not
from jaxrnn.engines.linear.engine import linear_recurrence
from jaxrnn.engines.walk import Flags


@dataclasses.dataclass(frozen=True)
class Unit:
    """What a unit does with its sums; a function is the one of its module, so that equal units compile once.

    Args:
      name: That of the kernels.
      gates: (a, b) as gates(sums, x, rate, begun), of which a unit ignores what it has not.
      read: y as read(sums, x, h); None where y is h.
      bound: What the kernel needs to know of the cell's options.
    """

    name: str
    gates: Callable[..., tuple[Array, Array]]
    read: Callable[..., Array] | None = None
    bound: float = 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """What a call reads, in float32; an absent array is None.

    u (T, R, S H): S sums of every unit, without their bias b (M, S H); rows R, of which each of M members has as many.
    x (T, R, H): what the unit reads beside; rate (M, H). h (R, H) is the state before the first step. valid, start,
    begun bool (T, R): an invalid step keeps the state, and its y is 0; a step that starts does so from `fresh`, like h;
    one that has not begun is the first of its sequence.
    """

    u: Array
    h: Array
    b: Array | None
    x: Array | None
    rate: Array | None
    valid: Array | None
    start: Array | None
    begun: Array | None
    fresh: Array | None
    unit: Unit = dataclasses.field(metadata={"static": True})

    def replace(self, **changes) -> Problem:
        return dataclasses.replace(self, **changes)


STEPS = ("u", "x", "valid", "start", "begun")  # with an axis of time
FLAGS = ("valid", "start", "begun")
GATED = ("u", "b", "x", "rate")  # what gates are computed from


class Result(NamedTuple):
    """ys (T, R, H), the last state (R, H), and the states after every step if the backward pass needs more than ys."""

    ys: Array
    last: Array
    hs: Array | None = None


def _of_rows(weight: Array, rows: int) -> Array:
    """(R or 1, ...) of (M, ...)."""
    members = weight.shape[0]
    return weight if members == 1 else jnp.repeat(weight, rows // members, axis=0)


def _inputs(problem: Problem, u, b, x, rate) -> tuple:
    """(sums, x, rate), of every row."""
    rows = problem.h.shape[0]
    u = u if b is None else u + lifted(_of_rows(b, rows), u)
    return u, x, None if rate is None else lifted(_of_rows(rate, rows), u[..., : rate.shape[-1]])


def _coefficients(problem: Problem, *arrays) -> tuple[Array, Array]:
    return problem.unit.gates(*_inputs(problem, *arrays), problem.begun)


def _read(problem: Problem, hs: Array, *arrays) -> Array:
    if problem.unit.read is None:
        return hs
    sums, x, _ = _inputs(problem, *arrays)
    return problem.unit.read(sums, x, hs)


def _gated(problem: Problem) -> tuple[Array | None, ...]:
    return tuple(getattr(problem, name) for name in GATED)


def forward(problem: Problem, *, reverse: bool, save: bool = False) -> Result:
    """The recurrence, and what is kept of it for derivatives."""
    a, b = _coefficients(problem, *_gated(problem))
    flags = Flags(problem.valid, problem.start)
    if problem.start is not None and problem.fresh is not None:
        b = select(problem.start, b + a * problem.fresh[None], b)
    last, hs = linear_recurrence(a, b, problem.h, flags=flags, reverse=reverse, form=None)
    ys = zero_where_not(problem.valid, _read(problem, hs, *_gated(problem)))
    kept = save and (problem.unit.read is not None or problem.valid is not None)
    return Result(ys, last, hs if kept else None)


def tangent(problem: Problem, kept: Result, moved: Problem, *, reverse: bool) -> tuple[Array, Array]:
    """The tangents of ys and of the last state; `moved` has None where nothing moves."""
    names = [field.name for field in dataclasses.fields(Problem) if isinstance(getattr(moved, field.name), Array)]

    def run(arrays):
        return forward(problem.replace(**dict(zip(names, arrays, strict=True))), reverse=reverse)[:2]

    given, changes = ([getattr(each, name) for name in names] for each in (problem, moved))
    return jax.jvp(run, (given,), (changes,))[1]


def backward(problem: Problem, kept: Result, d_ys: Array, d_last: Array, *, reverse: bool) -> Problem:
    """The cotangents of all arrays but flags."""
    d_ys = zero_where_not(problem.valid, d_ys)
    flags = Flags(problem.valid, problem.start)
    hs, gated = kept.ys if kept.hs is None else kept.hs, _gated(problem)
    (a, b), to_gated = jax.vjp(lambda *arrays: _coefficients(problem, *arrays), *gated)
    d_hs, *d_read = jax.vjp(lambda *arrays: _read(problem, *arrays), hs, *gated)[1](d_ys)
    run = jax.vjp(lambda b, h: linear_recurrence(a, b, h, flags=flags, reverse=reverse, form=None), b, problem.h)[1]
    d_b, d_h = run((d_last, d_hs))
    first = problem.h[None]
    before = jnp.concatenate([hs[1:], first] if reverse else [first, hs[:-1]])
    if problem.start is not None and problem.fresh is not None:
        before = select(problem.start, jnp.broadcast_to(problem.fresh[None], before.shape), before)
    d_gated = to_gated((d_b * before, d_b))
    whole = {
        name: None if one is None else one + other for name, one, other in zip(GATED, d_gated, d_read, strict=True)
    }
    d_fresh = None
    if problem.start is not None and problem.fresh is not None:
        d_fresh = jnp.sum(select(problem.start, a * d_b, jnp.zeros_like(d_b)), axis=0)
    return problem.replace(h=d_h, fresh=d_fresh, **whole, **dict.fromkeys(FLAGS))
