"""Losses and metrics as sums with a weight, so that batches of any size and padding add up exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxrnn import check
from jaxrnn.cell import Cell, input_size, output_size
from jaxrnn.engines.arrays import accumulator, inexact, zero_where_not
from jaxrnn.engines.walk import Implementation
from jaxrnn.sequence import scan
from jaxrnn.training.batches import Batch
from jaxrnn.training.targets import Check, chances, classes, finite, is_chance
from jaxrnn.typing import PyTree


class Mean(NamedTuple):
    """A weighted mean that is still to be added up: value = total / weight, or 0 where the weight is 0.

    A metric is any NamedTuple of sums with a `value`; the metrics of several batches are added field by field.

    Examples:
      >>> float(Mean(6.0, 3.0).value)
      2.0
    """

    total: Any
    weight: PyTree

    @property
    def value(self) -> Array:
        return jnp.where(self.weight == 0, 0, self.total / jnp.where(self.weight == 0, 1, self.weight))


class Perplexity(NamedTuple):
    """The exponential of a mean cross-entropy: value = exp(total / weight)."""

    total: Any
    weight: PyTree

    @property
    def value(self) -> Array:
        return jnp.exp(Mean(self.total, self.weight).value)


Metric = Mean | Perplexity
Error = Callable[[Array, Array, Array | None], Mean]


def mean(values: Array, mask: Array | None = None) -> Mean:
    """The mean over all entries of `values`, or over those where `mask`, which has its first axes, is true.

    Examples:
      >>> import jax.numpy as jnp
      >>> mean(jnp.array([[1.0, 3.0], [9.0, 9.0]]), jnp.array([True, False])).value
      Array(2., dtype=float32)
    """
    wide = accumulator(values.dtype) if inexact(values) else accumulator()
    if mask is None:
        return Mean(values.sum(dtype=wide), jnp.asarray(values.size, wide))
    if mask.shape != values.shape[: mask.ndim]:
        raise ValueError(f"mask: expected shape {values.shape[: mask.ndim]}, axes of the values, got {mask.shape}")
    each = values.size // mask.size if mask.size else 0
    return Mean(zero_where_not(mask, values).sum(dtype=wide), mask.sum(dtype=wide) * each)


def cross_entropy(logits: Array, targets: Array, mask: Array | None = None) -> Mean:
    """The average of −log softmax(logits)[target].

    Args:
      logits: The logits (..., C).
      targets: Classes (...), integers in [0, C); other integers give NaN. Or probabilities (..., C), such as one-hot
        rows.
      mask: bool, with the first axes of the targets: True for the entries that count. NaN and invalid targets elsewhere
        reach neither the value nor the gradient.

    Examples:
      >>> import jax.numpy as jnp
      >>> cross_entropy(jnp.zeros((5, 4)), jnp.array([0, 1, 2, 3, 0])).value.round(4)
      Array(1.3863, dtype=float32)
    """
    logits, targets, mask = _masked(logits, targets, mask)
    if inexact(targets):
        _probability_shape(logits, targets)
        return mean(optax.softmax_cross_entropy(logits, targets.astype(logits.dtype)), mask)
    targets = _classes(logits, targets)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    # An integer out of range would otherwise be wrapped or clipped in silence.
    return mean(_known((targets >= 0) & (targets < logits.shape[-1]), losses), mask)


def binary_cross_entropy(logits: Array, targets: Array, mask: Array | None = None) -> Mean:
    """The average of −t log σ(logit) − (1 − t) log(1 − σ(logit)).

    Args:
      logits: (...) or (..., 1) for targets (...).
      targets: Values t in [0, 1], bool, integers or floating. Other values, such as −1, give NaN.
      mask: As in `cross_entropy`.

    Examples:
      >>> import jax.numpy as jnp
      >>> binary_cross_entropy(jnp.array([0.0, 0.0]), jnp.array([1, 0])).value.round(4)
      Array(0.6931, dtype=float32)
    """
    logits, targets, mask = _masked(logits, targets, mask)
    logits = _match(logits, targets)
    losses = optax.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype))
    return mean(_known(is_chance(targets), losses), mask)


def squared_error(predictions: Array, targets: Array, mask: Array | None = None) -> Mean:
    """The average of (prediction − target)².

    Args:
      predictions: (...) or (..., 1) for targets (...).
      targets: The targets (...).
      mask: As in `cross_entropy`.

    Examples:
      >>> import jax.numpy as jnp
      >>> squared_error(jnp.array([[1.0], [3.0]]), jnp.array([1.0, 1.0])).value
      Array(2., dtype=float32)
    """
    predictions, targets, mask = _masked(predictions, targets, mask)
    predictions = _match(predictions, targets)
    return mean(optax.squared_error(predictions, targets.astype(predictions.dtype)), mask)


def absolute_error(predictions: Array, targets: Array, mask: Array | None = None) -> Mean:
    """The average of |prediction − target|; the arguments are as in `squared_error`.

    Examples:
      >>> import jax.numpy as jnp
      >>> absolute_error(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])).value
      Array(1., dtype=float32)
    """
    predictions, targets, mask = _masked(predictions, targets, mask)
    predictions = _match(predictions, targets)
    return mean(jnp.abs(predictions - targets.astype(predictions.dtype)), mask)


def accuracy(logits: Array, targets: Array, mask: Array | None = None) -> Mean:
    """The share of rows whose greatest logit is that of the target; the arguments are as in `cross_entropy`.

    Examples:
      >>> import jax.numpy as jnp
      >>> accuracy(jnp.array([[0.0, 1.0], [2.0, 1.0]]), jnp.array([1, 1])).value
      Array(0.5, dtype=float32)
    """
    logits, targets, mask = _masked(logits, targets, mask)
    if inexact(targets):
        _probability_shape(logits, targets)
        targets = targets.argmax(-1)
    return mean(logits.argmax(-1) == _classes(logits, targets), mask)


def binary_accuracy(logits: Array, targets: Array, mask: Array | None = None) -> Mean:
    """The share of logits on the target's side of 0; the arguments are as in `binary_cross_entropy`.

    Examples:
      >>> import jax.numpy as jnp
      >>> binary_accuracy(jnp.array([0.3, 2.0]), jnp.array([1, 0])).value
      Array(0.5, dtype=float32)
    """
    logits, targets, mask = _masked(logits, targets, mask)
    return mean((_match(logits, targets) > 0) == (targets.astype(logits.dtype) > 0.5), mask)


def perplexity(logits: Array, targets: Array, mask: Array | None = None) -> Perplexity:
    """The exponential of the mean cross-entropy; the arguments are as in `cross_entropy`.

    Examples:
      >>> import jax.numpy as jnp
      >>> perplexity(jnp.zeros((3, 8)), jnp.array([1, 5, 7])).value.round(4)
      Array(8., dtype=float32)
    """
    return Perplexity(*cross_entropy(logits, targets, mask))


def make_loss(
    cell: Cell,
    error: Error,
    *,
    metrics: Mapping[str, Callable[[Array, Array, Array | None], Metric]] | None = None,
    remat_every: int | None = None,
    implementation: Implementation = None,
) -> CellLoss:
    """Makes `loss(params, batch, key) -> (scalar, metrics)`, the error of the outputs of `cell` for a `Batch`.

    Padding, by `lengths` or `mask`, does not count: a padded batch and the same sequences one by one give the same loss
    and gradients.

    Args:
      cell: The model.
      error: A function `(ys, targets, mask) -> Mean`, for instance `cross_entropy`.
      metrics: More functions of this kind, by name.
      remat_every: As in `jaxrnn.scan`.
      implementation: As in `jaxrnn.scan`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> model = jaxrnn.Stack((jaxrnn.Pool(jaxrnn.GRU(3, 8)), jaxrnn.Linear(8, 2)))
      >>> loss = make_loss(model, cross_entropy, metrics={"accuracy": accuracy})
      >>> batch = Batch(jnp.ones((5, 7, 3)), jnp.zeros(5, int), lengths=jnp.array([7, 2, 3, 0, 1]))
      >>> value, metrics = loss(model.init(jax.random.key(0)), batch, None)
    """
    run = make_truncated_loss(cell, error, metrics=metrics, remat_every=remat_every, implementation=implementation)

    def loss(params, batch, key):
        value, (_, measured) = run(params, None, batch, key)
        return value, measured

    return dataclasses.replace(run, function=loss)


def make_truncated_loss(
    cell: Cell,
    error: Error,
    *,
    metrics: Mapping[str, Callable[[Array, Array, Array | None], Metric]] | None = None,
    remat_every: int | None = None,
    implementation: Implementation = None,
) -> CellLoss:
    """Makes the loss for truncated backpropagation through time.

    It is `loss(params, carry, batch, key) -> (scalar, (carry, metrics))`. Each window begins with the carry in which
    the window before ended, and gradients stop between them. A reset begins with the cell's own initial carry and its
    gradient, which is how a `LearnedCarry` is trained. The arguments are as in `make_loss`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.GRU(1, 1)
      >>> loss, params = make_truncated_loss(cell, squared_error), cell.init(jax.random.key(0))
      >>> windows = jnp.ones((2, 5, 3, 1))  # of five sequences, one after the other
      >>> carry = cell.initial_carry(params, (5,))
      >>> for xs in windows:
      ...     value, (carry, metrics) = loss(params, carry, (xs, xs), None)
      >>> carry.h.shape
      (5, 1)
    """
    check.a_cell("cell", cell)
    metrics = {} if metrics is None else dict(metrics)
    if "loss" in metrics:
        raise ValueError("metrics: the name 'loss' is that of the error itself")

    def loss(params, carry, batch, key):
        batch = _as_batch(cell, batch)
        carry, ys = scan(
            cell,
            params,
            carry,
            batch.xs,
            lengths=batch.lengths,
            mask=batch.mask,
            reset=batch.reset,
            time_axis=1,
            key=key,
            remat_every=remat_every,
            implementation=implementation,
        )
        mask = None if cell.ends_time else valid_steps(batch)
        targets = jax.tree.map(jnp.asarray, batch.targets)
        measured = {"loss": error(ys, targets, mask)}
        measured |= {name: metric(ys, targets, mask) for name, metric in metrics.items()}
        return measured["loss"].value, (carry, measured)

    return CellLoss(loss, cell, (error, *metrics.values()))


@dataclasses.dataclass(frozen=True, eq=False)
class CellLoss:
    """A loss that knows its cell, and therefore which targets it can learn from."""

    function: Callable
    cell: Cell
    errors: tuple[Callable, ...]

    def __call__(self, *arguments: Any, **keywords: Any) -> PyTree:
        return self.function(*arguments, **keywords)

    def check(self, batch: PyTree, name: str = "targets") -> None:
        """Raises if its error functions are undefined for the targets of a NumPy batch; padding is ignored."""
        batch = _as_batch(self.cell, batch)
        if not isinstance(batch.targets, np.ndarray):
            return  # trees are for errors of the user's own
        size = output_size(self.cell, input_size(self.cell))
        size = size[-1] if isinstance(size, tuple) else size
        mask = None if self.cell.ends_time else valid_steps(batch, np)
        for expect in dict.fromkeys(expect for known, expect in CHECKS.items() if known in self.errors):
            expect(name, batch.targets, mask, size)


CHECKS: dict[Callable, Check] = {
    cross_entropy: classes,
    perplexity: classes,
    accuracy: classes,
    binary_cross_entropy: chances,
    binary_accuracy: chances,
    squared_error: finite,
    absolute_error: finite,
}


def valid_steps(batch: Batch, xp: Any = jnp) -> PyTree:
    """The steps that are not padding, bool (B, T), or None if all are valid; `xp` is jax.numpy or numpy."""
    if batch.lengths is None:
        return None if batch.mask is None else xp.asarray(batch.mask)
    time = xp.arange(jnp.shape(jax.tree.leaves(batch.xs)[0])[1])
    return time[None] < xp.asarray(batch.lengths)[:, None]


def _as_batch(cell: Cell, batch: PyTree) -> Batch:
    if type(batch) is tuple and len(batch) == 2:
        batch = Batch(*batch)
    if not isinstance(batch, Batch):
        several = f" of {len(batch)}" if isinstance(batch, tuple) else ""
        raise TypeError(f"batch: expected a Batch or a pair (xs, targets), got {type(batch).__name__}{several}")
    if batch.targets is None:
        raise TypeError("targets: expected an array, got None")
    check_axes(cell, batch.xs)
    return batch


def check_axes(cell: Cell, xs: PyTree) -> None:
    """Checks that xs has batch and time axes in front of the axes of one step."""
    for leaf, ndim in zip(jax.tree.leaves(xs), jax.tree.leaves(cell.input_ndim), strict=False):
        if jnp.ndim(leaf) < ndim + 2:
            raise ValueError(f"xs: expected batch, time and {ndim} more axes for {cell!r}, got shape {jnp.shape(leaf)}")


def _masked(ys, targets, mask):
    """Casts ys to at least float32, and sets ys and targets to zero where the mask is false.

    So nothing there is ever differentiated.
    """
    for name, value in (("predictions", ys), ("targets", targets)):
        if not jax.tree_util.all_leaves([value]):
            raise TypeError(f"{name}: expected one array, got {type(value).__name__}; an error of your own takes trees")
    ys, targets = jnp.asarray(ys), jnp.asarray(targets)
    ys = ys.astype(accumulator(ys.dtype))
    if mask is None:
        return ys, targets, None
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"mask: expected bool, got {mask.dtype}")
    for name, array in (("predictions", ys), ("targets", targets)):
        if array.shape[: mask.ndim] != mask.shape:
            raise ValueError(f"mask: expected shape {array.shape[: mask.ndim]}, axes of the {name}, got {mask.shape}")
    return zero_where_not(mask, ys), zero_where_not(mask, targets), mask


def _known(known, losses):
    """The losses, or NaN where a target is not `known`; a constant, since `jax_debug_nans` would report a result."""
    return jnp.where(known, losses, np.array(np.nan, losses.dtype))


def _classes(logits, targets):
    """Returns the targets in a dtype that can hold the number of classes; uint8 holds no 256."""
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets: expected classes of shape {logits.shape[:-1]} for logits {logits.shape}, got {targets.dtype} "
            f"of shape {targets.shape}"
        )
    return targets.astype(int)


def _probability_shape(logits, targets):
    if targets.shape == logits.shape[:-1]:
        raise TypeError(f"targets: expected classes as integers, or probabilities {logits.shape}, got {targets.dtype}")
    _same_shape(logits, targets)


def _same_shape(ys, targets):
    if targets.shape != ys.shape:
        raise ValueError(f"targets: expected shape {ys.shape} as the predictions, got {targets.shape}")


def _match(ys, targets):
    """Returns ys in the shape of the targets, which may lack a last axis of 1."""
    if ys.shape == (*targets.shape, 1):
        return ys[..., 0]
    _same_shape(ys, targets)
    return ys
