"""Keras models as cells: from layers and models, or their configs and weights."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxrnn.cell import Cell
from jaxrnn.convert.cells import stacked
from jaxrnn.convert.keras.config import Fields
from jaxrnn.convert.keras.layers import Weights
from jaxrnn.convert.keras.old import version_of
from jaxrnn.convert.keras.reader import KerasMask, Reader
from jaxrnn.engines.arrays import on_device


class KerasModel(NamedTuple):
    """A cell, its params, and None or the function of xs that gives the mask."""

    cell: Cell
    params: Any
    mask: KerasMask | None


def from_keras(source: Any, weights: Any = None) -> KerasModel:
    """A Keras 3 layer or model as a cell.

    Keras' time axis is the second: run it by `jaxrnn.scan(cell, params, carry, xs, time_axis=1)`, with
    `mask=model.mask(xs)` where the model has a mask, and with the initial states as carry, None for zeros. A model is
    one chain, `Sequential` or functional, of InputLayer, Embedding, Masking, SimpleRNN, LSTM, GRU, ConvLSTM1D to 3D,
    RNN of one or more of their cells, Bidirectional, Dense, TimeDistributed, Dropout, SpatialDropout1D,
    LayerNormalization, Activation, ReLU, LeakyReLU, ELU, GlobalAveragePooling1D, GlobalMaxPooling1D.

    Where the two differ:

    - The outputs agree at valid steps; at others ours are 0. A row without any valid step gives 0, not Keras' NaN of an
      average or its initial state.
    - The outputs are aligned with xs. `go_backwards=True` turns Keras' output round in time, for later layers too: they
      get the direction that gives the same numbers, and Keras' sequence is in the opposite order where the number of
      turns is odd.
    - Noise is drawn where `scan` gets a key; its numbers are not Keras'. `dropout` becomes `Dropout(rate,
      per_sequence=True)` below the cell, `recurrent_dropout` becomes `RecurrentDropout`: one mask per sequence, as
      there, but always one for all gates, where Keras draws one for each gate in ConvLSTM and in every layer that has
      `recurrent_dropout` or `implementation=1`.
    - `stateful=True`: pass the carry on. The final carry is always returned.
    - Initializers, regularizers and constraints act in training only and are not kept; nor is `trainable`.
    - A model computes in the dtype of xs: cast xs where the policy is a mixed one. Embedding takes integers.

    Args:
      source: a built layer or model; or its config: the dict of `keras.saving.serialize_keras_object`, or of the
        `get_config` of a model. With a config Keras need not be installed.
      weights: with a config, what `get_weights` gives: a list of arrays.

    Returns:
      `KerasModel(cell, params, mask)`: params in the dtype of the weights.

    Raises:
      ValueError, TypeError: for what has no counterpart here, or does not fit, naming the layer and the field.

        >>> import numpy as np
        >>> config = {"class_name": "LSTM", "config": {"units": 4, "return_sequences": True}}
        >>> weights = [np.ones((3, 16), "float32"), np.ones((4, 16), "float32"), np.zeros(16, "float32")]
        >>> from_keras(config, weights).cell
        LSTM(input_size=3, hidden_size=4)
    """
    if not isinstance(source, Mapping):
        source, weights = _read(source, weights)
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights: expected the list of arrays of get_weights(), got {type(weights).__name__}")
    reader = Reader(Weights(weights))
    reader.layer(Fields("source", source, version_of(source)), 0)
    reader.weights.finish()
    if not reader.cells:
        raise ValueError("source: expected at least one layer that computes something")
    cell, params = stacked(reader.cells)
    return KerasModel(cell, jax.tree.map(on_device, params), reader.mask)


def _read(layer: Any, weights: Any) -> tuple[Any, Any]:
    """Config and weights of one of Keras' objects."""
    if not any(base.__module__.split(".")[0] == "keras" for base in type(layer).__mro__):
        raise TypeError(f"source: expected a Keras layer or model, or its config as a dict, got {type(layer).__name__}")
    if weights is not None:
        raise TypeError("weights: a Keras layer has its own; give them only with a config")
    if not getattr(layer, "built", False):
        raise ValueError(f"source: {type(layer).__name__} is not built, so it has no weights: call it once")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("keras").saving.serialize_keras_object(layer), layer.get_weights()
        except NotImplementedError as error:
            raise ValueError(f"source: {type(layer).__name__} cannot be written as a config: {error}") from error
