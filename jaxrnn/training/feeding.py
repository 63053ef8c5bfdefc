"""Turns any form of training data into groups of batches of equal shapes, stacked for one jitted call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import check
from jaxrnn.training.batches import Arrays, Epochs, as_array, is_list
from jaxrnn.training.losses import CellLoss
from jaxrnn.training.placement import Placement, take_rows
from jaxrnn.training.processes import agree, described, in_all
from jaxrnn.typing import Foreign, Named, PyTree


class Group(NamedTuple):
    """Up to K batches of one shape: leaves (K, B, ...), the number of real batches, and the position after them."""

    batches: Any
    filled: int
    position: Any


class Listed(Epochs):
    """A source that gives the batches of a list in its order."""

    def __init__(self, batches: Sequence[PyTree], name: str):
        if not batches:
            raise ValueError(f"{name}: expected at least one batch, got an empty list")
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def plan(self, epoch: int) -> Sequence[PyTree]:
        return self.batches

    def batch(self, entry: Foreign) -> PyTree:
        return entry

    def identity(self) -> Named:
        return {"size": len(self.batches)}


class DeviceArrays(Arrays):
    """`Arrays` of which some lie on devices: batches are gathered there."""

    def __init__(self, data: PyTree, batch_size: int, where: Placement, *, key: Any, shuffle: bool):
        super().__init__(np.arange(_rows_of(data)), batch_size, key=key, shuffle=shuffle)
        self.where, self.arrays = where, where.put_batches(data, 0)

    def batch(self, entry: np.ndarray) -> PyTree:
        return take_rows(self.where, self.arrays, entry)


class Plain:
    """A source made of any iterable of batches; it cannot tell its position."""

    def __init__(self, batches: Iterable[PyTree]):
        self.batches = batches

    def __iter__(self) -> Iterator[PyTree]:
        empty = True
        for batch in self.batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("data: an epoch without a batch; an iterator is used up after one epoch, pass a source")

    def state(self) -> None:
        return None

    def restore(self, state: PyTree) -> None:
        raise ValueError(
            "data: a plain iterable cannot go on from a checkpoint; pass arrays, a list of batches, or a source with "
            "state() and restore()"
        )


def as_source(
    name: str, data: PyTree, batch_size: int | None, key: Any, shuffle: bool, where: Placement | None = None
) -> PyTree:
    """Makes a source of `data`: arrays and pytrees of arrays are cut into batches; lists and iterables hold batches.

    Of NumPy arrays in several processes each has a part, and gives its part of every batch.
    """
    if callable(getattr(data, "state", None)) and callable(getattr(data, "restore", None)):
        return data
    if isinstance(data, list):
        return Listed(data, name)
    if isinstance(data, (tuple, dict)) or callable(getattr(data, "__array__", None)):
        if batch_size is None:
            raise ValueError(f"batch_size: expected a number, since {name} is arrays")
        key = key if shuffle else None
        if where is not None and any(where.keeps(leaf) for leaf in jax.tree.leaves(data)):
            return DeviceArrays(data, batch_size, where, key=key, shuffle=shuffle)
        parts = 1 if where is None or where.members else where.processes
        if batch_size % parts:
            raise ValueError(f"batch_size: expected a number that the {parts} processes divide, got {batch_size}")
        return Arrays(data, batch_size // parts, key=key, shuffle=shuffle)
    if isinstance(data, Iterable):
        return Plain(data)
    raise TypeError(f"{name}: expected a pair of arrays (xs, targets), a Batch, or batches, got {check.brief(data)}")


def as_batch(batch: PyTree, where: Placement | None = None) -> PyTree:
    """Converts the leaves of a batch to NumPy arrays, also those of PyTorch; on a mesh, JAX arrays stay as they are.

    PyTorch's data loaders turn a tuple into a list, so a list of arrays is treated as a tuple; a list of numbers is an
    array.
    """

    def leaf(path, value):
        if is_list(value) and (not path or any(hasattr(entry, "shape") for entry in value)):
            return tuple(jax.tree_util.tree_map_with_path(leaf, tuple(value), is_leaf=is_list))
        if where is not None and where.keeps(value):
            return value
        return as_array(value, f"batch{jax.tree_util.keystr(path)}")

    return jax.tree_util.tree_map_with_path(leaf, batch, is_leaf=is_list)


def checked(
    loss: Callable, source: Foreign, name: str = "targets", where: Placement | None = None
) -> Callable[[PyTree], PyTree]:
    """Makes `batch -> batch`, which converts to NumPy and checks that `loss` can learn from the targets.

    Data that are known now are checked at once. Those on devices are not read.
    """

    data = name.removesuffix("targets").rstrip(".") or "data"

    convert = functools.partial(as_batch, where=where)

    def take(batch):
        if isinstance(loss, CellLoss) and isinstance(source, Listed) and hasattr(batch, "shape"):
            raise TypeError(
                f"{data}: a list is one of batches, and its first entry is an array; pass xs and targets as a tuple, "
                "(xs, targets)"
            )
        batch = convert(batch)
        if isinstance(loss, CellLoss) and not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch)):
            loss.check(batch, name)
        return batch

    match source:
        case DeviceArrays():
            return take
        case Arrays(data=data):
            take(data)
        case Listed(batches=batches):
            for batch in batches:
                take(batch)
        case _:
            return take
    return convert


def groups(source: Foreign, size: int, take: Callable[[PyTree], PyTree] = as_batch) -> Iterator[Group]:
    """Groups the remaining batches of the epoch, `size` at a time if their shapes agree; smaller groups are filled up.

    `take` converts a batch to NumPy arrays.
    """
    held: list[PyTree] = []
    position = None

    def stack():
        filled = held + [held[-1]] * (size - len(held))
        return Group(jax.tree.map(lambda *leaves: _stacked(leaves), *filled), len(held), position)

    for batch in source:
        batch = take(batch)
        if held and (len(held) == size or _shapes(batch) != _shapes(held[0])):
            yield stack()
            held.clear()
        held.append(batch)
        position = source.state()
    if held:
        position = source.state()  # that of the next epoch
        yield stack()


def placed(groups: Iterable[Group], where: Placement | None) -> Iterator[Group]:
    """The groups on the devices of a mesh."""
    if where is None:
        yield from groups
        return
    for group in _alike(groups, "data", where, 1):
        yield group._replace(batches=where.put_batches(group.batches, 1))


def placed_batches(batches: Iterable[PyTree], where: Placement | None, name: str) -> Iterator[PyTree]:
    """Batches on the devices of a mesh."""
    if where is None:
        yield from batches
        return
    for group in _alike((Group(batch, 1, None) for batch in batches), name, where, 0):
        yield where.put_batches(group.batches, 0)


def _alike(groups: Iterable[Group], name: str, where: Placement, axis: int) -> Iterator[Group]:
    """The groups, with rows along `axis`; raises if other processes have not as many, of the same shapes."""
    rest = iter(groups)
    while True:
        with in_all(several=where.processes > 1):
            group = next(rest, None)
        if where.processes > 1:
            agree(name, "no more batches" if group is None else _told(group, where, axis))
        if group is None:
            return
        yield group


def _told(group: Group, where: Placement, axis: int) -> str:
    """What must be equal in all processes: the numbers too, of what each device has whole."""

    def told(path, leaf):
        if where.members or leaf.ndim <= axis:
            return f"batches{jax.tree_util.keystr(path)} of {described(leaf)}"
        return f"batches{jax.tree_util.keystr(path)} of {leaf.dtype}{list(leaf.shape)}"

    lines = [told(*each) for each in jax.tree_util.tree_leaves_with_path(group.batches)]
    return "\n".join([*lines, f"{group.filled} batches in one call"])


def _stacked(leaves: Sequence[PyTree]) -> PyTree:
    return (jnp if any(isinstance(leaf, jax.Array) for leaf in leaves) else np).stack(leaves)


def _rows_of(data: PyTree) -> int:
    """The length of the common leading axis."""
    leaves = jax.tree_util.tree_leaves_with_path(data)
    for path, leaf in leaves:
        if not np.ndim(leaf) or len(leaf) != len(leaves[0][1]):
            name = f"data{jax.tree_util.keystr(path)}"
            raise ValueError(f"{name}: expected a leading axis as that of the first array, got shape {np.shape(leaf)}")
    return len(leaves[0][1])


def _shapes(batch: PyTree):
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
