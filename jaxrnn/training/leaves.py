"""The arrays of a checkpoint: what each is called, how it lies on devices, and the checksum of its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from jaxrnn.engines.arrays import on_device
from jaxrnn.training.identity import checksum
from jaxrnn.training.processes import to_host
from jaxrnn.typing import PyTree


class CheckpointError(ValueError):
    """A directory or checkpoint cannot be used; nothing in it was changed."""


class Leaf(NamedTuple):
    """The saved description of one leaf: its path, its shape and dtype, and the checksum of its numbers.

    `key` is the implementation of a PRNG key, whose numbers are its words; it is None for other arrays.
    """

    path: str
    shape: list[int]
    dtype: str
    checksum: int
    key: str | None


def _is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def named(tree: PyTree) -> list[tuple[str, PyTree]]:
    """The leaves, each with its path as text."""
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def pack(tree: PyTree) -> tuple[dict[str, PyTree], list[Leaf]]:
    """Returns the leaves as plain arrays, and their descriptions; empty leaves have only a description.

    Those that lie on many devices stay there: each process writes its own parts.
    """
    arrays, leaves = {}, []
    for k, (path, leaf) in enumerate(named(tree)):
        key = str(jax.random.key_impl(leaf)) if _is_key(leaf) else None
        leaf = jax.random.key_data(leaf) if key else leaf
        array = to_host(leaf)
        leaves.append(Leaf(path, list(array.shape), array.dtype.name, checksum(array), key))
        if array.size:
            arrays[f"leaf{k}"] = array if _divided(leaf) is None else leaf
    return arrays, leaves


def _divided(leaf: Any) -> Sharding | None:
    """How an array, or a place for one, lies on several devices; None if it does not."""
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, Sharding) and sharding.num_devices > 1 else None


def abstract(wanted: list[tuple[str, PyTree]], leaves: list[Leaf]) -> dict[str, jax.ShapeDtypeStruct]:
    """What to read: arrays of the state on the devices on which they are wanted, rows of the history in NumPy."""
    here = SingleDeviceSharding(jax.local_devices()[0])

    def place(path, like):
        return (_divided(like) or here) if path.startswith("[0]") else None

    return {
        f"leaf{k}": jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype), sharding=place(path, like))
        for k, ((path, like), leaf) in enumerate(zip(wanted, leaves, strict=True))
        if 0 not in leaf.shape
    }


def check_leaves(wanted: list[tuple[str, PyTree]], leaves: list[Leaf], where: str) -> None:
    """Raises an error if a path differs, or the shape of one of the state."""
    other = f"{where} is of another model, optimizer or setting"
    for (path, _), leaf in zip(wanted, leaves, strict=False):
        if path != leaf.path:
            raise CheckpointError(f"{other}: it has {leaf.path[3:]} where {path[3:]} is expected")
    if len(wanted) != len(leaves):
        raise CheckpointError(f"{other}: it has {len(leaves)} leaves, expected {len(wanted)}")
    for (path, like), leaf in zip(wanted, leaves, strict=True):
        words = 0 if leaf.key is None else 1  # the last axis of a key's numbers
        shape = tuple(leaf.shape)[: len(leaf.shape) - words]
        dtype = leaf.dtype if leaf.key is None else f"key<{leaf.key}>"
        if path.startswith("[0]") and (shape != like.shape or (leaf.key is None) == _is_key(like)):
            raise CheckpointError(
                f"{other}: {path[3:]} is {dtype}{list(shape)}, expected {like.dtype}{list(like.shape)}"
            )


def unpack(target: Any, leaves: list[Leaf], arrays: Mapping[str, PyTree], where: str) -> PyTree:
    """Builds the tree with the structure of `target`; raises an error if a dtype or checksum differs."""
    out = []
    for k, ((path, like), leaf) in enumerate(zip(named(target), leaves, strict=True)):
        array = np.zeros(leaf.shape, jnp.dtype(leaf.dtype)) if 0 in leaf.shape else arrays[f"leaf{k}"]
        numbers = to_host(array)
        if checksum(numbers) != leaf.checksum:
            raise CheckpointError(f"{where} is damaged: the checksum of {path[3:]} differs")
        if path.startswith("[0]"):
            array = on_device(numbers) if _divided(like) is None else jnp.asarray(array)
            array = array if leaf.key is None else jax.random.wrap_key_data(array, impl=leaf.key)
            if array.dtype != like.dtype:
                raise CheckpointError(
                    f"{where} is of another model, optimizer or setting: {path[3:]} is {array.dtype}"
                    f"{list(array.shape)}, expected {like.dtype}{list(like.shape)}"
                )
            out.append(array)
        else:
            out.append(numbers)
    return jax.tree.unflatten(jax.tree.structure(target), out)
