"""Attributes of the package that are found when they are asked for, and which of them `dir` shows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from jaxrnn.foreign_names import layer_hint
from jaxrnn.typing import Foreign

# Modules that import Flax or Optax, and so are imported when they are used.
MODULES = ("analysis", "convert", "linen", "nnx", "training", "typing")
# Types of params and carries, and free functions: importable, and many.
_HIDDEN = ("Params", "Gates", "Norm", "Pair", "Row", "Emitted", "GatedWeights", "_init", "_step")
_SHOWN = ("chrono_init", "irnn_init", "EmitCarry", "LayerNorm", "LearnedCarry")


def of_package(names: Sequence[str]) -> tuple[Callable[[str], Foreign], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of the package, whose public names are given."""

    def find(name: str) -> Foreign:
        if name in MODULES:
            return importlib.import_module(f"jaxrnn.{name}")
        raise AttributeError(layer_hint(name))

    def shown() -> list[str]:
        hidden = (*_HIDDEN, "Carry")
        return sorted({*MODULES, *(name for name in names if name in _SHOWN or not name.endswith(hidden))})

    return find, shown
