"""Reads data files beside an ONNX model, for tensors whose numbers are not in the model's own file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import PureWindowsPath

import numpy as np

from jaxrnn.typing import PyTree


class DataFiles:
    """Reads data files in the folder of a model, and nowhere else. `bytes` counts the bytes that were read.

    Args:
      folder: The folder of the model, or None for a model that was given without its path.
    """

    def __init__(self, folder: str | None):
        self.folder = None if folder is None else os.path.realpath(folder)
        self.bytes = 0

    def read(self, what: str, facts: Iterable[PyTree], dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """The array to which `facts` point, the entries of a tensor's external_data. `what` names it in messages."""
        found = {each.key: each.value for each in facts}
        location = found.get("location", "")
        if self.folder is None:
            raise ValueError(
                f"{what}: its data are in another file, {location!r}, which is read where the model is given by its "
                "path; or give what onnx.load(path) returns"
            )
        path = _path(what, self.folder, location)
        expected, size = math.prod(shape) * dtype.itemsize, os.path.getsize(path)
        start = _number(what, found, "offset", 0)
        length = _number(what, found, "length", size - start)
        if length != expected:
            raise ValueError(f"{what}: shape {shape} of {dtype} takes {expected} bytes, and there are {length}")
        if start + length > size:
            raise ValueError(f"{what}: expected bytes {start} to {start + length} of {location!r}, which has {size}")
        self.bytes += length
        return np.fromfile(path, np.uint8, length, offset=start).view(dtype).reshape(shape)


def _path(what: str, folder: str, location: str) -> str:
    """The path of the file at `location`, with all links followed."""
    # Of Windows' paths, since these have both kinds of slashes, and drives.
    parts = PureWindowsPath(location)
    path = os.path.realpath(os.path.join(folder, location)) if "\0" not in location else ""
    if not parts.name or parts.anchor or ".." in parts.parts or not path.startswith(os.path.join(folder, "")):
        raise ValueError(f"{what}: its data must be in a file within the folder of the model, got {location!r}")
    if not os.path.isfile(path):
        raise ValueError(f"{what}: its data are in {location!r}, and {folder} has no such file")
    return path


def _number(what: str, facts: dict[str, str], name: str, default: int) -> int:
    if name not in facts:
        return default
    if not (facts[name].isascii() and facts[name].isdecimal() and len(facts[name]) < 20):
        raise ValueError(f"{what}: {name}: expected a number of bytes, got {facts[name]!r}")
    return int(facts[name])
