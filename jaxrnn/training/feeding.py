"""From whatever holds batches to groups of equal shapes, stacked for one jitted call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrnn.training.batches import Arrays, Epochs


class Group(NamedTuple):
    """Up to K batches of one shape: leaves (K, B, ...), how many of the K are real, and the position after it."""

    batches: Any
    count: int
    position: Any


class Listed(Epochs):
    """A list of batches as a source, in its order."""

    def __init__(self, batches: Sequence[Any], name: str):
        if not batches:
            raise ValueError(f"{name}: expected at least one batch, got an empty list")
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def plan(self, epoch: int) -> Sequence[Any]:
        return self.batches

    def batch(self, entry: Any) -> Any:
        return entry

    def identity(self) -> dict[str, Any]:
        return {"size": len(self.batches)}


class Plain:
    """Any iterable of batches; it cannot say where it stands."""

    def __init__(self, batches: Iterable[Any]):
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        empty = True
        for batch in self.batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("data: an epoch without a batch; an iterator is used up after one epoch, pass a source")

    def state(self) -> None:
        return None

    def restore(self, state: Any) -> None:
        raise ValueError(
            "data: a plain iterable cannot go on from a checkpoint; pass arrays, a list of batches, or a source with "
            "state() and restore()"
        )


def as_source(name: str, data: Any, batch_size: int | None, key: Any, shuffle: bool) -> Any:
    """`data` as a source: arrays and pytrees of arrays are cut into batches; lists and iterables are of batches."""
    if callable(getattr(data, "state", None)) and callable(getattr(data, "restore", None)):
        return data
    if isinstance(data, list):
        return Listed(data, name)
    if isinstance(data, (tuple, dict, np.ndarray, jax.Array)):
        if batch_size is None:
            raise ValueError(f"batch_size: expected a number, since {name} is arrays")
        return Arrays(data, batch_size, key=key if shuffle else None, shuffle=shuffle)
    if isinstance(data, Iterable):
        return Plain(data)
    raise TypeError(f"{name}: expected arrays, a tuple or dict of arrays, or batches, got {type(data).__name__}")


def groups(source: Any, size: int) -> Iterator[Group]:
    """The batches that remain of the epoch, `size` at a time where their shapes agree; the rest is filled up."""
    held: list[Any] = []
    position = None

    def stack():
        filled = held + [held[-1]] * (size - len(held))
        return Group(jax.tree.map(lambda *leaves: np.stack(leaves), *filled), len(held), position)

    for batch in source:
        batch = jax.tree.map(np.asarray, batch)
        if held and (len(held) == size or _shapes(batch) != _shapes(held[0])):
            yield stack()
            held.clear()
        held.append(batch)
        position = source.state()
    if held:
        position = source.state()  # that of the next epoch
        yield stack()


def _shapes(batch: Any):
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
