"""Converts Flax modules to cells and params."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from jaxrnn import check
from jaxrnn.cell import Cell
from jaxrnn.compose.parallel import Bidirectional, BidirectionalPair
from jaxrnn.compose.stack import Stack
from jaxrnn.compose.wrap import Backward
from jaxrnn.convert.arrays import Arrays
from jaxrnn.convert.flax.layers import Both, Fixed, Own, Reversed, Sequence, describe
from jaxrnn.convert.flax.weights import check_dtype
from jaxrnn.convert.trees import join, leaves, nested
from jaxrnn.engines.arrays import on_device
from jaxrnn.flax.bridge import from_params, to_params
from jaxrnn.typing import Foreign, Named, PyTree, WithParams


def read_module(
    module: Foreign, variables: Mapping[str, PyTree] | None, spatial_shape: tuple[int, ...] | None
) -> WithParams:
    """The cell and the params; see `from_flax`."""
    layer = describe(module, spatial_shape)
    found = _flat(module, variables)
    absent = {name for name, leaf in found.items() if leaf is None}
    arrays = Arrays("params", {name: leaf for name, leaf in found.items() if name not in absent})
    cell, params = _read(layer, arrays, absent)
    arrays.finish()
    if absent:
        raise ValueError(f"params: {min(absent)}: expected an array, got None")
    return cell, jax.tree.map(on_device, params)


def _flat(module: Foreign, variables: Any) -> Named:
    """The arrays of a module by path, with None for arrays that were replaced by None."""
    if isinstance(module, nnx.Module):
        given = nnx.state(module, nnx.Param) if variables is None else variables
        if not isinstance(given, Mapping):
            raise TypeError(f"variables: expected a state or nested dict of the module, got {type(given).__name__}")
        return leaves(nnx.to_pure_dict(given) if isinstance(given, nnx.State) else given)
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables: expected {{'params': ...}} of the linen module, got {type(variables).__name__}")
    for name, below in variables.items():
        if name != "params" and not (isinstance(below, Mapping) and not below):
            raise ValueError(f"variables: expected 'params' alone, got {name!r} too")
    tree = variables.get("params", {})
    if not isinstance(tree, Mapping):
        raise TypeError(f"params: expected nested dicts of arrays, got {type(tree).__name__}")
    found = leaves(tree)
    return {name: leaf.unbox() if isinstance(leaf, nn.meta.AxisMetadata) else leaf for name, leaf in found.items()}


def _read(layer: Foreign, arrays: Arrays, absent: set[str]) -> WithParams:
    match layer:
        case Sequence(layers=layers):
            cells = [_read(each, arrays, absent) for each in layers]
            return Stack(tuple(cell for cell, _ in cells)), tuple(params for _, params in cells)
        case Reversed(layer=inner):
            cell, params = _read(inner, arrays, absent)
            return Backward(cell), params
        case Both(forward=forward, backward=backward, merge=merge):
            (a, p), (b, q) = _read(forward, arrays, absent), _read(backward, arrays, absent)
            return Bidirectional(a, b, merge), BidirectionalPair(p, q)
        case Fixed(cell=cell):
            return cell, ()
        case Own():
            return layer.cell, _read_own(layer, arrays, absent)
    return _read_weighted(layer, arrays)


def _read_weighted(layer: Foreign, arrays: Arrays) -> WithParams:
    taken = {field: _take(layer, each, arrays) for field, each in layer.fields.items()}
    check_dtype(layer, next(iter(taken.values())).dtype)
    params = layer.arrange(layer.params(**{field: taken.get(field) for field in layer.params._fields}))
    return layer.cell(params), params


def _take(layer: Foreign, field: Foreign, arrays: Arrays) -> PyTree:
    total, shape = None, field.shape
    for names in field.terms:
        parts = []
        for name in names:
            parts.append(arrays.take(join(layer.path, name), *shape))
            shape = parts[-1].shape
        side_by_side = np.concatenate(parts, axis=-1)
        total = side_by_side if total is None else total + side_by_side
    return total


def _read_own(layer: Foreign, arrays: Arrays, absent: set[str]) -> PyTree:
    def take(path, shape):
        name = join(layer.path, path)
        if name in absent or path in layer.absent:
            absent.discard(name)
            return None
        return arrays.take(name, *shape)

    shapes = _own_shapes(layer.cell)
    params = to_params(layer.cell, nested({path: take(path, shape) for path, shape in shapes.items()}))
    check.params(layer.cell, params)
    return params


def _own_shapes(cell: Cell) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in leaves(from_params(cell, check.shapes_of_params(cell))).items()}
