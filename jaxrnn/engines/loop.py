"""The time loop: `lax.scan` with fresh starts, invalid steps, direction and rematerialisation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn.engines.arrays import select, widened, zero_where_not
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
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    params: Any,
    carry: Any,
    xs: Any,
    *,
    fresh: Any,
    valid: Array | None,
    start: Array | None,
    reverse: bool,
    prepare: Callable[[Any, Any], Any] | None = None,
) -> tuple[Any, Any]:
    """`lax.scan` of `step(params, carry, x) -> (carry, y)`, whose cotangents of params are summed in at least float32.

    With `prepare` it is `step(params, carry, prepare(params, x))`, and the platform decides: a CPU has in its cache
    what it prepares step by step, accelerators prepare all steps at once, in one large product.

    An invalid step is computed from the fresh carry and discarded by selection, so that whatever the carry holds there,
    nothing of it reaches a gradient.
    """
    wide, back = widened((params, fresh))

    def scan(carry, inputs, ahead=None, within=None):
        def body(carry, inputs):
            params, fresh = back(wide)
            x, valid, start = inputs
            x = x if within is None else within(params, x)
            keep = valid if start is None else ~start if valid is None else valid & ~start
            new, y = step(params, carry if keep is None else select(keep, carry, fresh), x)
            if valid is not None:
                new, y = select(valid, new, carry), zero_where_not(valid, y)
            return new, y

        xs, valid, start = inputs
        xs = xs if ahead is None else ahead(params, xs)
        return lax.scan(body, carry, (xs, valid, start), reverse=reverse)

    inputs = xs, valid, start
    if prepare is None:
        return scan(carry, inputs)
    each, all_at_once = functools.partial(scan, within=prepare), functools.partial(scan, ahead=prepare)
    return by_platform(carry, inputs, cpu=each, default=all_at_once)


def in_chunks(
    scan: Callable[[Any, Any, Any], tuple[Any, Any]],
    constant: Any,
    carry: Any,
    xs: Any,
    reverse: bool,
    every: int | None,
) -> tuple[Any, Any]:
    """`scan(constant, carry, xs) -> (carry, ys)`, storing for the backward pass one carry every `every` steps.

    Cotangents of what is constant are summed over the chunks in at least float32.
    """
    if every is None:
        return scan(constant, carry, xs)
    wide, back = widened(constant)
    length = jax.tree.leaves(xs)[0].shape[0]
    whole = length - length % every
    chunks = jax.tree.map(lambda x: x[:whole].reshape(whole // every, every, *x.shape[1:]), xs)
    rest = jax.tree.map(lambda x: x[whole:], xs)

    @jax.checkpoint
    def run(carry, xs):
        return scan(back(wide), carry, xs)

    def run_chunks(carry):
        carry, ys = lax.scan(run, carry, chunks, reverse=reverse)
        return carry, jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)

    if reverse:
        carry, last = run(carry, rest)
        carry, first = run_chunks(carry)
    else:
        carry, first = run_chunks(carry)
        carry, last = run(carry, rest)
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
