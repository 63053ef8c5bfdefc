"""The real-gated linear recurrent unit."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.linear import LinearCell, linear_step
from jaxrnn.engines.arrays import accumulator, lifted
from jaxrnn.engines.elementwise.engine import UnitWeights
from jaxrnn.engines.elementwise.programs import Unit
from jaxrnn.engines.product import block_dot
from jaxrnn.typing import DTypeLike, Noise

POWER = 8.0  # c of the paper
STEEPEST = 1000.0  # that the derivative of the square root may be


class RGLRUParams(NamedTuple):
    """decay (D,): Λ; w_x (N, D/N, 2 D/N): input weights in N blocks, for the gates r and i; b (2, D): bias, or None."""

    decay: Array
    w_x: Array
    b: Array | None


class RGLRUCarry(NamedTuple):
    """h (..., D): the hidden state; started (...): bool, whether the sequence has started."""

    h: Array
    started: Array


class RGLRUGates(NamedTuple):
    """The activated recurrence gate r and input gate i, each (..., D)."""

    r: Array
    i: Array


class RGLRU(LinearCell[RGLRUParams, RGLRUCarry]):
    """The real-gated linear recurrent unit of Griffin: `rg_lru_step` as a cell.

        r, i = σ(x w_r + b_r), σ(x w_i + b_i)
        a = exp(−8 softplus(Λ) r)
        h' = a h + √(1 − a²) (i x),  y = h'

    At the first step of a sequence the factor √(1 − a²) is 1; the carry stores whether that step is over. The
    derivative of the square root is at most 1000.

    Args:
      input_size: The number of input features, D; h and y have the same number.
      blocks: The number of blocks, N, of the block-diagonal w_r and w_i; it divides D.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.RGLRU(16, blocks=4)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 16)))
      >>> bool(carry.started), ys.shape
      (True, (7, 16))

    References:
      De et al. 2024, Griffin, arXiv 2402.19427.
    """

    slow_weights = ("decay",)
    begins_apart = True

    input_size: int
    blocks: int = 1

    def __post_init__(self):
        check.sizes(self, "input_size", "blocks")
        if self.input_size % self.blocks:
            raise ValueError(f"RGLRU.blocks: expected a divisor of input_size {self.input_size}, got {self.blocks}")

    @property
    def output_size(self) -> int:
        return self.input_size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> RGLRUParams:
        return rg_lru_init(key, self.input_size, blocks=self.blocks, dtype=dtype)

    def initial_carry(self, params: RGLRUParams, batch_shape: tuple[int, ...] = ()) -> RGLRUCarry:
        return RGLRUCarry(self.zeros(params, batch_shape, self.input_size), jnp.zeros(batch_shape, bool))

    def gates(self, params: RGLRUParams, carry: RGLRUCarry, x: Array, noise: Noise = None) -> RGLRUGates:
        """The activated gates of one step."""
        check.params(self, params)
        return _gates(params, x)

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return rg_lru_step(params, carry, x, noise)

    @property
    def unit(self):
        return UNIT

    def unit_weights(self, params):
        b = None if params.b is None else params.b.reshape(-1)
        return UnitWeights(params.w_x, b, _rate(params, params.decay.dtype))

    def coefficients(self, params, x):
        return _coefficients(params, x)

    def begin(self, a, b, started):
        return _begin(a, b, started)


@jax.custom_jvp
def bounded_sqrt(x: Array) -> Array:
    """Computes √x, with a derivative of at most 1000 where x is near 0."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    return bounded_sqrt(x), tangent * jax.lax.rsqrt(jnp.maximum(4 * x, jnp.full_like(x, STEEPEST**-2)))


def rg_lru_init(key: Array, input_size: int, *, blocks: int = 1, dtype: DTypeLike = jnp.float32) -> RGLRUParams:
    """Draws the parameters of `rg_lru_step`: Λ is such that a lies in [0.9, 0.999] where r = 1, with a² uniform; w_x is
    LeCun normal for each block, and b is zero.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.rg_lru_init(jax.random.key(0), 16, blocks=4).w_x.shape
      (4, 4, 8)
    """
    wide, size = accumulator(dtype), input_size // blocks
    k_decay, k_x = jax.random.split(key)
    square = jax.random.uniform(k_decay, (input_size,), wide, 0.9**2, 0.999**2)
    softplus = -jnp.log(square) / (2 * POWER)
    decay = jnp.log(jnp.expm1(softplus)).astype(dtype)
    keys = jax.random.split(k_x, blocks)
    w_x = jax.vmap(lambda key: lecun_normal(key, size, size, 2, dtype))(keys)
    return RGLRUParams(decay, w_x, jnp.zeros((2, input_size), dtype))


def rg_lru_step(params: RGLRUParams, carry: RGLRUCarry, x: Array, noise: Noise = None) -> tuple[RGLRUCarry, Array]:
    """One step of a real-gated linear recurrent unit.

        r, i = σ(x w_r + b_r), σ(x w_i + b_i)
        a = exp(−8 softplus(Λ) r)
        h' = a h + √(1 − a²) (i x), without the root at the first step

    Args:
      params: `RGLRUParams` with decay (D,), w_x (N, D/N, 2 D/N), b (2, D) or None.
      carry: `RGLRUCarry(h, started)` with h (..., D) and bool started (...).
      x: The input of one step, of shape (..., D).
      noise: Always None.

    Returns:
      The new carry, and the output h' of shape (..., D).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.rg_lru_init(jax.random.key(0), 16)
      >>> carry, y = jaxrnn.rg_lru_step(params, jaxrnn.RGLRUCarry(jnp.zeros(16), jnp.array(False)), jnp.ones(16))
      >>> bool(carry.started)
      True
    """
    check.kind(params, RGLRUParams)
    check.drawn(params, rg_lru_init, *params.decay.shape, blocks=params.w_x.shape[0])
    return linear_step(params, carry, x, _coefficients, begin=_begin)


def _sums(params, x):
    """x w_r and x w_i, in at least float32."""
    blocks, size, _ = params.w_x.shape
    u = block_dot(x, params.w_x).reshape(*x.shape[:-1], blocks, 2 * size)
    return [part.reshape(x.shape) for part in jnp.split(u, 2, axis=-1)]


def _rate(params, dtype):
    """The logarithm of a where r = 1."""
    return -POWER * jax.nn.softplus(params.decay.astype(dtype))


def _gates(params, x) -> RGLRUGates:
    gates = _sums(params, x)
    if params.b is not None:
        gates = [gate + lifted(b.astype(gate.dtype), gate) for gate, b in zip(gates, params.b, strict=True)]
    return RGLRUGates(*map(jax.nn.sigmoid, gates))


def _coefficients(params, x):
    """Returns a, and i x, which is b at the first step."""
    r, i = _gates(params, x)
    wide = r.dtype
    return _mixed(r, i, x.astype(wide), lifted(_rate(params, wide), r))


def _mixed(r, i, x, rate):
    return jnp.exp(rate * r), i * x


def _unit_gates(u, x, rate, begun):
    r, i = jnp.split(jax.nn.sigmoid(u), 2, axis=-1)
    return _begin(*_mixed(r, i, x, rate), begun)


def _begin(a, b, started):
    scale = bounded_sqrt((1 - a) * (1 + a))
    return a, jnp.where(started[..., None], scale, jnp.ones_like(scale)) * b


UNIT = Unit("rg_lru", _unit_gates)
