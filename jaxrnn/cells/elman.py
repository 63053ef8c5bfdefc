"""The simple recurrent network."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.activations import Activation, check_elementwise
from jaxrnn.cells.gated import GatedCell, clipped, mask_of, rule_of
from jaxrnn.cells.initializers import lecun_normal, orthogonal
from jaxrnn.engines.arrays import accumulator
from jaxrnn.engines.gated.engine import Kernel
from jaxrnn.engines.gated.recurrence import GatedWeights, Recurrence, gated_step
from jaxrnn.typing import DTypeLike, Noise


class ElmanParams(NamedTuple):
    """w_x (D, H): input weights; w_h (H, H): recurrent weights; b (H,): bias, or None."""

    w_x: Array
    w_h: Array
    b: Array | None


class ElmanCarry(NamedTuple):
    """h (..., H): the hidden state."""

    h: Array


class ElmanGates(NamedTuple):
    """h (..., H): the new hidden state."""

    h: Array


class Elman(GatedCell[ElmanParams, ElmanCarry]):
    """The simple recurrent network: `elman_step` as a cell.

        h' = φ(x w_x + h w_h + b),  y = h'

    Args:
      input_size: The number of input features, D.
      hidden_size: The number of hidden units, H.
      activation: The activation φ, "tanh" by default; see `jaxrnn.activation`.
      gate_clip: Clip the input of φ to ±gate_clip (ONNX's `clip`).

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.Elman(3, 16)
      >>> params = cell.init(jax.random.key(0))
      >>> carry, ys = jaxrnn.scan(cell, params, None, jnp.ones((7, 5, 3)))
      >>> carry.h.shape, ys.shape
      ((5, 16), (7, 5, 16))

    References:
      Elman 1990, Finding structure in time, https://doi.org/10.1207/s15516709cog1402_1. Keras' SimpleRNN, torch's RNN,
      Flax's SimpleCell.
    """

    input_size: int
    hidden_size: int
    activation: Activation = "tanh"
    gate_clip: float | None = None

    def __post_init__(self):
        check.sizes(self, "input_size", "hidden_size")
        check.fields(self, gate_clip=check.positive)
        check_elementwise(self.activation)

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> ElmanParams:
        return elman_init(key, self.input_size, self.hidden_size, dtype=dtype)

    def initial_carry(self, params: ElmanParams, batch_shape: tuple[int, ...] = ()) -> ElmanCarry:
        return ElmanCarry(self.zeros(params, batch_shape, self.hidden_size))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return elman_step(params, carry, x, noise, activation=self.activation, gate_clip=self.gate_clip)

    def weights(self, params: ElmanParams) -> GatedWeights:
        return _weights(params)

    def kernel(self, weights: GatedWeights) -> Kernel | None:
        own = self.activation in ("tanh", "relu") and self.gate_clip is None
        return Kernel(f"elman_{self.activation}", weights.w_h) if own else None

    def rule(self):
        return rule_of("elman", candidate=self.activation, gate_clip=self.gate_clip or 0.0)

    def gates(self, params: ElmanParams, carry: ElmanCarry, x: Array, noise: Noise = None) -> ElmanGates:
        """The new state, which is all that this cell computes."""
        return ElmanGates(self.update(*self.products(params, carry, x, noise))[1])

    def update(self, theta, carry, u, v, w):
        return _update(clipped(self.activation, self.gate_clip), theta, carry, u, v, w)


def elman_init(key: Array, input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32) -> ElmanParams:
    """Draws the parameters of `elman_step`: w_x is LeCun normal, w_h is orthogonal, and b is zero.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.elman_init(jax.random.key(0), 3, 16).w_x.shape
      (3, 16)
    """
    k_x, k_h = jax.random.split(key)
    return ElmanParams(
        w_x=lecun_normal(k_x, input_size, hidden_size, 1, dtype),
        w_h=orthogonal(k_h, hidden_size, hidden_size, 1, dtype),
        b=jnp.zeros(hidden_size, dtype),
    )


def irnn_init(
    key: Array, input_size: int, hidden_size: int, *, scale: float = 1.0, dtype: DTypeLike = jnp.float32
) -> ElmanParams:
    """Draws parameters with which `Elman(activation="relu")` remembers: w_h = scale · I, w_x is normal with standard
    deviation 0.001, and b is zero.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.irnn_init(jax.random.key(0), 3, 2).w_h
      Array([[1., 0.],
             [0., 1.]], dtype=float32)

    References:
      Le, Jaitly & Hinton 2015, A simple way to initialize recurrent networks of rectified linear units, arXiv
      1504.00941.
    """
    wide = accumulator(dtype)
    w_x = 1e-3 * jax.random.normal(key, (input_size, hidden_size), wide)
    w_h = float(scale) * jnp.eye(hidden_size, dtype=wide)
    return ElmanParams(w_x.astype(dtype), w_h.astype(dtype), jnp.zeros(hidden_size, dtype))


def elman_step(
    params: ElmanParams,
    carry: ElmanCarry,
    x: Array,
    noise: Noise = None,
    *,
    activation: Activation = "tanh",
    gate_clip: float | None = None,
) -> tuple[ElmanCarry, Array]:
    """One step of a simple recurrent network.

        h' = φ(x w_x + h w_h + b)

    Args:
      params: `ElmanParams` with w_x (D, H), w_h (H, H), b (H,) or None.
      carry: `ElmanCarry(h)` with h (..., H).
      x: The input of one step, of shape (..., D).
      noise: None, or `(mask, None)`, where mask (..., H) multiplies h in the product h w_h.
      activation: The activation φ, as in `Elman`.
      gate_clip: As in `Elman`.

    Returns:
      The new carry, and the output h' of shape (..., H).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.elman_init(jax.random.key(0), 3, 16)
      >>> carry, y = jaxrnn.elman_step(params, jaxrnn.ElmanCarry(jnp.zeros(16)), jnp.ones(3))
      >>> y.shape
      (16,)
    """
    check.kind(params, ElmanParams)
    check.drawn(params, elman_init, *params.w_x.shape)
    update = functools.partial(_update, clipped(activation, gate_clip))
    return gated_step(Recurrence(update), _weights(params), carry, x, mask_of(noise), owner="elman_step")


def _weights(params):
    return GatedWeights(params.w_x, params.b, params.w_h)


def _update(φ, theta, carry, u, v, w):
    h = φ(u + v)
    return ElmanCarry(h), h
