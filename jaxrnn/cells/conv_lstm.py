"""The convolutional LSTM, in one, two or three spatial dimensions."""

# What other cells are by a class variable, some here are by a property.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import check
from jaxrnn.cell import Cell
from jaxrnn.cells.activations import Activation, check_elementwise, elementwise
from jaxrnn.cells.gated import mask_of
from jaxrnn.cells.lstm import LSTMGates, LSTMRule, LSTMTheta, lstm_gates, lstm_update
from jaxrnn.engines.arrays import accumulator, cast, cast_like, compute_dtype
from jaxrnn.typing import DTypeLike, Noise


class ConvLSTMParams(NamedTuple):
    """w_x (*K, D, 4H): input kernel; w_h (*K, H, 4H): recurrent kernel; b (4H,): bias, or None. The gates are in the
    order i, f, g, o.
    """

    w_x: Array
    w_h: Array
    b: Array | None


class ConvLSTMCarry(NamedTuple):
    """h (..., *S', H): the hidden state; c (..., *S', H): the cell state."""

    h: Array
    c: Array


class ConvLSTM(Cell[ConvLSTMParams, ConvLSTMCarry]):
    """An LSTM whose products are convolutions (∗), over images, volumes or series of features: `conv_lstm_step`.

        i, f, g, o = split(x ∗ w_x + h ∗ w_h + b)
        c' = σ(f) c + σ(i) tanh(g)
        h' = σ(o) tanh(c'),  y = h'

    The channels are the last axis: x is (..., *S, D) and y (..., *S', H), where S' is the spatial shape after the input
    convolution. The recurrent convolution has stride 1 and keeps this shape.

    Args:
      spatial_shape: The spatial shape S of x: one to three sizes.
      input_channels: The number of input channels, D.
      hidden_size: The number of output channels, H.
      kernel_size: The kernel size K: a number, or one number for each spatial dimension.
      strides: The strides of the input convolution: a number, or one number for each dimension.
      dilation: The dilation of the input convolution: a number, or one number for each dimension.
      padding: The padding of the input convolution, "SAME" or "VALID".
      gate_activation: The activation of the gates i, f and o; see `jaxrnn.activation`.
      activation: The activation of the candidate g and of the cell state c'.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.ConvLSTM((8, 6), 3, 4, strides=2)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 5, 8, 6, 3)))
      >>> ys.shape
      (7, 5, 4, 3, 4)

    References:
      Shi et al. 2015, Convolutional LSTM network, arXiv 1506.04214.
    """

    spatial_shape: tuple[int, ...]
    input_channels: int
    hidden_size: int
    kernel_size: int | tuple[int, ...] = 3
    strides: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    padding: str = "SAME"
    gate_activation: Activation = "sigmoid"
    activation: Activation = "tanh"

    recurrent_state = "h"
    recurrent_weights = ("w_h",)

    def __post_init__(self):
        check.sizes(self, "input_channels", "hidden_size")
        if not isinstance(self.spatial_shape, tuple) or not 1 <= len(self.spatial_shape) <= 3:
            raise ValueError(f"ConvLSTM.spatial_shape: expected one to three sizes, got {self.spatial_shape!r}")
        if self.padding not in ("SAME", "VALID"):
            raise ValueError(f"ConvLSTM.padding: expected 'SAME' or 'VALID', got {self.padding!r}")
        for name in ("spatial_shape", "kernel_size", "strides", "dilation"):
            for size in self._each(name):
                check.integer(f"ConvLSTM.{name}", size)
        if min(self._state_shape) < 1:
            raise ValueError(
                f"ConvLSTM: spatial_shape {self.spatial_shape} is smaller than the kernel under padding 'VALID'"
            )
        check_elementwise(self.gate_activation, self.activation)

    def _each(self, name: str) -> tuple[int, ...]:
        return _for_each(f"ConvLSTM.{name}", getattr(self, name), len(self.spatial_shape))

    @property
    def _state_shape(self) -> tuple[int, ...]:
        def size(n, k, stride, dilation):
            return -(-n // stride) if self.padding == "SAME" else -(-(n - (k - 1) * dilation) // stride)

        names = ("spatial_shape", "kernel_size", "strides", "dilation")
        return tuple(map(size, *(self._each(name) for name in names)))

    @property
    def input_ndim(self) -> int:
        return len(self.spatial_shape) + 1

    @property
    def input_size(self) -> tuple[int, ...]:
        return (*self.spatial_shape, self.input_channels)

    @property
    def output_size(self) -> tuple[int, ...]:
        return (*self._state_shape, self.hidden_size)

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> ConvLSTMParams:
        return conv_lstm_init(key, self.input_channels, self.hidden_size, self._each("kernel_size"), dtype=dtype)

    def initial_carry(self, params: ConvLSTMParams, batch_shape: tuple[int, ...] = ()) -> ConvLSTMCarry:
        check.params(self, params)
        zeros = jnp.zeros((*batch_shape, *self.output_size), params.w_x.dtype)
        return ConvLSTMCarry(zeros, zeros)

    def gates(self, params: ConvLSTMParams, carry: ConvLSTMCarry, x: Array, noise: Noise = None) -> LSTMGates:
        """The activated gates of one step."""
        self._check(params, x)
        products = _products(params, carry, x, noise, self._each("strides"), self._each("dilation"), self.padding)
        return lstm_gates(_rule(self.gate_activation, self.activation), *products)[0]

    def step(self, params, carry, x, noise=None):
        self._check(params, x)
        return conv_lstm_step(
            params,
            carry,
            x,
            noise,
            strides=self.strides,
            dilation=self.dilation,
            padding=self.padding,
            gate_activation=self.gate_activation,
            activation=self.activation,
        )

    def _check(self, params, x):
        check.params(self, params)
        if x.shape[x.ndim - self.input_ndim :] != self.input_size:
            raise ValueError(f"x: expected (..., {', '.join(map(str, self.input_size))}), got {x.shape}")


def _for_each(name: str, value: int | tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    value = (value,) * dimensions if isinstance(value, int) else tuple(value)
    if len(value) != dimensions:
        raise ValueError(f"{name}: expected {dimensions} numbers, one per dimension, got {value}")
    return value


def _rule(gate_activation: Activation, activation: Activation) -> LSTMRule:
    φ, ψ = elementwise(gate_activation), elementwise(activation)
    return LSTMRule(φ, ψ, ψ)


def _products(params, carry, x, noise, strides, dilation, padding):
    """Returns (θ, carry, u, v), in at least float32."""
    dtype = compute_dtype(x, params)
    params, wide = cast(params, dtype), accumulator(dtype, carry.h.dtype, carry.c.dtype)
    carry, mask = cast(carry, wide), mask_of(noise)
    h = carry.h if mask is None else carry.h * mask.astype(wide)
    ones = (1,) * len(strides)
    u = _convolve(x.astype(dtype), params.w_x, strides, dilation, padding)
    v = _convolve(h.astype(dtype), params.w_h, ones, ones, "SAME")
    return cast(LSTMTheta(params.b, None, None), wide), carry, u.astype(wide), v.astype(wide)


def _convolve(x, w, strides, dilation, padding):
    # The operands are widened after rounding: a convolution of half precision has no gradient with a wider result.
    wide = accumulator(x.dtype)
    batch, inner = x.shape[: x.ndim - w.ndim + 1], x.shape[x.ndim - w.ndim + 1 :]
    spatial = "DHW"[: w.ndim - 2]
    y = lax.conv_general_dilated(
        x.reshape(math.prod(batch), *inner).astype(wide),
        w.astype(wide),
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
    )
    return y.reshape(*batch, *y.shape[1:])


def conv_lstm_init(
    key: Array, input_channels: int, hidden_size: int, kernel_size: tuple[int, ...], *, dtype: DTypeLike = jnp.float32
) -> ConvLSTMParams:
    """Draws the parameters of `conv_lstm_step`: for each gate, the kernels are normal with variance 1/(fan in); the
    forget bias is 1 and the other biases are 0.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.conv_lstm_init(jax.random.key(0), 3, 4, (5,)).w_x.shape
      (5, 3, 16)
    """
    k_x, k_h = jax.random.split(key)
    wide = accumulator(dtype)
    draw = jax.nn.initializers.lecun_normal()
    return ConvLSTMParams(
        w_x=draw(k_x, (*kernel_size, input_channels, 4 * hidden_size), wide).astype(dtype),
        w_h=draw(k_h, (*kernel_size, hidden_size, 4 * hidden_size), wide).astype(dtype),
        b=jnp.zeros(4 * hidden_size, dtype).at[hidden_size : 2 * hidden_size].set(1),
    )


def conv_lstm_step(
    params: ConvLSTMParams,
    carry: ConvLSTMCarry,
    x: Array,
    noise: Noise = None,
    *,
    strides: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    padding: str = "SAME",
    gate_activation: Activation = "sigmoid",
    activation: Activation = "tanh",
) -> tuple[ConvLSTMCarry, Array]:
    """One step of a convolutional LSTM.

        i, f, g, o = split(x ∗ w_x + h ∗ w_h + b)
        c' = σ(f) c + σ(i) tanh(g)
        h' = σ(o) tanh(c')

    Args:
      params: `ConvLSTMParams` with w_x (*K, D, 4H), w_h (*K, H, 4H), b (4H,) or None; gates in the order i, f, g, o.
      carry: `ConvLSTMCarry(h, c)`, each of shape (..., *S', H).
      x: The input of one step, of shape (..., *S, D).
      noise: None, or `(mask, None)`, where mask multiplies h in the product h ∗ w_h.
      strides: As in `ConvLSTM`.
      dilation: As in `ConvLSTM`.
      padding: As in `ConvLSTM`.
      gate_activation: As in `ConvLSTM`.
      activation: As in `ConvLSTM`.

    Returns:
      The new carry, and the output h' of shape (..., *S', H).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.conv_lstm_init(jax.random.key(0), 3, 4, (5,))
      >>> carry = jaxrnn.ConvLSTMCarry(jnp.zeros((8, 4)), jnp.zeros((8, 4)))
      >>> carry, y = jaxrnn.conv_lstm_step(params, carry, jnp.ones((8, 3)))
      >>> y.shape
      (8, 4)

    References:
      Shi et al. 2015, Convolutional LSTM network, arXiv 1506.04214.
    """
    check.kind(params, ConvLSTMParams)
    *kernel_size, channels, _ = params.w_x.shape
    check.drawn(params, conv_lstm_init, channels, params.w_h.shape[-2], tuple(kernel_size))
    each = _for_each("strides", strides, len(kernel_size)), _for_each("dilation", dilation, len(kernel_size))
    theta, wide, u, v = _products(params, carry, x, noise, *each, padding)
    new, y = lstm_update(_rule(gate_activation, activation), theta, wide, u, v, None)
    return cast_like(ConvLSTMCarry(*new), carry, owner="conv_lstm_step"), y.astype(compute_dtype(x, params))
