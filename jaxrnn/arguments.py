"""Checks the arguments of `scan`, `step`, `rollout` and `last`, and brings them into the form that cells take."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrnn import check
from jaxrnn.cell import Cell, input_size
from jaxrnn.engines.arrays import accumulator, inexact, with_rows_of
from jaxrnn.engines.sequence_parallel import check_axis_name
from jaxrnn.typing import PyTree


def to_jax(params: PyTree) -> PyTree:
    """Converts NumPy arrays in `params` to JAX arrays, so that a cell may index them by traced values."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, params)


def single_key(key: Array) -> Array:
    """Returns `key` as a single `jax.random` key of the new kind."""
    if not isinstance(key, jax.Array):
        raise TypeError(f"key: expected a jax.random key, got {type(key).__name__}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.ndim != 1:
            raise TypeError(f"key: expected a jax.random key, got {key.dtype}{list(key.shape)}")
        key = jax.random.wrap_key_data(key)
    if key.ndim:
        raise ValueError(f"key: expected a single key, got shape {key.shape}; vmap over keys for one per row")
    return key


def batch_shape_of(cell: Cell, name: str, x: PyTree) -> tuple[int, ...]:
    """The shape of the leading axes of x, which do not belong to one step."""
    ndims = cell.input_ndim
    if isinstance(ndims, int):
        ndims = jax.tree.map(lambda _: cell.input_ndim, x)
    if x is None:
        raise TypeError(
            f"{name}: expected an array, got None; the carry stands before it: (cell, params, carry, {name})"
        )
    if jax.tree.structure(ndims) != jax.tree.structure(x) or not jax.tree.leaves(x):
        raise ValueError(f"{name}: expected a tree like {cell.input_ndim}, got {jax.tree.structure(x)}")
    shapes = []
    for (path, leaf), ndim in zip(jax.tree_util.tree_leaves_with_path(x), jax.tree.leaves(ndims), strict=True):
        shapes.append(leaf.shape[: leaf.ndim - ndim])
        at = f"{name}{jax.tree_util.keystr(path)}"
        if leaf.ndim < ndim:
            raise ValueError(f"{at}: {cell!r} takes {ndim} axes per step, got shape {leaf.shape}")
        if shapes[-1] != shapes[0]:
            raise ValueError(f"{at}: expected leading axes {shapes[0]} as in the other leaves, got {shapes[-1]}")
    size = input_size(cell)
    if size is not None:
        if not isinstance(x, jax.Array):
            raise TypeError(f"{name}: {cell!r} expects one array, got {type(x).__name__}")
        size = size if isinstance(size, tuple) else (size,)
        if x.shape[x.ndim - len(size) :] != size:
            raise ValueError(f"{name}: {cell!r} expects (..., {', '.join(map(str, size))}), got shape {x.shape}")
    return shapes[0]


def time_first(cell: Cell, xs: PyTree, time_axis: Any) -> tuple[PyTree, int, tuple[int, ...], int]:
    """Returns xs with time first, its length, the batch shape, and the time axis."""
    time_axis = check.integer("time_axis", time_axis, least=0)
    if isinstance(xs, list) and isinstance(cell.input_ndim, int):
        raise TypeError("xs: expected an array, got a list; jnp.asarray(xs) makes one of numbers")
    xs = jax.tree.map(jnp.asarray, xs)
    shape = batch_shape_of(cell, "xs", xs)
    if not shape:
        raise ValueError(
            f"xs: expected an axis of time before those of one step, got shape {jax.tree.leaves(xs)[0].shape}"
        )
    if time_axis >= len(shape):
        raise ValueError(
            f"time_axis: expected less than {len(shape)}, the number of time and batch axes, got {time_axis}"
        )
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, time_axis, 0), xs) if time_axis else xs
    return xs, shape[time_axis], shape[:time_axis] + shape[time_axis + 1 :], time_axis


def flags_of(name: str, flags: Any, length: int, batch_shape: tuple[int, ...], time_axis: int) -> Array:
    """Returns boolean flags with time first."""
    flags = jnp.asarray(flags)
    if flags.dtype != bool:
        raise TypeError(f"{name}: expected bool, got {flags.dtype}")
    shape = (*batch_shape[:time_axis], length, *batch_shape[time_axis:])
    if flags.shape != shape:
        hint = BATCH_FIRST if time_axis == 0 and flags.shape[:2] == shape[1::-1] else ""
        raise ValueError(f"{name}: expected shape {shape}, time and batch axes as in xs, got {flags.shape}{hint}")
    return jnp.moveaxis(flags, time_axis, 0)


def single_flags(name: str, flags: PyTree, batch_shape: tuple[int, ...]) -> Array:
    """Booleans of one step."""
    flags = jnp.asarray(flags)
    if flags.dtype != bool:
        raise TypeError(f"{name}: expected bool, got {flags.dtype}")
    if flags.shape != batch_shape:
        raise ValueError(f"{name}: expected the batch shape {batch_shape}, got {flags.shape}")
    return flags


BATCH_FIRST = "; if the batch comes first in xs, pass time_axis=1"


class Names(NamedTuple):
    """The names that the caller uses for two of the arguments."""

    carry: str = "carry"
    lengths: str = "lengths"


NAMES = Names()


def check_divided(cell: Cell, axis_name: str) -> None:
    """Raises an error where time cannot be divided over the axis of a mesh."""
    if not cell.time_divides:
        raise ValueError(
            "axis_name: expected a cell that is linear in its state, so that devices can run parts of the steps at "
            f"once, got {cell!r}"
        )
    check_axis_name(axis_name)


def valid_steps(
    lengths: PyTree, mask: PyTree, length: int, batch_shape: tuple[int, ...], time_axis: int, name: str = "lengths"
) -> Array | None:
    """The valid steps with time first, from lengths or from a mask; None if all are valid."""
    if lengths is not None and mask is not None:
        raise ValueError(f"mask: expected {name} or mask, got both")
    if mask is not None:
        return flags_of("mask", mask, length, batch_shape, time_axis)
    if lengths is None:
        return None
    if check.concrete(lengths):
        lengths = np.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{name}: expected integers, got {lengths.dtype}")
    if lengths.shape != batch_shape:
        batch_first = lengths.shape == (length,) and time_axis == 0
        hint = BATCH_FIRST if batch_first else ""
        raise ValueError(f"{name}: expected the batch shape {batch_shape}, got {lengths.shape}{hint}")
    if check.concrete(lengths) and lengths.size and (lengths.min() < 0 or lengths.max() > length):
        raise ValueError(f"{name}: expected 0 to {length}, got {lengths.min()} to {lengths.max()}")
    return jnp.arange(length).reshape(length, *(1,) * len(batch_shape)) < lengths[None]


def carries(
    cell: Cell,
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    batch_shape: tuple[int, ...],
    at: int = 0,
    name: str = "carry",
) -> tuple[PyTree, PyTree]:
    """Returns the carry to start from and the fresh carry in the same dtypes; batch axes begin at axis `at` of xs."""
    fresh = cell.initial_carry(params, batch_shape)
    first = jax.tree.leaves(xs)[0]
    fresh = with_rows_of(fresh, first, at, len(batch_shape))
    if carry is None:
        fresh = _widen(fresh, params, xs)
        return fresh, fresh
    expected, structure = jax.tree_util.tree_flatten_with_path(fresh)
    if jax.tree.structure(carry) != structure:
        inside = _handed_on(carry)
        if jax.tree.structure(inside) != structure:
            raise ValueError(f"{name}: expected the structure {structure} of {cell!r}, got {jax.tree.structure(carry)}")
        carry = inside
    carry = with_rows_of(jax.tree.map(jnp.asarray, carry), first, at, len(batch_shape))
    for (path, want), have in zip(expected, jax.tree.leaves(carry), strict=True):
        at_leaf = f"{name}{jax.tree_util.keystr(path)}"
        if have.shape != want.shape:
            hint = BATCH_FIRST if at == 1 and batch_shape and have.shape[:1] == first.shape[:1] else ""
            raise ValueError(f"{at_leaf}: expected shape {want.shape}, got {have.shape}{hint}")
        of_a_kind = jnp.iscomplexobj(want) == jnp.iscomplexobj(have)
        if not of_a_kind or not jnp.can_cast(want.dtype, have.dtype, casting="same_kind"):
            raise TypeError(f"{at_leaf}: expected {want.dtype} or a dtype of its kind, got {have.dtype}")
    return carry, jax.tree.map(lambda new, old: new.astype(old.dtype), fresh, carry)


def _handed_on(carry: PyTree) -> PyTree:
    """The carry from which another cell continues: every part that has a `handed_on` is replaced by it."""

    def names_another(node):
        return hasattr(node, "handed_on")

    return jax.tree.map(lambda node: getattr(node, "handed_on", node), carry, is_leaf=names_another)


def _widen(carry: PyTree, params: PyTree, xs: PyTree) -> PyTree:
    """Casts `carry` to the widest precision among float32, the params and floating xs."""
    leaves = [leaf for leaf in jax.tree.leaves((params, xs)) if inexact(leaf)]
    real = accumulator(*(jnp.finfo(leaf.dtype).dtype for leaf in leaves))
    return jax.tree.map(lambda leaf: leaf.astype(accumulator(leaf.dtype, real)) if inexact(leaf) else leaf, carry)


def check_feedback(following: Any, x: PyTree) -> None:
    """Checks that the next x of a rollout has the structure, shapes and dtypes of x."""

    def describe(tree):
        return jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree)

    if describe(following) != describe(x):
        raise TypeError(f"feedback: expected a next x like x, {describe(x)}, got {describe(following)}")
