"""Converts dicts of parameters from and to Haiku. Haiku itself is not needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from jaxrnn.cell import Cell
from jaxrnn.cells.conv_lstm import ConvLSTM, ConvLSTMParams
from jaxrnn.cells.elman import Elman, ElmanParams
from jaxrnn.cells.gru import GRU, GRUParams
from jaxrnn.cells.lstm import LSTM, LSTMParams
from jaxrnn.convert.arrays import Arrays
from jaxrnn.convert.cells import Placed, layers, placed, stacked
from jaxrnn.convert.gates import HAIKU
from jaxrnn.engines.arrays import on_device
from jaxrnn.layers import Embed, EmbedParams, LayerNorm, LayerNormParams, Linear, LinearParams
from jaxrnn.typing import Foreign, Named, PyTree, WithParams


def from_haiku(
    params: Mapping[str, Mapping[str, PyTree]],
    *,
    modules: Iterable[str] | Mapping[str, str] | None = None,
    spatial_shape: tuple[int, ...] | None = None,
    epsilon: float = 1e-5,
) -> WithParams:
    """Converts Haiku's parameters to a cell and its params that compute the same function as their modules.

    The modules are LSTM, GRU, VanillaRNN, Conv1DLSTM to Conv3DLSTM, Linear, Embed and LayerNorm over the last axis. The
    parameters do not show what else a model does. So several modules must run one after another, as in a `DeepRNN`,
    with nothing between them but Dropout and IdentityCores. They become a `Stack`. This cannot be checked here: compare
    `apply` with `jaxrnn.scan` once.

    A module is recognised by the last part of its name: "my_model/~/lstm_1/linear" belongs to an LSTM. A `linear` below
    a name that is not one of Haiku's may be a Linear of its own or part of a renamed core, so `modules` has to say
    which.

    `dynamic_unroll` corresponds to `jaxrnn.scan`. An `LSTMState(hidden, cell)` corresponds to `LSTMCarry(h, c)`, and an
    array h to `GRUCarry(h)` or `ElmanCarry(h)`. Where a `ResetCore` reads `should_reset`, `scan` takes `reset`.

    VanillaRNN (with `double_bias`) and Conv*LSTM have two biases, and `b` is their sum. So training moves the sum twice
    as far in Haiku as it moves `b` here; see `from_torch` for a way to do the same.

    Args:
      params: The parameters that `init` returns: module names to dicts of arrays, which may be NumPy's.
      modules: The names of the modules in the order in which they run, "lstm" and not "lstm/linear". A mapping also
        gives the kind of each: "lstm", "gru", "vanilla_rnn", "conv1_dlstm" (2, 3), "linear", "embed", "layer_norm".
        None takes the order of `params`, unless it is alphabetical: `jax.tree.map` sorts the names, so this may not be
        the order in which the modules run.
      spatial_shape: S of x (..., *S, D), which the weights of a Conv*LSTM do not show.
      epsilon: The `eps` of the LayerNorms.

    Returns:
      The cell and its params, in the dtype of the weights.

    Raises:
      ValueError: If the kind or the order of modules is unknown, or if arrays are missing, unexpected, of another
        shape, of several dtypes or not finite. The message names them.
      TypeError: If the parameters are not dicts of arrays of floating numbers.

    Examples:
      >>> import jax.numpy as jnp, jaxrnn, numpy as np
      >>> from jaxrnn.convert import from_haiku
      >>> weights = {"my_model/lstm/linear": {"w": np.ones((3 + 4, 16), "f"), "b": np.zeros(16, "f")}}
      >>> cell, params = from_haiku(weights)
      >>> cell
      LSTM(input_size=3, hidden_size=4)
      >>> params.b[4:8]  # Haiku adds 1 to the forget gate as it runs
      Array([1., 1., 1., 1.], dtype=float32)
      >>> jaxrnn.scan(cell, params, None, jnp.ones((5, 2, 3)))[1].shape
      (5, 2, 4)
    """
    given = _flat(params)
    kinds, ordered = dict(modules) if isinstance(modules, Mapping) else {}, None
    if modules is not None:
        ordered = _names(modules)
    groups = _groups(given, kinds, ordered)
    order = list(ordered or _order(list(given), groups))
    _check_order(order, groups)
    arrays = Arrays(
        "Haiku", {f"{module}: {name}": array for module, named in given.items() for name, array in named.items()}
    )
    options = _Options(spatial_shape, epsilon)
    cells = [_KINDS[groups[name]].read(_At(arrays, name), options) for name in order]
    arrays.finish()
    cell, read = stacked(cells)
    return cell, jax.tree.map(on_device, read)


def to_haiku(
    cell: Cell, params: PyTree, *, modules: Iterable[str] | None = None, epsilon: float = 1e-5
) -> dict[str, Named]:
    """Converts a cell's params to Haiku's, for modules that compute the same function; `from_haiku` is the inverse.

    Args:
      cell: An LSTM, GRU(reset_after=False), Elman(activation="relu"), ConvLSTM, Linear, Embed, LayerNorm, or a Stack of
        them.
      params: Its params, as `cell.init` gives them.
      modules: The names of the modules in order, or None for the names that Haiku gives: "lstm", "lstm_1", "linear".
      epsilon: The `eps` of the LayerNorms that will read the parameters.

    Returns:
      {module name: {name: array}}, in the order of the cells. Biases that are None become zeros, except those of a
      Linear (with `with_bias=False`) and a LayerNorm (with `create_offset=False`).

    Raises:
      ValueError: If Haiku has no counterpart for a cell or an option (peepholes, a GRU that resets after the product),
        or if a layer has no params, since Haiku's dict cannot hold such a layer. The message names the place.

    Examples:
      >>> import jax, jaxrnn
      >>> from jaxrnn.convert import to_haiku
      >>> cell = jaxrnn.Stack((jaxrnn.LSTM(3, 4), jaxrnn.Linear(4, 2)))
      >>> weights = to_haiku(cell, cell.init(jax.random.key(0)))
      >>> {name: weights[name]["w"].shape for name in weights}
      {'lstm/linear': (7, 16), 'linear': (4, 2)}
    """
    model = placed(cell, params)
    each = [_written(part, epsilon) for part in layers(model)]
    names = list(_numbered(kind for kind, _ in each)) if modules is None else _names(modules)
    if len(names) != len(each):
        raise ValueError(f"modules: expected {len(each)} names, one for each layer, got {len(names)}: {names}")
    return {
        f"{name}/{below}" if below else name: jax.tree.map(on_device, arrays)
        for name, (_, tree) in zip(names, each, strict=True)
        for below, arrays in tree.items()
    }


# Names


def _flat(params: PyTree) -> dict[str, Named]:
    if not isinstance(params, Mapping):
        raise TypeError(f"params: expected module names with dicts of arrays, got {type(params).__name__}")
    for module, named in params.items():
        if not isinstance(module, str) or not isinstance(named, Mapping):
            raise TypeError(
                f"params: expected module names with dicts of arrays, got {module!r}: {type(named).__name__}"
            )
        for name, array in named.items():
            if isinstance(array, Mapping):
                raise TypeError(f"params: {module}: {name}: expected an array, got a dict")
    if not params:
        raise ValueError("params: expected at least one module, got none")
    return {module: dict(named) for module, named in params.items()}


def _names(modules: Foreign) -> list[str]:
    names = [modules] if isinstance(modules, str) else list(modules)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"modules: expected names, got {name!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"modules: expected names, each once, got {names}")
    return names


def _base(name: str) -> tuple[str, int]:
    """The last part of a name without the number that distinguishes modules of one kind, and that number."""
    last = name.rsplit("/", 1)[-1]
    found = re.fullmatch(r"(.+)_([1-9][0-9]{0,8})", last)
    return (found[1], int(found[2])) if found else (last, 0)


def _groups(given: Mapping[str, PyTree], kinds: Mapping[str, Foreign], ordered: list[str] | None) -> dict[str, str]:
    """The modules that `from_haiku` reads, each with its kind, in the order of the dict."""
    for name, kind in kinds.items():
        if kind not in _KINDS:
            raise ValueError(f"modules: {name}: expected a kind of {', '.join(_KINDS)}, got {kind!r}")
    groups = {}
    for name in given:
        group = _group(name, kinds, ordered)
        kind = kinds.get(group, _base(group)[0])
        if kind not in _KINDS:
            raise ValueError(f"params: {name!r} has no counterpart: expected {', '.join(_KINDS)}; see `modules`")
        groups[group] = kind
    return groups


def _group(name: str, kinds: Mapping[str, Foreign], ordered: list[str] | None) -> str:
    """The name of the module that runs: "lstm" for its part "lstm/linear"."""
    above, _, last = name.rpartition("/")
    if name in kinds or (ordered is not None and name in ordered):
        return name
    kind = kinds.get(above, _base(above)[0])
    if kind in _KINDS and last in _KINDS[kind].inside:
        return above
    if above.endswith("/~") and _base(above.removesuffix("/~"))[0] == "mlp":
        raise ValueError(
            f"params: {name!r}: an MLP has activations between its layers, which its parameters do not tell"
        )
    if above and last in ("linear", "linear_1") and not above.endswith("~"):
        raise ValueError(
            f"params: {name!r} may be a Linear in {above!r}, or part of a core of that name: give modules="
            f"{{{name!r}: 'linear'}}, or {{{above!r}: 'lstm'}} (or 'vanilla_rnn'), with the others in their order"
        )
    return name


def _order(given: list[str], groups: Mapping[str, str]) -> list[str]:
    names = list(groups)
    if len(names) == 1 or given != sorted(given):
        return names
    families = {(name.rpartition("/")[0], _base(name)[0]) for name in names}
    if len(families) == 1:
        return sorted(names, key=lambda name: _base(name)[1])
    raise ValueError(
        "params: the names are in alphabetical order, as jax.tree.map leaves them, which may not be the order in which "
        f"the modules run: give it, modules={tuple(names)} or another"
    )


def _check_order(order: list[str], groups: Mapping[str, str]) -> None:
    missing, unknown = [name for name in groups if name not in order], [name for name in order if name not in groups]
    if missing or unknown:
        raise ValueError(f"modules: expected each of {list(groups)}, got {order}")


def _numbered(kinds: Iterable[str]) -> Iterable[str]:
    """The names that Haiku gives to modules that are made one after another."""
    seen: dict[str, int] = {}
    for kind in kinds:
        number = seen.get(kind, 0)
        seen[kind] = number + 1
        yield f"{kind}_{number}" if number else kind


# Reading


class _At(NamedTuple):
    """The arrays of one module."""

    arrays: Arrays
    module: str

    def name(self, below: str, name: str) -> str:
        return f"{self.module}/{below}: {name}" if below else f"{self.module}: {name}"

    def take(self, below: str, name: str, *shape: int | None) -> PyTree:
        return self.arrays.take(self.name(below, name), *shape)

    def maybe(self, below: str, name: str, *shape: int | None) -> PyTree:
        """Takes the array, or returns None if there is none."""
        return self.take(below, name, *shape) if self.name(below, name) in self.arrays else None


class _Options(NamedTuple):
    spatial_shape: tuple[int, ...] | None
    epsilon: float


def _blocks(at: _At, array: PyTree, name: str, gates: int) -> int:
    """The size H of an array that has gates · H columns."""
    columns = array.shape[-1]
    if columns % gates or not columns:
        raise ValueError(f"Haiku: {name} of {at.module}: expected {gates} gates of one size, got {columns} columns")
    return columns // gates


def _read_lstm(at: _At, options: _Options) -> WithParams:
    w = at.take("linear", "w", None, None)
    hidden = _blocks(at, w, "linear: w", 4)
    if len(w) <= hidden:
        raise ValueError(
            f"Haiku: {at.module}/linear: w: expected more than {hidden} rows, those of x and of h, got {len(w)}"
        )
    w, b = HAIKU["LSTM"].read(w), HAIKU["LSTM"].read(at.take("linear", "b", 4 * hidden), bias=True)
    return LSTM(len(w) - hidden, hidden), LSTMParams(w[:-hidden], w[-hidden:], b)


def _read_gru(at: _At, options: _Options) -> WithParams:
    w_h = at.take("", "w_h", None, None)
    hidden = _blocks(at, w_h, "w_h", 3)
    if len(w_h) != hidden:
        raise ValueError(f"Haiku: {at.module}: w_h: expected shape ({hidden}, {3 * hidden}), got {w_h.shape}")
    w_x, b = at.take("", "w_i", None, 3 * hidden), at.take("", "b", 3 * hidden)
    return GRU(len(w_x), hidden, reset_after=False), GRUParams(*map(HAIKU["GRU"].read, (w_x, w_h, b)))


def _read_vanilla(at: _At, options: _Options) -> WithParams:
    w_x = at.take("linear", "w", None, None)
    inputs, hidden = w_x.shape
    w_h, b = at.take("linear_1", "w", hidden, hidden), at.take("linear", "b", hidden)
    more = at.maybe("linear_1", "b", hidden)  # without `double_bias` there is one
    return Elman(inputs, hidden, "relu"), ElmanParams(w_x, w_h, b if more is None else b + more)


def _read_conv(dimensions: int) -> Callable[[_At, _Options], WithParams]:
    def read(at: _At, options: _Options) -> WithParams:
        if options.spatial_shape is None:
            raise ValueError(f"spatial_shape: the weights of {at.module} do not tell the shape of an image")
        w_x = at.take("input_to_hidden", "w", *[None] * (dimensions + 2))
        *kernel, inputs, columns = w_x.shape
        hidden = _blocks(at, w_x, "input_to_hidden: w", 4)
        w_h = at.take("hidden_to_hidden", "w", *kernel, hidden, columns)
        b = at.take("input_to_hidden", "b", columns) + at.take("hidden_to_hidden", "b", columns)
        gates = HAIKU["LSTM"]
        cell = ConvLSTM(options.spatial_shape, inputs, hidden, tuple(kernel))
        return cell, ConvLSTMParams(gates.read(w_x), gates.read(w_h), gates.read(b, bias=True))

    return read


def _read_linear(at: _At, options: _Options) -> WithParams:
    w = at.take("", "w", None, None)
    return Linear(*w.shape), LinearParams(w, at.maybe("", "b", w.shape[1]))


def _read_embed(at: _At, options: _Options) -> WithParams:
    w = at.take("", "embeddings", None, None)
    return Embed(*w.shape), EmbedParams(w)


def _read_layer_norm(at: _At, options: _Options) -> WithParams:
    scale = at.take("", "scale", None)
    return LayerNorm(len(scale), options.epsilon), LayerNormParams(scale, at.maybe("", "offset", len(scale)))


class _Kind(NamedTuple):
    """The function that reads the cell of a module, and the names of the modules inside that module."""

    read: Callable[[_At, _Options], WithParams]
    inside: tuple[str, ...] = ()


_KINDS = {
    "lstm": _Kind(_read_lstm, ("linear",)),
    "gru": _Kind(_read_gru),
    "vanilla_rnn": _Kind(_read_vanilla, ("linear", "linear_1")),
    **{f"conv{n}_dlstm": _Kind(_read_conv(n), ("input_to_hidden", "hidden_to_hidden")) for n in (1, 2, 3)},
    "linear": _Kind(_read_linear),
    "embed": _Kind(_read_embed),
    "layer_norm": _Kind(_read_layer_norm),
}


# Writing


def _written(model: Placed, epsilon: float) -> tuple[str, dict[str, Named]]:
    """The kind of a cell's module, and its arrays, grouped by the module inside that holds them."""
    cell, params = model.cell, model.params
    match cell:
        case LSTM():
            model.only(why="hk.LSTM has no such option")
            w, b = np.concatenate([params.w_x, params.w_h]), _bias(params, params.w_x)
            return "lstm", {"linear": {"w": HAIKU["LSTM"].write(w), "b": HAIKU["LSTM"].write(b, bias=True)}}
        case GRU(reset_after=False):
            model.only("reset_after", why="hk.GRU has no such option")
            arrays = {"w_i": params.w_x, "w_h": params.w_h, "b": _bias(params, params.w_x)}
            return "gru", {"": {name: HAIKU["GRU"].write(array) for name, array in arrays.items()}}
        case GRU():
            model.refuse("hk.GRU resets before the product, which is another function")
        case Elman(activation="relu"):
            model.only("activation", why="hk.VanillaRNN has no such option")
            b = _bias(params, params.w_x)
            below = {"linear": {"w": params.w_x, "b": b}, "linear_1": {"w": params.w_h, "b": np.zeros_like(b)}}
            return "vanilla_rnn", below
        case Elman():
            model.refuse("hk.VanillaRNN has the activation 'relu'")
        case ConvLSTM():
            return _written_conv(model, params)
        case Linear():
            return "linear", {"": {"w": params.w} | ({} if params.b is None else {"b": params.b})}
        case Embed():
            return "embed", {"": {"embeddings": params.w}}
        case LayerNorm():
            if cell.epsilon != epsilon:
                model.refuse(f"epsilon: expected {epsilon}; give epsilon={cell.epsilon}, and eps to hk.LayerNorm")
            return "layer_norm", {"": {"scale": params.scale} | ({} if params.b is None else {"offset": params.b})}
    if not jax.tree.leaves(params):
        model.refuse("it has no params, so Haiku's dict cannot hold it")
    return model.refuse("it has no counterpart in Haiku")


def _written_conv(model: Placed, params: ConvLSTMParams) -> tuple[str, dict[str, Named]]:
    cell, dimensions = model.cell, params.w_x.ndim - 2
    why = "hk.Conv{1,2,3}DLSTM has no such option"
    for name in ("strides", "dilation"):
        if getattr(cell, name) not in (1, (1,) * dimensions):
            model.refuse(f"{name}: {why}")
    names = ("spatial_shape", "input_channels", "hidden_size", "kernel_size", "strides", "dilation")
    model.only(*names, why=why)
    w_x, w_h = map(HAIKU["LSTM"].write, (params.w_x, params.w_h))
    b = HAIKU["LSTM"].write(_bias(params, params.w_x), bias=True)
    below = {"input_to_hidden": {"w": w_x, "b": b}, "hidden_to_hidden": {"w": w_h, "b": np.zeros_like(b)}}
    return f"conv{dimensions}_dlstm", below


def _bias(params: PyTree, like: PyTree) -> PyTree:
    return np.zeros(like.shape[-1], like.dtype) if params.b is None else params.b
