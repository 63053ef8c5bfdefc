"""Converts cells and params to the variables of Flax modules."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from jaxrnn.cell import Cell
from jaxrnn.cells.conv_lstm import ConvLSTM
from jaxrnn.compose.parallel import Bidirectional
from jaxrnn.compose.stack import Stack
from jaxrnn.compose.wrap import Backward
from jaxrnn.convert.cells import Placed
from jaxrnn.convert.flax.layers import Both, Fixed, Own, Reversed, Sequence, describe
from jaxrnn.convert.flax.weights import Weighted, check_dtype
from jaxrnn.convert.trees import join, leaves, nested
from jaxrnn.engines.arrays import on_device
from jaxrnn.flax.bridge import from_params
from jaxrnn.typing import DTypeLike, Foreign, Named, PyTree


def write_variables(module: Foreign, model: Placed) -> PyTree:
    """The variables with which the module computes the same function as the model; see `to_flax`."""
    return _variables(module, jax.tree.map(on_device, _write(describe(module, _spatial_shape(model.cell)), model)))


def _write(layer: Foreign, model: Placed) -> Named:
    """The arrays of a module, by path."""
    where = layer.path or "the module"
    match layer, model.cell:
        case Sequence(layers=layers), Stack(cells=cells, skip=False) if len(cells) == len(layers):
            inside = zip(layers, cells, model.params, strict=True)
            each = [
                _write(below, Placed(cell, params, f"{model.place}.cells[{k}]"))
                for k, (below, cell, params) in enumerate(inside)
            ]
            return {name: array for arrays in each for name, array in arrays.items()}
        case Reversed(layer=inner), Backward():
            return _write(inner, model.part("cell", model.params))
        case Both(merge=merge), Bidirectional(merge=ours) if merge == ours:
            params = model.params
            forward = _write(layer.forward, model.part("forward", params.forward))
            return forward | _write(layer.backward, model.part("backward", params.backward))
        case Fixed(cell=cell), _ if cell == model.cell:
            return {}
        case Own(cell=cell), _ if cell == model.cell:
            return _write_own(layer, model)
        case Weighted(), _:
            return _write_weighted(layer, model)
    return model.refuse(f"{where} is {_described(layer)}")


def _described(layer: Foreign) -> str:
    match layer:
        case Sequence(layers=layers):
            return f"a sequence of {len(layers)} layers"
        case Reversed():
            return "a layer that runs in reverse"
        case Both(merge=merge):
            return f"a Bidirectional that merges by {merge!r}"
    return repr(layer.cell)


def _write_own(layer: Foreign, model: Placed) -> Named:
    return {join(layer.path, name): leaf for name, leaf in leaves(from_params(model.cell, model.params)).items()}


def _write_weighted(layer: Foreign, model: Placed) -> Named:
    where, kind = layer.path or "the module", type(layer.module).__name__
    if type(model.params) is not layer.params:
        model.refuse(f"{where} is a {kind}")
    expected = layer.cell(model.params)
    if model.cell != expected:
        model.refuse(f"{where} is a {kind}, which computes {expected!r}")
    fields = layer.restore(model.params)._asdict()
    dtype = next(leaf.dtype for leaf in fields.values() if leaf is not None)
    check_dtype(layer, dtype)
    for name, leaf in fields.items():
        if name not in layer.fields and leaf is not None and np.any(leaf != 0):
            model.refuse(f"{name} is not zero, and a {kind} at {where} has no such weights")
    arrays = {}
    for name, field in layer.fields.items():
        arrays |= _divided(layer, field, fields[name], dtype)
    return arrays


def _divided(layer: Foreign, field: Foreign, value: Any, dtype: DTypeLike) -> Named:
    """The arrays of a field. The first term takes the whole value, and the other terms are zeros."""
    value = np.zeros(field.shape[0] * len(field.terms[0]), dtype) if value is None else value
    arrays = {}
    for k, names in enumerate(field.terms):
        parts = np.split(value if k == 0 else np.zeros_like(value), len(names), axis=-1)
        arrays |= {join(layer.path, name): part for name, part in zip(names, parts, strict=True)}
    return arrays


def _variables(module: Foreign, arrays: Named) -> PyTree:
    if isinstance(module, nn.Module):
        return {"params": nested(arrays)}

    def take(path, leaf):
        name = "/".join(str(entry.key) for entry in path)
        given = arrays.pop(name, None)
        if given is None or given.shape != leaf.shape:
            raise ValueError(f"module: {name}: the module has shape {leaf.shape}, got {getattr(given, 'shape', None)}")
        return given

    return jax.tree_util.tree_map_with_path(take, nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def _spatial_shape(cell: Cell) -> PyTree:
    """The spatial shape S of the first ConvLSTM in a model."""
    match cell:
        case ConvLSTM():
            return cell.spatial_shape
        case Stack(cells=cells):
            return next(filter(None, map(_spatial_shape, cells)), None)
        case Bidirectional(forward=inner) | Backward(cell=inner):
            return _spatial_shape(inner)
    return None
