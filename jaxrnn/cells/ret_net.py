"""Retention."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.matrix import MatrixCell, MatrixInputs, matrix_step, nothing_more, queries
from jaxrnn.engines.arrays import lifted
from jaxrnn.engines.product import dot
from jaxrnn.engines.sequence_parallel import part, states
from jaxrnn.typing import DTypeLike, Noise


class RetNetParams(NamedTuple):
    """w_x (D, heads (2K + V)): input weights; columns of q, of k and of v, head by head."""

    w_x: Array


class RetNetCarry(NamedTuple):
    """s (..., heads, K, V): the state. position (...): the number of steps so far; None without `rotary`."""

    s: Array
    position: Array | None


class RetNet(MatrixCell[RetNetParams, RetNetCarry]):
    """Retention, a linear memory whose heads forget at rates of their own: `ret_net_step` as a cell.

        q = R_t x w_q / √K,  k = R_t x w_k,  v = x w_v                               for each head
        S' = (1 − 2^(−5−h)) S + k vᵀ                                                 in head h = 0, 1, …
        y = S'ᵀ q,  all heads side by side

    R_t turns the pair of the features i and i + K/2 by the angle t / 10000^(2i/K), so that a product of a query and a
    key depends on the distance of their steps.

    Args:
      input_size: The number of input features, D.
      heads: The number of heads.
      key_size: The size of the keys of a head, K, even with `rotary`.
      value_size: The size of the values of a head, V; y has heads · V features.
      rotary: Whether queries and keys are turned.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.RetNet(8, heads=2, key_size=4, value_size=6)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))
      >>> carry.s.shape, float(carry.position), ys.shape
      ((2, 4, 6), 7.0, (7, 12))

    References:
      Sun et al. 2023, Retentive network, arXiv 2307.08621; rotations: Su et al. 2021, arXiv 2104.09864.
    """

    input_size: int
    heads: int
    key_size: int
    value_size: int
    rotary: bool = True

    def __post_init__(self):
        check.sizes(self, "input_size", "heads", "key_size", "value_size")
        if self.rotary and self.key_size % 2:
            raise ValueError(f"RetNet.key_size: expected an even number with rotary, got {self.key_size}")

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> RetNetParams:
        return ret_net_init(key, self.input_size, self.heads, self.key_size, self.value_size, dtype=dtype)

    def initial_carry(self, params: RetNetParams, batch_shape: tuple[int, ...] = ()) -> RetNetCarry:
        s = self.zeros(params, batch_shape)
        return RetNetCarry(s, jnp.zeros(batch_shape, s.dtype) if self.rotary else None)

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return ret_net_step(params, carry, x, noise)

    def inputs(self, params, x):
        return _inputs(params, x, self.heads, self.key_size)

    def follow(self, inputs, carry, fresh, flags, reverse):
        return (_turned if self.rotary else nothing_more)(inputs, carry, fresh, flags, reverse)

    def follow_divided(self, inputs, carry, fresh, walk):
        if not self.rotary:
            return carry, carry
        alone = carry._replace(position=jnp.zeros_like(carry.position))
        steps = part(walk, (), self.follow(inputs, alone, fresh, walk.flags, walk.reverse)[1].position)
        found = states(steps, carry.position, lambda _, steps, position: position + steps, walk, fresh.position)
        before, after = (carry._replace(position=each) for each in found)
        return before, after


def ret_net_init(
    key: Array, input_size: int, heads: int, key_size: int, value_size: int, *, dtype: DTypeLike = jnp.float32
) -> RetNetParams:
    """Draws the parameters of `ret_net_step`: w_x is LeCun normal.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.ret_net_init(jax.random.key(0), 8, 2, 4, 6).w_x.shape
      (8, 28)
    """
    return RetNetParams(lecun_normal(key, input_size, heads * (2 * key_size + value_size), 1, dtype))


def ret_net_step(params: RetNetParams, carry: RetNetCarry, x: Array, noise: Noise = None) -> tuple[RetNetCarry, Array]:
    """One step of retention.

        S' = (1 − 2^(−5−h)) S + k vᵀ,  y = S'ᵀ q

    Args:
      params: `RetNetParams` with w_x (D, heads (2K + V)).
      carry: `RetNetCarry(s, position)` with s (..., heads, K, V), and position (...), or None for no rotation.
      x: The input of one step, of shape (..., D).
      noise: Always None.

    Returns:
      The new carry, and the output of shape (..., heads · V).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.ret_net_init(jax.random.key(0), 8, 2, 4, 6)
      >>> carry = jaxrnn.RetNetCarry(jnp.zeros((2, 4, 6)), jnp.zeros(()))
      >>> jaxrnn.ret_net_step(params, carry, jnp.ones(8))[1].shape
      (12,)
    """
    check.kind(params, RetNetParams)
    check.drawn(params, ret_net_init, params.w_x.shape[0], *carry.s.shape[-3:])
    heads, key_size = carry.s.shape[-3:-1]
    inputs = functools.partial(_inputs, heads=heads, key_size=key_size)
    return matrix_step(params, carry, x, inputs, follow=nothing_more if carry.position is None else _turned)


def _inputs(params, x, heads, key_size) -> MatrixInputs:
    q, k, v = queries(dot(x, params.w_x), heads, key_size)
    log_decay = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(heads, dtype=v.dtype))))
    return MatrixInputs(q * key_size**-0.5, k, v, jnp.broadcast_to(log_decay, v.shape[:-1]))


def _turned(inputs, carry, fresh, flags, reverse):
    positions = _positions(inputs.v.shape[:-2], carry.position, fresh.position, flags, reverse)
    half = inputs.q.shape[-1] // 2
    angle = positions[..., None, None].astype(inputs.q.dtype) * 10000.0 ** (
        -jnp.arange(half, dtype=inputs.q.dtype) / half
    ).reshape((1,) * (positions.ndim + 1) + (half,))
    cos, sin = jnp.cos(angle), jnp.sin(angle)

    def turn(x):
        first, second = x[..., :half], x[..., half:]
        return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)

    after = positions + 1 if flags.valid is None else positions + _over(flags.valid, positions)
    last = after[0 if reverse else -1].astype(carry.position.dtype) if after.shape[0] != 0 else carry.position
    return inputs._replace(q=turn(inputs.q), k=turn(inputs.k)), carry._replace(position=last)


def _over(flag, like):
    """A flag over leading axes of `like`, as numbers."""
    return jnp.broadcast_to(flag.reshape(flag.shape + (1,) * (like.ndim - flag.ndim)), like.shape).astype(like.dtype)


def _positions(shape, position, fresh, flags, reverse):
    """The number of steps before each, (T, *batch)."""

    def ordered(each):
        return jnp.flip(each, 0) if reverse else each

    ones = jnp.ones(shape, position.dtype)
    counted = ordered(ones if flags.valid is None else _over(flags.valid, ones))
    count = jnp.cumsum(counted, axis=0) - counted
    position = lifted(position, count)
    if flags.start is None:
        return ordered(count + position)
    start = ordered(_over(flags.start, ones)) > 0
    begun = jax.lax.cummax(jnp.where(start, count, -1), axis=0)  # the count where the sequence at hand began
    return ordered(jnp.where(begun < 0, count + position, count - begun + lifted(fresh, count)))
