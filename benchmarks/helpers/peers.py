"""Networks of ours in other frameworks: the same weights, by `jaxrnn.convert`, in the layout that each likes best."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxrnn
from jaxrnn import convert

CELLS: dict[str, Callable[[int, int], Any]] = {"lstm": jaxrnn.LSTM, "gru": jaxrnn.GRU, "elman": jaxrnn.Elman}
GATES = {"lstm": 4, "gru": 3, "elman": 1}


class Shape(NamedTuple):
    """B, T, D, H: rows of a batch, steps, inputs, units."""

    rows: int
    steps: int
    inputs: int
    units: int

    @classmethod
    def read(cls, text: str) -> Shape:
        """Of "B,T,D,H"."""
        shape = cls._make(map(int, text.split(",")))
        if min(shape) < 1:
            raise ValueError(f"expected B,T,D,H of at least 1, got {text!r}")
        return shape

    def __str__(self) -> str:
        return ",".join(map(str, self))


class Task(NamedTuple):
    """A network and what goes in: the params, xs (T, B, D), and the factor of every output in the loss."""

    cell: jaxrnn.Cell
    params: Any
    xs: np.ndarray
    factors: np.ndarray


def task(name: str, shape: Shape, layers: int = 1, bidirectional: bool = False) -> Task:
    """`layers` of the cell, each in both directions if `bidirectional`."""
    rng = np.random.default_rng(0)
    sides = 2 if bidirectional else 1

    def layer(inputs):
        cells = [CELLS[name](inputs, shape.units) for _ in range(sides)]
        return jaxrnn.Bidirectional(*cells) if bidirectional else cells[0]

    cells = [layer(shape.inputs), *(layer(sides * shape.units) for _ in range(layers - 1))]
    cell = cells[0] if layers == 1 else jaxrnn.Stack(tuple(cells))
    xs = rng.normal(size=(shape.steps, shape.rows, shape.inputs)).astype(np.float32)
    factors = rng.normal(size=(shape.steps, shape.rows, sides * shape.units)).astype(np.float32)
    return Task(cell, draw(cell, shape.units), xs, factors)


def draw(cell: jaxrnn.Cell, units: int) -> Any:
    """Random params, the biases too, of the size that keeps gates from saturating."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(cell.init, jax.random.key(0))
    return jax.tree.map(lambda p: (rng.normal(size=p.shape) / units**0.5).astype(p.dtype), shapes)


def operations(name: str, shape: Shape, layers: int = 1, bidirectional: bool = False) -> int:
    """Of the forward pass, 2 B T (D + H) G H for each layer and direction; with gradients three times as many.

    A layer above another reads H numbers, or 2H of both directions.
    """
    sides = 2 if bidirectional else 1
    read = shape.inputs + (layers - 1) * sides * shape.units + layers * shape.units
    return 2 * sides * shape.rows * shape.steps * read * GATES[name] * shape.units


# Frameworks on JAX.


class Network(NamedTuple):
    """`outputs(weights, xs)` is a function of JAX; xs and outputs begin with (B, T) if `batch_first`, else (T, B)."""

    outputs: Callable[[Any, Any], Any]
    weights: Any
    batch_first: bool

    def lay(self, array: np.ndarray) -> jax.Array:
        """An array (T, B, ...) as the network takes it."""
        return jnp.asarray(array.swapaxes(0, 1) if self.batch_first else array)

    def time_first(self, array: Any) -> np.ndarray:
        """What the network gives as (T, B, ...)."""
        return np.asarray(array).swapaxes(0, 1) if self.batch_first else np.asarray(array)


def ours(implementation: str, remat_every: int | None = None) -> Callable[[jaxrnn.Cell, Any], Network]:
    def build(cell: jaxrnn.Cell, params: Any) -> Network:
        def outputs(params, xs):
            return jaxrnn.scan(cell, params, None, xs, implementation=implementation, remat_every=remat_every)[1]

        return Network(outputs, jax.tree.map(jnp.asarray, params), False)

    return build


def keras(cell: jaxrnn.Cell, params: Any) -> Network:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    config, weights = convert.to_keras(cell, params)
    model = keras.Sequential.from_config(config)
    model.set_weights(weights)
    fixed = [each.value for each in model.non_trainable_variables]
    names = [each.path for each in model.trainable_variables]

    def outputs(weights, xs):
        return model.stateless_call([weights[name] for name in names], fixed, xs)[0]

    return Network(outputs, {each.path: each.value for each in model.trainable_variables}, True)


def flax(cell: jaxrnn.Cell, params: Any) -> Network:
    module, variables = convert.to_flax(cell, params)
    return Network(module.apply, jax.tree.map(jnp.asarray, variables), True)


def haiku(cell: jaxrnn.Cell, params: Any) -> Network | None:
    import haiku as hk

    if not isinstance(cell, jaxrnn.LSTM):  # its GRU resets before the product, its simple RNN has relu, none both ways
        return None

    def unroll(xs):
        core = hk.LSTM(cell.hidden_size)
        return hk.dynamic_unroll(core, xs, core.initial_state(xs.shape[1]))[0]

    weights = jax.tree.map(jnp.asarray, convert.to_haiku(cell, params))
    return Network(hk.without_apply_rng(hk.transform(unroll)).apply, weights, False)


def equinox(cell: jaxrnn.Cell, params: Any) -> Network | None:
    import equinox as eqx

    if not isinstance(cell, jaxrnn.LSTM | jaxrnn.GRU):  # it has steps only, and no Elman
        return None
    arrays, static = eqx.partition(convert.to_equinox(cell, params), eqx.is_array)
    pair = isinstance(cell, jaxrnn.LSTM)

    def outputs(arrays, xs):
        module, zeros = eqx.combine(arrays, static), jnp.zeros((xs.shape[1], cell.hidden_size))

        def step(state, x):
            state = jax.vmap(module)(x, state)
            return state, state[0] if pair else state

        return jax.lax.scan(step, (zeros, zeros) if pair else zeros, xs)[1]

    return Network(outputs, jax.tree.map(jnp.asarray, arrays), False)


NETWORKS: dict[str, Callable[[jaxrnn.Cell, Any], Network | None]] = {
    "native": ours("native"),
    "xla": ours("xla"),
    "keras": keras,
    "flax": flax,
    "haiku": haiku,
    "equinox": equinox,
}


# Frameworks of their own.


def torch_network(cell: jaxrnn.Cell, params: Any, threads: int) -> tuple[Any, Callable[[Any], Any]]:
    """The module, and its outputs as a function of xs, both time first."""
    import torch

    torch.set_num_threads(threads)
    kinds = {jaxrnn.LSTM: torch.nn.LSTM, jaxrnn.GRU: torch.nn.GRU, jaxrnn.Elman: torch.nn.RNN}

    def module(cells):
        match cells[0]:
            case jaxrnn.Embed(vocabulary=symbols, output_size=units):
                return torch.nn.Embedding(symbols, units)
            case jaxrnn.Linear(input_size=inputs, output_size=units):
                return torch.nn.Linear(inputs, units)
            case jaxrnn.Bidirectional(forward=one):
                return kinds[type(one)](one.input_size, one.hidden_size, len(cells), bidirectional=True)
            case one:
                return kinds[type(one)](one.input_size, one.hidden_size, len(cells))

    cells = cell.cells if isinstance(cell, jaxrnn.Stack) else (cell,)
    modules = torch.nn.Sequential(*(module(list(alike)) for _, alike in itertools.groupby(cells, type)))
    modules.load_state_dict(convert.to_torch(cell, params, module=modules))

    def outputs(xs):
        for each in modules:
            xs = each(xs)
            xs = xs[0] if isinstance(xs, tuple) else xs
        return xs

    return modules, outputs


def onnx_session(cell: jaxrnn.Cell, params: Any, threads: int, **keywords: Any) -> Any:
    """A session of onnxruntime; keywords as of `jaxrnn.convert.to_onnx`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = convert.to_onnx(cell, params, **keywords)
    return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
