"""The values in a graph that depend on its inputs: the layers passed so far, and the meaning of every axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxrnn.cell import Cell, input_size, output_size
from jaxrnn.compose.pool import Pool
from jaxrnn.compose.stack import Stack
from jaxrnn.compose.wrap import Residual
from jaxrnn.convert.cells import stacked
from jaxrnn.convert.onnx.constants import ONE, Constant, Dim, Size, size
from jaxrnn.convert.onnx.read import MOST_AXES, Node
from jaxrnn.layers import Apply
from jaxrnn.typing import PyTree, WithParams

MOST_ROWS = 1024

# An axis of a signal: of an input; several of them as one; or one of these.
UNIT = "unit"  # of size 1
DIRECTION = "direction"  # one entry for each part
FEATURES = "features"  # of the one part, or of all side by side
Axis = Dim | tuple[Dim, ...] | str


@dataclass(frozen=True, eq=False)
class Chain:
    """The layers from an input to a value. If one of them is recurrent, also which axes are time and batch.

    `reverse`: For each direction of the top layer, whether it runs backwards, if that layer is recurrent. `inner`: If
    the top layer is made from several (`Residual`, `Pool`), the chain of these layers.
    """

    input: str
    below: Chain | None = None
    cell: Cell | None = None
    params: PyTree = None
    reverse: tuple[bool, ...] = (False,)
    time: Axis | None = None
    batch: Axis | None = None
    lengths: str | None = None
    pooled: bool = False
    inner: Chain | None = None

    def then(self, cell: Cell, params: PyTree, **changes: Any) -> Chain:
        """The chain with one more layer."""
        facts = {name: getattr(self, name) for name in ("time", "batch", "lengths", "pooled")}
        return Chain(self.input, self, cell, params, **{**facts, **changes})

    def layers(self) -> list[WithParams]:
        """All layers, the lowest first."""
        found, chain = [], self
        while chain.below is not None:
            found.append((chain.cell, chain.params))
            chain = chain.below
        return found[::-1]

    def equals(self, other: Chain) -> bool:
        """Whether both chains give the same values. A pooled chain may have been made twice from the same values."""
        pooled = self.inner is not None and self.inner is other.inner
        return self is other or (pooled and self.cell == other.cell)

    def above(self, low: Chain) -> list[Cell | None] | None:
        """The layers that compute these values from those of `low`, or None if these values do not come from `low`."""
        found, chain = [], self
        while chain is not None and not chain.equals(low):
            found.append(chain.cell)
            chain = chain.below
        return None if chain is None else found[::-1]

    def holds(self, other: Chain) -> bool:
        """Whether the layers of `other` are the first layers of this chain."""
        chain = self
        while chain is not None and chain is not other:
            chain = chain.inner or chain.below
        return chain is other


class Part(NamedTuple):
    """One direction of the output of a layer, or one row of an input.

    kind: "y" is every step. A recurrent layer also has "h" and "c", the final state; "end", the output at the last step
    of a direction that runs backwards; and "start", the output at the first step of one that runs forward. "row" is a
    row of an input.
    """

    chain: Chain
    kind: str
    row: int
    width: Size


class Signal(NamedTuple):
    """Values that depend on the inputs. dtype: The dtype, or None if it is not known."""

    parts: tuple[Part, ...]
    axes: tuple[Axis, ...]
    dtype: np.dtype | None

    @property
    def shape(self) -> list[Size]:
        """The size of every axis."""
        return [self.size(axis) for axis in self.axes]

    def size(self, axis: Axis) -> Size:
        match axis:
            case "unit":
                return ONE
            case "direction":
                return Size(len(self.parts))
            case "features" if DIRECTION in self.axes:
                return self.parts[0].width
            case "features":
                return _total([part.width for part in self.parts])
            case Dim():
                return size(axis)
        return math.prod(map(size, axis), start=ONE)

    def __str__(self):
        names = {UNIT: "1", DIRECTION: "directions", FEATURES: "features"}
        return f"({', '.join(names.get(axis, str(self.size(axis))) for axis in self.axes)})"  # type: ignore[arg-type]


Value = Constant | Signal


def _total(widths: Sequence[Size]) -> Size:
    if len(widths) == 1:
        return widths[0]
    return Size(sum(width.count for width in widths))


def source(name: str, dtype: np.dtype | None, dims: tuple[int | None, ...]) -> Signal:
    """An input of the graph. If it has floating numbers and more than one axis, its last axis holds the features."""
    axes: list[Axis] = [Dim(name, k, count) for k, count in enumerate(dims)]
    width = ONE
    if len(axes) > 1 and (dtype is None or not np.issubdtype(dtype, np.integer)):
        width = size(axes[-1])
        axes[-1] = FEATURES
    return Signal((Part(Chain(name), "y", 0, width),), tuple(axes), dtype)


def close(node: Node, signal: Signal) -> tuple[Chain, tuple[Axis, ...]]:
    """The single chain whose output a signal is, and the axes of the signal, of which none is `DIRECTION`."""
    chain, kinds = signal.parts[0].chain, [part.kind for part in signal.parts]
    if any(part.chain is not chain for part in signal.parts):
        node.refuse("reads values of several layers side by side")
    if DIRECTION in signal.axes and len(signal.parts) > 1:
        node.refuse("reads the directions of a layer one above another, and not side by side")
    axes = tuple(UNIT if axis == DIRECTION else axis for axis in signal.axes)
    if "row" in kinds:
        node.refuse(f"reads a part of the input {chain.input!r}")
    if [part.row for part in signal.parts] != list(range(len(chain.reverse))):
        node.refuse("reads some of the directions of a layer, or in another order than forward, backward")
    if kinds == ["y"] * len(kinds):
        return chain, axes
    if kinds == ["h"] * len(kinds):
        return _pooled(node, chain, "last", by_direction=True), axes
    if kinds == ["end" if reverse else "h" for reverse in chain.reverse]:
        return _pooled(node, chain, "last", by_direction=False), axes
    node.refuse(f"reads {' and '.join(sorted(set(kinds)))} of a layer as features, which no cell puts out")


def _pooled(node: Node, chain: Chain, how: str, *, by_direction: bool) -> Chain:
    """The chain, with its outputs pooled over time."""
    below, cells, params = chain, [], []
    while below.below is not None:
        cells.insert(0, below.cell)
        params.insert(0, below.params)
        below = below.below
        if output_size(cells[0], input_size(cells[0])) is not None:
            break
    if not cells or chain.time is None:
        node.refuse("ends the time axis before there was a recurrent layer")
    if not by_direction and len(cells) == 1 and how == "last":
        cells, params = [*cells, Apply("identity")], [*params, ()]
    cell, numbers = (Stack(tuple(cells)), tuple(params)) if len(cells) > 1 else (cells[0], params[0])
    try:
        pooled = Pool(cell, how)
    except TypeError as error:
        node.refuse(str(error))
    return below.then(
        pooled, numbers, time=chain.time, batch=chain.batch, lengths=chain.lengths, pooled=True, inner=chain
    )


def pool(node: Node, signal: Signal, how: str) -> Signal:
    """The mean or the maximum of all steps."""
    chain, axes = close(node, signal)
    if chain.lengths is not None:
        node.refuse("with sequence_lens, the mean or the greatest of all steps includes the padding, and Pool does not")
    chain = _pooled(node, chain, how, by_direction=False)
    width = _total([part.width for part in signal.parts])
    return Signal((Part(chain, "y", 0, width),), tuple(a for a in axes if a != chain.time), signal.dtype)


def add(node: Node, a: Signal, b: Signal) -> Signal:
    """The sum of a value and the output of layers that read this value, as a `Residual` of these layers."""
    (chain_a, axes), (chain_b, other) = close(node, a), close(node, b)
    low, high = (chain_a, chain_b) if chain_b.holds(chain_a) else (chain_b, chain_a)
    if axes != other or not high.holds(low) or high is low or high.pooled or axes[-1:] != (FEATURES,):
        node.refuse("adds two values of which neither is made from the other, step by step: no chain of cells")
    above, chain = [], high
    while chain is not low and chain is not None:
        above.insert(0, (chain.cell, chain.params))
        chain = chain.below
    if chain is None:
        node.refuse("adds a value from within a residual connection")
    cell, params = stacked(above)
    try:
        residual = Residual(cell)
    except ValueError as error:
        node.refuse(str(error))
    facts = {"time": high.time, "batch": high.batch, "lengths": high.lengths, "inner": high}
    width = _total([part.width for part in b.parts])
    return Signal((Part(low.then(residual, params, **facts), "y", 0, width),), axes, a.dtype)


def layer(node: Node, signal: Signal, cell: Cell, params: PyTree, width: Size | None = None) -> Signal:
    """The output of a layer without time for a signal."""
    chain, axes = close(node, signal)
    alone = isinstance(cell, Apply) and FEATURES not in axes and chain.below is not None
    if axes[-1:] != (FEATURES,) and not alone:
        node.refuse(f"acts on the last axis, which must be the features, of {signal}")
    width = width or _total([part.width for part in signal.parts])
    return Signal((Part(chain.then(cell, params), "y", 0, width),), axes, signal.dtype)


def transpose(signal: Signal, order: Sequence[int]) -> Signal:
    """The signal with its axes in another order."""
    return signal._replace(axes=tuple(signal.axes[k] for k in order))


def unsqueeze(node: Node, signal: Signal, places: Sequence[int]) -> Signal:
    """The signal with axes of size 1 inserted at these places of the result."""
    axes = list(signal.axes)
    for place in sorted(places):
        axes.insert(place, UNIT)
    return signal._replace(axes=tuple(axes))


def squeeze(node: Node, signal: Signal, places: Sequence[int]) -> Signal:
    """The signal without the axes at these places, which must be known to have size 1."""
    for place in places:
        if signal.axes[place] not in (UNIT, DIRECTION, FEATURES) or signal.size(signal.axes[place]) != ONE:
            node.refuse(f"axis {place} of {signal} is not one of size 1")
    return signal._replace(axes=tuple(axis for k, axis in enumerate(signal.axes) if k not in places))


def concatenate(node: Node, signals: Sequence[Signal], axis: int) -> Signal:
    """The signals side by side, along directions or along features."""
    first = signals[0]
    if any(each.axes != first.axes or each.dtype != first.dtype for each in signals):
        node.refuse(f"expected values of the same axes, got {', '.join(map(str, signals))}")
    along = first.axes[axis]
    parts = tuple(part for each in signals for part in each.parts)
    if along == DIRECTION or (along == FEATURES and DIRECTION not in first.axes):
        return first._replace(parts=parts)
    node.refuse(f"puts values side by side along axis {axis} of {first}, which is neither features nor directions")


def cut(node: Node, signal: Signal, axis: int, start: int, stop: int) -> Signal:
    """The entries from start to stop along an axis, which is kept."""
    along = signal.axes[axis]
    whole = signal.size(along)
    chain = signal.parts[0].chain
    if start == 0 and (stop >= 2**31 - 1 or (not whole.dims and stop >= whole.count)):
        return signal
    if isinstance(along, Dim) and along == chain.time and not chain.pooled:
        return _at(node, signal, axis, start, stop)
    if isinstance(along, Dim) and chain.below is None and signal.parts[0].kind == "y":
        return _rows(node, signal, axis, start, stop)
    if not whole.dims:
        start, stop, _ = slice(start, stop).indices(whole.count)
        if along == DIRECTION and start < stop:
            return signal._replace(parts=signal.parts[start:stop])
        if along == FEATURES and DIRECTION not in signal.axes:
            ends = np.cumsum([0, *(part.width.count for part in signal.parts)]).tolist()
            if start in ends and stop in ends and start < stop:
                return signal._replace(parts=signal.parts[ends.index(start) : ends.index(stop)])
    node.refuse(f"takes entries {start} to {stop} of axis {axis} of {signal}")


def _rows(node: Node, signal: Signal, axis: int, start: int, stop: int) -> Signal:
    """The rows of an input that are used as initial states."""
    whole = size(signal.axes[axis])
    if not whole.dims:
        start, stop, _ = slice(start, stop).indices(whole.count)
    if not 0 <= start < stop <= MOST_ROWS:
        node.refuse(f"takes entries {start} to {stop} of an input")
    (part,) = signal.parts
    axes = (*signal.axes[:axis], DIRECTION, *signal.axes[axis + 1 :])
    return signal._replace(parts=tuple(part._replace(kind="row", row=k) for k in range(start, stop)), axes=axes)


def _at(node: Node, signal: Signal, axis: int, start: int, stop: int) -> Signal:
    """The output at the first or the last step."""
    chain, whole = signal.parts[0].chain, signal.size(signal.axes[axis])
    if not whole.dims:
        start, stop, _ = slice(start, stop).indices(whole.count)
        last = (start, stop) == (whole.count - 1, whole.count)
    else:
        last = start == -1 and stop >= 2**31 - 1
    first = (start, stop) == (0, 1)
    if not (last or first) or whole == ONE:
        node.refuse(f"takes steps {start} to {stop}: expected the last one, or the first")
    if any(part.chain.lengths is not None for part in signal.parts):
        node.refuse("with sequence_lens, the output at the last step is not that at the last valid step; use Y_h")
    axes = (*signal.axes[:axis], UNIT, *signal.axes[axis + 1 :])
    if last and len(chain.reverse) == 1 and not chain.reverse[0]:
        chain, _ = close(node, signal)
        chain = _pooled(node, chain, "last", by_direction=True)
        width = _total([part.width for part in signal.parts])
        return Signal((Part(chain, "y", 0, width),), axes, signal.dtype)

    def final(part):
        reverse = part.chain.reverse[part.row]
        if part.kind != "y":
            node.refuse(f"takes a step of {signal}, which has none")
        return part._replace(kind="h" if last != reverse else ("end" if last else "start"))

    return signal._replace(parts=tuple(map(final, signal.parts)), axes=axes)


def reshape(node: Node, signal: Signal, shape: Sequence[Size]) -> Signal:
    """The same entries in the same order: axes are removed, inserted and joined."""

    def fail():
        node.refuse(f"cannot reshape {signal} to ({', '.join(map(str, shape))})")

    if len(shape) > MOST_AXES:
        fail()
    # Sizes as of now: features are wider once directions have joined them.
    given = [(axis, signal.size(axis)) for axis in signal.axes]
    wanted, axes = list(shape), []
    while given or wanted:
        if given and wanted and given[0][1] == wanted[0]:
            axes.append(given.pop(0)[0])
            wanted.pop(0)
        elif given and given[0][1] == ONE:
            given.pop(0)
        elif wanted and wanted[0] == ONE:
            axes.append(UNIT)
            wanted.pop(0)
        elif given and wanted and isinstance(given[0][0], tuple) and size(given[0][0][0]) == wanted[0]:
            given[:1] = [(axis, size(axis)) for axis in given[0][0]]
        elif len(given) > 1 and wanted:
            (a, count), (b, other) = given[:2]
            given[:2] = [(_joined(fail, a, b), count * other)]
        else:
            fail()
    return signal._replace(axes=tuple(axes))


def _joined(fail: Callable, a: Axis, b: Axis) -> Axis:
    if UNIT in (a, b):
        return b if a == UNIT else a
    if (a, b) == (DIRECTION, FEATURES):
        return FEATURES
    if isinstance(a, Dim) and isinstance(b, Dim):
        return (a, b)
    if isinstance(a, tuple) and isinstance(b, Dim):
        return (*a, b)
    return fail()
