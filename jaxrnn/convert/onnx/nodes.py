"""Converts the recurrent nodes in a graph: their axes, lengths, directions and initial states."""

from __future__ import annotations

import jax
import numpy as np

from jaxrnn.cell import input_size
from jaxrnn.compose.parallel import Bidirectional, BidirectionalPair
from jaxrnn.compose.wrap import Backward, LearnedCarry, LearnedCarryParams
from jaxrnn.convert.arrays import Arrays
from jaxrnn.convert.onnx import signals
from jaxrnn.convert.onnx.constants import Constant, Dim, Size
from jaxrnn.convert.onnx.graph import Graph, Operation
from jaxrnn.convert.onnx.read import RECURRENT, Node
from jaxrnn.convert.onnx.recurrent import cells, reversed_directions
from jaxrnn.convert.onnx.signals import DIRECTION, FEATURES, UNIT, Part, Signal
from jaxrnn.typing import WithParams


def _recurrent(graph: Graph, node: Node):
    x = graph.signal(node)
    chain, axes = signals.close(node, x)
    if len(axes) != 3 or axes[-1] != FEATURES:
        node.refuse(f"X: expected time, batch and features, got {x}")
    batch_first = node.get("layout", 0)
    if batch_first not in (0, 1):
        node.refuse(f"layout: expected 0 or 1, got {batch_first}")
    batch, time = axes[:2] if batch_first else axes[1::-1]
    if not isinstance(time, Dim) or not isinstance(batch, (Dim, str)):
        node.refuse(f"X: expected time to be an axis of the input, got {x}")
    lengths = _lengths(graph, node)
    if chain.time is not None and (chain.time, chain.batch, chain.lengths) != (time, batch, lengths):
        node.refuse("expected the axes time and batch, and the sequence_lens, of the recurrent layer below")
    arrays = {"W": 1, "R": 2, "B": 3, "P": 7}
    given = {name: graph.array(node, k, name) for name, k in arrays.items() if graph.given(node, k) is not None}
    if len(node.inputs) > (8 if node.op == "LSTM" else 6):
        node.refuse(f"expected up to {8 if node.op == 'LSTM' else 6} inputs, got {len(node.inputs)}")
    reverse = reversed_directions(node)
    made = cells(node, given)
    width = x.size(FEATURES)
    if not width.dims and width.count != input_size(made[0][0]):
        node.refuse(f"X has {width} features, and W is for {input_size(made[0][0])}")
    hidden = given["R"].shape[-1]
    made = _with_carries(graph, node, made, (len(reverse), hidden), batch, batch_first)
    cell, params = _directions(made, reverse)
    chain = chain.then(cell, params, reverse=reverse, time=time, batch=batch, lengths=lengths)
    axes_of_y = (batch, time, DIRECTION, FEATURES) if batch_first else (time, DIRECTION, batch, FEATURES)
    axes_of_h = (batch, DIRECTION, FEATURES) if batch_first else (DIRECTION, batch, FEATURES)

    def out(kind, axes):
        return Signal(tuple(Part(chain, kind, d, Size(hidden)) for d in range(len(reverse))), axes, x.dtype)

    made_values = [out("y", axes_of_y), out("h", axes_of_h), out("c", axes_of_h)]
    return made_values if node.op == "LSTM" else made_values[:2]


def _lengths(graph: Graph, node: Node) -> str | None:
    value = graph.given(node, 4)
    if value is None:
        return None
    if isinstance(value, Constant):
        node.refuse("sequence_lens is a constant: expected an input of the model, or none")
    chain = value.parts[0].chain
    if chain.below is not None or len(value.axes) != 1 or not isinstance(value.axes[0], Dim):
        node.refuse("sequence_lens: expected an input of the model, of one axis")
    return chain.input


def _with_carries(graph, node, made, shape, batch, batch_first):
    """The cells with their constant initial states. If an initial state is an input, no other may be a constant."""
    names = ("initial_h", "initial_c") if node.op == "LSTM" else ("initial_h",)
    rows = [_initial(graph, node, 5 + k, name, shape, batch, batch_first) for k, name in enumerate(names)]
    inputs = [isinstance(row, str) for row in rows]
    constant = [isinstance(row, np.ndarray) for row in rows]
    if any(inputs) and any(constant):
        node.refuse("one initial state is an input and the other a constant: expected both to be one or the other")
    if not any(constant):
        return made
    dtype = jax.tree.leaves(made[0][1])[0].dtype
    filled = [np.zeros(shape, dtype) if row is None else row for row in rows]
    found = []
    for d, (cell, params) in enumerate(made):
        carry = cell.initial_carry(params)
        carry = type(carry)(*(row[d] for row in filled))
        found.append((LearnedCarry(cell), LearnedCarryParams(params, carry)))
    return found


def _initial(graph, node, k, name, shape, batch, batch_first):
    """The initial state of each direction, None if it is zeros, or "input" if it is an input."""
    value = graph.given(node, k)
    if value is None:
        return None
    if graph.rank(value) != 3:
        node.refuse(f"{name}: expected directions, batch and features, got {graph.rank(value)} axes")
    directions, hidden = shape
    if isinstance(value, Signal):
        value = signals.transpose(value, (1, 0, 2)) if batch_first else value
        return _initial_input(graph, node, name, value, shape)
    value = graph.folder.transpose(value, (1, 0, 2)) if batch_first else value
    if value.shape[0] != Size(directions) or value.shape[2] != Size(hidden):
        node.refuse(f"{name}: expected ({directions}, batch, {hidden}), got ({', '.join(map(str, value.shape))})")
    array = value.array
    if (array != array[:, :1]).any():
        node.refuse(f"{name} differs over the batch: expected one initial state, or an input of the model")
    row = np.broadcast_to(array[:, :1], (directions, 1, hidden))[:, 0]
    weights = Arrays(node.place, {name: row})
    return np.asarray(weights.take(name, directions, hidden)) if row.any() else None


def _initial_input(graph, node, name, value, shape):
    """Checks an initial state that is an input, or rows of one. Several states may be the same input."""
    chain, axis = value.parts[0].chain, value.axes[0]
    rows = [part.row for part in value.parts] if axis in (DIRECTION, UNIT) else list(range(shape[0]))
    whole = not isinstance(axis, Dim) or value.size(axis) in (Size(shape[0]), Size(1, (axis,)))
    if chain.below is not None or value.axes[2] != FEATURES or len(rows) != shape[0] or not whole:
        node.refuse(f"{name}: expected an input of the model, or rows of one, got {value}")
    if chain.input == graph.xs:
        node.refuse(f"{name}: {chain.input!r} is what the layers act on, too")
    return "input"


def _directions(made, reverse) -> WithParams:
    if len(reverse) == 2:
        (a, p), (b, q) = made
        return Bidirectional(a, b), BidirectionalPair(p, q)
    ((cell, params),) = made
    return (Backward(cell) if reverse[0] else cell), params


OPERATIONS: dict[str, Operation] = {
    **dict.fromkeys(RECURRENT, _recurrent),
}
