"""The derivative of a gated recurrence, whose gradients of weights are one product over all steps, after the loop.

The forward pass keeps the carries only. What the derivative of a step reads besides (u, v and w) are products over all
steps at once, and the loop of tangents computes the gates from them once more: so no loop is without a recurrence, and
little is stored. The tangents of u, v and w come from x and the weights, for all steps before that loop, and from the
carry. The transpose multiplies all cotangents after its loop, summed in at least float32. There is one θ for each row,
and the rows are summed at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxrnn.engines.arrays import cast, lifted, select, varying_like
from jaxrnn.engines.gated.recurrence import (
    GatedWeights,
    How,
    Problem,
    Read,
    Recurrence,
    by_gate,
    input_product,
    masked,
    products,
    recurrent_product,
    time_steps,
    updated,
)
from jaxrnn.engines.loop import time_loop
from jaxrnn.engines.product import dot
from jaxrnn.engines.walk import by_platform
from jaxrnn.typing import PyTree


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def gated_recurrence(how: How, problem: Problem) -> tuple[PyTree, Array]:
    """Runs the time loop: (carry, ys)."""
    return time_steps(how, problem)[:2]


def _recurrence_jvp(how: How, primals, tangents):
    (problem,), (moved,) = primals, tangents
    carry, ys, states = time_steps(how, problem, keep=True)
    weights = GatedWeights(*map(_present, problem.weights, moved.weights))
    moved = Problem(*map(_present, problem, moved))._replace(weights=weights)
    return (carry, ys), tangent(how, problem, states, moved)


gated_recurrence.defjvp(_recurrence_jvp, symbolic_zeros=True)


def _present(primal: PyTree, tangent: PyTree) -> PyTree:
    """Returns a tangent, or None where all of it is known to be zero."""

    def present(primal, tangent):
        return jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent

    if all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(tangent)):
        return None
    return jax.tree.map(present, primal, tangent)


def tangent(how: How, problem: Problem, states: PyTree, moved: Problem) -> tuple[PyTree, Array]:
    """Computes the tangents of (carry, ys), linear in those of the problem's arrays.

    Args:
      how: See `How`.
      problem: The arrays of the recurrence.
      states: The carry after every valid step.
      moved: The tangents of the arrays, also those of the weights one by one; None where they do not move.
    """
    d_weights = GatedWeights._make([None] * 5) if moved.weights is None else moved.weights
    d_weights = by_gate(how, d_weights, problem.weights)
    problem = problem._replace(weights=by_gate(how, problem.weights, problem.weights))
    given, read = arguments(how, problem, states)
    d_products = tangents_of_products(problem, moved.xs, d_weights, given[2:], read)

    def whole(each, like):
        return jax.tree.map(jnp.zeros_like, like) if each is None else each

    d_theta = _by_row(whole(d_weights.theta, given[0]), getattr(problem.carry, how.cell.recurrent_state))
    d_carry, d_fresh = whole(moved.carry, problem.carry), whole(moved.fresh, problem.fresh)
    # Else devices that divide the rows would add up their cotangents at every step.
    moves = varying_like(cast((d_theta, d_carry, d_fresh, moved.mask), how.wide), given[2])
    loop = functools.partial(_tangent_loop, how, problem, given)
    leaves = jax.tree.leaves(problem.carry)
    if len(leaves) > 2 and len({each.shape for each in leaves}) == 1:
        stacked = functools.partial(loop, stacked=True)
        d_last, d_ys = by_platform(how.platform, moves, d_products, cuda=stacked, default=loop)
    else:
        d_last, d_ys = loop(moves, d_products)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), d_last, problem.carry), d_ys


def _by_row(theta: PyTree, state: Array) -> PyTree:
    """θ with the axes of the rows of a state in front, each of size 1."""
    rows = state[..., 0]
    return jax.tree.map(lambda leaf: lifted(leaf, rows.reshape(rows.shape + (1,) * leaf.ndim)), theta)


def _tangent_loop(how: How, problem: Problem, given: tuple, moves: tuple, d_products: tuple, stacked: bool = False):
    """The loop of `tangent`: (d_carry, d_ys) from the arguments of `update` at all steps, the tangents of (θ, carry,
    fresh carry, mask) and those of the products. `stacked`: its state is one array, else a GPU would copy each of many.
    """
    cell, dtype, wide, mask = how.cell, how.dtype, how.wide, problem.mask
    (theta, *reads), (d_theta, d_carry, d_fresh, d_mask) = given, moves
    w_h, w_2 = cast((problem.weights.w_h, problem.weights.w_2), wide)  # here, else at every step
    state = getattr(problem.carry, cell.recurrent_state)
    leaves, structure = jax.tree.flatten(problem.carry)

    def packed(d_carry):
        """The carry and, for the product, its h: so the transposed loop need not add cotangents after its own."""
        whole = jnp.stack(jax.tree.leaves(d_carry), axis=-2) if stacked else d_carry
        return whole, getattr(d_carry, cell.recurrent_state)

    def unpacked(whole):
        return jax.tree.unflatten(structure, [whole[..., k, :] for k in range(len(leaves))]) if stacked else whole

    # Computed again in the backward pass, else its part that moves nothing were a loop of its own.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(d_constant, d_state, inputs):
        d_theta, d_mask = d_constant
        (carry, u, v, w), stay, (d_u, d_v, d_w) = inputs
        d_carry, d_copy = unpacked(d_state[0]), d_state[1]
        h = getattr(carry, cell.recurrent_state)

        def read(d_h):
            return masked(d_h, mask) if d_mask is None else masked(d_h, mask) + h * d_mask

        d_v = d_v + recurrent_product(read(d_copy), w_h)
        rows, ndim = _by_row(theta, state), state.ndim - 1
        if w is not None:
            primals = rows, carry, masked(h, mask), u, v
            d_s = read(getattr(d_carry, cell.recurrent_state))
            _, d_mid = jax.jvp(_over_rows(cell.second_input, ndim), primals, (d_theta, d_carry, d_s, d_u, d_v))
            d_w = d_w + dot(d_mid, w_2)
        update = functools.partial(_over_rows(functools.partial(updated, how), ndim), stay=stay)
        _, (d_new, d_y) = jax.jvp(update, (rows, carry, u, v, w), (d_theta, d_carry, d_u, d_v, d_w))
        return packed(d_new), d_y.astype(dtype)

    (d_last, d_copy), d_ys = time_loop(
        step,
        (d_theta, d_mask),
        packed(d_carry),
        (tuple(reads), problem.stay, d_products),
        fresh=packed(d_fresh),
        flags=problem.flags,
        reverse=how.reverse,
        platform=how.platform,
    )
    # So the cotangent of the other h is 0 if no gate reads it.
    return unpacked(d_last)._replace(**{cell.recurrent_state: d_copy}), d_ys


def arguments(how: How, problem: Problem, states: PyTree) -> tuple[tuple, Read]:
    """Returns the arguments of `update` at all steps, (θ, carry, u, v, w), and the inputs of the products."""
    cell, dtype, wide = how.cell, how.dtype, how.wide
    every = Recurrence(cell.update, _over_rows(cell.second_input, 1, (None, 0, 0, 0, 0)), cell.recurrent_state)
    before = carries_before(problem, states, how.reverse)
    u = input_product(problem.weights, problem.xs, dtype, wide)
    return products(every, problem.weights, before, u, problem.mask, dtype, wide)


def tangents_of_products(problem: Problem, d_xs, d_weights: GatedWeights, of_steps: Sequence[Any], read: Read) -> tuple:
    """The tangents of u, v and w of all steps, as far as they come from xs and weights."""

    def total(like, *terms):
        """The sum of the terms whose tangents are there; None like what is not there."""
        found = [multiply(each).astype(like.dtype) for each, multiply in terms if each is not None]
        return functools.reduce(jnp.add, found) if found else jax.tree.map(jnp.zeros_like, like)

    u, v, w = of_steps
    d_u = total(
        u,
        (d_xs, lambda d: dot(d, problem.weights.w_x)),
        (d_weights.w_x, lambda d: dot(problem.xs, d)),
        (d_weights.b, lambda d: lifted(d.astype(u.dtype), u)),
    )
    d_v = total(v, (d_weights.w_h, lambda d: recurrent_product(read.s, d)))
    return d_u, d_v, total(w, (d_weights.w_2, lambda d: dot(read.mid, d)))


def _over_rows(function: Any, ndim: int, axes: Any = 0) -> Callable[..., PyTree]:
    for _ in range(ndim):
        function = jax.vmap(function, axes)
    return function


def carries_before(problem: Problem, states: PyTree, reverse: bool) -> PyTree:
    """Returns the carry that every step reads, from the carries after every valid step."""
    valid, follows = problem.valid, problem.flags.follows

    def shifted(first, states):
        first = first[None]
        return jnp.concatenate([states, first])[1:] if reverse else jnp.concatenate([first, states])[:-1]

    if valid is None or valid.shape[0] == 0:
        before = jax.tree.map(shifted, problem.carry, states)
    else:
        # The last valid step before each, by its place in [first, *states]: no loop.
        length = valid.shape[0]
        steps = jnp.arange(length, 0, -1) if reverse else jnp.arange(1, length + 1)
        seen = lax.cummax(jnp.where(valid, steps.reshape(length, *[1] * (valid.ndim - 1)), 0), reverse=reverse)
        last = shifted(jnp.zeros_like(seen[0]), seen)

        def picked(first, states):
            whole = jnp.concatenate([first[None], jnp.flip(states, 0) if reverse else states])
            return jnp.take_along_axis(whole, last.reshape(last.shape + (1,) * (whole.ndim - last.ndim)), axis=0)

        before = jax.tree.map(picked, problem.carry, states)
    if follows is None:
        return before
    return select(follows, before, jax.tree.map(lifted, problem.fresh, before))
