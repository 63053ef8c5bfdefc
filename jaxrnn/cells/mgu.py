"""The minimal gated unit."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.gated import GatedCell
from jaxrnn.cells.initializers import lecun_normal, orthogonal
from jaxrnn.engines.gated.engine import GatedWeights


class MGUParams(NamedTuple):
    """w_x (D, 2H), w_h (H, 2H), b (2H,) or None: the gate f and the candidate n."""

    w_x: Array
    w_h: Array
    b: Array | None


class MGUCarry(NamedTuple):
    """h (..., H)."""

    h: Array


class MGUGates(NamedTuple):
    """The activated gate f and the candidate n, each (..., H)."""

    f: Array
    n: Array


class MGU(GatedCell[MGUParams, MGUCarry]):
    """The minimal gated unit: `mgu_step` as a cell.

        f = σ(x w_xf + h w_hf + b_f)
        n = tanh(x w_xn + (f h) w_hn + b_n)
        h' = (1 − f) h + f n,  y = h'

    Flax's `MGUCell` is another function: it keeps h with f and resets after the product.

    Args:
      input_size: D.
      hidden_size: H.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.MGU(3, 16)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 3)))
      >>> ys.shape
      (7, 16)

    References:
      Zhou et al. 2016, Minimal gated unit for recurrent neural networks, arXiv 1603.09420.
    """

    input_size: int
    hidden_size: int

    def __post_init__(self):
        check.sizes(self, "input_size", "hidden_size")

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def init(self, key: Array, dtype: Any = jnp.float32) -> MGUParams:
        return mgu_init(key, self.input_size, self.hidden_size, dtype=dtype)

    def initial_carry(self, params: MGUParams, batch_shape: tuple[int, ...] = ()) -> MGUCarry:
        return MGUCarry(self.zeros(params, batch_shape, self.hidden_size))

    def weights(self, params: MGUParams) -> GatedWeights:
        h = self.hidden_size
        return GatedWeights(params.w_x, params.b, params.w_h[:, :h], params.w_h[:, h:])

    def gates(self, params: MGUParams, carry: MGUCarry, x: Array, noise: Any = None) -> MGUGates:
        """The activated gates of one step."""
        _, _, u, v, w = self.products(params, carry, x, noise)
        return self._activate(u, v, w)

    def update(self, theta, carry, u, v, w):
        f, n = self._activate(u, v, w)
        h = (1 - f) * carry.h + f * n
        return MGUCarry(h), h

    def second_input(self, theta, carry, s, u, v):
        return jax.nn.sigmoid(u[..., : self.hidden_size] + v) * s

    def _activate(self, u, v, w) -> MGUGates:
        u_f, u_n = jnp.split(u, 2, axis=-1)
        return MGUGates(jax.nn.sigmoid(u_f + v), jnp.tanh(u_n + w))


def mgu_init(key: Array, input_size: int, hidden_size: int, *, dtype: Any = jnp.float32) -> MGUParams:
    """Parameters of `mgu_step`: per gate w_x LeCun normal and w_h orthogonal, biases zero.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.mgu_init(jax.random.key(0), 3, 16).w_h.shape
      (16, 32)
    """
    k_x, k_h = jax.random.split(key)
    return MGUParams(
        w_x=lecun_normal(k_x, input_size, hidden_size, 2, dtype),
        w_h=orthogonal(k_h, hidden_size, hidden_size, 2, dtype),
        b=jnp.zeros(2 * hidden_size, dtype),
    )


def mgu_step(params: MGUParams, carry: MGUCarry, x: Array, noise: Any = None) -> tuple[MGUCarry, Array]:
    """One step of a minimal gated unit.

        f = σ(x w_xf + h w_hf + b_f)
        n = tanh(x w_xn + (f h) w_hn + b_n)
        h' = (1 − f) h + f n

    Args:
      params: `MGUParams` with w_x (D, 2H), w_h (H, 2H), b (2H,) or None; f, then n.
      carry: `MGUCarry(h)`, (..., H).
      x: Input, (..., D).
      noise: None, or `(mask, None)` with a factor on h in its products, (..., H).

    Returns:
      The new carry, and the output h', (..., H).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If params are of another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.mgu_init(jax.random.key(0), 3, 16)
      >>> carry, y = jaxrnn.mgu_step(params, jaxrnn.MGUCarry(jnp.zeros(16)), jnp.ones(3))
      >>> y.shape
      (16,)
    """
    return MGU(params.w_x.shape[0], params.w_h.shape[0]).step(params, carry, x, noise)
