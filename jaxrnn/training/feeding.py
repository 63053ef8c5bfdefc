"""Turns any form of training data into groups of batches of equal shapes, stacked for one jitted call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrnn import check
from jaxrnn.training.batches import Arrays, Epochs, as_array, is_list
from jaxrnn.training.losses import CellLoss
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


def as_source(name: str, data: PyTree, batch_size: int | None, key: Any, shuffle: bool) -> PyTree:
    """Makes a source of `data`: arrays and pytrees of arrays are cut into batches; lists and iterables hold batches."""
    if callable(getattr(data, "state", None)) and callable(getattr(data, "restore", None)):
        return data
    if isinstance(data, list):
        return Listed(data, name)
    if isinstance(data, (tuple, dict)) or callable(getattr(data, "__array__", None)):
        if batch_size is None:
            raise ValueError(f"batch_size: expected a number, since {name} is arrays")
        return Arrays(data, batch_size, key=key if shuffle else None, shuffle=shuffle)
    if isinstance(data, Iterable):
        return Plain(data)
    raise TypeError(f"{name}: expected a pair of arrays (xs, targets), a Batch, or batches, got {check.brief(data)}")


def as_batch(batch: PyTree) -> PyTree:
    """Converts the leaves of a batch to NumPy arrays, also those of PyTorch.

    PyTorch's data loaders turn a tuple into a list, so a list of arrays is treated as a tuple; a list of numbers is an
    array.
    """

    def leaf(path, value):
        if is_list(value) and (not path or any(hasattr(entry, "shape") for entry in value)):
            return tuple(jax.tree_util.tree_map_with_path(leaf, tuple(value), is_leaf=is_list))
        return as_array(value, f"batch{jax.tree_util.keystr(path)}")

    return jax.tree_util.tree_map_with_path(leaf, batch, is_leaf=is_list)


def checked(loss: Callable, source: Foreign, name: str = "targets") -> Callable[[PyTree], PyTree]:
    """Makes `batch -> batch`, which converts to NumPy and checks that `loss` can learn from the targets.

    Data that are known now are checked at once.
    """

    data = name.removesuffix("targets").rstrip(".") or "data"

    def take(batch):
        if isinstance(loss, CellLoss) and isinstance(source, Listed) and hasattr(batch, "shape"):
            raise TypeError(
                f"{data}: a list is one of batches, and its first entry is an array; pass xs and targets as a tuple, "
                "(xs, targets)"
            )
        batch = as_batch(batch)
        if isinstance(loss, CellLoss):
            loss.check(batch, name)
        return batch

    match source:
        case Arrays(data=data):
            take(data)
        case Listed(batches=batches):
            for batch in batches:
                take(batch)
        case _:
            return take
    return as_batch


def groups(source: Foreign, size: int, take: Callable[[PyTree], PyTree] = as_batch) -> Iterator[Group]:
    """Groups the remaining batches of the epoch, `size` at a time if their shapes agree; smaller groups are filled up.

    `take` converts a batch to NumPy arrays.
    """
    held: list[PyTree] = []
    position = None

    def stack():
        filled = held + [held[-1]] * (size - len(held))
        return Group(jax.tree.map(lambda *leaves: np.stack(leaves), *filled), len(held), position)

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


def _shapes(batch: PyTree):
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
