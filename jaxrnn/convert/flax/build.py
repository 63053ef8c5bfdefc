"""Builds linen modules from cells."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrnn.cells.conv_lstm import ConvLSTM
from jaxrnn.cells.elman import Elman
from jaxrnn.cells.gru import GRU
from jaxrnn.cells.lstm import LSTM
from jaxrnn.compose.parallel import Bidirectional
from jaxrnn.compose.stack import Stack
from jaxrnn.compose.wrap import Backward
from jaxrnn.convert.activations import function_of
from jaxrnn.convert.cells import Placed
from jaxrnn.convert.flax.layers import merge_function
from jaxrnn.layers import Apply, Dropout, Embed, LayerNorm, Linear
from jaxrnn.typing import Foreign


def build_module(model: Placed) -> Foreign:
    """The linen module that computes a cell, if there is one. `_write` refuses the parts that it does not compute."""

    cell, params = model.cell, model.params
    leaves = jax.tree.leaves(params)
    dtype = leaves[0].dtype if leaves else jnp.float32
    match cell:
        case Stack(cells=cells, skip=False):
            inside = zip(cells, params, strict=True)
            return nn.Sequential(
                [build_module(Placed(each, p, f"{model.place}.cells[{k}]")) for k, (each, p) in enumerate(inside)]
            )
        case Bidirectional(merge=str(merge)):
            forward, backward = (model.part(name, getattr(params, name)) for name in ("forward", "backward"))
            return nn.Bidirectional(_build_rnn(forward), _build_rnn(backward), merge_function(merge))
        case Backward():
            return _build_rnn(model.part("cell", params)).clone(reverse=True, keep_order=True)
        case Linear():
            return nn.Dense(cell.output_size, use_bias=params.b is not None, param_dtype=dtype)
        case Embed():
            return nn.Embed(cell.vocabulary, cell.output_size, param_dtype=dtype)
        case LayerNorm():
            return nn.LayerNorm(cell.epsilon, use_bias=params.b is not None, param_dtype=dtype)
        case Dropout(per_sequence=False):
            return nn.Dropout(cell.rate)
        case Apply():
            return _function(model, cell.fn)
    return _build_rnn(model)


def _build_rnn(model: Placed) -> Foreign:
    cell, dtype = model.cell, next((leaf.dtype for leaf in jax.tree.leaves(model.params)), jnp.float32)
    match cell:
        case Elman():
            made = nn.SimpleCell(cell.hidden_size, _function(model, cell.activation), param_dtype=dtype)
        case LSTM() | GRU():
            kind = nn.GRUCell if isinstance(cell, GRU) else nn.OptimizedLSTMCell
            gate, activation = _function(model, cell.gate_activation), _function(model, cell.activation)
            made = kind(cell.hidden_size, gate, activation, param_dtype=dtype)
        case ConvLSTM():
            made = nn.ConvLSTMCell(cell.hidden_size, model.params.w_x.shape[:-2], param_dtype=dtype)
        case _:
            model.refuse("it has no counterpart in Flax")
    return nn.RNN(made)


def _function(model: Placed, name: Any) -> Foreign:
    return function_of(name) or model.refuse(f"{name!r} is no activation of JAX")
