"""A gated recurrence by XLA: its steps, and the time loop whose gradients of weights are summed after it.

u = x w_x + b
v = (m s) w_h             s the recurrent part of the carry, m a noise mask
w = second_input(θ, carry, m s, u, v) w_2      where a step has a second product
carry', y = update(θ, carry, u, v, w)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jaxrnn.engines.arrays import accumulator, cast, cast_like, compute_dtype, lifted, select, varying_like
from jaxrnn.engines.loop import time_loop
from jaxrnn.engines.product import dot
from jaxrnn.engines.walk import Flags
from jaxrnn.typing import DTypeLike, PyTree


class GatedWeights(NamedTuple):
    """The arrays of one step, with G columns for all gates that the products feed.

    w_x (D, G): input weights; b (G,): bias, or None; w_h: recurrent weights, dense (S, G), block-diagonal (N, S/N, G/N)
    or diagonal (S,); w_2 (S2, G2): weights of the second product, or None without one; theta: the learned vectors that
    `update` and `second_input` read.
    """

    w_x: Array
    b: Array | None
    w_h: Array
    w_2: Array | None = None
    theta: PyTree = ()


class GatedRecurrence(Protocol):
    """What the loop needs of a cell. `recurrent_state` names the carry's field that the product reads."""

    recurrent_state: str

    def update(self, theta: PyTree, carry: PyTree, u: Array, v: Array, w: Array | None) -> tuple[PyTree, Array]: ...

    def second_input(self, theta: PyTree, carry: PyTree, s: Array, u: Array, v: Array) -> Array: ...


def recurrent_product(s: Array, w_h: Array) -> Array:
    """Computes s w_h, for a dense, block-diagonal or diagonal w_h."""
    wide = accumulator(s.dtype)
    if w_h.ndim == 1:
        return s.astype(wide) * lifted(w_h.astype(wide), s)
    if w_h.ndim == 2:
        return dot(s, w_h)
    blocks, rows, columns = w_h.shape
    s = s.reshape(*s.shape[:-1], blocks, rows)
    v = jnp.einsum("...ni,nij->...nj", s, w_h, preferred_element_type=wide)
    return v.reshape(*v.shape[:-2], blocks * columns)


def _input_product(weights: GatedWeights, x, dtype, wide):
    """Computes u in the wide dtype, for one step or many."""
    u = dot(x.astype(dtype), weights.w_x).astype(wide)
    return u if weights.b is None else u + lifted(weights.b.astype(wide), u)


class Added(NamedTuple):
    """The arrays that are added to u, v and w of every step: zeros, whose cotangents are those of the products."""

    u: Array
    v: Array
    w: Array  # without columns where there is no second product


@jax.custom_jvp
def _moved(x: Array, added: Array) -> Array:
    """Returns x + added. Since `added` is zero, only its tangent is added, so that it is not read before it has a
    tangent.
    """
    return x


@_moved.defjvp
def _moved_jvp(primals, tangents):
    return _moved(*primals), tangents[0] + tangents[1]


class Read(NamedTuple):
    """The inputs of the two products on the carry at a step, in the dtype of the products."""

    s: Array
    mid: Array | None


def products(cell, weights: GatedWeights, carry, u, mask, dtype, wide, added: Added | None = None):
    """Returns the arguments of `update`, in the wide dtype, and the inputs of the products; `weights` have `dtype`."""
    carry, theta = cast(carry, wide), cast(weights.theta, wide)
    s = getattr(carry, cell.recurrent_state)
    if mask is not None:
        s = s * mask.astype(wide)
    narrow = s.astype(dtype)
    v = recurrent_product(narrow, weights.w_h).astype(wide)
    if added is not None:
        u, v = _moved(u, added.u), _moved(v, added.v)
    if weights.w_2 is None:
        return (theta, carry, u, v, None), Read(narrow, None)
    mid = cell.second_input(theta, carry, s, u, v).astype(dtype)
    w = dot(mid, weights.w_2).astype(wide)
    return (theta, carry, u, v, w if added is None else _moved(w, added.w)), Read(narrow, mid)


def dtypes(weights, carry, x):
    """Returns the dtype of the products, and that of the gates: at least float32."""
    dtype = compute_dtype(x, weights)
    return dtype, accumulator(dtype, *(leaf.dtype for leaf in carry))


class Recurrence(NamedTuple):
    """The functions that follow the products of a step: a `GatedRecurrence` that is not a cell."""

    update: Callable[..., tuple[PyTree, Array]]
    second_input: Callable[..., Array] | None = None
    recurrent_state: str = "h"


def gated_products(
    recurrence: GatedRecurrence | Recurrence, weights: GatedWeights, carry: PyTree, x: Array, mask: Array | None = None
):
    """Returns the arguments of `update` at one step, (θ, carry, u, v, w), in the dtype that gates compute in."""
    dtype, wide = dtypes(weights, carry, x)
    weights = cast(weights, dtype)
    return products(recurrence, weights, carry, _input_product(weights, x, dtype, wide), mask, dtype, wide)[0]


def gated_step(
    recurrence: GatedRecurrence | Recurrence,
    weights: GatedWeights,
    carry: PyTree,
    x: Array,
    mask: Array | None = None,
    *,
    owner: str,
) -> tuple[PyTree, Array]:
    """Runs one step of the recurrence: (carry', y), the carry in its own dtypes and y in the dtype of the computation.

    `owner` is its name in messages.
    """
    new, y = recurrence.update(*gated_products(recurrence, weights, carry, x, mask))
    return cast_like(new, carry, owner=owner), y.astype(compute_dtype(x, weights))


class How(NamedTuple):
    """The arguments of the time loop that are not arrays. rates: for every leaf of the carry the part of it that stays
    in expectation, or None where all is new.
    """

    cell: GatedRecurrence
    dtype: DTypeLike
    wide: Any
    reverse: bool
    platform: str | None = None
    rates: tuple[float, ...] | None = None


def zoned(old: PyTree, new: PyTree, rates: Sequence[float | None], stay: PyTree | None) -> PyTree:
    """Returns `new` with the entries of `old` that stay: those that `stay` says, or a part of all, as `rates` say."""
    leaves, structure = jax.tree.flatten(new)
    flags = [None] * len(leaves) if stay is None else stay

    def zone(old, new, rate, stay):
        if rate is None:
            return new
        return select(stay, old, new) if stay is not None else rate * old + (1 - rate) * new

    return jax.tree.unflatten(structure, map(zone, jax.tree.leaves(old), leaves, rates, flags))


def _loop(how: How, weights, carry, fresh, mask, xs, stay, flags: Flags, added: Added | None = None):
    """Runs the time loop: (carry, (ys, the inputs of the products)); with `added`, θ has the axes of a row in front."""
    cell, dtype, wide, reverse, platform, rates = how

    def prepare(constant, inputs):
        weights, _ = constant
        x, added, stay = inputs
        return _input_product(weights, x, dtype, wide), added, stay

    def step(constant, carry, inputs):
        weights, mask = constant
        u, added, stay = inputs
        each = cell if added is None else _ByRow(cell, xs.ndim - 2)
        reads, read = products(each, weights, carry, u, mask, dtype, wide, added)
        new, y = each.update(*reads)
        if rates is not None:
            new = zoned(reads[1], new, rates, stay)
            y = getattr(new, cell.recurrent_state)
        return cast_like(new, carry, owner=type(cell).__name__), (y.astype(dtype), None if added is None else read)

    return time_loop(
        step,
        (weights, mask),
        carry,
        (xs, added, stay),
        fresh=fresh,
        flags=flags,
        reverse=reverse,
        platform=platform,
        prepare=prepare,
    )


class _ByRow:
    """A cell whose θ has the axes of a row in front, like all other arguments of its `update` and `second_input`."""

    def __init__(self, cell: GatedRecurrence, ndim: int):
        self.recurrent_state = cell.recurrent_state
        self.update, self.second_input = cell.update, cell.second_input
        for _ in range(ndim):
            self.update, self.second_input = jax.vmap(self.update), jax.vmap(self.second_input)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def gated_recurrence(how: How, weights, carry, fresh, mask, xs, stay, flags):
    """The time loop, differentiated so that every gradient of a weight is one product over all steps, after the loop.

    The tangents of u, v and w of a step come from x, from the carry, and from the arrays added to them. So the products
    with tangents of weights are computed for all steps at once, before the loop of tangents, and added there. The
    transpose multiplies all cotangents after its loop, summed in at least float32. There is one θ for each row, and the
    rows are summed at the end.
    """
    carry, (ys, _) = _loop(how, weights, carry, fresh, mask, xs, stay, flags)
    return carry, ys


def _recurrence_jvp(how: How, primals, tangents):
    weights, carry, fresh, mask, xs, stay, flags = primals
    dtype, wide = how.dtype, how.wide
    s = getattr(carry, how.cell.recurrent_state)
    # Zeros made of arrays that are there have their sharding, and vary over the same axes of a mesh.
    step, row = jnp.zeros_like(xs[..., :1], wide), jnp.zeros_like(s[..., 0], wide)

    def zeros(columns):
        return jnp.broadcast_to(step, (*xs.shape[:-1], columns))

    def by_row(leaf):
        rows = row.reshape(row.shape + (1,) * leaf.ndim)
        return lifted(leaf, rows) + rows

    v = jax.eval_shape(recurrent_product, s.astype(dtype), weights.w_h)
    columns = weights.w_x.shape[1], v.shape[-1], 0 if weights.w_2 is None else weights.w_2.shape[1]
    added = Added(*map(zeros, columns))
    theta = jax.tree.map(by_row, cast(weights.theta, wide))
    added, theta = varying_like((added, theta), carry, fresh, mask, weights, xs)

    d_weights, d_carry, d_fresh, d_mask, d_xs, *_ = tangents
    rows = {"carry": (carry, d_carry), "fresh": (fresh, d_fresh), "mask": (mask, d_mask)}
    rows = {name: pair for name, pair in rows.items() if _moves(pair[1])}

    def run(theta, moving, added):
        given = {"carry": carry, "fresh": fresh, "mask": mask} | moving
        return _loop(how, weights._replace(theta=theta), xs=xs, stay=stay, flags=flags, added=added, **given)

    moving = {name: value for name, (value, _) in rows.items()}
    (new, (ys, read)), tangent = jax.linearize(run, theta, moving, added)

    def product(tangent, multiply):
        return [multiply(tangent).astype(wide)] if _moves(tangent) else []

    u = product(d_xs, lambda d: dot(d, weights.w_x)) + product(d_weights.w_x, lambda d: dot(xs, d))
    u += product(d_weights.b, lambda d: jnp.broadcast_to(lifted(d.astype(wide), added.u), added.u.shape))
    v = product(d_weights.w_h, lambda d: recurrent_product(read.s, d))
    w = product(d_weights.w_2, lambda d: dot(read.mid, d))
    pairs = zip((u, v, w), added, strict=True)
    d_added = Added(*(functools.reduce(jnp.add, terms) if terms else zero for terms, zero in pairs))
    d_theta = jax.tree.map(by_row, cast(_instantiated(d_weights.theta), wide))
    d_rows = {name: _instantiated(d_value) for name, (_, d_value) in rows.items()}
    d_new, (d_ys, _) = tangent(d_theta, d_rows, d_added)
    return (new, ys), (d_new, d_ys)


gated_recurrence.defjvp(_recurrence_jvp, symbolic_zeros=True)


def _moves(tangent: PyTree) -> bool:
    """Whether part of a tangent is not known to be zero."""
    return not all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(tangent))


def _instantiated(tangent: PyTree) -> PyTree:
    def instantiate(leaf):
        if not isinstance(leaf, SymbolicZero):
            return leaf
        aval: Any = leaf.aval
        return jnp.zeros(aval.shape, aval.dtype)

    return jax.tree.map(instantiate, tangent)
