"""The hierarchically gated recurrent network's unit."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.linear import LinearCell, affine, linear_step
from jaxrnn.engines.elementwise.engine import UnitWeights
from jaxrnn.engines.elementwise.programs import Unit
from jaxrnn.typing import DTypeLike, Noise


class HGRNParams(NamedTuple):
    """w_x (D, 2H): input weights; b (2H,): bias, or None; columns of the forget gate f, then of the candidate n."""

    w_x: Array
    b: Array | None


class HGRNCarry(NamedTuple):
    """h (..., H): the hidden state."""

    h: Array


class HGRNGates(NamedTuple):
    """The activated gate f and the candidate n, each (..., H)."""

    f: Array
    n: Array


class HGRN(LinearCell[HGRNParams, HGRNCarry]):
    """The real unit of the hierarchically gated recurrent network: `hgrn_step` as a cell.

        f = γ + (1 − γ) σ(x w_f + b_f)
        n = v σ(v),  v = x w_n + b_n
        h' = f h + (1 − f) n,  y = h'

    γ is a lower bound of the forget gate: let it grow from layer to layer, so that upper layers remember for longer.

    Args:
      input_size: The number of input features, D.
      hidden_size: The number of hidden units, H.
      lower_bound: The lower bound γ, at least 0 and below 1.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.Stack([jaxrnn.HGRN(3, 8), jaxrnn.HGRN(8, 8, lower_bound=0.9)])
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 3)))
      >>> ys.shape
      (7, 8)

    References:
      Qin et al. 2023, Hierarchically gated recurrent neural network, arXiv 2311.04823; with a real state.
    """

    input_size: int
    hidden_size: int
    lower_bound: float = 0.0

    def __post_init__(self):
        check.sizes(self, "input_size", "hidden_size")
        check.fields(self, lower_bound=check.rate)

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> HGRNParams:
        return hgrn_init(key, self.input_size, self.hidden_size, dtype=dtype)

    def initial_carry(self, params: HGRNParams, batch_shape: tuple[int, ...] = ()) -> HGRNCarry:
        return HGRNCarry(self.zeros(params, batch_shape, self.hidden_size))

    def gates(self, params: HGRNParams, carry: HGRNCarry, x: Array, noise: Noise = None) -> HGRNGates:
        """The activated gate and the candidate of one step."""
        check.params(self, params)
        return _gates(params, x, self.lower_bound)

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return hgrn_step(params, carry, x, noise, lower_bound=self.lower_bound)

    @property
    def unit(self):
        return _unit(self.lower_bound)

    def unit_weights(self, params):
        return UnitWeights(params.w_x[None], params.b)

    def coefficients(self, params, x):
        return _coefficients(params, x, self.lower_bound)


def hgrn_init(key: Array, input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32) -> HGRNParams:
    """Draws the parameters of `hgrn_step`: w_x is LeCun normal, and b is zero.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.hgrn_init(jax.random.key(0), 3, 16).w_x.shape
      (3, 32)
    """
    return HGRNParams(lecun_normal(key, input_size, hidden_size, 2, dtype), jnp.zeros(2 * hidden_size, dtype))


def hgrn_step(
    params: HGRNParams, carry: HGRNCarry, x: Array, noise: Noise = None, *, lower_bound: float = 0.0
) -> tuple[HGRNCarry, Array]:
    """One step of a hierarchically gated recurrent network's unit.

        f = γ + (1 − γ) σ(x w_f + b_f)
        h' = f h + (1 − f) silu(x w_n + b_n)

    Args:
      params: `HGRNParams` with w_x (D, 2H), b (2H,) or None.
      carry: `HGRNCarry(h)` with h (..., H).
      x: The input of one step, of shape (..., D).
      noise: Always None.
      lower_bound: The lower bound γ, as in `HGRN`.

    Returns:
      The new carry, and the output h' of shape (..., H).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.hgrn_init(jax.random.key(0), 3, 16)
      >>> carry, y = jaxrnn.hgrn_step(params, jaxrnn.HGRNCarry(jnp.zeros(16)), jnp.ones(3))
      >>> y.shape
      (16,)
    """
    check.kind(params, HGRNParams)
    check.rate("lower_bound", lower_bound)
    check.drawn(params, hgrn_init, params.w_x.shape[0], params.w_x.shape[1] // 2)
    return linear_step(params, carry, x, functools.partial(_coefficients, γ=lower_bound))


def _activated(u, γ) -> HGRNGates:
    f, n = jnp.split(u, 2, axis=-1)
    return HGRNGates(γ + (1 - γ) * jax.nn.sigmoid(f), jax.nn.silu(n))


def _gates(params, x, γ) -> HGRNGates:
    return _activated(affine(params, x), γ)


def _mixed(f, n):
    return f, (1 - f) * n


def _coefficients(params, x, γ):
    return _mixed(*_gates(params, x, γ))


@functools.cache
def _unit(γ):
    return Unit("hgrn", lambda u, *_: _mixed(*_activated(u, γ)), bound=γ)
