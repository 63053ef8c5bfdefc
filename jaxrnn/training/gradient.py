"""The value, gradient and metrics of a batch: of its parts one after the other, and of its rows on many devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn.engines.arrays import accumulator, cast, inexact
from jaxrnn.training.batches import Batch
from jaxrnn.training.errors import Mean
from jaxrnn.training.losses import CellLoss
from jaxrnn.training.placement import Placement
from jaxrnn.typing import DTypeLike, Named, PyTree


def make_gradient(
    loss: Callable, accumulate: int, compute_dtype: DTypeLike | None, placement: Placement | None
) -> Callable[..., tuple[Array, PyTree, PyTree, Named]]:
    """Makes `(params, carry, batch, key) -> (value, gradient, carry, metrics)`."""

    def value_and_gradient(params, carry, batch, key):
        def run(params):
            narrow, inputs = _narrow(params, batch, compute_dtype)
            value, after, metrics = _call(loss, narrow, carry, inputs, key)
            return value, (after, metrics)

        (value, (after, metrics)), gradient = jax.value_and_grad(run, has_aux=True)(params)
        return value, gradient, after, metrics

    def weighted(params, carry, batch, key):
        """((value, gradient, metrics, weight), carry), where value and gradient count by the weight."""
        value, gradient, after, metrics = value_and_gradient(params, carry, batch, key)
        weight = _weight(metrics)
        scaled = jax.tree.map(lambda g: g * weight.astype(g.dtype), gradient)
        return (value * weight.astype(value.dtype), scaled, metrics, weight), after

    def summed(params, carry, batch, key):
        """The sums of what `weighted` gives for the parts of the batch, and the carry."""
        if accumulate == 1:
            return weighted(params, carry, batch, key)
        parts = jax.tree.map(lambda leaf: _split(leaf, accumulate), (carry, batch))

        def add(total, inputs):
            k, carry, batch = inputs
            new, after = weighted(params, carry, batch, jax.random.fold_in(key, k))
            return jax.tree.map(jnp.add, total, new), after

        index = jnp.arange(accumulate)
        first = jax.tree.map(lambda leaf: leaf[0], (index, *parts))
        shapes = jax.eval_shape(lambda _, carry, batch: weighted(params, carry, batch, key)[0], *first)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, after = lax.scan(add, zeros, (index, *parts))
        return total, jax.tree.map(_unsplit, after)

    def run(params, carry, batch, key):
        """The value, gradient, carry and metrics of the batch."""
        apart = placement is not None and _rows_apart(placement, loss, batch, accumulate)
        if accumulate == 1 and not apart:
            return value_and_gradient(params, carry, batch, key)
        sums: Callable[..., Any] = placement.by_rows(summed) if placement is not None and apart else summed
        (value, gradient, metrics, weight), after = sums(params, carry, batch, key)
        weight = jnp.where(weight == 0, jnp.ones_like(weight), weight)
        value, gradient = jax.tree.map(lambda leaf: leaf / weight.astype(leaf.dtype), (value, gradient))
        return value, gradient, after, metrics

    def placed(params, carry, batch, key):
        """`run` with whole params and divided rows; the gradient is divided as the params are."""
        assert placement is not None
        carry, batch = placement.divided_rows((carry, batch))
        value, gradient, after, metrics = run(placement.whole(params), carry, batch, key)
        return value, placement.divided(gradient), after, metrics

    return run if placement is None or placement.members else placed


def measured(
    loss: Callable,
    params: PyTree,
    carry: PyTree,
    batch: PyTree,
    compute_dtype: DTypeLike | None,
    placement: Placement | None,
) -> tuple[PyTree, Named]:
    """The carry and the metrics of a batch, without noise."""

    def run(params, carry, batch):
        params, batch = _narrow(params, batch, compute_dtype)
        _, carry, metrics = _call(loss, params, carry, batch, None)
        return metrics, carry

    if placement is not None and not placement.members:
        carry, batch, params = *placement.divided_rows((carry, batch)), placement.whole(params)
        if _rows_apart(placement, loss, batch, noise=False):
            run = placement.by_rows(run)
    metrics, carry = run(params, carry, batch)
    return carry, metrics


def _rows_apart(
    placement: Placement, loss: Callable, batch: PyTree, accumulate: int = 1, *, noise: bool = True
) -> bool:
    """Whether every device can run the loss for its own rows, with the same result as of the whole batch."""
    if placement.members or not isinstance(loss, CellLoss) or not loss.of_rows(batch, noise=noise):
        return False
    return all(leaf.shape[0] % (placement.mesh.size * accumulate) == 0 for leaf in jax.tree.leaves(batch))


def _narrow(params, batch, dtype):
    if dtype is None:
        return params, batch
    if isinstance(batch, Batch):
        return cast(params, dtype), batch._replace(xs=_cast_arrays(batch.xs, dtype))
    return cast(params, dtype), _cast_arrays(batch, dtype)


def _cast_arrays(tree, dtype):
    return cast(jax.tree.map(jnp.asarray, tree), dtype)


def _call(loss, params, carry, batch, key) -> tuple[Array, PyTree, Named]:
    """Calls a loss of either kind: (scalar, carry, metrics)."""
    result = loss(params, batch, key) if carry is None else loss(params, carry, batch, key)
    match result:
        case (value, dict(metrics)) if carry is None:
            pass
        case (value, (carry, dict(metrics))) if carry is not None:
            pass
        case _:
            wanted = "(scalar, metrics)" if carry is None else "(scalar, (carry, metrics)), since the state has a carry"
            raise TypeError(f"loss: expected it to return {wanted}, metrics a dict; got {jax.tree.structure(result)}")
    value = jnp.asarray(value)
    if value.ndim or not inexact(value):
        raise TypeError(f"loss: expected a floating scalar, got {value.dtype}{list(value.shape)}")
    return value, carry, _metrics(value, metrics)


def _metrics(value: Array, metrics: Named) -> Named:
    """Returns the metrics with scalars as `Mean`s, and the loss among them."""
    metrics = {"loss": value, **metrics}

    def as_metric(metric):
        if isinstance(metric, tuple):
            return metric
        metric = jnp.asarray(metric)
        metric = metric.astype(accumulator(metric.dtype) if inexact(metric) else accumulator())
        return Mean(metric, jnp.ones_like(metric))

    return {name: as_metric(metric) for name, metric in metrics.items()}


def _weight(metrics):
    return jnp.asarray(metrics["loss"].weight)


def _split(leaf, parts):
    """The rows r, r + parts, ... for every r < parts: of divided rows, each part is on all devices."""
    leaf = jnp.asarray(leaf)
    if leaf.ndim == 0 or leaf.shape[0] % parts:
        raise ValueError(f"accumulate: {parts} parts do not divide a batch of shape {leaf.shape}")
    return leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)


def _unsplit(leaf):
    return leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:])
