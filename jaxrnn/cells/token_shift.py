"""The shift of tokens: each channel between its input and the one before."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cell import Cell
from jaxrnn.cells.window import window_states, windows
from jaxrnn.engines.arrays import accumulator, compute_dtype, lifted, zero_where_not
from jaxrnn.engines.loop import in_chunks
from jaxrnn.typing import DTypeLike, Noise


class TokenShiftParams(NamedTuple):
    """mu (D,): the share of the input before."""

    mu: Array


class TokenShiftCarry(NamedTuple):
    """x (..., D): the last input."""

    x: Array


class TokenShift(Cell[TokenShiftParams, TokenShiftCarry]):
    """The shift of tokens of RWKV, each channel between its input and the one before: `token_shift_step` as a cell.

        y_t = x_t + μ (x_{t−1} − x_t)

    The input before the first one of a sequence is 0.

    Args:
      input_size: The number of input features, D; y has the same number.
      power: Where the init begins: μ = 1 − (i/D)^power for the channels i from 0 to D − 1.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.TokenShift(2)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.array([[1.0, 1.0], [3.0, 3.0]]))
      >>> ys
      Array([[0. , 0.5],
             [1. , 2. ]], dtype=float32)

    References:
      Peng et al. 2023, RWKV, arXiv 2305.13048, section 3.1.1.
    """

    time_divides = True

    input_size: int
    power: float = 1.0

    def __post_init__(self):
        check.sizes(self, "input_size")
        check.fields(self, power=check.positive)

    @property
    def output_size(self) -> int:
        return self.input_size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> TokenShiftParams:
        return token_shift_init(key, self.input_size, power=self.power, dtype=dtype)

    def initial_carry(self, params: TokenShiftParams, batch_shape: tuple[int, ...] = ()) -> TokenShiftCarry:
        check.params(self, params)
        return TokenShiftCarry(jnp.zeros((*batch_shape, self.input_size), params.mu.dtype))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return token_shift_step(params, carry, x, noise)

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        check.params(self, params)
        xs = xs.astype(compute_dtype(xs, params))
        if walk.axis_name is not None:
            before, after = window_states(carry.x[..., None, :], fresh.x[..., None, :], xs, walk)
            walk = walk.replace(axis_name=None)
            _, ys = self.scan(params, TokenShiftCarry(before[..., 0, :]), xs, fresh=fresh, noise=noise, walk=walk)
            return TokenShiftCarry(after[..., 0, :]), ys

        def run(constant, carry, inputs):
            params, fresh = constant
            xs, flags = inputs
            window, first = carry.x[..., None, :], fresh.x[..., None, :]
            (before, _), window = windows(window, first, xs, flags, walk.reverse)
            return TokenShiftCarry(window[..., 0, :]), zero_where_not(flags.valid, _between(params, before, xs))

        return in_chunks(run, (params, fresh), carry, (xs, walk.flags), walk)


def _between(params, before, x):
    dtype = x.dtype
    before, x = (each.astype(accumulator(dtype)) for each in (before, x))
    mu = lifted(params.mu.astype(dtype).astype(x.dtype), x)
    return (x + mu * (before - x)).astype(dtype)


def token_shift_init(
    key: Array, input_size: int, *, power: float = 1.0, dtype: DTypeLike = jnp.float32
) -> TokenShiftParams:
    """Makes the parameters of `token_shift_step`: μ = 1 − (i/D)^power for the channels i from 0 to D − 1.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.token_shift_init(jax.random.key(0), 4).mu
      Array([1.  , 0.75, 0.5 , 0.25], dtype=float32)
    """
    channels = jnp.arange(input_size, dtype=accumulator(dtype)) / input_size
    return TokenShiftParams((1 - channels**power).astype(dtype))


def token_shift_step(
    params: TokenShiftParams, carry: TokenShiftCarry, x: Array, noise: Noise = None
) -> tuple[TokenShiftCarry, Array]:
    """One step of the shift of tokens.

        y_t = x_t + μ (x_{t−1} − x_t)

    Args:
      params: `TokenShiftParams` with mu (D,).
      carry: `TokenShiftCarry(x)` with x (..., D).
      x: The input of one step, of shape (..., D).
      noise: Always None.

    Returns:
      The new carry, and the output of shape (..., D).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.token_shift_init(jax.random.key(0), 3)
      >>> jaxrnn.token_shift_step(params, jaxrnn.TokenShiftCarry(jnp.zeros(3)), jnp.ones(3))[1].shape
      (3,)
    """
    check.kind(params, TokenShiftParams)
    if x.shape[-1:] != params.mu.shape:
        raise ValueError(f"x: expected (..., {params.mu.shape[0]}), got {x.shape}")
    x = x.astype(compute_dtype(x, params))
    return TokenShiftCarry(x.astype(carry.x.dtype)), _between(params, carry.x.astype(x.dtype), x)
