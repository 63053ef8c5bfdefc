"""Describes linen and NNX modules as layers: which cell each layer is, and where its arrays are."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxrnn.cell import Cell
from jaxrnn.compose.parallel import MERGES
from jaxrnn.convert.activations import name_of
from jaxrnn.convert.flax import weights
from jaxrnn.convert.flax.weights import Weighted, expect, refuse
from jaxrnn.convert.trees import join, leaves
from jaxrnn.flax import bridge
from jaxrnn.flax import linen as our_linen
from jaxrnn.flax import nnx as our_nnx
from jaxrnn.layers import Apply, Dropout
from jaxrnn.typing import Foreign, PyTree


class Fixed(NamedTuple):
    """A layer without weights."""

    path: str
    cell: Cell


class Own(NamedTuple):
    """A module of this package: its cell, and the names of the arrays that were replaced by None."""

    path: str
    cell: Cell
    absent: frozenset[str]


class Reversed(NamedTuple):
    """A layer that runs from the end of the sequence to its start."""

    path: str
    layer: Foreign


class Both(NamedTuple):
    """Two layers that run in opposite directions."""

    path: str
    forward: Foreign
    backward: Foreign
    merge: str


class Sequence(NamedTuple):
    """Layers that run one after another."""

    path: str
    layers: tuple[Foreign, ...]


class _Walk(NamedTuple):
    """The state of the walk through a model: the spatial shape S of its images, and the modules that it has met."""

    spatial_shape: tuple[int, ...] | None
    met: set[int]


def describe(module: Foreign, spatial_shape: tuple[int, ...] | None = None) -> PyTree:
    """The layers of a module.

    Raises:
      TypeError: If `module` is not a Flax module.
      ValueError: If a module or an option has no counterpart.
    """
    if not isinstance(module, (nn.Module, nnx.Module)):
        raise TypeError(f"module: expected a module of flax.linen or flax.nnx, got {type(module).__name__}")
    walk = _Walk(spatial_shape, set())
    return _cell(walk, "", module) if weights.is_cell(module) else _layer(walk, "", module)


def _layer(walk: _Walk, path: str, module: Foreign) -> PyTree:
    kind = type(module)
    if kind in _LAYERS:
        return _LAYERS[kind](walk, path, module)
    if isinstance(module, (nn.RNNCellBase, nnx.RNNCellBase)):
        refuse(path, module, "a cell runs over a sequence in an RNN; put one around it")
    if isinstance(module, (nn.Module, nnx.Module)):
        refuse(path, module, "it has no counterpart among the cells")
    return Fixed(path, Apply(name_of(weights.place(path), module)))


def _once(walk: _Walk, path: str, module: Foreign) -> None:
    if id(module) in walk.met:
        refuse(path, module, "it is there twice and shares its weights; the cells of a model have each their own")
    walk.met.add(id(module))


def _cell(walk: _Walk, path: str, module: Foreign) -> Weighted:
    _once(walk, path, module)
    return weights.recurrent(path, module, walk.spatial_shape)


def _weighted(build: Callable[[str, PyTree], Weighted]) -> Callable[..., Weighted]:
    def layer(walk: _Walk, path: str, module: Foreign) -> Weighted:
        _once(walk, path, module)
        return build(path, module)

    return layer


def _dropout(walk: _Walk, path: str, module: Foreign) -> Fixed:
    expect(path, module, broadcast_dims=((), []))
    return Fixed(path, Dropout(module.rate))


def _rnn(walk: _Walk, path: str, module: Foreign) -> PyTree:
    if module.reverse and not module.keep_order:
        refuse(path, module, "reverse=True without keep_order=True puts its outputs out from the end to the start")
    layer = _inner(walk, path, module)
    return Reversed(path, layer) if module.reverse else layer


def _inner(walk: _Walk, path: str, module: Foreign) -> PyTree:
    expect(path, module, variable_carry=(False,), variable_broadcast=("params",))
    if dict(getattr(module, "variable_axes", {})) or dict(getattr(module, "split_rngs", {})).get("params"):
        refuse(path, module, "variable_axes and split_rngs of params give every step its own weights")
    path = join(path, "cell")
    if not weights.is_cell(module.cell):
        refuse(path, module.cell, "the cell has no counterpart; jaxrnn.linen.LinenCell and jaxrnn.nnx.from_nnx run it")
    return _cell(walk, path, module.cell)


def _bidirectional(walk: _Walk, path: str, module: Foreign) -> Both:
    def direction(name):
        rnn = getattr(module, name)
        if type(rnn) not in (nn.RNN, nnx.RNN):
            refuse(join(path, name), rnn, "expected an RNN")
        # It is told its direction, and to keep the order, in the call.
        return _inner(walk, join(path, name), rnn)

    forward, backward = direction("forward_rnn"), direction("backward_rnn")
    for name, functions in _MERGES.items():
        if any(module.merge_fn is function for function in functions):
            return Both(path, forward, backward, name)
    return refuse(path, module, f"merge_fn={module.merge_fn!r}: expected the default, jnp.add or jnp.multiply")


_MERGES = {
    "concat": (
        nn.Bidirectional.merge_fn,
        inspect.signature(nnx.Bidirectional.__init__).parameters["merge_fn"].default,
        MERGES["concat"],
    ),
    "sum": (jnp.add, operator.add, lax.add, MERGES["sum"]),
    "mul": (jnp.multiply, operator.mul, lax.mul, MERGES["mul"]),
    "average": (MERGES["average"],),
    "tuple": (MERGES["tuple"],),
}


def merge_function(name: str) -> Callable[..., PyTree]:
    """The `merge_fn` of Flax that corresponds to a `merge` of ours."""
    return _MERGES[name][0]


def _sequential(walk: _Walk, path: str, module: Foreign) -> Sequence:
    separator = "/" if type(module) is nnx.Sequential else "_"
    if not module.layers:
        refuse(path, module, "expected at least one layer")
    *before, _ = steps = list(_flat(module))
    for each in before:
        if getattr(each, "return_carry", False):
            refuse(path, each, "return_carry=True hands the next layer a carry and outputs; only the last may have it")
    if len({bool(each.time_major) for each in steps if hasattr(each, "time_major")}) > 1:
        refuse(path, module, "some of its layers are time-major and some are not")
    layers = (_layer(walk, join(path, f"layers{separator}{k}"), each) for k, each in enumerate(module.layers))
    return Sequence(path, tuple(layers))


def _flat(module: Foreign) -> Iterator[PyTree]:
    if type(module) in (nn.Sequential, nnx.Sequential):
        for each in module.layers:
            yield from _flat(each)
    else:
        yield module


def _own(walk: _Walk, path: str, module: Foreign) -> PyTree:
    _once(walk, path, module)
    absent = frozenset()
    if type(module) is our_nnx.RNN:
        tree = {name: getattr(module, name) for name in bridge.top_names(module.cell)}
        absent = frozenset(name for name, leaf in leaves(tree).items() if leaf is None)
    layer = Own(path, module.cell, absent)
    return Reversed(path, layer) if module.reverse else layer


_LAYERS: dict[PyTree, Callable[..., PyTree]] = {
    nn.Dense: _weighted(weights.linear),
    nnx.Linear: _weighted(weights.linear),
    nn.Embed: _weighted(weights.embed),
    nnx.Embed: _weighted(weights.embed),
    nn.LayerNorm: _weighted(weights.layer_norm),
    nnx.LayerNorm: _weighted(weights.layer_norm),
    nn.Dropout: _dropout,
    nnx.Dropout: _dropout,
    nn.RNN: _rnn,
    nnx.RNN: _rnn,
    nn.Bidirectional: _bidirectional,
    nnx.Bidirectional: _bidirectional,
    nn.Sequential: _sequential,
    nnx.Sequential: _sequential,
    our_linen.RNN: _own,
    our_nnx.RNN: _own,
}
