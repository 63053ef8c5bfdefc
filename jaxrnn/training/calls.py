"""The compiled calls of training: several steps at once, and the comparison after a validation."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn.training.placement import Placement
from jaxrnn.training.step import better, keep_if, make_update


@functools.lru_cache(maxsize=16)  # so that a second `fit` with the same loss and optimizer does not compile again
def make_chunk(
    loss, optimizer, accumulate, compute_dtype, *, members: bool, halt: bool, where: Placement | None
) -> Callable:
    """Makes `chunk(state, batches, real) -> (state, (metrics, bad, live))`, jitted: one step per `real` batch.

    A step that is not finite is not taken, and with `halt` the state is then stopped. `live` says which steps were
    tried.
    """
    update = make_update(loss, optimizer, accumulate=accumulate, compute_dtype=compute_dtype, placement=where)

    def one(state, batch):
        live = ~state.stopped
        new, metrics, bad = update(state, batch)
        after = keep_if(live & (bad < 0), new, state)
        if halt:
            after = after._replace(stopped=state.stopped | (bad >= 0))
        else:
            after = after._replace(step=jnp.where(live, new.step, state.step))
        values = {name: jnp.where(live, metric.value, jnp.nan) for name, metric in metrics.items()}
        sums = jax.tree.map(lambda leaf: jnp.where(live, leaf, jnp.zeros_like(leaf)), metrics)
        return after, (values, jnp.where(live, bad, -1), live, sums)

    each = jax.vmap(one, in_axes=(0, None)) if members else one
    if where is not None:
        each = _kept(where.by_member(each) if members else each, where)

    def chunk(state, batches, real):
        def body(state, inputs):
            batch, real = inputs
            nothing = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(each, state, batch)[1]
            )
            return lax.cond(real, lambda state: each(state, batch), lambda state: (state, nothing), state)

        return lax.scan(body, state, (batches, real))

    return jax.jit(chunk if where is None else _kept(chunk, where), donate_argnums=0)


def _kept(train: Callable, where: Placement) -> Callable:
    """`train(state, ...) -> (state, measured)` with a state that lies as before, and numbers that all devices have."""

    def run(state, *data):
        state, measured = train(state, *data)
        return where.keep(state), where.whole(measured)

    return run


@functools.lru_cache(maxsize=16)
def make_compare(maximize: bool, patience: int | None, *, members: bool, where: Placement | None) -> Callable:
    """Makes `compare(state, value) -> state`, jitted, which is called after a validation."""
    compare = functools.partial(better, maximize=maximize, patience=patience)
    each = jax.vmap(compare) if members else compare
    return jax.jit(each if where is None else lambda state, value: where.keep(each(state, value)))
