"""Converts cells to an ONNX model."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxrnn.cell import Cell, input_size, output_size
from jaxrnn.cells.activations import Activation
from jaxrnn.cells.elman import Elman
from jaxrnn.cells.gru import GRU
from jaxrnn.cells.lstm import LSTM
from jaxrnn.compose.parallel import Bidirectional
from jaxrnn.compose.pool import Pool
from jaxrnn.compose.stack import Stack
from jaxrnn.compose.wrap import Backward, LearnedCarry, Residual
from jaxrnn.convert.activations import there
from jaxrnn.convert.cells import Placed, layers, placed
from jaxrnn.convert.gates import ONNX, ONNX_PEEPHOLES, PEEPHOLES, recurrent_bias, reorder
from jaxrnn.convert.onnx.recurrent import FUNCTIONS, WITHOUT_DEFAULTS
from jaxrnn.layers import Apply, Dropout, Embed, LayerNorm, Linear
from jaxrnn.typing import DTypeLike, Named, PyTree

OPSET, IR_VERSION = 22, 10

_TYPES = {"float32": "float", "float64": "double"}
_LACKS = "ONNX's operator has no such option"


def to_onnx(cell: Cell, params: PyTree, *, lengths: bool = False, initial_states: bool = False) -> bytes:
    """Converts a cell to an ONNX model of operator set 22, with native RNN, LSTM and GRU nodes.

    The inputs are `X` (time, batch, features), or integers (time, batch) if the first layer is an `Embed`. With
    `lengths` there is also `sequence_lens`, int32 (batch). With `initial_states` there are also the states of each
    recurrent layer k: `initial_h_k`, and for an LSTM `initial_c_k`, (directions, batch, H). The outputs are `Y`, which
    is ys, and the final states `final_h_k` and `final_c_k`.

    The numbers of activations, the clips and epsilon are float32 in ONNX. Noise (dropout) is for training: the model
    computes the same function as `jaxrnn.scan` without a key. With `lengths`, layers above a recurrent one put out
    their result for an input of 0 at the padding, where `jaxrnn.scan` has 0; and onnxruntime ends a sequence of length
    0 with states 0.

    Args:
      cell: An `Elman`, `LSTM`, `GRU`, `Backward`, `Bidirectional` (of two alike, side by side), `Stack`, `Residual`,
        `LearnedCarry`, `Pool`, `Embed`, `Linear`, `LayerNorm`, `Dropout` or `Apply`.
      params: Its params, as `cell.init` gives them.
      lengths: Whether the lengths of the sequences are an input.
      initial_states: Whether the initial states are inputs.

    Returns:
      The bytes of a checked ModelProto.

    Raises:
      ValueError: If ONNX has no counterpart. The message names the place.
      TypeError: If `cell` is not a cell, or if the params are those of another cell.

    Examples:
      >>> import jax, jaxrnn
      >>> from jaxrnn.convert.onnx import to_onnx
      >>> cell = jaxrnn.MGU(3, 4)
      >>> try:
      ...     to_onnx(cell, cell.init(jax.random.key(0)))
      ... except (ValueError, ImportError) as error:
      ...     print(error)
      cell: MGU(input_size=3, hidden_size=4): ONNX has no operator for this cell here
    """
    model = placed(cell, params)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(model.params)}
    if len(dtypes) != 1:
        raise ValueError(f"params: expected arrays of one dtype, got {', '.join(sorted(map(str, dtypes))) or 'none'}")
    export = _Export(dtypes.pop(), lengths, initial_states)
    top = "X"
    for each in layers(model):
        top = export.layer(each, top)
    return export.finish(model, top)


class _Export:
    """The nodes, weights, inputs and outputs so far. Each value is referred to by its name."""

    def __init__(self, dtype: np.dtype, lengths: bool, initial_states: bool):
        self.dtype, self.lengths, self.initial_states = dtype, lengths, initial_states
        self.nodes: list[PyTree] = []
        self.weights: list[PyTree] = []
        self.inputs: list[tuple[str, PyTree, tuple]] = [("sequence_lens", np.dtype(np.int32), ("batch",))] * lengths
        self.outputs: list[tuple[str, PyTree, tuple]] = []
        self.recurrent = 0
        self.pooled = False

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Adds a node, and returns the name of its first output. The other outputs have that name with a number."""
        from onnx import helper

        name = f"{op}_{len(self.nodes)}"
        names = [name, *(f"{name}_{k}" for k in range(1, outputs))]
        attributes = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(op, list(inputs), names, name, **attributes))
        return name

    def weight(self, array: PyTree, dtype: DTypeLike | None = None) -> str:
        """Adds a constant, and returns its name."""
        from onnx import numpy_helper

        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(array, dtype or self.dtype, order="C"), name))
        return name

    def integers(self, *numbers: int) -> str:
        return self.weight(np.array(numbers, np.int64), np.int64)

    def finish(self, model: Placed, top: str) -> bytes:
        import onnx
        from onnx import helper

        size, shape = input_size(model.cell), ("time", "batch")
        tokens = model.cell.input_ndim == 0
        if not tokens and isinstance(size, tuple):
            model.refuse("expected one axis of features")
        x = ("X", np.dtype(np.int64), shape) if tokens else ("X", self.dtype, (*shape, size))
        self.nodes.append(helper.make_node("Identity", [top], ["Y"], "Y"))
        rank = 2 if self.pooled else 3
        y = ("Y", self.dtype, (*shape[3 - rank :], output_size(model.cell, size)))

        def info(name, dtype, shape):
            return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

        proto = helper.make_graph(
            self.nodes,
            "jaxrnn",
            [info(*each) for each in (x, *self.inputs)],
            [info(*each) for each in (y, *self.outputs)],
            self.weights,
        )
        proto = helper.make_model(
            proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="jaxrnn"
        )
        onnx.checker.check_model(proto, full_check=True)
        return proto.SerializeToString()

    def layer(self, each: Placed, x: str) -> str:
        """Adds one layer, and returns the name of its output."""
        params = each.params
        match each.cell:
            case Embed():
                return self.add("Gather", self.weight(params.w), x)
            case Linear():
                y = self.add("MatMul", x, self.weight(params.w))
                return y if params.b is None else self.add("Add", y, self.weight(params.b))
            case LayerNorm(epsilon=epsilon):
                scale = [self.weight(array) for array in params if array is not None]
                return self.add("LayerNormalization", x, *scale, axis=-1, epsilon=epsilon)
            case Dropout(rate=rate):
                return self.add("Dropout", x, self.weight(np.array(rate, np.float32), np.float32))
            case Apply(fn=fn):
                return self.activation(each, fn, x)
            case Residual():
                y = x
                for inside in layers(each.part("cell", params)):
                    y = self.layer(inside, y)
                return self.add("Add", x, y)
            case Stack():
                for inside in layers(each):
                    x = self.layer(inside, x)
                return x
            case Pool():
                return self.pool(each, x)
        y, _ = self.recurrent_layer(each, x)
        return y

    def activation(self, each: Placed, fn: Activation, x: str) -> str:
        from onnx import defs

        if fn == "silu":
            return self.add("Mul", x, self.add("Sigmoid", x))  # its own operator came with set 24
        op, given = there(fn, "onnx") or each.refuse(f"ONNX has no operator for {fn!r}")
        if not defs.has(op, OPSET):
            each.refuse(f"ONNX has no operator {op}")
        tensor = f"tensor({_TYPES.get(str(self.dtype), self.dtype)})"
        if tensor not in (types := defs.get_schema(op, OPSET).inputs[0].types):
            each.refuse(f"ONNX's {op} is for {', '.join(sorted(types))}, and the params are {self.dtype}")
        if op == "Clip":
            return self.add(op, x, self.weight(given["min"]), self.weight(given["max"]))
        return self.add(op, x, **given)

    def pool(self, each: Placed, x: str) -> str:
        *below, top = layers(each.part("cell", each.params))
        how = each.cell.how
        if how not in ("last", "mean", "max"):
            each.refuse(f"how={how!r}: expected 'last', 'mean' or 'max'")
        for inside in below:
            x = self.layer(inside, x)
        self.pooled = True
        if how == "last" and isinstance(top.cell, (Elman, GRU, LSTM, Backward, Bidirectional, LearnedCarry)):
            _, h = self.recurrent_layer(top, x)
            if not isinstance(top.cell, Bidirectional):
                return self.add("Squeeze", h, self.integers(0))
            return self.add("Reshape", self.add("Transpose", h, perm=[1, 0, 2]), self.integers(0, -1))
        if self.lengths:
            each.refuse("with lengths, ONNX has only the final states of a recurrent layer")
        y = self.layer(top, x)
        if how == "last":
            return self.add("Gather", y, self.weight(np.array(-1, np.int64), np.int64), axis=0)
        return self.add("ReduceMean" if how == "mean" else "ReduceMax", y, self.integers(0), keepdims=0)

    def recurrent_layer(self, each: Placed, x: str) -> tuple[str, str]:
        """The names of the outputs (time, batch, features), and of the final h (directions, batch, H)."""
        match each.cell:
            case Bidirectional(merge=merge):
                if merge != "concat":
                    each.refuse(f"merge={merge!r}: expected 'concat'")
                ways = [each.part("forward", each.params.forward), each.part("backward", each.params.backward)]
                direction = "bidirectional"
            case Backward():
                ways, direction = [each.part("cell", each.params)], "reverse"
            case _:
                ways, direction = [each], "forward"
        cells = [_inner(way) for way in ways]
        found = [_weights(way) for way in cells]
        alike = [(op, attributes, arrays["W"].shape, arrays["P"] is None) for op, attributes, _, arrays in found]
        if alike[-1] != alike[0]:
            each.refuse("the two directions of one ONNX node must be alike, but for their activations and weights")
        k, self.recurrent = self.recurrent, self.recurrent + 1
        (op, common, *_), hidden = found[0], cells[0].cell.hidden_size
        arrays = self._arrays([each[3] for each in found])
        sequence = "sequence_lens" if self.lengths else ""
        states = self._states(k, ways, cells, x)
        inputs = [x, *arrays[:3], sequence, *states, *arrays[3:]]
        while not inputs[-1]:
            inputs.pop()
        y = self.add(
            op,
            *inputs,
            outputs=3 if op == "LSTM" else 2,
            direction=direction,
            hidden_size=hidden,
            **common,
            **_activations([each[2] for each in found]),
        )
        for n, name in enumerate(("h", "c")[: 2 if op == "LSTM" else 1], start=1):
            self.add_output(f"{y}_{n}", f"final_{name}_{k}", (len(ways), "batch", hidden))
        if direction != "bidirectional":
            return self.add("Squeeze", y, self.integers(1)), f"{y}_1"
        turned = self.add("Transpose", y, perm=[0, 2, 1, 3])
        return self.add("Reshape", turned, self.integers(0, 0, -1)), f"{y}_1"

    def add_output(self, value: str, name: str, shape: tuple) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node("Identity", [value], [name], name))
        self.outputs.append((name, self.dtype, shape))

    def _arrays(self, found: list[Named]) -> list[str]:
        """The names of W, R, B and P of all directions, or "" for an array that no direction has."""

        def stacked(name):
            given = [arrays[name] for arrays in found]
            if all(array is None for array in given):
                return ""
            like = next(array for array in given if array is not None)
            return self.weight(np.stack([np.zeros_like(like) if array is None else array for array in given]))

        return [stacked(name) for name in "WRBP"]

    def _states(self, k: int, ways: list[Placed], cells: list[Placed], x: str) -> list[str]:
        """The names of initial_h and initial_c."""
        fields = cells[0].cell.initial_carry(cells[0].params)._fields
        if self.initial_states:
            names = [f"initial_{field}_{k}" for field in fields]
            shape = (len(ways), "batch", cells[0].cell.hidden_size)
            self.inputs += [(name, self.dtype, shape) for name in names]
            return names
        if not any(isinstance(way.cell, LearnedCarry) for way in ways):
            return [""] * len(fields)
        carries = [
            way.params.carry if isinstance(way.cell, LearnedCarry) else inner.cell.initial_carry(inner.params)
            for way, inner in zip(ways, cells, strict=True)
        ]
        batch = self.add("Gather", self.add("Shape", x), self.integers(1))
        size = cells[0].cell.hidden_size
        shape = self.add("Concat", self.integers(len(ways)), batch, self.integers(size), axis=0)
        rows = [np.stack([np.asarray(getattr(carry, field)) for carry in carries])[:, None] for field in fields]
        return [self.add("Expand", self.weight(row), shape) for row in rows]


def _inner(way: Placed) -> Placed:
    """The cell of one direction."""
    if isinstance(way.cell, LearnedCarry):
        way = way.part("cell", way.params.cell)
    if not isinstance(way.cell, (Elman, GRU, LSTM)):
        way.refuse("ONNX has no operator for this cell here")
    return way


def _weights(way: Placed) -> tuple[str, Named, list[Activation], Named]:
    """The operator of one direction, its attributes, its activations, and its arrays W, R, B, P, whose shapes agree."""
    cell, params = way.cell, way.params
    p = None
    match cell:
        case Elman():
            op, attributes, specs = "RNN", {"clip": cell.gate_clip}, [cell.activation]
        case GRU():
            way.only("reset_after", "gate_clip", "gate_activation", "activation", why=_LACKS)
            op, specs = "GRU", [cell.gate_activation, cell.activation]
            attributes = {"linear_before_reset": int(cell.reset_after), "clip": cell.gate_clip}
        case LSTM():
            options = ("peephole", "coupled", "gate_clip", "gate_activation", "activation", "output_activation")
            way.only(*options, why=_LACKS)
            op, specs = "LSTM", [cell.gate_activation, cell.activation, cell.output_activation]
            attributes = {"input_forget": int(bool(cell.coupled)), "clip": cell.gate_clip}
            p = None if params.peephole is None else params.peephole.reshape(-1)
        case _:
            raise AssertionError
    w, r, b, b_h = params.w_x, params.w_h, params.b, None
    if op == "GRU" and params.b_hn is not None:
        b = np.zeros_like(w[0]) if b is None else b
        b_h = recurrent_bias(params.b_hn)
    if isinstance(cell, LSTM) and cell.coupled:
        sign = 1 if cell.coupled == "input" else -1
        if sign < 0 and not odd_about_half(specs[0]):
            way.refuse(f"i = 1 − f is ONNX's f = 1 − i for φ(−x) = 1 − φ(x), not for {specs[0]!r}; use coupled='input'")
        w, r, b = (None if a is None else _uncoupled(a, 3, sign) for a in (w, r, b))
        p = None if p is None else _uncoupled(p, 2, sign)

    theirs = ONNX[op].write
    if b is not None:
        b = np.concatenate([theirs(b), np.zeros_like(b) if b_h is None else theirs(b_h)])
    p = None if p is None else reorder(p, PEEPHOLES, ONNX_PEEPHOLES)
    arrays = {"W": theirs(w).T, "R": theirs(r).T, "B": b, "P": p}
    for spec in specs:
        found = there(spec, "onnx")
        if found is None or found[0] not in FUNCTIONS:
            way.refuse(f"ONNX has no activation {spec!r}")
    return op, attributes, specs, arrays


def _uncoupled(array: np.ndarray, gates: int, sign: int) -> np.ndarray:
    """The gates with i and f apart: i is the first of them, up to its sign, and f is zeros, since it follows from i."""
    first, *rest = np.split(array, gates, axis=-1)
    return np.concatenate([sign * first, np.zeros_like(first), *rest], axis=-1)


def odd_about_half(spec: Activation) -> bool:
    """Whether φ(−x) = 1 − φ(x)."""
    match spec:
        case "sigmoid" | "hard_sigmoid" | "keras_hard_sigmoid" | ("hard_sigmoid", _):
            return True
        case ("hard_sigmoid" | "affine", _, beta):
            return beta == 0.5
    return False


def _activations(specs: list[list[Activation]]) -> Named:
    """The attributes that describe the activations of all directions."""
    flat = [found for each in specs for spec in each if (found := there(spec, "onnx"))]
    attributes: Named = {"activations": [name for name, _ in flat]}
    if any(numbers != FUNCTIONS[name] or name in WITHOUT_DEFAULTS for name, numbers in flat):
        for key in ("alpha", "beta"):
            attributes[f"activation_{key}"] = [numbers[key] for _, numbers in flat if key in numbers]
    return {name: value for name, value in attributes.items() if value}
