"""Long short-term memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.activations import Activation, activation, check_elementwise
from jaxrnn.cells.gated import GatedCell, clip, normalize, options
from jaxrnn.cells.initializers import lecun_normal, orthogonal
from jaxrnn.engines.arrays import lifted
from jaxrnn.engines.gated.engine import GatedWeights, Kernel


class LSTMNorm(NamedTuple):
    """Gains of the normalised x w_x and h w_h, each (G,); gain and bias of the normalised c', each (H,)."""

    x: Array
    h: Array
    c: Array
    b_c: Array


class LSTMParams(NamedTuple):
    """w_x (D, 4H), w_h (P, 4H), b (4H,) or None: gates i f g o; where coupled f g o, or i g o (3H).

    P is H without projection. peephole (3, H): p_i, p_f, p_o; where coupled (2, H): p_f or p_i, p_o. w_p (H, P).
    norm: see `LSTMNorm`. What the cell's options do not use is None.
    """

    w_x: Array
    w_h: Array
    b: Array | None
    peephole: Array | None = None
    w_p: Array | None = None
    norm: LSTMNorm | None = None

    @property
    def hidden_size(self) -> int:
        """H, from the arrays."""
        return self.w_h.shape[0] if self.w_p is None else self.w_p.shape[0]


class LSTMCarry(NamedTuple):
    """h (..., P), c (..., H)."""

    h: Array
    c: Array


class LSTMGates(NamedTuple):
    """The activated gates i, f, o and the candidate g, each (..., H)."""

    i: Array
    f: Array
    g: Array
    o: Array


class _Theta(NamedTuple):
    b: Array | None
    peephole: Array | None
    norm: LSTMNorm | None


class LSTM(GatedCell[LSTMParams, LSTMCarry]):
    """Long short-term memory: `lstm_step` as a cell.

        i, f, g, o = σ(i), σ(f), tanh(g), σ(o)  of  i, f, g, o = split(x w_x + h w_h + b)
        c' = f c + i g
        h' = o tanh(c'),  y = h'

    Args:
      input_size: D.
      hidden_size: H.
      peephole: i and f also see p c, o sees p c' (Gers & Schmidhuber 2000).
      coupled: i = 1 − f; three gates f g o (Greff et al. 2017, CIFG). With "input", f = 1 − i; three gates i g o
        (ONNX's `input_forget`).
      projection_size: P; h' = (o tanh(c')) w_p (Sak et al. 2014). The carry h, the output and w_h have P rows.
      layer_norm: LN(x w_x) γ_x + LN(h w_h) γ_h + b before the gates, each over all of them, and tanh(LN(c') γ_c + b_c)
        (Ba et al. 2016, in the form of haste).
      cell_clip: c' within ±cell_clip.
      gate_clip: What every gate's activation reads within ±gate_clip, peepholes included (ONNX's `clip`).
      gate_activation: Of i, f and o; see `jaxrnn.activation`.
      activation: Of g.
      output_activation: Of c'.

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
        if self.coupled not in (False, True, "input"):
            raise ValueError(f"LSTM.coupled: expected False, True or 'input', got {self.coupled!r}")
        check.fields(self, cell_clip=check.positive, gate_clip=check.positive)
        check_elementwise(self.gate_activation, self.activation, self.output_activation)

    @property
    def output_size(self) -> int:
        return self.projection_size or self.hidden_size

    def init(self, key: Array, dtype: Any = jnp.float32) -> LSTMParams:
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

    def weights(self, params: LSTMParams) -> GatedWeights:
        theta = _Theta(params.b if self.layer_norm else None, params.peephole, params.norm)
        return GatedWeights(params.w_x, None if self.layer_norm else params.b, params.w_h, params.w_p, theta)

    def kernel(self, weights: GatedWeights) -> Kernel | str:
        changed = options(self)
        return f"no kernel has {changed}" if changed else Kernel("lstm", weights.w_h)

    def gates(self, params: LSTMParams, carry: LSTMCarry, x: Array, noise: Any = None) -> LSTMGates:
        """The activated gates of one step."""
        theta, carry, u, v, _ = self.products(params, carry, x, noise)
        return self._activate(theta, carry, u, v)[0]

    def update(self, theta, carry, u, v, w):
        gates, c = self._activate(theta, carry, u, v)
        h = self._output(theta, gates.o, c) if w is None else w
        return LSTMCarry(h, c), h

    def second_input(self, theta, carry, s, u, v):
        gates, c = self._activate(theta, carry, u, v)
        return self._output(theta, gates.o, c)

    def _activate(self, theta, carry, u, v) -> tuple[LSTMGates, Array]:
        """The gates, and c'."""
        if self.layer_norm:
            u, v = normalize(u) * lifted(theta.norm.x, u), normalize(v) * lifted(theta.norm.h, v)
            if theta.b is not None:
                u = u + lifted(theta.b, u)
        φ, ψ = activation(self.gate_activation), activation(self.activation)
        *i, f, g, o = jnp.split(u + v, 3 if self.coupled else 4, axis=-1)

        def gate(pre, row, c):
            pre = pre if theta.peephole is None else pre + lifted(theta.peephole[row], c) * c
            return φ(clip(pre, self.gate_clip))

        f = gate(f, -2, carry.c)
        i = 1 - f if self.coupled else gate(i[0], -3, carry.c)
        if self.coupled == "input":
            i, f = f, i
        g = ψ(clip(g, self.gate_clip))
        c = clip(f * carry.c + i * g, self.cell_clip)
        return LSTMGates(i, f, g, gate(o, -1, c)), c

    def _output(self, theta, o, c):
        if self.layer_norm:
            c = normalize(c) * lifted(theta.norm.c, c) + lifted(theta.norm.b_c, c)
        return o * activation(self.output_activation)(c)


def lstm_init(
    key: Array,
    input_size: int,
    hidden_size: int,
    *,
    peephole: bool = False,
    coupled: bool | str = False,
    projection_size: int | None = None,
    layer_norm: bool = False,
    dtype: Any = jnp.float32,
) -> LSTMParams:
    """Parameters of `lstm_step`: per gate w_x LeCun normal and w_h orthogonal, forget bias 1, other biases 0.

    Where f = 1 − i, the input bias is −1. w_p is LeCun normal, peepholes are zero, gains one.

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
    params: LSTMParams, carry: LSTMCarry, x: Array, noise: Any = None, **options: Any
) -> tuple[LSTMCarry, Array]:
    """One step of a long short-term memory cell.

        i, f, g, o = split(x w_x + h w_h + b)
        c' = σ(f) c + σ(i) tanh(g)
        h' = σ(o) tanh(c')

    Args:
      params: `LSTMParams` with w_x (D, 4H), w_h (H, 4H), b (4H,) or None; gates in the order i, f, g, o. Peepholes,
        projection, layer normalisation and coupled gates follow from the arrays that are there.
      carry: `LSTMCarry(h, c)`, each (..., H).
      x: Input, (..., D).
      noise: None, or `(mask, None)` with a factor on h in h w_h, (..., H).
      options: `coupled="input"`, `cell_clip`, `gate_clip`, `gate_activation`, `activation`, `output_activation`, as of
        `LSTM`.

    Returns:
      The new carry, and the output h', (..., H).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If params are of another cell.

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
    options.setdefault("coupled", params.w_x.shape[1] == 3 * params.hidden_size)
    cell = LSTM(
        params.w_x.shape[0],
        params.hidden_size,
        peephole=params.peephole is not None,
        projection_size=None if params.w_p is None else params.w_p.shape[1],
        layer_norm=params.norm is not None,
        **options,
    )
    return cell.step(params, carry, x, noise)
