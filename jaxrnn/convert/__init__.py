"""Converts weights and models from and to other frameworks.

A framework is imported only if one of its objects is converted or made.
"""

from jaxrnn.convert.equinox import from_equinox, to_equinox
from jaxrnn.convert.flax import from_flax, to_flax
from jaxrnn.convert.haiku import from_haiku, to_haiku
from jaxrnn.convert.keras import KerasMask, KerasModel, from_keras, to_keras
from jaxrnn.convert.onnx import from_onnx, to_onnx
from jaxrnn.convert.torch import carry_from_torch, carry_to_torch, from_torch, to_torch

__all__ = [
    "KerasMask",
    "KerasModel",
    "carry_from_torch",
    "carry_to_torch",
    "from_equinox",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_onnx",
    "from_torch",
    "to_equinox",
    "to_flax",
    "to_haiku",
    "to_keras",
    "to_onnx",
    "to_torch",
]
