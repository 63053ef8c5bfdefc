"""The time loop: one `lax.scan` with fresh starts, invalid steps, direction and rematerialisation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn.engines.arrays import select, zero_where_not
from jaxrnn.engines.choose import by_platform


def starts(reset: Array | None, valid: Array | None, reverse: bool) -> Array | None:
    """Which steps start from the fresh carry, (T, *batch), or None.

    `reset[t]` is a boundary before the valid step t. Forward, t itself starts fresh; in reverse, the valid step before
    the boundary does, because it is the first that is processed on its side.
    """
    if reset is None:
        return None
    if valid is not None:
        reset = reset & valid
    if not reverse or reset.shape[0] == 0:
        return reset
    length = reset.shape[0]
    time = jnp.arange(length).reshape((length,) + (1,) * (reset.ndim - 1))
    index = jnp.broadcast_to(time, reset.shape)
    if valid is not None:
        index = jnp.where(valid, index, length)
    following = jnp.concatenate([lax.cummin(index, axis=0, reverse=True)[1:], jnp.full_like(index[:1], length)])
    start = jnp.take_along_axis(reset, jnp.minimum(following, length - 1), axis=0) & (following < length)
    return start if valid is None else start & valid


def time_loop(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    *,
    fresh: Any,
    valid: Array | None,
    reset: Array | None,
    reverse: bool,
    remat_every: int | None,
    prepare: Callable[[Any], Any] | None = None,
) -> tuple[Any, Any]:
    """`lax.scan` of `step(carry, x) -> (carry, y)` over the first axis of `xs`.

    With `prepare` it is `step(carry, prepare(x))`, and the platform decides: a CPU has in its cache what it prepares
    step by step, accelerators prepare all steps at once, in one large product.

    An invalid step is computed from the fresh carry and discarded by selection, so that whatever the carry holds there,
    nothing of it reaches a gradient.
    """
    start = starts(reset, valid, reverse)

    def scan(carry, inputs, ahead=None, within=None):
        def body(carry, inputs):
            x, valid, start = inputs
            x = x if within is None else within(x)
            keep = valid if start is None else ~start if valid is None else valid & ~start
            new, y = step(carry if keep is None else select(keep, carry, fresh), x)
            if valid is not None:
                new, y = select(valid, new, carry), zero_where_not(valid, y)
            return new, y

        xs, valid, start = inputs
        xs = xs if ahead is None else ahead(xs)
        return lax.scan(body, carry, (xs, valid, start), reverse=reverse)

    def prepared(carry, inputs):
        each, all_at_once = functools.partial(scan, within=prepare), functools.partial(scan, ahead=prepare)
        return by_platform(carry, inputs, cpu=each, default=all_at_once)

    return in_chunks(scan if prepare is None else prepared, carry, (xs, valid, start), reverse, remat_every)


def in_chunks(
    scan: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, reverse: bool, every: int | None
) -> tuple[Any, Any]:
    """`scan(carry, xs) -> (carry, ys)`, storing for the backward pass one carry every `every` steps."""
    if every is None:
        return scan(carry, xs)
    length = jax.tree.leaves(xs)[0].shape[0]
    whole = length - length % every
    chunks = jax.tree.map(lambda x: x[:whole].reshape(whole // every, every, *x.shape[1:]), xs)
    rest = jax.tree.map(lambda x: x[whole:], xs)

    def run_chunks(carry):
        carry, ys = lax.scan(jax.checkpoint(scan), carry, chunks, reverse=reverse)
        return carry, jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)

    if reverse:
        carry, last = jax.checkpoint(scan)(carry, rest)
        carry, first = run_chunks(carry)
    else:
        carry, first = run_chunks(carry)
        carry, last = jax.checkpoint(scan)(carry, rest)
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, last)


def final_index(valid: Array, reverse: bool) -> Array:
    """The index of the valid step that is processed last, (*batch,); 0 where there is none."""
    if valid.shape[0] == 0:
        return jnp.zeros(valid.shape[1:], int)
    if reverse:
        return jnp.argmax(valid, axis=0)
    index = valid.shape[0] - 1 - jnp.argmax(valid[::-1], axis=0)
    return jnp.where(valid.any(0), index, 0)


def final(tree: Any, valid: Array | None, reverse: bool) -> Any:
    """The leaves (T, *batch, ...) at the valid step that is processed last; T ≥ 1."""
    if valid is None:
        return jax.tree.map(lambda leaf: leaf[0 if reverse else -1], tree)
    index = final_index(valid, reverse)

    def pick(leaf, index):
        return leaf[index]

    for _ in range(index.ndim):
        pick = jax.vmap(pick, in_axes=(1, 0))
    return jax.tree.map(lambda leaf: pick(leaf, index), tree)
