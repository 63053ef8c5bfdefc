"""A sequence from one input: the outputs of a cell over steps that all read the same input."""

# What other cells are by a class variable, some here are by a property.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cell import Cell, Part, input_size, output_size
from jaxrnn.engines.walk import Walk
from jaxrnn.layers import Layer, row_keys
from jaxrnn.sequence import walked
from jaxrnn.typing import DTypeLike, PyTree


class Repeat(Layer):
    """One to many: the outputs of a cell over `length` steps that all read the same x, from the cell's fresh carry.

        carry_t, y_t = cell.step(params, carry_{t−1}, x),  y = (y_1, …, y_n)

    It has no carry of its own. Above a `Pool` it is therefore the decoder of a sequence to sequence model whose output
    has another length than its input; Keras writes it as `RepeatVector` and the layers after it. For a cell that ends
    time, y is the output of that cell.

    Args:
      cell: Any cell, including one that runs backward.
      length: The number of steps, n.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> from jaxrnn import LSTM, Linear, Pool, Repeat, Stack
      >>> model = Stack((Pool(LSTM(3, 16)), Repeat(Stack((LSTM(16, 8), Linear(8, 2))), 4)))
      >>> jaxrnn.scan(model, model.init(jax.random.key(0)), None, jnp.ones((7, 5, 3)))[1].shape  # batch, n, features
      (5, 4, 2)
    """

    cell: Cell
    length: int

    def __post_init__(self):
        check.fields(self, cell=check.a_cell)
        check.sizes(self, "length")

    @property
    def input_ndim(self):
        return self.cell.input_ndim

    @property
    def input_size(self) -> PyTree:
        return input_size(self.cell)

    @property
    def output_size(self) -> PyTree:
        size = output_size(self.cell, self.input_size)
        if size is None or self.cell.ends_time:
            return size
        return (self.length, *(size if isinstance(size, tuple) else (size,)))

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> PyTree:
        return self.cell.init(key, dtype)

    def noise(self, key, length, batch_shape):
        if not jax.tree.leaves(jax.eval_shape(lambda key: self.cell.noise(key, self.length, ()), key)):
            return None, None
        return None, row_keys(key, (length, *batch_shape))

    def apply(self, params, x, noise=None):
        return self._run(params, x, None if noise is None else noise[1], Walk())

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        ys = self._run(params, xs, None if noise is None else noise[1], walk.one_step)
        return carry, walk.without_padding(ys)

    def _run(self, params, x, keys, walk):
        """Returns the outputs (*batch, n, ...) for x (*batch, ...)."""
        leaf = jax.tree.leaves(x)[0]
        ndim = leaf.ndim - jax.tree.leaves(self.cell.input_ndim)[0]
        # Engines make one axis of all rows, so those that devices divide must come before time.
        last = ndim - 1 if any(axis is not None for axis in jax.typeof(leaf).sharding.spec[1:ndim]) else 0

        def moved(tree, source, target):  # a key of one row has no axis
            return tree if source == target else jax.tree.map(lambda leaf: jnp.moveaxis(leaf, source, target), tree)

        def run(x, key=None):
            xs = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.length, *x.shape)), x)
            return walked(self.cell, params, None, xs, key, walk)[1]

        x = moved(x, 0, last)
        if keys is None:
            ys = run(x)
            ys = ys if self.cell.ends_time else moved(ys, 0, ndim)
        else:  # each row draws its own noise
            for _ in range(ndim):
                run = jax.vmap(run)
            ys = run(x, moved(keys, 0, last))
        return moved(ys, last, 0)

    def parts(self, params, given=None):
        return (Part("cell", self.cell, params, given),)

    def with_parts(self, params, parts):
        (part,) = parts
        return dataclasses.replace(self, cell=part.cell), part.params
