"""Linear recurrences of single units with their products and gates, in JAX: what the kernels compute.

    u_t = x_t w + b,   (a_t, b_t) = gates(u_t, ...),   h_t = a_t h_{t-1} + b_t,   y_t = read(h_t, ...)

A kernel goes over time in chunks that stay in the cache: of a step only x, y and, where y is another one, h are in
memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn.engines.arrays import lifted, select, zero_where_not
from jaxrnn.engines.linear.engine import linear_recurrence
from jaxrnn.engines.linear.log_space import log_linear_recurrence
from jaxrnn.engines.product import dot
from jaxrnn.engines.walk import Flags


@dataclasses.dataclass(frozen=True)
class Unit:
    """What a unit does with its sums; a function is the one of its module, so that equal units compile once.

    Args:
      name: That of the kernels.
      gates: (a, b) as gates(sums, x, θ, begun), of which a unit ignores what it has not.
      read: y as read(sums, x, h); None where y is h.
      logs: The logarithms of (a, b) as logs(sums) where the state goes on in logarithms.
      turns: Whether h are complex numbers: b and the state hold their real parts, then their imaginary parts, and so
        does θ, which is a.
      bound: What the kernel needs to know of the cell's options.
    """

    name: str
    gates: Callable[..., tuple[Array, Array]]
    read: Callable[..., Array] | None = None
    logs: Callable[..., tuple[Array, Array]] | None = None
    turns: bool = False
    bound: float = 0.0


def _none(*_):
    raise TypeError("what turns has no gates")


TURN = Unit("lru", _none, turns=True)  # a complex number, h' = θ h + u


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """What a call reads, in float32 or float64; an absent array is None.

    xs (T, R, D): rows R, of which each of M members has as many; with L taps (L − 1 + T, R, D), since a step reads its
    input and those of L − 1 steps before it. w (M, N, L D/N, S H/N) of N heads, b (M, S H): S sums of every unit.
    theta (M, K H): what the unit reads at every step. w_y (M, E H, P), where y is a product of states. h (R, E H) is
    the state before the first step. valid, start, begun bool (T, R): an invalid step keeps the state, and its y is 0; a
    step that starts does so from `fresh`, like h; one that has not begun is the first of its sequence.
    """

    xs: Array
    w: Array
    h: Array
    b: Array | None
    theta: Array | None
    w_y: Array | None
    valid: Array | None
    start: Array | None
    begun: Array | None
    fresh: Array | None
    unit: Unit = dataclasses.field(metadata={"static": True})
    taps: int = dataclasses.field(metadata={"static": True})

    @property
    def steps(self) -> int:
        """T."""
        return self.xs.shape[0] - self.taps + 1

    @property
    def units(self) -> int:
        """H."""
        return self.h.shape[-1] // (2 if self.unit.turns else 1)

    def replace(self, **changes) -> Problem:
        return dataclasses.replace(self, **changes)


STEPS = ("xs", "valid", "start", "begun")  # with an axis of time
FLAGS = ("valid", "start", "begun")
WEIGHTS = ("w", "b", "theta", "w_y")
WIDE = 256  # inputs of a sum that take longer to add up again than to keep the sum
FEW = 1 << 22  # sums that the caches hold


class Result(NamedTuple):
    """ys (T, R, P), the last state (R, E H); all states where ys are others, and the sums (T, R, S H) where they are
    kept.
    """

    ys: Array
    last: Array
    hs: Array | None = None
    sums: Array | None = None


def _of_rows(weight: Array, rows: int) -> Array:
    """(R or 1, ...) of (M, ...)."""
    members = weight.shape[0]
    return weight if members == 1 else jnp.repeat(weight, rows // members, axis=0)


def _product(xs: Array, w: Array, units: int) -> Array:
    """(T, R, S H) of xs (T, R, D) and w (M, N, D/N, S H/N), for H units."""
    members, heads, size, columns = w.shape
    if members == heads == 1:
        return dot(xs, w[0, 0])
    steps, rows, _ = xs.shape
    if members == 1:  # no axis of rows is split, which may be divided among devices
        u = jnp.einsum("trnd,nde->trne", xs.reshape(steps, rows, heads, size), w[0])
    else:
        u = jnp.einsum("tmrnd,mnde->tmrne", xs.reshape(steps, members, rows // members, heads, size), w)
    if heads == 1:
        return u.reshape(steps, rows, columns)
    # Every head has S sums of its units: those of one kind come together.
    u = u.reshape(steps, rows, heads, heads * columns // units, units // heads)
    return jnp.swapaxes(u, 2, 3).reshape(steps, rows, -1)


def seen(xs: Array, taps: int, reverse: bool) -> Array:
    """What each step reads, (T, R, L D), the oldest first."""
    steps = xs.shape[0] - taps + 1
    firsts = range(taps)[::-1] if reverse else range(taps)
    return jnp.concatenate([xs[first : first + steps] for first in firsts], axis=-1)


def _sums(problem: Problem, reverse: bool, xs: Array, w: Array, b: Array | None) -> Array:
    u = _product(seen(xs, problem.taps, reverse), w, problem.units)
    return u if b is None else u + lifted(_of_rows(b, problem.h.shape[0]), u)


def _are_kept(problem: Problem) -> bool:
    """Whether sums are kept for the backward pass, and not computed again."""
    _, heads, size, columns = problem.w.shape
    sums = problem.steps * problem.h.shape[0] * heads * columns
    return size >= WIDE or (isinstance(sums, int) and sums <= FEW)


def _complex(parts: Array) -> Array:
    return lax.complex(*jnp.split(parts, 2, axis=-1))


def _real(numbers: Array) -> Array:
    return jnp.concatenate([numbers.real, numbers.imag], axis=-1)


def _same(array: Array) -> Array:
    return array


def _numbers(unit: Unit) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """From states as a problem has them to those that a recurrence goes on from, and back."""
    return (_complex, _real) if unit.turns else (_same, _same)


def _coefficients(problem: Problem, u: Array, x: Array, theta: Array | None) -> tuple[Array, Array]:
    """(a, b); a may lack axes, which are 1."""
    if theta is None:
        return problem.unit.gates(u, x, None, problem.begun)
    theta = _of_rows(theta, problem.h.shape[0])
    if problem.unit.turns:
        return _complex(theta)[None], _complex(u)
    return problem.unit.gates(u, x, lifted(theta, u[..., : theta.shape[-1]]), problem.begun)


def _read(problem: Problem, u: Array, x: Array, hs: Array, w_y: Array | None) -> Array:
    if w_y is not None:
        return _product(hs, w_y[:, None], problem.units)
    return hs if problem.unit.read is None else problem.unit.read(u, x, hs)


def _begins(problem: Problem, start: Array, a: Array, fresh: Array) -> Array:
    """What a fresh state gives to the steps that start from it."""
    numbers, _ = _numbers(problem.unit)
    given = a * numbers(fresh)[None]
    given = jnp.broadcast_to(given, (*start.shape, given.shape[-1]))
    return select(start, given, jnp.zeros_like(given))


def forward(problem: Problem, *, reverse: bool, save: bool = False) -> Result:
    """The recurrence, and what is kept of it for derivatives."""
    flags, unit = Flags(problem.valid, problem.start), problem.unit
    numbers, parts = _numbers(unit)
    options = {"flags": flags, "reverse": reverse, "form": None}
    fresh = problem.h if problem.fresh is None else problem.fresh
    u = _sums(problem, reverse, problem.xs, problem.w, problem.b)
    if unit.logs is not None:
        last, hs = log_linear_recurrence(*unit.logs(u), problem.h, fresh=fresh, **options)
    else:
        a, b = _coefficients(problem, u, problem.xs, problem.theta)
        if problem.start is not None:
            b = b + _begins(problem, problem.start, a, fresh)
        last, hs = linear_recurrence(a, b, numbers(problem.h), **options)
    last, hs = parts(last), parts(hs)
    ys = zero_where_not(problem.valid, _read(problem, u, problem.xs, hs, problem.w_y))
    kept = save and (unit.read is not None or problem.w_y is not None or problem.valid is not None)
    return Result(ys, last, hs if kept else None, u if save and _are_kept(problem) else None)


def tangent(problem: Problem, kept: Result, moved: Problem, *, reverse: bool) -> tuple[Array, Array]:
    """The tangents of ys and of the last state; `moved` has None where nothing moves."""
    names = [field.name for field in dataclasses.fields(Problem) if isinstance(getattr(moved, field.name), Array)]

    def run(arrays):
        return forward(problem.replace(**dict(zip(names, arrays, strict=True))), reverse=reverse)[:2]

    given, changes = ([getattr(each, name) for name in names] for each in (problem, moved))
    return jax.jvp(run, (given,), (changes,))[1]


def backward(
    problem: Problem, kept: Result, d_ys: Array, d_last: Array, *, reverse: bool, wrt: tuple[str, ...]
) -> Problem:
    """The cotangents of the arrays in `wrt`."""
    d_ys = zero_where_not(problem.valid, d_ys)
    flags = Flags(problem.valid, problem.start)
    hs, x = kept.ys if kept.hs is None else kept.hs, problem.xs
    numbers, parts = _numbers(problem.unit)
    u, to_inputs = jax.vjp(lambda *arrays: _sums(problem, reverse, *arrays), x, problem.w, problem.b)
    u = u if kept.sums is None else kept.sums
    (a, b), to_gated = jax.vjp(lambda *arrays: _coefficients(problem, *arrays), u, x, problem.theta)
    d_u, d_x, d_hs, d_w_y = jax.vjp(lambda *arrays: _read(problem, *arrays), u, x, hs, problem.w_y)[1](d_ys)

    def run(b, h):
        return [parts(each) for each in linear_recurrence(a, b, numbers(h), flags=flags, reverse=reverse, form=None)]

    d_b, d_h = jax.vjp(run, b, problem.h)[1]([d_last, d_hs])
    first = problem.h[None]
    before = jnp.concatenate([hs[1:], first] if reverse else [first, hs[:-1]])
    d_fresh = None
    start, fresh = problem.start, problem.fresh
    if start is not None and fresh is not None:
        before = select(start, jnp.broadcast_to(fresh[None], before.shape), before)
        (d_fresh,) = jax.vjp(lambda fresh: _begins(problem, start, a, fresh), fresh)[1](d_b)
    d_a = d_b * numbers(before)
    axes = tuple(axis for axis in range(d_a.ndim) if a.shape[axis] != d_a.shape[axis])
    gate_u, gate_x, d_theta = to_gated((jnp.sum(d_a, axis=axes, keepdims=True), d_b))
    more_x, d_w, d_bias = to_inputs(d_u + gate_u)
    asked = {"xs": d_x + gate_x + more_x, "w": d_w, "b": d_bias, "theta": d_theta, "w_y": d_w_y}
    whole = {name: each if name in wrt else None for name, each in asked.items()}
    return problem.replace(**whole, **dict.fromkeys(FLAGS), h=d_h, fresh=d_fresh)
