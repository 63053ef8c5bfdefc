"""Functions for dtypes, products and selections, shared by everything above."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import Primitive
from jax.sharding import NamedSharding, PartitionSpec

from jaxrnn.typing import PyTree


def inexact(leaf) -> bool:
    """Whether a leaf holds floating or complex numbers."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def varying_like(tree: PyTree, *others: Any) -> PyTree:
    """Makes `tree` vary over all mesh axes of a `shard_map` over which a leaf of it or of `others` varies."""

    def axes(leaf):
        return jax.typeof(leaf).manual_axis_type.varying

    every = frozenset().union(*(axes(leaf) for leaf in jax.tree.leaves((tree, others))))

    def vary(leaf):
        missing = tuple(every - axes(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree) if every else tree


def with_rows_of(tree: PyTree, x: Array, first: int, ndim: int) -> PyTree:
    """Divides the `ndim` batch axes of those leaves of `tree` that have them, (*batch, ...), among devices as those of
    `x` from axis `first` on, where their types say so.
    """
    sharding = jax.typeof(x).sharding
    rows = sharding.spec[first : first + ndim]
    if all(axis is None for axis in rows):
        return tree

    def divide(leaf):
        if leaf.shape[:ndim] != x.shape[first : first + ndim]:
            return leaf
        spec = PartitionSpec(*rows, *[None] * (leaf.ndim - ndim))
        return jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, spec))

    return jax.tree.map(divide, tree)


def compute_dtype(x: Array, params: PyTree):
    """Returns the dtype that a layer computes in: that of `x` if it is floating or complex, else that of its params."""
    if inexact(x):
        return x.dtype
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(params) if inexact(leaf)]
    return _widest(*dtypes) if dtypes else jnp.result_type(float)


def accumulator(*dtypes):
    """Returns the dtype for sums of products of `dtypes`: at least float32."""
    return _widest(jnp.float32, *dtypes)


def _widest(*dtypes):
    # Asked for by name, so a strict `jax_numpy_dtype_promotion` need not forbid it.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def mapped_over_nothing(primitive: Primitive, arrays: Sequence[Array], axes: Sequence[int | None], **options: Any):
    """What the batching rule of `primitive` returns where the new axis has no entries."""

    def one(array, axis):
        sizes = [size for k, size in enumerate(array.shape) if k != axis]
        return jax.ShapeDtypeStruct(tuple(sizes), array.dtype)

    shapes = [one(*each) for each in zip(arrays, axes, strict=True)]
    found = jax.eval_shape(functools.partial(primitive.bind, **options), *shapes)
    return [jnp.zeros((0, *each.shape), each.dtype) for each in found], [0] * len(found)


def evaluated(primitive: Primitive, options: Sequence[str]) -> Callable[..., PyTree]:
    """Returns a function that runs `primitive` outside of `jit`: compiled, also where `jax.disable_jit` asks for single
    steps.
    """
    compiled = jax.jit(primitive.bind, static_argnames=options)

    def run(*arrays, **given):
        with jax.disable_jit(False):
            return compiled(*arrays, **given)

    return run


def on_device(array: np.ndarray) -> Array:
    """Converts `array` to a JAX array, without the compilation that `jnp.asarray` needs for every new shape."""
    return jax.device_put(np.array(array))  # a copy, since device_put shares the memory that it is given


def cast(tree: PyTree, dtype) -> PyTree:
    """Casts the floating and complex leaves of `tree` to `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if inexact(leaf) else leaf, tree)


def widened(tree: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Returns `tree` with its floating and complex leaves in at least float32, and a function back to its own dtypes.

    If a loop reads a tree in this form and converts it back inside, its cotangents are summed over the steps in that
    dtype. Only cotangents are cast at the steps: the loop reads the values of `tree`.
    """
    values = lax.stop_gradient(tree)

    def widen(leaf):
        return leaf.astype(accumulator(leaf.dtype)) if inexact(leaf) else leaf

    def back(wide):
        return jax.tree.map(lambda wide, leaf: wide if wide.dtype == leaf.dtype else _as(leaf, wide), wide, values)

    return jax.tree.map(widen, tree), back


@jax.custom_jvp
def _as(narrow: Array, wide: Array) -> Array:
    """`wide` in the dtype of `narrow`, whose values it has."""
    return narrow


@_as.defjvp
def _as_jvp(primals, tangents):
    return primals[0], tangents[1].astype(primals[0].dtype)


def cast_like(new: PyTree, old: PyTree, *, owner: str) -> PyTree:
    """Casts the carry `new` to the dtypes of `old`; raises an error if the structure, a shape or the kind of number
    changed.
    """
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise TypeError(
            f"{owner}.step: the carry it returns must have the structure that it took, "
            f"{jax.tree.structure(old)}; got {jax.tree.structure(new)}"
        )

    def like(path, new, old):
        new = jnp.asarray(new)
        where = f"{owner}.step: carry{jax.tree_util.keystr(path)}"
        if new.shape != old.shape:
            raise ValueError(f"{where} must keep its shape {old.shape}; got {new.shape}")
        if new.dtype == old.dtype:
            return new
        if not jnp.can_cast(new.dtype, old.dtype, casting="same_kind"):
            raise TypeError(f"{where} must keep its dtype {old.dtype}; {new.dtype} cannot be cast to it")
        return new.astype(old.dtype)

    return jax.tree_util.tree_map_with_path(like, new, old)


def lifted(array: Array, like: Array) -> Array:
    """Adds to `array` the front axes that it lacks beside `like`, which NumPy would add silently.

    They have their sizes: so a cotangent is summed over all of them at once. Over some of (T, 1, D), XLA takes 50 times
    as long on a CPU. And their types: so each device sums its own rows.
    """
    first = like.ndim - array.ndim
    shape, sharding = like.shape[:first] + array.shape, jax.typeof(like).sharding
    rows = sharding.spec[:first]
    if all(axis is None for axis in rows):
        return jnp.broadcast_to(array, shape)
    spec = PartitionSpec(*rows, *jax.typeof(array).sharding.spec)
    return jnp.broadcast_to(array, shape, out_sharding=NamedSharding(sharding.mesh, spec))


def repeated(array: Array, like: Array, axis: int) -> Array:
    """`array` for every index of an axis of `like`, in front, which devices divide as they divide that axis."""
    shape, sharding = (like.shape[axis], *array.shape), jax.typeof(like).sharding
    if sharding.spec[axis] is None:
        return jnp.broadcast_to(array, shape)
    spec = PartitionSpec(sharding.spec[axis], *jax.typeof(array).sharding.spec)
    return jnp.broadcast_to(array, shape, out_sharding=NamedSharding(sharding.mesh, spec))


def folded(array: Array, axis: int) -> Array:
    """One axis of two, of which devices may divide the first."""
    first, second = array.shape[axis : axis + 2]
    return _reshaped(array, axis, 2, (first * second,))


def unfolded(array: Array, axis: int, count: int) -> Array:
    """What was folded: the axis of size `count`, and the other one behind it."""
    return _reshaped(array, axis, 1, (count, array.shape[axis] // count))


def _reshaped(array: Array, axis: int, of: int, sizes: tuple[int, ...]) -> Array:
    """`array` with `sizes` in place of some axes; the first of them is divided as the first of those was."""
    sharding = jax.typeof(array).sharding
    shape = (*array.shape[:axis], *sizes, *array.shape[axis + of :])
    if all(each is None for each in sharding.spec):
        return array.reshape(shape)
    own = sharding.spec[axis], *[None] * (len(sizes) - 1)
    spec = PartitionSpec(*sharding.spec[:axis], *own, *sharding.spec[axis + of :])
    return array.reshape(shape, out_sharding=NamedSharding(sharding.mesh, spec))


def select(flag: Array, on: Any, off: Any) -> PyTree:
    """Returns `on` where `flag` (a prefix of the leaves' axes) is true, else `off`. It is a selection, so NaN does not
    cross.
    """

    def pick(on, off):
        return jnp.where(flag.reshape(flag.shape + (1,) * (on.ndim - flag.ndim)), on, off)

    return jax.tree.map(pick, on, off)


def zero_where_not(flag: Array | None, tree: PyTree) -> PyTree:
    """Returns `tree`, with zeros where `flag` is given and false."""
    return tree if flag is None else select(flag, tree, jax.tree.map(jnp.zeros_like, tree))
