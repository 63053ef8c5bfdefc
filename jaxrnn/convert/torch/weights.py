"""The weights of torch modules: their names, and how they become the params of a cell."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxrnn.cell import Cell, output_size
from jaxrnn.cells.elman import Elman, ElmanParams
from jaxrnn.cells.gru import GRU, GRUParams
from jaxrnn.cells.lstm import LSTM, LSTMParams
from jaxrnn.compose.parallel import Bidirectional, BidirectionalPair
from jaxrnn.compose.stack import Stack
from jaxrnn.convert.activations import there
from jaxrnn.convert.arrays import Arrays, ones
from jaxrnn.convert.cells import Placed
from jaxrnn.convert.gates import TORCH, gru_biases, one_bias, recurrent_bias
from jaxrnn.layers import Apply, Dropout, Embed, EmbedParams, LayerNorm, LayerNormParams, Linear, LinearParams
from jaxrnn.typing import DTypeLike, Named, PyTree, Size

# The blocks of rows in weight_ih and weight_hh: i f g o, and r z n.
GATES = {kind: len(gates.order) for kind, gates in TORCH.items()}  # in our order, all of them

KINDS: dict[type[Cell], str] = {Elman: "RNN", GRU: "GRU", LSTM: "LSTM"}


class Part(NamedTuple):
    """One torch module, with or without weights, and the cell that computes the same function.

    name: The prefix of the names of its arrays, with the dot: "encoder.lstm.", or "". layered: Whether the names of the
    arrays of a recurrent module end in "_l0", "_l0_reverse", ...; those of an `LSTMCell` do not. bias: Whether the
    module has biases. affine: Whether the module has a weight, if it is a LayerNorm.
    """

    name: str
    cell: Cell
    layered: bool = True
    bias: bool = True
    affine: bool = True


def recurrent(
    kind: str,
    input_size: int,
    hidden_size: int,
    *,
    activation: str = "tanh",
    projection_size: int | None = None,
    bidirectional: bool = False,
    layers: int = 1,
    dropout: float = 0.0,
) -> Cell:
    """The cell of an nn.RNN, nn.GRU or nn.LSTM."""
    match kind:
        case "RNN":
            cell = Elman(input_size, hidden_size, activation=activation)
        case "GRU":
            cell = GRU(input_size, hidden_size)
        case _:
            cell = LSTM(input_size, hidden_size, projection_size=projection_size)
    between = Dropout(dropout) if dropout and layers > 1 else None
    return repeated(Bidirectional(cell, cell) if bidirectional else cell, layers, between)


def repeated(first: Cell, layers: int, dropout: Dropout | None) -> Cell:
    """As many layers as torch puts into one module. The lowest is `first`, and dropout is between the layers."""
    if layers == 1:
        return first
    above = _reading(first, output_size(first))
    between = (dropout,) if dropout else ()
    return Stack((first, *(*between, above) * (layers - 1)))


def _reading(cell: Cell, size: Size) -> Cell:
    match cell:
        case Bidirectional(forward=forward, backward=backward):
            cells = {"forward": _reading(forward, size), "backward": _reading(backward, size)}
            return dataclasses.replace(cell, **cells)
    return dataclasses.replace(cell, input_size=size)


def is_recurrent(cell: Cell) -> bool:
    """Whether the cell can be a layer of one of torch's recurrent modules."""
    match cell:
        case Bidirectional(forward=forward, backward=backward, merge="concat"):
            return type(forward) in KINDS and type(backward) in KINDS
    return type(cell) in KINDS


def read_part(part: Part, arrays: Arrays, dtype: DTypeLike) -> PyTree:
    """The params of `part.cell`. `dtype` is used for arrays that torch leaves out."""

    def vector(name, size, wanted):
        return arrays.take(f"{part.name}{name}", size) if wanted else None

    match part.cell:
        case Embed(vocabulary, size):
            return EmbedParams(arrays.take(f"{part.name}weight", vocabulary, size))
        case Linear(below, size):
            return LinearParams(arrays.take(f"{part.name}weight", size, below).T, vector("bias", size, part.bias))
        case LayerNorm(size):
            scale = vector("weight", size, part.affine)
            scale = ones(size, dtype) if scale is None else scale
            return LayerNormParams(scale, vector("bias", size, part.bias))
        case Dropout() | Apply():
            return ()
        case Stack(cells):
            number = itertools.count()
            return tuple(
                () if isinstance(cell, Dropout) else _layer(part, arrays, cell, next(number)) for cell in cells
            )
    return _layer(part, arrays, part.cell, 0)


def _layer(part: Part, arrays: Arrays, cell: Cell, number: int) -> PyTree:
    suffix = f"_l{number}" if part.layered else ""
    match cell:
        case Bidirectional(forward=forward, backward=backward):
            return BidirectionalPair(
                _direction(part, arrays, forward, suffix), _direction(part, arrays, backward, f"{suffix}_reverse")
            )
    return _direction(part, arrays, cell, suffix)


def _direction(part: Part, arrays: Arrays, cell: Any, suffix: str) -> PyTree:
    def take(name, *shape):
        return arrays.take(f"{part.name}{name}{suffix}", *shape)

    hidden = cell.hidden_size
    rows = GATES[KINDS[type(cell)]] * hidden
    w_x, w_h = take("weight_ih", rows, cell.input_size).T, take("weight_hh", rows, cell.output_size).T
    b_x, b_h = (take("bias_ih", rows), take("bias_hh", rows)) if part.bias else (None, None)
    match cell:
        case GRU():
            if b_x is None or b_h is None:
                return GRUParams(w_x, w_h, None)
            return GRUParams(w_x, w_h, *gru_biases(f"{part.name}bias_ih{suffix}", b_x, b_h))
    b = None if b_x is None or b_h is None else one_bias(f"{part.name}bias_ih{suffix}", b_x, b_h)
    if isinstance(cell, Elman):
        return ElmanParams(w_x, w_h, b)
    return LSTMParams(
        w_x, w_h, b, w_p=take("weight_hr", cell.projection_size, hidden).T if cell.projection_size else None
    )


def write_part(name: str, layered: bool, cells: list[Placed]) -> dict[str, np.ndarray]:
    """The arrays of the torch module `name`. `cells` are the layers of a recurrent module, or the cell of another one.

    Raises:
      ValueError: If torch has no counterpart for a cell. The message names the place.
    """
    found = [
        (suffix, _arrays(each))
        for number, placed in enumerate(cells)
        for suffix, each in _directions(placed, f"_l{number}" if layered else "")
    ]
    if any("bias_ih" in arrays for _, arrays in found):
        # A recurrent module has biases everywhere or nowhere.
        found = [(suffix, _zero_biases(arrays) | arrays) for suffix, arrays in found]
    return {f"{name}{key}{suffix}": array for suffix, arrays in found for key, array in arrays.items()}


def _zero_biases(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    zeros = np.zeros(arrays["weight_ih"].shape[0], arrays["weight_ih"].dtype)
    return {"bias_ih": zeros, "bias_hh": zeros}


def _directions(placed: Placed, suffix: str) -> list[tuple[str, Placed]]:
    """The cells of one layer, each with the suffix of the names of its arrays."""
    match placed.cell:
        case Bidirectional(forward=forward, backward=backward):
            placed.only("forward", "backward", why="torch concatenates both directions")
            directions = [placed.part(way, getattr(placed.params, way)) for way in ("forward", "backward")]
            for direction in directions:
                if type(direction.cell) not in KINDS:
                    direction.refuse("torch has no module that computes this")
            if forward != backward:
                placed.refuse("torch's two directions are of one kind and size")
            return [(suffix, directions[0]), (f"{suffix}_reverse", directions[1])]
    return [(suffix if type(placed.cell) in KINDS else "", placed)]


def _arrays(placed: Placed) -> dict[str, np.ndarray]:
    cell, params = placed.cell, placed.params
    if type(cell) not in WRITERS:
        placed.refuse("torch has no module that computes this")
    return {key: array for key, array in WRITERS[type(cell)](placed, params).items() if array is not None}


def _dropout(placed: Placed, params: PyTree) -> Named:
    placed.only("rate", why="torch's Dropout draws at each step")
    return {}


def _apply(placed: Placed, params: PyTree) -> Named:
    if there(placed.cell.fn, "torch") is None:
        placed.refuse("torch has no module of this function")
    return {}


def _elman(placed: Placed, params: ElmanParams) -> Named:
    if placed.cell.activation not in ("tanh", "relu"):
        placed.refuse("torch's RNN has tanh and relu only")
    placed.only("activation", why="torch's RNN has no such option")
    return _weights(params) | _biases(params, np.zeros_like(params.w_x[0]))


def _gru(placed: Placed, params: GRUParams) -> Named:
    placed.only("input_size", "hidden_size", why="torch's GRU resets after the product and has no such option")
    b_h = np.zeros_like(params.w_x[0]) if params.b_hn is None else recurrent_bias(params.b_hn)
    return _weights(params) | _biases(params, b_h)


def _lstm(placed: Placed, params: LSTMParams) -> Named:
    placed.only("input_size", "hidden_size", "projection_size", why="torch's LSTM has no such option")
    w_p = {} if params.w_p is None else {"weight_hr": params.w_p.T}
    return _weights(params) | _biases(params, np.zeros_like(params.w_x[0])) | w_p


def _weights(params: PyTree) -> Named:
    return {"weight_ih": params.w_x.T, "weight_hh": params.w_h.T}


def _biases(params: PyTree, b_h: np.ndarray) -> Named:
    if params.b is None and not b_h.any():
        return {}
    return {"bias_ih": np.zeros_like(b_h) if params.b is None else params.b, "bias_hh": b_h}


# What torch calls the params, which come as NumPy arrays.
WRITERS: dict[type[Cell], Callable[[Placed, PyTree], Named]] = {
    Elman: _elman,
    GRU: _gru,
    LSTM: _lstm,
    Embed: lambda placed, params: {"weight": params.w},
    Linear: lambda placed, params: {"weight": params.w.T, "bias": params.b},
    LayerNorm: lambda placed, params: {"weight": params.scale, "bias": params.b},
    Dropout: _dropout,
    Apply: _apply,
}
