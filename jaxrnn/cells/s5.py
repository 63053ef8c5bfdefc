"""The simplified state space layer."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import check
from jaxrnn.cells.linear import LinearCell, linear_step, parts_of
from jaxrnn.cells.state_space import check_state_space, discretize, draw_log_step, elapsed, hippo
from jaxrnn.engines.arrays import accumulator, lifted
from jaxrnn.engines.elementwise.engine import UnitWeights
from jaxrnn.engines.elementwise.programs import TURN
from jaxrnn.engines.product import dot
from jaxrnn.typing import DTypeLike, Noise


class S5Params(NamedTuple):
    """log_decay, frequency, log_step (P,): λ = −exp(log_decay) + i frequency, Δ = exp(log_step). w_x (D, 2P): input
    weights, and w_y (2P, D): output weights, both with real and imaginary parts side by side. d (D,): the factor of x
    in y.
    """

    log_decay: Array
    frequency: Array
    log_step: Array
    w_x: Array
    w_y: Array
    d: Array


class S5Carry(NamedTuple):
    """h (..., P): the hidden state, complex."""

    h: Array


class S5(LinearCell[S5Params, S5Carry]):
    """The simplified state space layer: `s5_step` as a cell.

        s' = λ s + x B,  λ = −exp(decay) + i frequency        the continuous system, B = w_re + i w_im
        h' = ā h + b̄ (x B)                                    over a step of length Δ
        y = 2 (Re(h') w_y[:P] + Im(h') w_y[P:]) + d x

        ā = exp(λ Δ), b̄ = (ā − 1) / λ                         "zoh": the input is held during the step
        ā = (1 + λ Δ/2) / (1 − λ Δ/2), b̄ = Δ / (1 − λ Δ/2)    "bilinear"

    Only one eigenvalue of every conjugate pair is kept, hence the factor 2. The real part of λ is negative for all
    params.

    Args:
      input_size: The number of input features, D, which y has too; D + 1 with `timed`.
      hidden_size: The number of conjugate pairs of states, P; the system has 2 P states.
      discretization: The discretization method, "zoh" or "bilinear".
      step_min: The smallest Δ that is drawn; its logarithm is drawn uniformly.
      step_max: The largest Δ that is drawn.
      timed: Whether sampling is irregular: the last entry of x is then the time that a step takes, in units of Δ, and y
        does not have that entry.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.S5(3, 16)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 3)))
      >>> carry.h.dtype, ys.shape
      (dtype('complex64'), (7, 3))

    References:
      Smith et al. 2022, Simplified state space layers for sequence modeling, arXiv 2208.04933.
    """

    slow_weights = ("log_decay", "frequency", "log_step")

    input_size: int
    hidden_size: int
    discretization: str = "zoh"
    step_min: float = 1e-3
    step_max: float = 1e-1
    timed: bool = False

    def __post_init__(self):
        check.sizes(self, "hidden_size")
        check_state_space(self)

    @property
    def output_size(self) -> int:
        return self.input_size - self.timed

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> S5Params:
        return s5_init(
            key, self.output_size, self.hidden_size, step_min=self.step_min, step_max=self.step_max, dtype=dtype
        )

    def initial_carry(self, params: S5Params, batch_shape: tuple[int, ...] = ()) -> S5Carry:
        zeros = self.zeros(params, batch_shape, self.hidden_size)
        return S5Carry(zeros.astype(accumulator(zeros.dtype, jnp.complex64)))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return s5_step(params, carry, x, noise, discretization=self.discretization, timed=self.timed)

    @property
    def unit(self):
        return None if self.timed else TURN

    def unit_weights(self, params):
        log_decay, frequency, log_step = params[:3]
        a, scale = discretize(self.discretization, log_decay, frequency, jnp.exp(log_step))
        w = lax.complex(*jnp.split(params.w_x, 2, axis=-1))
        w = lifted(scale, w) * w
        w_x, theta = parts_of(w), parts_of(a)
        return UnitWeights(w_x[None], theta=theta, w_y=2 * params.w_y)

    def coefficients(self, params, x):
        return _coefficients(params, x, self.discretization, self.timed)

    def output(self, params, h, x):
        return _output(params, h, x, self.timed)

    def with_skip(self, params, y, x):
        return _with_skip(params, y, x)


def s5_init(
    key: Array,
    input_size: int,
    hidden_size: int,
    *,
    step_min: float = 1e-3,
    step_max: float = 1e-1,
    dtype: DTypeLike = jnp.float32,
) -> S5Params:
    """Draws the parameters of `s5_step`: λ are the eigenvalues of the normal part of HiPPO-LegS. In the coordinates of
    HiPPO, w_x has variance 1/D and w_y 1/(2P); both are transformed to the coordinates of its eigenvectors. log Δ is
    uniform, and d is normal.

    Examples:
      >>> import jax, jaxrnn
      >>> params = jaxrnn.s5_init(jax.random.key(0), 3, 16)
      >>> params.w_x.shape, params.w_y.shape
      ((3, 32), (32, 3))
    """
    wide = accumulator(dtype)
    (real, imag), turn = hippo(hidden_size, wide)
    turn = jnp.concatenate([turn[:, :hidden_size], -turn[:, hidden_size:]], axis=1)  # conjugate
    k_x, k_y, k_step, k_d = jax.random.split(key, 4)
    b = jax.random.normal(k_x, (input_size, 2 * hidden_size), wide) / math.sqrt(input_size)
    c = jax.random.normal(k_y, (2 * hidden_size, input_size), wide) / math.sqrt(2 * hidden_size)
    params = S5Params(
        log_decay=jnp.log(-real),
        frequency=imag,
        log_step=draw_log_step(k_step, (hidden_size,), step_min, step_max, wide),
        w_x=jnp.matmul(b, turn, precision="highest"),
        w_y=jnp.matmul(turn.T, c, precision="highest"),
        d=jax.random.normal(k_d, (input_size,), wide),
    )
    return S5Params(*(each.astype(dtype) for each in params))


def s5_step(
    params: S5Params,
    carry: S5Carry,
    x: Array,
    noise: Noise = None,
    *,
    discretization: str = "zoh",
    timed: bool = False,
) -> tuple[S5Carry, Array]:
    """One step of a simplified state space layer.

        h' = ā h + b̄ (x B),  ā and b̄ of λ and Δ as in `S5`
        y = 2 (Re(h') w_y[:P] + Im(h') w_y[P:]) + d x

    Args:
      params: `S5Params` with log_decay, frequency, log_step (P,), w_x (D, 2P), w_y (2P, D), d (D,).
      carry: `S5Carry(h)` with h (..., P), complex.
      x: The input of one step, of shape (..., D), or (..., D + 1) with the time of the step.
      noise: Always None.
      discretization: As in `S5`.
      timed: As in `S5`.

    Returns:
      The new carry, and the output of shape (..., D).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.s5_init(jax.random.key(0), 3, 16)
      >>> carry, y = jaxrnn.s5_step(params, jaxrnn.S5Carry(jnp.zeros(16, jnp.complex64)), jnp.ones(3))
      >>> y.shape
      (3,)
    """
    check.kind(params, S5Params)
    check.drawn(params, s5_init, params.w_x.shape[0], params.w_x.shape[1] // 2)
    coefficients = functools.partial(_coefficients, discretization=discretization, timed=timed)
    return linear_step(params, carry, x, coefficients, output=functools.partial(_output, timed=timed))


def _coefficients(params, x, discretization, timed):
    wide = accumulator(params.d.dtype)
    log_decay, frequency, log_step = (each.astype(wide) for each in params[:3])
    x, time = elapsed(x, timed)
    step = jnp.exp(log_step)
    if time is not None:
        time = time[..., None].astype(wide)
        step = lifted(step, time) * time
    a, scale = discretize(discretization, log_decay, frequency, step)
    u = dot(x, params.w_x).astype(wide)
    u = lax.complex(*jnp.split(u, 2, axis=-1))
    return a, lifted(scale, u) * u


def _output(params, h, x, timed):
    y = 2 * dot(parts_of(h).astype(params.w_y.dtype), params.w_y)
    return _with_skip(params, y, elapsed(x, timed)[0])


def _with_skip(params, y, x):
    return y + lifted(params.d.astype(y.dtype), y) * x.astype(y.dtype)
