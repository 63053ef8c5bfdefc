"""The quasi-recurrent network: gates from a causal convolution, and a pooling that remembers."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.linear import LinearCell, affine, linear_step
from jaxrnn.engines.elementwise.engine import UnitWeights
from jaxrnn.engines.elementwise.programs import Unit
from jaxrnn.typing import DTypeLike, Noise


class QRNNParams(NamedTuple):
    """w_x (K D, 3H): input weights, those of the oldest of K inputs first; b (3H,): bias, or None; candidate z, then
    gates f and o.
    """

    w_x: Array
    b: Array | None


class QRNNCarry(NamedTuple):
    """h (..., H): the hidden state, called c in the paper; window (..., K−1, D): the last inputs, the oldest first."""

    h: Array
    window: Array


class QRNN(LinearCell[QRNNParams, QRNNCarry]):
    """The quasi-recurrent network with fo-pooling: `qrnn_step` as a cell.

        X = [x_{t−K+1}, …, x_t]          the last K valid inputs since the sequence began, 0 before that
        z, f, o = tanh(X w_z + b_z), σ(X w_f + b_f), σ(X w_o + b_o)
        h' = f h + (1 − f) z,  y = o h'

    Args:
      input_size: The number of input features, D.
      hidden_size: The number of hidden units, H.
      window: The number of inputs in the window, K.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.QRNN(3, 16)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 3)))
      >>> carry.window.shape, ys.shape
      ((1, 3), (7, 16))

    References:
      Bradbury et al. 2016, Quasi-recurrent neural networks, arXiv 1611.01576.
    """

    sees_window = True

    input_size: int
    hidden_size: int
    window: int = 2

    def __post_init__(self):
        check.sizes(self, "input_size", "hidden_size", "window")

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> QRNNParams:
        return qrnn_init(key, self.input_size, self.hidden_size, window=self.window, dtype=dtype)

    def initial_carry(self, params: QRNNParams, batch_shape: tuple[int, ...] = ()) -> QRNNCarry:
        window = self.zeros(params, (*batch_shape, self.window - 1), self.input_size)
        return QRNNCarry(self.zeros(params, batch_shape, self.hidden_size), window)

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return qrnn_step(params, carry, x, noise)

    @property
    def unit(self):
        return UNIT

    def unit_weights(self, params):
        return UnitWeights(params.w_x[None], params.b)

    def coefficients(self, params, x):
        return _coefficients(params, x)

    def output(self, params, h, x):
        return _output(params, h, x)


def qrnn_init(
    key: Array, input_size: int, hidden_size: int, *, window: int = 2, dtype: DTypeLike = jnp.float32
) -> QRNNParams:
    """Draws the parameters of `qrnn_step`: w_x is LeCun normal, and b is zero.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.qrnn_init(jax.random.key(0), 3, 16).w_x.shape
      (6, 48)
    """
    w_x = lecun_normal(key, window * input_size, hidden_size, 3, dtype)
    return QRNNParams(w_x, jnp.zeros(3 * hidden_size, dtype))


def qrnn_step(params: QRNNParams, carry: QRNNCarry, x: Array, noise: Noise = None) -> tuple[QRNNCarry, Array]:
    """One step of a quasi-recurrent network.

        z, f, o = tanh(X w_z + b_z), σ(X w_f + b_f), σ(X w_o + b_o),  X the last K inputs
        h' = f h + (1 − f) z,  y = o h'

    Args:
      params: `QRNNParams` with w_x (K D, 3H), b (3H,) or None.
      carry: `QRNNCarry(h, window)` with h (..., H) and window (..., K−1, D).
      x: The input of one step, of shape (..., D).
      noise: Always None.

    Returns:
      The new carry, and the output of shape (..., H).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.qrnn_init(jax.random.key(0), 3, 16)
      >>> carry, y = jaxrnn.qrnn_step(params, jaxrnn.QRNNCarry(jnp.zeros(16), jnp.zeros((1, 3))), jnp.ones(3))
      >>> y.shape
      (16,)
    """
    check.kind(params, QRNNParams)
    before, size = carry.window.shape[-2:]
    check.drawn(params, qrnn_init, size, params.w_x.shape[1] // 3, window=before + 1)
    return linear_step(params, carry, x, _coefficients, output=_output, sees_window=True)


def _mixed(u, *_):
    z, f, _ = jnp.split(u, 3, axis=-1)
    z, f = jnp.tanh(z), jax.nn.sigmoid(f)
    return f, (1 - f) * z


def _read(u, _, h):
    o = jax.nn.sigmoid(jnp.split(u, 3, axis=-1)[2])
    return o * h.astype(o.dtype)


def _coefficients(params, x):
    return _mixed(affine(params, x))


def _output(params, h, x):
    return _read(affine(params, x), x, h)


UNIT = Unit("qrnn", _mixed, _read)
