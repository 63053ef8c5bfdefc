"""The delta rule."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.matrix import MatrixCell, MatrixInputs, by_head, matrix_step, unit
from jaxrnn.engines.arrays import dot
from jaxrnn.typing import DTypeLike, Noise


class DeltaNetParams(NamedTuple):
    """w_x (D, heads (2K + V + 1)): input weights; columns of q, of k, of v and of β, head by head."""

    w_x: Array


class DeltaNetCarry(NamedTuple):
    """s (..., heads, K, V): the state, what each head has stored at its keys."""

    s: Array


class DeltaNetGates(NamedTuple):
    """beta (..., heads): the strength of writing."""

    beta: Array


class DeltaNet(MatrixCell[DeltaNetParams, DeltaNetCarry]):
    """A linear memory that replaces what it holds at a key: `delta_net_step` as a cell.

        q = unit(x w_q) / √K,  k = unit(x w_k),  v = x w_v                           for each head
        β = σ(x w_β)
        S' = (I − β k kᵀ) S + β k vᵀ
        y = S'ᵀ q,  all heads side by side

    Args:
      input_size: The number of input features, D.
      heads: The number of heads.
      key_size: The size of the keys of a head, K.
      value_size: The size of the values of a head, V; y has heads · V features.
      negative_eigenvalues: Whether β = 2 σ(x w_β), so that a step can turn the state round, which tasks of counting and
        of permutations need.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.DeltaNet(8, heads=2, key_size=4, value_size=6)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))
      >>> carry.s.shape, ys.shape
      ((2, 4, 6), (7, 12))

    References:
      Schlag et al. 2021, Linear transformers are secretly fast weight programmers, arXiv 2102.11174; Yang et al. 2024,
      arXiv 2406.06484; negative eigenvalues: Grazzi et al. 2024, arXiv 2411.12537.
    """

    input_size: int
    heads: int
    key_size: int
    value_size: int
    negative_eigenvalues: bool = False

    def __post_init__(self):
        check.sizes(self, "input_size", "heads", "key_size", "value_size")

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> DeltaNetParams:
        return delta_net_init(key, self.input_size, self.heads, self.key_size, self.value_size, dtype=dtype)

    def initial_carry(self, params: DeltaNetParams, batch_shape: tuple[int, ...] = ()) -> DeltaNetCarry:
        return DeltaNetCarry(self.zeros(params, batch_shape))

    def gates(self, params: DeltaNetParams, carry: DeltaNetCarry, x: Array, noise: Noise = None) -> DeltaNetGates:
        """The strength of writing of one step."""
        check.params(self, params)
        return DeltaNetGates(_beta(dot(x, params.w_x), self.heads, self.negative_eigenvalues))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return delta_net_step(params, carry, x, noise, negative_eigenvalues=self.negative_eigenvalues)

    def inputs(self, params, x):
        return _inputs(params, x, self.heads, self.key_size, self.negative_eigenvalues)


def delta_net_init(
    key: Array, input_size: int, heads: int, key_size: int, value_size: int, *, dtype: DTypeLike = jnp.float32
) -> DeltaNetParams:
    """Draws the parameters of `delta_net_step`: w_x is LeCun normal.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.delta_net_init(jax.random.key(0), 8, 2, 4, 6).w_x.shape
      (8, 30)
    """
    return DeltaNetParams(lecun_normal(key, input_size, heads * (2 * key_size + value_size + 1), 1, dtype))


def delta_net_step(
    params: DeltaNetParams, carry: DeltaNetCarry, x: Array, noise: Noise = None, *, negative_eigenvalues: bool = False
) -> tuple[DeltaNetCarry, Array]:
    """One step of the delta rule.

        S' = (I − β k kᵀ) S + β k vᵀ,  y = S'ᵀ q

    Args:
      params: `DeltaNetParams` with w_x (D, heads (2K + V + 1)).
      carry: `DeltaNetCarry(s)` with s (..., heads, K, V).
      x: The input of one step, of shape (..., D).
      noise: Always None.
      negative_eigenvalues: As in `DeltaNet`.

    Returns:
      The new carry, and the output of shape (..., heads · V).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.delta_net_init(jax.random.key(0), 8, 2, 4, 6)
      >>> carry, y = jaxrnn.delta_net_step(params, jaxrnn.DeltaNetCarry(jnp.zeros((2, 4, 6))), jnp.ones(8))
      >>> y.shape
      (12,)
    """
    check.kind(params, DeltaNetParams)
    heads, key_size, value_size = carry.s.shape[-3:]
    check.drawn(params, delta_net_init, params.w_x.shape[0], heads, key_size, value_size)
    inputs = functools.partial(_inputs, heads=heads, key_size=key_size, negative_eigenvalues=negative_eigenvalues)
    return matrix_step(params, carry, x, inputs)


def _beta(projected, heads, negative_eigenvalues):
    return jax.nn.sigmoid(projected[..., -heads:]) * (2 if negative_eigenvalues else 1)


def _inputs(params, x, heads, key_size, negative_eigenvalues) -> MatrixInputs:
    projected = dot(x, params.w_x)
    size = heads * key_size
    q, k, v = (by_head(part, heads) for part in jnp.split(projected[..., :-heads], [size, 2 * size], axis=-1))
    beta = _beta(projected, heads, negative_eigenvalues)
    return MatrixInputs(unit(q) * key_size**-0.5, unit(k), v, beta=beta)
