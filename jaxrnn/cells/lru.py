"""The linear recurrent unit: complex and diagonal."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import check
from jaxrnn.cells.linear import LinearCell, linear_step, parts_of
from jaxrnn.engines.arrays import accumulator, lifted
from jaxrnn.engines.elementwise.engine import UnitWeights
from jaxrnn.engines.elementwise.programs import TURN
from jaxrnn.engines.product import dot
from jaxrnn.typing import DTypeLike, Noise


class LRUParams(NamedTuple):
    """nu, theta, gamma (H,): they give the modulus, the phase and the input scale of λ. w_x (D, 2H): input weights, and
    w_y (2H, D): output weights, both with real and imaginary parts side by side. d (D,): the factor of x in y.
    """

    nu: Array
    theta: Array
    gamma: Array
    w_x: Array
    w_y: Array
    d: Array


class LRUCarry(NamedTuple):
    """h (..., H): the hidden state, complex."""

    h: Array


class LRU(LinearCell[LRUParams, LRUCarry]):
    """The linear recurrent unit: `lru_step` as a cell.

        λ = exp(−exp(ν) + i exp(θ))
        h' = λ h + exp(γ) (x w_re + i x w_im),  w_x = [w_re, w_im]
        y = Re(h') w_y[:H] + Im(h') w_y[H:] + d x

    |λ| < 1 for every ν. There is no nonlinearity: stack the cell with layers that have one.

    Args:
      input_size: The number of input features, D; y has the same number.
      hidden_size: The number of hidden units, H, which are complex.
      r_min: The inner radius of the ring from which λ is drawn, uniformly by area.
      r_max: The outer radius of this ring.
      max_phase: The largest phase of λ, in radians.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.LRU(3, 16)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 3)))
      >>> carry.h.dtype, ys.shape
      (dtype('complex64'), (7, 3))

    References:
      Orvieto et al. 2023, Resurrecting recurrent neural networks for long sequences, arXiv 2303.06349.
    """

    slow_weights = ("nu", "theta", "gamma")

    input_size: int
    hidden_size: int
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 2 * math.pi

    def __post_init__(self):
        check.sizes(self, "input_size", "hidden_size")
        if not 0 <= self.r_min < self.r_max <= 1:
            raise ValueError(f"LRU.r_min: expected 0 ≤ r_min < r_max ≤ 1, got {self.r_min} and {self.r_max}")
        check.fields(self, max_phase=check.positive)

    @property
    def output_size(self) -> int:
        return self.input_size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> LRUParams:
        return lru_init(
            key,
            self.input_size,
            self.hidden_size,
            r_min=self.r_min,
            r_max=self.r_max,
            max_phase=self.max_phase,
            dtype=dtype,
        )

    def initial_carry(self, params: LRUParams, batch_shape: tuple[int, ...] = ()) -> LRUCarry:
        zeros = self.zeros(params, batch_shape, self.hidden_size)
        return LRUCarry(zeros.astype(accumulator(zeros.dtype, jnp.complex64)))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return lru_step(params, carry, x, noise)

    @property
    def unit(self):
        return TURN

    def unit_weights(self, params):
        re, im = _decay(params)
        scale = jnp.tile(jnp.exp(params.gamma), 2)
        w_x = params.w_x * lifted(scale, params.w_x)
        return UnitWeights(w_x[None], theta=jnp.concatenate([re, im]), w_y=params.w_y)

    def coefficients(self, params, x):
        return _coefficients(params, x)

    def output(self, params, h, x):
        return _output(params, h, x)

    def with_skip(self, params, y, x):
        return _with_skip(params, y, x)


def lru_init(
    key: Array,
    input_size: int,
    hidden_size: int,
    *,
    r_min: float = 0.0,
    r_max: float = 1.0,
    max_phase: float = 2 * math.pi,
    dtype: DTypeLike = jnp.float32,
) -> LRUParams:
    """Draws the parameters of `lru_step`: λ is uniform by area on a ring, and exp(γ) = √(1 − |λ|²), so that h has the
    scale of x. w_x has variance 1/(2 D), w_y has 1/H, and d has 1.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.lru_init(jax.random.key(0), 3, 16, r_min=0.9, r_max=0.99)
      >>> bool(jnp.all((jnp.exp(-jnp.exp(params.nu)) > 0.9) & (jnp.exp(-jnp.exp(params.nu)) < 0.99)))
      True
    """
    wide = accumulator(dtype)
    k_r, k_phase, k_x, k_y, k_d = jax.random.split(key, 5)
    tiny = jnp.finfo(wide).tiny
    area = jax.random.uniform(k_r, (hidden_size,), wide) * (r_max**2 - r_min**2) + r_min**2
    area = jnp.clip(area, tiny, 1 - jnp.finfo(wide).eps)  # |λ|², neither 0 nor 1
    phase = jax.random.uniform(k_phase, (hidden_size,), wide, minval=tiny) * max_phase
    w_x = jax.random.normal(k_x, (input_size, 2 * hidden_size), wide) / math.sqrt(2 * input_size)
    w_y = jax.random.normal(k_y, (2 * hidden_size, input_size), wide) / math.sqrt(hidden_size)
    d = jax.random.normal(k_d, (input_size,), wide)
    params = LRUParams(jnp.log(-jnp.log(area) / 2), jnp.log(phase), jnp.log1p(-area) / 2, w_x, w_y, d)
    return LRUParams(*(each.astype(dtype) for each in params))


def lru_step(params: LRUParams, carry: LRUCarry, x: Array, noise: Noise = None) -> tuple[LRUCarry, Array]:
    """One step of a linear recurrent unit.

        λ = exp(−exp(ν) + i exp(θ))
        h' = λ h + exp(γ) (x w_re + i x w_im)
        y = Re(h') w_y[:H] + Im(h') w_y[H:] + d x

    Args:
      params: `LRUParams` with nu, theta, gamma (H,), w_x (D, 2H), w_y (2H, D), d (D,).
      carry: `LRUCarry(h)` with h (..., H), complex.
      x: The input of one step, of shape (..., D).
      noise: Always None.

    Returns:
      The new carry, and the output of shape (..., D).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.lru_init(jax.random.key(0), 3, 16)
      >>> carry, y = jaxrnn.lru_step(params, jaxrnn.LRUCarry(jnp.zeros(16, jnp.complex64)), jnp.ones(3))
      >>> y.shape
      (3,)
    """
    check.kind(params, LRUParams)
    check.drawn(params, lru_init, params.w_x.shape[0], params.w_x.shape[1] // 2)
    return linear_step(params, carry, x, _coefficients, output=_output)


def _decay(params):
    """The real and the imaginary part of λ."""
    wide = accumulator(params.nu.dtype)
    modulus, phase = jnp.exp(-jnp.exp(params.nu.astype(wide))), jnp.exp(params.theta.astype(wide))
    return modulus * jnp.cos(phase), modulus * jnp.sin(phase)


def _coefficients(params, x):
    wide = accumulator(params.nu.dtype)
    a = lax.complex(*_decay(params))
    re, im = jnp.split(dot(x, params.w_x).astype(wide), 2, axis=-1)
    scale = lifted(jnp.exp(params.gamma.astype(wide)), re)
    return a, lax.complex(scale * re, scale * im)


def _output(params, h, x):
    return _with_skip(params, dot(parts_of(h).astype(params.w_y.dtype), params.w_y), x)


def _with_skip(params, y, x):
    return y + lifted(params.d.astype(y.dtype), y) * x.astype(y.dtype)
