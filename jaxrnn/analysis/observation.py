"""Records the values that recurrent cells of a model read at every step, and can add offsets to them.

Recording does not change the results.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cell import Cell, take_step
from jaxrnn.compose.wrap import Wrapper
from jaxrnn.engines.arrays import accumulator, inexact
from jaxrnn.sequence import scan
from jaxrnn.typing import PyTree


class Reads(NamedTuple):
    """The values that each step reads: the carry (fresh after a reset) and x; leaves (T, *batch, ...), 0 if invalid."""

    carry: PyTree
    x: PyTree


class Observation(NamedTuple):
    """One cell of a model after a run: its final carry, the values its steps read, and the valid steps, (T, *batch)."""

    cell: Cell
    params: PyTree
    carry: PyTree
    reads: Reads
    valid: Array


class ObservedParams(NamedTuple):
    """The params of the cell, and the offsets to the floating leaves of the carry at each step, (T, *batch, ...)."""

    cell: Any
    offsets: list[Array] | None


class Observed(Wrapper):
    """A cell that returns an `Observation` in place of its final carry; its step takes (x, offsets) for x."""

    def init(self, key, dtype=jnp.float32):
        return ObservedParams(self.cell.init(key, dtype), None)

    def initial_carry(self, params, batch_shape=()):
        return self.cell.initial_carry(params.cell, batch_shape)

    def step(self, params, carry, x, noise=None):
        x, offsets = x
        if offsets is not None:
            leaves, structure = jax.tree.flatten(carry)
            offset = iter(offsets)
            carry = jax.tree.unflatten(structure, [leaf + next(offset) if inexact(leaf) else leaf for leaf in leaves])
        new, y = take_step(self.cell, params.cell, carry, x, noise)
        return new, (y, Reads(carry, x))

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        length = jax.tree.leaves(xs)[0].shape[0]
        row = jax.tree.leaves(jax.eval_shape(self.initial_carry, params))[0]
        leaf = jax.tree.leaves(carry)[0]
        batch_shape = leaf.shape[: leaf.ndim - row.ndim]
        inputs = xs, params.offsets
        carry, (ys, reads) = Cell.scan(self, params, carry, inputs, fresh=fresh, noise=noise, walk=walk)
        valid = jnp.ones((length, *batch_shape), bool) if walk.valid is None else walk.valid
        return Observation(self.cell, params.cell, carry, reads, valid), ys


def observe(
    cell: Cell, params: PyTree, carry: PyTree, xs: PyTree, offsets: Any = None, **keywords: Any
) -> tuple[PyTree, PyTree]:
    """Runs `jaxrnn.scan` with an `Observation` in place of the final carry of every recurrent cell.

    In compositions that pass the carries of their parts on unchanged (`Cell.transparent`), the parts are observed; any
    other cell is observed as a whole, by its step. `offsets` holds one list for each observed cell, in order.
    """
    check.a_cell("cell", cell)
    jax.eval_shape(cell.initial_carry, params)  # raises where the params are of another cell
    cell, params = _observed(cell, params, None if offsets is None else iter(offsets))
    return scan(cell, params, carry, xs, **keywords)


def observe_whole(cell: Cell, params: PyTree, carry: PyTree, xs: PyTree, **keywords: Any) -> Observation:
    """Returns the `Observation` of `cell`, which may be a composition, as one recurrence."""
    check.a_cell("cell", cell)
    if cell.ends_time:
        raise TypeError(f"cell: expected one that runs step by step; analyse the cell inside the Pool of {cell!r}")
    if not jax.tree.leaves(jax.eval_shape(cell.initial_carry, params)):
        raise TypeError(f"cell: expected one with a carry, got {cell!r}")
    return scan(Observed(cell), ObservedParams(params, None), carry, xs, **keywords)[0]


def _observed(cell, params, offsets):
    """Returns `cell` and `params` with every recurrent cell observed."""
    if not jax.tree.leaves(jax.eval_shape(cell.initial_carry, params)):
        return cell, params
    if cell.transparent:
        parts = []
        for part in cell.parts(params):
            inside, inner = _observed(part.cell, part.params, offsets)
            parts.append(part._replace(cell=inside, params=inner))
        return cell.with_parts(params, parts)
    return Observed(cell), ObservedParams(params, None if offsets is None else next(offsets))


def _is_observation(node):
    return isinstance(node, Observation)


def observations(carry: PyTree) -> list[Observation]:
    """The observations in the carry that `observe` returns."""
    return list(filter(_is_observation, jax.tree.leaves(carry, is_leaf=_is_observation)))


def final_carry(carry: PyTree) -> PyTree:
    """The carry that `scan` would have returned."""
    return jax.tree.map(lambda node: node.carry if _is_observation(node) else node, carry, is_leaf=_is_observation)


def arrange(carry: PyTree, results: list) -> PyTree:
    """Arranges `results`, one for each observation, in the structure of the carry, and None for unobserved nodes."""
    result = iter(results)
    return jax.tree.map(lambda node: next(result) if _is_observation(node) else None, carry, is_leaf=_is_observation)


def _flat(leaf: Array, batch_ndim: int) -> Array:
    return leaf.reshape(*leaf.shape[:batch_ndim], math.prod(leaf.shape[batch_ndim:]))


def as_real(tree: PyTree, batch_ndim: int = 0) -> Array:
    """Joins the floating leaves to one array, (*batch, N), of at least float32; a complex one as (real, imaginary)."""
    parts = []
    for leaf in filter(inexact, jax.tree.leaves(tree)):
        rows = _flat(leaf, batch_ndim)
        parts += [rows.real, rows.imag] if jnp.iscomplexobj(rows) else [rows]
    dtype = accumulator(*(part.dtype for part in parts))
    return jnp.concatenate([part.astype(dtype) for part in parts], axis=-1)


def from_real(vector: Array, like: PyTree) -> PyTree:
    """The tree `like` with its floating leaves taken from a vector that `as_real` made."""
    leaves, structure = jax.tree.flatten(like)
    start = 0

    def take(leaf):
        nonlocal start
        part = vector[start : start + leaf.size].reshape(leaf.shape)
        start += leaf.size
        return part

    def rebuild(leaf):
        if not inexact(leaf):
            return leaf
        return (jax.lax.complex(take(leaf), take(leaf)) if jnp.iscomplexobj(leaf) else take(leaf)).astype(leaf.dtype)

    return jax.tree.unflatten(structure, [rebuild(leaf) for leaf in leaves])


def norm(leaf: Array, batch_ndim: int) -> Array:
    """The norm ‖leaf‖ over all but the first axes, also where its square would overflow or vanish."""
    rows = jnp.abs(_flat(leaf, batch_ndim))
    greatest = rows.max(-1, initial=0)
    regular = (greatest > 0) & jnp.isfinite(greatest)
    scale = jnp.where(regular, greatest, jnp.ones_like(greatest))
    return jnp.where(regular, scale * jnp.sqrt(jnp.square(rows / scale[..., None]).sum(-1)), greatest)
