"""Operations that make and arrange values, but compute no new ones from xs: shapes, axes, slices."""

from __future__ import annotations

import itertools

import numpy as np

from jaxrnn.convert.onnx import signals
from jaxrnn.convert.onnx.constants import ONE, Constant, Size
from jaxrnn.convert.onnx.graph import Graph, Operation
from jaxrnn.convert.onnx.layers import embed, product
from jaxrnn.convert.onnx.read import DTYPES, MOST_AXES, Node
from jaxrnn.convert.onnx.signals import Signal, Value


def _constant(graph: Graph, node: Node):
    node.only("value", "value_float", "value_floats", "value_int", "value_ints")
    if len(node.attributes) != 1:
        node.refuse("expected one value")
    ((name, value),) = node.attributes.items()
    dtype = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if (name == "value") != isinstance(value, np.ndarray):
        node.refuse(f"{name}: expected numbers")
    try:
        return graph.folder.constant(np.asarray(value, dtype.get(name)))
    except (ValueError, TypeError) as error:
        node.refuse(f"{name}: {error}")


def _shape(graph: Graph, node: Node):
    node.only("start", "end")
    value = graph.value(node)
    start, end = node.get("start", 0), node.get("end", MOST_AXES)
    return graph.folder.sizes(list(value.shape)[start:end])


def _constant_of_shape(graph: Graph, node: Node):
    node.only("value")
    array = node.get("value", np.zeros(1, np.float32))
    return graph.folder.filled(node, _sizes(graph, node, 0), array)


def _sizes(graph: Graph, node: Node, k: int) -> list[Size]:
    entries = graph.folder.integers(node, graph.value(node, k), "shape")
    if any(not isinstance(each, Size) and each < 0 for each in entries):
        node.refuse(f"expected sizes of at least 0, got {', '.join(map(str, entries))}")
    return [each if isinstance(each, Size) else Size(each) for each in entries]


def _expand(graph: Graph, node: Node):
    node.only()
    value, shape = graph.value(node), _sizes(graph, node, 1)
    if isinstance(value, Signal):
        node.refuse("repeats a value that depends on the inputs")
    return graph.folder.expand(node, value, shape)


def _reduce_prod(graph: Graph, node: Node):
    node.only("axes", "keepdims", "noop_with_empty_axes")
    value = graph.value(node)
    if isinstance(value, Signal):
        node.refuse("expected integers, computed from shapes")
    axes = graph.axes(node, value, graph.listed(node, "axes", 1) or range(graph.rank(value)))
    return graph.folder.product(node, value, axes, node.get("keepdims", 1) != 0)


def _mul(graph: Graph, node: Node):
    if all(isinstance(graph.value(node, k), Signal) for k in (0, 1)):
        return product(graph, node)
    node.only()
    return graph.folder.multiply(node, *_constants(graph, node, 2))


def _equal(graph: Graph, node: Node):
    node.only()
    return graph.folder.equal(node, *_constants(graph, node, 2))


def _where(graph: Graph, node: Node):
    node.only()
    return graph.folder.where(node, *_constants(graph, node, 3))


def _constants(graph: Graph, node: Node, count: int) -> list[Constant]:
    values = [graph.value(node, k) for k in range(count)]
    if any(isinstance(value, Signal) for value in values):
        node.refuse("expected integers, computed from shapes")
    return values  # type: ignore[return-value]


# Plumbing: the same numbers in another arrangement.


def _same(graph: Graph, node: Node):
    node.only()
    return graph.value(node)


def _cast(graph: Graph, node: Node):
    node.only("to", "saturate", "round_mode")
    value, to = graph.value(node), node.get("to", 0)
    if to not in DTYPES:
        node.refuse(f"to: data type {to} is not one of numbers")
    dtype = DTYPES[to][0]
    if isinstance(value, Constant):
        return graph.folder.cast(node, value, dtype)
    integers = value.dtype is not None and np.issubdtype(value.dtype, np.integer)
    if value.dtype != dtype and not (integers and np.issubdtype(dtype, np.integer) and dtype.itemsize >= 4):
        node.refuse(f"casts {value.dtype} to {dtype}")
    return value


def _transpose(graph: Graph, node: Node):
    node.only("perm")
    value = graph.value(node)
    backwards = tuple(range(graph.rank(value)))[::-1]
    order = graph.axes(node, value, node.numbers("perm", backwards))
    if len(order) != graph.rank(value):
        node.refuse(f"perm: expected {graph.rank(value)} axes, got {order}")
    if isinstance(value, Signal):
        return signals.transpose(value, order)
    return graph.folder.transpose(value, order)


def _unsqueeze(graph: Graph, node: Node):
    node.only("axes")
    value, given = graph.value(node), graph.listed(node, "axes", 1)
    if given is None or graph.rank(value) + len(given) > MOST_AXES:
        node.refuse(f"expected axes, up to {MOST_AXES} in all, got {given}")
    places = graph.axes(node, value, given, more=len(given))
    if isinstance(value, Signal):
        return signals.unsqueeze(node, value, places)
    shape, array = list(value.shape), value.array
    for place in sorted(places):
        shape.insert(place, ONE)
        array = np.expand_dims(array, place)
    return Constant(array, tuple(shape))


def _squeeze(graph: Graph, node: Node):
    node.only("axes")
    value, given = graph.value(node), graph.listed(node, "axes", 1)
    if given is None:
        if any(each.dims for each in value.shape):
            node.refuse("removes all axes of size 1, and not all sizes are known: expected axes")
        given = [k for k, each in enumerate(value.shape) if each == ONE]
    places = graph.axes(node, value, given)
    if isinstance(value, Signal):
        return signals.squeeze(node, value, places)
    if any(value.shape[place] != ONE for place in places):
        node.refuse(f"axes {places} of ({', '.join(map(str, value.shape))}) are not all of size 1")
    return Constant(value.array.squeeze(tuple(places)), tuple(s for k, s in enumerate(value.shape) if k not in places))


def _reshape(graph: Graph, node: Node):
    node.only("allowzero")
    value = graph.value(node)
    wanted = graph.folder.integers(node, graph.value(node, 1), "shape")
    if len(wanted) > MOST_AXES:
        node.refuse(f"expected up to {MOST_AXES} axes, got {len(wanted)}")
    given = list(value.shape)
    if not node.get("allowzero", 0):
        wanted = [given[k] if each == 0 and k < len(given) else each for k, each in enumerate(wanted)]
    if wanted.count(-1) > 1 or any(isinstance(each, int) and each < -1 for each in wanted):
        node.refuse(f"shape: expected sizes and at most one -1, got {wanted}")
    sizes = [each if isinstance(each, Size) else Size(each) for each in wanted]
    if -1 in wanted:
        whole, rest = ONE, ONE
        for each in given:
            whole = whole * each
        for each in sizes:
            rest = rest if each == Size(-1) else rest * each
        quotient = whole.divided_by(rest)
        if quotient is None:
            node.refuse(f"shape: {whole} entries do not divide into {', '.join(map(str, wanted))}")
        sizes[wanted.index(-1)] = quotient
    if isinstance(value, Signal):
        return signals.reshape(node, value, sizes)
    return graph.folder.reshape(node, value, sizes)


def _flatten(graph: Graph, node: Node):
    node.only("axis")
    value = graph.value(node)
    k = node.get("axis", 1)
    if isinstance(value, Constant) or not 0 <= k <= graph.rank(value):
        node.refuse("expected a value that depends on the inputs, and an axis that it has")
    sides = [ONE, ONE]
    for place, each in enumerate(value.shape):
        sides[place >= k] = sides[place >= k] * each
    return signals.reshape(node, value, sides)


def _concat(graph: Graph, node: Node):
    node.only("axis")
    values = [graph.value(node, k) for k in range(len(node.inputs))]
    if not values:
        node.refuse("expected at least 1 inputs")
    axis = graph.axis(node, values[0])
    if any(graph.rank(value) != graph.rank(values[0]) for value in values):
        node.refuse("expected values of one rank")
    if all(isinstance(value, Constant) for value in values):
        return graph.folder.concatenate(node, values, axis)  # type: ignore[arg-type]
    if any(isinstance(value, Constant) for value in values):
        node.refuse("puts a constant beside a value that depends on the inputs")
    return signals.concatenate(node, values, axis)  # type: ignore[arg-type]


def _cut(graph: Graph, node: Node, value: Value, axis: int, start: int, stop: int) -> Value:
    if isinstance(value, Signal):
        return signals.cut(node, value, axis, start, stop)
    return graph.folder.slice(node, value, axis, start, stop)


def _slice(graph: Graph, node: Node):
    node.only("starts", "ends", "axes")
    value = graph.value(node)
    starts, stops = graph.listed(node, "starts", 1) or [], graph.listed(node, "ends", 2) or []
    axes = graph.axes(node, value, graph.listed(node, "axes", 3) or range(len(starts)))
    steps = graph.listed(node, "steps", 4) or [1] * len(starts)
    if not len(starts) == len(stops) == len(axes) == len(steps):
        node.refuse(f"expected starts, ends, axes and steps of one length, got {starts}, {stops}, {axes}, {steps}")
    if set(steps) - {1}:
        node.refuse(f"steps: expected 1, got {steps}")
    for axis, start, stop in zip(axes, starts, stops, strict=True):
        value = _cut(graph, node, value, axis, start, stop)
    return value


def _split(graph: Graph, node: Node):
    node.only("axis", "split", "num_outputs")
    value = graph.value(node)
    axis, whole = graph.axis(node, value, 0), value.shape[graph.axis(node, value, 0)]
    count = len(node.outputs)
    pieces = graph.listed(node, "split", 1)
    if whole.dims or (pieces is None and whole.count % count) or node.get("num_outputs", count) != count:
        node.refuse(f"cannot split an axis of size {whole} in {count}")
    pieces = pieces or [whole.count // count] * count
    if len(pieces) != count or sum(pieces) != whole.count or min(pieces) < 0:
        node.refuse(f"cannot split an axis of size {whole} in {pieces}")
    ends = np.cumsum([0, *pieces]).tolist()
    return [_cut(graph, node, value, axis, start, stop) for start, stop in itertools.pairwise(ends)]


def _gather(graph: Graph, node: Node):
    node.only("axis")
    value, index = graph.value(node), graph.value(node, 1)
    axis = graph.axis(node, value, 0)
    if isinstance(index, Signal):
        return embed(graph, node, axis)
    indices = graph.folder.full(node, index)
    if not (indices.dtype == object or np.issubdtype(indices.dtype, np.integer)):
        node.refuse(f"expected integers, got {indices.dtype}")
    if isinstance(value, Constant):
        return graph.folder.gather(node, value, axis, indices)
    if indices.size != 1 or indices.ndim > 1 or indices.dtype == object:
        node.refuse(f"takes several entries of axis {axis} of {value}")
    k = int(indices.reshape(()))
    found = signals.cut(node, value, axis, k, k + 1 if k != -1 else 2**31 - 1)
    if indices.ndim:
        return found
    if found.size(found.axes[axis]) != ONE:
        node.refuse(f"takes entry {k} of axis {axis} of {value}")
    return signals.squeeze(node, found, [axis])


OPERATIONS: dict[str, Operation] = {
    "Cast": _cast,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Equal": _equal,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Identity": _same,
    "Mul": _mul,
    "ReduceProd": _reduce_prod,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
