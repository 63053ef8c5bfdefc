"""Linear attention."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.matrix import MatrixCell, MatrixInputs, matrix_step, queries, side_by_side
from jaxrnn.engines.product import dot
from jaxrnn.typing import DTypeLike, Noise

FEATURE_MAPS = {"elu": lambda x: jax.nn.elu(x) + 1, "relu": jax.nn.relu, "exp": jnp.exp, "linear": lambda x: x}
SMALLEST = 1e-6  # what is added to the sum of weights


class LinearAttentionParams(NamedTuple):
    """w_x (D, heads (2K + V)): input weights; columns of q, of k and of v, head by head."""

    w_x: Array


class LinearAttentionCarry(NamedTuple):
    """s (..., heads, K, V + 1): the state, what each head has stored at its keys; the last column is the normaliser,
    the sum of the keys. Without `normalized` it is (..., heads, K, V).
    """

    s: Array


class LinearAttention(MatrixCell[LinearAttentionParams, LinearAttentionCarry]):
    """Attention whose weights are products of features, as a recurrence: `linear_attention_step` as a cell.

        q = φ(x w_q) / √K,  k = φ(x w_k),  v = x w_v                                 for each head
        S' = S + k vᵀ,  z' = z + k
        y = S'ᵀ q / (z'ᵀ q + ε),  all heads side by side

    Args:
      input_size: The number of input features, D.
      heads: The number of heads.
      key_size: The size of the keys of a head, K.
      value_size: The size of the values of a head, V; y has heads · V features.
      feature_map: φ: "elu", elu(x) + 1; "relu"; "exp"; or "linear", x, which has no normaliser since its sums may be 0.
      normalized: Whether y is divided by the sum of its weights; None for all feature maps but "linear".

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.LinearAttention(8, heads=2, key_size=4, value_size=6)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))
      >>> carry.s.shape, ys.shape
      ((2, 4, 7), (7, 12))

    References:
      Katharopoulos et al. 2020, Transformers are RNNs, arXiv 2006.16236.
    """

    input_size: int
    heads: int
    key_size: int
    value_size: int
    feature_map: str = "elu"
    normalized: bool | None = None

    def __post_init__(self):
        check.sizes(self, "input_size", "heads", "key_size", "value_size")
        if self.feature_map not in FEATURE_MAPS:
            known = ", ".join(map(repr, FEATURE_MAPS))
            raise ValueError(f"LinearAttention.feature_map: expected one of {known}, got {self.feature_map!r}")
        if not (self.normalized is None or isinstance(self.normalized, bool)):
            raise TypeError(f"LinearAttention.normalized: expected a bool or None, got {self.normalized!r}")
        if self.normalized and self.feature_map == "linear":
            raise ValueError("LinearAttention.normalized: expected False with feature_map='linear', got True")

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> LinearAttentionParams:
        return linear_attention_init(key, self.input_size, self.heads, self.key_size, self.value_size, dtype=dtype)

    def initial_carry(self, params: LinearAttentionParams, batch_shape: tuple[int, ...] = ()) -> LinearAttentionCarry:
        return LinearAttentionCarry(self.zeros(params, batch_shape, _normalized(self.feature_map, self.normalized)))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        options = {"feature_map": self.feature_map, "normalized": self.normalized}
        return linear_attention_step(params, carry, x, noise, **options)

    def inputs(self, params, x):
        return _inputs(
            params, x, self.heads, self.key_size, self.feature_map, _normalized(self.feature_map, self.normalized)
        )

    def output(self, params, ys, inputs):
        return (_divided if _normalized(self.feature_map, self.normalized) else side_by_side)(params, ys, inputs)


def linear_attention_init(
    key: Array, input_size: int, heads: int, key_size: int, value_size: int, *, dtype: DTypeLike = jnp.float32
) -> LinearAttentionParams:
    """Draws the parameters of `linear_attention_step`: w_x is LeCun normal.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.linear_attention_init(jax.random.key(0), 8, 2, 4, 6).w_x.shape
      (8, 28)
    """
    return LinearAttentionParams(lecun_normal(key, input_size, heads * (2 * key_size + value_size), 1, dtype))


def linear_attention_step(
    params: LinearAttentionParams,
    carry: LinearAttentionCarry,
    x: Array,
    noise: Noise = None,
    *,
    feature_map: str = "elu",
    normalized: bool | None = None,
) -> tuple[LinearAttentionCarry, Array]:
    """One step of linear attention.

        S' = S + k vᵀ,  z' = z + k,  y = S'ᵀ q / (z'ᵀ q + ε)

    Args:
      params: `LinearAttentionParams` with w_x (D, heads (2K + V)).
      carry: `LinearAttentionCarry(s)` with s (..., heads, K, V + 1), or (..., heads, K, V) without normaliser.
      x: The input of one step, of shape (..., D).
      noise: Always None.
      feature_map: As in `LinearAttention`.
      normalized: As in `LinearAttention`.

    Returns:
      The new carry, and the output of shape (..., heads · V).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.linear_attention_init(jax.random.key(0), 8, 2, 4, 6)
      >>> carry = jaxrnn.LinearAttentionCarry(jnp.zeros((2, 4, 7)))
      >>> jaxrnn.linear_attention_step(params, carry, jnp.ones(8))[1].shape
      (12,)
    """
    check.kind(params, LinearAttentionParams)
    normalized = _normalized(feature_map, normalized)
    heads, key_size, columns = carry.s.shape[-3:]
    check.drawn(params, linear_attention_init, params.w_x.shape[0], heads, key_size, columns - normalized)
    inputs = functools.partial(_inputs, heads=heads, key_size=key_size, feature_map=feature_map, normalized=normalized)
    return matrix_step(params, carry, x, inputs, output=_divided if normalized else side_by_side)


def _normalized(feature_map, normalized) -> bool:
    return feature_map != "linear" if normalized is None else normalized


def _inputs(params, x, heads, key_size, feature_map, normalized) -> MatrixInputs:
    q, k, v = queries(dot(x, params.w_x), heads, key_size)
    if normalized:
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    φ = FEATURE_MAPS[feature_map]
    return MatrixInputs(φ(q) * key_size**-0.5, φ(k), v)


def _divided(params, ys, inputs):
    return side_by_side(params, ys[..., :-1] / (ys[..., -1:] + SMALLEST), inputs)
