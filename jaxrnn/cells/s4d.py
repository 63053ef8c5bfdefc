"""The diagonal structured state space layer: one small system for every channel."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import check
from jaxrnn.cells.diagonal import Diagonal, DiagonalCell
from jaxrnn.cells.state_space import DISCRETIZATIONS, check_state_space, discretize, draw_log_step, elapsed, hippo
from jaxrnn.engines.arrays import accumulator, cast, compute_dtype, lifted
from jaxrnn.engines.step import Step
from jaxrnn.typing import DTypeLike, Noise

SPECTRA = ("linear", "inverse", "hippo")


class S4DParams(NamedTuple):
    """log_decay, frequency (D, N): λ = −exp(log_decay) + i frequency. log_step (D,): Δ = exp(log_step). c (2, D, N):
    output weights, real and imaginary parts. d (D,): the factor of x in y.
    """

    log_decay: Array
    frequency: Array
    log_step: Array
    c: Array
    d: Array


class S4DCarry(NamedTuple):
    """h (..., D, N): the hidden state, complex."""

    h: Array


class S4D(DiagonalCell[S4DParams, S4DCarry]):
    """The diagonal structured state space layer: `s4d_step` as a cell.

        s' = λ s + x,  λ = −exp(decay) + i frequency     the continuous system, N pairs of states for each channel
        h' = ā h + b̄ x                                   over a step of length Δ, as in `S5`
        y = 2 Re Σ_n c_n h'_n + d x

    Channels do not see each other: put a `Linear` above the layer. The real part of λ is negative for all params.

    Args:
      input_size: The number of channels, D, which y has too; D + 1 with `timed`.
      states: The number of conjugate pairs of states in each channel, N.
      spectrum: The initial λ: "linear", −1/2 + iπn; "inverse", −1/2 + i (M/π) (M/(2n+1) − 1) with M = 2N; or "hippo",
        the eigenvalues of the normal part of HiPPO-LegS.
      discretization: The discretization method, "zoh" or "bilinear".
      step_min: The smallest Δ that is drawn; its logarithm is drawn uniformly.
      step_max: The largest Δ that is drawn.
      timed: Whether sampling is irregular: the last entry of x is then the time that a step takes, in units of Δ, and y
        does not have that entry.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.S4D(3, 16)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 3)))
      >>> carry.h.shape, ys.shape
      ((3, 16), (7, 3))

    References:
      Gu et al. 2022, On the parameterization and initialization of diagonal state space models, arXiv 2206.11893.
    """

    slow_weights = ("log_decay", "frequency", "log_step")
    step_by_kernel = True

    input_size: int
    states: int
    spectrum: str = "linear"
    discretization: str = "zoh"
    step_min: float = 1e-3
    step_max: float = 1e-1
    timed: bool = False

    def __post_init__(self):
        check.sizes(self, "states")
        check_state_space(self)
        if self.spectrum not in SPECTRA:
            raise ValueError(f"S4D.spectrum: expected one of {SPECTRA}, got {self.spectrum!r}")

    @property
    def output_size(self) -> int:
        return self.input_size - self.timed

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> S4DParams:
        return s4d_init(
            key,
            self.output_size,
            self.states,
            spectrum=self.spectrum,
            step_min=self.step_min,
            step_max=self.step_max,
            dtype=dtype,
        )

    def initial_carry(self, params: S4DParams, batch_shape: tuple[int, ...] = ()) -> S4DCarry:
        dtype = accumulator(params.d.dtype, jnp.complex64)
        return S4DCarry(jnp.zeros((*batch_shape, self.output_size, self.states), dtype))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return s4d_step(params, carry, x, noise, discretization=self.discretization, timed=self.timed)

    def coefficients(self, params, x):
        return _coefficients(params, *elapsed(x, self.timed), self.discretization)

    def output(self, params, h, x):
        return _output(params, h, elapsed(x, self.timed)[0])

    @property
    def by_kernel(self):
        return not self.timed

    def diagonal(self, params, x):
        a, b = discretize(self.discretization, params.log_decay, params.frequency, jnp.exp(params.log_step)[:, None])
        return Diagonal(a, b, lax.complex(*params.c))


def s4d_init(
    key: Array,
    input_size: int,
    states: int,
    *,
    spectrum: str = "linear",
    step_min: float = 1e-3,
    step_max: float = 1e-1,
    dtype: DTypeLike = jnp.float32,
) -> S4DParams:
    """Draws the parameters of `s4d_step`: λ as in `S4D`, the same for all channels; c complex normal with variance 1;
    log Δ uniform; d normal.

    Examples:
      >>> import jax, jaxrnn
      >>> params = jaxrnn.s4d_init(jax.random.key(0), 3, 16)
      >>> params.frequency.shape, params.c.shape
      ((3, 16), (2, 3, 16))
    """
    wide = accumulator(dtype)
    pair, whole = jnp.arange(states, dtype=wide), 2 * states
    match spectrum:
        case "linear":
            frequency = math.pi * pair
        case "inverse":
            frequency = whole / math.pi * (whole / (2 * pair + 1) - 1)
        case "hippo":
            frequency = hippo(states, wide)[0][1]
        case _:
            raise ValueError(f"spectrum: expected one of {SPECTRA}, got {spectrum!r}")
    k_step, k_c, k_d = jax.random.split(key, 3)
    shape = input_size, states
    params = S4DParams(
        log_decay=jnp.full(shape, math.log(0.5), wide),
        frequency=jnp.broadcast_to(frequency, shape),
        log_step=draw_log_step(k_step, (input_size,), step_min, step_max, wide),
        c=jax.random.normal(k_c, (2, *shape), wide) * math.sqrt(0.5),
        d=jax.random.normal(k_d, (input_size,), wide),
    )
    return S4DParams(*(each.astype(dtype) for each in params))


def s4d_step(
    params: S4DParams,
    carry: S4DCarry,
    x: Array,
    noise: Noise = None,
    *,
    discretization: str = "zoh",
    timed: bool = False,
) -> tuple[S4DCarry, Array]:
    """One step of a diagonal structured state space layer.

        h' = ā h + b̄ x,  ā and b̄ of λ and Δ as in `S5`
        y = 2 Re Σ_n c_n h'_n + d x

    Args:
      params: `S4DParams` with log_decay, frequency (D, N), log_step (D,), c (2, D, N), d (D,).
      carry: `S4DCarry(h)` with h (..., D, N), complex.
      x: The input of one step, of shape (..., D), or (..., D + 1) with the time of the step.
      noise: Always None.
      discretization: As in `S4D`.
      timed: As in `S4D`.

    Returns:
      The new carry, and the output of shape (..., D).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.s4d_init(jax.random.key(0), 3, 16)
      >>> carry, y = jaxrnn.s4d_step(params, jaxrnn.S4DCarry(jnp.zeros((3, 16), jnp.complex64)), jnp.ones(3))
      >>> y.shape
      (3,)
    """
    check.kind(params, S4DParams)
    check.drawn(params, s4d_init, *params.frequency.shape)
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"discretization: expected one of {DISCRETIZATIONS}, got {discretization!r}")
    dtype = compute_dtype(x, params)
    x, time = elapsed(x.astype(dtype), timed)
    wide = accumulator(dtype, carry.h.real.dtype)
    arrays, weights = cast(((x, time), tuple(cast(params, dtype))), wide)
    h, y = _kernel(
        arrays, weights, carry.h.astype(accumulator(wide, jnp.complex64)), bilinear=_bilinear(discretization)
    )
    return carry._replace(h=h.astype(carry.h.dtype)), y.astype(dtype)


def _bilinear(discretization: str) -> bool:
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"discretization: expected one of {DISCRETIZATIONS}, got {discretization!r}")
    return discretization == "bilinear"


def _program(arrays, weights, h, *, bilinear):
    (x, time), params = arrays, S4DParams(*weights)
    a, b = _coefficients(params, x, time, "bilinear" if bilinear else "zoh")
    h = lifted(a, b) * h + b
    return h, _output(params, h, x)


_kernel = Step("s4d", _program)


def _coefficients(params, x, time, discretization):
    wide = accumulator(params.d.dtype)
    log_decay, frequency, log_step = (each.astype(wide) for each in params[:3])
    step = jnp.exp(log_step)[:, None]
    if time is not None:
        time = time[..., None, None].astype(wide)
        step = lifted(step, time) * time
    a, scale = discretize(discretization, log_decay, frequency, step)
    x = x[..., None].astype(scale.dtype)
    return a, lifted(scale, x) * x


def _output(params, h, x):
    re, im = (lifted(each, h) for each in params.c.astype(h.real.dtype))
    y = 2 * jnp.sum(re * h.real - im * h.imag, axis=-1)
    return y + lifted(params.d.astype(y.dtype), y) * x.astype(y.dtype)
