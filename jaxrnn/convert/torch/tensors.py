"""Converts tensors to arrays and back, and reads the arrays of safetensors files."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrnn.convert.arrays import refuse_tracer
from jaxrnn.typing import Foreign, PyTree

# safetensors' names of the dtypes that torch's recurrent modules compute in.
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def is_instance(value: Any, *path: str) -> bool:
    """Whether `value` is an instance of a torch class, such as `torch.nn.Module`. False if torch is not imported."""
    kind: Foreign = sys.modules.get("torch")
    for name in path:
        kind = getattr(kind, name, None)
    return kind is not None and isinstance(value, kind)


def dense(name: str, value: Any) -> np.ndarray:
    """A torch tensor, or any other value that NumPy can read, as a NumPy array of the same dtype."""
    if not is_instance(value, "Tensor"):
        refuse_tracer(name, value)
        return np.asarray(value)
    if value.is_meta:
        raise ValueError(f"{name}: a tensor on the meta device has no numbers")
    try:
        tensor = value.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":
            return tensor.contiguous().view(sys.modules["torch"].int16).numpy().view(jnp.bfloat16).copy()
        return tensor.numpy().copy()
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"{name}: expected a dense tensor of numbers, got {value.dtype}, {value.layout}: {error}"
        ) from error


def tensor(array: PyTree) -> PyTree:
    """A CPU tensor with a copy of the array."""
    import torch

    array = np.array(array, order="C")
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def named_arrays(source: str, named: Mapping[PyTree, PyTree]) -> dict[str, np.ndarray]:
    """The named values as NumPy arrays. Each must have one of the four dtypes and must not be empty."""
    arrays = {}
    for name, value in named.items():
        if not isinstance(name, str):
            raise TypeError(f"{source}: expected names, got {name!r}")
        if isinstance(value, Mapping):
            raise TypeError(f"{source}: {name} is a mapping itself: hand over the state_dict that is in it")
        array = dense(f"{source}: {name}", value)
        if str(array.dtype) not in DTYPES.values():
            raise TypeError(f"{source}: {name}: expected one of {', '.join(DTYPES.values())}, got {array.dtype}")
        if not array.size:
            raise ValueError(f"{source}: {name}: expected numbers, got shape {array.shape}")
        arrays[name] = array
    return arrays


def state_dict(source: Foreign) -> tuple[str, Mapping[PyTree, PyTree], bool]:
    """The source's name for error messages, its arrays, and whether the order of their names has a meaning."""
    if isinstance(source, Mapping):
        name, named, ordered = "state_dict", source, True
    elif isinstance(source, (str, os.PathLike)):
        name = str(source)
        named, ordered = _file_arrays(name), False
    else:
        raise TypeError(f"source: expected a torch module, a state_dict or a path, got {type(source).__name__}")
    if not named:
        raise ValueError(f"{name}: there are no arrays")
    return name, named, ordered


def _file_arrays(path: str) -> dict[str, np.ndarray]:
    if not path.endswith(".safetensors"):
        raise ValueError(
            f"{path}: expected a .safetensors file. Others are pickles, which run code when they are loaded, and are "
            "never loaded here: torch.load(path, weights_only=True) gives the state_dict to hand over"
        )
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            for name in names:
                if (dtype := file.get_slice(name).get_dtype()) not in DTYPES:
                    raise TypeError(f"{path}: {name}: expected one of {', '.join(DTYPES)}, got {dtype}")
            return {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a valid safetensors file: {error}") from error
