"""`from_onnx` converts a whole model, or one recurrent node of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax

from jaxrnn.convert.onnx import layers, nodes, plumbing
from jaxrnn.convert.onnx.find import Found, alone, find_node, labels, recurrent_nodes
from jaxrnn.convert.onnx.graph import Graph
from jaxrnn.convert.onnx.read import RECURRENT, File, Model, read_file, single, whole
from jaxrnn.engines.arrays import on_device
from jaxrnn.typing import Foreign, WithParams

OPERATIONS = plumbing.OPERATIONS | layers.OPERATIONS | nodes.OPERATIONS

# How many recurrent nodes are tried for the message that says what can be taken.
MOST_TRIED = 16


def from_onnx(
    model: Foreign,
    *,
    initializers: Mapping[str, Foreign] | None = None,
    output: str | None = None,
    node: str | None = None,
) -> WithParams:
    """Converts the recurrent network of an ONNX model, or one recurrent node of it, to a cell and its params.

    The model must be a chain of layers: RNN, LSTM and GRU nodes with all their attributes, embeddings (Gather), Linear
    (MatMul, Gemm), LayerNormalization, Dropout, activations and residual connections. At the end it may reduce the time
    axis to the last step, or to the mean or the maximum of all steps. It may also have the reshapes, transposes and
    similar operations that exporters write around these layers. Weights and initial states may be computed from
    constants and from the shapes of the inputs. `torch.onnx.export` and tf2onnx write such models. Weights in files
    beside the model are read only from within its folder.

    If other operations, such as convolutions, stand around the recurrent nodes, `node` takes out one recurrent node,
    also from subgraphs (of If, Loop, Scan). Its constants may be anywhere in the model. Its input X becomes xs.

    The inputs of the graph besides xs become arguments of `jaxrnn.scan`. The `sequence_lens` of the recurrent nodes are
    `lengths`. Their `initial_h` and `initial_c` are `carry`, if they are inputs; if they are constant, they make a
    `LearnedCarry`. The place of the time axis is an argument too: `time_axis=1` for a model (or `layout=1`) that takes
    the batch first.

    ys have the shapes of jaxrnn, with the directions side by side on the last axis. With `lengths`, ys are 0 at the
    padding, where in ONNX a layer above a recurrent one puts out its result for an input of 0; and a sequence of length
    0 keeps its initial state. If a model without `sequence_lens` takes the last step, the cell takes the last valid
    step when `lengths` are given. With `input_forget`, f = 1 − i, as in onnxruntime. If a model drops the axis of a
    single feature, as `squeeze(-1)` does, ys keep it.

    Args:
      model: A path, the bytes of a file, or an `onnx.ModelProto`; or an `onnx.NodeProto` of a recurrent operator.
      initializers: For a NodeProto, the arrays by name. Other inputs of the node are inputs of the model.
      output: The name of the output that the cell puts out, if the model has several. The default is the only output
        that is not a final state, or, if all are final states, the only output.
      node: The name of a recurrent node, or of one of its outputs. In a subgraph, the names of the nodes around it may
        stand before it, each followed by a slash. An initial state that is not constant is an argument of
        `jaxrnn.scan`.

    Returns:
      The cell (a `Stack`, if there are several layers) and its params, in the dtype of the model.

    Raises:
      ValueError: If something cannot be converted; the message names the node, and the recurrent nodes that `node` can
        take. If there is no node of the name `node`; the message lists the names that there are. If a file is damaged.
      TypeError: If `model` is not a model.

    Examples:
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
    import onnx

    if isinstance(model, onnx.NodeProto):
        if node is not None:
            raise TypeError("node: only for a whole model, got an onnx.NodeProto")
        return _on_device(single(model, initializers, output))
    if initializers is not None:
        raise TypeError(f"initializers: only for an onnx.NodeProto, got {type(model).__name__}")
    file = read_file(model)
    if node is not None:
        if output is not None:
            raise ValueError(f"output: expected None beside node={node!r}, whose output is Y, got {output!r}")
        return _on_device(alone(file, find_node(file, node), plumbing.OPERATIONS))
    try:
        return _on_device(whole(file, output))
    except ValueError as error:
        raise ValueError(f"{error}{_way_out(file)}") from error


def _on_device(model: Model) -> WithParams:
    cell, params = Graph(model, OPERATIONS).convert()
    return cell, jax.tree.map(on_device, params)


def _way_out(file: File) -> str:
    """The recurrent nodes that `node` can take, and the operators around them, as text for an error message."""
    found = recurrent_nodes(file)
    named = [(name, each) for name, each in zip(labels(found), found, strict=True)][:MOST_TRIED]
    taken = [(name, each) for name, each in named if _can_be_taken(file, each)]
    if not taken:
        return ""
    names = ", ".join(repr(name) for name, _ in taken)
    before = _layers(op for _, each in taken for op in each.before())
    after = _layers(op for _, each in taken for op in each.after())
    return f". Recurrent nodes that node= can take: {names}; before them stand {before}, after them {after}"


def _can_be_taken(file: File, found: Found) -> bool:
    try:
        Graph(alone(file, found, plumbing.OPERATIONS), OPERATIONS).convert()
    except (ValueError, TypeError):
        return False
    return True


def _layers(ops: Iterable[str]) -> str:
    """The operators, each once, without the recurrent operators and those in `plumbing`."""
    return ", ".join(dict.fromkeys(op for op in ops if op not in (*RECURRENT, *plumbing.OPERATIONS))) or "no others"
