"""The minimal gated unit."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.gated import GatedCell, mask_of, rule_of
from jaxrnn.cells.initializers import lecun_normal, orthogonal
from jaxrnn.engines.gated.gates import gates_of
from jaxrnn.engines.gated.recurrence import GatedWeights, Recurrence, gated_step
from jaxrnn.engines.gated.staged.rule import Given
from jaxrnn.typing import DTypeLike, Noise


class MGUParams(NamedTuple):
    """w_x (D, 2H): input weights; w_h (H, 2H): recurrent weights; b (2H,): bias, or None; gate f, then candidate n."""

    w_x: Array
    w_h: Array
    b: Array | None


class MGUCarry(NamedTuple):
    """h (..., H): the hidden state."""

    h: Array


class MGUGates(NamedTuple):
    """The activated gate f and the candidate n, each (..., H)."""

    f: Array
    n: Array


class MGU(GatedCell[MGUParams, MGUCarry]):
    """The minimal gated unit: `mgu_step` as a cell.

        f = σ(x w_xf + h w_hf + b_f)
        n = tanh(x w_xn + (f h) w_hn + b_n)
        h' = (1 − f) h + f n,  y = h'

    Flax's `MGUCell` is a different function: there, f multiplies h in h', and the reset acts after the product.

    Args:
      input_size: The number of input features, D.
      hidden_size: The number of hidden units, H.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.MGU(3, 16)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 3)))
      >>> ys.shape
      (7, 16)

    References:
      Zhou et al. 2016, Minimal gated unit for recurrent neural networks, arXiv 1603.09420.
    """

    input_size: int
    hidden_size: int

    def __post_init__(self):
        check.sizes(self, "input_size", "hidden_size")

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> MGUParams:
        return mgu_init(key, self.input_size, self.hidden_size, dtype=dtype)

    def initial_carry(self, params: MGUParams, batch_shape: tuple[int, ...] = ()) -> MGUCarry:
        return MGUCarry(self.zeros(params, batch_shape, self.hidden_size))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return mgu_step(params, carry, x, noise)

    def weights(self, params: MGUParams) -> GatedWeights:
        return _weights(params)

    @property
    def gates_apart(self) -> bool:
        return True

    def rule(self):
        return rule_of("mgu", gate="sigmoid", candidate="tanh")

    def arrange(self, weights: GatedWeights) -> Given:
        assert weights.w_2 is not None
        return Given(weights.w_x, jnp.concatenate([weights.w_h, weights.w_2], axis=1), weights.b)

    def gates(self, params: MGUParams, carry: MGUCarry, x: Array, noise: Noise = None) -> MGUGates:
        """The activated gates of one step."""
        _, _, u, v, w = self.products(params, carry, x, noise)
        return _gates(u, v, w)

    def update(self, theta, carry, u, v, w):
        return _update(theta, carry, u, v, w)

    def second_input(self, theta, carry, s, u, v):
        return _second_input(theta, carry, s, u, v)


def mgu_init(key: Array, input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32) -> MGUParams:
    """Draws the parameters of `mgu_step`: for each gate, w_x is LeCun normal and w_h is orthogonal; biases are zero.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.mgu_init(jax.random.key(0), 3, 16).w_h.shape
      (16, 32)
    """
    k_x, k_h = jax.random.split(key)
    return MGUParams(
        w_x=lecun_normal(k_x, input_size, hidden_size, 2, dtype),
        w_h=orthogonal(k_h, hidden_size, hidden_size, 2, dtype),
        b=jnp.zeros(2 * hidden_size, dtype),
    )


def mgu_step(params: MGUParams, carry: MGUCarry, x: Array, noise: Noise = None) -> tuple[MGUCarry, Array]:
    """One step of a minimal gated unit.

        f = σ(x w_xf + h w_hf + b_f)
        n = tanh(x w_xn + (f h) w_hn + b_n)
        h' = (1 − f) h + f n

    Args:
      params: `MGUParams` with w_x (D, 2H), w_h (H, 2H), b (2H,) or None; f comes first, then n.
      carry: `MGUCarry(h)` with h (..., H).
      x: The input of one step, of shape (..., D).
      noise: None, or `(mask, None)`, where mask (..., H) multiplies h in its products.

    Returns:
      The new carry, and the output h' of shape (..., H).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.mgu_init(jax.random.key(0), 3, 16)
      >>> carry, y = jaxrnn.mgu_step(params, jaxrnn.MGUCarry(jnp.zeros(16)), jnp.ones(3))
      >>> y.shape
      (16,)
    """
    check.kind(params, MGUParams)
    check.drawn(params, mgu_init, params.w_x.shape[0], params.w_h.shape[0])
    recurrence = Recurrence(_update, _second_input)
    return gated_step(recurrence, _weights(params), carry, x, mask_of(noise), owner="mgu_step")


def _weights(params):
    w_hf, w_hn = jnp.split(params.w_h, 2, axis=1)
    return GatedWeights(params.w_x, params.b, w_hf, w_hn)


def _second_input(theta, carry, s, u, v):
    u_f, _ = gates_of(u, v)
    return _forget(u_f, v) * s


def _forget(u_f, v):
    return jax.nn.sigmoid(u_f + v)


def _gates(u, v, w) -> MGUGates:
    u_f, u_n = gates_of(u, v)
    return MGUGates(_forget(u_f, v), jnp.tanh(u_n + w))


def _update(theta, carry, u, v, w):
    f, n = _gates(u, v, w)
    h = (1 - f) * carry.h + f * n
    return MGUCarry(h), h
