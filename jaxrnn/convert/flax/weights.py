"""The linen and NNX modules with weights: the cell that each becomes, and the arrays that make up its params."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxrnn import check
from jaxrnn.cell import Cell
from jaxrnn.cells.conv_lstm import ConvLSTM, ConvLSTMParams
from jaxrnn.cells.elman import Elman, ElmanParams
from jaxrnn.cells.gru import GRU, GRUParams
from jaxrnn.cells.lstm import LSTM, LSTMParams
from jaxrnn.convert.activations import name_of
from jaxrnn.convert.gates import FLAX, Gates
from jaxrnn.convert.trees import join
from jaxrnn.layers import Embed, EmbedParams, LayerNorm, LayerNormParams, Linear, LinearParams
from jaxrnn.typing import DTypeLike, Foreign, PyTree


class Field(NamedTuple):
    """A field of the params: the sum of `terms`. Each term is several arrays of one shape, side by side."""

    shape: tuple[int | None, ...]
    terms: tuple[tuple[str, ...], ...]


class Weighted(NamedTuple):
    """A module with weights.

    `arrange` makes the params from the fields, `restore` is its inverse, and `cell` makes the cell from the params.
    """

    path: str
    module: Foreign
    params: type
    fields: dict[str, Field]
    cell: Callable[[PyTree], Cell]
    arrange: Callable[[PyTree], PyTree] = lambda params: params
    restore: Callable[[PyTree], PyTree] = lambda params: params


def place(path: str) -> str:
    """The name of a path in error messages."""
    return f"module/{path}" if path else "module"


def refuse(path: str, module: Foreign, why: str) -> NoReturn:
    """Raises the `ValueError` that says where a model has a part without a counterpart, and why."""
    raise ValueError(f"{place(path)}: {type(module).__name__}: {why}")


def check_dtype(layer: Weighted, dtype: DTypeLike) -> None:
    """Raises unless the module computes in the dtype of its weights."""
    computes = layer.module.dtype
    if computes is not None and jnp.dtype(computes) != dtype:
        refuse(layer.path, layer.module, f"it computes in {jnp.dtype(computes)}, and its weights are {dtype}")


def expect(path: str, module: Foreign, **expected: tuple[Any, ...]) -> None:
    """Raises if an attribute that the module has is not one of these values, which have a counterpart."""
    for name, values in expected.items():
        value = getattr(module, name, values[0])
        if not any(value is each or (type(value) is type(each) and value == each) for each in values):
            refuse(path, module, f"{name}={value!r} has no counterpart: expected {values[0]!r}")


def _size(module: Foreign, name: str) -> int:
    return check.integer(f"{type(module).__name__}.{name}", getattr(module, name))


def _input_size(module: Foreign) -> int | None:
    """The input size, which an NNX module states, or None for a linen module, which does not state it."""
    return _size(module, "in_features") if hasattr(module, "in_features") else None


class _Layout(NamedTuple):
    """A cell class, its params class and number of gates.

    Then its fields that are functions, and the names of the arrays of each field, in our order.
    """

    cell: type
    params: type
    gates: int
    functions: dict[str, str]
    names: dict[str, tuple[str, ...]]


_ELMAN = _Layout(Elman, ElmanParams, 1, {"activation": "activation_fn"}, {})
_LSTM = _Layout(
    LSTM,
    LSTMParams,
    4,
    {"gate_activation": "gate_fn", "activation": "activation_fn", "output_activation": "activation_fn"},
    {},
)
_GRU = _Layout(GRU, GRUParams, 3, {"gate_activation": "gate_fn", "activation": "activation_fn"}, {})


def _lstm(forget: str) -> _Layout:
    kernels = ("ii/kernel", f"{forget}/kernel", "ig/kernel", "io/kernel")
    return _LSTM._replace(
        names={"w_x": kernels, "w_h": _each(FLAX["LSTM"], "kernel"), "b": _each(FLAX["LSTM"], "bias")}
    )


def _each(gates: Gates, name: str, side: str = "h") -> tuple[str, ...]:
    return tuple(f"{side}{gate}/{name}" for gate in gates.order)


def _gru() -> _Layout:
    gates = FLAX["GRU"]
    kernels = {"w_x": _each(gates, "kernel", "i"), "w_h": _each(gates, "kernel")}
    return _GRU._replace(names={**kernels, "b": _each(gates, "bias", "i"), "b_hn": ("hn/bias",)})


def _fused(layout: _Layout, bias: str) -> _Layout:
    names = {"w_x": ("dense_i/kernel",), "w_h": ("dense_h/kernel",), "b": (f"{bias}/bias",)}
    return layout._replace(names=names)


def _recurrent(layout: _Layout, path: str, module: Foreign, spatial_shape: tuple[int, ...] | None) -> Weighted:
    inputs = _input_size(module)
    hidden = _size(module, "hidden_features" if inputs else "features")
    named = {
        field: name_of(join(place(path), name), getattr(module, name), elementwise=True)
        for field, name in layout.functions.items()
    }
    rows = {"w_x": (inputs,), "w_h": (hidden,)}
    fields = {}
    for field, names in layout.names.items():
        width = hidden if field == "b_hn" else layout.gates * hidden
        fields[field] = Field((*rows.get(field, ()), width // len(names)), (names,))

    def cell(params):
        return layout.cell(inputs or params.w_x.shape[0], hidden, **named)

    weighted = Weighted(path, module, layout.params, fields, cell)
    return _with_residual(weighted) if getattr(module, "residual", False) else weighted


def _with_residual(weighted: Weighted) -> Weighted:
    """φ(x w_x + h w_h + b + h): the identity matrix for the last h is added to w_h."""

    def shift(amount, params):
        return params._replace(w_h=params.w_h + amount * np.eye(len(params.w_h), dtype=params.w_h.dtype))

    return weighted._replace(arrange=functools.partial(shift, 1), restore=functools.partial(shift, -1))


def _conv_lstm(path: str, module: Foreign, spatial_shape: tuple[int, ...] | None) -> Weighted:
    kernel, hidden = tuple(module.kernel_size), _size(module, "features")
    ones = (1,) * len(kernel)
    expect(path, module, strides=(None, 1, ones, list(ones)), padding=("SAME",))
    if spatial_shape is None:
        refuse(path, module, "its weights do not tell the shape of an image; give spatial_shape")
    fields = {
        "w_x": Field((*kernel, None, 4 * hidden), (("ih/kernel",),)),
        "w_h": Field((*kernel, hidden, 4 * hidden), (("hh/kernel",),)),
        "b": Field((4 * hidden,), (("ih/bias",), ("hh/bias",))),
    }
    if not module.use_bias:
        del fields["b"]

    def cell(params):
        return ConvLSTM(spatial_shape, params.w_x.shape[-2], hidden, kernel)

    gates = FLAX["ConvLSTM"]

    def arrange(params):
        w_x, w_h = map(gates.read, params[:2])
        return ConvLSTMParams(w_x, w_h, gates.read(_bias(params), bias=True))

    def restore(params):
        w_x, w_h = map(gates.write, params[:2])
        return ConvLSTMParams(w_x, w_h, gates.write(_bias(params), bias=True))

    return Weighted(path, module, ConvLSTMParams, fields, cell, arrange, restore)


def _bias(params: ConvLSTMParams) -> PyTree:
    return np.zeros(params.w_x.shape[-1], params.w_x.dtype) if params.b is None else params.b


def _mgu(path: str, module: Foreign, spatial_shape: tuple[int, ...] | None) -> NoReturn:
    why = "its gate resets after the product or not at all, where that of MGU resets before; LinenCell runs it as it is"
    refuse(path, module, why)


_CELLS: dict[PyTree, Callable[[str, PyTree, PyTree], Weighted]] = {
    nn.SimpleCell: functools.partial(
        _recurrent, _ELMAN._replace(names={"w_x": ("i/kernel",), "w_h": ("h/kernel",), "b": ("i/bias",)})
    ),
    nn.LSTMCell: functools.partial(_recurrent, _lstm("if")),
    nn.OptimizedLSTMCell: functools.partial(_recurrent, _lstm("if")),
    nn.GRUCell: functools.partial(_recurrent, _gru()),
    nn.ConvLSTMCell: _conv_lstm,
    nn.MGUCell: _mgu,
    nnx.SimpleCell: functools.partial(_recurrent, _fused(_ELMAN, "dense_i")),
    nnx.LSTMCell: functools.partial(_recurrent, _lstm("if_")),
    nnx.OptimizedLSTMCell: functools.partial(_recurrent, _fused(_LSTM, "dense_h")),
    # Without a bias inside the reset.
    nnx.GRUCell: functools.partial(_recurrent, _fused(_GRU, "dense_i")),
}


def is_cell(module: Foreign) -> bool:
    """Whether `recurrent` accepts the module."""
    return type(module) in _CELLS


def recurrent(path: str, module: Foreign, spatial_shape: tuple[int, ...] | None) -> Weighted:
    """Describes one of Flax's recurrent cells."""
    expect(path, module, carry_init=(nn.initializers.zeros, None), promote_dtype=_PROMOTE)
    return _CELLS[type(module)](path, module, spatial_shape)


def linear(path: str, module: Foreign) -> Weighted:
    """Describes Dense of linen, or Linear of NNX."""
    expect(
        path,
        module,
        promote_dtype=_PROMOTE,
        dot_general=(None, lax.dot_general),
        dot_general_cls=(None,),
        preferred_element_type=(None,),
    )
    inputs = _input_size(module)
    size = _size(module, "out_features" if inputs else "features")
    fields = {"w": Field((inputs, size), (("kernel",),)), "b": Field((size,), (("bias",),))}
    if not module.use_bias:
        del fields["b"]
    return Weighted(path, module, LinearParams, fields, lambda params: Linear(inputs or params.w.shape[0], size))


def embed(path: str, module: Foreign) -> Weighted:
    """Describes Embed."""
    expect(path, module, promote_dtype=_PROMOTE)
    shape = (_size(module, "num_embeddings"), _size(module, "features"))
    return Weighted(path, module, EmbedParams, {"w": Field(shape, (("embedding",),))}, lambda _: Embed(*shape))


def layer_norm(path: str, module: Foreign) -> Weighted:
    """Describes LayerNorm."""
    last = (-1, (-1,), [-1])
    expect(
        path,
        module,
        reduction_axes=last,
        feature_axes=last,
        axis_name=(None,),
        axis_index_groups=(None,),
        use_scale=(True,),
        promote_dtype=_PROMOTE,
    )
    size = _size(module, "num_features") if hasattr(module, "num_features") else None
    fields = {"scale": Field((size,), (("scale",),)), "b": Field((size,), (("bias",),))}
    if not module.use_bias:
        del fields["b"]
    epsilon = float(module.epsilon)
    return Weighted(path, module, LayerNormParams, fields, lambda params: LayerNorm(len(params.scale), epsilon))


_PROMOTE = (nn.Dense.promote_dtype, inspect.signature(nnx.Linear.__init__).parameters["promote_dtype"].default)
