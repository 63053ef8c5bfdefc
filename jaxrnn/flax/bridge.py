"""The bridge between cells and Flax: params as nested dicts of named arrays, runs with Flax's names, Flax's cells as
cells.
"""

# What other cells are by a class variable, some here are by a property.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.arguments import Names
from jaxrnn.cell import Cell, input_size
from jaxrnn.cells.lstm import LSTMCarry
from jaxrnn.engines.arrays import accumulator, cast_like, inexact
from jaxrnn.exporting import name_types
from jaxrnn.foreign_names import NAMES
from jaxrnn.sequence import scan_asked
from jaxrnn.typing import Foreign, Named, PyTree, Size

# What a Flax module and the adapters use themselves; a param of such a name gets an underscore behind it.
TAKEN = frozenset(
    "apply bind cell clone copy deterministic eval get_variable has_rng has_variable implementation init "  # noqa: SIM905
    "init_with_output is_initializing is_mutable_collection iter_children iter_modules lazy_init make_rng "
    "module_paths name param param_dtype params parent path perturb put_variable remat_every reverse rng_collection "
    "rngs scan scope set_attributes set_view setup sow step tabulate time_major train unbind variable variables".split()
)


def check_cell(cell: Foreign) -> None:
    """It is one of ours, not a Flax module."""
    if any(kind.__module__.startswith("flax.") for kind in type(cell).__mro__):
        name = type(cell).__name__
        ours = f"; jaxrnn.{NAMES[name]} is the cell" if name in NAMES else ""
        raise TypeError(
            f"cell: expected a jaxrnn.Cell, got Flax's {name}{ours}, and jaxrnn.convert.from_flax(module, variables) "
            "makes one of a module with its weights"
        )
    check.a_cell("cell", cell)


def from_params(cell: Cell, params: PyTree) -> Named:
    """Converts the params of `cell` to nested dicts of arrays, as a Flax module holds them:
    `{"layer_0": {"w_x": ...}}`.

    A field of a named tuple keeps its name, entry k of a tuple becomes `layer_k`, a key of a dict becomes its string,
    and params that are one bare array become `w`. At the top level, a name that Flax modules use themselves gets an
    underscore at its end: `cell_`. Arrays that the cell's options leave out are absent; an array that was replaced by
    None stays None.

    Raises:
      ValueError: If the params are not those of the cell.

    Examples:
      >>> import jax, jaxrnn
      >>> from jaxrnn.linen import from_params, to_params
      >>> cell = jaxrnn.LearnedCarry(jaxrnn.Elman(2, 3))
      >>> params = cell.init(jax.random.key(0))
      >>> tree = from_params(cell, params)
      >>> jax.tree.map(lambda leaf: leaf.shape, tree)
      {'carry': {'h': (3,)}, 'cell_': {'b': (3,), 'w_h': (3, 3), 'w_x': (2, 3)}}
      >>> jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), to_params(cell, tree), params))
      True
    """
    found = {path: leaf for path, leaf in _with_none(params) if leaf is not None}
    tree: Named = {}
    for path, names in _layout(cell):
        *above, last = names
        functools.reduce(lambda node, name: node.setdefault(name, {}), above, tree)[last] = found.pop(path, None)
    if found:
        raise ValueError(f"params: {cell!r} has no {', '.join(map(jax.tree_util.keystr, found))}")
    return tree


def to_params(cell: Cell, tree: Mapping[str, PyTree]) -> PyTree:
    """Converts nested dicts of arrays, as `from_params` makes them and a Flax module holds them, to the params of
    `cell`.

    Raises:
      ValueError: If a name is missing, or if the cell does not have it. None stands for an absent bias.

    Examples:
      >>> import jax.numpy as jnp, jaxrnn
      >>> from jaxrnn.linen import to_params
      >>> to_params(jaxrnn.Linear(3, 2), {"w": jnp.ones((3, 2)), "b": None}).w.shape
      (3, 2)
    """
    layout = _layout(cell)
    unknown = sorted(set(_flat(tree)) - {names for _, names in layout})
    if unknown:
        raise ValueError(f"params: {cell!r} has no {'/'.join(unknown[0])}")
    leaves = [_get(cell, tree, names) for _, names in layout]
    return jax.tree.unflatten(jax.tree.structure(check.shapes_of_params(cell)), leaves)


def top_names(cell: Cell) -> tuple[str, ...]:
    """Returns the names at the top level of `from_params`."""
    return tuple(dict.fromkeys(names[0] for _, names in _layout(cell)))


@functools.lru_cache(maxsize=512)
def _layout(cell: Cell) -> tuple[tuple[PyTree, tuple[str, ...]], ...]:
    """Returns, for every array in the cell's params, its path and the names of its path."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(check.shapes_of_params(cell))]
    layout = []
    for path in paths:
        first, *rest = [_name(entry) for entry in path] or ["w"]
        layout.append((path, (f"{first}_" if first in TAKEN else first, *rest)))
    names = [each for _, each in layout]
    if len(set(names)) != len(names):
        raise ValueError(f"params: two arrays of {cell!r} have one name: {sorted('/'.join(each) for each in names)}")
    return tuple(layout)


def _name(entry: Foreign) -> str:
    match entry:
        case jax.tree_util.GetAttrKey(name=name):
            return name
        case jax.tree_util.SequenceKey(idx=index) | jax.tree_util.FlattenedIndexKey(key=index):
            return f"layer_{index}"
        case _:
            return str(entry.key)


def _with_none(tree: PyTree) -> list:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)


def _flat(tree: PyTree, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(tree, Mapping):
        return [above]
    return [names for name, below in tree.items() for names in _flat(below, (*above, name))]


def _get(cell: Cell, tree: PyTree, names: tuple[str, ...]) -> PyTree:
    for name in names:
        if not isinstance(tree, Mapping) or name not in tree:
            raise ValueError(f"params: {cell!r} expects {'/'.join(names)}; put None there to leave out a bias")
        tree = tree[name]
    return tree


@functools.lru_cache(maxsize=512)
def draws(cell: Cell) -> bool:
    """Whether the cell draws noise when it is given a key."""
    return bool(jax.tree.leaves(jax.eval_shape(lambda key: cell.noise(key, 1, ()), check.shape_of_key())))


def check_deterministic(cell: Cell, *given: bool | None) -> None:
    """Raises an error if nobody has said whether noise is drawn."""
    if all(each is None for each in given):
        raise ValueError(
            f"deterministic: expected True or False, of the RNN or of the call, since {cell!r} draws noise; got neither"
        )


def run(
    cell: Cell,
    params: PyTree,
    xs: PyTree,
    *,
    initial_carry: Any,
    seq_lengths: PyTree,
    mask: PyTree,
    time_major: bool,
    **keywords: Any,
) -> tuple[PyTree, PyTree]:
    """Runs `jaxrnn.scan` in Flax's layout, with Flax's names in its errors."""
    return scan_asked(
        None,
        cell,
        params,
        initial_carry,
        xs,
        lengths=seq_lengths,
        mask=mask,
        time_axis=0 if time_major else _time_axis(cell, xs),
        names=Names("initial_carry", "seq_lengths"),
        **keywords,
    )


def _time_axis(cell: Cell, xs: PyTree) -> int:
    """Returns the position of the time axis if it is the last axis before those of one step."""
    leaves, ndims = jax.tree.leaves(xs), jax.tree.leaves(cell.input_ndim)
    axis = jnp.ndim(leaves[0]) - ndims[0] - 1 if leaves else 0
    if axis < 0:
        raise ValueError(f"xs: {cell!r} takes a time axis and {ndims[0]} more, got shape {jnp.shape(leaves[0])}")
    return axis


class FlaxCarry(NamedTuple):
    """The carry of a Flax cell whose carry is one array, h."""

    h: Array


name_types([FlaxCarry])


class FlaxCell(Cell):
    """A Flax cell as a cell; a subclass defines how it begins and how it steps.

    Its carry gets names. One array becomes `FlaxCarry(h)`. Two arrays become `LSTMCarry(h, c)` if the step outputs one
    of them, which is then h; this reverses Flax's (c, h). Any other bare tuple becomes a dict with entries `carry_0`,
    `carry_1` and so on; a named tuple, a dict or another tree stays as it is.
    """

    @abstractmethod
    def begin(self, params: PyTree, key: Array, shape: tuple[int, ...]) -> PyTree:
        """Returns Flax's carry for an x of this shape."""

    @abstractmethod
    def run(self, params: PyTree, carry: PyTree, x: Array) -> tuple[PyTree, PyTree]:
        """Runs Flax's step: (carry', y)."""

    def __post_init__(self):
        sizes = input_size(self)
        for size in sizes if isinstance(sizes, tuple) else (sizes,):
            check.integer(f"{type(self).__name__}.input_size", size)
        shapes = check.shapes_of_params(self)
        with jax.ensure_compile_time_eval():
            params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            one, other = (self.begin(params, jax.random.key(seed), self.x_shape()) for seed in (0, 1))
            constant = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))
        if not constant:
            raise ValueError(
                f"{type(self).__name__}: expected a carry that begins the same every time, but {self!r} draws it at "
                "random. Give it a constant carry_init, and train its carry with LearnedCarry or pass yours as `carry` "
                "to scan"
            )

    @property
    def input_ndim(self) -> int:
        return len(self.x_shape())

    @property
    def output_size(self) -> PyTree:
        return _traced(self).output_size

    @property
    def recurrent_state(self) -> str | None:
        return _traced(self).state

    def x_shape(self, batch_shape: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Returns the shape of x at one step."""
        size = input_size(self)
        return (*batch_shape, *(size if isinstance(size, tuple) else (size,)))

    def initial_carry(self, params: PyTree, batch_shape: tuple[int, ...] = ()) -> PyTree:
        carry = jax.tree.map(jnp.asarray, self.begin(params, jax.random.key(0), self.x_shape(batch_shape)))
        dtypes = [jnp.finfo(leaf.dtype).dtype for leaf in jax.tree.leaves(params) if inexact(leaf)]

        def widen(leaf):
            return leaf.astype(accumulator(leaf.dtype, *dtypes)) if inexact(leaf) else leaf

        return _named(jax.tree.map(widen, carry), _traced(self).hidden)

    def step(self, params, carry, x, noise=None):
        if jax.tree.leaves(noise):
            raise TypeError(f"noise: {self!r} has no place for it, so RecurrentDropout cannot go around it")
        traced = _traced(self)
        new, y = self.run(params, _unnamed(carry, traced.carry, traced.hidden), x)
        new = cast_like(_named(new, traced.hidden), carry, owner=type(self).__name__)
        return new, jax.tree.map(lambda leaf: _in_dtype_of(x, leaf), y)


def _in_dtype_of(x: Array, y: Array) -> Array:
    same_kind = inexact(x) and inexact(y) and jnp.can_cast(y.dtype, x.dtype, casting="same_kind")
    return y.astype(x.dtype) if same_kind else y


class _Traced(NamedTuple):
    """The result of tracing a Flax cell: its carry, the leaf of it that the step outputs, the name of this leaf, and
    the size of y.
    """

    carry: PyTree
    hidden: int | None
    state: str | None
    output_size: Size


@functools.lru_cache(maxsize=512)
def _traced(cell: FlaxCell) -> _Traced:
    params = check.shapes_of_params(cell)
    x = jax.ShapeDtypeStruct(cell.x_shape(), jnp.float32)
    carry = jax.eval_shape(lambda params: cell.begin(params, jax.random.key(0), x.shape), params)
    jaxpr, (_, y) = jax.make_jaxpr(cell.run, return_shape=True)(params, carry, x)
    leaves, structure = jax.tree.flatten(carry)
    # One variable of the program twice among its results: the output is that part of the carry.
    after, out = jaxpr.jaxpr.outvars[: len(leaves)], jaxpr.jaxpr.outvars[len(leaves) :]
    hidden = next((k for k, var in enumerate(after) if len(out) == 1 and var is out[0]), None)
    named = _named(jax.tree.unflatten(structure, range(len(leaves))), hidden)
    state = next((field for field in getattr(named, "_fields", ()) if getattr(named, field) == hidden), None)
    shape = y.shape if isinstance(y, jax.ShapeDtypeStruct) else None
    return _Traced(carry, hidden, state, shape[0] if shape is not None and len(shape) == 1 else shape)


def _named(carry: PyTree, hidden: int | None) -> PyTree:
    leaves = jax.tree.leaves(carry)
    if len(leaves) == 1:
        return FlaxCarry(leaves[0])
    if len(leaves) == 2 and hidden is not None and type(carry) in (tuple, list):
        return LSTMCarry(leaves[hidden], leaves[1 - hidden])
    return _entries(carry)


def _entries(carry: PyTree) -> PyTree:
    if type(carry) in (tuple, list):
        return {f"carry_{k}": _entries(each) for k, each in enumerate(carry)}
    return carry


def _unnamed(carry: PyTree, like: PyTree, hidden: int | None) -> PyTree:
    structure = jax.tree.structure(like)
    if structure.num_leaves == 1:
        return jax.tree.unflatten(structure, [carry.h])
    if isinstance(carry, LSTMCarry) and type(like) in (tuple, list):
        return jax.tree.unflatten(structure, [carry.h, carry.c] if hidden == 0 else [carry.c, carry.h])
    return _positions(carry, like)


def _positions(carry: PyTree, like: PyTree) -> PyTree:
    if type(like) in (tuple, list):
        return type(like)(_positions(carry[f"carry_{k}"], each) for k, each in enumerate(like))
    return carry
