"""Reads an ONNX model as plain data: the parts that its outputs need, after checks."""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from jaxrnn.convert.onnx.external import DataFiles
from jaxrnn.typing import Foreign, Named, PyTree

RECURRENT = ("RNN", "LSTM", "GRU")
MOST_AXES = 8

# TensorProto.DataType: the NumPy dtype, and the field that holds numbers which are not in raw_data.
DTYPES: dict[int, tuple[np.dtype, str]] = {
    1: (np.dtype(np.float32), "float_data"),
    2: (np.dtype(np.uint8), "int32_data"),
    3: (np.dtype(np.int8), "int32_data"),
    5: (np.dtype(np.int16), "int32_data"),
    6: (np.dtype(np.int32), "int32_data"),
    7: (np.dtype(np.int64), "int64_data"),
    9: (np.dtype(np.bool_), "int32_data"),
    10: (np.dtype(np.float16), "int32_data"),
    11: (np.dtype(np.float64), "double_data"),
    16: (np.dtype(ml_dtypes.bfloat16), "int32_data"),
}

# AttributeProto.AttributeType: the field of the value.
ATTRIBUTES = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints", 8: "strings"}


class Node(NamedTuple):
    """One operation. `attributes` holds numbers, strings, tuples of them, and arrays."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Named

    @property
    def place(self) -> str:
        """The name of the node in error messages."""
        return f"onnx: node {self.name or '/'.join(self.outputs)!r} ({self.op})"

    def refuse(self, why: str) -> NoReturn:
        """Raises the `ValueError` that says why this node cannot be converted."""
        raise ValueError(f"{self.place}: {why}")

    def get(self, name: str, default: Any) -> PyTree:
        """An attribute, which must have the type of `default`."""
        value = self.attributes.get(name, default)
        if type(value) is not type(default):
            self.refuse(f"{name}: expected {type(default).__name__}, got {value!r}")
        return value

    def numbers(self, name: str, default: tuple) -> tuple:
        """An attribute that is a tuple. The entries have the type of those of `default`, or any type if it is empty."""
        value = self.get(name, default)
        if default and any(type(each) is not type(default[0]) for each in value):
            self.refuse(f"{name}: expected {type(default[0]).__name__}, got {value!r}")
        return value

    def only(self, *known: str) -> None:
        """Raises if the node has an attribute that is not in `known`."""
        unknown = sorted(set(self.attributes) - set(known))
        if unknown:
            self.refuse(f"unknown attribute {unknown[0]!r}; known are {', '.join(known) or 'none'}")


class Input(NamedTuple):
    """An input of the graph: its dtype and the sizes of its axes. None stands for each fact that is not known."""

    name: str
    dtype: np.dtype | None
    dims: tuple[int | None, ...] | None


class Model(NamedTuple):
    """The parts of a graph that its outputs need. `room` bounds the count of numbers that constant folding may make."""

    inputs: dict[str, Input]
    constants: Named
    nodes: list[Node]
    outputs: tuple[str, ...]
    opset: int
    room: int


class File(NamedTuple):
    """A ModelProto, and the data files beside it."""

    proto: Foreign
    data: DataFiles


def read_file(source: Foreign) -> File:
    """The model, from a path, from bytes, or from a ModelProto."""
    import onnx

    folder = None
    if isinstance(source, (str, os.PathLike)):
        folder = os.path.dirname(os.path.abspath(source))
        with open(source, "rb") as file:
            source = file.read()
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = _parse(onnx, bytes(source))
    if not isinstance(source, onnx.ModelProto):
        raise TypeError(
            f"model: expected a path, bytes, an onnx.ModelProto or onnx.NodeProto, got {type(source).__name__}"
        )
    return File(source, DataFiles(folder))


def _parse(onnx, data: bytes):
    from google.protobuf.message import DecodeError

    try:
        return onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise ValueError(f"onnx: {len(data)} bytes are no ONNX model: {error}") from error


def whole(file: File, output: str | None) -> Model:
    """Everything that the outputs of a model need, or that one of them needs."""
    graph, data = file.proto.graph, file.data
    if not graph.output:
        raise ValueError("onnx: the model has no graph with outputs")
    names = tuple(each.name for each in graph.output)
    if output is not None and output not in names:
        raise ValueError(f"output: expected one of {names}, got {output!r}")
    wanted = names if output is None else (output,)
    constants = _unique("initializer", ((each.name, each) for each in graph.initializer))
    inputs = _unique("input", ((each.name, each) for each in graph.input))
    nodes = [node(each, data) for each in _needed(graph.node, wanted, {*constants, *inputs})]
    used = {name for each in nodes for name in each.inputs} | set(wanted)
    return Model(
        {name: value_info(name, each) for name, each in inputs.items() if name in used and name not in constants},
        {name: array(f"onnx: initializer {name!r}", each, data) for name, each in constants.items() if name in used},
        nodes,
        wanted,
        opset(file),
        file.proto.ByteSize() + data.bytes,
    )


def single(proto: Foreign, initializers: Foreign, output: str | None) -> Model:
    """A graph of one recurrent node. Its outputs are the outputs of the node that have a name."""
    if not isinstance(initializers, Mapping):
        raise TypeError(f"initializers: expected a mapping of names to arrays, got {type(initializers).__name__}")
    read = node(proto, DataFiles(None))
    if read.op not in RECURRENT:
        read.refuse(f"expected one of {', '.join(RECURRENT)}; convert a whole model for other operations")
    constants = {name: np.asarray(value) for name, value in initializers.items()}
    unused = sorted(set(constants) - set(read.inputs))
    if unused:
        raise ValueError(f"initializers: {unused[0]!r} is no input of the node, which reads {read.inputs}")
    outputs = tuple(name for name in read.outputs if name)
    if output is not None and output not in outputs:
        raise ValueError(f"output: expected one of {outputs}, got {output!r}")
    outputs = outputs if output is None else (output,)
    return Model(inputs_of(read, constants), constants, [read], outputs, 22, 0)


def inputs_of(recurrent: Node, constants: Container[str]) -> dict[str, Input]:
    """The inputs of a recurrent node that are not constants, as inputs of a graph."""
    # X, W, R, B, sequence_lens, initial_h, initial_c, P
    ranks = (3, 3, 3, 2, 1, 3, 3, 2)
    return {
        name: Input(name, np.dtype(np.int32) if k == 4 else None, (None,) * rank)
        for k, (name, rank) in enumerate(zip(recurrent.inputs, ranks, strict=False))
        if name and name not in constants
    }


def opset(file: File) -> int:
    """The version of ONNX's operator set."""
    from onnx.defs import onnx_opset_version

    versions = [each.version for each in file.proto.opset_import if each.domain in ("", "ai.onnx")]
    if len(versions) != 1 or not 7 <= versions[0] <= onnx_opset_version():
        raise ValueError(f"onnx: expected one operator set from 7 to {onnx_opset_version()}, got {versions}")
    return versions[0]


def _unique(what: str, named: Iterable[tuple[str, PyTree]]) -> Named:
    found: Named = {}
    for name, value in named:
        if not name or name in found:
            raise ValueError(f"onnx: {what} {name!r}: expected names that differ and are not empty")
        found[name] = value
    return found


def _needed(nodes: Any, outputs: Iterable[str], given: set[str]) -> list[PyTree]:
    """The nodes that the outputs need, in their order in the graph. They must be able to run in this order."""
    made: set[str] = set()
    for node in nodes:
        for name in filter(None, node.output):
            if name in made or name in given:
                raise ValueError(f"onnx: node {node.name!r} ({node.op_type}): {name!r} is made twice")
            made.add(name)
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(filter(None, node.input))
            kept.append(node)
    kept.reverse()
    known = set(given)
    for node in kept:
        for name in filter(None, node.input):
            if name not in known:
                raise ValueError(
                    f"onnx: node {node.name!r} ({node.op_type}): {name!r} is no input, no initializer, "
                    "and made by no node before this one"
                )
        known.update(filter(None, node.output))
    missing = sorted(set(outputs) - known)
    if missing:
        raise ValueError(f"onnx: output {missing[0]!r} is made by no node")
    return kept


def node(proto: Foreign, data: DataFiles) -> Node:
    """A checked `Node` from a NodeProto."""
    node = Node(proto.op_type, proto.name, tuple(proto.input), tuple(proto.output), {})
    if proto.domain not in ("", "ai.onnx"):
        node.refuse(f"operator set {proto.domain!r}: expected ai.onnx")
    for each in proto.attribute:
        if each.name in node.attributes:
            node.refuse(f"attribute {each.name!r} is there twice")
        if each.type in (5, 10):
            node.refuse("it has a subgraph; torch.onnx.export(..., dynamo=False) writes recurrent nodes in its place")
        if each.type not in ATTRIBUTES or each.ref_attr_name:
            node.refuse(f"attribute {each.name!r} is of type {each.type}, which is not understood")
        node.attributes[each.name] = _attribute(node, each.name, getattr(each, ATTRIBUTES[each.type]), data)
    return node


def _attribute(node: Node, name: str, value: Any, data: DataFiles) -> PyTree:
    match value:
        case float() if not math.isfinite(value):
            node.refuse(f"{name}: expected a finite number, got {value}")
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                node.refuse(f"{name}: expected text, got {value!r}")
        case float() | int():
            return value
    if hasattr(value, "data_type"):
        return array(f"{node.place}: {name}", value, data)
    return tuple(_attribute(node, name, each, data) for each in value)


def value_info(name: str, proto: Foreign) -> Input:
    """An input of a graph, from a ValueInfoProto."""
    kind = proto.type.tensor_type
    if not proto.type.HasField("tensor_type") or kind.elem_type not in DTYPES:
        raise ValueError(f"onnx: input {name!r}: expected a tensor of numbers")
    dtype = DTYPES[kind.elem_type][0]
    if not kind.HasField("shape"):
        return Input(name, dtype, None)
    # A size of 0 or less is none that can be relied on.
    return Input(name, dtype, tuple(each.dim_value if each.dim_value > 0 else None for each in kind.shape.dim))


def array(what: str, tensor: Foreign, data: DataFiles) -> np.ndarray:
    """A TensorProto as an array. The array is made only if its data are there."""
    from onnx import numpy_helper

    if tensor.data_type not in DTYPES:
        raise ValueError(f"{what}: expected numbers, got a tensor of data type {tensor.data_type}")
    dims = tuple(tensor.dims)
    if len(dims) > MOST_AXES or any(size < 0 for size in dims) or tensor.HasField("segment"):
        raise ValueError(f"{what}: expected up to {MOST_AXES} sizes of at least 0, got {dims[: 2 * MOST_AXES]}")
    dtype, field = DTYPES[tensor.data_type]
    if tensor.data_location == 1:
        return data.read(what, tensor.external_data, dtype, dims)
    expected = math.prod(dims)
    raw = tensor.HasField("raw_data")
    given = len(tensor.raw_data) / dtype.itemsize if raw else len(getattr(tensor, field))
    if given != expected:
        raise ValueError(f"{what}: shape {dims} has {expected} numbers, and there are {given:g}")
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{what}: its numbers are not of {dtype}: {error}") from error
