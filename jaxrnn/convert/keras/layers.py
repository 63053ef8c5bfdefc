"""Reads Keras' layers one by one: each reader reads the fields of a layer and takes its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np

from jaxrnn.cell import Cell
from jaxrnn.cells.conv_lstm import ConvLSTM, ConvLSTMParams
from jaxrnn.cells.elman import Elman, ElmanParams
from jaxrnn.cells.gru import GRU, GRUParams
from jaxrnn.cells.lstm import LSTM, LSTMParams
from jaxrnn.compose.noise import RecurrentDropout
from jaxrnn.convert.arrays import Arrays, ones
from jaxrnn.convert.gates import KERAS, KERAS_1, gru_biases, one_bias
from jaxrnn.convert.keras.config import ACTIVATION_LAYERS, REQUIRED, Fields, is_size, list_of
from jaxrnn.layers import Apply, Dropout, LayerNorm, LayerNormParams, Linear, LinearParams
from jaxrnn.typing import Foreign, PyTree, WithParams


class Weights:
    """The list of weights, which are taken in order."""

    def __init__(self, weights: PyTree):
        self.arrays = Arrays("weights", {f"[{k}]": array for k, array in enumerate(weights)})
        self.dtype = np.asarray(weights[0]).dtype if weights else np.float32
        self.taken, self.number = 0, len(weights)

    def take(self, fields: Fields, name: str, *shape: int | None) -> PyTree:
        if self.taken == self.number:
            raise ValueError(f"{fields.place}: {name} is missing: there are only {self.number} weights")
        place = f"[{self.taken}]"
        self.taken += 1
        try:
            return self.arrays.take(place, *shape)
        except ValueError as error:
            raise ValueError(f"{fields.place}: {name}: {error}") from error

    def finish(self) -> None:
        self.arrays.finish()


Pieces = list[tuple[Cell, Any]]


def _simple(fields: Fields, weights: Weights) -> WithParams:
    h, φ = fields.size("units"), fields.activation("activation", "tanh", elementwise=True)
    w_x, w_h = weights.take(fields, "kernel", None, h), weights.take(fields, "recurrent_kernel", h, h)
    b = weights.take(fields, "bias", h) if fields.flag("use_bias", True) else None
    return Elman(w_x.shape[0], h, activation=φ), ElmanParams(w_x, w_h, b)


class _Kernels(NamedTuple):
    """The weights of gates in our order, one block of columns for each. b_x and b_h are None if the layer has none."""

    w_x: PyTree
    w_h: PyTree
    b_x: PyTree
    b_h: PyTree = None


def _kernels(fields: Fields, weights: Weights, h: int, kind: str, *, two_biases: bool) -> _Kernels:
    """The weights of a gated layer. `kind` is one of the kinds in the table."""
    gates = KERAS[kind]
    n = len(gates.order) * h
    if fields.version < (2, 0) and fields.take("implementation", "cpu") != "gpu":
        rows, each = None, []
        for gate in KERAS_1[kind].order:
            shapes = {"W": (rows, h), "U": (h, h), "b": (h,)}
            each.append([weights.take(fields, f"{name}_{gate}", *shape) for name, shape in shapes.items()])
            rows = each[0][0].shape[0]
        whole = (np.concatenate(arrays, axis=-1) for arrays in zip(*each, strict=True))
        return _Kernels(*map(KERAS_1[kind].read, whole))
    w_x, w_h = weights.take(fields, "kernel", None, n), weights.take(fields, "recurrent_kernel", h, n)
    if fields.kind.startswith("CuDNN"):
        b_x, b_h = weights.take(fields, "bias", 2 * n).reshape(2, n)
        w_x, w_h = (_from_cudnn(kernel, len(gates.order)) for kernel in (w_x, w_h))
        return _Kernels(*map(gates.read, (w_x, w_h, b_x, b_h)))
    if not fields.flag("use_bias", True):
        return _Kernels(gates.read(w_x), gates.read(w_h), None)
    biases = weights.take(fields, "bias", 2, n) if two_biases else [weights.take(fields, "bias", n)]
    return _Kernels(*map(gates.read, (w_x, w_h, *biases)))


def _from_cudnn(kernel: np.ndarray, gates: int) -> PyTree:
    """The kernel as a matrix that multiplies from the right. In cuDNN the numbers of a gate are an (out, in) matrix."""
    rows, columns = kernel.shape[0], kernel.shape[1] // gates
    return np.concatenate([each.reshape(columns, rows).T for each in np.split(kernel, gates, axis=1)], axis=1)


def _lstm(fields: Fields, weights: Weights) -> WithParams:
    h, ψ = fields.size("units"), fields.activation("activation", "tanh", elementwise=True)
    φ = fields.activation("recurrent_activation", "sigmoid", elementwise=True)
    w_x, w_h, b_x, b_h = _kernels(fields, weights, h, "LSTM", two_biases=False)
    cell = LSTM(w_x.shape[0], h, gate_activation=φ, activation=ψ, output_activation=ψ)
    return cell, LSTMParams(w_x, w_h, b_x if b_h is None else one_bias(f"{fields.place}: bias", b_x, b_h))


def _gru(fields: Fields, weights: Weights) -> WithParams:
    h, ψ = fields.size("units"), fields.activation("activation", "tanh", elementwise=True)
    φ = fields.activation("recurrent_activation", "sigmoid", elementwise=True)
    after = fields.flag("reset_after", True)
    w_x, w_h, b, b_h = _kernels(fields, weights, h, "GRU", two_biases=after)
    b, b_hn = (b, None) if b_h is None else gru_biases(f"{fields.place}: bias", b, b_h)
    cell = GRU(w_x.shape[0], h, reset_after=after, gate_activation=φ, activation=ψ)
    return cell, GRUParams(w_x, w_h, b, b_hn)


def _conv_lstm(dimensions: int) -> Callable[[Fields, Weights, PyTree], WithParams]:
    def read(fields: Fields, weights: Weights, shape: Any) -> WithParams:
        h, k = fields.size("filters"), fields.sizes("kernel_size", dimensions)
        fields.channels_last()
        ψ = fields.activation("activation", "tanh", elementwise=True)
        φ = fields.activation("recurrent_activation", "sigmoid", elementwise=True)
        w_x = weights.take(fields, "kernel", *k, None, 4 * h)
        w_h = weights.take(fields, "recurrent_kernel", *k, h, 4 * h)
        b = weights.take(fields, "bias", 4 * h) if fields.flag("use_bias", True) else None
        if shape is None or not all(map(is_size, shape[2:-1])):
            raise ValueError(
                f"{fields.place}: its spatial shape must be known: from an InputLayer, or from the build_config that "
                f"keras.saving.serialize_keras_object gives; got {short(shape)}"
            )
        cell = ConvLSTM(
            tuple(shape[2:-1]),
            w_x.shape[-2],
            h,
            kernel_size=k,
            strides=fields.sizes("strides", dimensions, 1),
            dilation=fields.sizes("dilation_rate", dimensions, 1),
            padding=fields.choice("padding", "valid", {"valid": "VALID", "same": "SAME"}),
            gate_activation=φ,
            activation=ψ,
        )
        return cell, ConvLSTMParams(w_x, w_h, b)

    return read


STEPS = {"SimpleRNN": _simple, "LSTM": _lstm, "GRU": _gru}
CELLS = {f"{kind}Cell": read for kind, read in STEPS.items()}
LAYERS = STEPS | {"CuDNNLSTM": _lstm, "CuDNNGRU": _gru}
CONVOLUTIONS = {f"ConvLSTM{n}D": _conv_lstm(n) for n in (1, 2, 3)}
POOLINGS = {"GlobalAveragePooling1D": "mean", "GlobalMaxPooling1D": "max"}
RECURRENT = {*LAYERS, *CONVOLUTIONS, "RNN"}


def _noisy(fields: Fields, cell: WithParams) -> Pieces:
    """The cell with its dropouts, which are the last fields to be read."""
    inputs, recurrent = fields.rate("dropout", 0.0), fields.rate("recurrent_dropout", 0.0)
    fields.finish()
    cell = (RecurrentDropout(cell[0], recurrent), cell[1]) if recurrent else cell
    return [(Dropout(inputs, per_sequence=True), ()), cell] if inputs else [cell]


class Recurrent(NamedTuple):
    """A recurrent layer: its cells, one above another, and the options with which it runs them."""

    pieces: Pieces
    go_backwards: bool
    return_sequences: bool
    zero_output: bool


def read_recurrent(fields: Fields, weights: Weights, shape: Any) -> Recurrent:
    """A layer with time as cells, one above another. `shape` is the shape of its input in Keras, if it is known."""
    options = (fields.flag("go_backwards", False), fields.flag("return_sequences", False))
    zero_output, unroll = fields.flag("zero_output_for_mask", False), fields.flag("unroll", False)
    if fields.kind in CONVOLUTIONS:
        pieces = _noisy(fields, CONVOLUTIONS[fields.kind](fields, weights, shape))
    elif fields.kind in LAYERS:
        pieces = _noisy(fields, LAYERS[fields.kind](fields, weights))
    else:
        pieces = [piece for inner in _cells(fields) for piece in _noisy(inner, CELLS[inner.kind](inner, weights))]
        fields.finish()
    return Recurrent(pieces, *options, zero_output and not unroll)  # which Keras' unrolled loop does not know


def _cells(fields: Fields) -> list[Fields]:
    """The cells in an RNN layer."""
    cell = fields.take("cell")
    if isinstance(cell, Mapping) and cell.get("class_name") == "StackedRNNCells":
        inner = fields.inside("cell", cell)
        cell = list_of(inner, "cells")
        inner.finish()
    each = cell if isinstance(cell, (list, tuple)) else [cell]
    if not each:
        fields.refuse("cell", cell, "at least one cell")
    found = [fields.inside(f"cells[{k}]", inner) for k, inner in enumerate(each)]
    for inner in found:
        if inner.kind not in CELLS:
            raise ValueError(f"{inner.place}: expected one of {sorted(CELLS)}")
    return found


def _dense(fields: Fields, weights: Weights, shape: Any, timed: bool) -> Pieces:
    o, φ = fields.size("units"), fields.activation("activation", None, elementwise=False)
    w = weights.take(fields, "kernel", None, o)
    b = weights.take(fields, "bias", o) if fields.flag("use_bias", True) else None
    linear: Pieces = [(Linear(w.shape[0], o), LinearParams(w, b))]
    return linear if φ == "identity" else [*linear, (Apply(φ), ())]


def _layer_norm(fields: Fields, weights: Weights, shape: Any, timed: bool) -> Pieces:
    axis = fields.take("axis", -1)
    axis = axis[0] if isinstance(axis, (list, tuple)) and len(axis) == 1 else axis
    if isinstance(axis, bool) or axis not in ((-1,) if shape is None else (-1, len(shape) - 1)):
        fields.refuse("axis", axis, "-1, the last axis")
    scale, center = fields.flag("scale", True), fields.flag("center", True)
    gamma = weights.take(fields, "gamma", None) if scale else None
    beta = weights.take(fields, "beta", None if gamma is None else gamma.shape[0]) if center else None
    known = [array.shape[0] for array in (gamma, beta) if array is not None] or list(shape or ())[-1:]
    if not known or not is_size(known[0]):
        raise ValueError(f"{fields.place}: without scale and center its size must be known from the input's shape")
    if gamma is None:
        gamma = ones(known[0], weights.dtype if beta is None else beta.dtype)
    epsilon = fields.number("epsilon", 1e-3)
    if epsilon <= 0:
        fields.refuse("epsilon", epsilon, "a positive number")
    return [(LayerNorm(known[0], epsilon=epsilon), LayerNormParams(gamma, beta))]


def _dropout(fields: Fields, weights: Weights, shape: Any, timed: bool) -> Pieces:
    rate, noise = fields.rate("rate"), fields.take("noise_shape", None)
    if noise is None:
        return [(Dropout(rate), ())]
    match list(noise) if isinstance(noise, (list, tuple)) else noise:
        case [None, 1, *rest] if timed and rest and not any(rest) and (shape is None or len(shape) == len(rest) + 2):
            return [(Dropout(rate, per_sequence=True), ())]
        case [None, *rest] if not any(rest):
            return [(Dropout(rate), ())]
    return fields.refuse("noise_shape", noise, "None, or (None, 1, None): one draw for all steps")


def spatial_dropout(fields: Fields, weights: Weights, shape: Any, timed: bool) -> Pieces:
    """SpatialDropout1D, which drops a feature at all steps or at none."""
    if not timed or (shape is not None and len(shape) != 3):
        fields.refuse("input", shape, "(batch, time, features)")
    return [(Dropout(fields.rate("rate"), per_sequence=True), ())]


def _activation(fields: Fields, weights: Weights, shape: Any, timed: bool) -> Pieces:
    if fields.kind in ACTIVATION_LAYERS:
        return [(Apply(ACTIVATION_LAYERS[fields.kind](fields)), ())]
    return [(Apply(fields.activation("activation", REQUIRED, elementwise=False)), ())]


POINTWISE = {
    "Dense": _dense,
    "LayerNormalization": _layer_norm,
    "Dropout": _dropout,
    "Activation": _activation,
    **dict.fromkeys(ACTIVATION_LAYERS, _activation),
}


def directions(fields: Fields, layer: Foreign, backward: Foreign) -> tuple[Fields, Fields]:
    """The two layers of a Bidirectional. If there is no backward layer, the forward one is run the other way."""
    if backward is None and isinstance(layer, Mapping) and isinstance(layer.get("config"), Mapping):
        backward = {
            **layer,
            "config": {**layer["config"], "go_backwards": not layer["config"].get("go_backwards", False)},
        }
    both = fields.inside("layer", layer), fields.inside("backward_layer", backward)
    for each in both:
        if each.kind not in RECURRENT:
            raise ValueError(f"{each.place}: expected one of {sorted(RECURRENT)} in Bidirectional")
    return both
