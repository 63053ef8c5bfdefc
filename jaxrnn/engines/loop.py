"""The time loop: `lax.scan` with fresh starts, invalid steps, a direction and gradient checkpointing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from jaxrnn.engines.arrays import select, widened, zero_where_not
from jaxrnn.engines.walk import Flags, Walk, by_platform
from jaxrnn.typing import PyTree


def time_loop(
    step: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    *,
    fresh: PyTree,
    flags: Flags,
    reverse: bool,
    platform: str | None,
    prepare: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> tuple[PyTree, PyTree]:
    """Runs `lax.scan` of `step(params, carry, x) -> (carry, y)`; cotangents of params are summed in at least float32.

    With `prepare`, it runs `step(params, carry, prepare(params, x))`, and the platform decides: a CPU prepares step by
    step, so that the result is in its cache; accelerators prepare all steps at once, in one large product. GPUs write
    results of one shape and dtype as one array, since each is a kernel of its own.

    An invalid step is computed from the fresh carry and discarded by selection. So no value that the carry holds there
    reaches a gradient.
    """
    wide, back = widened((params, fresh))

    def scan(carry, inputs, ahead=None, within=None, stacked=False):
        def body(carry, inputs):
            params, fresh = back(wide)
            x, valid, follows = inputs
            x = x if within is None else within(params, x)
            new, y = step(params, carry if follows is None else select(follows, carry, fresh), x)
            if valid is not None:
                new, y = select(valid, new, carry), zero_where_not(valid, y)
            return new, jnp.stack(jax.tree.leaves(y)) if stacked else y

        xs, flags = inputs
        xs = xs if ahead is None else ahead(params, xs)
        return lax.scan(body, carry, (xs, flags.valid, flags.follows), reverse=reverse)

    def scan_stacked(carry, inputs):
        _, ys = jax.eval_shape(all_at_once, carry, inputs)
        leaves, structure = jax.tree.flatten(ys)
        if len({(leaf.shape, leaf.dtype) for leaf in leaves}) != 1:
            return all_at_once(carry, inputs)
        last, whole = all_at_once(carry, inputs, stacked=True)
        # Of whatever reads a part of it later, none keeps all of it in memory.
        parts = lax.optimization_barrier([whole[:, k] for k in range(len(leaves))])
        return last, jax.tree.unflatten(structure, parts)

    inputs = xs, flags
    if prepare is None:
        return scan(carry, inputs)
    each, all_at_once = functools.partial(scan, within=prepare), functools.partial(scan, ahead=prepare)
    return by_platform(platform, carry, inputs, cpu=each, cuda=scan_stacked, default=all_at_once)


Run = TypeVar("Run", bound=Callable[..., Any])


def compiled_once(run: Run) -> Run:
    """Returns `run(cell, *trees)` that eager calls with an equal cell compile once, for arrays of equal shapes.

    JAX would compile a loop at every call, since its body is a new function each time. A cell with code of the user's
    runs as it is written at every call: a notebook may change the methods of a class.
    """
    compiled = jax.jit(run, static_argnums=0)

    @functools.wraps(run)
    def call(cell, *trees, **named):
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((trees, named)))
        return (compiled if not traced and _is_ours(cell) else run)(cell, *trees, **named)

    return cast(Run, call)


def _is_ours(value: Any) -> bool:
    """Whether no part of a cell's configuration is code of the user's."""
    if isinstance(value, tuple):
        return all(map(_is_ours, value))
    if not dataclasses.is_dataclass(value):
        return not callable(value)
    ours = type(value).__module__.startswith("jaxrnn.")
    return ours and all(_is_ours(getattr(value, field.name)) for field in dataclasses.fields(value))


def in_chunks(
    scan: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    constant: PyTree,
    carry: PyTree,
    xs: PyTree,
    walk: Walk,
) -> tuple[PyTree, PyTree]:
    """Runs `scan(constant, carry, xs) -> (carry, ys)` with gradient checkpointing: it keeps the carry only every
    `remat_every` steps for the backward pass.

    Cotangents of `constant` are summed over the chunks in at least float32.
    """
    every, reverse = walk.remat_every, walk.reverse
    if every is None:
        return scan(constant, carry, xs)
    wide, back = widened(constant)
    length = jax.tree.leaves(xs)[0].shape[0]
    every = every if isinstance(length, int) else 1  # which alone divides a symbol
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
