"""Long short-term memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.activations import Activation, check_elementwise, elementwise
from jaxrnn.cells.gated import GatedCell, centred, clip, clipped, mask_of, normalize, plain, rule_of, stacked
from jaxrnn.cells.initializers import lecun_normal, orthogonal
from jaxrnn.engines.arrays import lifted
from jaxrnn.engines.gated.engine import Kernel
from jaxrnn.engines.gated.gates import gates_of
from jaxrnn.engines.gated.recurrence import GatedWeights, Recurrence, gated_step
from jaxrnn.engines.gated.staged.rule import Given
from jaxrnn.typing import DTypeLike, Noise


class LSTMNorm(NamedTuple):
    """x, h (G,): the gains of the normalised x w_x and h w_h; c, b_c (H,): the gain and bias of the normalised c'."""

    x: Array
    h: Array
    c: Array
    b_c: Array


class LSTMParams(NamedTuple):
    """w_x (D, 4H): input weights; w_h (P, 4H): recurrent weights; b (4H,): bias, or None; for the gates i, f, g, o.

    Coupled gates have 3H columns, for f, g, o or i, g, o. P is H without projection. peephole (3, H): p_i, p_f, p_o;
    with coupled gates (2, H): p_f or p_i, then p_o. w_p (H, P): projection weights. norm: an `LSTMNorm`. Arrays that
    the cell's options do not use are None.
    """

    w_x: Array
    w_h: Array
    b: Array | None
    peephole: Array | None = None
    w_p: Array | None = None
    norm: LSTMNorm | None = None

    @property
    def hidden_size(self) -> int:
        """The number of hidden units, H, taken from the arrays."""
        return self.w_h.shape[0] if self.w_p is None else self.w_p.shape[0]


class LSTMCarry(NamedTuple):
    """h (..., P): the hidden state; c (..., H): the cell state."""

    h: Array
    c: Array


class LSTMGates(NamedTuple):
    """The activated gates i, f, o and the candidate g, each (..., H)."""

    i: Array
    f: Array
    g: Array
    o: Array


class LSTMTheta(NamedTuple):
    """The learned vectors that the gates read."""

    b: Array | None
    peephole: Array | None
    norm: LSTMNorm | None


class LSTMRule(NamedTuple):
    """The functions that follow the products of an LSTM: φ acts on i, f and o, ψ on g, and χ on c'."""

    φ: Callable[[Array], Array]
    ψ: Callable[[Array], Array]
    χ: Callable[[Array], Array]
    coupled: bool | str = False
    cell_clip: float | None = None


class LSTM(GatedCell[LSTMParams, LSTMCarry]):
    """Long short-term memory: `lstm_step` as a cell.

        i, f, g, o = σ(i), σ(f), tanh(g), σ(o)  of  i, f, g, o = split(x w_x + h w_h + b)
        c' = f c + i g
        h' = o tanh(c'),  y = h'

    Args:
      input_size: The number of input features, D.
      hidden_size: The number of hidden units, H.
      peephole: Peephole connections: i and f also see p c, and o sees p c' (Gers & Schmidhuber 2000).
      coupled: With True, i = 1 − f and there are three gates, f, g, o (Greff et al. 2017, CIFG). With "input",
        f = 1 − i and there are three gates, i, g, o (ONNX's `input_forget`).
      projection_size: The size P of a projection: h' = (o tanh(c')) w_p (Sak et al. 2014). The carry h and the output
        then have size P, and w_h has P rows.
      layer_norm: Layer normalisation: LN(x w_x) γ_x + LN(h w_h) γ_h + b before the gates, each LN over all of them, and
        tanh(LN(c') γ_c + b_c) (Ba et al. 2016, in the form of haste).
      cell_clip: Clip the cell state c' to ±cell_clip.
      gate_clip: Clip the input of every gate's activation to ±gate_clip, peepholes included (ONNX's `clip`).
      gate_activation: The activation of the gates i, f and o; see `jaxrnn.activation`.
      activation: The activation of the candidate g.
      output_activation: The activation of the cell state c'.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.LSTM(3, 16)
      >>> params = cell.init(jax.random.key(0))
      >>> carry, ys = jaxrnn.scan(cell, params, None, jnp.ones((7, 5, 3)), lengths=jnp.array([7, 0, 3, 2, 1]))
      >>> carry.c.shape, ys.shape
      ((5, 16), (7, 5, 16))

    References:
      Hochreiter & Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735; forget gate: Gers et al. 2000,
      https://doi.org/10.1162/089976600300015015.
    """

    input_size: int
    hidden_size: int
    peephole: bool = False
    coupled: bool | str = False
    projection_size: int | None = None
    layer_norm: bool = False
    cell_clip: float | None = None
    gate_clip: float | None = None
    gate_activation: Activation = "sigmoid"
    activation: Activation = "tanh"
    output_activation: Activation = "tanh"

    def __post_init__(self):
        check.sizes(self, "input_size", "hidden_size", "projection_size")
        _check_coupled("LSTM.coupled", self.coupled)
        check.fields(self, cell_clip=check.positive, gate_clip=check.positive)
        check_elementwise(self.gate_activation, self.activation, self.output_activation)

    @property
    def output_size(self) -> int:
        return self.projection_size or self.hidden_size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> LSTMParams:
        return lstm_init(
            key,
            self.input_size,
            self.hidden_size,
            peephole=self.peephole,
            coupled=self.coupled,
            projection_size=self.projection_size,
            layer_norm=self.layer_norm,
            dtype=dtype,
        )

    def initial_carry(self, params: LSTMParams, batch_shape: tuple[int, ...] = ()) -> LSTMCarry:
        h = self.zeros(params, batch_shape, self.output_size)
        return LSTMCarry(h, self.zeros(params, batch_shape, self.hidden_size))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return lstm_step(
            params,
            carry,
            x,
            noise,
            coupled=self.coupled,
            cell_clip=self.cell_clip,
            gate_clip=self.gate_clip,
            gate_activation=self.gate_activation,
            activation=self.activation,
            output_activation=self.output_activation,
        )

    def weights(self, params: LSTMParams) -> GatedWeights:
        return _weights(params)

    @property
    def gates_apart(self) -> bool:
        return not self.layer_norm

    def kernel(self, weights: GatedWeights) -> Kernel | None:
        return Kernel("lstm", weights.w_h) if plain(self) else None

    def rule(self):
        return rule_of(
            "lstm coupled" if self.coupled else "lstm",
            gate=self.gate_activation,
            candidate=self.activation,
            output=self.output_activation,
            gate_clip=self.gate_clip or 0.0,
            cell_clip=self.cell_clip or 0.0,
            input=self.coupled == "input",
            norm=self.layer_norm,
            projected=self.projection_size is not None,
        )

    def arrange(self, weights: GatedWeights) -> Given:
        size, (b, peephole, norm) = self.hidden_size, weights.theta
        own = jnp.zeros((2 if self.coupled else 3, size), weights.w_x.dtype) if peephole is None else peephole
        if norm is None:
            return Given(weights.w_x, weights.w_h, weights.b, weights.w_2, own)
        b = jnp.zeros_like(norm.x) if b is None else b
        theta = stacked(size, own, norm.x, norm.h, b, norm.c, norm.b_c)
        return Given(centred(weights.w_x), centred(weights.w_h), None, weights.w_2, theta)

    def gates(self, params: LSTMParams, carry: LSTMCarry, x: Array, noise: Noise = None) -> LSTMGates:
        """The activated gates of one step."""
        theta, carry, u, v, _ = self.products(params, carry, x, noise)
        return lstm_gates(self._rule, theta, carry, u, v)[0]

    def update(self, theta, carry, u, v, w):
        return lstm_update(self._rule, theta, carry, u, v, w)

    def second_input(self, theta, carry, s, u, v):
        return _second_input(self._rule, theta, carry, s, u, v)

    @property
    def _rule(self) -> LSTMRule:
        φ, ψ = clipped(self.gate_activation, self.gate_clip), clipped(self.activation, self.gate_clip)
        return LSTMRule(φ, ψ, elementwise(self.output_activation), self.coupled, self.cell_clip)


def lstm_init(
    key: Array,
    input_size: int,
    hidden_size: int,
    *,
    peephole: bool = False,
    coupled: bool | str = False,
    projection_size: int | None = None,
    layer_norm: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> LSTMParams:
    """Draws the parameters of `lstm_step`: for each gate, w_x is LeCun normal and w_h is orthogonal; the forget bias is
    1 and the other biases are 0.

    Where f = 1 − i, the bias of the input gate is −1. w_p is LeCun normal, peepholes are zero, and gains are one.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.lstm_init(jax.random.key(0), 3, 2).b
      Array([0., 0., 1., 1., 0., 0., 0., 0.], dtype=float32)
    """
    k_x, k_h, k_p = jax.random.split(key, 3)
    gates = 3 if coupled else 4
    columns, size = gates * hidden_size, projection_size or hidden_size
    forget = 0 if coupled else hidden_size
    ones, zeros = jnp.ones(columns, dtype), jnp.zeros(columns, dtype)
    one, zero = ones[:hidden_size], zeros[:hidden_size]
    return LSTMParams(
        w_x=lecun_normal(k_x, input_size, hidden_size, gates, dtype),
        w_h=orthogonal(k_h, size, hidden_size, gates, dtype),
        b=zeros.at[forget : forget + hidden_size].set(-1 if coupled == "input" else 1),
        peephole=jnp.zeros((gates - 1, hidden_size), dtype) if peephole else None,
        w_p=lecun_normal(k_p, hidden_size, projection_size, 1, dtype) if projection_size else None,
        norm=LSTMNorm(ones, ones, one, zero) if layer_norm else None,
    )


def lstm_step(
    params: LSTMParams,
    carry: LSTMCarry,
    x: Array,
    noise: Noise = None,
    *,
    coupled: bool | str | None = None,
    cell_clip: float | None = None,
    gate_clip: float | None = None,
    gate_activation: Activation = "sigmoid",
    activation: Activation = "tanh",
    output_activation: Activation = "tanh",
) -> tuple[LSTMCarry, Array]:
    """One step of a long short-term memory cell.

        i, f, g, o = split(x w_x + h w_h + b)
        c' = σ(f) c + σ(i) tanh(g)
        h' = σ(o) tanh(c')

    Args:
      params: `LSTMParams` with w_x (D, 4H), w_h (H, 4H), b (4H,) or None; gates in the order i, f, g, o. Whether there
        are peepholes, a projection and layer normalisation follows from the arrays that are present. With a projection
        to P units, h, its mask, the output and the rows of w_h have P in place of H.
      carry: `LSTMCarry(h, c)`, each of shape (..., H).
      x: The input of one step, of shape (..., D).
      noise: None, or `(mask, None)`, where mask (..., H) multiplies h in the product h w_h.
      coupled: As in `LSTM`; None means True if the arrays have three gates.
      cell_clip: As in `LSTM`.
      gate_clip: As in `LSTM`.
      gate_activation: As in `LSTM`.
      activation: As in `LSTM`.
      output_activation: As in `LSTM`.

    Returns:
      The new carry, and the output h' of shape (..., H).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.lstm_init(jax.random.key(0), 3, 16)
      >>> carry = jaxrnn.LSTMCarry(h=jnp.zeros(16), c=jnp.zeros(16))
      >>> carry, y = jaxrnn.lstm_step(params, carry, jnp.ones(3))
      >>> y.shape
      (16,)

    References:
      Hochreiter & Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735; forget gate: Gers et al. 2000,
      https://doi.org/10.1162/089976600300015015. The form of PyTorch, cuDNN, Keras and Flax.
    """
    check.kind(params, LSTMParams)
    coupled = params.w_x.shape[1] == 3 * params.hidden_size if coupled is None else coupled
    _check_coupled("coupled", coupled)
    if cell_clip is not None:
        check.positive("cell_clip", cell_clip)
    check.drawn(
        params,
        lstm_init,
        params.w_x.shape[0],
        params.hidden_size,
        peephole=params.peephole is not None,
        coupled=coupled,
        projection_size=None if params.w_p is None else params.w_p.shape[1],
        layer_norm=params.norm is not None,
    )
    φ, ψ = clipped(gate_activation, gate_clip), clipped(activation, gate_clip)
    rule = LSTMRule(φ, ψ, elementwise(output_activation), coupled, cell_clip)
    recurrence = Recurrence(functools.partial(lstm_update, rule), functools.partial(_second_input, rule))
    return gated_step(recurrence, _weights(params), carry, x, mask_of(noise), owner="lstm_step")


def _check_coupled(name, value):
    if value not in (False, True, "input"):
        raise ValueError(f"{name}: expected False, True or 'input', got {value!r}")


def _weights(params: LSTMParams) -> GatedWeights:
    """Only products without normalisation have the bias added to them."""
    normalized = params.norm is not None
    theta = LSTMTheta(params.b if normalized else None, params.peephole, params.norm)
    return GatedWeights(params.w_x, None if normalized else params.b, params.w_h, params.w_p, theta)


def lstm_gates(rule: LSTMRule, theta: LSTMTheta, carry: LSTMCarry, u: Array, v: Array) -> tuple[LSTMGates, Array]:
    """Computes the activated gates, and c', from the products u and v."""
    if theta.norm is not None:
        u, v = normalize(u) * lifted(theta.norm.x, u), normalize(v) * lifted(theta.norm.h, v)
    if theta.b is not None:
        u = u + lifted(theta.b, u)
    *i, f, g, o = gates_of(u + v, carry.c)

    def gate(pre, row, c):
        return rule.φ(pre if theta.peephole is None else pre + lifted(theta.peephole[row], c) * c)

    f = gate(f, -2, carry.c)
    i = 1 - f if rule.coupled else gate(i[0], -3, carry.c)
    if rule.coupled == "input":
        i, f = f, i
    g = rule.ψ(g)
    c = clip(f * carry.c + i * g, rule.cell_clip)
    return LSTMGates(i, f, g, gate(o, -1, c)), c


def _output(rule, theta, o, c):
    if theta.norm is not None:
        c = normalize(c) * lifted(theta.norm.c, c) + lifted(theta.norm.b_c, c)
    return o * rule.χ(c)


def _second_input(rule, theta, carry, s, u, v):
    gates, c = lstm_gates(rule, theta, carry, u, v)
    return _output(rule, theta, gates.o, c)


def lstm_update(
    rule: LSTMRule, theta: LSTMTheta, carry: LSTMCarry, u: Array, v: Array, w: Array | None
) -> tuple[LSTMCarry, Array]:
    """Computes the new carry and h' from the products u and v, and the product w of a projection if there is one."""
    gates, c = lstm_gates(rule, theta, carry, u, v)
    h = _output(rule, theta, gates.o, c) if w is None else w
    return LSTMCarry(h, c), h
