"""The quasi-recurrent network: gates of a causal convolution, and a pooling that remembers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.linear import LinearCell, affine


class QRNNParams(NamedTuple):
    """w_x (K D, 3H), for the oldest of K inputs first, and b (3H,) or None: candidate z, gates f and o."""

    w_x: Array
    b: Array | None


class QRNNCarry(NamedTuple):
    """h (..., H): c of the paper. window (..., K−1, D): the last inputs, oldest first."""

    h: Array
    window: Array


class QRNN(LinearCell[QRNNParams, QRNNCarry]):
    """The quasi-recurrent network with fo-pooling: `qrnn_step` as a cell.

        X = [x_{t−K+1}, …, x_t]          the last K valid inputs since the sequence began, 0 before that
        z, f, o = tanh(X w_z + b_z), σ(X w_f + b_f), σ(X w_o + b_o)
        h' = f h + (1 − f) z,  y = o h'

    Args:
      input_size: D.
      hidden_size: H.
      window: K.

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

    def init(self, key: Array, dtype: Any = jnp.float32) -> QRNNParams:
        return qrnn_init(key, self.input_size, self.hidden_size, window=self.window, dtype=dtype)

    def initial_carry(self, params: QRNNParams, batch_shape: tuple[int, ...] = ()) -> QRNNCarry:
        window = self.zeros(params, (*batch_shape, self.window - 1), self.input_size)
        return QRNNCarry(self.zeros(params, batch_shape, self.hidden_size), window)

    def coefficients(self, params, x):
        z, f, _ = jnp.split(affine(params, x), 3, axis=-1)
        f = jax.nn.sigmoid(f)
        return f, (1 - f) * jnp.tanh(z)

    def output(self, params, h, x):
        o = jax.nn.sigmoid(affine(params, x)[..., 2 * self.hidden_size :])
        return o * h.astype(o.dtype)


def qrnn_init(
    key: Array, input_size: int, hidden_size: int, *, window: int = 2, dtype: Any = jnp.float32
) -> QRNNParams:
    """Parameters of `qrnn_step`: w_x LeCun normal, b zero.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.qrnn_init(jax.random.key(0), 3, 16).w_x.shape
      (6, 48)
    """
    w_x = lecun_normal(key, window * input_size, hidden_size, 3, dtype)
    return QRNNParams(w_x, jnp.zeros(3 * hidden_size, dtype))


def qrnn_step(params: QRNNParams, carry: QRNNCarry, x: Array, noise: Any = None) -> tuple[QRNNCarry, Array]:
    """One step of a quasi-recurrent network.

        z, f, o = tanh(X w_z + b_z), σ(X w_f + b_f), σ(X w_o + b_o),  X the last K inputs
        h' = f h + (1 − f) z,  y = o h'

    Args:
      params: `QRNNParams` with w_x (K D, 3H), b (3H,) or None.
      carry: `QRNNCarry(h, window)`, (..., H) and (..., K−1, D).
      x: Input, (..., D).
      noise: None.

    Returns:
      The new carry, and the output, (..., H).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If params are of another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.qrnn_init(jax.random.key(0), 3, 16)
      >>> carry, y = jaxrnn.qrnn_step(params, jaxrnn.QRNNCarry(jnp.zeros(16), jnp.zeros((1, 3))), jnp.ones(3))
      >>> y.shape
      (16,)
    """
    before, size = carry.window.shape[-2:]
    return QRNN(size, params.w_x.shape[1] // 3, before + 1).step(params, carry, x, noise)
