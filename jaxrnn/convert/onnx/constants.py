"""Constant folding: arrays that a graph computes from its weights and from the sizes of its inputs.

A size that is not known is a symbol, and an array that has equal entries along an axis stores only one of them. So a
constant may have any size and take almost no memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxrnn.convert.onnx.read import MOST_AXES, Node
from jaxrnn.typing import PyTree


@dataclass(frozen=True, order=True)
class Dim:
    """An axis of an input of the graph, and its size if that is known."""

    input: str
    axis: int
    size: int | None = None


@dataclass(frozen=True)
class Size:
    """A number of entries: count times the product of the sizes that are not known."""

    count: int
    dims: tuple[Dim, ...] = ()

    def __mul__(self, other: Any) -> Size:
        other = size(other)
        return Size(self.count * other.count, tuple(sorted(self.dims + other.dims)))

    __rmul__ = __mul__

    def divided_by(self, other: Size) -> Size | None:
        """The quotient, or None if it is not a size."""
        dims = list(self.dims)
        for dim in other.dims:
            if dim not in dims:
                return None
            dims.remove(dim)
        if other.count < 1 or self.count % other.count:
            return None
        return Size(self.count // other.count, tuple(dims))

    def __str__(self):
        count = [str(self.count)] if self.count != 1 or not self.dims else []
        return "·".join(count + [f"{dim.input}[{dim.axis}]" for dim in self.dims])


ONE = Size(1)


def size(value: Any) -> Size:
    """Converts an integer, an axis or a size to a size."""
    match value:
        case Size():
            return value
        case Dim():
            return Size(1, (value,)) if value.size is None else Size(value.size)
    return Size(int(value))


class Constant(NamedTuple):
    """An array that has extent 1 along each axis on which all its entries are equal. `shape` has the size of every
    axis.

    Integers that are computed from sizes have dtype object, with entries `Size`.
    """

    array: np.ndarray
    shape: tuple[Size, ...]


class Folder:
    """Operations on constants. The size of the file limits the numbers that all of them together may make."""

    def __init__(self, bytes_of_file: int):
        self.room = 16 * bytes_of_file + 2**16

    def constant(self, array: PyTree) -> Constant:
        """An array as a constant."""
        array = np.asarray(array)
        return Constant(array, tuple(map(Size, array.shape)))

    def sizes(self, entries: Sequence[Size]) -> Constant:
        """A shape as a constant."""
        known = all(not each.dims for each in entries)
        array = np.empty(len(entries), np.int64 if known else object)
        for k, each in enumerate(entries):
            array[k] = each.count if known else each
        return Constant(array, (Size(len(entries)),))

    def take_room(self, node: Node, count: int) -> None:
        """Raises if `count` more numbers are more than the file can need."""
        self.room -= count
        if self.room < 0:
            node.refuse(f"its constants are out of proportion to the size of the file: {count} numbers")

    def full(self, node: Node, value: Constant) -> np.ndarray:
        """The array in its full shape."""
        if any(each.dims for each in value.shape):
            node.refuse(f"expected a constant of known shape, got ({', '.join(map(str, value.shape))})")
        shape = tuple(each.count for each in value.shape)
        if shape == value.array.shape:
            return value.array
        self.take_room(node, math.prod(shape))
        return np.ascontiguousarray(np.broadcast_to(value.array, shape))

    def filled(self, node: Node, shape: Sequence[Size], array: np.ndarray) -> Constant:
        """A constant of this shape that is filled with one number."""
        if len(shape) > MOST_AXES or array.size != 1:
            node.refuse(f"expected one number and up to {MOST_AXES} axes, got {array.size} and {len(shape)}")
        return Constant(array.reshape((1,) * len(shape)), tuple(shape))

    def expand(self, node: Node, value: Constant, shape: Sequence[Size]) -> Constant:
        """The constant, broadcast to at least this shape."""
        rank = max(len(shape), len(value.shape))
        if rank > MOST_AXES:
            node.refuse(f"expected up to {MOST_AXES} axes, got {rank}")
        own = (ONE,) * (rank - len(value.shape)) + value.shape
        wanted = (ONE,) * (rank - len(shape)) + tuple(shape)

        def joined(a, b):
            if ONE in (a, b) or a == b:
                return b if a == ONE else a
            if bool(a.dims) == bool(b.dims):
                node.refuse(f"cannot broadcast ({', '.join(map(str, own))}) to ({', '.join(map(str, wanted))})")
            # The one that is not known can only be 1, or the other.
            return b if a.dims else a

        array = value.array.reshape((1,) * (rank - value.array.ndim) + value.array.shape)
        return Constant(array, tuple(map(joined, own, wanted)))

    def transpose(self, value: Constant, order: Sequence[int]) -> Constant:
        return Constant(value.array.transpose(order), tuple(value.shape[k] for k in order))

    def reshape(self, node: Node, value: Constant, shape: Sequence[Size]) -> Constant:
        """A constant of one number, or of a known shape, in the new shape."""
        if value.array.size == 1:
            return self.filled(node, shape, value.array)
        array = self.full(node, value)
        if any(each.dims for each in shape) or math.prod(each.count for each in shape) != array.size:
            node.refuse(f"cannot reshape {array.shape} to ({', '.join(map(str, shape))})")
        return self.constant(array.reshape(tuple(each.count for each in shape)))

    def slice(self, node: Node, value: Constant, axis: int, start: int, stop: int) -> Constant:
        """The entries from start to stop, both counted as in Python."""
        whole = value.shape[axis]
        if whole.dims:
            if start == 0 and stop >= 2**31 - 1:
                return value
            node.refuse(f"slices an axis of size {whole}, which is not known")
        start, stop, _ = slice(start, stop).indices(whole.count)
        shape = (*value.shape[:axis], Size(max(stop - start, 0)), *value.shape[axis + 1 :])
        if value.array.shape[axis] != whole.count:
            return Constant(value.array, shape)
        index = (slice(None),) * axis + (slice(start, stop),)
        return Constant(value.array[index], shape)

    def gather(self, node: Node, value: Constant, axis: int, index: np.ndarray) -> Constant:
        """The entries at `index`. The axes of `index` replace `axis`."""
        whole = value.shape[axis]
        if whole.dims or index.dtype == object or ((index < -whole.count) | (index >= whole.count)).any():
            node.refuse(f"expected indices into an axis of size {whole}, got {_short(index)}")
        array = value.array
        if array.shape[axis] != whole.count:
            index = np.zeros_like(index)
        self.take_room(node, index.size * max(array.size // max(array.shape[axis], 1), 1))
        shape = (*value.shape[:axis], *map(Size, index.shape), *value.shape[axis + 1 :])
        if len(shape) > MOST_AXES:
            node.refuse(f"expected up to {MOST_AXES} axes, got {len(shape)}")
        return Constant(np.take(array, index, axis), shape)

    def concatenate(self, node: Node, values: Sequence[Constant], axis: int) -> Constant:
        """The constants side by side along `axis`."""
        first = values[0]
        rest = [(*value.shape[:axis], *value.shape[axis + 1 :]) for value in values]
        if any(each != rest[0] for each in rest) or any(value.shape[axis].dims for value in values):
            node.refuse("expected constants of known sizes that fit side by side")
        extents = np.broadcast_shapes(*((*v.array.shape[:axis], *v.array.shape[axis + 1 :]) for v in values))
        total = sum(value.shape[axis].count for value in values)
        self.take_room(node, total * math.prod(extents))

        def part(value):
            extent = (*extents[:axis], value.shape[axis].count, *extents[axis:])
            return np.broadcast_to(value.array, extent)

        dtype = object if any(value.array.dtype == object for value in values) else None
        if dtype is None and any(value.array.dtype != first.array.dtype for value in values):
            node.refuse("expected constants of one dtype")
        array = np.concatenate([part(value) for value in values], axis, dtype=dtype)
        return Constant(array, (*first.shape[:axis], Size(total), *first.shape[axis + 1 :]))

    def cast(self, node: Node, value: Constant, dtype: np.dtype) -> Constant:
        if value.array.dtype == object:
            if not np.issubdtype(dtype, np.integer):
                node.refuse(f"casts a size that is not known to {dtype}")
            return value
        self.take_room(node, value.array.size)
        with np.errstate(all="ignore"):
            return Constant(value.array.astype(dtype), value.shape)

    def product(self, node: Node, value: Constant, axes: Sequence[int], keep: bool) -> Constant:
        """The product of integers along axes."""
        if not _integers(value.array) or len(axes) != 1:
            node.refuse("expected integers, and one axis")
        array = np.multiply.reduce(self.full(node, value).astype(object), axes[0], keepdims=keep)
        return self._numbers(array)

    def equal(self, node: Node, a: Constant, b: Constant) -> Constant:
        """Whether integers are equal, entry by entry. A size that is not known is at least 0."""
        pairs = np.broadcast(*(self._few(node, each) for each in (a, b)))

        def same(x, y):
            unknown = [each for each in (x, y) if isinstance(each, Size) and each.dims]
            other = [each for each in (x, y) if not (isinstance(each, Size) and each.dims)]
            if unknown and not (x == y or (other and _int(other[0]) < 0)):
                node.refuse(f"compares {x} with {y}, which are not known")
            return x == y if unknown else _int(x) == _int(y)

        return self.constant(np.array([same(x, y) for x, y in pairs], bool).reshape(pairs.shape))

    def where(self, node: Node, condition: Constant, a: Constant, b: Constant) -> Constant:
        """Integers from a where the condition is true, and from b elsewhere."""
        if condition.array.dtype != bool:
            node.refuse("expected a condition")
        return self._numbers(np.where(self.full(node, condition), self._few(node, a), self._few(node, b)))

    def _few(self, node: Node, value: Constant) -> np.ndarray:
        if not _integers(value.array) or any(each.dims for each in value.shape):
            node.refuse("expected integers")
        if math.prod(each.count for each in value.shape) > 64:
            node.refuse("expected a few integers")
        return self.full(node, value).astype(object)

    def multiply(self, node: Node, a: Constant, b: Constant) -> Constant:
        """The product of integers."""
        return self._numbers(self._few(node, a) * self._few(node, b))

    def _numbers(self, array: PyTree) -> Constant:
        array = np.asarray(array, dtype=object)
        sizes = [each for each in array.flat if isinstance(each, Size)]
        if not sizes and all(abs(each) < 2**63 for each in array.flat):
            array = array.astype(np.int64)
        return self.constant(array)

    def integers(self, node: Node, value: Any, what: str) -> list[PyTree]:
        """The entries of a small constant of integers: known ones as int, others as `Size`."""
        if not isinstance(value, Constant) or not _integers(value.array) or value.array.ndim > 1:
            node.refuse(f"{what}: expected a constant of integers")
        if value.array.size > 64 or math.prod(each.count for each in value.shape) > 64:
            node.refuse(f"{what}: expected up to 64 integers")
        return [each if isinstance(each, Size) and each.dims else _int(each) for each in self.full(node, value).flat]

    def known(self, node: Node, value: Any, what: str) -> list[int]:
        """The same as `integers`, but every entry must be known."""
        found = self.integers(node, value, what)
        if any(isinstance(each, Size) for each in found):
            node.refuse(f"{what}: expected numbers that are known, got {', '.join(map(str, found))}")
        return found


def _int(value: Any) -> int:
    return value.count if isinstance(value, Size) else int(value)


def _integers(array: np.ndarray) -> bool:
    return array.dtype == object or np.issubdtype(array.dtype, np.integer)


def _short(array: np.ndarray) -> str:
    return np.array2string(array, threshold=8) if array.dtype != object else "sizes that are not known"
