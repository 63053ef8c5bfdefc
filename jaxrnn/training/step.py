"""One step of training, as a pure function of a state and a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxrnn import check
from jaxrnn.cell import Cell
from jaxrnn.engines.arrays import select
from jaxrnn.training.errors import Mean
from jaxrnn.training.gradient import make_gradient, measured
from jaxrnn.training.placement import Placement
from jaxrnn.typing import DTypeLike, Named, PyTree


class Best(NamedTuple):
    """The params of the best validation, its value and step, and the number of later ones that were no better."""

    params: PyTree
    value: Any
    step: Array
    stale: Array


class TrainState(NamedTuple):
    """Everything that training changes; every function of training takes a state and returns one.

    params, opt_state: the params of the model and the state of the optimizer.
    carry: the carry from which the next window of truncated backpropagation through time begins, leaves (B, ...); None
    for whole sequences.
    step: the number of steps taken, int32.
    key: the key for noise; step t draws from `fold_in(key, t)`.
    data: the position in the data, kept by `fit`; None to begin anew.
    best: the best validation so far, kept by `fit`; None before the first validation.
    stopped: whether training ended here, by early stopping or at the last finite step.

    With a leading axis of members on every leaf it is the state of many models at once, see `fit`.
    """

    params: PyTree
    opt_state: Any
    carry: PyTree
    step: Array
    key: Array
    data: PyTree = None
    best: Best | None = None
    stopped: Any = False


def train_state(
    params: PyTree, optimizer: optax.GradientTransformation, key: Array, *, carry: PyTree = None
) -> TrainState:
    """Makes the state before the first step.

    Args:
      params: The params of the model.
      optimizer: Any Optax optimizer.
      key: A key for the noise of all steps.
      carry: For truncated backpropagation through time, the carry of the first window,
        `cell.initial_carry(params, (B,))`.

    Examples:
      >>> import jax, jaxrnn, optax
      >>> model = jaxrnn.GRU(3, 4)
      >>> state = train_state(model.init(jax.random.key(0)), optax.adam(1e-3), jax.random.key(1))
      >>> state.step
      Array(0, dtype=int32)
    """
    check_optimizer(optimizer)
    if not isinstance(key, jax.Array):
        raise TypeError(f"key: expected a jax.random key, got {check.brief(key)}; jax.random.key(0) makes one")
    if isinstance(params, Cell):
        raise TypeError(f"params: expected those that {type(params).__name__}(...).init(key) returns, got the cell")
    step, stopped = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    return TrainState(params, optimizer.init(params), carry, step, key, stopped=stopped)


def best_params(state: TrainState) -> PyTree:
    """The params of the best validation so far, or the last ones where there was no validation.

    Examples:
      >>> import jax, jaxrnn, optax
      >>> model = jaxrnn.GRU(3, 4)
      >>> state = train_state(model.init(jax.random.key(0)), optax.adam(1e-3), jax.random.key(1))
      >>> best_params(state) is state.params
      True
    """
    check_state(state)
    return state.params if state.best is None else state.best.params


def check_state(state: Any) -> None:
    """It is a `TrainState`."""
    if not isinstance(state, TrainState):
        raise TypeError(f"state: expected a TrainState, as train_state makes it, got {type(state).__name__}")


def check_optimizer(optimizer: Any) -> None:
    """It is one of Optax."""
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        raise TypeError(f"optimizer: expected one of Optax, such as optax.adam(1e-3), got {check.brief(optimizer)}")


def check_loss(loss: Any) -> None:
    """It is a function, and no cell."""
    if isinstance(loss, Cell) or not callable(loss):
        raise TypeError(f"loss: expected a function, such as make_loss(cell, error) returns, got {check.brief(loss)}")
    if getattr(loss, "__module__", None) == Mean.__module__:
        raise TypeError(
            f"loss: expected a function of params and batches, got {loss.__name__}, an error of outputs; "
            f"pass make_loss(cell, {loss.__name__})"
        )


def make_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    compute_dtype: DTypeLike | None = None,
) -> Callable[[TrainState, PyTree], tuple[TrainState, Named]]:
    """Makes `step(state, batch) -> (state, metrics)`, a pure function for the caller to jit, vmap or shard.

    The metrics hold "gradient_norm" beside the metrics of the loss.

    Args:
      loss: A function `(params, batch, key) -> (scalar, metrics)`; if the state has a carry,
        `(params, carry, batch, key) -> (scalar, (carry, metrics))`. Metrics are a dict of `Mean`s, of other NamedTuples
        of sums with a `value`, or of scalars. The weight of the entry "loss", if there is one, is the total weight over
        which the scalar is a mean.
      optimizer: Any Optax optimizer.
      accumulate: The number of parts of the batch over which the gradient is accumulated, one after the other. The
        parts count by the weight of their loss, so the gradient is that of the whole batch, padding included.
      compute_dtype: For instance `jnp.bfloat16`. The params and the floating leaves of the batch (for a `Batch`, only
        its xs) are cast to it for the forward and the backward pass; params, carry and optimizer state keep their
        dtypes in the state.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn, optax
      >>> from jaxrnn.training import make_loss, squared_error
      >>> model, optimizer = jaxrnn.GRU(3, 4), optax.adam(1e-3)
      >>> step = jax.jit(make_step(make_loss(model, squared_error), optimizer))
      >>> state = train_state(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
      >>> state, metrics = step(state, (jnp.ones((5, 7, 3)), jnp.ones((5, 7, 4))))
      >>> sorted(metrics)
      ['gradient_norm', 'loss']
    """
    update = make_update(loss, optimizer, accumulate=accumulate, compute_dtype=compute_dtype)

    def step(state, batch):
        state, metrics, _ = update(state, batch)
        return state, metrics

    return step


def make_eval(
    loss: Callable, *, compute_dtype: DTypeLike | None = None
) -> Callable[[PyTree, PyTree, PyTree], tuple[PyTree, Named]]:
    """Makes `evaluate(params, carry, batch) -> (carry, metrics)` without noise; carry is None for a loss without one.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> from jaxrnn.training import make_eval, make_loss, squared_error
      >>> model, xs = jaxrnn.GRU(1, 1), jnp.ones((2, 3, 1))
      >>> evaluate = jax.jit(make_eval(make_loss(model, squared_error)))
      >>> carry, metrics = evaluate(model.init(jax.random.key(0)), None, (xs, xs))
      >>> sorted(metrics)
      ['loss']
    """

    def evaluate(params, carry, batch):
        return measured(loss, params, carry, batch, compute_dtype, None)

    return evaluate


def make_update(loss, optimizer, *, accumulate=1, compute_dtype=None, placement: Placement | None = None):
    """Makes `(state, batch) -> (state, metrics, bad)`: `make_step` with the place of the first leaf that is not finite.

    `bad` is −1 if all is finite, 0 for the loss itself, and 1 + k for the gradient of leaf k of the params.
    """
    accumulate = check.integer("accumulate", accumulate)
    check_loss(loss)
    check_optimizer(optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    gradient_of = make_gradient(loss, accumulate, compute_dtype, placement)

    def update(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        value, gradient, carry, metrics = gradient_of(state.params, state.carry, batch, key)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params, value=value)
        params = optax.apply_updates(state.params, updates)
        metrics["gradient_norm"] = Mean(optax.tree.norm(gradient), jnp.ones((), value.dtype))
        new = state._replace(params=params, opt_state=opt_state, carry=carry, step=state.step + 1)
        return new, metrics, first_bad(value, gradient)

    return update


def first_bad(value: Array, gradient: Any) -> Array:
    """The place of the first leaf of (value, *gradient) with a number that is not finite, or −1."""
    bad = jnp.stack([~jnp.isfinite(leaf).all() for leaf in (value, *jax.tree.leaves(gradient))])
    return jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)


def keep_if(flag: Array, new: TrainState, old: TrainState) -> TrainState:
    """`new` where `flag` is true, else `old`; the key and the fields of the host never change within a step."""

    def pick(a, b):
        return jax.tree.map(lambda a, b: jnp.where(flag, a, b), a, b)

    names = "params", "opt_state", "carry", "step"
    return new._replace(**{name: pick(getattr(new, name), getattr(old, name)) for name in names})


def better(state: TrainState, value: Array, *, maximize: bool, patience: int | None) -> TrainState:
    """Updates the state after a validation with `value`: the best params, and whether patience has run out.

    A member that has stopped keeps its best params.
    """
    best = state.best
    assert best is not None
    improved = (value > best.value if maximize else value < best.value) & ~state.stopped
    stale = jnp.where(improved, 0, best.stale + (~state.stopped).astype(best.stale.dtype))
    params = select(improved, state.params, best.params)
    best = Best(params, jnp.where(improved, value, best.value), jnp.where(improved, state.step, best.step), stale)
    stopped = state.stopped if patience is None else state.stopped | (stale >= patience)
    return state._replace(best=best, stopped=stopped)
