"""Converts models from and to Equinox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn.cell import Cell
from jaxrnn.cells.gru import GRU, GRUParams
from jaxrnn.cells.lstm import LSTM, LSTMParams
from jaxrnn.compose.stack import Stack
from jaxrnn.convert.activations import function_of, name_of
from jaxrnn.convert.arrays import Arrays, ones
from jaxrnn.convert.cells import Placed, placed
from jaxrnn.engines.arrays import on_device
from jaxrnn.layers import (
    Apply,
    Dropout,
    Embed,
    EmbedParams,
    LayerNorm,
    LayerNormParams,
    Linear,
    LinearParams,
)
from jaxrnn.typing import Foreign, Named, PyTree, WithParams


def from_equinox(module: Foreign) -> WithParams:
    """Converts a module of Equinox to a cell and its params that compute the same function.

    Equinox's modules take one step of one example. `jaxrnn.scan` runs the cell over sequences, with or without batch
    axes. Equinox's states are our carries: (h, c) is `LSTMCarry(h, c)`, and an array h is `GRUCarry(h)`.

    Args:
      module: An LSTMCell, GRUCell, Linear, Embedding, LayerNorm, Dropout, Identity, or Lambda of one of JAX's
        activations. Or a Sequential, tuple or list of them, in the order in which they run, which becomes a `Stack`.
        Dropout acts where `scan` is given a key, whatever its `inference` is. A class of your own is refused, even a
        subclass of these, since its `__call__` may do anything: convert a tuple of the modules in it.

    Returns:
      The cell and its params, in the dtype of the weights. A LayerNorm without a weight gets a weight of ones.

    Raises:
      ValueError: If a module or function has no counterpart, or if arrays have other shapes or dtypes or are not
        finite. The message names the place.
      TypeError: If an object is not a module, or has no arrays of floating numbers. The message names the place.

    Examples:
      >>> import jax, jaxrnn
      >>> from jaxrnn.convert import from_equinox, to_equinox
      >>> cell = jaxrnn.Stack((jaxrnn.LSTM(3, 4), jaxrnn.Linear(4, 2)))
      >>> modules = to_equinox(cell, cell.init(jax.random.key(0)))  # doctest: +SKIP
      >>> from_equinox(modules)[0] == cell  # doctest: +SKIP
      True
    """
    weights: Named = {}
    read = _read("module", module, weights, frozenset())
    arrays = Arrays("Equinox", weights)
    cell, params = read(arrays)
    arrays.finish()
    return cell, jax.tree.map(on_device, params)


Read = Callable[[Arrays], tuple[Cell, Any]]


def _read(place: str, module: Foreign, weights: Named, above: frozenset[int]) -> Read:
    """Collects the weights of a module, and returns the function that makes its cell from them."""
    kind = type(module)
    if id(module) in above:
        raise ValueError(f"{place}: {kind.__name__} contains itself")
    above |= {id(module)}
    if kind in (tuple, list):
        return _sequence(place, module, weights, above)
    if not any(each.__module__.startswith("equinox.") for each in kind.__mro__):
        raise TypeError(f"{place}: expected a module of Equinox, or a tuple or list of them, got {kind.__name__}")
    if not kind.__module__.startswith("equinox.nn.") or kind.__name__ not in (*_KINDS, "Sequential"):
        known = ", ".join((*_KINDS, "Sequential"))
        raise ValueError(f"{place}: {kind.__name__} has no counterpart: expected {known}, or a tuple of them")
    if kind.__name__ == "Sequential":
        return _sequence(f"{place}.layers", module.layers, weights, above)
    for name in ("weight_ih", "weight_hh", "weight", "bias", "bias_n"):
        if getattr(module, name, None) is not None:
            weights[f"{place}.{name}"] = getattr(module, name)
    build = _KINDS[kind.__name__]
    return lambda arrays: build(place, module, arrays)


def _sequence(place: str, modules: Foreign, weights: Named, above: frozenset[int]) -> Read:
    if not modules:
        raise ValueError(f"{place}: expected at least one module")
    reads = [_read(f"{place}[{k}]", module, weights, above) for k, module in enumerate(modules)]

    def read(arrays):
        cells = [each(arrays) for each in reads]
        return Stack(tuple(cell for cell, _ in cells)), tuple(params for _, params in cells)

    return read


def _bias(place: str, module: Foreign, arrays: Arrays, *shape: int) -> Foreign:
    return arrays.take(f"{place}.bias", *shape) if module.use_bias else None


def _lstm(place: str, module: Foreign, arrays: Arrays) -> WithParams:
    cell = LSTM(module.input_size, module.hidden_size)
    w_x = arrays.take(f"{place}.weight_ih", 4 * cell.hidden_size, cell.input_size)
    w_h = arrays.take(f"{place}.weight_hh", 4 * cell.hidden_size, cell.hidden_size)
    return cell, LSTMParams(w_x.T, w_h.T, _bias(place, module, arrays, 4 * cell.hidden_size))


def _gru(place: str, module: Foreign, arrays: Arrays) -> WithParams:
    cell = GRU(module.input_size, module.hidden_size)
    w_x = arrays.take(f"{place}.weight_ih", 3 * cell.hidden_size, cell.input_size)
    w_h = arrays.take(f"{place}.weight_hh", 3 * cell.hidden_size, cell.hidden_size)
    b = _bias(place, module, arrays, 3 * cell.hidden_size)
    b_hn = arrays.take(f"{place}.bias_n", cell.hidden_size) if module.use_bias else None
    return cell, GRUParams(w_x.T, w_h.T, b, b_hn)


def _linear(place: str, module: Foreign, arrays: Arrays) -> WithParams:
    if "scalar" in (module.in_features, module.out_features):
        raise ValueError(f"{place}: Linear of a 'scalar' has no counterpart; give it a size of 1")
    cell = Linear(module.in_features, module.out_features)
    w = arrays.take(f"{place}.weight", cell.output_size, cell.input_size)
    return cell, LinearParams(w.T, _bias(place, module, arrays, cell.output_size))


def _embed(place: str, module: Foreign, arrays: Arrays) -> WithParams:
    cell = Embed(module.num_embeddings, module.embedding_size)
    return cell, EmbedParams(arrays.take(f"{place}.weight", cell.vocabulary, cell.output_size))


def _layer_norm(place: str, module: Foreign, arrays: Arrays) -> WithParams:
    if len(module.shape) != 1:
        raise ValueError(f"{place}: LayerNorm over the shape {module.shape} has no counterpart: expected one axis")
    cell = LayerNorm(module.shape[0], float(module.eps))
    b = _bias(place, module, arrays, cell.size)
    if module.use_weight:
        return cell, LayerNormParams(arrays.take(f"{place}.weight", cell.size), b)
    return cell, LayerNormParams(ones(cell.size, jnp.result_type(float) if b is None else b.dtype), b)


def _lambda(place: str, module: Foreign, arrays: Arrays) -> WithParams:
    return Apply(name_of(f"{place}.fn", module.fn)), ()


_KINDS: dict[str, Callable[[str, PyTree, Arrays], WithParams]] = {
    "LSTMCell": _lstm,
    "GRUCell": _gru,
    "Linear": _linear,
    "Embedding": _embed,
    "LayerNorm": _layer_norm,
    "Dropout": lambda place, module, arrays: (Dropout(module.p), ()),
    "Identity": lambda place, module, arrays: (Apply("identity"), ()),
    "Lambda": _lambda,
}


def to_equinox(cell: Cell, params: PyTree) -> Foreign:
    """Converts a cell to a module of Equinox that computes the same function; `from_equinox` is the inverse.

    Args:
      cell: An LSTM, GRU (reset after the product), Linear, Embed, LayerNorm, Dropout, Apply of a name, or Stack.
      params: Its params, as `cell.init` gives them.

    Returns:
      The module of `equinox.nn`, whose `use_bias` says whether there are biases. A Stack becomes a tuple, with one
      module for each cell.

    Raises:
      ValueError: If Equinox has no counterpart for a cell or an option. The message names the place.

    Examples:
      >>> import jax, jaxrnn
      >>> from jaxrnn.convert import to_equinox
      >>> cell = jaxrnn.LSTM(3, 4)
      >>> to_equinox(cell, cell.init(jax.random.key(0))).weight_ih.shape  # doctest: +SKIP
      (16, 3)
    """
    return _module(placed(cell, params))


def _module(model: Placed) -> Foreign:
    import equinox as eqx

    cell, params = model.cell, model.params
    match cell:
        case Stack(cells=cells, skip=False):
            inside = enumerate(zip(cells, model.params, strict=True))
            return tuple(_module(Placed(each, p, f"{model.place}.cells[{k}]")) for k, (each, p) in inside)
        case LSTM():
            model.only(why="equinox.nn.LSTMCell has no such option")
            sizes = (cell.input_size, cell.hidden_size)
            return _filled(eqx.nn.LSTMCell, sizes, params.b, weight_ih=params.w_x.T, weight_hh=params.w_h.T)
        case GRU():
            model.only(why="equinox.nn.GRUCell has no such option")
            return _gru_module(cell, params)
        case Linear():
            return _filled(eqx.nn.Linear, (cell.input_size, cell.output_size), params.b, weight=params.w.T)
        case Embed():
            return eqx.nn.Embedding(weight=on_device(params.w))
        case LayerNorm():
            made = eqx.nn.LayerNorm(cell.size, cell.epsilon, use_bias=params.b is not None, dtype=params.scale.dtype)
            return _with(made, weight=params.scale, bias=params.b)
        case Dropout(per_sequence=False):
            return eqx.nn.Dropout(cell.rate)
        case Apply(fn="identity"):
            return eqx.nn.Identity()
        case Apply() if function := function_of(cell.fn):
            return eqx.nn.Lambda(function)
    return model.refuse("it has no counterpart in Equinox")


def _gru_module(cell: GRU, params: GRUParams) -> Foreign:
    import equinox as eqx

    b, b_hn = params.b, params.b_hn
    if b is not None or b_hn is not None:
        b = np.zeros(3 * cell.hidden_size, params.w_x.dtype) if b is None else b
        b_hn = np.zeros(cell.hidden_size, params.w_x.dtype) if b_hn is None else b_hn
    arrays = {"weight_ih": params.w_x.T, "weight_hh": params.w_h.T, "bias_n": b_hn}
    return _filled(eqx.nn.GRUCell, (cell.input_size, cell.hidden_size), b, **arrays)


def _filled(kind: Foreign, sizes: tuple[int, int], bias: Any, **arrays: Any) -> Foreign:
    """A module of these sizes that holds these arrays."""
    import equinox as eqx

    made = eqx.filter_eval_shape(kind, *sizes, use_bias=bias is not None, key=jax.random.key(0))
    return _with(made, bias=bias, **arrays)


def _with(module: Foreign, **arrays: Any) -> Foreign:
    import equinox as eqx

    given = {name: on_device(array) for name, array in arrays.items() if array is not None}
    return eqx.tree_at(lambda made: [getattr(made, name) for name in given], module, list(given.values()))
