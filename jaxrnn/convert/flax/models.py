"""Converts linen and NNX modules from and to Flax."""

from __future__ import annotations

from collections.abc import Mapping

from jaxrnn.cell import Cell
from jaxrnn.convert.cells import placed
from jaxrnn.typing import Foreign, PyTree, WithParams


def from_flax(
    module: Foreign, variables: Mapping[str, PyTree] | None = None, *, spatial_shape: tuple[int, ...] | None = None
) -> WithParams:
    """Converts a module of Flax to a cell and its params that compute the same function.

    linen and NNX modules: SimpleCell (also with `residual`), LSTMCell, OptimizedLSTMCell and GRUCell, by themselves or
    in an RNN; Bidirectional around two RNNs; Dense (Linear in NNX), Embed, LayerNorm, Dropout; Sequential of these and
    of JAX's activations, which becomes a `Stack`; in linen also ConvLSTMCell. An RNN that runs in reverse becomes
    `Backward`. A module `jaxrnn.linen.RNN` or `jaxrnn.nnx.RNN` gives back its own cell and params. A class of your own
    is refused, even a subclass of these, since its `__call__` may do anything: convert the modules in it, and stack
    their cells.

    The arguments of a Flax call correspond to those of `jaxrnn.scan`. Batch-major is `time_axis=1`. `seq_lengths` are
    `lengths` (ys are then 0 at padding, while Flax goes on). `initial_carry` is `carry`, with Flax's (c, h) as
    `LSTMCarry(h, c)` and an array h as `GRUCarry(h)` or `ElmanCarry(h)`. Dropout acts where `key` is given.

    ConvLSTMCell has two biases that act as their sum, and `b` is that sum here. An optimizer moves each of the two as
    far as it moves `b`, so training moves the sum twice as far in Flax; see `from_torch` for a way to do the same.

    Args:
      module: A linen module as it is built, or an NNX module.
      variables: For linen, `{"params": ...}`, whose arrays may be NumPy's. For NNX, None, or a state or nested dict of
        the module to read in place of the module's own state.
      spatial_shape: S of x (..., *S, D), which the weights of a ConvLSTMCell do not show.

    Returns:
      The cell and its params, in the dtype of the weights.

    Raises:
      ValueError: If a module, an option or a function has no counterpart (MGUCell, a carry that begins at random,
        `reverse` without `keep_order`, another `dtype` to compute in), or if arrays are missing, unexpected, of another
        shape, of several dtypes or not finite. The message names the place.
      TypeError: If an object is not a module, or not an array of floating numbers.

    Examples:
      >>> import flax.linen as nn, jax.numpy as jnp, jaxrnn, numpy as np
      >>> from jaxrnn.convert import from_flax
      >>> ones = np.ones((4, 4), np.float32)
      >>> tree = {"i": {"kernel": ones[:3], "bias": ones[0]}, "h": {"kernel": ones}}
      >>> cell, params = from_flax(nn.RNN(nn.SimpleCell(4)), {"params": {"cell": tree}})
      >>> cell
      Elman(input_size=3, hidden_size=4)
      >>> jaxrnn.scan(cell, params, None, jnp.ones((2, 5, 3)), time_axis=1)[1].shape
      (2, 5, 4)
    """
    from jaxrnn.convert.flax.read import read_module

    return read_module(module, variables, spatial_shape)


def to_flax(cell: Cell, params: PyTree, *, module: Foreign = None) -> tuple[PyTree, PyTree]:
    """Converts a cell to a module of Flax and its variables; `from_flax(*to_flax(cell, params))` gives back both.

    Args:
      cell: An Elman, LSTM, GRU, ConvLSTM, Linear, Embed, LayerNorm, Dropout or Apply, also inside Backward,
        Bidirectional and Stack.
      params: Its params, as `cell.init` gives them.
      module: The linen or NNX module that the variables are for. It must compute this cell, and be laid out as
        `from_flax` reads it. None builds a linen module: `nn.RNN` around SimpleCell, OptimizedLSTMCell, GRUCell or
        ConvLSTMCell, with `reverse=True, keep_order=True` for Backward; nn.Bidirectional, nn.Dense, nn.Embed,
        nn.LayerNorm, nn.Dropout; nn.Sequential for Stack.

    Returns:
      The module, as given or as built, and its variables: for linen `{"params": ...}`, for `module.apply`; for NNX a
      nested dict, for `nnx.update(module, variables)`.

    Raises:
      ValueError: If Flax, or the module, does not compute this: peepholes, a GRU that resets before the product, b_hn
        in an NNX GRUCell. The message names the place in the cell.

    Examples:
      >>> import jax, jaxrnn
      >>> from jaxrnn.convert import to_flax
      >>> cell = jaxrnn.Stack((jaxrnn.GRU(3, 4), jaxrnn.Linear(4, 2)))
      >>> module, variables = to_flax(cell, cell.init(jax.random.key(0)))
      >>> [type(layer).__name__ for layer in module.layers], sorted(variables["params"])
      (['RNN', 'Dense'], ['layers_0', 'layers_1'])
      >>> module.apply(variables, jax.numpy.ones((2, 5, 3))).shape
      (2, 5, 2)
    """
    from jaxrnn.convert.flax.build import build_module
    from jaxrnn.convert.flax.write import write_variables

    model = placed(cell, params)
    module = build_module(model) if module is None else module
    return module, write_variables(module, model)
