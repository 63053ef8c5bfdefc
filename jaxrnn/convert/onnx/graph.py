"""From the graph of an ONNX model to a cell: a value is a constant or a signal, and every node says what it makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxrnn.cell import Cell
from jaxrnn.convert.cells import stacked
from jaxrnn.convert.onnx import layers, nodes, plumbing, signals
from jaxrnn.convert.onnx.constants import Constant, Folder
from jaxrnn.convert.onnx.read import MOST_AXES, RECURRENT, Model, Node, read
from jaxrnn.convert.onnx.signals import DIRECTION, FEATURES, UNIT, Chain, Signal, Value
from jaxrnn.engines.arrays import on_device

OPERATIONS = plumbing.OPERATIONS | layers.OPERATIONS | nodes.OPERATIONS


def from_onnx(
    model: Any, *, initializers: Mapping[str, Any] | None = None, output: str | None = None
) -> tuple[Cell, Any]:
    """The recurrent network of an ONNX model as a cell and its params.

    The model is a chain of layers: RNN, LSTM and GRU nodes with all their attributes, embeddings (Gather), Linear
    (MatMul, Gemm), LayerNormalization, Dropout, activations and residual connections, ended by the last step, the mean
    or the greatest of all steps if at all, with the plumbing that exporters write around them. Weights and initial
    states may be computed from constants and from the shapes of the inputs. `torch.onnx.export(..., dynamo=False)` and
    tf2onnx write such models.

    What are inputs of the graph besides xs are arguments of `jaxrnn.scan`: the `sequence_lens` of the recurrent nodes
    are `lengths`, and their `initial_h` and `initial_c`, if they are inputs, `carry`; constant ones make a
    `LearnedCarry`. Where time lies is an argument too: `time_axis=1` for a model (or `layout=1`) that takes the batch
    first.

    ys have the shapes of jaxrnn: directions side by side on the last axis. With `lengths`, ys are 0 at the padding,
    where a layer above a recurrent one in ONNX puts out what it makes of 0; and a sequence of length 0 keeps its
    initial state. A model without `sequence_lens` that takes the last step takes the last valid one once `lengths` are
    given. With `input_forget`, f = 1 − i, as in onnxruntime.

    Args:
      model: a path, the bytes of a file, an `onnx.ModelProto`; or an `onnx.NodeProto` of a recurrent operator.
      initializers: for a NodeProto, the arrays by name; other inputs of the node are inputs of the model.
      output: the name of the output that the cell puts out, where the model has several. By default it is the only one
        that is no final state; or, of final states only, the only one.

    Returns:
      The cell (a `Stack`, where there are several layers), and its params, in the dtype of the model.

    Raises:
      ValueError: for what cannot be converted, naming the node, and for damaged files.
      TypeError: for what is no model.

        >>> import jax, jaxrnn
        >>> from jaxrnn.convert.onnx import from_onnx, to_onnx
        >>> cell = jaxrnn.Stack((jaxrnn.Embed(10, 3), jaxrnn.Pool(jaxrnn.GRU(3, 4)), jaxrnn.Linear(4, 2)))
        >>> params = cell.init(jax.random.key(0))
        >>> try:
        ...     import onnx
        ... except ImportError:
        ...     same = cell
        ... else:
        ...     same, _ = from_onnx(to_onnx(cell, params))
        >>> same == cell
        True
    """
    return Graph(read(model, initializers, output)).convert()


class Graph:
    """The values of a model, by name."""

    def __init__(self, model: Model):
        self.model = model
        self.folder = Folder(model.room)
        self.values: dict[str, Value] = {name: self.folder.constant(a) for name, a in model.constants.items()}
        self.xs: str | None = None
        self.taken: dict[tuple[str, int], str] = {}

    def convert(self) -> tuple[Cell, Any]:
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
            if node.op not in OPERATIONS:
                node.refuse("this operation has no counterpart in a chain of cells")
            self._run(node)
        chain = self._output()
        cell, params = stacked(chain.layers())
        self._check_dtypes(chain, params)
        return cell, jax.tree.map(on_device, params)

    def _run(self, node: Node) -> None:
        made = OPERATIONS[node.op](self, node)
        made = made if isinstance(made, list) else [made]
        if len(node.outputs) > len(made) and any(node.outputs[len(made) :]):
            node.refuse(f"expected {len(made)} outputs, got {len(node.outputs)}")
        self.values.update((name, value) for name, value in zip(node.outputs, made, strict=False) if name)

    def _output(self) -> Chain:
        """The chain to the one output that is no final state, or the only final state."""
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
        if chain.time is None or kept[-1:] != [FEATURES] or sorted(kept[:-1], key=str) != sorted(wanted, key=str):
            end.refuse(f"expected the axes time, batch, features, or batch, features, got {value}")
        others = states if found is rest else {}
        strangers = [other for other, each in others.items() if not all(chain.holds(part.chain) for part in each.parts)]
        if strangers:
            raise ValueError(f"onnx: output {strangers[0]!r} is of layers that output {name!r} does not pass through")
        return chain

    def _check_dtypes(self, chain: Chain, params: Any) -> None:
        """All params have one dtype, that of the input if it is of floating numbers."""
        found = {leaf.dtype for leaf in jax.tree.leaves(params)}
        dtype = self.values[chain.input].dtype  # type: ignore[union-attr]
        if dtype is not None and not np.issubdtype(dtype, np.integer):
            found.add(dtype)
        if len(found) > 1:
            several = ", ".join(sorted(map(str, found)))
            raise ValueError(f"onnx: expected one dtype of weights and inputs, got {several}")

    # What nodes ask for.

    def given(self, node: Node, k: int) -> Value | None:
        """The k-th input, None where there is none."""
        return self.values[node.inputs[k]] if k < len(node.inputs) and node.inputs[k] else None

    def value(self, node: Node, k: int = 0) -> Value:
        value = self.given(node, k)
        if value is None:
            node.refuse(f"expected at least {k + 1} inputs")
        return value

    def signal(self, node: Node, k: int = 0) -> Signal:
        """An input that comes from xs."""
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
        """Axes counted from 0, each once."""
        rank = self.rank(value) + more
        if any(not -rank <= axis < rank for axis in given) or len({axis % rank for axis in given}) != len(given):
            node.refuse(f"expected axes of {rank} that differ, got {list(given)}")
        return [axis % rank for axis in given]

    def axis(self, node: Node, value: Value, default: int | None = None) -> int:
        if default is None and "axis" not in node.attributes:
            node.refuse("expected an attribute axis")
        return self.axes(node, value, [node.get("axis", default or 0)])[0]

    def listed(self, node: Node, name: str, k: int) -> list[int] | None:
        """Integers that are an attribute or, in newer operator sets, an input."""
        if name in node.attributes:
            return list(node.numbers(name, (0,)))
        given = self.given(node, k)
        return None if given is None else self.folder.known(node, given, name)
