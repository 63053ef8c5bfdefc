"""Converts cells to Keras 3 models: a config for `keras.Sequential.from_config`, and the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrnn.cell import Cell, input_size, output_size
from jaxrnn.cells.activations import Activation
from jaxrnn.cells.conv_lstm import ConvLSTM
from jaxrnn.cells.elman import Elman
from jaxrnn.cells.gru import GRU
from jaxrnn.cells.lstm import LSTM
from jaxrnn.compose.noise import RecurrentDropout
from jaxrnn.compose.parallel import Bidirectional
from jaxrnn.compose.pool import Pool
from jaxrnn.compose.repeat import Repeat
from jaxrnn.compose.wrap import Backward
from jaxrnn.convert.activations import canonical, there
from jaxrnn.convert.arrays import Arrays
from jaxrnn.convert.cells import Placed, layers, placed
from jaxrnn.convert.gates import KERAS, recurrent_bias
from jaxrnn.convert.keras.config import NAMES
from jaxrnn.convert.keras.layers import POOLINGS
from jaxrnn.layers import Apply, Dropout, Embed, LayerNorm, Linear
from jaxrnn.typing import Named, PyTree

LACKS = "Keras has no counterpart"
MERGES = {"concat": "concat", "sum": "sum", "mul": "mul", "average": "ave", "tuple": None}


def to_keras(cell: Cell, params: PyTree, *, mask_value: float | None = None) -> tuple[Named, list[np.ndarray]]:
    """Converts a cell to a Keras 3 model: `model = keras.Sequential.from_config(config)`, `model.set_weights(weights)`.

    The model takes (batch, time, ...), or tokens (batch, time). At valid steps it returns the same outputs as
    `jaxrnn.scan(..., time_axis=1)` from the initial carry. For a cell that runs in the other direction, the sequence is
    reversed in Keras. If it is reversed an odd number of times (`Backward` at the end), the model's outputs are in the
    opposite order of time.

    Args:
      cell: An Embed, Linear, LayerNorm, Apply, Dropout, Elman, LSTM, GRU or ConvLSTM, RecurrentDropout around them,
        Backward, Bidirectional, Pool, or a Stack of these.
      params: Its params, as `cell.init` gives them.
      mask_value: Steps of xs are masked if they hold only this value: the model begins with Masking, or its Embedding
        has `mask_zero=True` (for 0). For a model of `from_keras`, it is `model.mask.value`.

    Returns:
      The config, a dict that JSON can hold, and the weights, in the dtype of the params.

    Raises:
      ValueError: If Keras has no counterpart. The message names the place in the cell.
      TypeError: If Keras has no counterpart. The message names the place in the cell.

    Examples:
      >>> import jax, jaxrnn
      >>> cell = jaxrnn.Stack((jaxrnn.Embed(10, 3), jaxrnn.Pool(jaxrnn.LSTM(3, 4)), jaxrnn.Linear(4, 2)))
      >>> config, weights = to_keras(cell, cell.init(jax.random.key(0)), mask_value=0)
      >>> [layer["class_name"] for layer in config["layers"]], [w.shape for w in weights]
      (['InputLayer', 'Embedding', 'LSTM', 'Dense'], [(10, 3), (3, 16), (4, 16), (16,), (4, 2), (2,)])
    """
    model = placed(cell, params)
    named = jax.tree_util.tree_leaves_with_path(model.params)
    Arrays("params", {jax.tree_util.keystr(path) or "array": leaf for path, leaf in named})
    writer = _Writer(str(named[0][1].dtype) if named else "float32")
    writer.begin(model, mask_value)
    for run in _runs(model):
        writer.write(run)
    return {"name": "sequential", "layers": writer.layers}, writer.weights


class _Run(NamedTuple):
    """A cell of a model: whether it runs from the end, and, if only its last output remains, which one that is."""

    model: Placed
    reverse: bool = False
    last: str | None = None


def _runs(model: Placed, reverse: bool = False) -> Iterator[_Run]:
    """The cells one after another, without the wrappers that say how they are run."""
    for each in layers(model):
        match each.cell:
            case Backward():
                yield from _runs(each.part("cell", each.params), not reverse)
            case Pool(how=how):
                *below, top = _runs(each.part("cell", each.params), reverse)
                yield from below
                if how not in ("last", "end"):
                    yield top
                    yield _Run(each)
                elif isinstance(top.model.cell, (Bidirectional, *WRITERS, RecurrentDropout)):
                    yield top._replace(last=how)
                else:
                    top.model.refuse("Keras puts out one step of a recurrent layer only: put Pool around that cell")
            case _:
                yield _Run(each, reverse)


class _Writer:
    """Writes one layer after another."""

    def __init__(self, dtype: str):
        self.dtype = dtype
        self.layers: list[Named] = []
        self.weights: list[PyTree] = []
        self.masked = False
        self.flipped = False  # whether Keras' sequence is in the opposite order here
        self.step: tuple[int, ...] | None = None  # the shape of one step, None once time has ended

    def layer(self, kind: str, **config: Any) -> Named:
        config = {**config, "dtype": self.dtype}
        return {"module": "keras.layers", "class_name": kind, "config": config, "registered_name": None}

    def begin(self, model: Placed, mask_value: float | None) -> None:
        """Writes the input and its mask."""
        tokens = model.cell.input_ndim == 0
        size = () if tokens else input_size(model.cell)
        if size is None:
            model.refuse("the size of its input must be known")
        self.step = size if isinstance(size, tuple) else (size,)
        shape = {"batch_shape": [None, None, *self.step], "dtype": "int32" if tokens else self.dtype}
        self.layers.append(self.layer("InputLayer") | {"config": shape})
        if mask_value is None:
            return
        if isinstance(mask_value, bool) or not isinstance(mask_value, (int, float)) or not math.isfinite(mask_value):
            raise TypeError(f"mask_value: expected a finite number, got {mask_value!r}")
        if tokens and mask_value != 0:
            raise ValueError(f"mask_value: Keras' Embedding masks token 0 only, got {mask_value}")
        if len(self.step) > 1:
            raise ValueError("mask_value: Keras masks sequences of vectors and tokens only")
        self.masked = True
        if not tokens:
            self.layers.append(self.layer("Masking", mask_value=mask_value))

    def write(self, run: _Run) -> None:
        match run.model.cell:
            case cell if type(cell) in (Embed, Linear, LayerNorm, Apply, Dropout):
                self.keeps_size(run.model)
            case Pool(how=how):
                self.pool(run.model, how)
            case Repeat():
                self.repeat(run.model)
            case _:
                self.recurrent(run)

    def keeps_size(self, model: Placed) -> None:
        """Writes a layer without time."""
        p, add = model.params, lambda kind, **config: self.layers.append(self.layer(kind, **config))
        match model.cell:
            case Embed(vocabulary=vocabulary, output_size=size):
                if len(self.layers) > 1:
                    model.refuse("Keras' Embedding must be the first layer")
                add("Embedding", input_dim=vocabulary, output_dim=size, mask_zero=self.masked)
                self.weights.append(p.w)
                self.step = (size,)
            case Linear(output_size=size):
                add("Dense", units=size, use_bias=p.b is not None)
                self.weights += [array for array in p if array is not None]
                self.step = None if self.step is None else (*self.step[:-1], size)
            case LayerNorm(epsilon=epsilon):
                add("LayerNormalization", axis=-1, epsilon=epsilon, center=p.b is not None)
                self.weights += [array for array in p if array is not None]
            case Apply(fn=fn):
                self.layers.append(self.activation(model, fn))
            case Dropout(rate=rate, per_sequence=True) if self.step is not None:
                add("Dropout", rate=rate, noise_shape=[None, 1, *[None] * len(self.step)])
            case Dropout(rate=rate):
                add("Dropout", rate=rate)

    def activation(self, model: Placed, fn: Activation) -> Named:
        """The config of a layer that applies an activation."""
        match _activation(model, fn):
            case {"class_name": kind, "config": config}:
                return self.layer(kind, **config)
            case name:
                return self.layer("Activation", activation=name)

    def pool(self, model: Placed, how: Any) -> None:
        """Writes a layer that puts out the mean or the greatest output."""
        if how not in POOLINGS.values():
            model.refuse("Keras' Sequential pools in one way only")
        if self.step is None or len(self.step) != 1:
            model.refuse("Keras pools sequences of vectors only")
        if self.masked and how == "max":
            model.refuse("Keras' GlobalMaxPooling1D sees masked steps too")
        self.check_mask(model)
        self.layers.append(self.layer("GlobalAveragePooling1D" if how == "mean" else "GlobalMaxPooling1D"))
        self.step, self.masked = None, False

    def repeat(self, model: Placed) -> None:
        """Begins a new sequence whose steps all read one vector. The layers that follow act on its last axis alone."""
        cell = model.cell
        size = input_size(cell)
        if self.step is not None or isinstance(size, tuple):
            model.refuse("Keras' RepeatVector takes one vector for each sequence")
        self.layers.append(self.layer("RepeatVector", n=cell.length))
        self.step, self.flipped = (size,), False
        for run in _runs(model.part("cell", model.params)):
            self.write(run)
        if self.flipped:
            model.refuse("Keras would put its outputs out in the opposite order")
        self.step = None

    def check_mask(self, model: Placed) -> None:
        """Raises if there is a mask that is not in the order of the sequence."""
        if self.masked and self.flipped:
            model.refuse("the layer before it turns Keras' sequence round, and not its mask")

    def recurrent(self, run: _Run) -> None:
        """Writes a layer that runs over time."""
        model = run.model
        self.check_mask(model)
        options = {"return_sequences": run.last is None, "go_backwards": run.reverse != self.flipped}
        self.flipped = run.reverse
        if isinstance(model.cell, Bidirectional):
            if run.last == "end":
                model.refuse("Keras' Bidirectional puts out the last valid step: pool 'last'")
            layer, weights = self.bidirectional(model, **options)
        else:
            zero = {"zero_output_for_mask": True} if run.last == "end" else {}
            layer, weights = self.directed([model], **options, **zero)
        self.layers.append(layer)
        self.weights += weights
        size = output_size(model.cell)
        self.step = None if run.last else size if isinstance(size, tuple) else (size,)
        self.masked = self.masked and not run.last

    def directed(self, cells: list[Placed], **options: Any) -> tuple[Named, list[PyTree]]:
        """One Keras layer for one or several cells, each with the dropout below it."""
        found, dropout = [], 0.0
        for each in cells:
            if isinstance(each.cell, Dropout) and each.cell.per_sequence and not dropout:
                dropout = each.cell.rate
            else:
                found.append(_write(each, dropout))
                dropout = 0.0
        if dropout or not found:
            cells[-1].refuse("Keras takes one or more recurrent cells here, each with its dropout below it")
        weights = [array for each in found for array in each.weights if array is not None]
        if len(found) == 1:
            return self.layer(found[0].kind, **found[0].config, **options), weights
        if any(each.kind not in CELLS for each in found):
            cells[0].refuse("Keras has no cell of ConvLSTM to put above or below others")
        inner = [self.layer(f"{each.kind}Cell", **each.config) for each in found]
        return self.layer("RNN", cell=self.layer("StackedRNNCells", cells=inner), **options), weights

    def bidirectional(self, model: Placed, *, return_sequences: bool, go_backwards: bool) -> tuple[dict, list[PyTree]]:
        cell = model.cell
        if callable(cell.merge):
            model.refuse("Keras merges by concat, sum, mul and ave only")
        if output_size(cell.forward) != output_size(cell.backward):
            model.refuse("Keras takes the output sizes of both directions to be equal")
        forward, backward = (model.part(name, getattr(model.params, name)) for name in ("forward", "backward"))
        a, b = (
            self.directed(layers(part), return_sequences=return_sequences, go_backwards=go)
            for part, go in ((forward, go_backwards), (backward, not go_backwards))
        )
        layer = self.layer("Bidirectional", merge_mode=MERGES[cell.merge], layer=a[0], backward_layer=b[0])
        return layer, a[1] + b[1]


class _Written(NamedTuple):
    """A cell as a Keras layer: its class, config and weights."""

    kind: str
    config: Named
    weights: list[PyTree]


def _write(model: Placed, dropout: float) -> _Written:
    """Converts a recurrent cell with its dropouts."""
    noise: dict[str, float] = {"dropout": dropout} if dropout else {}
    if isinstance(model.cell, RecurrentDropout):
        noise["recurrent_dropout"] = model.cell.rate
        model = model.part("cell", model.params)
    write = WRITERS.get(type(model.cell))
    if write is None:
        model.refuse(LACKS)
    written = write(model)
    return written._replace(config=written.config | noise)


def _simple(model: Placed) -> _Written:
    cell = model.cell
    model.only("activation", why=LACKS)
    config = {"units": cell.hidden_size, "activation": _activation(model, cell.activation)}
    return _Written("SimpleRNN", config | {"use_bias": model.params.b is not None}, list(model.params))


def _lstm(model: Placed) -> _Written:
    cell = model.cell
    p = model.params
    model.only("gate_activation", "activation", "output_activation", why=LACKS)
    return _Written("LSTM", {"units": cell.hidden_size, **_gates(model)}, [p.w_x, p.w_h, p.b])


def _conv_lstm(model: Placed) -> _Written:
    cell = model.cell
    if max(cell._each("strides")) > 1 and max(cell._each("dilation")) > 1:
        model.refuse("Keras takes strides or dilation, not both")
    config = {
        "filters": cell.hidden_size,
        "kernel_size": list(cell._each("kernel_size")),
        "strides": list(cell._each("strides")),
        "dilation_rate": list(cell._each("dilation")),
        "padding": cell.padding.lower(),
        "data_format": "channels_last",
    }
    return _Written(f"ConvLSTM{len(cell.spatial_shape)}D", config | _gates(model), list(model.params))


def _gru(model: Placed) -> _Written:
    cell = model.cell
    p = model.params
    model.only("reset_after", "gate_activation", "activation", why=LACKS)
    if cell.reset_after and (p.b is None) != (p.b_hn is None):
        model.refuse("Keras has both b and b_hn or neither, and one is None")
    biases = () if p.b is None else (p.b,) if p.b_hn is None else (p.b, recurrent_bias(p.b_hn))
    w_x, w_h, *b = map(KERAS["GRU"].write, (p.w_x, p.w_h, *biases))
    config = {"units": cell.hidden_size, "reset_after": cell.reset_after, **_gates(model)}
    return _Written("GRU", config, [w_x, w_h, np.stack(b) if len(b) == 2 else b[0] if b else None])


def _gates(model: Placed) -> Named:
    """The config fields that all gated cells have."""
    cell = model.cell
    if getattr(cell, "output_activation", cell.activation) != cell.activation:
        model.refuse("Keras has one activation for both the candidate and the output")
    return {
        "activation": _activation(model, cell.activation),
        "recurrent_activation": _activation(model, cell.gate_activation),
        "use_bias": model.params.b is not None,
    }


WRITERS: dict[type, Callable[[Placed], _Written]] = {
    Elman: _simple,
    LSTM: _lstm,
    GRU: _gru,
    ConvLSTM: _conv_lstm,
}


CELLS = {"SimpleRNN", "LSTM", "GRU"}


def _activation(model: Placed, fn: Activation) -> PyTree:
    """The name of an activation, or the config of one of Keras' layers."""
    named = next((name for name, known in NAMES.items() if known == canonical(fn)), None)
    if named is not None:
        return named
    kind, config = there(fn, "keras") or model.refuse(f"Keras has no activation {fn!r}")
    if kind in ("LeakyReLU", "ReLU") and not min(config.values()) >= 0:
        model.refuse(f"Keras has no activation {fn!r}: {kind} takes no negative number")
    return {"module": "keras.layers", "class_name": kind, "config": config, "registered_name": None}
