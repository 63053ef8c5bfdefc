"""Converts the recurrent operators of ONNX to cells."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxrnn.cells.activations import ACTIVATIONS, Activation
from jaxrnn.cells.elman import Elman, ElmanParams
from jaxrnn.cells.gru import GRU, GRUParams
from jaxrnn.cells.lstm import LSTM, LSTMParams
from jaxrnn.convert.activations import KNOWN, here
from jaxrnn.convert.arrays import Arrays
from jaxrnn.convert.gates import ONNX, ONNX_PEEPHOLES, PEEPHOLES, Gates, gru_biases, one_bias, reorder
from jaxrnn.convert.onnx.read import Node
from jaxrnn.typing import Named, PyTree, WithParams

# The activations, and their numbers with the defaults of the specification.
FUNCTIONS: dict[str, dict[str, float]] = {
    row.onnx.name: dict(zip(row.onnx.numbers, ACTIVATIONS[ours][1], strict=True))
    for ours, row in KNOWN.items()
    if row.rnn and row.onnx and not row.onnx.fixed
}
_BY_LOWER_CASE = {name.lower(): name for name in FUNCTIONS}
# The specification gives these no defaults, or others than onnxruntime.
WITHOUT_DEFAULTS = ("Affine", "ScaledTanh", "ThresholdedRelu")

DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}


class Operator(NamedTuple):
    """The gates of an operator, the activations of one direction, and its attributes besides the common ones."""

    gates: Gates
    activations: tuple[str, ...]
    attributes: tuple[str, ...]


OPERATORS = {
    "RNN": Operator(ONNX["RNN"], ("Tanh",), ()),
    "GRU": Operator(ONNX["GRU"], ("Sigmoid", "Tanh"), ("linear_before_reset",)),
    "LSTM": Operator(ONNX["LSTM"], ("Sigmoid", "Tanh", "Tanh"), ("input_forget",)),
}
_COMMON = ("activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size", "layout")


def reversed_directions(node: Node) -> tuple[bool, ...]:
    """For each direction, whether it runs backwards."""
    direction = node.get("direction", "forward")
    if direction not in DIRECTIONS:
        node.refuse(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    return DIRECTIONS[direction]


def cells(node: Node, arrays: Named) -> list[WithParams]:
    """The cell and the params (NumPy arrays) of each direction. `arrays` holds W, R, and B and P if they are given."""
    operator = OPERATORS[node.op]
    node.only(*_COMMON, *operator.attributes)
    weights = Arrays(node.place, arrays)
    count, gates = len(reversed_directions(node)), len(operator.gates.order)
    shape = weights.shape("R")
    hidden = shape[-1] if shape else 0
    if node.get("hidden_size", hidden) != hidden:
        node.refuse(f"hidden_size is {node.get('hidden_size', 0)}, and R has shape {shape}")
    if 0 in shape or 0 in weights.shape("W"):
        node.refuse(f"expected sizes of at least 1, got W {weights.shape('W')} and R {shape}")
    # In NumPy, which compiles nothing.
    w = np.asarray(weights.take("W", count, gates * hidden, None))
    r = np.asarray(weights.take("R", count, gates * hidden, hidden))
    b = np.asarray(weights.take("B", count, 2 * gates * hidden)) if "B" in weights else None
    p = np.asarray(weights.take("P", count, 3 * hidden)) if "P" in weights else None
    weights.finish()
    specs = _activations(node, count)
    make = {"RNN": _rnn, "GRU": _gru, "LSTM": _lstm}[node.op]

    ours = operator.gates.read

    def one(d):
        biases = None if b is None else (ours(b[d][: gates * hidden]), ours(b[d][gates * hidden :]))
        return make(node, specs[d], ours(w[d].T), ours(r[d].T), biases, None if p is None else p[d])

    return [one(d) for d in range(count)]


def _rnn(node, specs, w, r, biases, p):
    b = None if biases is None else one_bias(f"{node.place}: B", *biases)
    return Elman(*w.shape, activation=specs[0], gate_clip=_clip(node)), ElmanParams(w, r, b)


def _gru(node, specs, w, r, biases, p):
    hidden, after = r.shape[0], node.get("linear_before_reset", 0) != 0
    b: PyTree = None
    b_hn: PyTree = None
    if biases is not None and after:
        b, b_hn = gru_biases(f"{node.place}: B", *biases)
    elif biases is not None:
        b = one_bias(f"{node.place}: B", *biases)
    cell = GRU(
        w.shape[0], hidden, reset_after=after, gate_clip=_clip(node), gate_activation=specs[0], activation=specs[1]
    )
    return cell, GRUParams(w, r, b, b_hn)


def _lstm(node, specs, w, r, biases, p):
    coupled = node.get("input_forget", 0) != 0
    b = None if biases is None else one_bias(f"{node.place}: B", *biases)
    peephole = None if p is None else reorder(p, ONNX_PEEPHOLES, "io" if coupled else PEEPHOLES)
    if coupled:
        w, r = reorder(w, "ifgo", "igo"), reorder(r, "ifgo", "igo")
        b = None if b is None else reorder(b, "ifgo", "igo")
    cell = LSTM(
        w.shape[0],
        r.shape[0],
        peephole=peephole is not None,
        coupled="input" if coupled else False,
        gate_clip=_clip(node),
        gate_activation=specs[0],
        activation=specs[1],
        output_activation=specs[2],
    )
    return cell, LSTMParams(w, r, b, None if peephole is None else peephole.reshape(-1, r.shape[0]))


def _clip(node: Node) -> float | None:
    if "clip" not in node.attributes:
        return None
    clip = node.get("clip", 0.0)
    if clip <= 0:
        node.refuse(f"clip: expected a positive number, got {clip}")
    return clip


def _activations(node: Node, count: int) -> list[tuple[Activation, ...]]:
    """The activations of each direction. Alphas and betas are given, in order, to the activations that take one."""
    default = OPERATORS[node.op].activations
    given = node.numbers("activations", default * count)
    if len(given) != len(default) * count:
        node.refuse(f"activations: expected {len(default) * count} names, got {given}")
    unknown = [name for name in given if name.lower() not in _BY_LOWER_CASE]
    if unknown:
        node.refuse(f"activations: expected names of {', '.join(FUNCTIONS)}, got {unknown[0]!r}")
    names = [_BY_LOWER_CASE[name.lower()] for name in given]
    numbers = [_handed_out(node, key, names) for key in ("alpha", "beta")]
    specs = [_spec(node, *each) for each in zip(names, *numbers, strict=True)]
    return [tuple(specs[d * len(default) : (d + 1) * len(default)]) for d in range(count)]


def _handed_out(node: Node, key: str, names: list[str]) -> list[float | None]:
    """The alpha or the beta of every activation, or None if it is not given or not used."""
    takes, attribute = [key in FUNCTIONS[name] for name in names], f"activation_{key}"
    given = node.numbers(attribute, ()) if attribute in node.attributes else ()
    if not given:
        return [None] * len(names)
    if len(given) != sum(takes):
        node.refuse(f"{attribute}: expected one number for each of the {sum(takes)} that take one, got {given}")
    left = iter(given)
    return [next(left) if takes_one else None for takes_one in takes]


def _spec(node: Node, name: str, alpha: float | None, beta: float | None) -> Activation:
    given = {key: number for key, number in (("alpha", alpha), ("beta", beta)) if number is not None}
    if len(given) < len(FUNCTIONS[name]) and name in WITHOUT_DEFAULTS:
        node.refuse(
            f"activations: {name} needs {len(FUNCTIONS[name])} numbers, activation_alpha and _beta, got {given}"
        )
    # Numbers of the specification where only one of two is given.
    spec = here("onnx", name, FUNCTIONS[name] | given)
    return node.refuse(f"activations: expected numbers for {name}, got {given}") if spec is None else spec
