"""Describes the parts of a training run as text, so that a checkpoint of another run is not used by mistake."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sysconfig
import types
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxrnn
from jaxrnn import check
from jaxrnn.cell import Cell
from jaxrnn.training.batches import Epochs
from jaxrnn.typing import PyTree

SAMPLE = 2**30
"""For an array of more bytes, evenly spaced rows of this many bytes in all are read."""
LISTED = 16
"""For a longer list, for instance of batches or sequences, one checksum is kept."""
_HERE = os.path.dirname(jaxrnn.__file__)
LIBRARIES = (_HERE, *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))


def run_identity(**parts: Any) -> dict[str, str]:
    """Describes every part by lines of text, the same in every process that runs the same program.

    Each line is named by its place in the part.
    Arrays are described by shape, dtype and checksum; cells, tuples and dicts by their contents; a function by its
    name, its defaults and the contents of its closure. A function that is not from an installed package is also
    described by its code and by the numbers, strings, cells and functions that it reads from its module. Other objects
    are described only by their type: where the same program could look different, nothing is said.
    """
    return dict(line for name, value in parts.items() for line in _lines(name, value, ()))


def difference(there: Mapping[str, str], here: Mapping[str, str]) -> str | None:
    """The first place in which two identities differ, and how; None if they are equal."""
    for name in [*here, *(name for name in there if name not in here)]:
        old, new = there.get(name, "nothing"), here.get(name, "nothing")
        if old != new:
            return f"{name} was {old[:200]} and is {new[:200]}"
    return None


def checksum(array: np.ndarray) -> int:
    """The checksum of the bytes of an array."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _lines(name: str, value: Any, above: tuple[int, ...], *, own: bool = False) -> Iterator[tuple[str, str]]:
    """The lines for `value`, which is called `name`; `above` are the ids of the objects that hold it.

    `own` says whether a function of the user holds it. Containers there may hold settings that nothing depends on, like
    the number of epochs.
    """
    if id(value) in above:
        return
    below, inside = (*above, id(value)), False
    children: Iterator[tuple[str, PyTree]] = iter(())
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes() | np.generic() | np.dtype():
            text = repr(value)
        case np.ndarray() | jax.Array():
            text = _array(value)
        case type() | types.ModuleType() | types.BuiltinFunctionType():
            text = _name_of(value)
        case types.FunctionType():
            inside = not value.__code__.co_filename.startswith(LIBRARIES)
            text = f"{_name_of(value)} (code {_code(value.__code__):08x})" if inside else _name_of(value)
            children = _read_by(value, inside)
        case Cell():
            text = _name_of(type(value))
            children = ((f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value))
        case functools.partial():
            text, children = (
                "partial",
                iter(((".func", value.func), (".args", value.args), (".keywords", value.keywords))),
            )
        case types.MethodType():
            text, children = "method", ((f".{name}", getattr(value, name)) for name in ("__func__", "__self__"))
        case _ if callable(value) and inspect.isroutine(inspect.unwrap(value)):  # jitted, for instance
            text, children = _name_of(type(value)), iter((("", inspect.unwrap(value)),))
        case _ if callable(value) or isinstance(value, Epochs):  # a module, a schedule, a source of batches
            text, children = _name_of(type(value)), _fields(value)
        case tuple() | list() | dict() if not own:
            text, children = f"{_name_of(type(value))} of {len(value)}", _items(value)
        case _:
            text = _name_of(type(value))
    lines = (line for suffix, child in children for line in _lines(name + suffix, child, below, own=inside))
    if isinstance(value, list) and len(value) > LISTED:
        text, lines = f"{text} (checksum {zlib.crc32(repr(list(lines)).encode()):08x})", iter(())
    yield name, text
    yield from lines


def _name_of(thing: Any) -> str:
    return f"{getattr(thing, '__module__', None) or ''}.{getattr(thing, '__qualname__', thing.__name__)}".lstrip(".")


def _items(value: Any) -> Iterator[tuple[str, PyTree]]:
    if isinstance(value, dict):
        return ((f"[{key!r}]", value[key]) for key in value if isinstance(key, (str, int)))
    names = getattr(value, "_fields", None)
    return ((f".{names[k]}" if names else f"[{k}]", each) for k, each in enumerate(value))


def _fields(value: Any) -> Iterator[tuple[str, PyTree]]:
    """The attributes of an object and the code of its call, without the position of a source in its data."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    else:
        names = [name for name in getattr(value, "__dict__", ()) if name not in ("epoch", "position")]
    yield from ((f".{name}", getattr(value, name, None)) for name in names if not name.startswith("_"))
    if callable(value):
        yield ".__call__", type(value).__call__


def _read_by(function: types.FunctionType, own: bool) -> Iterator[tuple[str, PyTree]]:
    """The values that a function reads besides its arguments."""
    yield from ((f".{name}", value) for name, value in (function.__kwdefaults__ or {}).items())
    yield from ((f".defaults[{k}]", value) for k, value in enumerate(function.__defaults__ or ()))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f".{name}", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    if own:
        for name in sorted(_names(function.__code__)):
            value = function.__globals__.get(name)
            if isinstance(value, (bool, int, float, str, Cell, types.FunctionType)):
                yield f".{name}", value


def _nested(code: types.CodeType) -> list[types.CodeType]:
    return [each for each in code.co_consts if isinstance(each, types.CodeType)]


def _names(code: types.CodeType) -> set[str]:
    return set(code.co_names).union(*map(_names, _nested(code)))


def _code(code: types.CodeType) -> int:
    constants = [_constant(each) for each in code.co_consts if not isinstance(each, types.CodeType)]
    text = repr((code.co_code, code.co_names, constants, [_code(each) for each in _nested(code)]))
    return zlib.crc32(text.encode())


def _constant(value: Any) -> str:
    """The text of a constant, with sets sorted: the order of a set of strings differs in every process."""
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _array(value: Any) -> str:
    kind = f"{value.dtype}{list(value.shape)}"
    if not check.concrete(value):
        return kind
    array = np.asarray(jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value)
    if array.dtype.hasobject:
        return kind
    if array.ndim and array.nbytes > SAMPLE:
        array = array[:: -(-array.nbytes // SAMPLE)]
    return f"{kind} (checksum {checksum(array):08x})"
