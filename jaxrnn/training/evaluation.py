"""Metrics of a trained model over data of any length."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxrnn.training.feeding import as_source, checked
from jaxrnn.training.losses import CellLoss
from jaxrnn.training.step import TrainState, check_loss, make_eval
from jaxrnn.typing import DTypeLike, Named, PyTree


class Validation(NamedTuple):
    """Held-out data for `fit`, and what decides by them which params are the best.

    data: as the data of `fit`. monitor: the metric that decides. maximize: whether more of it is better.
    patience: stop after so many validations in a row that were no better; None for never. A member of many keeps the
    params of its stopping step while the others go on.
    """

    data: PyTree
    monitor: str = "loss"
    maximize: bool = False
    patience: int | None = None


def evaluate(
    loss: Callable,
    params: PyTree,
    data: PyTree,
    *,
    batch_size: int = 128,
    carry: PyTree = None,
    compute_dtype: DTypeLike | None = None,
    members: bool = False,
) -> Named:
    """The metrics of `loss` over all of `data`, without noise, every batch counting by its weight.

    Args:
      loss: As in `fit`.
      params: The model's.
      data: As in `fit`; arrays stay in their order, and their last batch may be smaller.
      batch_size: As in `fit`; arrays stay in their order, and their last batch may be smaller.
      carry: For a loss that takes one, what the first window starts from.
      compute_dtype: As in `make_step`.
      members: Whether params and carry have an axis of members in front, as `fit` leaves them for many models.

    Returns:
      Every metric as a float; with members as an array (members,).

    Raises:
      ValueError: For targets that the errors of `make_loss` cannot be taken of, a class that there is not for instance.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> from jaxrnn.training import evaluate, make_loss, squared_error
      >>> model = jaxrnn.GRU(1, 1)
      >>> xs = jnp.ones((5, 3, 1))
      >>> sorted(evaluate(make_loss(model, squared_error), model.init(jax.random.key(0)), (xs, xs), batch_size=2))
      ['loss']
    """
    check_loss(loss)
    check_params(params)
    if members:
        check_members(params)
    run = _runner(loss, "data", data, batch_size, members=members, compute_dtype=compute_dtype)
    metrics = run(params, lambda rows: carry)
    return metrics if members else {name: _number(value) for name, value in metrics.items()}


def _number(value):
    return value if isinstance(value, jax.core.Tracer) else float(value)


def evaluator(loss, data, batch_size, *, members: bool, compute_dtype):
    """`(params, carry) -> metrics` as arrays, over data that can be gone through again and again.

    It begins anew, with a carry like the one given.
    """
    if iter_once(data):
        raise TypeError("validation: expected data that can be gone through after every epoch, got an iterator")
    run = _runner(loss, "validation", data, batch_size, members=members, compute_dtype=compute_dtype)
    return lambda params, carry: run(params, lambda rows: _begin(loss, params, carry, rows, members))


def _runner(loss, name, data, batch_size, *, members, compute_dtype):
    """`(params, begin) -> metrics`, where `begin(rows)` is the carry of the first window."""
    step = _step(loss, compute_dtype, members=members)
    source = as_source(name, data, batch_size, None, shuffle=False)
    take = checked(loss, source, "targets" if name == "data" else f"{name}.targets")

    def run(params, begin):
        total = carry = None
        for batch in map(take, source):
            if total is None:
                carry = begin(jax.tree.leaves(batch)[0].shape[0])
            carry, metrics = step(params, carry, batch)
            total = metrics if total is None else jax.tree.map(jnp.add, total, metrics)
        if total is None:
            raise ValueError(f"{name}: expected at least one batch")
        return {name: to_host(metric.value) for name, metric in total.items()}

    return run


@functools.lru_cache(maxsize=16)  # so that the same loss is compiled once
def _step(loss, compute_dtype, *, members: bool):
    step = make_eval(loss, compute_dtype=compute_dtype)
    return jax.jit(jax.vmap(step, in_axes=(0, 0, None)) if members else step)


def check_params(params: PyTree) -> None:
    """They are no state of training."""
    if isinstance(params, TrainState):
        raise TypeError("params: expected the model's, got a TrainState; pass best_params(state), or state.params")


def check_members(params: PyTree) -> None:
    """Every leaf has the same number of members first."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != jnp.shape(leaves[0][1])[0]:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)}: expected an axis of members first, as long as that of "
                f"params{jax.tree_util.keystr(leaves[0][0])} {jnp.shape(leaves[0][1])}, got shape {jnp.shape(leaf)}"
            )


def iter_once(data: PyTree) -> bool:
    """Whether `data` is an iterator, which is used up by one pass."""
    return hasattr(type(data), "__next__")


def to_host(array: PyTree) -> PyTree:
    """`array` in NumPy, unless it is being traced."""
    return array if isinstance(array, jax.core.Tracer) else np.asarray(array)


def _begin(loss, params, carry, rows, members):
    """A carry for so many rows in the dtypes of `carry`: the cell's own, or zeros where the cell is not known."""
    if carry is None:
        return None
    if isinstance(loss, CellLoss):

        def fresh(params):
            return loss.cell.initial_carry(params, (rows,))

        new = (jax.vmap(fresh) if members else fresh)(params)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), new, carry)
    axis = 1 if members else 0
    return jax.tree.map(lambda c: jnp.zeros((*c.shape[:axis], rows, *c.shape[axis + 1 :]), c.dtype), carry)
