"""Names for the types of params and carries, so that `jax.export` can write them to a file and find them again."""

from __future__ import annotations

from collections.abc import Iterable

import jax.export

from jaxrnn.typing import PyTree


def name_types(values: Iterable[PyTree]) -> None:
    """Registers every named tuple type among `values`."""
    for each in values:
        if isinstance(each, type) and issubclass(each, tuple) and hasattr(each, "_fields"):
            jax.export.register_namedtuple_serialization(each, serialized_name=f"jaxrnn.{each.__name__}")
