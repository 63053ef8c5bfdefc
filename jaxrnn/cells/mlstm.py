"""The LSTM with a matrix as memory."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import check
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.matrix import (
    MatrixCell,
    MatrixInputs,
    matrix_step,
    nothing_more,
    queries,
    side_by_side,
)
from jaxrnn.engines.arrays import accumulator, lifted, select, zero_where_not
from jaxrnn.engines.product import dot
from jaxrnn.engines.sequence_parallel import part, states
from jaxrnn.typing import DTypeLike, Noise

INPUT_GATES = ("exponential", "sigmoid")
SMALLEST = 1e-6  # what is added to the normaliser
LEAST = -1e30  # the logarithm of 0, finite, so that derivatives are
MOST = 80.0  # the largest exponent


class MLSTMParams(NamedTuple):
    """w_x (D, heads (2K + V)): input weights; columns of q, of k and of v, head by head. w_gates (D, 2 heads),
    b_gates (2 heads,): weights and bias of the input gates i and of the forget gates f.
    """

    w_x: Array
    w_gates: Array
    b_gates: Array


class MLSTMCarry(NamedTuple):
    """s (..., heads, K, V + 1): the memory C, and n, the normaliser, as its last column; both times exp(−m). m
    (..., heads): the stabiliser. With the input gate "sigmoid" s is (..., heads, K, V), and m None.
    """

    s: Array
    m: Array | None


class MLSTMGates(NamedTuple):
    """log_i and log_f (..., heads): the logarithms of the input gate and of the forget gate."""

    log_i: Array
    log_f: Array


class MLSTM(MatrixCell[MLSTMParams, MLSTMCarry]):
    """The LSTM with a matrix as memory of xLSTM, and exponential input gates: `mlstm_step` as a cell.

        q = x w_q / √K,  k = x w_k,  v = x w_v                                       for each head
        i = exp(cap(x w_i + b_i)),  f = σ(cap(x w_f + b_f)),  cap(z) = c tanh(z / c)
        C' = f C + i k vᵀ,  n' = f n + i k
        y = C'ᵀ q / max(|n'ᵀ q|, 1),  all heads side by side

    The carry holds exp(−m) C and exp(−m) n, where m' = max(log f + m, log i), so that no number overflows. With the
    input gate "sigmoid" i = σ(x w_i + b_i), and y = C'ᵀ q.

    Args:
      input_size: The number of input features, D.
      heads: The number of heads.
      key_size: The size of the keys of a head, K.
      value_size: The size of the values of a head, V; y has heads · V features.
      input_gate: "exponential" or "sigmoid".
      soft_cap: The bound c of what enters the gates; None for none.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.MLSTM(8, heads=2, key_size=4, value_size=6)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))
      >>> carry.s.shape, carry.m.shape, ys.shape
      ((2, 4, 7), (2,), (7, 12))

    References:
      Beck et al. 2024, xLSTM, arXiv 2405.04517; the soft cap: Beck et al. 2025, xLSTM 7B, arXiv 2503.13427; the sigmoid
      gate: Beck et al. 2025, Tiled flash linear attention, arXiv 2503.14376.
    """

    input_size: int
    heads: int
    key_size: int
    value_size: int
    input_gate: str = "exponential"
    soft_cap: float | None = 15.0

    def __post_init__(self):
        check.sizes(self, "input_size", "heads", "key_size", "value_size")
        if self.input_gate not in INPUT_GATES:
            raise ValueError(f"MLSTM.input_gate: expected one of {INPUT_GATES}, got {self.input_gate!r}")
        if self.soft_cap is not None:
            check.positive("MLSTM.soft_cap", self.soft_cap)

    @property
    def _exponential(self) -> bool:
        return self.input_gate == "exponential"

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> MLSTMParams:
        return mlstm_init(key, self.input_size, self.heads, self.key_size, self.value_size, dtype=dtype)

    def initial_carry(self, params: MLSTMParams, batch_shape: tuple[int, ...] = ()) -> MLSTMCarry:
        s = self.zeros(params, batch_shape, self._exponential)
        return MLSTMCarry(s, jnp.zeros((*batch_shape, self.heads), s.dtype) if self._exponential else None)

    def gates(self, params: MLSTMParams, carry: MLSTMCarry, x: Array, noise: Noise = None) -> MLSTMGates:
        """The logarithms of the gates of one step."""
        check.params(self, params)
        return _gates(params, x, self.input_gate, self.soft_cap)

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return mlstm_step(params, carry, x, noise, input_gate=self.input_gate, soft_cap=self.soft_cap)

    def inputs(self, params, x):
        return _inputs(params, x, self.heads, self.key_size, self.input_gate, self.soft_cap)

    def follow(self, inputs, carry, fresh, flags, reverse):
        return (_stabilized if self._exponential else nothing_more)(inputs, carry, fresh, flags, reverse)

    def follow_divided(self, inputs, carry, fresh, walk):
        if not self._exponential:
            return carry, carry
        alone = carry._replace(m=jnp.full_like(carry.m, LEAST))
        last = self.follow(inputs, alone, fresh, walk.flags, walk.reverse)[1].m
        forgotten = zero_where_not(walk.valid, inputs.log_decay).sum(0).astype(last.dtype)

        def function(forgotten, last, m):
            return jnp.maximum(m + forgotten, last)

        found = states(part(walk, forgotten, last), carry.m, function, walk, fresh.m)
        before, after = (carry._replace(m=each) for each in found)
        return before, after

    def output(self, params, ys, inputs):
        return (_normalized if self._exponential else side_by_side)(params, ys, inputs)


def mlstm_init(
    key: Array, input_size: int, heads: int, key_size: int, value_size: int, *, dtype: DTypeLike = jnp.float32
) -> MLSTMParams:
    """Draws the parameters of `mlstm_step`: w_x is LeCun normal; w_gates is zero; the bias of the input gates is −10,
    and those of the forget gates go from 3 to 6.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.mlstm_init(jax.random.key(0), 8, 2, 4, 6).b_gates
      Array([-10., -10.,   3.,   6.], dtype=float32)
    """
    return MLSTMParams(
        w_x=lecun_normal(key, input_size, heads * (2 * key_size + value_size), 1, dtype),
        w_gates=jnp.zeros((input_size, 2 * heads), dtype),
        b_gates=jnp.concatenate([jnp.full(heads, -10.0), jnp.linspace(3.0, 6.0, heads)]).astype(dtype),
    )


def mlstm_step(
    params: MLSTMParams,
    carry: MLSTMCarry,
    x: Array,
    noise: Noise = None,
    *,
    input_gate: str = "exponential",
    soft_cap: float | None = 15.0,
) -> tuple[MLSTMCarry, Array]:
    """One step of an LSTM with a matrix as memory.

        C' = f C + i k vᵀ,  n' = f n + i k,  y = C'ᵀ q / max(|n'ᵀ q|, 1)

    Args:
      params: `MLSTMParams` with w_x (D, heads (2K + V)), w_gates (D, 2 heads), b_gates (2 heads,).
      carry: `MLSTMCarry(s, m)` with s (..., heads, K, V + 1) and m (..., heads), or s (..., heads, K, V) and None.
      x: The input of one step, of shape (..., D).
      noise: Always None.
      input_gate: As in `MLSTM`.
      soft_cap: As in `MLSTM`.

    Returns:
      The new carry, and the output of shape (..., heads · V).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.mlstm_init(jax.random.key(0), 8, 2, 4, 6)
      >>> carry = jaxrnn.MLSTMCarry(jnp.zeros((2, 4, 7)), jnp.zeros(2))
      >>> jaxrnn.mlstm_step(params, carry, jnp.ones(8))[1].shape
      (12,)
    """
    check.kind(params, MLSTMParams)
    exponential = input_gate == "exponential"
    heads, key_size, columns = carry.s.shape[-3:]
    check.drawn(params, mlstm_init, params.w_x.shape[0], heads, key_size, columns - exponential)
    inputs = functools.partial(_inputs, heads=heads, key_size=key_size, input_gate=input_gate, soft_cap=soft_cap)
    if not exponential:
        return matrix_step(params, carry, x, inputs)
    return matrix_step(params, carry, x, inputs, follow=_stabilized, output=_normalized)


def _gates(params, x, input_gate, soft_cap) -> MLSTMGates:
    gates = dot(x, params.w_gates)
    gates = gates + lifted(params.b_gates.astype(gates.dtype), gates)
    if soft_cap is not None:
        gates = soft_cap * jnp.tanh(gates / soft_cap)
    i, f = jnp.split(gates, 2, axis=-1)
    return MLSTMGates(i if input_gate == "exponential" else jax.nn.log_sigmoid(i), jax.nn.log_sigmoid(f))


def _inputs(params, x, heads, key_size, input_gate, soft_cap) -> MatrixInputs:
    q, k, v = queries(dot(x, params.w_x), heads, key_size)
    log_i, log_f = _gates(params, x, input_gate, soft_cap)
    q = q * key_size**-0.5
    if input_gate == "sigmoid":
        return MatrixInputs(q, jnp.exp(log_i)[..., None] * k, v, log_f)
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    return MatrixInputs(q, k, v, log_f, aside=log_i)


def _stabilized(inputs, carry, fresh, flags, reverse):
    """Divides the state of each step by exp(m), m' = max(log f + m, log i)."""
    log_f, log_i = inputs.log_decay, inputs.aside
    wide = accumulator(log_f.dtype, carry.m.dtype)
    log_f, log_i, first, fresh = (each.astype(wide) for each in (log_f, log_i, carry.m, fresh.m))
    if log_f.shape[0] == 0:
        return inputs._replace(aside=log_i), carry
    valid, start = flags
    if valid is not None:
        log_f = select(valid, log_f, jnp.zeros_like(log_f))
        log_i = select(valid, log_i, jnp.full_like(log_i, LEAST))
    at, last = (-1, 0) if reverse else (0, -1)
    begins = jnp.zeros_like(log_f, bool).at[at].set(True)
    given = jnp.zeros_like(log_f) + lifted(first, log_f)
    if start is not None:
        given = select(start, jnp.zeros_like(log_f) + lifted(fresh, log_f), given)
        begins = select(start, jnp.ones_like(begins), begins)
    # The first step of a sequence knows m, so that it has none to wait for.
    known = jnp.where(begins, jnp.maximum(log_f + given, log_i), log_i)

    def joined(one, two):
        """A selection, so that no NaN of the sequence before gets into one that begins."""
        (begun, f, m), (begins, next_f, next_m) = one, two
        m = jnp.where(begins, next_m, jnp.maximum(m + next_f, next_m))
        return begun | begins, jnp.where(begins, next_f, f + next_f), m

    m = _joins(joined, (begins, log_f, known), reverse)[2]
    before = jnp.where(begins, given, jnp.roll(m, -1 if reverse else 1, axis=0))
    log_decay = jnp.minimum(log_f + before - m, 0)
    k = jnp.exp(log_i - m)[..., None].astype(inputs.k.dtype) * inputs.k
    return inputs._replace(k=k, log_decay=log_decay, aside=m), carry._replace(m=m[last].astype(carry.m.dtype))


def _joins(joined, steps, reverse):
    """Every step joined with all before it; one by one where their number is a symbol."""
    if isinstance(steps[0].shape[0], int):
        return lax.associative_scan(joined, steps, reverse=reverse)

    def body(state, step):
        new = joined(state, step)
        return new, new

    # The first step begins, and so does not look at what is before it.
    return lax.scan(body, jax.tree.map(lambda x: jnp.zeros_like(x[0]), steps), steps, reverse=reverse)[1]


def _normalized(params, ys, inputs):
    least = jnp.exp(jnp.minimum(-inputs.aside, MOST))[..., None].astype(ys.dtype)
    return side_by_side(params, ys[..., :-1] / (jnp.maximum(jnp.abs(ys[..., -1:]), least) + SMALLEST), inputs)
