"""Metrics of a trained model over data of any length."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxrnn.training.feeding import as_source, checked, placed_batches
from jaxrnn.training.gradient import measured
from jaxrnn.training.losses import CellLoss
from jaxrnn.training.placement import Placement, placement_on
from jaxrnn.training.processes import in_all
from jaxrnn.training.step import TrainState, check_loss
from jaxrnn.typing import DTypeLike, Named, PyTree


class Validation(NamedTuple):
    """Held-out data for `fit`, and the rule by which they decide which params are the best.

    data: as the data of `fit`. monitor: the metric that decides. maximize: whether a higher value is better.
    patience: the number of validations in a row without improvement after which training stops; None to never stop.
    With many members, one that has stopped keeps the params of that step while the others go on.
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
    mesh: Any = None,
) -> Named:
    """Computes the metrics of `loss` over all of `data`, without noise; every batch counts by its weight.

    Args:
      loss: As in `fit`.
      params: The params of the model.
      data: As in `fit`; arrays stay in their order.
      batch_size: As in `fit`; the last batch of arrays may be smaller.
      carry: For a loss that takes a carry, the one that the first window starts from.
      compute_dtype: As in `make_step`.
      members: Whether params and carry have a leading axis of members, as `fit` returns them for many models.
      mesh: As in `fit`: the devices that divide the rows of every batch among them, or the members.

    Returns:
      Every metric as a float; with `members` as an array (members,).

    Raises:
      ValueError: If an error function of `make_loss` is not defined for the targets, for instance because a class does
        not exist.

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
    where = placement_on(mesh, None, params, params, members=members)
    with contextlib.nullcontext() if where is None else where.running():
        if where is not None:
            params = where.put_params(params)
            carry = jax.tree.map(lambda leaf: where.put(leaf, where.rows(leaf.shape[0])), carry)
        with in_all(several=where is not None and where.processes > 1):
            run = _runner(loss, "data", data, batch_size, members=members, compute_dtype=compute_dtype, where=where)
        metrics = run(params, lambda rows: carry)
    return metrics if members else {name: _number(value) for name, value in metrics.items()}


def _number(value):
    return value if isinstance(value, jax.core.Tracer) else float(value)


def evaluator(loss, data, batch_size, *, members: bool, compute_dtype, where: Placement | None):
    """Makes `(params, carry) -> metrics` with arrays as metrics, over data that can be iterated over repeatedly.

    Each call begins anew, with a fresh carry like the given one.
    """
    if iter_once(data):
        raise TypeError("validation: expected data that can be gone through after every epoch, got an iterator")
    run = _runner(loss, "validation", data, batch_size, members=members, compute_dtype=compute_dtype, where=where)
    return lambda params, carry: run(params, lambda rows: _begin(loss, params, carry, rows, members))


def _runner(loss, name, data, batch_size, *, members, compute_dtype, where):
    """Makes `(params, begin) -> metrics`, where `begin(rows)` is the carry of the first window."""
    step = _step(loss, compute_dtype, members=members, where=where)
    source = as_source(name, data, batch_size, None, shuffle=False, where=where)
    take = checked(loss, source, "targets" if name == "data" else f"{name}.targets", where)

    def run(params, begin):
        total = carry = None
        for batch in placed_batches(map(take, source), where, name):
            if total is None:
                carry = begin(next((leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.ndim), 0))
            carry, metrics = step(params, carry, batch)
            total = metrics if total is None else jax.tree.map(jnp.add, total, metrics)
        if total is None:
            raise ValueError(f"{name}: expected at least one batch")
        return {name: to_host(metric.value) for name, metric in total.items()}

    return run


@functools.lru_cache(maxsize=16)  # so that the same loss is compiled once
def _step(loss, compute_dtype, *, members: bool, where: Placement | None):
    def step(params, carry, batch):
        return measured(loss, params, carry, batch, compute_dtype, where)

    each: Callable[..., Any] = jax.vmap(step, in_axes=(0, 0, None)) if members else step
    if where is None:
        return jax.jit(each)

    def placed(params, carry, batch):
        run = where.by_member(lambda own, batch: each(*own, batch))
        carry, metrics = run((params, carry), batch) if members else each(params, carry, batch)
        return carry, where.whole(metrics)

    return jax.jit(placed)


def check_params(params: PyTree) -> None:
    """They are no state of training."""
    if isinstance(params, TrainState):
        raise TypeError("params: expected the model's, got a TrainState; pass best_params(state), or state.params")
    if hasattr(params, "params"):
        raise TypeError(f"params: expected the model's, got a {type(params).__name__}; pass its .params")


def check_members(params: PyTree) -> None:
    """Checks that every leaf has a leading axis with the same number of members."""
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
    """Converts `array` to NumPy, unless it is traced."""
    return array if isinstance(array, jax.core.Tracer) else np.asarray(array)


def _begin(loss, params, carry, rows, members):
    """A carry for `rows` rows in the dtypes of `carry`: the cell's own, or zeros where the cell is not known."""
    if carry is None:
        return None
    if isinstance(loss, CellLoss):

        def fresh(params):
            return loss.cell.initial_carry(params, (rows,))

        new = (jax.vmap(fresh) if members else fresh)(params)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), new, carry)
    axis = 1 if members else 0
    return jax.tree.map(lambda c: jnp.zeros((*c.shape[:axis], rows, *c.shape[axis + 1 :]), c.dtype), carry)
