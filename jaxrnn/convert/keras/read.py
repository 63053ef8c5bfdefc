"""Converts Keras models to cells: from layers and models, or from their configs and weights."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import jax

from jaxrnn.cell import Cell
from jaxrnn.convert.keras.config import Fields
from jaxrnn.convert.keras.layers import Weights
from jaxrnn.convert.keras.old import version_of
from jaxrnn.convert.keras.reader import KerasMask, Reader
from jaxrnn.engines.arrays import on_device
from jaxrnn.typing import Foreign, PyTree


class KerasModel(NamedTuple):
    """A cell, its params, and the function of xs that returns the mask, or None."""

    cell: Cell
    params: PyTree
    mask: KerasMask | None


def from_keras(source: Foreign, weights: PyTree = None) -> KerasModel:
    """Converts a Keras layer or model to a cell.

    Keras' time axis is the second: run the cell by `jaxrnn.scan(cell, params, carry, xs, time_axis=1)`, with the
    initial states as carry, or None for zeros. A model must be one chain, `Sequential` or functional, of InputLayer,
    Embedding, Masking, SimpleRNN, LSTM, GRU, ConvLSTM1D to 3D, RNN of one or more of their cells, Bidirectional, Dense,
    TimeDistributed, Dropout, SpatialDropout1D, LayerNormalization, Activation, ReLU, LeakyReLU, ELU, Softmax,
    GlobalAveragePooling1D, GlobalMaxPooling1D, Concatenate of these two, RepeatVector. In Keras 1 and 2 it may also
    have CuDNNLSTM, CuDNNGRU, ThresholdedReLU and TimeDistributedDense.

    The `keras_version` in a model's JSON says how a config is read: in Keras 1 and 2, tf.keras included, the hard
    sigmoid was flatter, a GRU without `reset_after` resets before the product, and fields had other names. A config
    without a version is read as one of Keras 3. In an HDF5 file the version is an attribute beside the config:

        config = json.loads(file.attrs["model_config"]) | {"keras_version": file.attrs["keras_version"]}

    The cell differs from the Keras model in these points:

    - The outputs agree at valid steps; at other steps ours are 0. A row without any valid step gives 0, where Keras
      gives NaN (for an average) or its initial state.
    - The outputs are aligned with xs. In Keras, `go_backwards=True` reverses the output in time, for later layers too.
      The cells get the direction that gives the same numbers, and Keras' sequence is in the opposite order if it is
      reversed an odd number of times.
    - Noise is drawn where `scan` gets a key; its numbers are not those of Keras. `dropout` becomes `Dropout(rate,
      per_sequence=True)` below the cell, and `recurrent_dropout` becomes `RecurrentDropout`. Each draws one mask per
      sequence, as in Keras, but always one for all gates, while Keras draws one for each gate in ConvLSTM and in every
      layer that has `recurrent_dropout` or `implementation=1`.
    - `stateful=True`: pass the carry on to the next call. The final carry is always returned, and it contains the
      states that `return_state=True` puts out.
    - Bidirectional with `merge_mode=None` gives a tuple of both outputs.
    - A GRU with `reset_after` has two biases in Keras, and r and z read their sum; here there is one bias, `b`. An
      optimizer moves that sum twice as far in Keras; see `from_torch` for a way to do the same.
    - Initializers, regularizers and constraints act in training only and are not kept, and neither is `trainable`.
    - A model computes in the dtype of xs: cast xs if the policy is a mixed one. Embedding takes integers.

    Args:
      source: A built layer or model of Keras 3. Or a config, of any version: the dict of
        `keras.saving.serialize_keras_object`, of the `get_config` of a model, or of its JSON. With a config, Keras need
        not be installed.
      weights: With a config, the list of arrays that `get_weights` returns.

    Returns:
      `KerasModel(cell, params, mask)`, with the params in the dtype of the weights.

    Raises:
      ValueError: If something has no counterpart here or does not fit. The message names the layer and the field.
      TypeError: If something has no counterpart here or does not fit. The message names the layer and the field.

    Examples:
      >>> import jaxrnn, numpy as np
      >>> layers = [
      ...     {"class_name": "Embedding", "config": {"input_dim": 9, "output_dim": 3, "mask_zero": True}},
      ...     {"class_name": "LSTM", "config": {"units": 4}},
      ...     {"class_name": "Dense", "config": {"units": 2, "activation": "softmax"}},
      ... ]
      >>> shapes = [(9, 3), (3, 16), (4, 16), (16,), (4, 2), (2,)]
      >>> weights = [np.full(shape, 0.1, "float32") for shape in shapes]
      >>> model = from_keras({"class_name": "Sequential", "config": {"layers": layers}}, weights)

      A model with Masking, or with an Embedding of `mask_zero=True`, has a `mask`, the function that says which steps
      its layers see. Its result is handed to `scan`, or to `jaxrnn.training.predict`; rows may be padded in front, as
      Keras' `pad_sequences` does it, or behind:

      >>> tokens = np.array([[0, 0, 5, 3], [2, 7, 0, 0]])
      >>> mask = model.mask(tokens)
      >>> mask.tolist()
      [[False, False, True, True], [True, True, False, False]]
      >>> carry, ys = jaxrnn.scan(model.cell, model.params, None, tokens, mask=mask, time_axis=1)
      >>> ys.shape
      (2, 2)

      The losses here take logits: to train a model on that ends in a sigmoid or softmax, take that layer off,
      `Stack(model.cells[:-1])` with `params[:-1]`, and apply it to predictions.

      >>> from jaxrnn.training import cross_entropy, make_loss
      >>> logits, params = jaxrnn.Stack(model.cell.cells[:-1]), model.params[:-1]
      >>> loss = make_loss(logits, cross_entropy)

      An encoder's final states are the carry that its decoder starts from, each layer converted by itself; with one
      output for the whole sequence they are in the carry's field `cell`, of a Bidirectional in those of its `forward`
      and `backward`:

      >>> encoder = from_keras({"class_name": "LSTM", "config": {"units": 4, "return_state": True}}, weights[1:4])
      >>> decoder = from_keras({"class_name": "LSTM", "config": {"units": 4, "return_sequences": True}}, weights[1:4])
      >>> carry, _ = jaxrnn.scan(encoder.cell, encoder.params, None, np.ones((2, 7, 3), "float32"), time_axis=1)
      >>> targets = np.ones((2, 5, 3), "float32")
      >>> carry, ys = jaxrnn.scan(decoder.cell, decoder.params, carry, targets, time_axis=1)
      >>> ys.shape
      (2, 5, 4)
    """
    if not isinstance(source, Mapping):
        source, weights = _read(source, weights)
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights: expected the list of arrays of get_weights(), got {type(weights).__name__}")
    reader = Reader(Weights(weights))
    reader.layer(Fields("source", source, version_of(source)), 0)
    cell, params = reader.finish()
    return KerasModel(cell, jax.tree.map(on_device, params), reader.mask)


def _read(layer: Foreign, weights: PyTree) -> tuple[PyTree, PyTree]:
    """The config and the weights of a Keras layer or model."""
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
