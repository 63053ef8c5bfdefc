"""Wrappers: cells around one other cell."""

# What other cells are by a class variable, some here are by a property.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cell import Carry, Cell, Params, Part, input_size, output_size, take_step
from jaxrnn.engines.arrays import inexact
from jaxrnn.typing import DTypeLike, PyTree


class Wrapper(Cell[Params, Carry]):
    """A cell around one other cell; params, carry, sizes and noise are those of the inner cell unless it says
    otherwise.
    """

    cell: Cell[Params, Carry]

    def __post_init__(self):
        check.fields(self, cell=check.a_cell)
        if self.cell.ends_time:
            raise ValueError(
                f"{type(self).__name__}.cell: expected one that does not end the time axis, got {self.cell!r}; "
                f"put {type(self).__name__} inside the Pool"
            )

    @property
    def input_ndim(self):
        return self.cell.input_ndim

    @property
    def recurrent_state(self):
        return self.cell.recurrent_state

    @property
    def recurrent_weights(self):
        return self.cell.recurrent_weights

    @property
    def keeps_size(self):
        return self.cell.keeps_size

    @property
    def causal(self) -> bool:
        return self.cell.causal

    @property
    def input_size(self) -> PyTree:
        return input_size(self.cell)

    @property
    def output_size(self) -> PyTree:
        return output_size(self.cell, self.input_size)

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
        return self.cell.init(key, dtype)

    def initial_carry(self, params: Params, batch_shape: tuple[int, ...] = ()) -> Carry:
        return self.cell.initial_carry(params, batch_shape)

    def noise(self, key, length, batch_shape):
        return self.cell.noise(key, length, batch_shape)

    def parts(self, params, given=None):
        return (Part("cell", self.cell, params, given),)

    def with_parts(self, params, parts):
        (part,) = parts
        return dataclasses.replace(self, cell=part.cell), part.params


class Residual(Wrapper[Params, Carry]):
    """A residual connection: y = x + (the cell's y), for a cell whose output has the shape of its input.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.Residual(jaxrnn.GRU(3, 3))
      >>> jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 3)))[1].shape
      (7, 3)
    """

    transparent = True

    @property
    def time_divides(self) -> bool:
        return self.cell.time_divides

    @property
    def recurrent_state(self) -> str | None:
        return None

    def __post_init__(self):
        Wrapper.__post_init__(self)
        if None not in (self.input_size, self.output_size) and self.input_size != self.output_size:
            raise ValueError(
                f"Residual: x has size {self.input_size} and y {self.output_size}, which cannot be added: {self.cell!r}"
            )

    def step(self, params, carry, x, noise=None):
        carry, y = take_step(self.cell, params, carry, x, noise)
        return carry, _add(x, y)

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        carry, ys = self.cell.scan(params, carry, xs, fresh=fresh, noise=noise, walk=walk)
        return carry, _add(xs, ys)


def _add(x, y):
    if x.shape != y.shape:
        raise ValueError(f"x: expected the shape of y, {y.shape}, to which Residual adds it, got {x.shape}")
    x = x if inexact(x) else x.astype(y.dtype)
    return x + y.astype(x.dtype)


class Backward(Wrapper[Params, Carry]):
    """Runs the cell over the sequence in the opposite direction, from the last valid step to the first; ys stay aligned
    with xs.

    Like the backward cell of a `Bidirectional`, it cannot run step by step.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.Stack((jaxrnn.GRU(3, 4), jaxrnn.Backward(jaxrnn.GRU(4, 2))))
      >>> jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 5, 3)))[1].shape
      (7, 5, 2)
    """

    transparent = True

    @property
    def time_divides(self) -> bool:
        return self.cell.time_divides

    @property
    def causal(self) -> bool:
        return False

    def __post_init__(self):
        check.fields(self, cell=check.a_cell)

    @property
    def ends_time(self) -> bool:
        return self.cell.ends_time

    def step(self, params, carry, x, noise=None):
        raise TypeError(
            f"{self!r} cannot run step by step: it begins at the end of the sequence. "
            "Run whole sequences with jaxrnn.scan."
        )

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        return self.cell.scan(params, carry, xs, fresh=fresh, noise=noise, walk=walk.opposite)


class LearnedCarryParams(NamedTuple):
    """cell: the params of the cell; carry: the carry to start from, without batch axes, with None for leaves that are
    not floating numbers.
    """

    cell: Any
    carry: PyTree


class LearnedCarry(Wrapper[LearnedCarryParams, Carry]):
    """The cell with a trainable initial carry, from which every fresh start and every reset begins.

    A given carry replaces it: `scan` trains the learned one only with `carry=None` and at resets. In truncated
    backpropagation, where each window is given the carry of the window before, set `reset` at the first step of every
    sequence, as `jaxrnn.training.Streams` does.

    Examples:
      >>> import jax, jaxrnn
      >>> cell = jaxrnn.LearnedCarry(jaxrnn.GRU(3, 4))
      >>> cell.init(jax.random.key(0)).carry.h.shape
      (4,)
    """

    cell: Cell[PyTree, Carry]

    @property
    def time_divides(self) -> bool:
        return self.cell.time_divides

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> LearnedCarryParams:
        """Returns the params of the cell, and the carry from which the cell starts by itself."""
        params = self.cell.init(key, dtype)
        carry = self.cell.initial_carry(params)
        return LearnedCarryParams(params, jax.tree.map(lambda leaf: leaf if inexact(leaf) else None, carry))

    def initial_carry(self, params: LearnedCarryParams, batch_shape: tuple[int, ...] = ()) -> PyTree:
        if not isinstance(params, LearnedCarryParams):
            raise TypeError(f"params: LearnedCarry takes LearnedCarryParams, got {type(params).__name__}")

        def start(own, learned):
            return own if learned is None else jnp.broadcast_to(learned, own.shape)

        return jax.tree.map(start, self.cell.initial_carry(params.cell, batch_shape), params.carry)

    transparent = True

    @property
    def recurrent_weights(self) -> tuple[str, ...]:
        return ()  # they lie one level down

    def step(self, params, carry, x, noise=None):
        return take_step(self.cell, params.cell, carry, x, noise)

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        return self.cell.scan(params.cell, carry, xs, fresh=fresh, noise=noise, walk=walk)

    def parts(self, params, given=None):
        return (Part("cell", self.cell, params.cell, given),)

    def with_parts(self, params, parts):
        cell, inner = super().with_parts(params, parts)
        return cell, params._replace(cell=inner)


class Emitted(NamedTuple):
    """The output of a step, and the carry after it."""

    y: PyTree
    carry: PyTree


class EmitCarry(Wrapper[Params, Carry]):
    """The cell, with the carry after every step added to its outputs: y becomes `Emitted(y, carry)`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.EmitCarry(jaxrnn.LSTM(3, 4))
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 5, 3)))
      >>> ys.carry.c.shape
      (7, 5, 4)
    """

    @property
    def recurrent_state(self) -> str | None:
        return None

    @property
    def keeps_size(self) -> bool:
        return False

    @property
    def output_size(self) -> PyTree:
        return None

    def step(self, params, carry, x, noise=None):
        carry, y = take_step(self.cell, params, carry, x, noise)
        return carry, Emitted(y, carry)
