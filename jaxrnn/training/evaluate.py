"""Metrics and predictions of a trained model over data of any length."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn.cell import Cell
from jaxrnn.sequence import scan
from jaxrnn.training.batches import Arrays
from jaxrnn.training.feeding import as_source
from jaxrnn.training.ragged import bucket, unpad
from jaxrnn.training.step import make_eval


def evaluate(
    loss: Callable,
    params: Any,
    data: Any,
    *,
    batch_size: int | None = None,
    carry: Any = None,
    compute_dtype: Any = None,
) -> dict[str, float]:
    """The metrics of `loss` over all of `data`, without noise, every batch counting by its weight.

    Args:
      loss: as in `fit`. params: the model's.
      data, batch_size: as in `fit`; arrays stay in their order, and their last batch may be smaller.
      carry: for a loss that takes one, what the first window starts from.
      compute_dtype: as in `make_step`.

        >>> import jax, jax.numpy as jnp, jaxrnn
        >>> from jaxrnn.training import evaluate, make_loss, squared_error
        >>> model = jaxrnn.GRU(1, 1)
        >>> xs = jnp.ones((5, 3, 1))
        >>> sorted(evaluate(make_loss(model, squared_error), model.init(jax.random.key(0)), (xs, xs), batch_size=2))
        ['loss']
    """
    step = _step(loss, compute_dtype, members=False)
    total = None
    for batch in as_source("data", data, batch_size, None, shuffle=False):
        carry, metrics = step(params, carry, batch)
        total = metrics if total is None else jax.tree.map(jnp.add, total, metrics)
    if total is None:
        raise ValueError("data: expected at least one batch")
    return {name: float(metric.value) for name, metric in total.items()}


@functools.lru_cache(maxsize=16)  # so that the same loss is compiled once
def _step(loss, compute_dtype, *, members: bool):
    step = make_eval(loss, compute_dtype=compute_dtype)
    return jax.jit(jax.vmap(step, in_axes=(0, 0, None)) if members else step)


def evaluator(loss, data, batch_size, *, members: bool, compute_dtype):
    """`(params, carry) -> metrics` as arrays, over data that can be gone through again and again."""
    if iter_once(data):
        raise TypeError("validation: expected data that can be gone through after every epoch, got an iterator")
    step = _step(loss, compute_dtype, members=members)
    axis = 1 if members else 0

    def run(params, carry):
        total = None
        for batch in as_source("validation", data, batch_size, None, shuffle=False):
            if total is None and carry is not None:
                carry = _zeros(carry, jax.tree.leaves(batch)[0].shape[0], axis)
            carry, metrics = step(params, carry, batch)
            total = metrics if total is None else jax.tree.map(jnp.add, total, metrics)
        if total is None:
            raise ValueError("validation: expected at least one batch")
        return {name: np.asarray(metric.value) for name, metric in total.items()}

    return run


def iter_once(data: Any) -> bool:
    """Whether `data` is an iterator, which is used up by one pass."""
    return hasattr(type(data), "__next__")


def _zeros(carry, rows, axis):
    return jax.tree.map(lambda c: jnp.zeros((*c.shape[:axis], rows, *c.shape[axis + 1 :]), c.dtype), carry)


@jax.jit
def _outputs(cell, params, xs, lengths):
    return scan(cell, params, None, xs, lengths=lengths, time_axis=1)[1]


def predict(cell: Cell, params: Any, xs: Any, *, lengths: Any = None, batch_size: int = 128) -> Any:
    """What `cell` puts out for every row of `xs`, without noise.

    Args:
      cell, params: the model.
      xs: (N, T, ...), or a pytree of such; or a list of N sequences (T_i, ...) of any lengths, which are padded to few
        shapes.
      lengths: integers (N,) for arrays.
      batch_size: rows per jitted call; the last one is filled up, so that it needs no program of its own.

    Returns:
      NumPy arrays (N, T, ...), or (N, ...) from a cell that ends time; for a list and a cell that does not, a list of N
      arrays (T_i, ...). In the order of xs.

        >>> import jax, numpy as np, jaxrnn
        >>> model = jaxrnn.GRU(3, 4)
        >>> ys = predict(model, model.init(jax.random.key(0)), [np.ones((7, 3)), np.ones((2, 3))])
        >>> [y.shape for y in ys]
        [(7, 4), (2, 4)]
    """
    if isinstance(xs, list):
        return _predict_list(cell, params, xs, lengths, batch_size)
    xs = jax.tree.map(np.asarray, xs)
    if not jax.tree.leaves(xs) or jax.tree.leaves(xs)[0].shape[:1] == (0,):
        return jax.tree.map(np.asarray, _outputs(cell, params, xs, lengths))
    parts = []
    for rows, length in Arrays((xs, None if lengths is None else np.asarray(lengths)), batch_size, shuffle=False):
        count = jax.tree.leaves(rows)[0].shape[0]
        missing = batch_size - count if parts else 0  # a single call has the shape of the data
        ys = _outputs(cell, params, *_filled((rows, length), missing))
        parts.append(_first(count, ys))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _filled(tree, missing):
    """The last row repeated so many times more."""
    return jax.tree.map(lambda leaf: np.concatenate([leaf, np.repeat(leaf[-1:], missing, 0)]), tree)


def _first(count, tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], tree)


def _predict_list(cell, params, sequences, lengths, batch_size):
    if lengths is not None:
        raise ValueError("lengths: expected None for a list of sequences, which have their own")
    out: list[Any] = [None] * len(sequences)
    for indices, padded, length in bucket(sequences, batch_size):
        ys = predict(cell, params, padded, lengths=length, batch_size=batch_size)
        rows = _rows(ys, len(indices)) if cell.ends_time else unpad(ys, length)
        for index, row in zip(indices, rows, strict=True):
            out[index] = row
    return jax.tree.map(lambda *leaves: np.stack(leaves), *out) if cell.ends_time else out


def _rows(tree, count):
    return [jax.tree.map(lambda leaf: leaf[k], tree) for k in range(count)]  # noqa: B023
