"""Converts the graph of an ONNX model to a cell. A value is a constant or a signal; every node computes values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxrnn.convert.cells import stacked
from jaxrnn.convert.onnx import signals
from jaxrnn.convert.onnx.constants import Constant, Folder
from jaxrnn.convert.onnx.read import MOST_AXES, RECURRENT, Model, Node
from jaxrnn.convert.onnx.signals import DIRECTION, FEATURES, UNIT, Chain, Signal, Value
from jaxrnn.typing import PyTree, WithParams

# What a node makes of its inputs: a value, or a list of them. Raises where it cannot be converted.
Operation = Callable[["Graph", Node], Any]


class Graph:
    """The values of a model, by name."""

    def __init__(self, model: Model, operations: Mapping[str, Operation]):
        self.model, self.operations = model, operations
        self.folder = Folder(model.room)
        self.values: dict[str, Value] = {name: self.folder.constant(a) for name, a in model.constants.items()}
        self.xs: str | None = None

    def convert(self) -> WithParams:
        """The cell, and its params as NumPy arrays."""
        if not any(node.op in RECURRENT for node in self.model.nodes):
            ops = ", ".join(sorted({node.op for node in self.model.nodes})) or "none"
            raise ValueError(
                f"onnx: no RNN, LSTM or GRU node leads to the outputs, only {ops}. Export recurrent layers as such: "
                "torch.onnx.export(..., dynamo=False)"
            )
        for given in self.model.inputs.values():
            if given.dims is None or len(given.dims) > MOST_AXES:
                raise ValueError(f"onnx: input {given.name!r}: expected a shape of up to {MOST_AXES} axes")
            self.values[given.name] = signals.source(given.name, given.dtype, given.dims)
        for node in self.model.nodes:
            if node.op not in self.operations:
                node.refuse("this operation has no counterpart in a chain of cells")
            self._run(node)
        chain = self._output()
        cell, params = stacked(chain.layers())
        self._check_dtypes(chain, params)
        return cell, params

    def _run(self, node: Node) -> None:
        made = self.operations[node.op](self, node)
        made = made if isinstance(made, list) else [made]
        if len(node.outputs) > len(made) and any(node.outputs[len(made) :]):
            node.refuse(f"expected {len(made)} outputs, got {len(node.outputs)}")
        self.values.update((name, value) for name, value in zip(node.outputs, made, strict=False) if name)

    def _output(self) -> Chain:
        """The chain that leads to the only output that is not a final state, or else to the only final state."""
        named = {name: self.values[name] for name in self.model.outputs}
        states, rest = {}, {}
        for name, value in named.items():
            if not isinstance(value, Signal):
                raise ValueError(f"onnx: output {name!r} does not depend on the inputs")
            state = all(part.kind in ("h", "c") for part in value.parts)
            (states if state else rest)[name] = value
        found = rest or states
        if len(found) != 1:
            several = ", ".join(map(repr, found))
            raise ValueError(f"onnx: expected one output besides final states, got {several}; name one by `output`")
        ((name, value),) = found.items()
        end = Node("output", name, (), (name,), {})
        if DIRECTION in value.axes:
            value = value._replace(axes=(*(axis for axis in value.axes if axis not in (DIRECTION, FEATURES)), FEATURES))
        chain, axes = signals.close(end, value)
        kept = [axis for axis in axes if axis != UNIT]
        sequence = [] if chain.pooled else [chain.time]
        wanted = [axis for axis in (*sequence, chain.batch) if axis != UNIT]
        # A head of one feature may have dropped the axis of features.
        kept = kept[:-1] if kept[-1:] == [FEATURES] else kept
        if chain.time is None or sorted(kept, key=str) != sorted(wanted, key=str):
            end.refuse(f"expected the axes time, batch, features, or batch, features, got {value}")
        others = states if found is rest else {}
        strangers = [other for other, each in others.items() if not all(chain.holds(part.chain) for part in each.parts)]
        if strangers:
            raise ValueError(f"onnx: output {strangers[0]!r} is of layers that output {name!r} does not pass through")
        return chain

    def _check_dtypes(self, chain: Chain, params: PyTree) -> None:
        """Raises unless all params have one dtype, which is that of the input if the input has floating numbers."""
        found = {leaf.dtype for leaf in jax.tree.leaves(params)}
        dtype = self.values[chain.input].dtype  # type: ignore[union-attr]
        if dtype is not None and not np.issubdtype(dtype, np.integer):
            found.add(dtype)
        if len(found) > 1:
            several = ", ".join(sorted(map(str, found)))
            raise ValueError(f"onnx: expected one dtype of weights and inputs, got {several}")

    # What nodes ask for.

    def given(self, node: Node, k: int) -> Value | None:
        """The k-th input of a node, or None if there is none."""
        return self.values[node.inputs[k]] if k < len(node.inputs) and node.inputs[k] else None

    def value(self, node: Node, k: int = 0) -> Value:
        value = self.given(node, k)
        if value is None:
            node.refuse(f"expected at least {k + 1} inputs")
        return value

    def signal(self, node: Node, k: int = 0) -> Signal:
        """An input that depends on xs."""
        value = self.value(node, k)
        if not isinstance(value, Signal):
            node.refuse("expected a value that depends on the inputs, got a constant")
        chain = value.parts[0].chain
        if self.xs not in (None, chain.input):
            node.refuse(f"layers act on the inputs {self.xs!r} and {chain.input!r}: expected one")
        self.xs = chain.input
        return value

    def array(self, node: Node, k: int, what: str) -> np.ndarray:
        """An input that is a constant."""
        value = self.value(node, k)
        if not isinstance(value, Constant):
            node.refuse(f"{what} depends on the inputs: expected a constant")
        return self.folder.full(node, value)

    def rank(self, value: Value) -> int:
        return len(value.axes if isinstance(value, Signal) else value.shape)

    def axes(self, node: Node, value: Value, given: Any, *, more: int = 0) -> list[int]:
        """The axes counted from 0. Each may be given only once."""
        rank = self.rank(value) + more
        if any(not -rank <= axis < rank for axis in given) or len({axis % rank for axis in given}) != len(given):
            node.refuse(f"expected axes of {rank} that differ, got {list(given)}")
        return [axis % rank for axis in given]

    def axis(self, node: Node, value: Value, default: int | None = None) -> int:
        if default is None and "axis" not in node.attributes:
            node.refuse("expected an attribute axis")
        return self.axes(node, value, [node.get("axis", default or 0)])[0]

    def listed(self, node: Node, name: str, k: int) -> list[int] | None:
        """Integers that are given as an attribute or, in newer operator sets, as an input."""
        if name in node.attributes:
            return list(node.numbers(name, (0,)))
        given = self.given(node, k)
        return None if given is None else self.folder.known(node, given, name)
