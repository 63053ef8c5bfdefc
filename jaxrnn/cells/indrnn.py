"""The independently recurrent network."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.activations import Activation, check_elementwise, elementwise
from jaxrnn.cells.gated import GatedCell, mask_of, rule_of
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.engines.arrays import accumulator
from jaxrnn.engines.gated.recurrence import GatedWeights, Recurrence, gated_step
from jaxrnn.engines.gated.staged.rule import Given
from jaxrnn.typing import DTypeLike, Noise


class IndRNNParams(NamedTuple):
    """w_x (D, H): input weights; w_h (H,): recurrent weights; b (H,): bias, or None."""

    w_x: Array
    w_h: Array
    b: Array | None


class IndRNNCarry(NamedTuple):
    """h (..., H): the hidden state."""

    h: Array


class IndRNNGates(NamedTuple):
    """h (..., H): the new hidden state."""

    h: Array


class IndRNN(GatedCell[IndRNNParams, IndRNNCarry]):
    """The independently recurrent network, in which each unit sees only its own past: `indrnn_step` as a cell.

        h' = φ(x w_x + w_h h + b),  y = h'

    With "relu", |w_h| ≤ 2^(1/T) keeps the state within a factor of 2 over T steps; clip w_h to this range while
    training.

    Args:
      input_size: The number of input features, D.
      hidden_size: The number of hidden units, H.
      activation: The activation φ, "relu" by default; see `jaxrnn.activation`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.IndRNN(3, 16)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 3)))
      >>> ys.shape
      (7, 16)

    References:
      Li et al. 2018, Independently recurrent neural network (IndRNN), arXiv 1803.04831.
    """

    input_size: int
    hidden_size: int
    activation: Activation = "relu"

    def __post_init__(self):
        check.sizes(self, "input_size", "hidden_size")
        check_elementwise(self.activation)

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> IndRNNParams:
        return indrnn_init(key, self.input_size, self.hidden_size, dtype=dtype)

    def initial_carry(self, params: IndRNNParams, batch_shape: tuple[int, ...] = ()) -> IndRNNCarry:
        return IndRNNCarry(self.zeros(params, batch_shape, self.hidden_size))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return indrnn_step(params, carry, x, noise, activation=self.activation)

    def weights(self, params: IndRNNParams) -> GatedWeights:
        return _weights(params)

    def rule(self):
        return rule_of("indrnn", candidate=self.activation)

    def arrange(self, weights: GatedWeights) -> Given:
        return Given(weights.w_x, None, weights.b, theta=weights.w_h[None])

    def gates(self, params: IndRNNParams, carry: IndRNNCarry, x: Array, noise: Noise = None) -> IndRNNGates:
        """The new state, which is all that this cell computes."""
        return IndRNNGates(self.update(*self.products(params, carry, x, noise))[1])

    def update(self, theta, carry, u, v, w):
        return _update(elementwise(self.activation), theta, carry, u, v, w)


def indrnn_init(key: Array, input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32) -> IndRNNParams:
    """Draws the parameters of `indrnn_step`: w_x is LeCun normal, w_h is uniform in [0, 1), and b is zero.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.indrnn_init(jax.random.key(0), 3, 16).w_h.shape
      (16,)
    """
    k_x, k_h = jax.random.split(key)
    return IndRNNParams(
        w_x=lecun_normal(k_x, input_size, hidden_size, 1, dtype),
        w_h=jax.random.uniform(k_h, (hidden_size,), accumulator(dtype)).astype(dtype),
        b=jnp.zeros(hidden_size, dtype),
    )


def indrnn_step(
    params: IndRNNParams, carry: IndRNNCarry, x: Array, noise: Noise = None, *, activation: Activation = "relu"
) -> tuple[IndRNNCarry, Array]:
    """One step of an independently recurrent network.

        h' = φ(x w_x + w_h h + b)

    Args:
      params: `IndRNNParams` with w_x (D, H), w_h (H,), b (H,) or None.
      carry: `IndRNNCarry(h)` with h (..., H).
      x: The input of one step, of shape (..., D).
      noise: None, or `(mask, None)`, where mask (..., H) multiplies h in the product w_h h.
      activation: The activation φ.

    Returns:
      The new carry, and the output h' of shape (..., H).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.indrnn_init(jax.random.key(0), 3, 16)
      >>> carry, y = jaxrnn.indrnn_step(params, jaxrnn.IndRNNCarry(jnp.zeros(16)), jnp.ones(3))
      >>> y.shape
      (16,)
    """
    check.kind(params, IndRNNParams)
    check.drawn(params, indrnn_init, *params.w_x.shape)
    update = functools.partial(_update, elementwise(activation))
    return gated_step(Recurrence(update), _weights(params), carry, x, mask_of(noise), owner="indrnn_step")


def _weights(params):
    return GatedWeights(params.w_x, params.b, params.w_h)


def _update(φ, theta, carry, u, v, w):
    h = φ(u + v)
    return IndRNNCarry(h), h
