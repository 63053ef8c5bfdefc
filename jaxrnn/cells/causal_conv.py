"""A depthwise causal convolution over time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cell import Cell
from jaxrnn.cells.window import step_window, window_states, windows
from jaxrnn.engines.arrays import accumulator, cast, compute_dtype, lifted, zero_where_not
from jaxrnn.engines.loop import in_chunks
from jaxrnn.typing import DTypeLike, Noise


class CausalConvParams(NamedTuple):
    """w (K, D): weights, with the one of the oldest input first; b (D,): bias, or None."""

    w: Array
    b: Array | None


class CausalConvCarry(NamedTuple):
    """window (..., K−1, D): the last inputs, the oldest first."""

    window: Array


class CausalConv(Cell[CausalConvParams, CausalConvCarry]):
    """A depthwise causal convolution over time: `causal_conv_step` as a cell.

        y_t = b + Σ_k w[k] x_{t−(K−1)+k}

    The convolution reads the last K valid inputs since the sequence began, and 0 in place of those before it. So single
    steps, the parts of a sequence and the whole sequence give the same result.

    Args:
      input_size: The number of input features, D; y has the same number.
      window: The number of inputs that the convolution reads, K.
      bias: Whether there is a b.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.CausalConv(3, 4)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 3)))
      >>> carry.window.shape, ys.shape
      ((3, 3), (7, 3))

    References:
      In front of a recurrence: Gu & Dao 2023, Mamba, arXiv 2312.00752; De et al. 2024, Griffin, arXiv 2402.19427.
    """

    time_divides = True

    input_size: int
    window: int
    bias: bool = True

    def __post_init__(self):
        check.sizes(self, "input_size", "window")

    @property
    def output_size(self) -> int:
        return self.input_size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> CausalConvParams:
        return causal_conv_init(key, self.input_size, self.window, bias=self.bias, dtype=dtype)

    def initial_carry(self, params: CausalConvParams, batch_shape: tuple[int, ...] = ()) -> CausalConvCarry:
        check.params(self, params)
        return CausalConvCarry(jnp.zeros((*batch_shape, self.window - 1, self.input_size), params.w.dtype))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return causal_conv_step(params, carry, x, noise)

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        check.params(self, params)
        dtype = compute_dtype(xs, params)
        if walk.axis_name is not None:
            before, after = window_states(carry.window, fresh.window, xs.astype(dtype), walk)
            walk = walk.replace(axis_name=None)
            _, ys = self.scan(params, CausalConvCarry(before), xs, fresh=fresh, noise=noise, walk=walk)
            return CausalConvCarry(after), ys

        def run(constant, carry, inputs):
            params, fresh = constant
            xs, flags = inputs
            taps, window = windows(carry.window, fresh.window, xs.astype(dtype), flags, walk.reverse)
            return CausalConvCarry(window), zero_where_not(flags.valid, _weighted(cast(params, dtype), taps))

        return in_chunks(run, (params, fresh), carry, (xs, walk.flags), walk)


def _weighted(params, taps):
    wide = accumulator(taps[0].dtype)
    y = jnp.zeros(taps[0].shape, wide) if params.b is None else jnp.broadcast_to(params.b.astype(wide), taps[0].shape)
    for w, tap in zip(params.w, taps, strict=True):
        y = y + lifted(w.astype(wide), tap) * tap.astype(wide)
    return y.astype(taps[0].dtype)


def causal_conv_init(
    key: Array, input_size: int, window: int, *, bias: bool = True, dtype: DTypeLike = jnp.float32
) -> CausalConvParams:
    """Draws the parameters of `causal_conv_step`: w is normal with variance 1/K, and b is zero, or None.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.causal_conv_init(jax.random.key(0), 3, 4).w.shape
      (4, 3)
    """
    w = jax.random.normal(key, (window, input_size), accumulator(dtype)) / window**0.5
    return CausalConvParams(w.astype(dtype), jnp.zeros(input_size, dtype) if bias else None)


def causal_conv_step(
    params: CausalConvParams, carry: CausalConvCarry, x: Array, noise: Noise = None
) -> tuple[CausalConvCarry, Array]:
    """One step of a depthwise causal convolution.

        y_t = b + Σ_k w[k] x_{t−(K−1)+k}

    Args:
      params: `CausalConvParams` with w (K, D), b (D,) or None.
      carry: `CausalConvCarry(window)` with window (..., K−1, D), the oldest input first.
      x: The input of one step, of shape (..., D).
      noise: Always None.

    Returns:
      The new carry, and the output of shape (..., D).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.causal_conv_init(jax.random.key(0), 3, 4)
      >>> carry, y = jaxrnn.causal_conv_step(params, jaxrnn.CausalConvCarry(jnp.zeros((3, 3))), jnp.ones(3))
      >>> y.shape
      (3,)
    """
    check.kind(params, CausalConvParams)
    check.drawn(params, causal_conv_init, *params.w.shape[::-1])
    dtype = compute_dtype(x, params)
    taps, window = step_window(carry.window, x.astype(dtype))
    return CausalConvCarry(window), _weighted(cast(params, dtype), taps)
