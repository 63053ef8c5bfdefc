"""Diagonal recurrences that are read by a sum over their states, in JAX: what the kernels compute.

    selective   h_t = exp(Δ_t a) h_{t-1} + Δ_t x_t b_t,   y_t = Σ_n c_t h_t,   Δ_t = softplus(step_t)
    fixed       h_t = a h_{t-1} + b x_t,                  y_t = 2 Re Σ_n c h_t      complex

Every channel of x has N states. They are in memory for the steps of one chunk only, also in the backward pass, which
computes them again from the state before the chunk. In a chunk, the engine of linear recurrences runs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn.engines.arrays import select, zero_where_not
from jaxrnn.engines.linear.engine import linear_recurrence
from jaxrnn.engines.walk import Flags


class Problem(NamedTuple):
    """What a call reads, in float32 or float64; an absent array is None.

    x (T, R, D): rows R, of which each of M members has as many. a (M, N, D), at most 0; step (T, R, D);
    b, c (T, R, N). Without `step`, a, b and c (M, 2N, D), real parts before imaginary ones. h (R, N or 2N, D) is the
    state before the first step. valid, start bool (T, R): an invalid step keeps the state, and its y is 0; a step that
    starts does so from `fresh`, like h, or from zeros where that is None.
    """

    x: Array
    a: Array
    b: Array
    c: Array
    h: Array
    step: Array | None = None
    valid: Array | None = None
    start: Array | None = None
    fresh: Array | None = None


class Result(NamedTuple):
    """ys (T, R, D), the last state, and if they are kept, the states before chunks (chunks, R, N, D), else None."""

    ys: Array
    last: Array
    kept: Array | None = None


def steps_of(problem: Problem) -> tuple[str, ...]:
    """The names of the arrays that have an axis of time."""
    return ("x", "step", "valid", "start", *(() if problem.step is None else ("b", "c")))


def _complex(parts: Array) -> Array:
    """(..., 2N, D) as complex numbers (..., N, D)."""
    return lax.complex(*jnp.split(parts, 2, axis=-2))


def _of_rows(weight: Array, rows: int) -> Array:
    """(1, R or 1, N, D) of (M, N, D)."""
    members = weight.shape[0]
    return weight[None] if members in (1, rows) else jnp.repeat(weight, rows // members, axis=0)[None]


def _chunk(problem: Problem) -> tuple[Array, Array]:
    """The last state and ys of some steps, T ≥ 1."""
    x, a, b, c, h, step, valid, start, fresh = problem
    rows = x.shape[1]
    if step is None:
        a, b, c = (_complex(_of_rows(each, rows)) for each in (a, b, c))
        b, h = b * x[:, :, None].astype(b.dtype), _complex(h)
        fresh = None if fresh is None else _complex(fresh)
    else:
        step = jax.nn.softplus(step)
        a = jnp.exp(_of_rows(a, rows) * step[:, :, None])
        b, c = (step * x)[:, :, None] * b[..., None], c[..., None]
    if start is not None and fresh is not None:
        b = select(start, b + a * fresh[None], b)
    last, hs = linear_recurrence(a, b, h, flags=Flags(valid, start), reverse=False, form=None)
    ys = zero_where_not(valid, jnp.sum(hs * c, axis=2))
    if step is None:
        return jnp.concatenate([last.real, last.imag], axis=-2), 2 * ys.real
    return last, ys


def chunk_size(length: int) -> int:
    """The steps of a chunk. The backward pass keeps the states between chunks, and holds those of one chunk: the longer
    the sequence, the longer the chunks that take the least memory.
    """
    return min(32 if length <= 1024 else 64, length)


def _chunks(problem: Problem, reverse: bool) -> tuple[dict[str, Array], Problem]:
    """The arrays of steps (chunks, C, ...) in the order in which they are processed, with invalid steps at the end; and
    the problem without them.
    """
    length = problem.x.shape[0]
    size = chunk_size(length)
    names = [name for name in steps_of(problem) if getattr(problem, name) is not None]
    steps = {name: getattr(problem, name) for name in names}
    if length % size and problem.valid is None:
        steps["valid"] = jnp.ones(problem.x.shape[:2], bool)

    def cut(x):
        x = jnp.flip(x, 0) if reverse else x
        x = jnp.pad(x, [(0, -length % size)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, size, *x.shape[1:])

    return jax.tree.map(cut, steps), problem._replace(**dict.fromkeys(names))


def _whole(x: Array, length: int, reverse: bool) -> Array:
    """(T, ...) of chunks."""
    x = x.reshape(-1, *x.shape[2:])[:length]
    return jnp.flip(x, 0) if reverse else x


# The three programs of the primitives: forward; its derivative, linear in the tangents; and the transpose of that.


def forward(problem: Problem, *, reverse: bool, save: bool = False) -> Result:
    """The recurrence, and what is kept of it for derivatives."""
    steps, rest = _chunks(problem, reverse)

    @jax.checkpoint
    def body(h, steps):
        last, ys = _chunk(rest._replace(h=h, **steps))
        return last, (ys, h if save else None)

    last, (ys, kept) = lax.scan(body, problem.h, steps)
    return Result(_whole(ys, problem.x.shape[0], reverse), last, kept)


def tangent(problem: Problem, kept: Result, moved: Problem, *, reverse: bool) -> tuple[Array, Array]:
    """The tangents of ys and of the last state; `moved` has None where nothing moves."""
    names = [name for name, each in zip(Problem._fields, moved, strict=True) if each is not None]

    def run(arrays):
        return forward(problem._replace(**dict(zip(names, arrays, strict=True))), reverse=reverse)[:2]

    given, changes = ([getattr(each, name) for name in names] for each in (problem, moved))
    return jax.jvp(run, (given,), (changes,))[1]


def backward(
    problem: Problem, kept: Result, d_ys: Array, d_last: Array, *, reverse: bool, wrt: tuple[str, ...]
) -> Problem:
    """The cotangents of the arrays in `wrt`, chunk by chunk from the last to the first."""
    steps, rest = _chunks(problem, reverse)
    flags = {name: steps.pop(name) for name in ("valid", "start") if name in steps}
    d_ys = _chunks(problem._replace(x=d_ys), reverse)[0]["x"]
    # Of every row: else devices that divide the rows would add up the cotangents of weights at every chunk.
    rows = problem.x.shape[1]
    weights = {name: getattr(rest, name) for name in ("a", "b", "c", "fresh") if getattr(rest, name) is not None}
    by_row = {
        name: jnp.broadcast_to(_of_rows(each, rows)[0], (rows, *each.shape[1:])) for name, each in weights.items()
    }

    def body(state, inputs):
        d_h, d_weights = state
        h, steps, flags, d_ys = inputs

        def run(h, weights, steps):
            return _chunk(rest._replace(h=h, **weights, **steps, **flags))

        d_h, more, d_steps = jax.vjp(run, h, by_row, steps)[1]((d_h, d_ys))
        return (d_h, jax.tree.map(jnp.add, d_weights, more)), d_steps

    first = d_last, jax.tree.map(jnp.zeros_like, by_row)
    (d_h, d_weights), found = lax.scan(body, first, (kept.kept, steps, flags, d_ys), reverse=True)
    whole = {name: _whole(each, problem.x.shape[0], reverse) for name, each in found.items()}
    for name, each in weights.items():
        members = each.shape[0]
        whole[name] = d_weights[name].reshape(members, rows // members, *each.shape[1:]).sum(1)
    found = problem._replace(h=d_h, **whole)
    return found._replace(**{name: None for name in Problem._fields if name not in wrt})
