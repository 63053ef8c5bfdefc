"""The recurrence of RWKV-7."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import check
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.matrix import (
    MatrixCell,
    MatrixInputs,
    advance,
    by_head,
    kernel_step,
    pieces,
    projected,
    side_by_side,
)
from jaxrnn.engines.arrays import accumulator, lifted
from jaxrnn.engines.product import dot
from jaxrnn.engines.step import Step
from jaxrnn.typing import DTypeLike, Noise

SLOWEST = math.exp(-0.5)  # the largest −log a
SMALLEST = 1e-12  # of the length of a removal key
EPSILON = 1e-5  # of the normalisation of a head, times its size


class RWKV7Params(NamedTuple):
    """w_x (D, heads (2K + V) + 2R): input weights; columns of r, of k and of v, head by head, of the decay and of the
    rate. w_decay, w_rate (R, heads K): from those to the decay and to the rate. All None where x holds them already.
    b_decay, b_rate (heads K,): their biases. removal, replacement, bonus (heads K,): factors of keys. scale, offset
    (heads V,): of the normalisation.
    """

    w_x: Array | None
    w_decay: Array | None
    w_rate: Array | None
    b_decay: Array
    b_rate: Array
    removal: Array
    replacement: Array
    bonus: Array
    scale: Array
    offset: Array


class RWKV7Carry(NamedTuple):
    """s (..., heads, K, V): the state."""

    s: Array


class RWKV7Gates(NamedTuple):
    """a, the share of each row that is kept, and rate, the strength of removing, each (..., heads, K)."""

    a: Array
    rate: Array


class RWKV7(MatrixCell[RWKV7Params, RWKV7Carry]):
    """The recurrence of RWKV-7, a generalised delta rule: `rwkv7_step` as a cell.

        r = x w_r,  k = x w_k,  v = x w_v                                            for each head
        a = exp(−e^(−1/2) σ(tanh(x w_1) w_decay + b_decay)),  α = σ(x w_2 w_rate + b_rate)
        κ = unit(removal ⊙ k),  k̃ = k ⊙ (1 + (α − 1) ⊙ replacement)
        S' = (diag(a) − (α ⊙ κ) κᵀ) S + k̃ vᵀ
        y = norm(S'ᵀ r) + (Σ r ⊙ k̃ ⊙ bonus) v,  all heads side by side

    norm gives the features of a head the mean 0 and the variance 1, then scales and moves them. What the model has
    before and after the recurrence, the shift of tokens and the gate of the output, is in `rwkv7_block`.

    Args:
      input_size: The number of input features, D.
      heads: The number of heads.
      key_size: The size of the keys of a head, K.
      value_size: The size of the values of a head, V; y has heads · V features.
      rank: The rank R of the maps from x to the decay and to the rate.
      project: Whether x is multiplied by w_x. If not, x already holds r, k, v, and the decay and the rate without their
        biases, side by side, and `input_size` is their number.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.RWKV7(8, heads=2, key_size=4, value_size=6, rank=3)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))
      >>> carry.s.shape, ys.shape
      ((2, 4, 6), (7, 12))

    References:
      Peng et al. 2025, RWKV-7 "Goose", arXiv 2503.14456.
    """

    slow_weights = ("b_decay", "b_rate")
    step_by_kernel = True

    input_size: int
    heads: int
    key_size: int
    value_size: int
    rank: int = 64
    project: bool = True

    def __post_init__(self):
        check.sizes(self, "input_size", "heads", "key_size", "value_size", "rank")

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> RWKV7Params:
        sizes = self.input_size, self.heads, self.key_size, self.value_size
        return rwkv7_init(key, *sizes, rank=self.rank, project=self.project, dtype=dtype)

    def initial_carry(self, params: RWKV7Params, batch_shape: tuple[int, ...] = ()) -> RWKV7Carry:
        return RWKV7Carry(self.zeros(params, batch_shape))

    def gates(self, params: RWKV7Params, carry: RWKV7Carry, x: Array, noise: Noise = None) -> RWKV7Gates:
        """The share of each row that is kept and the strength of removing of one step."""
        check.params(self, params)
        *_, decay, rate = self._heads_of(params, x)
        return RWKV7Gates(jnp.exp(_log_decay(decay)), jax.nn.sigmoid(rate))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return rwkv7_step(params, carry, x, noise)

    def inputs(self, params, x):
        return _inputs(params, *self._heads_of(params, x))

    def _heads_of(self, params, x):
        arrays, _ = _parts(params, x)
        return _heads(params, *arrays, self.heads, self.key_size, self.value_size)

    def output(self, params, ys, inputs):
        return _output(params, ys, inputs)


def rwkv7_init(
    key: Array,
    input_size: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    rank: int = 64,
    project: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> RWKV7Params:
    """Draws the parameters of `rwkv7_step`: weights are LeCun normal; b_decay goes from −5.5 to 0.5 over the rows of a
    head; b_rate is −0.19, removal 0.71, replacement 1.02, bonus −0.04; the normalisation begins as itself.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.rwkv7_init(jax.random.key(0), 8, 2, 4, 6, rank=3).w_x.shape
      (8, 34)
    """
    wide = accumulator(dtype)
    k_x, k_decay, k_rate = jax.random.split(key, 3)
    keys, values = heads * key_size, heads * value_size
    params = RWKV7Params(
        w_x=lecun_normal(k_x, input_size, 2 * keys + values + 2 * rank, 1, wide) if project else None,
        w_decay=lecun_normal(k_decay, rank, keys, 1, wide) if project else None,
        w_rate=lecun_normal(k_rate, rank, keys, 1, wide) if project else None,
        b_decay=jnp.tile(jnp.linspace(-5.5, 0.5, key_size, dtype=wide), heads),
        b_rate=jnp.full(keys, -0.19, wide),
        removal=jnp.full(keys, 0.71, wide),
        replacement=jnp.full(keys, 1.02, wide),
        bonus=jnp.full(keys, -0.04, wide),
        scale=jnp.ones(values, wide),
        offset=jnp.zeros(values, wide),
    )
    return jax.tree.map(lambda each: each.astype(dtype), params)


def rwkv7_step(params: RWKV7Params, carry: RWKV7Carry, x: Array, noise: Noise = None) -> tuple[RWKV7Carry, Array]:
    """One step of the recurrence of RWKV-7.

        S' = (diag(a) − (α ⊙ κ) κᵀ) S + k̃ vᵀ,  y = norm(S'ᵀ r) + (Σ r ⊙ k̃ ⊙ bonus) v

    Args:
      params: `RWKV7Params` with w_x (D, heads (2K + V) + 2R), w_decay and w_rate (R, heads K), or None; b_decay,
        b_rate, removal, replacement and bonus (heads K,); scale and offset (heads V,).
      carry: `RWKV7Carry(s)` with s (..., heads, K, V).
      x: The input of one step, of shape (..., D).
      noise: Always None.

    Returns:
      The new carry, and the output of shape (..., heads · V).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.rwkv7_init(jax.random.key(0), 8, 2, 4, 6)
      >>> carry, y = jaxrnn.rwkv7_step(params, jaxrnn.RWKV7Carry(jnp.zeros((2, 4, 6))), jnp.ones(8))
      >>> y.shape
      (12,)
    """
    check.kind(params, RWKV7Params)
    size = x.shape[-1] if params.w_x is None else params.w_x.shape[0]
    rank = 1 if params.w_decay is None else params.w_decay.shape[0]
    heads, key_size, value_size = carry.s.shape[-3:]
    check.drawn(params, rwkv7_init, size, heads, key_size, value_size, rank=rank, project=params.w_x is not None)
    return kernel_step(params, carry, x, _kernel, _parts, slowest=SLOWEST, smallest=SMALLEST, epsilon=EPSILON)


def _parts(params, x):
    """What a step reads: features, decay and rate, of which the last two are the last of the features or apart."""
    features, decay, rate = projected(params, x), None, None
    if params.w_decay is not None:
        size = params.w_decay.shape[0]
        *_, decay, rate = pieces(features, features.shape[-1] - 2 * size, size, size)
        decay = dot(jnp.tanh(decay), params.w_decay.astype(decay.dtype))
        rate = dot(rate, params.w_rate.astype(rate.dtype))
    return (features, decay, rate), tuple(params[3:])


def _program(arrays, weights, s, **_):
    params = RWKV7Params(None, None, None, *weights)
    arrays = (each if each is None else each[None] for each in arrays)
    given = _inputs(params, *_heads(params, *arrays, *s.shape[-3:]))
    s, ys = advance(s, given)
    return s, _output(params, ys, given)[0]


_kernel = Step("rwkv7", _program)


def _heads(params, features, decay, rate, heads, key_size, value_size):
    """r, k, v, and what enters the decay and the rate, by head."""
    keys, values = heads * key_size, heads * value_size
    apart = decay is not None
    rest = (features.shape[-1] - 2 * keys - values) // 2 if apart else keys
    r, k, v, *ends = pieces(features, keys, keys, values, rest, rest)
    decay, rate = (
        each + lifted(bias.astype(each.dtype), each)
        for each, bias in zip((decay, rate) if apart else ends, (params.b_decay, params.b_rate), strict=True)
    )
    return tuple(by_head(each, heads) for each in (r, k, v, decay, rate))


def _log_decay(decay):
    return -SLOWEST * jax.nn.sigmoid(decay)


def _inputs(params, r, k, v, decay, rate) -> MatrixInputs:
    heads = k.shape[-2]
    removal, replacement = (
        lifted(by_head(each.astype(k.dtype), heads), k) for each in (params.removal, params.replacement)
    )
    rate, removed = jax.nn.sigmoid(rate), removal * k
    removed = removed * lax.rsqrt(jnp.maximum(jnp.sum(removed**2, axis=-1, keepdims=True), SMALLEST**2))
    k = k * (1 + (rate - 1) * replacement)
    return MatrixInputs(r, k, v, _log_decay(decay), u=removed * rate, w=-removed)


def _output(params, ys, inputs):
    heads, size = ys.shape[-2:]
    bonus, scale, offset = (
        lifted(by_head(each.astype(ys.dtype), heads), ys) for each in (params.bonus, params.scale, params.offset)
    )
    mean = jnp.mean(ys, axis=-1, keepdims=True)
    variance = jnp.mean((ys - mean) ** 2, axis=-1, keepdims=True)
    ys = (ys - mean) * lax.rsqrt(variance + EPSILON * size) * scale + offset
    q, k, v = (each.astype(ys.dtype) for each in (inputs.q, inputs.k, inputs.v))
    return side_by_side(params, ys + jnp.sum(q * k * bonus, axis=-1, keepdims=True) * v, inputs)
