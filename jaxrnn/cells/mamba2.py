"""The state space layer of Mamba-2."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.matrix import (
    MatrixCell,
    MatrixInputs,
    by_head,
    draw_step_bias,
    matrix_step,
    pieces,
    projected,
    side_by_side,
)
from jaxrnn.engines.arrays import accumulator, lifted
from jaxrnn.typing import DTypeLike, Noise


class Mamba2Params(NamedTuple):
    """w_x (D, 2 G K + heads (V + 1)): input weights; columns of C, of B, of v and of the step Δ, head by head; None
    where x holds these already. b_step (heads,): bias of Δ; log_decay (heads,): the logarithm of the rate at which a
    head forgets; d (heads,): the factor of v in y.
    """

    w_x: Array | None
    b_step: Array
    log_decay: Array
    d: Array


class Mamba2Carry(NamedTuple):
    """s (..., heads, K, V): the state."""

    s: Array


class Mamba2Gates(NamedTuple):
    """step, the length Δ, and a, the share that is kept, each (..., heads)."""

    step: Array
    a: Array


class Mamba2(MatrixCell[Mamba2Params, Mamba2Carry]):
    """The state space layer of Mamba-2, with one decay for a head: `mamba2_step` as a cell.

        C = x w_C,  B = x w_B                                     for each of G heads
        v = x w_v,  Δ = softplus(x w_step + b_step)               for each of `heads`
        S' = exp(−exp(log_decay) Δ) S + B (Δ v)ᵀ
        y = S'ᵀ C + d v,  all heads side by side

    It is the recurrence alone, without the convolution before it and the gate after it.

    Args:
      input_size: The number of input features, D.
      heads: The number of heads.
      key_size: The number of states, K, of each feature of a head.
      value_size: The number of features of a head, V; y has heads · V.
      key_heads: The number G of heads of B and C, a divisor of `heads`, each for several of v.
      project: Whether x is multiplied by w_x. If not, x already holds C, B, v and Δ side by side, as in a block that
        convolves them before, and `input_size` is their number.
      step_min: The smallest Δ that is drawn; its logarithm is drawn uniformly.
      step_max: The largest Δ that is drawn.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.Mamba2(8, heads=2, key_size=4, value_size=6)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))
      >>> carry.s.shape, ys.shape
      ((2, 4, 6), (7, 12))

    References:
      Dao & Gu 2024, Transformers are SSMs, arXiv 2405.21060.
    """

    slow_weights = ("log_decay", "b_step", "d")

    input_size: int
    heads: int
    key_size: int
    value_size: int
    key_heads: int = 1
    project: bool = True
    step_min: float = 1e-3
    step_max: float = 1e-1

    def __post_init__(self):
        check.sizes(self, "input_size", "heads", "key_size", "value_size", "key_heads")
        check.steps(self)
        if self.heads % self.key_heads:
            raise ValueError(f"Mamba2.key_heads: expected a divisor of heads, {self.heads}, got {self.key_heads}")

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> Mamba2Params:
        return mamba2_init(
            key,
            self.input_size,
            self.heads,
            self.key_size,
            self.value_size,
            key_heads=self.key_heads,
            project=self.project,
            step_min=self.step_min,
            step_max=self.step_max,
            dtype=dtype,
        )

    def initial_carry(self, params: Mamba2Params, batch_shape: tuple[int, ...] = ()) -> Mamba2Carry:
        return Mamba2Carry(self.zeros(params, batch_shape))

    def gates(self, params: Mamba2Params, carry: Mamba2Carry, x: Array, noise: Noise = None) -> Mamba2Gates:
        """The length of one step and the share that it keeps."""
        check.params(self, params)
        step, log_decay = _gates(params, projected(params, x)[..., -self.heads :])
        return Mamba2Gates(step, jnp.exp(log_decay))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return mamba2_step(params, carry, x, noise, key_heads=self.key_heads)

    def inputs(self, params, x):
        return _inputs(params, x, (self.heads, self.key_size, self.value_size), self.key_heads)

    def output(self, params, ys, inputs):
        return _output(params, ys, inputs)


def mamba2_init(
    key: Array,
    input_size: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    key_heads: int = 1,
    project: bool = True,
    step_min: float = 1e-3,
    step_max: float = 1e-1,
    dtype: DTypeLike = jnp.float32,
) -> Mamba2Params:
    """Draws the parameters of `mamba2_step`: w_x is LeCun normal; b_step is such that Δ without input is log-uniform;
    exp(log_decay) is uniform from 1 to 16; d is one.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.mamba2_init(jax.random.key(0), 8, 2, 4, 6).w_x.shape
      (8, 22)
    """
    wide = accumulator(dtype)
    k_x, k_step, k_decay = jax.random.split(key, 3)
    columns = 2 * key_heads * key_size + heads * (value_size + 1)
    params = Mamba2Params(
        w_x=lecun_normal(k_x, input_size, columns, 1, wide) if project else None,
        b_step=draw_step_bias(k_step, heads, step_min, step_max, wide),
        log_decay=jnp.log(jax.random.uniform(k_decay, (heads,), wide, 1.0, 16.0)),
        d=jnp.ones(heads, wide),
    )
    return jax.tree.map(lambda each: each.astype(dtype), params)


def mamba2_step(
    params: Mamba2Params, carry: Mamba2Carry, x: Array, noise: Noise = None, *, key_heads: int = 1
) -> tuple[Mamba2Carry, Array]:
    """One step of the state space layer of Mamba-2.

        S' = exp(−exp(log_decay) Δ) S + B (Δ v)ᵀ,  y = S'ᵀ C + d v

    Args:
      params: `Mamba2Params` with w_x (D, 2 G K + heads (V + 1)) or None, b_step, log_decay and d (heads,).
      carry: `Mamba2Carry(s)` with s (..., heads, K, V).
      x: The input of one step, of shape (..., D).
      noise: Always None.
      key_heads: G, as in `Mamba2`.

    Returns:
      The new carry, and the output of shape (..., heads · V).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.mamba2_init(jax.random.key(0), 8, 2, 4, 6)
      >>> carry, y = jaxrnn.mamba2_step(params, jaxrnn.Mamba2Carry(jnp.zeros((2, 4, 6))), jnp.ones(8))
      >>> y.shape
      (12,)
    """
    check.kind(params, Mamba2Params)
    size = x.shape[-1] if params.w_x is None else params.w_x.shape[0]
    sizes, project = carry.s.shape[-3:], params.w_x is not None
    check.drawn(params, mamba2_init, size, *sizes, key_heads=key_heads, project=project)
    return matrix_step(params, carry, x, functools.partial(_inputs, sizes=sizes, key_heads=key_heads), output=_output)


def _gates(params, step):
    """Δ and the logarithm of a."""
    step = jax.nn.softplus(step + lifted(params.b_step.astype(step.dtype), step))
    return step, -lifted(jnp.exp(params.log_decay.astype(step.dtype)), step) * step


def _inputs(params, x, sizes, key_heads) -> MatrixInputs:
    heads, key_size, value_size = sizes
    keys = key_heads * key_size
    c, b, v, step = pieces(projected(params, x), keys, keys, heads * value_size, heads)
    c, b, v = by_head(c, key_heads), by_head(b, key_heads), by_head(v, heads)
    step, log_decay = _gates(params, step)
    return MatrixInputs(c, b, step[..., None] * v, log_decay, aside=v)


def _output(params, ys, inputs):
    d = params.d.astype(ys.dtype)[:, None]
    return side_by_side(params, ys + lifted(d, ys) * inputs.aside.astype(ys.dtype), inputs)
