"""The gated delta rule."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.matrix import MatrixCell, MatrixInputs, by_head, matrix_step, unit
from jaxrnn.engines.arrays import accumulator, dot, lifted
from jaxrnn.typing import DTypeLike, Noise


class GatedDeltaNetParams(NamedTuple):
    """w_x (D, heads (2K + V + 2)): input weights; columns of q, of k, of v, of β and of the step Δ, head by head.

    b_step (heads,): bias of Δ; log_decay (heads,): the logarithm of the rate at which a head forgets.
    """

    w_x: Array
    b_step: Array
    log_decay: Array


class GatedDeltaNetCarry(NamedTuple):
    """s (..., heads, K, V): the state, what each head has stored at its keys."""

    s: Array


class GatedDeltaNetGates(NamedTuple):
    """beta, the strength of writing, and a, the share that is kept, each (..., heads)."""

    beta: Array
    a: Array


class GatedDeltaNet(MatrixCell[GatedDeltaNetParams, GatedDeltaNetCarry]):
    """A linear memory that forgets, and replaces what it holds at a key: `gated_delta_net_step` as a cell.

        q = unit(x w_q) / √K,  k = unit(x w_k),  v = x w_v                           for each head
        β = σ(x w_β)
        a = exp(−exp(log_decay) Δ),  Δ = softplus(x w_step + b_step)
        S' = a (I − β k kᵀ) S + β k vᵀ
        y = S'ᵀ q,  all heads side by side

    It is the recurrence of Qwen3-Next and Qwen3.5, without the convolutions before it and the gate after it.

    Args:
      input_size: The number of input features, D.
      heads: The number of heads.
      key_size: The size of the keys of a head, K.
      value_size: The size of the values of a head, V; y has heads · V features.
      negative_eigenvalues: Whether β = 2 σ(x w_β), so that a step can turn the state round, which tasks of counting and
        of permutations need.
      step_min: The smallest Δ that is drawn; its logarithm is drawn uniformly.
      step_max: The largest Δ that is drawn.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.GatedDeltaNet(8, heads=2, key_size=4, value_size=6)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))
      >>> carry.s.shape, ys.shape
      ((2, 4, 6), (7, 12))

    References:
      Yang et al. 2024, Gated delta networks, arXiv 2412.06464; negative eigenvalues: Grazzi et al. 2024, arXiv
      2411.12537.
    """

    slow_weights = ("log_decay", "b_step")

    input_size: int
    heads: int
    key_size: int
    value_size: int
    negative_eigenvalues: bool = False
    step_min: float = 1e-3
    step_max: float = 1e-1

    def __post_init__(self):
        check.sizes(self, "input_size", "heads", "key_size", "value_size")
        check.fields(self, step_min=check.positive, step_max=check.positive)
        if self.step_min > self.step_max:
            raise ValueError(f"GatedDeltaNet.step_min: expected at most step_max, {self.step_max}, got {self.step_min}")

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> GatedDeltaNetParams:
        sizes = self.input_size, self.heads, self.key_size, self.value_size
        return gated_delta_net_init(key, *sizes, step_min=self.step_min, step_max=self.step_max, dtype=dtype)

    def initial_carry(self, params: GatedDeltaNetParams, batch_shape: tuple[int, ...] = ()) -> GatedDeltaNetCarry:
        return GatedDeltaNetCarry(self.zeros(params, batch_shape))

    def gates(
        self, params: GatedDeltaNetParams, carry: GatedDeltaNetCarry, x: Array, noise: Noise = None
    ) -> GatedDeltaNetGates:
        """The strength of writing and the share that is kept of one step."""
        check.params(self, params)
        beta, log_decay = _gates(params, dot(x, params.w_x), self.negative_eigenvalues)
        return GatedDeltaNetGates(beta, jnp.exp(log_decay))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return gated_delta_net_step(params, carry, x, noise, negative_eigenvalues=self.negative_eigenvalues)

    def inputs(self, params, x):
        return _inputs(params, x, self.key_size, self.negative_eigenvalues)


def gated_delta_net_init(
    key: Array,
    input_size: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    step_min: float = 1e-3,
    step_max: float = 1e-1,
    dtype: DTypeLike = jnp.float32,
) -> GatedDeltaNetParams:
    """Draws the parameters of `gated_delta_net_step`: w_x is LeCun normal; b_step is such that Δ without input is
    log-uniform; exp(log_decay) is uniform up to 16.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.gated_delta_net_init(jax.random.key(0), 8, 2, 4, 6).w_x.shape
      (8, 32)
    """
    wide = accumulator(dtype)
    k_x, k_step, k_decay = jax.random.split(key, 3)
    step = jnp.exp(jax.random.uniform(k_step, (heads,), wide, math.log(step_min), math.log(step_max)))
    params = GatedDeltaNetParams(
        w_x=lecun_normal(k_x, input_size, heads * (2 * key_size + value_size + 2), 1, wide),
        b_step=step + jnp.log(-jnp.expm1(-step)),  # whose softplus is the step
        log_decay=jnp.log(jax.random.uniform(k_decay, (heads,), wide, 0.01, 16.0)),
    )
    return GatedDeltaNetParams(*(each.astype(dtype) for each in params))


def gated_delta_net_step(
    params: GatedDeltaNetParams,
    carry: GatedDeltaNetCarry,
    x: Array,
    noise: Noise = None,
    *,
    negative_eigenvalues: bool = False,
) -> tuple[GatedDeltaNetCarry, Array]:
    """One step of the gated delta rule.

        S' = a (I − β k kᵀ) S + β k vᵀ,  y = S'ᵀ q

    Args:
      params: `GatedDeltaNetParams` with w_x (D, heads (2K + V + 2)), b_step (heads,), log_decay (heads,).
      carry: `GatedDeltaNetCarry(s)` with s (..., heads, K, V).
      x: The input of one step, of shape (..., D).
      noise: Always None.
      negative_eigenvalues: As in `GatedDeltaNet`.

    Returns:
      The new carry, and the output of shape (..., heads · V).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.gated_delta_net_init(jax.random.key(0), 8, 2, 4, 6)
      >>> carry, y = jaxrnn.gated_delta_net_step(params, jaxrnn.GatedDeltaNetCarry(jnp.zeros((2, 4, 6))), jnp.ones(8))
      >>> y.shape
      (12,)
    """
    check.kind(params, GatedDeltaNetParams)
    check.drawn(params, gated_delta_net_init, params.w_x.shape[0], *carry.s.shape[-3:])
    key_size = carry.s.shape[-2]
    inputs = functools.partial(_inputs, key_size=key_size, negative_eigenvalues=negative_eigenvalues)
    return matrix_step(params, carry, x, inputs)


def _gates(params, projected, negative_eigenvalues) -> tuple[Array, Array]:
    """β and the logarithm of a."""
    heads = params.b_step.shape[0]
    beta, step = projected[..., -2 * heads : -heads], projected[..., -heads:]
    step = jax.nn.softplus(step + lifted(params.b_step.astype(step.dtype), step))
    log_decay = -jnp.exp(lifted(params.log_decay.astype(step.dtype), step)) * step
    return jax.nn.sigmoid(beta) * (2 if negative_eigenvalues else 1), log_decay


def _inputs(params, x, key_size, negative_eigenvalues) -> MatrixInputs:
    heads = params.b_step.shape[0]
    projected = dot(x, params.w_x)
    size = heads * key_size
    q, k, v = (by_head(part, heads) for part in jnp.split(projected[..., : -2 * heads], [size, 2 * size], axis=-1))
    beta, log_decay = _gates(params, projected, negative_eigenvalues)
    return MatrixInputs(unit(q) * key_size**-0.5, unit(k), v, log_decay, beta)
