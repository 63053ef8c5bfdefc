"""The linear recurrence of positive numbers in log space: it takes the logarithms of a and b, and computes no product.

Where decays or inputs lie beyond the range of floats, their logarithms do not. Stretches of steps are joined in pairs,
since the difference of two long sums of logarithms would have lost its digits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxrnn.engines.arrays import select, with_rows_of
from jaxrnn.engines.linear.primitive import CHUNK, ELSEWHERE
from jaxrnn.engines.walk import Flags, Walk, refusals_of_sizes

NOTHING = -1e30  # the logarithm of 0, finite, so that derivatives are
REFUSALS = {"native": "in log space the kernel computes sequences of float32 or float64"}


def log_linear_form(walk: Walk, shape: Sequence[Any], owner: object) -> str | None:
    """Does the same as `linear_form`, in log space."""
    chosen, refusals = walk.choose("linear_scan", REFUSALS | refusals_of_sizes(shape), cell=owner, elsewhere=ELSEWHERE)
    walk.record("linear_scan", chosen, refusals, cell=owner)
    return walk.form("linear_scan", chosen, refusals)


def log_linear_recurrence(
    log_a: Array,
    log_b: Array,
    h: Array,
    *,
    fresh: Array,
    flags: Flags,
    reverse: bool,
    form: str | None,
) -> tuple[Array, Array]:
    """Runs h_t = exp(log_a_t) h_{t-1} + exp(log_b_t) over the first axis: (the last h, all h); the given h has any
    sign.

    Args:
      log_a: The logarithms of a, (T, ...).
      log_b: The logarithms of b, (T, ...).
      h: The state before the first step; sums are in its dtype.
      fresh: The state before a step that starts fresh.
      flags: The flags over leading axes of b.
      reverse: Whether to run from the last step to the first.
      form: The result of `log_linear_form`.
    """
    valid, start = flags
    if log_b.size == 0:
        return h, log_b
    log_a, log_b = log_a.astype(h.dtype), log_b.astype(h.dtype)
    if valid is not None:
        log_a = select(valid, log_a, jnp.zeros_like(log_a))
        log_b = select(valid, log_b, jnp.full_like(log_b, NOTHING))
    begins = jnp.zeros(log_b.shape[:1], bool) if start is None else start
    begins = jnp.broadcast_to(begins.reshape(begins.shape + (1,) * (log_b.ndim - begins.ndim)), log_b.shape)
    begins = with_rows_of(begins, log_b, 0, log_b.ndim)
    steps = log_a, log_b, begins
    if reverse:
        steps = tuple(jnp.flip(each, 0) for each in steps)
    run = FORMS[form] if form else functools.partial(lax.platform_dependent, cpu=FORMS["xla"], default=FORMS[ELSEWHERE])
    found = run(*steps)
    if reverse:
        found = tuple(jnp.flip(each, 0) for each in found)
    log_decay, log_h, begun = found
    hs = jnp.exp(log_decay) * jnp.where(begun, fresh.astype(h.dtype), h) + jnp.exp(log_h)
    return hs[0 if reverse else -1], hs


def _combine(first, second):
    """Joins two stretches of steps: (the sum of log_a and log h from 0, both since a sequence began; whether one
    began).
    """
    (a_1, b_1, begun_1), (a_2, b_2, begun_2) = first, second
    a_1 = jnp.where(begun_2, jnp.zeros_like(a_1), a_1)
    b_1 = jnp.where(begun_2, jnp.full_like(b_1, NOTHING), b_1)
    return a_1 + a_2, jnp.logaddexp(a_2 + b_1, b_2), begun_1 | begun_2


def _neutral(log_a, log_b, begins):
    return jnp.zeros_like(log_a), jnp.full_like(log_b, NOTHING), jnp.zeros_like(begins)


def _sequential(*steps):
    def body(state, step):
        state = _combine(state, step)
        return state, state

    return lax.scan(body, _neutral(*(each[0] for each in steps)), steps)[1]


def _associative(*steps):
    return tuple(lax.associative_scan(_combine, steps))


def _chunked(*steps):
    length = steps[0].shape[0]
    size = min(CHUNK, length)
    missing = -length % size
    more = _neutral(*(jnp.broadcast_to(each[:1], (missing, *each.shape[1:])) for each in steps))
    chunks = [jnp.concatenate(pair).reshape(-1, size, *pair[0].shape[1:]) for pair in zip(steps, more, strict=True)]

    def body(state, chunk):
        found = _combine(tuple(each[None] for each in state), _associative(*chunk))
        return tuple(each[-1] for each in found), found

    found = lax.scan(body, _neutral(*(each[0] for each in steps)), tuple(chunks))[1]
    return tuple(each.reshape(-1, *each.shape[2:])[:length] for each in found)


FORMS = {"xla": _sequential, "associative": _associative, "chunked": _chunked}
