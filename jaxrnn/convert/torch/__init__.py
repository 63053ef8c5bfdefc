"""Converts models from and to PyTorch."""

from jaxrnn.convert.torch.export import to_torch
from jaxrnn.convert.torch.read import from_torch
from jaxrnn.convert.torch.states import carry_from_torch, carry_to_torch

__all__ = ["carry_from_torch", "carry_to_torch", "from_torch", "to_torch"]
