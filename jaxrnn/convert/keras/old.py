"""Rewrites layers of Keras 1 and 2 in the terms of Keras 3: the names of fields, and defaults that have changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from reprlib import repr as short

from jaxrnn.typing import Foreign, PyTree

Version = tuple[int, int]
KERAS_3: Version = (3, 0)
RENAMED_SINCE_1 = {
    "output_dim": "units",
    "inner_activation": "recurrent_activation",
    "bias": "use_bias",
    "p": "rate",
    "dropout_W": "dropout",
    "dropout_U": "recurrent_dropout",
    "consume_less": "implementation",
}
# How weights begin, and what they say themselves.
UNUSED_SINCE_1 = ("init", "inner_init", "forget_bias_init", "input_dim", "input_dtype")
RENAMED_SINCE_2 = {"LeakyReLU": {"alpha": "negative_slope"}, "ThresholdedReLU": {"theta": "threshold"}}


def version_of(source: Mapping[Foreign, Foreign]) -> Version:
    """The `keras_version` in a model's JSON: its major and minor number, or those of Keras 3 if there is none.

    Examples:
      >>> version_of({"class_name": "Sequential", "keras_version": "2.2.4"})
      (2, 2)
    """
    version = source.get("keras_version", "3.0")
    found = re.match(r"([1-9]\d?)\.(\d{1,3})", version) if isinstance(version, str) else None
    if found is None:
        raise ValueError(f"source: keras_version: expected one such as '2.2.4', got {short(version)}")
    if version == "2.2.4-tf":  # of TensorFlow 2.0 to 2.2, with the defaults of later ones
        return 2, 3
    return int(found[1]), int(found[2])


def renewed(kind: str, config: Mapping[Foreign, Foreign], version: Version) -> tuple[str, dict[PyTree, PyTree]]:
    """The class and the config of a layer of this version, as Keras 3 would write them.

    Examples:
      >>> renewed("LSTM", {"output_dim": 4, "inner_activation": "sigmoid"}, (1, 2))
      ('LSTM', {'units': 4, 'recurrent_activation': 'sigmoid'})
    """
    if version >= KERAS_3:
        return kind, dict(config)
    if version < (2, 0):
        kind, config = _of_keras_1(kind, config)
    names = RENAMED_SINCE_2.get(kind, {})
    fields = {names.get(name, name): value for name, value in config.items()}
    if kind == "ThresholdedReLU":
        kind, fields = "ReLU", {"threshold": 1.0, **fields}
    if kind in ("GRU", "GRUCell"):
        fields.setdefault("reset_after", False)
    if kind.startswith("ConvLSTM") or (version < (2, 3) and kind.removesuffix("Cell") in ("LSTM", "GRU")):
        fields.setdefault("recurrent_activation", "hard_sigmoid")
    return kind, fields


def _of_keras_1(kind: str, config: Mapping[Foreign, Foreign]) -> tuple[str, dict[PyTree, PyTree]]:
    """The class and the config of a Keras 1 layer in the terms of Keras 2."""
    if kind == "Embedding":
        idle = ("init", "input_dtype") + ("dropout",) * (config.get("dropout") == 0)
        return kind, {name: value for name, value in config.items() if name not in idle}
    fields = {RENAMED_SINCE_1.get(name, name): value for name, value in config.items() if name not in UNUSED_SINCE_1}
    return "Dense" if kind == "TimeDistributedDense" else kind, fields
