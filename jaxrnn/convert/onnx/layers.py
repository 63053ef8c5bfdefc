"""Converts operations that are layers without time, or that end time."""

from __future__ import annotations

import math

import numpy as np

from jaxrnn.convert.activations import here, names
from jaxrnn.convert.arrays import Arrays
from jaxrnn.convert.onnx import signals
from jaxrnn.convert.onnx.constants import Size
from jaxrnn.convert.onnx.graph import Graph, Operation
from jaxrnn.convert.onnx.read import Node
from jaxrnn.convert.onnx.signals import FEATURES, Part, Signal
from jaxrnn.layers import Apply, Dropout, Embed, EmbedParams, LayerNorm, LayerNormParams, Linear, LinearParams
from jaxrnn.typing import Named


def _weights(node: Node, **arrays: np.ndarray) -> Arrays:
    return Arrays(node.place, arrays)


def embed(graph: Graph, node: Node, axis: int) -> Signal:
    """The rows of a table for tokens. The node is a Gather whose indices come from an input."""
    table, tokens = graph.array(node, 0, "the table"), graph.signal(node, 1)
    chain, axes = signals.close(node, tokens)
    if chain.below is not None or axis != 0 or FEATURES in axes:
        node.refuse("expected rows of a table of embeddings for integers that are an input")
    weights = _weights(node, table=table)
    w = weights.take("table", None, None)
    if 0 in w.shape:
        node.refuse(f"expected a table of at least one row and column, got {w.shape}")
    chain = chain.then(Embed(*w.shape), EmbedParams(w))
    return Signal((Part(chain, "y", 0, Size(w.shape[1])),), (*axes, FEATURES), w.dtype)


def _matmul(graph: Graph, node: Node):
    node.only()
    if isinstance(graph.value(node, 0), Signal) and isinstance(graph.value(node, 1), Signal):
        node.refuse("multiplies two values that depend on the inputs, as attention does: no chain of cells")
    return _linear(graph, node, graph.array(node, 1, "the second factor"))


def _linear(graph: Graph, node: Node, w: np.ndarray, b: np.ndarray | None = None) -> Signal:
    x = graph.signal(node)
    arrays = _weights(node, w=w) if b is None else _weights(node, w=w, b=b)
    weights = arrays.take("w", None, None)
    width = signals.close(node, x) and x.size(FEATURES)
    if 0 in weights.shape or (not width.dims and width.count != weights.shape[0]):
        node.refuse(f"expected a matrix of {width} rows, got shape {weights.shape}")
    bias = None if b is None else arrays.take("b", weights.shape[1])
    params = LinearParams(weights, bias)
    return signals.layer(node, x, Linear(*weights.shape), params, Size(weights.shape[1]))


def _gemm(graph: Graph, node: Node):
    node.only("alpha", "beta", "transA", "transB")
    x = graph.signal(node)
    if node.get("transA", 0) or len(x.axes) != 2:
        node.refuse(f"expected x of two axes, not transposed, got {x}")
    w = graph.array(node, 1, "B")
    if w.ndim != 2:
        node.refuse(f"B: expected a matrix, got shape {w.shape}")
    w = w.T if node.get("transB", 0) else w
    w = _scaled(w, node.get("alpha", 1.0))
    if graph.given(node, 2) is None:
        return _linear(graph, node, w)
    b = _row(node, graph.array(node, 2, "C"), w.shape[1])
    return _linear(graph, node, w, _scaled(b, node.get("beta", 1.0)))


def _scaled(array: np.ndarray, factor: float) -> np.ndarray:
    return array if factor == 1 else array * array.dtype.type(factor)


def _row(node: Node, array: np.ndarray, width: int) -> np.ndarray:
    """A constant that is added to features, as one number for each feature."""
    if array.size not in (1, width) or (array.ndim and array.shape[-1] != array.size):
        node.refuse(f"adds a constant of shape {array.shape} to {width} features: expected ({width},)")
    return np.broadcast_to(array.reshape(-1), (width,))


def _add(graph: Graph, node: Node):
    node.only()
    a, b = graph.value(node, 0), graph.value(node, 1)
    if isinstance(a, Signal) and isinstance(b, Signal):
        return signals.add(node, graph.signal(node, 0), graph.signal(node, 1))
    k = 0 if isinstance(a, Signal) else 1
    x, b = graph.signal(node, k), graph.array(node, 1 - k, "what is added")
    chain, axes = signals.close(node, x)
    if not isinstance(chain.cell, Linear) or chain.params.b is not None or chain.below is None:
        node.refuse("adds a constant to what is not the product of a matrix")
    if b.ndim > len(axes) or axes[-1:] != (FEATURES,):
        node.refuse(f"adds a constant of shape {b.shape} to {x}")
    bias = _weights(node, w=np.asarray(chain.params.w), b=_row(node, b, chain.cell.output_size))
    bias.take("w", None, None)
    facts = {"time": chain.time, "batch": chain.batch, "lengths": chain.lengths, "pooled": chain.pooled}
    chain = chain.below.then(chain.cell, chain.params._replace(b=bias.take("b", None)), **facts)
    return x._replace(parts=(x.parts[0]._replace(chain=chain),), axes=axes)


def _layer_norm(graph: Graph, node: Node):
    node.only("axis", "epsilon", "stash_type")
    x = graph.signal(node)
    if graph.axis(node, x, -1) != len(x.axes) - 1 or node.get("stash_type", 1) != 1:
        node.refuse("expected the last axis, and stash_type 1")
    arrays = {"scale": graph.array(node, 1, "scale")}
    if graph.given(node, 2) is not None:
        arrays["b"] = graph.array(node, 2, "B")
    weights = _weights(node, **arrays)
    scale = weights.take("scale", None)
    bias = weights.take("b", *scale.shape) if "b" in weights else None
    epsilon = node.get("epsilon", float(np.float32(1e-5)))
    if not scale.size or x.size(x.axes[-1]) not in (Size(scale.size), x.size(FEATURES)) or epsilon <= 0:
        node.refuse(f"expected {x.axes[-1]} of {x}, got scale of shape {scale.shape} and epsilon {epsilon}")
    cell = LayerNorm(scale.size, epsilon if epsilon != np.float32(1e-5) else 1e-5)
    return signals.layer(node, x, cell, LayerNormParams(scale, bias))


def _dropout(graph: Graph, node: Node):
    node.only("ratio", "seed")
    x, ratio = graph.signal(node), node.get("ratio", 0.5)
    if graph.given(node, 1) is not None:
        ratio = float(graph.array(node, 1, "ratio").reshape(-1)[:1].sum())
    if graph.given(node, 2) is not None and graph.array(node, 2, "training_mode").any():
        node.refuse("training_mode: expected a model for inference")
    if not 0 <= ratio < 1:
        node.refuse(f"ratio: expected a number in [0, 1), got {ratio}")
    return signals.layer(node, x, Dropout(ratio), ())


def _activation(graph: Graph, node: Node):
    import onnx

    if not onnx.defs.has(node.op):
        node.refuse("only the activations of a recurrent node are called so")
    attributes = onnx.defs.get_schema(node.op).attributes
    defaults = {name: onnx.helper.get_attribute_value(each.default_value) for name, each in attributes.items()}
    node.only(*defaults)
    given = {
        name: node.get(name, value.decode() if isinstance(value, bytes) else value) for name, value in defaults.items()
    }
    return _apply(graph, node, given)


def _apply(graph: Graph, node: Node, given: Named) -> Signal:
    fn = here("onnx", node.op, given)
    if fn is None:
        got = ", ".join(f"{name}={value!r}" for name, value in given.items())
        node.refuse(f"there is no activation with {got}")
    return signals.layer(node, graph.signal(node), Apply(fn), ())


_RELU = {"min": 0.0, "max": math.inf}


def _clip(graph: Graph, node: Node):
    node.only("min", "max")
    given = {}
    for k, (name, default) in enumerate({"min": -math.inf, "max": math.inf}.items(), start=1):
        bound = None if graph.given(node, k) is None else graph.array(node, k, name)
        if bound is not None and bound.size != 1:
            node.refuse(f"{name}: expected a number, got shape {bound.shape}")
        given[name] = node.get(name, default) if bound is None else float(bound.item())
    return signals.layer(node, graph.signal(node), Apply("relu"), ()) if given == _RELU else _apply(graph, node, given)


def _softmax(graph: Graph, node: Node):
    node.only("axis")
    x = graph.signal(node)
    axis = graph.axis(node, x, -1 if graph.model.opset >= 13 else 1)
    if axis != len(x.axes) - 1 or x.axes[axis] != FEATURES:
        node.refuse(f"expected the last axis of {x}")
    return _apply(graph, node, {"axis": -1})


# What multiplies x: the activation that the product is.
PRODUCTS = {("sigmoid",): "silu", ("keras_hard_sigmoid",): "hard_silu", ("softplus", "tanh"): "mish"}


def product(graph: Graph, node: Node):
    """A value times activations of the same value."""
    node.only()
    for k in (0, 1):
        x = graph.signal(node, k)
        (low, axes), (chain, others) = signals.close(node, x), signals.close(node, graph.signal(node, 1 - k))
        functions = tuple(getattr(cell, "fn", None) for cell in chain.above(low) or ())
        if axes == others and functions in PRODUCTS:
            return signals.layer(node, x, Apply(PRODUCTS[functions]), ())
    node.refuse("multiplies two values that depend on the inputs: expected x σ(x), or another activation of x")


def _reduce(graph: Graph, node: Node):
    node.only("axes", "keepdims", "noop_with_empty_axes")
    x = graph.signal(node)
    axes = graph.axes(node, x, graph.listed(node, "axes", 1) or ())
    time = x.parts[0].chain.time
    if time is None or [x.axes[axis] for axis in axes] != [time]:
        node.refuse(f"expected the time axis of what a recurrent layer puts out, got axes {axes} of {x}")
    pooled = signals.pool(node, x, "mean" if node.op == "ReduceMean" else "max")
    return signals.unsqueeze(node, pooled, axes) if node.get("keepdims", 1) else pooled


OPERATIONS: dict[str, Operation] = {
    **{op: _activation for op in names("onnx") if op != "Identity"},
    "Add": _add,
    "Clip": _clip,
    "Dropout": _dropout,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _softmax,
    "MatMul": _matmul,
    "ReduceMax": _reduce,
    "ReduceMean": _reduce,
    "Softmax": _softmax,
}
