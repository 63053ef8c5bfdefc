"""Checks of arguments: every message names the argument, the expected value and the given one."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np

from jaxrnn.cell import Cell
from jaxrnn.typing import PyTree


def brief(value: object) -> str:
    """What `value` is, in at most a line: its type alone where it holds arrays."""
    text = repr(value)
    holds_arrays = any(isinstance(leaf, (np.ndarray, jax.Array)) for leaf in jax.tree.leaves(value))
    return f"{type(value).__name__}" if holds_arrays or len(text) > 120 else text


def a_cell(name: str, value: object) -> Cell:
    """Checks that `value` is a cell, and returns it."""
    if not isinstance(value, Cell):
        hint = " (the class; write e.g. GRU(3, 16))" if isinstance(value, type) else ""
        for field in ("cell", "model"):
            if isinstance(getattr(value, field, None), Cell):
                hint = f"; pass its .{field}"
        if callable(value) and getattr(value, "__module__", "").startswith(("jax.", "jax_", "flax.")) and not hint:
            hint = "; a function of every step is the layer Apply(function)"
        raise TypeError(f"{name}: expected a jaxrnn.Cell, got {brief(value)}{hint}")
    return value


def integer(name: str, value: Any, *, least: int = 1) -> int:
    """Checks that `value` is an integer of at least `least`, and returns it as a Python integer."""
    if isinstance(value, bool) or not hasattr(type(value), "__index__") or isinstance(value, jax.core.Tracer):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if operator.index(value) < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return operator.index(value)


def positive(name: str, value: Any) -> None:
    """Checks that `value` is a positive number."""
    _number(name, value)
    if not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def rate(name: str, value: Any, *, one_allowed: bool = False) -> None:
    """Checks that `value` is a probability, and below 1 unless `one_allowed`."""
    _number(name, value)
    if not (0 <= value < 1 or (one_allowed and value == 1)):
        interval = "[0, 1]" if one_allowed else "[0, 1)"
        raise ValueError(f"{name}: expected a number in {interval}, got {value}")


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def fields(owner: Cell, **checks: Callable[..., Any]) -> None:
    """Checks fields of a cell with functions of a name and a value; a field whose default is None may be None."""
    for name, expect in checks.items():
        value = getattr(owner, name)
        if value is not None or getattr(type(owner), name, ...) is not None:
            expect(f"{type(owner).__name__}.{name}", value)


def sizes(owner: Cell, *names: str) -> None:
    """Checks that fields of a cell are integers of at least 1; a field whose default is None may be None."""
    fields(owner, **dict.fromkeys(names, integer))


def steps(owner: Any) -> None:
    """Checks the range of the lengths of steps that a cell draws."""
    fields(owner, step_min=positive, step_max=positive)
    if owner.step_min > owner.step_max:
        name = type(owner).__name__
        raise ValueError(f"{name}.step_min: expected at most step_max, {owner.step_max}, got {owner.step_min}")


def concrete(value: object) -> bool:
    """Whether the numbers in `value` can be read now."""
    if isinstance(value, jax.core.Tracer):
        return False
    return not isinstance(value, jax.Array) or value.is_fully_addressable


def shape_of_key() -> jax.ShapeDtypeStruct:
    """A key to ask for shapes with; a real one would stay in the program that is being traced."""
    return jax.eval_shape(lambda: jax.random.key(0))


@functools.lru_cache(maxsize=512)  # not without bound, since a cell may hold a closure
def shapes_of_params(cell) -> PyTree:
    """The shapes and dtypes that `cell.init` would allocate."""
    return jax.eval_shape(cell.init, shape_of_key())


@functools.lru_cache(maxsize=512)
def shapes_of_carry(cell, batch_shape: tuple[int, ...] = ()) -> PyTree:
    """The shapes and dtypes of `cell.initial_carry`."""
    return jax.eval_shape(lambda key: cell.initial_carry(cell.init(key), batch_shape), shape_of_key())


def params(cell: Cell, given: PyTree) -> None:
    """Checks that `given` has the type and shapes of `cell.init`; the cell's `optional_params` may be None instead."""
    _as_expected(repr(cell), shapes_of_params(cell), given, cell.optional_params)


def kind(given: PyTree, expected: type) -> None:
    """Checks that `given` are params of the type that a free function takes."""
    if type(given) is not expected:
        raise TypeError(f"params: expected {expected.__name__}, got {type(given).__name__}")


def drawn(given: PyTree, init: Callable[..., PyTree], *arguments: Any, **options: Any) -> None:
    """Checks that `given` has the shapes of `init(key, *arguments, **options)`; biases and peepholes may be None."""
    expected = _shapes_of_drawn(init, arguments, tuple(options.items()))
    _as_expected(f"{init.__name__}{arguments}", expected, given, Cell.optional_params)


@functools.lru_cache(maxsize=512)
def _shapes_of_drawn(init, arguments, options) -> PyTree:
    return jax.eval_shape(lambda key: init(key, *arguments, **dict(options)), shape_of_key())


def _as_expected(owner: str, expected: PyTree, given: PyTree, optional: tuple[str, ...]) -> None:
    if type(given) is not type(expected):
        raise TypeError(f"params: {owner} takes {type(expected).__name__}, got {type(given).__name__}")
    structure, leaves = _with_none(expected)
    given_structure, given_leaves = _with_none(given)
    if structure != given_structure:
        raise TypeError(f"params: {owner} takes {structure}, got {given_structure}")
    for (path, want), (_, have) in zip(leaves, given_leaves, strict=True):
        name = f"params{jax.tree_util.keystr(path)}"
        if want is None and have is not None:
            raise ValueError(f"{name}: {owner} has no such parameter and expects None, got shape {np.shape(have)}")
        if have is None and want is not None and getattr(path[-1], "name", None) not in optional:
            raise ValueError(f"{name}: {owner} expects shape {want.shape}, got None")
        if want is not None and have is not None and np.shape(have) != want.shape:
            raise ValueError(f"{name}: {owner} expects shape {want.shape}, got {np.shape(have)}")


def _with_none(tree: PyTree):
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)
    return structure, leaves
