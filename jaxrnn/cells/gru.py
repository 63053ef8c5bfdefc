"""The gated recurrent unit, in its two forms."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.activations import Activation, check_elementwise
from jaxrnn.cells.gated import GatedCell, centred, clipped, mask_of, normalize, plain, rule_of, stacked
from jaxrnn.cells.initializers import lecun_normal, orthogonal
from jaxrnn.engines.arrays import lifted
from jaxrnn.engines.gated.engine import Kernel
from jaxrnn.engines.gated.gates import gates_of
from jaxrnn.engines.gated.recurrence import GatedWeights, Recurrence, gated_step
from jaxrnn.engines.gated.staged.rule import Given
from jaxrnn.typing import DTypeLike, Noise


class GRUNorm(NamedTuple):
    """x (3H,): the gain of the normalised x w_x; h (3H,): the gain of the normalised h w_h."""

    x: Array
    h: Array


class GRUParams(NamedTuple):
    """w_x (D, 3H): input weights; w_h (H, 3H): recurrent weights; b (3H,): bias, or None; gates in the order r, z, n.

    b_hn (H,): the bias of h w_hn, or None; it exists only where the reset gate acts after the product. norm: a
    `GRUNorm`, or None.
    """

    w_x: Array
    w_h: Array
    b: Array | None
    b_hn: Array | None = None
    norm: GRUNorm | None = None

    @property
    def hidden_size(self) -> int:
        """The number of hidden units, H, taken from the arrays."""
        return self.w_h.shape[0]


class GRUCarry(NamedTuple):
    """h (..., H): the hidden state."""

    h: Array


class GRUGates(NamedTuple):
    """The activated gates r and z and the candidate n, each (..., H)."""

    r: Array
    z: Array
    n: Array


class _Theta(NamedTuple):
    b: Array | None
    b_hn: Array | None
    norm: GRUNorm | None


class GRU(GatedCell[GRUParams, GRUCarry]):
    """The gated recurrent unit: `gru_step` as a cell.

        r, z = σ(x w_xr + h w_hr + b_r), σ(x w_xz + h w_hz + b_z)
        n = tanh(x w_xn + b_n + r (h w_hn + b_hn))        reset_after=True
        n = tanh(x w_xn + b_n + (r h) w_hn)               reset_after=False
        h' = (1 − z) n + z h,  y = h'

    The two forms are different functions: the weights of one cannot be converted to the other.

    Args:
      input_size: The number of input features, D.
      hidden_size: The number of hidden units, H.
      reset_after: Whether the reset gate acts after the recurrent product (PyTorch, cuDNN, Keras 3, Flax) or before it
        (the published equations, Haiku, ONNX by default).
      layer_norm: Layer normalisation: LN(x w_x) γ_x + b and LN(h w_h) γ_h replace the products. Each LN is over all the
        gates that one product feeds: r, z and n, or in the second form r and z together and then n.
      gate_clip: Clip the input of every gate's activation to ±gate_clip (ONNX's `clip`).
      gate_activation: The activation of the gates r and z; see `jaxrnn.activation`.
      activation: The activation of the candidate n.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.GRU(3, 16)
      >>> params = cell.init(jax.random.key(0))
      >>> carry, ys = jaxrnn.scan(cell, params, None, jnp.ones((5, 7, 3)), time_axis=1)
      >>> carry.h.shape, ys.shape
      ((5, 16), (5, 7, 16))

    References:
      Cho et al. 2014, arXiv 1406.1078 (v1 resets after the product, v3 before).
    """

    input_size: int
    hidden_size: int
    reset_after: bool = True
    layer_norm: bool = False
    gate_clip: float | None = None
    gate_activation: Activation = "sigmoid"
    activation: Activation = "tanh"

    def __post_init__(self):
        check.sizes(self, "input_size", "hidden_size")
        check.fields(self, gate_clip=check.positive)
        check_elementwise(self.gate_activation, self.activation)

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> GRUParams:
        return gru_init(
            key,
            self.input_size,
            self.hidden_size,
            reset_after=self.reset_after,
            layer_norm=self.layer_norm,
            dtype=dtype,
        )

    def initial_carry(self, params: GRUParams, batch_shape: tuple[int, ...] = ()) -> GRUCarry:
        return GRUCarry(self.zeros(params, batch_shape, self.hidden_size))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return gru_step(
            params,
            carry,
            x,
            noise,
            reset_after=self.reset_after,
            gate_clip=self.gate_clip,
            gate_activation=self.gate_activation,
            activation=self.activation,
        )

    def weights(self, params: GRUParams) -> GatedWeights:
        return _weights(params, self.reset_after)

    @property
    def gates_apart(self) -> bool:
        return not self.layer_norm

    def kernel(self, weights: GatedWeights) -> Kernel | None:
        if not plain(dataclasses.replace(self, reset_after=True)):
            return None
        if self.reset_after:
            return Kernel("gru", weights.w_h, weights.theta.b_hn)
        assert weights.w_2 is not None
        return Kernel("gru_before", jnp.concatenate([weights.w_h, weights.w_2], axis=1))

    def rule(self):
        return rule_of(
            "gru" if self.reset_after else "gru before",
            gate=self.gate_activation,
            candidate=self.activation,
            gate_clip=self.gate_clip or 0.0,
            norm=self.layer_norm,
        )

    def arrange(self, weights: GatedWeights) -> Given:
        size, (b, b_hn, norm), w_x = self.hidden_size, weights.theta, weights.w_x
        products = [weights.w_h] if weights.w_2 is None else [weights.w_h, weights.w_2]
        own = (jnp.zeros(size, w_x.dtype) if b_hn is None else b_hn)[None] if self.reset_after else None
        if norm is None:
            return Given(w_x, jnp.concatenate(products, 1), weights.b, None, own)
        theta = stacked(size, own, norm.x, norm.h, jnp.zeros_like(norm.x) if b is None else b)
        return Given(centred(w_x), jnp.concatenate([centred(each) for each in products], 1), theta=theta)

    def gates(self, params: GRUParams, carry: GRUCarry, x: Array, noise: Noise = None) -> GRUGates:
        """The activated gates of one step."""
        return _gates(*self._activations, *self.products(params, carry, x, noise))

    def update(self, theta, carry, u, v, w):
        return _update(*self._activations, theta, carry, u, v, w)

    def second_input(self, theta, carry, s, u, v):
        return _second_input(self._activations[0], theta, carry, s, u, v)

    @property
    def _activations(self):
        return clipped(self.gate_activation, self.gate_clip), clipped(self.activation, self.gate_clip)


def gru_init(
    key: Array,
    input_size: int,
    hidden_size: int,
    *,
    reset_after: bool = True,
    layer_norm: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> GRUParams:
    """Draws the parameters of `gru_step`: for each gate, w_x is LeCun normal and w_h is orthogonal; biases are zero and
    gains one.

    Examples:
      >>> import jax, jaxrnn
      >>> params = jaxrnn.gru_init(jax.random.key(0), 3, 16)
      >>> params.w_h.shape, params.b_hn.shape
      ((16, 48), (16,))
    """
    k_x, k_h = jax.random.split(key)
    ones = jnp.ones(3 * hidden_size, dtype)
    return GRUParams(
        w_x=lecun_normal(k_x, input_size, hidden_size, 3, dtype),
        w_h=orthogonal(k_h, hidden_size, hidden_size, 3, dtype),
        b=jnp.zeros(3 * hidden_size, dtype),
        b_hn=jnp.zeros(hidden_size, dtype) if reset_after else None,
        norm=GRUNorm(ones, ones) if layer_norm else None,
    )


def gru_step(
    params: GRUParams,
    carry: GRUCarry,
    x: Array,
    noise: Noise = None,
    *,
    reset_after: bool = True,
    gate_clip: float | None = None,
    gate_activation: Activation = "sigmoid",
    activation: Activation = "tanh",
) -> tuple[GRUCarry, Array]:
    """One step of a gated recurrent unit.

        r, z = σ(x w_xr + h w_hr + b_r), σ(x w_xz + h w_hz + b_z)
        n = tanh(x w_xn + b_n + r (h w_hn + b_hn))
        h' = (1 − z) n + z h

    Args:
      params: `GRUParams` with w_x (D, 3H), w_h (H, 3H), b (3H,) or None, b_hn (H,) or None; gates in the order r, z, n.
        Whether there is layer normalisation follows from the arrays that are present.
      carry: `GRUCarry(h)` with h (..., H).
      x: The input of one step, of shape (..., D).
      noise: None, or `(mask, None)`, where mask (..., H) multiplies h in its products.
      reset_after: As in `GRU`; it does not follow from the arrays.
      gate_clip: As in `GRU`.
      gate_activation: As in `GRU`.
      activation: As in `GRU`.

    Returns:
      The new carry, and the output h' of shape (..., H).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.gru_init(jax.random.key(0), 3, 16)
      >>> carry, y = jaxrnn.gru_step(params, jaxrnn.GRUCarry(jnp.zeros(16)), jnp.ones(3))
      >>> y.shape
      (16,)

    References:
      Cho et al. 2014, arXiv 1406.1078. The form of PyTorch, cuDNN, Keras 3 and Flax.
    """
    check.kind(params, GRUParams)
    sizes = params.w_x.shape[0], params.hidden_size
    check.drawn(params, gru_init, *sizes, reset_after=reset_after, layer_norm=params.norm is not None)
    φ, ψ = clipped(gate_activation, gate_clip), clipped(activation, gate_clip)
    recurrence = Recurrence(functools.partial(_update, φ, ψ), functools.partial(_second_input, φ))
    return gated_step(recurrence, _weights(params, reset_after), carry, x, mask_of(noise), owner="gru_step")


def _weights(params: GRUParams, reset_after: bool) -> GatedWeights:
    """Only products without normalisation have the bias added to them."""
    normalized = params.norm is not None
    b, theta = None if normalized else params.b, _Theta(params.b if normalized else None, params.b_hn, params.norm)
    if reset_after:
        return GatedWeights(params.w_x, b, params.w_h, None, theta)
    rz = 2 * params.hidden_size
    return GatedWeights(params.w_x, b, params.w_h[:, :rz], params.w_h[:, rz:], theta)


def _normalized(theta, u, v, w):
    if theta.norm is None:
        return u, v, w
    gain_v, gain_w = jnp.split(theta.norm.h, [v.shape[-1]])
    u = normalize(u) * lifted(theta.norm.x, u)
    u = u if theta.b is None else u + lifted(theta.b, u)
    return u, normalize(v) * lifted(gain_v, v), None if w is None else normalize(w) * lifted(gain_w, w)


def _second_input(φ, theta, carry, s, u, v):
    u, v, _ = _normalized(theta, u, v, None)
    return φ(gates_of(u, s)[0] + gates_of(v, s)[0]) * s


def _gates(φ, ψ, theta, carry, u, v, w) -> GRUGates:
    """Without a second product w, the reset gate acts after the one product v."""
    u, v, w = _normalized(theta, u, v, w)
    (u_r, u_z, u_n), (v_r, v_z, *v_n) = gates_of(u, carry.h), gates_of(v, carry.h)
    r, z = φ(u_r + v_r), φ(u_z + v_z)
    if w is None:
        (v_n,) = v_n
        w = r * (v_n if theta.b_hn is None else v_n + lifted(theta.b_hn, v_n))
    return GRUGates(r, z, ψ(u_n + w))


def _update(φ, ψ, theta, carry, u, v, w):
    _, z, n = _gates(φ, ψ, theta, carry, u, v, w)
    h = (1 - z) * n + z * carry.h
    return GRUCarry(h), h
