"""Gated linear attention."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.matrix import MatrixCell, MatrixInputs, by_head, matrix_step, queries
from jaxrnn.engines.arrays import lifted
from jaxrnn.engines.product import dot
from jaxrnn.typing import DTypeLike, Noise


class GLAParams(NamedTuple):
    """w_x (D, heads (2K + V) + R): input weights; columns of q, of k and of v, head by head, and of the gate.

    w_gate (R, heads K): from those to the gate; b_gate (heads K,): its bias.
    """

    w_x: Array
    w_gate: Array
    b_gate: Array


class GLACarry(NamedTuple):
    """s (..., heads, K, V): the state, what each head has stored at its keys."""

    s: Array


class GLAGates(NamedTuple):
    """a (..., heads, K): the share of each row of the state that is kept."""

    a: Array


class GLA(MatrixCell[GLAParams, GLACarry]):
    """Gated linear attention, a linear memory that forgets row by row: `gla_step` as a cell.

        q = x w_q / √K,  k = x w_k,  v = x w_v                                       for each head
        a = σ(x w_r w_gate + b_gate)^(1/16)
        S' = diag(a) S + k vᵀ
        y = S'ᵀ q,  all heads side by side

    Args:
      input_size: The number of input features, D.
      heads: The number of heads.
      key_size: The size of the keys of a head, K.
      value_size: The size of the values of a head, V; y has heads · V features.
      rank: The rank R of the map from x to the gate.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.GLA(8, heads=2, key_size=4, value_size=6)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))
      >>> carry.s.shape, ys.shape
      ((2, 4, 6), (7, 12))

    References:
      Yang et al. 2023, Gated linear attention transformers with hardware-efficient training, arXiv 2312.06635.
    """

    input_size: int
    heads: int
    key_size: int
    value_size: int
    rank: int = 16

    def __post_init__(self):
        check.sizes(self, "input_size", "heads", "key_size", "value_size", "rank")

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> GLAParams:
        sizes = self.input_size, self.heads, self.key_size, self.value_size
        return gla_init(key, *sizes, rank=self.rank, dtype=dtype)

    def initial_carry(self, params: GLAParams, batch_shape: tuple[int, ...] = ()) -> GLACarry:
        return GLACarry(self.zeros(params, batch_shape))

    def gates(self, params: GLAParams, carry: GLACarry, x: Array, noise: Noise = None) -> GLAGates:
        """The share of each row that one step keeps."""
        check.params(self, params)
        return GLAGates(jnp.exp(_log_decay(params, dot(x, params.w_x), self.heads)))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return gla_step(params, carry, x, noise)

    def inputs(self, params, x):
        return _inputs(params, x, self.heads, self.key_size)


def gla_init(
    key: Array,
    input_size: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    rank: int = 16,
    dtype: DTypeLike = jnp.float32,
) -> GLAParams:
    """Draws the parameters of `gla_step`: w_x and w_gate are LeCun normal, and b_gate is zero.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.gla_init(jax.random.key(0), 8, 2, 4, 6, rank=3).w_x.shape
      (8, 31)
    """
    k_x, k_gate = jax.random.split(key)
    return GLAParams(
        w_x=lecun_normal(k_x, input_size, heads * (2 * key_size + value_size) + rank, 1, dtype),
        w_gate=lecun_normal(k_gate, rank, heads * key_size, 1, dtype),
        b_gate=jnp.zeros(heads * key_size, dtype),
    )


def gla_step(params: GLAParams, carry: GLACarry, x: Array, noise: Noise = None) -> tuple[GLACarry, Array]:
    """One step of gated linear attention.

        S' = diag(a) S + k vᵀ,  y = S'ᵀ q

    Args:
      params: `GLAParams` with w_x (D, heads (2K + V) + R), w_gate (R, heads K), b_gate (heads K,).
      carry: `GLACarry(s)` with s (..., heads, K, V).
      x: The input of one step, of shape (..., D).
      noise: Always None.

    Returns:
      The new carry, and the output of shape (..., heads · V).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.gla_init(jax.random.key(0), 8, 2, 4, 6)
      >>> carry, y = jaxrnn.gla_step(params, jaxrnn.GLACarry(jnp.zeros((2, 4, 6))), jnp.ones(8))
      >>> y.shape
      (12,)
    """
    check.kind(params, GLAParams)
    heads, key_size, value_size = carry.s.shape[-3:]
    check.drawn(params, gla_init, params.w_x.shape[0], heads, key_size, value_size, rank=params.w_gate.shape[0])
    return matrix_step(params, carry, x, functools.partial(_inputs, heads=heads, key_size=key_size))


SOFTENING = 16  # the root that is taken of the gate


def _log_decay(params, features, heads):
    rank = params.w_gate.shape[0]
    gate = dot(features[..., -rank:], params.w_gate.astype(features.dtype))
    gate = gate + lifted(params.b_gate.astype(gate.dtype), gate)
    return by_head(jax.nn.log_sigmoid(gate), heads) / SOFTENING


def _inputs(params, x, heads, key_size) -> MatrixInputs:
    rank = params.w_gate.shape[0]
    features = dot(x, params.w_x)
    q, k, v = queries(features[..., :-rank], heads, key_size)
    return MatrixInputs(q * key_size**-0.5, k, v, _log_decay(params, features, heads))
