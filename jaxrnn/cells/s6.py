"""The selective state space layer of Mamba."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.diagonal import Diagonal, DiagonalCell
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.linear import linear_step
from jaxrnn.engines.arrays import accumulator, lifted
from jaxrnn.engines.product import dot
from jaxrnn.typing import DTypeLike, Noise


class S6Params(NamedTuple):
    """w_x (D, R + 2N): input weights of the low-rank step, B and C, side by side. w_step (R, D), b_step (D,): weights
    and bias of the step length Δ. log_decay (D, N): λ = −exp(log_decay). d (D,): the factor of x in y.
    """

    w_x: Array
    w_step: Array
    b_step: Array
    log_decay: Array
    d: Array


class S6Carry(NamedTuple):
    """h (..., D, N): the hidden state."""

    h: Array


class S6(DiagonalCell[S6Params, S6Carry]):
    """The selective state space layer of Mamba: `s6_step` as a cell.

        r, B, C = x w_x
        Δ = softplus(r w_step + b_step)
        h' = exp(−exp(log_decay) Δ) h + Δ x Bᵀ         D channels, each with N states
        y = h' C + d x

    The layer is selective: the input controls how the state is written, kept and read. A sequence runs in chunks, and
    only one chunk at a time has its states in memory, also in the backward pass; with the kernel, one step at a time.

    Args:
      input_size: The number of channels, D; y has the same number.
      states: The number of states in each channel, N.
      rank: The rank R of the map from x to Δ; None for D/16, rounded up.
      step_min: The smallest Δ that is drawn; its logarithm is drawn uniformly.
      step_max: The largest Δ that is drawn.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.S6(8, 4)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))
      >>> carry.h.shape, ys.shape
      ((8, 4), (7, 8))

    References:
      Gu & Dao 2023, Mamba, arXiv 2312.00752.
    """

    slow_weights = ("log_decay", "b_step", "d")
    chunk = 64

    input_size: int
    states: int = 16
    rank: int | None = None
    step_min: float = 1e-3
    step_max: float = 1e-1

    def __post_init__(self):
        check.sizes(self, "input_size", "states", "rank")
        check.steps(self)

    @property
    def output_size(self) -> int:
        return self.input_size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> S6Params:
        return s6_init(
            key,
            self.input_size,
            self.states,
            rank=self.rank,
            step_min=self.step_min,
            step_max=self.step_max,
            dtype=dtype,
        )

    def initial_carry(self, params: S6Params, batch_shape: tuple[int, ...] = ()) -> S6Carry:
        return S6Carry(self.zeros(params, (*batch_shape, self.input_size), self.states))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return s6_step(params, carry, x, noise)

    def coefficients(self, params, x):
        return _coefficients(params, x)

    def output(self, params, h, x):
        return _output(params, h, x)

    def diagonal(self, params, x):
        u, step = _products(params, x)
        states = self.states
        return Diagonal(-jnp.exp(params.log_decay), u[..., -2 * states : -states], u[..., -states:], step)


def s6_init(
    key: Array,
    input_size: int,
    states: int = 16,
    *,
    rank: int | None = None,
    step_min: float = 1e-3,
    step_max: float = 1e-1,
    dtype: DTypeLike = jnp.float32,
) -> S6Params:
    """Draws the parameters of `s6_step`: λ = −1, …, −N in every channel; w_x is LeCun normal, and w_step uniform
    within ±1/√R; b_step is such that Δ without input is log-uniform; d is one.

    Examples:
      >>> import jax, jaxrnn
      >>> params = jaxrnn.s6_init(jax.random.key(0), 32, 4)
      >>> params.w_x.shape, params.w_step.shape
      ((32, 10), (2, 32))
    """
    wide = accumulator(dtype)
    rank = math.ceil(input_size / 16) if rank is None else rank
    k_x, k_w, k_b = jax.random.split(key, 3)
    bound = rank**-0.5
    step = jnp.exp(jax.random.uniform(k_b, (input_size,), wide, math.log(step_min), math.log(step_max)))
    params = S6Params(
        w_x=lecun_normal(k_x, input_size, rank + 2 * states, 1, wide),
        w_step=jax.random.uniform(k_w, (rank, input_size), wide, -bound, bound),
        b_step=step + jnp.log(-jnp.expm1(-step)),  # whose softplus is the step
        log_decay=jnp.broadcast_to(jnp.log(jnp.arange(1, states + 1, dtype=wide)), (input_size, states)),
        d=jnp.ones(input_size, wide),
    )
    return S6Params(*(each.astype(dtype) for each in params))


def s6_step(params: S6Params, carry: S6Carry, x: Array, noise: Noise = None) -> tuple[S6Carry, Array]:
    """One step of a selective state space layer.

        r, B, C = x w_x
        Δ = softplus(r w_step + b_step)
        h' = exp(−exp(log_decay) Δ) h + Δ x Bᵀ
        y = h' C + d x

    Args:
      params: `S6Params` with w_x (D, R + 2N), w_step (R, D), b_step (D,), log_decay (D, N), d (D,).
      carry: `S6Carry(h)` with h (..., D, N).
      x: The input of one step, of shape (..., D).
      noise: Always None.

    Returns:
      The new carry, and the output of shape (..., D).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.s6_init(jax.random.key(0), 8, 4)
      >>> carry, y = jaxrnn.s6_step(params, jaxrnn.S6Carry(jnp.zeros((8, 4))), jnp.ones(8))
      >>> y.shape
      (8,)
    """
    check.kind(params, S6Params)
    check.drawn(params, s6_init, *params.log_decay.shape, rank=params.w_step.shape[0])
    return linear_step(params, carry, x, _coefficients, output=_output)


def _products(params, x, columns=None):
    """The first columns of x w_x, and what Δ is the softplus of."""
    wide, rank = accumulator(x.dtype), params.w_step.shape[0]
    u = dot(x, params.w_x[:, :columns]).astype(wide)
    step = dot(u[..., :rank].astype(x.dtype), params.w_step).astype(wide)
    return u, step + lifted(params.b_step.astype(wide), step)


def _coefficients(params, x):
    rank, states = params.w_step.shape[0], params.log_decay.shape[1]
    u, step = _products(params, x, rank + states)
    step = jax.nn.softplus(step)[..., None]
    a = jnp.exp(-lifted(jnp.exp(params.log_decay.astype(step.dtype)), step) * step)
    return a, step * x.astype(step.dtype)[..., None] * u[..., None, rank:]


def _output(params, h, x):
    c = dot(x, params.w_x[:, -params.log_decay.shape[1] :]).astype(h.dtype)
    return jnp.einsum("...dn,...n->...d", h, c) + lifted(params.d.astype(h.dtype), x) * x.astype(h.dtype)
