"""Kimi Delta Attention."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.delta import Rule, delta_inputs, delta_step
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.matrix import MatrixCell, draw_step_bias, projected
from jaxrnn.engines.arrays import accumulator
from jaxrnn.engines.product import dot
from jaxrnn.typing import DTypeLike, Noise


class KDAParams(NamedTuple):
    """w_x (D, heads (2K + V + 1) + R): input weights; columns of q, of k, of v and of β, head by head, and of the gate.
    w_gate (R, heads K): from those to the gate. Both None where x holds q, k, v, β and the gate already. b_gate
    (heads K,): the bias of the gate; log_decay (heads,): the logarithm of the rate at which a head forgets.
    """

    w_x: Array | None
    w_gate: Array | None
    b_gate: Array
    log_decay: Array


class KDACarry(NamedTuple):
    """s (..., heads, K, V): the state, what each head has stored at its keys."""

    s: Array


class KDAGates(NamedTuple):
    """beta (..., heads): the strength of writing; a (..., heads, K): the share of each row that is kept."""

    beta: Array
    a: Array


class KDA(MatrixCell[KDAParams, KDACarry]):
    """Kimi Delta Attention, the delta rule with a memory that forgets row by row: `kda_step` as a cell.

        q = unit(x w_q) / √K,  k = unit(x w_k),  v = x w_v,  β = σ(x w_β)            for each head
        z = x w_r w_gate + b_gate
        a = exp(−exp(log_decay) softplus(z)), or with a bound c  a = exp(c σ(exp(log_decay) z))
        S' = (I − β k kᵀ) diag(a) S + β k vᵀ
        y = S'ᵀ q,  all heads side by side

    It is the recurrence alone, without the convolutions before it and the gate after it.

    Args:
      input_size: The number of input features, D.
      heads: The number of heads.
      key_size: The size of the keys of a head, K.
      value_size: The size of the values of a head, V; y has heads · V features.
      rank: The rank R of the map from x to the gate; None for V.
      bound: The bound c of log a, a negative number as −5; None for none.
      negative_eigenvalues: Whether β = 2 σ(x w_β), so that a step can turn the state round.
      project: Whether x is multiplied by w_x. If not, x already holds q, k, v, β and z without its bias side by side,
        as in a block that convolves them before, and `input_size` is their number.
      step_min: The smallest softplus(b_gate) that is drawn; its logarithm is drawn uniformly.
      step_max: The largest softplus(b_gate) that is drawn.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.KDA(8, heads=2, key_size=4, value_size=6)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))
      >>> carry.s.shape, ys.shape
      ((2, 4, 6), (7, 12))

    References:
      Kimi Team 2025, Kimi Linear, arXiv 2510.26692.
    """

    slow_weights = ("log_decay", "b_gate")
    step_by_kernel = True

    input_size: int
    heads: int
    key_size: int
    value_size: int
    rank: int | None = None
    bound: float | None = None
    negative_eigenvalues: bool = False
    project: bool = True
    step_min: float = 1e-3
    step_max: float = 1e-1

    def __post_init__(self):
        check.sizes(self, "input_size", "heads", "key_size", "value_size")
        check.sizes(self, "rank")
        check.steps(self)
        if self.bound is not None and not self.bound < 0:
            raise ValueError(f"KDA.bound: expected a negative number, got {self.bound}")

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> KDAParams:
        return kda_init(
            key,
            self.input_size,
            self.heads,
            self.key_size,
            self.value_size,
            rank=self.rank,
            project=self.project,
            step_min=self.step_min,
            step_max=self.step_max,
            dtype=dtype,
        )

    def initial_carry(self, params: KDAParams, batch_shape: tuple[int, ...] = ()) -> KDACarry:
        return KDACarry(self.zeros(params, batch_shape))

    def gates(self, params: KDAParams, carry: KDACarry, x: Array, noise: Noise = None) -> KDAGates:
        """The strength of writing and the share of each row that is kept of one step."""
        check.params(self, params)
        found = self.inputs(params, x).arrays
        return KDAGates(found["beta"], jnp.exp(found["log_decay"]))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        options = {"bound": self.bound, "negative_eigenvalues": self.negative_eigenvalues}
        return kda_step(params, carry, x, noise, **options)

    def inputs(self, params, x):
        rule = _rule(self.heads, self.key_size, self.value_size, self.negative_eigenvalues, self.bound)
        return delta_inputs(rule, *_parts(params, x))


def kda_init(
    key: Array,
    input_size: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    rank: int | None = None,
    project: bool = True,
    step_min: float = 1e-3,
    step_max: float = 1e-1,
    dtype: DTypeLike = jnp.float32,
) -> KDAParams:
    """Draws the parameters of `kda_step`: w_x and w_gate are LeCun normal; softplus(b_gate) is log-uniform;
    exp(log_decay) is uniform from 1 to 16.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.kda_init(jax.random.key(0), 8, 2, 4, 6).w_x.shape
      (8, 36)
    """
    wide = accumulator(dtype)
    k_x, k_gate, k_step, k_decay = jax.random.split(key, 4)
    rank = value_size if rank is None else rank
    columns = sum(Rule(heads, key_size, value_size, heads).columns) + rank
    params = KDAParams(
        w_x=lecun_normal(k_x, input_size, columns, 1, wide) if project else None,
        w_gate=lecun_normal(k_gate, rank, heads * key_size, 1, wide) if project else None,
        b_gate=draw_step_bias(k_step, heads * key_size, step_min, step_max, wide),
        log_decay=jnp.log(jax.random.uniform(k_decay, (heads,), wide, 1.0, 16.0)),
    )
    return jax.tree.map(lambda each: each.astype(dtype), params)


def kda_step(
    params: KDAParams,
    carry: KDACarry,
    x: Array,
    noise: Noise = None,
    *,
    bound: float | None = None,
    negative_eigenvalues: bool = False,
) -> tuple[KDACarry, Array]:
    """One step of Kimi Delta Attention.

        S' = (I − β k kᵀ) diag(a) S + β k vᵀ,  y = S'ᵀ q

    Args:
      params: `KDAParams` with w_x (D, heads (2K + V + 1) + R) and w_gate (R, heads K), or None; b_gate (heads K,) and
        log_decay (heads,).
      carry: `KDACarry(s)` with s (..., heads, K, V).
      x: The input of one step, of shape (..., D).
      noise: Always None.
      bound: As in `KDA`.
      negative_eigenvalues: As in `KDA`.

    Returns:
      The new carry, and the output of shape (..., heads · V).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.kda_init(jax.random.key(0), 8, 2, 4, 6)
      >>> carry, y = jaxrnn.kda_step(params, jaxrnn.KDACarry(jnp.zeros((2, 4, 6))), jnp.ones(8))
      >>> y.shape
      (12,)
    """
    check.kind(params, KDAParams)
    size = x.shape[-1] if params.w_x is None else params.w_x.shape[0]
    options = {"rank": None if params.w_gate is None else params.w_gate.shape[0], "project": params.w_x is not None}
    check.drawn(params, kda_init, size, *carry.s.shape[-3:], **options)
    heads, key_size, value_size = carry.s.shape[-3:]
    rule = _rule(heads, key_size, value_size, negative_eigenvalues, bound)
    return delta_step(rule, params, carry, x, _parts)


def _rule(heads, key_size, value_size, negative_eigenvalues, bound) -> Rule:
    return Rule(heads, key_size, value_size, heads, negative_eigenvalues=negative_eigenvalues, bound=bound)


def _parts(params, x):
    features, gate = projected(params, x), None
    if params.w_gate is not None:
        gate = features[..., features.shape[-1] - params.w_gate.shape[0] :]
        gate = dot(gate, params.w_gate.astype(gate.dtype))
    return (features, gate), (params.b_gate, params.log_decay)
