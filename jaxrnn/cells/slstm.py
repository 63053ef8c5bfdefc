"""The scalar LSTM of xLSTM: exponential gates, a normaliser, and heads."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import check
from jaxrnn.cells.gated import GatedCell, mask_of, rule_of
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.engines.gated.recurrence import GatedWeights, Recurrence, gated_step
from jaxrnn.engines.gated.staged.rule import Given
from jaxrnn.typing import DTypeLike, Noise


class SLSTMParams(NamedTuple):
    """w_x (D, 4H): input weights; w_h (N, H/N, 4 H/N): recurrent weights; b (4H,): bias, or None; gates in the order i,
    f, z, o, in w_h within each of N heads.
    """

    w_x: Array
    w_h: Array
    b: Array | None


class SLSTMCarry(NamedTuple):
    """The hidden state h, the cell state c, the normaliser n and the stabiliser m, each (..., H). Where n is 0, there
    has been no input yet.
    """

    h: Array
    c: Array
    n: Array
    m: Array

    joint = ("c", "n", "m")  # (c, n, m) and (c eᵈ, n eᵈ, m − d) are one state


class SLSTMGates(NamedTuple):
    """The gates i and f in the form in which they update c and n, and z and o, each (..., H)."""

    i: Array
    f: Array
    z: Array
    o: Array


class SLSTM(GatedCell[SLSTMParams, SLSTMCarry]):
    """The scalar LSTM of xLSTM: `slstm_step` as a cell.

        i, f, z, o = x w_x + h w_h + b, w_h block-diagonal
        m' = max(i, log σ(f) + m), or i where n = 0
        i', f' = exp(i − m'), exp(log σ(f) + m − m')
        c' = f' c + i' tanh(z),  n' = f' n + i', at least 1
        h' = σ(o) c' / n',  y = h'

    m keeps the exponentials within range and cancels in h'.

    Args:
      input_size: The number of input features, D.
      hidden_size: The number of hidden units, H.
      heads: The number of heads, N, which divides H. w_h is block-diagonal by head: units see only the past of their
        own head.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.SLSTM(3, 16, heads=4)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 3)))
      >>> ys.shape
      (7, 16)

    References:
      Beck et al. 2024, xLSTM: extended long short-term memory, arXiv 2405.04517.
    """

    input_size: int
    hidden_size: int
    heads: int = 1

    def __post_init__(self):
        check.sizes(self, "input_size", "hidden_size", "heads")
        if self.hidden_size % self.heads:
            raise ValueError(f"SLSTM.heads: expected a divisor of hidden_size {self.hidden_size}, got {self.heads}")

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> SLSTMParams:
        return slstm_init(key, self.input_size, self.hidden_size, heads=self.heads, dtype=dtype)

    def initial_carry(self, params: SLSTMParams, batch_shape: tuple[int, ...] = ()) -> SLSTMCarry:
        return SLSTMCarry(*[self.zeros(params, batch_shape, self.hidden_size)] * 4)

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return slstm_step(params, carry, x, noise)

    def weights(self, params: SLSTMParams) -> GatedWeights:
        return _weights(params)

    def rule(self):
        return rule_of("slstm", heads=self.heads)

    def arrange(self, weights: GatedWeights) -> Given:
        heads, size, _ = weights.w_h.shape
        own = weights.w_h.reshape(heads, size, 4, 1, size)
        whole = jnp.where(jnp.eye(heads, dtype=bool)[:, None, None, :, None], own, jnp.zeros_like(own))
        return Given(weights.w_x, whole.reshape(heads * size, -1), weights.b)

    def gates(self, params: SLSTMParams, carry: SLSTMCarry, x: Array, noise: Noise = None) -> SLSTMGates:
        """The gates of one step."""
        _, carry, u, v, _ = self.products(params, carry, x, noise)
        return _gates(self.heads, carry, u, v)[0]

    def update(self, theta, carry, u, v, w):
        return _update(self.heads, theta, carry, u, v, w)


def slstm_init(
    key: Array, input_size: int, hidden_size: int, *, heads: int = 1, dtype: DTypeLike = jnp.float32
) -> SLSTMParams:
    """Draws the parameters of `slstm_step`: w_x is LeCun normal, w_h is zero, and b is zero except for f, where it goes
    from 3 to 6 over a head.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.slstm_init(jax.random.key(0), 3, 16, heads=4).w_h.shape
      (4, 4, 16)
    """
    size = hidden_size // heads
    b = jnp.zeros((4, hidden_size), dtype).at[1].set(jnp.tile(jnp.linspace(3, 6, size), heads).astype(dtype))
    w_x = lecun_normal(key, input_size, hidden_size, 4, dtype)
    return SLSTMParams(w_x, jnp.zeros((heads, size, 4 * size), dtype), b.reshape(-1))


def slstm_step(params: SLSTMParams, carry: SLSTMCarry, x: Array, noise: Noise = None) -> tuple[SLSTMCarry, Array]:
    """One step of a scalar LSTM of xLSTM.

        i, f, z, o = x w_x + h w_h + b
        m' = max(i, log σ(f) + m), or i where n = 0
        i', f' = exp(i − m'), exp(log σ(f) + m − m')
        c' = f' c + i' tanh(z),  n' = f' n + i', at least 1
        h' = σ(o) c' / n'

    Args:
      params: `SLSTMParams` with w_x (D, 4H), w_h (N, H/N, 4 H/N), b (4H,) or None.
      carry: `SLSTMCarry(h, c, n, m)`, each of shape (..., H).
      x: The input of one step, of shape (..., D).
      noise: None, or `(mask, None)`, where mask (..., H) multiplies h in its product.

    Returns:
      The new carry, and the output h' of shape (..., H).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.slstm_init(jax.random.key(0), 3, 16)
      >>> carry, y = jaxrnn.slstm_step(params, jaxrnn.SLSTMCarry(*[jnp.zeros(16)] * 4), jnp.ones(3))
      >>> y.shape
      (16,)
    """
    check.kind(params, SLSTMParams)
    heads, rows, _ = params.w_h.shape
    check.drawn(params, slstm_init, params.w_x.shape[0], heads * rows, heads=heads)
    recurrence = Recurrence(functools.partial(_update, heads))
    return gated_step(recurrence, _weights(params), carry, x, mask_of(noise), owner="slstm_step")


def _weights(params):
    return GatedWeights(params.w_x, params.b, params.w_h)


def _of_gates(heads, v):
    """The four parts of v, whose columns go by head: slices are part of the gates' kernel, but turned on a TPU."""
    *rows, columns = v.shape

    def sliced(v):
        return [v[..., k, :].reshape(*rows, columns // 4) for k in range(4)]

    def turned(v):
        return jnp.split(jnp.swapaxes(v, -3, -2).reshape(*rows, columns), 4, axis=-1)

    return lax.platform_dependent(v.reshape(*rows, heads, 4, columns // (4 * heads)), cuda=sliced, default=turned)


def _gates(heads, carry, u, v):
    """Computes the gates and m'."""
    i, f, z, o = map(jnp.add, jnp.split(u, 4, axis=-1), _of_gates(heads, v))
    kept = jax.nn.log_sigmoid(f) + carry.m
    m = jnp.where(carry.n == 0, i, jnp.maximum(i, kept))
    past = kept - m  # above 0 only where n is 0, and with it what it multiplies
    past = jnp.where(past > 0, jnp.zeros_like(past), past)
    return SLSTMGates(jnp.exp(i - m), jnp.exp(past), jnp.tanh(z), jax.nn.sigmoid(o)), m


def _update(heads, theta, carry, u, v, w):
    (i, f, z, o), m = _gates(heads, carry, u, v)
    c, n = f * carry.c + i * z, f * carry.n + i
    n = jnp.where(n < 1, jnp.ones_like(n), n)
    h = o * c / n
    return SLSTMCarry(h, c, n, m), h
