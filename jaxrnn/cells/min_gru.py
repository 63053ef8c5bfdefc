"""The minimal gated recurrent unit, whose gates do not see the state."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.linear import LinearCell, affine, candidate, check_log_space, linear_step, log_candidate
from jaxrnn.engines.elementwise.engine import UnitWeights
from jaxrnn.engines.elementwise.programs import Unit
from jaxrnn.typing import DTypeLike, Noise


class MinGRUParams(NamedTuple):
    """w_x (D, 2H): input weights; b (2H,): bias, or None; update gate z, then candidate n."""

    w_x: Array
    b: Array | None


class MinGRUCarry(NamedTuple):
    """h (..., H): the hidden state."""

    h: Array


class MinGRUGates(NamedTuple):
    """The activated gate z and the candidate n, each (..., H)."""

    z: Array
    n: Array


class MinGRU(LinearCell[MinGRUParams, MinGRUCarry]):
    """The minimal gated recurrent unit: `min_gru_step` as a cell.

        z = σ(x w_xz + b_z)
        n = g(x w_xn + b_n),  g(v) = v + 1/2 for v ≥ 0, else σ(v)
        h' = (1 − z) h + z n,  y = h'

    A step needs only h' from the step before, so a sequence trains in parallel over time.

    Args:
      input_size: The number of input features, D.
      hidden_size: The number of hidden units, H.
      positive: Whether g keeps the candidate positive, and with it the state; if not, g(v) = v.
      log_space: Whether a sequence is computed with the logarithms of gates and candidates, which never leave the range
        of floats, as in the paper's experiments. Real space is faster; over 10,000 steps in float32 both are within
        4e-7 of max |h|.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.MinGRU(3, 16)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 3)))
      >>> ys.shape
      (7, 16)

    References:
      Feng et al. 2024, Were RNNs all we needed?, arXiv 2410.01201.
    """

    input_size: int
    hidden_size: int
    positive: bool = True
    log_space: bool = False

    def __post_init__(self):
        check.sizes(self, "input_size", "hidden_size")
        check_log_space(self)

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> MinGRUParams:
        return min_gru_init(key, self.input_size, self.hidden_size, dtype=dtype)

    def initial_carry(self, params: MinGRUParams, batch_shape: tuple[int, ...] = ()) -> MinGRUCarry:
        return MinGRUCarry(self.zeros(params, batch_shape, self.hidden_size))

    def gates(self, params: MinGRUParams, carry: MinGRUCarry, x: Array, noise: Noise = None) -> MinGRUGates:
        """The activated gate and the candidate of one step."""
        check.params(self, params)
        return _gates(params, x, self.positive)

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return min_gru_step(params, carry, x, noise, positive=self.positive)

    @property
    def unit(self):
        return UNITS[self.positive, self.log_space]

    def unit_weights(self, params):
        return UnitWeights(params.w_x[None], params.b)

    def coefficients(self, params, x):
        return _coefficients(params, x, self.positive)

    def log_coefficients(self, params, x):
        return _logs(affine(params, x))


def min_gru_init(key: Array, input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32) -> MinGRUParams:
    """Draws the parameters of `min_gru_step`: w_x is LeCun normal, and b is zero.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.min_gru_init(jax.random.key(0), 3, 16).w_x.shape
      (3, 32)
    """
    w_x = lecun_normal(key, input_size, hidden_size, 2, dtype)
    return MinGRUParams(w_x, jnp.zeros(2 * hidden_size, dtype))


def min_gru_step(
    params: MinGRUParams, carry: MinGRUCarry, x: Array, noise: Noise = None, *, positive: bool = True
) -> tuple[MinGRUCarry, Array]:
    """One step of a minimal gated recurrent unit.

        z = σ(x w_xz + b_z)
        n = g(x w_xn + b_n)
        h' = (1 − z) h + z n

    Args:
      params: `MinGRUParams` with w_x (D, 2H), b (2H,) or None.
      carry: `MinGRUCarry(h)` with h (..., H).
      x: The input of one step, of shape (..., D).
      noise: Always None.
      positive: As in `MinGRU`.

    Returns:
      The new carry, and the output h' of shape (..., H).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.min_gru_init(jax.random.key(0), 3, 16)
      >>> carry, y = jaxrnn.min_gru_step(params, jaxrnn.MinGRUCarry(jnp.zeros(16)), jnp.ones(3))
      >>> y.shape
      (16,)
    """
    check.kind(params, MinGRUParams)
    check.drawn(params, min_gru_init, params.w_x.shape[0], params.w_x.shape[1] // 2)
    return linear_step(params, carry, x, functools.partial(_coefficients, positive=positive))


def _activated(u, positive) -> MinGRUGates:
    z, n = jnp.split(u, 2, axis=-1)
    return MinGRUGates(jax.nn.sigmoid(z), candidate(n) if positive else n)


def _gates(params, x, positive) -> MinGRUGates:
    return _activated(affine(params, x), positive)


def _mixed(z, n):
    return 1 - z, z * n


def _coefficients(params, x, positive):
    return _mixed(*_gates(params, x, positive))


def _logs(u):
    z, n = jnp.split(u, 2, axis=-1)
    return -jax.nn.softplus(z), log_candidate(n) - jax.nn.softplus(-z)


def _unit_gates(u, *_):
    return _mixed(*_activated(u, True))


UNITS = {
    (True, False): Unit("min_gru", _unit_gates),
    (True, True): Unit("min_gru logs", _unit_gates, logs=_logs),
    (False, False): Unit("min_gru signed", lambda u, *_: _mixed(*_activated(u, False))),
}  # by positive and log_space
