"""ONNX models for tests: small ones built node by node, and what onnxruntime makes of them."""

import functools

import jax
import numpy as np
from conversion import peer, redraw

from jaxrnn import scan

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def runtime(model, feed):
    """The outputs of onnxruntime, by name."""
    ort = peer("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


@functools.partial(jax.jit, static_argnums=0, static_argnames="time_axis")
def compiled(cell, params, carry, xs, lengths=None, time_axis=0):
    """`jaxrnn.scan` in one piece."""
    return scan(cell, params, carry, xs, lengths=lengths, time_axis=time_axis)


def drawn(cell, seed=0):
    """Random params of a cell, without its `init`, which would have to be compiled."""
    return redraw(seed, jax.eval_shape(cell.init, jax.random.key(0)))


def proto(nodes, inputs, outputs, initializers=(), opset=22):
    """A model of these nodes. inputs: {name: (dtype, shape)}; outputs: names; initializers: {name: array}."""
    import onnx
    from onnx import helper

    def info(name, dtype, shape):
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

    arrays = dict(initializers)
    dtype = next((a.dtype for a in arrays.values() if a.dtype.kind == "f"), np.float32)
    graph = helper.make_graph(
        nodes,
        "test",
        [info(name, *given) for name, given in inputs.items()],
        [info(name, dtype, None) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def make(op, inputs, outputs, **attributes):
    from onnx import helper

    return helper.make_node(op, inputs, outputs, f"a_{op}", **attributes)


def lstm_arrays(hidden=3, size=2, directions=1, gates=4):
    rng = np.random.default_rng(0)
    shapes = {"W": (directions, gates * hidden, size), "R": (directions, gates * hidden, hidden)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def around(*nodes, initializers=(), inputs=(), outputs=("Z",), op="LSTM", opset=22, **attributes):
    """A model of an LSTM from X to Y (and Y_h, Y_c), and nodes above it."""
    arrays = lstm_arrays(gates=GATES[op]) | dict(initializers)
    states = ["Y_h", "Y_c"] if op == "LSTM" else ["Y_h"]
    first = make(op, ["X", "W", "R"], ["Y", *states], **attributes)
    given = {"X": (np.float32, ("T", "B", 2))} | dict(inputs)
    return proto([first, *nodes], given, outputs, arrays, opset)


def integers(*numbers):
    return np.array(numbers, np.int64)
