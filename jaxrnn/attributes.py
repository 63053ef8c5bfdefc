"""Attributes of modules that are found when they are asked for, and which of them `dir` shows."""

from __future__ import annotations

import importlib
import opcode
import sys
from collections.abc import Callable, Sequence

from jaxrnn.foreign_names import module_hint
from jaxrnn.typing import Foreign

# Public modules. Those that import Flax or Optax are imported when they are used.
MODULES = ("analysis", "convert", "exporting", "linen", "nnx", "training", "typing")
# Types of params and carries, and free functions: importable, and many.
_HIDDEN = ("Params", "Gates", "Norm", "Pair", "Row", "Emitted", "GatedWeights", "_init", "_step")
_SHOWN = ("chrono_init", "irnn_init", "EmitCarry", "LayerNorm", "LearnedCarry")


def missing(module: str, name: str, others: Sequence[str]) -> Exception:
    """The error for a name that `module` has not, with what it is called here; `others` are ours where it may be.

    It is an ImportError for `from module import name`, which shows nobody the text of an AttributeError.
    """
    frame = sys._getframe(2)
    asked = frame.f_code.co_code[frame.f_lasti] == opcode.opmap["IMPORT_FROM"]
    text = module_hint(module, name, () if name.startswith("_") else others)
    return ImportError(text.replace("has no attribute", "has no name"), name=module) if asked else AttributeError(text)


def of_package(names: Sequence[str]) -> tuple[Callable[[str], Foreign], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of the package, whose public names are given."""

    def find(name: str) -> Foreign:
        if name in MODULES:
            return importlib.import_module(f"jaxrnn.{name}")
        raise missing("jaxrnn", name, ("jaxrnn.training", "jaxrnn.analysis", "jaxrnn.convert"))

    def shown() -> list[str]:
        hidden = (*_HIDDEN, "Carry")
        return sorted({*MODULES, *(name for name in names if name in _SHOWN or not name.endswith(hidden))})

    return find, shown


def of_module(module: str) -> Callable[[str], Foreign]:
    """`__getattr__` of a module."""

    def find(name: str) -> Foreign:
        raise missing(module, name, ("jaxrnn", "jaxrnn.training", "jaxrnn.analysis"))

    return find
