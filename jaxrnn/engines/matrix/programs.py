"""Matrix recurrences in JAX: step by step, and in chunks as products of matrices.

    S_t = a_t ⊙ S_{t-1} + writes,    y_t = S_tᵀ q_t,    a_t = exp(log_decay_t), one number or one for each row of S

    plain      writes = k_t v_tᵀ
    delta      writes = k_t e_tᵀ,              e_t = β_t (v_t − r_t),  r_t = (a_t ⊙ S_{t-1})ᵀ k_t
    low rank   writes = k_t v_tᵀ + u_t r_tᵀ,   r_t = S_{t-1}ᵀ w_t

In a chunk, every y and every r is a sum over the steps before it and the state at its begin. The products of decays
between two steps are exponentials of sums of log_decay, which have one sign: none overflows, and none is a difference
of two long sums.

Arrays are (T, R, G, ...): time, rows, and heads. Arrays other than v may have one head for all.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn.engines.arrays import lifted, select
from jaxrnn.typing import PyTree

CHUNK = 32  # steps of a chunk; the states between chunks are what the backward pass keeps
BLOCK = 16  # steps between which every product of decays is computed, where each row of S has its own


class Problem(NamedTuple):
    """What a call reads; an absent array is None.

    q, k, u, w (T, R, G, K), v (T, R, G, V), log_decay (T, R, G) or (T, R, G, K), beta (T, R, G), s (R, G, K, V) before
    the first step, start bool (T, R): whether a step starts from `fresh` (R, G, K, V), or from zeros where that is
    None.
    """

    q: Array
    k: Array
    v: Array
    s: Array
    log_decay: Array | None = None
    beta: Array | None = None
    u: Array | None = None
    w: Array | None = None
    start: Array | None = None
    fresh: Array | None = None

    @property
    def reads(self) -> bool:
        """Whether a step reads the state before it writes: r_t is there."""
        return self.beta is not None or self.u is not None


class Result(NamedTuple):
    """ys (T, R, G, V), the last state; and if they are kept, r (T, R, G, V) and the states before chunks (N, R, G, K,
    V), else None.
    """

    ys: Array
    last: Array
    reads: Array | None = None
    states: Array | None = None


STEPS = ("q", "k", "v", "log_decay", "beta", "u", "w", "start")  # that have an axis of time


def _split(problem: Problem) -> tuple[dict[str, Array], Array, Array | None]:
    """(What each step reads, the first state, the fresh one)."""
    steps = {name: each for name in STEPS if (each := getattr(problem, name)) is not None}
    return steps, problem.s, problem.fresh


def _decayed(log_decay: Array | None, s: Array) -> Array:
    """Multiplies (..., K, V) by the exponential of (...) or (..., K)."""
    if log_decay is None:
        return s
    decay = jnp.exp(log_decay.astype(s.dtype))
    return decay.reshape(decay.shape + (1,) * (s.ndim - decay.ndim)) * s


def _read(s: Array, q: Array) -> Array:
    """Sᵀ q of (..., K, V) and (..., K)."""
    # As many heads as S has: for a product with fewer, XLA would transpose S.
    return (jnp.broadcast_to(q, s.shape[:-1])[..., None, :] @ s)[..., 0, :]


def step(
    s: Array,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None = None,
    beta: Array | None = None,
    u: Array | None = None,
    w: Array | None = None,
) -> tuple[Array, Array]:
    """One step: (S', y), of arrays without time."""
    if beta is not None:
        seen = k if log_decay is None else _decayed(log_decay, k[..., None])[..., 0]  # the state is read as it is
        v = beta[..., None] * (v - _read(s, seen))
    new = _decayed(log_decay, s) + k[..., :, None] * v[..., None, :]
    if u is not None and w is not None:
        new = new + u[..., :, None] * _read(s, w)[..., None, :]
    return new, _read(new, q)


def loop(problem: Problem, *, reverse: bool) -> Result:
    """Step by step."""
    steps, s, fresh = _split(problem)

    def body(s, inputs):
        inputs = dict(inputs)
        start = inputs.pop("start", None)
        if start is not None:
            s = select(start, jnp.zeros_like(s) if fresh is None else fresh, s)
        return step(s, **{name: each.astype(s.dtype) for name, each in inputs.items()})

    if problem.v.shape[0] == 1:  # which XLA's loop would write into an array of all steps
        last, ys = body(s, {name: each[0] for name, each in steps.items()})
        ys = ys[None]
    else:
        last, ys = lax.scan(body, s, steps, reverse=reverse)
    return Result(ys.astype(problem.v.dtype), last)


# Chunks. Inside, arrays are (R, G, C, ...): the steps of a chunk before their channels.


def _inverse(lower: Array) -> Array:
    """(I + L)⁻¹ of strictly lower L (..., C, C), C a power of 2, by doubling the blocks that are inverted.

    Powers of L would overflow where products of keys are large.
    """
    size = lower.shape[-1]
    at = jnp.arange(size).reshape((1,) * (lower.ndim - 2) + (size,))
    inverse = jnp.zeros_like(lower) + lifted(jnp.eye(size, dtype=lower.dtype), lower)  # divided among devices as L is
    width = 1
    while width < size:
        row, column = at[..., :, None] // width, at[..., None, :] // width
        below = (row % 2 == 1) & (row - 1 == column)
        inverse = inverse - inverse @ jnp.where(below, lower, 0) @ inverse
        width *= 2
    return inverse


def _shifted(log_decay: Array) -> Array:
    """That of the step before, 0 at the first."""
    return jnp.concatenate([jnp.zeros_like(log_decay[:, :, :1]), log_decay[:, :, :-1]], axis=2)


def _after(log_decay: Array) -> Array:
    """Σ over the steps after each, (R, G, C, K')."""
    rest = jnp.concatenate([log_decay[:, :, 1:], jnp.zeros_like(log_decay[:, :, :1])], axis=2)
    return jnp.flip(jnp.cumsum(jnp.flip(rest, 2), axis=2), 2)


def _between(log_decay: Array, shift: int) -> Array:
    """Σ over the steps after j up to i − shift, (R, G, i, j, K'); 0 where there are none."""
    at = jnp.arange(log_decay.shape[2])
    counted = at[:, None] - shift > at[None, :]
    moved = _shifted(log_decay) if shift else log_decay
    return jnp.cumsum(jnp.where(counted[None, None, :, :, None], moved[:, :, :, None], 0), axis=2)


class _Chunk:
    """The decays of a chunk, of log_decay (R, G, C, 1 or K) or None, and the stretches between starts (R, C)."""

    def __init__(self, log_decay: Array | None, start: Array | None, size: int):
        self.log_decay, self.size = log_decay, size
        at = jnp.arange(size)
        self.earlier = (at[:, None] >= at[None, :])[None, None]
        self.strictly = ~jnp.eye(size, dtype=bool)[None, None]
        self.first = self.final = None
        if start is not None:
            starts = jnp.where(start, 1.0, 0.0)[:, None, :, None]
            self.earlier = self.earlier & (_between(starts, 0)[..., 0] == 0)
            self.first = jnp.cumsum(starts, axis=2) == 0
            self.final = _after(starts) == 0

    def pairs(self, x: Array, y: Array, *, shift: int = 0, strict: bool = False) -> Array:
        """Σ_n x_in y_jn Π of decays after j up to i − shift, (R, G, C, C), for i > j, or else i ≥ j; 0 elsewhere."""
        log_decay = self.log_decay
        if log_decay is None:
            scores = x @ y.mT
        elif log_decay.shape[-1] == 1:
            scores = (x @ y.mT) * jnp.exp(_between(log_decay, shift)[..., 0])
        else:
            scores = _pairs_by_row(x, y, log_decay, shift)
        earlier = self.earlier & self.strictly if strict else self.earlier
        return jnp.where(earlier, scores, 0)

    def since(self, shift: int = 0) -> Array | float:
        """Π of decays from the first step of the stretch up to i − shift, (R, G, C, K')."""
        if self.log_decay is None:
            return 1.0
        if self.first is None:
            return jnp.exp(jnp.cumsum(_shifted(self.log_decay) if shift else self.log_decay, axis=2))
        counted = self.earlier & self.strictly if shift else self.earlier
        counted = counted.astype(self.log_decay.dtype)
        return jnp.exp(jnp.matmul(counted, self.log_decay, precision=lax.Precision.HIGHEST))

    def of_state(self, x: Array, s: Array, fresh: Array | None, *, shift: int = 0) -> Array:
        """What x reads of the state that its stretch begins with, (R, G, C, V)."""
        x = x * self.since(shift)
        if self.first is None:
            return x @ s
        return jnp.where(self.first, x @ s, 0 if fresh is None else x @ fresh)

    def state(self, s: Array, fresh: Array | None, writes: Sequence[tuple[Array, Array]]) -> Array:
        """The state after the chunk, where `writes` are pairs of (R, G, C, K) and (R, G, C, V)."""
        rest: Array | float = 1.0 if self.log_decay is None else jnp.exp(_after(self.log_decay))
        if self.first is not None and self.final is not None:
            last = self.first[:, :, -1:]
            s = jnp.where(last, s, 0 if fresh is None else fresh)
            rest = jnp.where(self.final, rest, 0)
        if self.log_decay is not None:
            s = jnp.moveaxis(jnp.broadcast_to(self.since(), self.log_decay.shape)[:, :, -1:], 2, 3) * s
        return s + sum((x * rest).mT @ y for x, y in writes)

    def spoil(
        self, written: Array, read: Array, state: Array, ys: Array, reads: Array | None, last: Array
    ) -> tuple[Array, Array | None, Array]:
        """Puts NaN where something depends on steps (R, G, C) or on a state (R, G) that are not finite, and there
        alone.
        """
        first, final = (each if each is None else each[..., 0] for each in (self.first, self.final))
        first, final = (jnp.ones_like(written[:, :1]) if each is None else each for each in (first, final))
        from_state = state[..., None] & first
        at = (self.earlier & written[..., None, :]).any(-1) | from_state
        after = (written & final).any(-1) | (from_state & final)[..., -1]

        def put(flags, array):
            return jnp.where(flags.reshape(flags.shape + (1,) * (array.ndim - flags.ndim)), jnp.nan, array)

        return put(at | read, ys), None if reads is None else put(at, reads), put(after, last)


def _without_nan(part: dict[str, Array]) -> tuple[dict[str, Array], Array, Array]:
    """The arrays (R, G, C, ...) with zeros at steps that are not finite; the steps whose writing or decay that is, and
    those whose reading.

    In a product of matrices their NaN would also come to steps before them, and across starts.
    """

    def bad(name):
        each = part[name]
        flags = jnp.isnan(each) if name == "log_decay" else ~jnp.isfinite(each)  # which may be −∞
        return flags.any(-1) if each.ndim == 4 else flags

    def clean(flags, each):
        return jnp.where(flags.reshape(flags.shape + (1,) * (each.ndim - 3)), 0, each)

    read = bad("q")
    written = functools.reduce(jnp.logical_or, [bad(name) for name in part if name != "q"])
    return {name: clean(read if name == "q" else written, each) for name, each in part.items()}, written, read


def _pairs_by_row(x: Array, y: Array, log_decay: Array, shift: int) -> Array:
    """Σ_n x_in y_jn Π of the decays of row n between two steps, by blocks of steps: inside of a block every product,
    else the products from the begin of i's block, to the end of j's block, and of the blocks between.
    """
    size = x.shape[2]
    block = min(BLOCK, size)

    def cut(array):
        return array.reshape(*array.shape[:2], size // block, block, array.shape[-1])

    x, y, g = cut(x), cut(y), cut(log_decay)
    flat = g.reshape(g.shape[0], g.shape[1] * g.shape[2], *g.shape[3:])
    product = jnp.exp(_between(flat, shift)).reshape(*g.shape[:-1], block, g.shape[-1])
    inside = jnp.sum(x[..., :, None, :] * y[..., None, :, :] * product, axis=-1)
    begun = jnp.cumsum(_shifted(flat) if shift else flat, axis=2).reshape(g.shape)
    x, ended, whole = x * jnp.exp(begun), _after(flat).reshape(g.shape), g.sum(3)
    rows = []
    for i in range(size // block):
        across = jnp.zeros_like(whole[:, :, 0])
        parts = [inside[:, :, i]]
        for j in reversed(range(i)):
            parts.insert(0, x[:, :, i] @ (y[:, :, j] * jnp.exp(ended[:, :, j] + across[:, :, None])).mT)
            across = across + whole[:, :, j]
        rows.append(jnp.pad(jnp.concatenate(parts, -1), [(0, 0)] * 3 + [(0, size - block * (i + 1))]))
    return jnp.concatenate(rows, axis=2)


def _chunk(s: Array, fresh: Array | None, steps: dict[str, Array]) -> tuple[Array, Array, Array | None]:
    """One chunk, with arrays (C, R, G, ...) in the dtype of s: (the state after it, ys, r or None)."""
    steps = dict(steps)
    start = steps.pop("start", None)
    size = steps["q"].shape[0]
    part = {name: jnp.moveaxis(each, 0, 2) for name, each in steps.items()}
    part, written, read = _without_nan(part)
    q, k, v = (part[name] for name in ("q", "k", "v"))
    log_decay = part.get("log_decay")
    chunk = _Chunk(None if log_decay is None else _wide(log_decay), None if start is None else start.T, size)
    lost = ~jnp.isfinite(s).all((-2, -1))
    s = jnp.where(lost[..., None, None], 0, s)
    of_state, reads = functools.partial(chunk.of_state, s=s, fresh=fresh), None
    if (beta := part.get("beta")) is not None:
        beta = beta[..., None]
        kk = chunk.pairs(k, k, strict=True)
        seen = of_state(k)
        e = _inverse(beta * kk) @ (beta * (v - seen))
        reads = seen + kk @ e
        ys, writes = of_state(q) + chunk.pairs(q, k) @ e, [(k, e)]
    elif (u := part.get("u")) is not None:
        w = part["w"]
        seen = chunk.pairs(w, k, shift=1, strict=True) @ v + of_state(w, shift=1)
        reads = _inverse(-chunk.pairs(w, u, shift=1, strict=True)) @ seen
        ys = of_state(q) + chunk.pairs(q, k) @ v + chunk.pairs(q, u) @ reads
        writes = [(k, v), (u, reads)]
    else:
        ys, writes = of_state(q) + chunk.pairs(q, k) @ v, [(k, v)]
    ys, reads, last = chunk.spoil(written, read, lost, ys, reads, chunk.state(s, fresh, writes))
    return last, jnp.moveaxis(ys, 2, 0), None if reads is None else jnp.moveaxis(reads, 2, 0)


def _chunks(tree: PyTree, length: int, reverse: bool, dtype) -> PyTree:
    """(N, C, ...): the steps in the order in which they are processed, cut into chunks, with idle steps at the end."""
    size = chunk_size(length)

    def cut(x):
        x = jnp.flip(x, 0) if reverse else x
        x = jnp.pad(x, [(0, -length % size)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, size, *x.shape[1:]).astype(x.dtype if x.dtype == bool else dtype)

    return jax.tree.map(cut, tree)


def _whole(x: Array, length: int, reverse: bool) -> Array:
    """(T, ...) of chunks (N, C, ...)."""
    x = x.reshape(-1, *x.shape[2:])[:length]
    return jnp.flip(x, 0) if reverse else x


def chunk_size(length: int) -> int:
    """A power of 2."""
    return min(CHUNK, 1 << max(length - 1, 0).bit_length())


def _wide(log_decay: Array) -> Array:
    """(R, G, C, 1 or K), finite: no sum of those of a chunk overflows."""
    log_decay = jnp.maximum(log_decay, -1e30)
    return log_decay if log_decay.ndim == 4 else log_decay[..., None]


def chunked(problem: Problem, *, reverse: bool, save: bool = False) -> Result:
    """In chunks; what is kept for derivatives is the state before each."""
    steps, s, fresh = _split(problem)
    length = problem.v.shape[0]

    @jax.checkpoint
    def body(s, steps):
        new, ys, reads = _chunk(s, fresh, steps)
        return new, (ys.astype(problem.v.dtype), (reads, s) if save else ())

    last, (ys, kept) = lax.scan(body, s, _chunks(steps, length, reverse, s.dtype))
    whole = functools.partial(_whole, length=length, reverse=reverse)
    reads, states = kept or (None, None)
    return Result(whole(ys), last, None if reads is None else whole(reads), states)


# The three programs of the primitives: forward; its derivative, linear in the tangents; and the transpose of that.


def forward(problem: Problem, *, reverse: bool, save: bool) -> Result:
    """The recurrence, and what is kept of it for derivatives."""
    return chunked(problem, reverse=reverse, save=save)


def tangent(problem: Problem, kept: Result, moved: Problem, *, reverse: bool) -> tuple[Array, Array]:
    """The tangents of ys and of the last state; `moved` has None where nothing moves."""
    names = [name for name, each in zip(Problem._fields, moved, strict=True) if each is not None]

    def run(arrays):
        return chunked(problem._replace(**dict(zip(names, arrays, strict=True))), reverse=reverse)[:2]

    given, changes = ([getattr(each, name) for name in names] for each in (problem, moved))
    return jax.jvp(run, (given,), (changes,))[1]


def backward(problem: Problem, kept: Result, d_ys: Array, d_last: Array, *, reverse: bool) -> Problem:
    """The cotangents of all arrays but `start`, chunk by chunk from the last to the first."""
    steps, s, fresh = _split(problem)
    length = d_ys.shape[0]
    start = steps.pop("start", None)
    cut = functools.partial(_chunks, length=length, reverse=reverse, dtype=s.dtype)

    def body(state, inputs):
        d_s, d_fresh = state
        s, moving, start, d_ys = inputs

        def run(s, fresh, moving):
            return _chunk(s, fresh, moving if start is None else moving | {"start": start})[:2]

        d_s, more, d_moving = jax.vjp(run, s, fresh, moving)[1]((d_s, d_ys))
        return (d_s, jax.tree.map(jnp.add, d_fresh, more)), d_moving

    first = d_last, jax.tree.map(jnp.zeros_like, fresh)
    inputs = kept.states, cut(steps), cut(start), cut(d_ys)
    (d_s, d_fresh), found = lax.scan(body, first, inputs, reverse=True)
    whole = {name: _whole(each, length, reverse) for name, each in found.items()}
    return Problem(s=d_s, fresh=d_fresh, **whole)
