"""The minimal LSTM, whose gates do not see the state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.linear import LinearCell, affine, candidate, check_log_space, log_candidate


class MinLSTMParams(NamedTuple):
    """w_x (D, 3H), b (3H,) or None: the gates f and i and the candidate n."""

    w_x: Array
    b: Array | None


class MinLSTMCarry(NamedTuple):
    """h (..., H)."""

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
      input_size: D.
      hidden_size: H.
      positive: Whether g keeps the candidate, and with it the state, positive; else g(v) = v.
      log_space: Whether a sequence runs on logarithms of gates and candidates, as in the paper's experiments, which
        never leave the range of floats. Real space is faster and has kernels; over 10,000 steps in float32 both are
        within 3e-7 of max |h|.

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

    def init(self, key: Array, dtype: Any = jnp.float32) -> MinLSTMParams:
        return min_lstm_init(key, self.input_size, self.hidden_size, dtype=dtype)

    def initial_carry(self, params: MinLSTMParams, batch_shape: tuple[int, ...] = ()) -> MinLSTMCarry:
        return MinLSTMCarry(self.zeros(params, batch_shape, self.hidden_size))

    def gates(self, params: MinLSTMParams, carry: MinLSTMCarry, x: Array, noise: Any = None) -> MinLSTMGates:
        """The activated gates, each divided by the sum of both, and the candidate of one step."""
        check.params(self, params)
        return self._gates(params, x)

    def coefficients(self, params, x):
        f, i, n = self._gates(params, x)
        return f, i * n

    def log_coefficients(self, params, x):
        f, i, n = jnp.split(affine(params, x), 3, axis=-1)
        odds = jax.nn.log_sigmoid(f) - jax.nn.log_sigmoid(i)
        return jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(-odds) + log_candidate(n)

    def _gates(self, params, x):
        f, i, n = jnp.split(affine(params, x), 3, axis=-1)
        odds = jax.nn.log_sigmoid(f) - jax.nn.log_sigmoid(i)  # of f against i, without their quotient
        return MinLSTMGates(jax.nn.sigmoid(odds), jax.nn.sigmoid(-odds), candidate(n) if self.positive else n)


def min_lstm_init(key: Array, input_size: int, hidden_size: int, *, dtype: Any = jnp.float32) -> MinLSTMParams:
    """Parameters of `min_lstm_step`: w_x LeCun normal, b zero but for f, where it is 1.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.min_lstm_init(jax.random.key(0), 3, 16).w_x.shape
      (3, 48)
    """
    w_x = lecun_normal(key, input_size, hidden_size, 3, dtype)
    return MinLSTMParams(w_x, jnp.zeros(3 * hidden_size, dtype).at[:hidden_size].set(1))


def min_lstm_step(
    params: MinLSTMParams, carry: MinLSTMCarry, x: Array, noise: Any = None, *, positive: bool = True
) -> tuple[MinLSTMCarry, Array]:
    """One step of a minimal LSTM.

        f, i = σ(x w_xf + b_f), σ(x w_xi + b_i)
        n = g(x w_xn + b_n)
        h' = (f h + i n) / (f + i)

    Args:
      params: `MinLSTMParams` with w_x (D, 3H), b (3H,) or None.
      carry: `MinLSTMCarry(h)`, (..., H).
      x: Input, (..., D).
      noise: None.
      positive: As of `MinLSTM`.

    Returns:
      The new carry, and the output h', (..., H).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If params are of another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.min_lstm_init(jax.random.key(0), 3, 16)
      >>> carry, y = jaxrnn.min_lstm_step(params, jaxrnn.MinLSTMCarry(jnp.zeros(16)), jnp.ones(3))
      >>> y.shape
      (16,)
    """
    rows, columns = params.w_x.shape
    return MinLSTM(rows, columns // 3, positive).step(params, carry, x, noise)
