"""The minimal LSTM, whose gates do not see the state."""

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


class MinLSTMParams(NamedTuple):
    """w_x (D, 3H): input weights; b (3H,): bias, or None; gates f and i, then candidate n."""

    w_x: Array
    b: Array | None


class MinLSTMCarry(NamedTuple):
    """h (..., H): the hidden state."""

    h: Array


class MinLSTMGates(NamedTuple):
    """The activated gates f and i, which sum to 1, and the candidate n, each (..., H)."""

    f: Array
    i: Array
    n: Array


class MinLSTM(LinearCell[MinLSTMParams, MinLSTMCarry]):
    """The minimal LSTM: `min_lstm_step` as a cell.

        f, i = σ(x w_xf + b_f), σ(x w_xi + b_i)
        n = g(x w_xn + b_n),  g(v) = v + 1/2 for v ≥ 0, else σ(v)
        h' = (f h + i n) / (f + i),  y = h'

    Args:
      input_size: The number of input features, D.
      hidden_size: The number of hidden units, H.
      positive: Whether g keeps the candidate positive, and with it the state; if not, g(v) = v.
      log_space: Whether a sequence is computed with the logarithms of gates and candidates, which never leave the range
        of floats, as in the paper's experiments. Real space is faster; over 10,000 steps in float32 both are within
        4e-7 of max |h|.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.MinLSTM(3, 16)
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

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> MinLSTMParams:
        return min_lstm_init(key, self.input_size, self.hidden_size, dtype=dtype)

    def initial_carry(self, params: MinLSTMParams, batch_shape: tuple[int, ...] = ()) -> MinLSTMCarry:
        return MinLSTMCarry(self.zeros(params, batch_shape, self.hidden_size))

    def gates(self, params: MinLSTMParams, carry: MinLSTMCarry, x: Array, noise: Noise = None) -> MinLSTMGates:
        """The activated gates, each divided by the sum of both, and the candidate of one step."""
        check.params(self, params)
        return _gates(params, x, self.positive)

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return min_lstm_step(params, carry, x, noise, positive=self.positive)

    @property
    def unit(self):
        return UNITS[self.positive, self.log_space]

    def unit_weights(self, params):
        return UnitWeights(params.w_x[None], params.b)

    def coefficients(self, params, x):
        return _coefficients(params, x, self.positive)

    def log_coefficients(self, params, x):
        return _logs(affine(params, x))


def min_lstm_init(key: Array, input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32) -> MinLSTMParams:
    """Draws the parameters of `min_lstm_step`: w_x is LeCun normal, and b is zero except for f, where it is 1.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.min_lstm_init(jax.random.key(0), 3, 16).w_x.shape
      (3, 48)
    """
    w_x = lecun_normal(key, input_size, hidden_size, 3, dtype)
    return MinLSTMParams(w_x, jnp.zeros(3 * hidden_size, dtype).at[:hidden_size].set(1))


def min_lstm_step(
    params: MinLSTMParams, carry: MinLSTMCarry, x: Array, noise: Noise = None, *, positive: bool = True
) -> tuple[MinLSTMCarry, Array]:
    """One step of a minimal LSTM.

        f, i = σ(x w_xf + b_f), σ(x w_xi + b_i)
        n = g(x w_xn + b_n)
        h' = (f h + i n) / (f + i)

    Args:
      params: `MinLSTMParams` with w_x (D, 3H), b (3H,) or None.
      carry: `MinLSTMCarry(h)` with h (..., H).
      x: The input of one step, of shape (..., D).
      noise: Always None.
      positive: As in `MinLSTM`.

    Returns:
      The new carry, and the output h' of shape (..., H).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.min_lstm_init(jax.random.key(0), 3, 16)
      >>> carry, y = jaxrnn.min_lstm_step(params, jaxrnn.MinLSTMCarry(jnp.zeros(16)), jnp.ones(3))
      >>> y.shape
      (16,)
    """
    check.kind(params, MinLSTMParams)
    check.drawn(params, min_lstm_init, params.w_x.shape[0], params.w_x.shape[1] // 3)
    return linear_step(params, carry, x, functools.partial(_coefficients, positive=positive))


def _log_odds(f, i):
    """Computes log(σ(f) / σ(i)) without the quotient; its σ is σ(f) / (σ(f) + σ(i))."""
    return jax.nn.log_sigmoid(f) - jax.nn.log_sigmoid(i)


def _activated(u, positive) -> MinLSTMGates:
    f, i, n = jnp.split(u, 3, axis=-1)
    odds = _log_odds(f, i)
    return MinLSTMGates(jax.nn.sigmoid(odds), jax.nn.sigmoid(-odds), candidate(n) if positive else n)


def _gates(params, x, positive) -> MinLSTMGates:
    return _activated(affine(params, x), positive)


def _mixed(f, i, n):
    return f, i * n


def _coefficients(params, x, positive):
    return _mixed(*_gates(params, x, positive))


def _logs(u):
    f, i, n = jnp.split(u, 3, axis=-1)
    odds = _log_odds(f, i)
    return jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(-odds) + log_candidate(n)


def _unit_gates(u, *_):
    return _mixed(*_activated(u, True))


UNITS = {
    (True, False): Unit("min_lstm", _unit_gates),
    (True, True): Unit("min_lstm logs", _unit_gates, logs=_logs),
    (False, False): Unit("min_lstm signed", lambda u, *_: _mixed(*_activated(u, False))),
}  # by positive and log_space
