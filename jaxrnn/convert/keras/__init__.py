"""Converts Keras models to cells, and back."""

from jaxrnn.convert.keras.export import to_keras
from jaxrnn.convert.keras.read import KerasModel, from_keras
from jaxrnn.convert.keras.reader import KerasMask

__all__ = ["KerasMask", "KerasModel", "from_keras", "to_keras"]
