"""Converts ONNX models to and from cells."""

from jaxrnn.convert.onnx.export import to_onnx
from jaxrnn.convert.onnx.models import from_onnx

__all__ = ["from_onnx", "to_onnx"]
