"""A gated recurrence by XLA: its steps and the time loop; see `derivative` for its gradients.

u = x w_x + b
v = (m s) w_h             s the recurrent part of the carry, m a noise mask
w = second_input(θ, carry, m s, u, v) w_2      where a step has a second product
carry', y = update(θ, carry, u, v, w)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from jax import Array, lax

from jaxrnn.engines.arrays import accumulator, cast, cast_like, compute_dtype, lifted, select
from jaxrnn.engines.gated.gates import apart
from jaxrnn.engines.loop import time_loop
from jaxrnn.engines.product import block_dot, dot
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
    """Computes s w_h, for a dense, block-diagonal or diagonal w_h; a dense one may have gates apart."""
    wide = accumulator(s.dtype)
    if w_h.ndim == 1:
        return s.astype(wide) * lifted(w_h.astype(wide), s)
    blocks, rows, *columns = w_h.shape
    return block_dot(s, w_h) if columns and blocks * rows == s.shape[-1] else dot(s, w_h)


def input_product(weights: GatedWeights, x: Array, dtype: DTypeLike, wide: DTypeLike) -> Array:
    """Computes u in the wide dtype, for one step or many."""
    u = dot(x.astype(dtype), weights.w_x).astype(wide)
    return u if weights.b is None else u + lifted(weights.b.astype(wide), u)


class Read(NamedTuple):
    """The inputs of the two products on the carry at a step, in the dtype of the products."""

    s: Array
    mid: Any


def products(cell, weights: GatedWeights, carry, u, mask, dtype, wide, s=None):
    """Returns the arguments of `update`, in the wide dtype, and the inputs of the products; `weights` have `dtype`, and
    so has s, if it is known.
    """
    s = first_input(cell, carry, mask, dtype, wide) if s is None else s
    carry, theta = cast(carry, wide), cast(weights.theta, wide)
    v = _alone(recurrent_product(s, weights.w_h).astype(wide))
    if weights.w_2 is None:
        return (theta, carry, u, v, None), Read(s, None)
    mid = cell.second_input(theta, carry, masked(getattr(carry, cell.recurrent_state), mask), u, v).astype(dtype)
    return (theta, carry, u, v, _alone(dot(mid, weights.w_2).astype(wide))), Read(s, mid)


def first_input(cell, carry, mask, dtype, wide) -> Array:
    """Returns s, what the recurrent product reads of a carry."""
    return masked(getattr(carry, cell.recurrent_state).astype(wide), mask).astype(dtype)


def _alone(product: Array) -> Array:
    """Keeps the sum that a product is a term of from cuBLAS, which would copy the other term first: another kernel."""
    return lax.platform_dependent(product, cuda=lax.optimization_barrier, default=lambda product: product)


def masked(s: Array, mask: Array | None) -> Array:
    """Returns what the recurrent product reads, at one step or at many."""
    return s if mask is None else s * lifted(mask.astype(s.dtype), s)


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
    return products(recurrence, weights, carry, input_product(weights, x, dtype, wide), mask, dtype, wide)[0]


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
    in expectation, or None where all is new. apart: whether the cell takes products with gates apart.
    """

    cell: GatedRecurrence | Recurrence
    dtype: DTypeLike
    wide: Any
    reverse: bool
    platform: str | None = None
    rates: tuple[float, ...] | None = None
    apart: bool = False


def zoned(old: PyTree, new: PyTree, rates: Sequence[float | None], stay: PyTree | None) -> PyTree:
    """Returns `new` with the entries of `old` that stay: those that `stay` says, or a part of all, as `rates` say."""
    leaves, structure = jax.tree.flatten(new)
    flags = [None] * len(leaves) if stay is None else stay

    def zone(old, new, rate, stay):
        if rate is None:
            return new
        return select(stay, old, new) if stay is not None else rate * old + (1 - rate) * new

    return jax.tree.unflatten(structure, map(zone, jax.tree.leaves(old), leaves, rates, flags))


class Problem(NamedTuple):
    """The arrays of a recurrence, absent ones None.

    xs: the inputs (T, *batch, D); carry: the one before the first step; fresh: the one that a reset starts from;
    mask (*batch, S): what multiplies the recurrent part of the carry; stay: for every leaf of the carry, which entries
    keep their value at a step; valid, start: see `Flags`.
    """

    xs: PyTree
    weights: PyTree
    carry: PyTree
    fresh: PyTree
    mask: PyTree = None
    stay: PyTree = None
    valid: PyTree = None
    start: PyTree = None

    @property
    def flags(self) -> Flags:
        """The flags of every step."""
        return Flags(self.valid, self.start)


def updated(how: How, theta, carry, u, v, w, stay) -> tuple[PyTree, Array]:
    """Returns (carry', y), where some entries of the carry stay."""
    new, y = how.cell.update(theta, carry, u, v, w)
    if how.rates is None:
        return new, y
    new = zoned(carry, new, how.rates, stay)
    return new, getattr(new, how.cell.recurrent_state)


def by_gate(how: How, weights: GatedWeights, like: GatedWeights) -> GatedWeights:
    """`weights`, or their tangents, as the loop takes them: with gates apart, of the sizes that `like` has."""
    if not how.apart:
        return weights
    size = (like.w_h if like.w_2 is None else like.w_2).shape[0]
    w_x, b, w_h = (None if each is None else apart(each, size) for each in weights[:3])
    return weights._replace(w_x=w_x, b=b, w_h=w_h)


def time_steps(how: How, problem: Problem, keep: bool = False) -> tuple[PyTree, Array, PyTree]:
    """Runs the time loop: (carry, ys, with `keep` the carry after every valid step)."""
    dtype, wide = how.dtype, how.wide

    def prepare(constant, inputs):
        weights, _ = constant
        x, stay = inputs
        return input_product(weights, x, dtype, wide), stay

    def with_input(carry, mask):
        """A carry, and s where that is another array: else casts were kernels of their own on a GPU."""
        s = first_input(how.cell, carry, mask, dtype, wide)
        same = mask is None and getattr(carry, how.cell.recurrent_state).dtype == dtype
        return carry, None if same else s

    def step(constant, state, inputs):
        (weights, mask), (carry, s), (u, stay) = constant, state, inputs
        reads, _ = products(how.cell, weights, carry, u, mask, dtype, wide, s)
        new, y = updated(how, *reads, stay)
        # y is not written twice where the carry has all of it.
        kept = keep and y is getattr(new, how.cell.recurrent_state)
        y = None if kept and getattr(carry, how.cell.recurrent_state).dtype in (dtype, wide) else y.astype(dtype)
        new = cast_like(new, carry, owner=type(how.cell).__name__)
        return with_input(new, mask), (y, new if keep else None)

    (carry, _), (ys, states) = time_loop(
        step,
        (by_gate(how, problem.weights, problem.weights), problem.mask),
        with_input(problem.carry, problem.mask),
        (problem.xs, problem.stay),
        fresh=with_input(problem.fresh, problem.mask),
        flags=problem.flags,
        reverse=how.reverse,
        platform=how.platform,
        prepare=prepare,
    )
    return carry, getattr(states, how.cell.recurrent_state).astype(dtype) if ys is None else ys, states
