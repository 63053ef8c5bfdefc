"""Reads Keras' configs: the checked fields of a layer, and activations by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from reprlib import repr as short
from typing import Any, NoReturn

from jaxrnn.cells.activations import ALONG_FEATURES, Activation
from jaxrnn.convert.activations import canonical, here, names, options
from jaxrnn.convert.keras.old import KERAS_3, Version, renewed
from jaxrnn.typing import Foreign, PyTree

REQUIRED = object()
LARGEST = 2**31
# What changes no output: how weights begin and are trained, names, seeds, and the choice of an implementation.
IRRELEVANT = {
    *("name", "trainable", "seed", "unroll", "use_cudnn", "implementation", "stateful", "return_state"),
    *("unit_forget_bias", "input_length", "lora_alpha"),
}
DTYPES = ("float16", "bfloat16", "float32", "float64", "mixed_float16", "mixed_bfloat16")


class Fields:
    """The config of one layer. Each field is taken once and checked, and no field that matters may be left over.

    The config is that of Keras `version`; `kind` and the fields have the names of Keras 3.
    """

    def __init__(self, place: str, source: Foreign, version: Version = KERAS_3):
        if not isinstance(source, Mapping):
            raise TypeError(f"{place}: expected the config of a layer, a dict, got {short(source)}")
        kind, config, module = source.get("class_name"), source.get("config"), source.get("module")
        if kind is None and "layers" in source:  # what `Sequential.get_config` gives
            kind, config = "Functional" if "input_layers" in source else "Sequential", source
        self.place = f"{place}: {kind if isinstance(kind, str) else short(kind)}"[:200]
        if not isinstance(kind, str):
            self.refuse("class_name", kind, "a string; keras.saving.serialize_keras_object(layer) has it")
        if kind == "Sequential" and isinstance(config, list) and version < KERAS_3:
            config = {"layers": config}
        if not isinstance(config, Mapping):
            self.refuse("config", config, "a dict; a list of layers is of Keras 1 or 2 and needs a keras_version")
        if module is not None and not (isinstance(module, str) and module.split(".")[0] == "keras"):
            self.refuse("module", module, "'keras.layers'; only Keras' own classes have a meaning that is known")
        self.version = version
        self.kind, self._left = renewed(kind, config, version)
        build, given = source.get("build_config"), self._left.pop("batch_input_shape", None)
        self.input_shape = build.get("input_shape", given) if isinstance(build, Mapping) else given
        if isinstance(name := config.get("name"), str):
            self.place = f"{place}: {kind} {short(name)}"

    def inside(self, name: str, source: Foreign) -> Fields:
        """The config of a layer inside this one."""
        return Fields(f"{self.place}: {name}"[-200:], source, self.version)

    def refuse(self, name: str, value: Any, expected: str) -> NoReturn:
        """Raises the `ValueError` for one field."""
        raise ValueError(f"{self.place}: {name}: expected {expected}, got {short(value)}")

    def take(self, name: str, default: Any = REQUIRED) -> PyTree:
        """Takes a field, or returns the default of Keras if the field is missing."""
        if name not in self._left and default is REQUIRED:
            raise ValueError(f"{self.place}: {name} is missing")
        return self._left.pop(name, default)

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            self.refuse(name, value, "True or False")
        return value

    def size(self, name: str) -> int:
        value = self.take(name)
        if not is_size(value):
            self.refuse(name, value, "an integer of at least 1")
        return value

    def sizes(self, name: str, dimensions: int, default: Any = REQUIRED) -> tuple[int, ...]:
        """One integer for each dimension, from a list of them or from one number for all."""
        value = self.take(name, default)
        each = tuple(value) if isinstance(value, (list, tuple)) else (value,) * dimensions
        if len(each) != dimensions or not all(map(is_size, each)):
            self.refuse(name, value, f"{dimensions} integers of at least 1")
        return each

    def number(self, name: str, default: Any, at_least: float = -math.inf) -> float:
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not at_least <= value < LARGEST:
            self.refuse(name, value, "a finite number" + ("" if at_least < 0 else f" of at least {at_least}"))
        return float(value)

    def rate(self, name: str, default: Any = REQUIRED) -> float:
        value = self.number(name, default, 0.0)
        if value >= 1:
            self.refuse(name, value, "a rate in [0, 1)")
        return value

    def choice(self, name: str, default: Any, choices: Mapping[PyTree, PyTree]) -> PyTree:
        value = self.take(name, default)
        if not (value is None or isinstance(value, str)) or value not in choices:
            self.refuse(name, value, f"one of {list(choices)}")
        return choices[value]

    def channels_last(self) -> None:
        self.choice("data_format", "channels_last", {"channels_last": None})

    def activation(self, name: str, default: Any, *, elementwise: bool) -> Activation:
        """An activation, given by name or as one of Keras' layers. None means the identity."""
        value = self.take(name, default)
        if isinstance(value, Mapping):
            inner = self.inside(name, value)
            if inner.kind in ACTIVATION_LAYERS:
                found = ACTIVATION_LAYERS[inner.kind](inner)
                inner.finish()
                if not (elementwise and found in ALONG_FEATURES):
                    return found
        known = {each: fn for each, fn in (NAMES | SAME).items() if not (elementwise and fn in ALONG_FEATURES)}
        value = "linear" if value is None else value
        if not isinstance(value, str) or value not in known:
            self.refuse(name, value, f"one of {sorted(known)}")
        # Keras 3 made it steeper: x / 6 + ½ in place of 0.2 x + ½.
        return "hard_sigmoid" if value == "hard_sigmoid" and self.version < KERAS_3 else known[value]

    def finish(self) -> None:
        """Raises if a field that matters has not been taken."""
        policy = self._left.pop("dtype", None)
        if isinstance(policy, Mapping):
            config = policy.get("config")
            policy = config.get("name") if isinstance(config, Mapping) else policy
        if policy is not None and (not isinstance(policy, str) or policy not in DTYPES):
            self.refuse("dtype", policy, f"one of {DTYPES}")
        for name, value in self._left.items():
            suffixes = ("_initializer", "_regularizer", "_constraint")
            ignored = isinstance(name, str) and (name in IRRELEVANT or name.endswith(suffixes))
            if not ignored and value is not None and value is not False:
                raise ValueError(f"{self.place}: {short(name)}={short(value)} has no counterpart")


def is_size(value: Any) -> bool:
    """Whether a value is an integer of at least 1 and of reasonable size."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < LARGEST


# Keras' names with Keras' numbers, where a layer of it takes others.
NAMES = {each: fn for each in names("keras") if not options("keras", each) and (fn := here("keras", each, {}))}
NAMES |= {"elu": "elu", "leaky_relu": ("leaky_relu", 0.2)}
SAME = {"swish": "silu", "hard_swish": "hard_silu"}


def _relu(fields: Fields) -> Activation:
    slope, threshold = fields.number("negative_slope", 0.0, 0.0), fields.number("threshold", 0.0, 0.0)
    most = fields.take("max_value", None)
    match slope, threshold, most:
        case 0.0, 0.0, None:
            return "relu"
        case _, 0.0, None:
            return canonical(("leaky_relu", slope))
        case 0.0, _, None:
            return canonical(("thresholded_relu", threshold))
        case 0.0, 0.0, 6 if not isinstance(most, bool):
            return "relu6"
    return fields.refuse(
        "negative_slope, threshold, max_value", (slope, threshold, most), "one of them, or max_value=6"
    )


def _softmax(fields: Fields) -> Activation:
    axis = fields.take("axis", -1)
    if isinstance(axis, bool) or axis not in (-1, [-1], (-1,)):
        fields.refuse("axis", axis, "-1, the last axis")
    return "softmax"


ACTIVATION_LAYERS: dict[str, Callable[[Fields], Activation]] = {
    "ReLU": _relu,
    "LeakyReLU": lambda fields: canonical(("leaky_relu", fields.number("negative_slope", 0.3, 0.0))),
    "ELU": lambda fields: canonical(("elu", fields.number("alpha", 1.0))),
    "Softmax": _softmax,
}


def list_of(fields: Fields, name: str) -> list[PyTree]:
    """A field that must be a list with at least one entry."""
    value = fields.take(name)
    if not isinstance(value, (list, tuple)) or not value:
        fields.refuse(name, value, "a list of at least one")
    return list(value)
