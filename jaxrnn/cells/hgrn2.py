"""The unit of the second hierarchically gated recurrent network."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.matrix import MatrixCell, MatrixInputs, by_head, matrix_step, queries
from jaxrnn.engines.product import dot
from jaxrnn.typing import DTypeLike, Noise


class HGRN2Params(NamedTuple):
    """w_x (D, heads (2K + V)): input weights; columns of q, of f and of v, head by head."""

    w_x: Array


class HGRN2Carry(NamedTuple):
    """s (..., heads, K, V): the state."""

    s: Array


class HGRN2Gates(NamedTuple):
    """f (..., heads, K): the share of each row of the state that is kept."""

    f: Array


class HGRN2(MatrixCell[HGRN2Params, HGRN2Carry]):
    """HGRN with a matrix as state, whose key is what the forget gate lets go: `hgrn2_step` as a cell.

        q = silu(x w_q),  f = γ + (1 − γ) σ(x w_f),  v = x w_v                       for each head
        S' = diag(f) S + (1 − f) vᵀ
        y = S'ᵀ q,  all heads side by side

    γ is a lower bound of the forget gate: let it grow from layer to layer, so that upper layers remember for longer.

    Args:
      input_size: The number of input features, D.
      heads: The number of heads.
      key_size: The number of rows of the state of a head, K.
      value_size: The size of the values of a head, V; y has heads · V features.
      lower_bound: The lower bound γ, at least 0 and below 1.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.HGRN2(8, heads=2, key_size=4, value_size=6, lower_bound=0.5)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))
      >>> carry.s.shape, ys.shape
      ((2, 4, 6), (7, 12))

    References:
      Qin et al. 2024, HGRN2: gated linear RNNs with state expansion, arXiv 2404.07904.
    """

    input_size: int
    heads: int
    key_size: int
    value_size: int
    lower_bound: float = 0.0

    def __post_init__(self):
        check.sizes(self, "input_size", "heads", "key_size", "value_size")
        check.fields(self, lower_bound=check.rate)

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> HGRN2Params:
        return hgrn2_init(key, self.input_size, self.heads, self.key_size, self.value_size, dtype=dtype)

    def initial_carry(self, params: HGRN2Params, batch_shape: tuple[int, ...] = ()) -> HGRN2Carry:
        return HGRN2Carry(self.zeros(params, batch_shape))

    def gates(self, params: HGRN2Params, carry: HGRN2Carry, x: Array, noise: Noise = None) -> HGRN2Gates:
        """The share of each row that one step keeps."""
        check.params(self, params)
        keys = self.heads * self.key_size
        f = by_head(dot(x, params.w_x[:, keys : 2 * keys]), self.heads)
        return HGRN2Gates(self.lower_bound + (1 - self.lower_bound) * jax.nn.sigmoid(f))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return hgrn2_step(params, carry, x, noise, lower_bound=self.lower_bound)

    def inputs(self, params, x):
        return _inputs(params, x, self.heads, self.key_size, self.lower_bound)


def hgrn2_init(
    key: Array, input_size: int, heads: int, key_size: int, value_size: int, *, dtype: DTypeLike = jnp.float32
) -> HGRN2Params:
    """Draws the parameters of `hgrn2_step`: w_x is LeCun normal.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.hgrn2_init(jax.random.key(0), 8, 2, 4, 6).w_x.shape
      (8, 28)
    """
    return HGRN2Params(lecun_normal(key, input_size, heads * (2 * key_size + value_size), 1, dtype))


def hgrn2_step(
    params: HGRN2Params, carry: HGRN2Carry, x: Array, noise: Noise = None, *, lower_bound: float = 0.0
) -> tuple[HGRN2Carry, Array]:
    """One step of HGRN2.

        S' = diag(f) S + (1 − f) vᵀ,  y = S'ᵀ q

    Args:
      params: `HGRN2Params` with w_x (D, heads (2K + V)).
      carry: `HGRN2Carry(s)` with s (..., heads, K, V).
      x: The input of one step, of shape (..., D).
      noise: Always None.
      lower_bound: The lower bound γ, as in `HGRN2`.

    Returns:
      The new carry, and the output of shape (..., heads · V).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.hgrn2_init(jax.random.key(0), 8, 2, 4, 6)
      >>> carry, y = jaxrnn.hgrn2_step(params, jaxrnn.HGRN2Carry(jnp.zeros((2, 4, 6))), jnp.ones(8))
      >>> y.shape
      (12,)
    """
    check.kind(params, HGRN2Params)
    check.rate("lower_bound", lower_bound)
    check.drawn(params, hgrn2_init, params.w_x.shape[0], *carry.s.shape[-3:])
    heads, key_size = carry.s.shape[-3:-1]
    return matrix_step(params, carry, x, functools.partial(_inputs, heads=heads, key_size=key_size, γ=lower_bound))


def _inputs(params, x, heads, key_size, γ) -> MatrixInputs:
    q, f, v = queries(dot(x, params.w_x), heads, key_size)
    # 1 − f, and log f, without the digits that a small difference from 1 would lose
    k = (1 - γ) * jax.nn.sigmoid(-f)
    return MatrixInputs(jax.nn.silu(q), k, v, jax.nn.log_sigmoid(f) if γ == 0 else jnp.log1p(-k))
