"""Errors and metrics as sums with a weight, so that batches of any size and padding add up exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxrnn.engines.arrays import accumulator, inexact, zero_where_not
from jaxrnn.training.targets import is_chance
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
Error = Callable[..., Mean]  # of (ys, targets, mask), and weights by name where a batch has them
Metrics = Mapping[str, Callable[..., Metric]] | Sequence[Callable[..., Metric]] | None


def mean(values: Array, mask: Array | None = None, weights: Array | None = None) -> Mean:
    """The mean over all entries of `values`, or over those where `mask`, which has its first axes, is true.

    Args:
      values: The numbers.
      mask: bool, with the first axes of the values: True for the entries that count.
      weights: With the first axes of the values: how much each entry counts; None for 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> mean(jnp.array([[1.0, 3.0], [9.0, 9.0]]), jnp.array([True, False])).value
      Array(2., dtype=float32)
    """
    wide = accumulator(values.dtype) if inexact(values) else accumulator()
    if mask is not None and mask.shape != values.shape[: mask.ndim]:
        raise ValueError(f"mask: expected shape {values.shape[: mask.ndim]}, axes of the values, got {mask.shape}")
    if weights is not None:
        return _weighted(values, mask, weights)
    if mask is None:
        return Mean(values.sum(dtype=wide), jnp.asarray(values.size, wide))
    each = values.size // mask.size if mask.size else 0
    return Mean(zero_where_not(mask, values).sum(dtype=wide), mask.sum(dtype=wide) * each)


def _weighted(values: Array, mask: Array | None, weights: Array) -> Mean:
    wide = accumulator(values.dtype) if inexact(values) else accumulator()
    weights = jnp.asarray(weights).astype(wide)
    if weights.shape != values.shape[: weights.ndim]:
        raise ValueError(
            f"weights: expected shape {values.shape[: weights.ndim]}, axes of the values, got {weights.shape}"
        )
    weights = jnp.broadcast_to(weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim)), values.shape)
    weights = zero_where_not(mask, weights)
    return Mean((zero_where_not(mask, values).astype(wide) * weights).sum(), weights.sum())


def cross_entropy(
    logits: Array,
    targets: Array,
    mask: Array | None = None,
    *,
    weights: Array | None = None,
    class_weights: Array | Sequence[float] | None = None,
    ignore: int | None = None,
) -> Mean:
    """The average of −log softmax(logits)[target].

    Args:
      logits: The logits (..., C).
      targets: Classes (...), integers in [0, C); other integers give NaN. Or probabilities (..., C), such as one-hot
        rows.
      mask: bool, with the first axes of the targets: True for the entries that count. NaN and invalid targets elsewhere
        reach neither the value nor the gradient.
      weights: With the first axes of the targets: how much each sample, or each step, counts. The result is divided by
        the sum of the weights.
      class_weights: How much the samples of each class count, (C,); the targets are then classes.
      ignore: A class that does not count, for instance −100, as in PyTorch's data.

    Examples:
      >>> import jax.numpy as jnp
      >>> cross_entropy(jnp.zeros((5, 4)), jnp.array([0, 1, 2, 3, 0])).value.round(4)
      Array(1.3863, dtype=float32)

      Options of an error are bound by `functools.partial`:

      >>> import functools, jaxrnn
      >>> from jaxrnn.training import make_loss
      >>> error = functools.partial(cross_entropy, ignore=-100, class_weights=(1.0, 5.0))
      >>> loss = make_loss(jaxrnn.Stack(jaxrnn.Pool(jaxrnn.GRU(3, 8)), jaxrnn.Linear(8, 2)), error)
    """
    mask = not_ignored(targets, mask, ignore)
    logits, targets, mask = _masked(logits, targets, mask)
    if logits.shape[-1:] == (1,):
        raise ValueError("predictions: expected logits of at least two classes, got 1; use binary_cross_entropy")
    if inexact(targets):
        _probability_shape(logits, targets)
        if class_weights is not None:
            raise TypeError(f"class_weights: expected classes as integers for targets, got {targets.dtype}")
        return mean(optax.softmax_cross_entropy(logits, targets.astype(logits.dtype)), mask, weights)
    targets = _classes(logits, targets)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    # An integer out of range would otherwise be wrapped or clipped in silence.
    losses = _known((targets >= 0) & (targets < logits.shape[-1]), losses)
    return mean(losses, mask, _of_classes(class_weights, targets, logits.shape[-1], weights))


def binary_cross_entropy(
    logits: Array,
    targets: Array,
    mask: Array | None = None,
    *,
    weights: Array | None = None,
    class_weights: tuple[float, float] | None = None,
    ignore: int | None = None,
) -> Mean:
    """The average of −t log σ(logit) − (1 − t) log(1 − σ(logit)).

    Args:
      logits: (...) or (..., 1) for targets (...).
      targets: Values t in [0, 1], bool, integers or floating. Other values, such as −1, give NaN.
      mask: As in `cross_entropy`.
      weights: As in `cross_entropy`.
      class_weights: How much a target of 0 and a target of 1 count; a probability counts in proportion.
      ignore: As in `cross_entropy`.

    Examples:
      >>> import jax.numpy as jnp
      >>> binary_cross_entropy(jnp.array([0.0, 0.0]), jnp.array([1, 0])).value.round(4)
      Array(0.6931, dtype=float32)
    """
    mask = not_ignored(targets, mask, ignore)
    logits, targets, mask = _masked(logits, targets, mask)
    logits = _match(logits, targets)
    chance = targets.astype(logits.dtype)
    losses = optax.sigmoid_binary_cross_entropy(logits, chance)
    if class_weights is not None:
        table = _table(class_weights, 2)
        of_class = table[0] * (1 - chance) + table[1] * chance
        weights = _product(of_class, weights)
    return mean(_known(is_chance(targets), losses), mask, weights)


def squared_error(
    predictions: Array,
    targets: Array,
    mask: Array | None = None,
    *,
    weights: Array | None = None,
    ignore: float | None = None,
) -> Mean:
    """The average of (prediction − target)².

    Args:
      predictions: (...) or (..., 1) for targets (...).
      targets: The targets (...).
      mask: As in `cross_entropy`.
      weights: As in `cross_entropy`.
      ignore: A value of targets that do not count, for instance NaN where nothing was measured.

    Examples:
      >>> import jax.numpy as jnp
      >>> squared_error(jnp.array([[1.0], [3.0]]), jnp.array([1.0, 1.0])).value
      Array(2., dtype=float32)
    """
    mask = not_ignored(targets, mask, ignore)
    predictions, targets, mask = _masked(predictions, targets, mask)
    predictions = _match(predictions, targets)
    return mean(optax.squared_error(predictions, targets.astype(predictions.dtype)), mask, weights)


def absolute_error(
    predictions: Array,
    targets: Array,
    mask: Array | None = None,
    *,
    weights: Array | None = None,
    ignore: float | None = None,
) -> Mean:
    """The average of |prediction − target|; the arguments are as in `squared_error`.

    Examples:
      >>> import jax.numpy as jnp
      >>> absolute_error(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])).value
      Array(1., dtype=float32)
    """
    mask = not_ignored(targets, mask, ignore)
    predictions, targets, mask = _masked(predictions, targets, mask)
    predictions = _match(predictions, targets)
    return mean(jnp.abs(predictions - targets.astype(predictions.dtype)), mask, weights)


def accuracy(
    logits: Array,
    targets: Array,
    mask: Array | None = None,
    *,
    weights: Array | None = None,
    class_weights: Array | Sequence[float] | None = None,
    ignore: int | None = None,
) -> Mean:
    """The share of rows whose greatest logit is that of the target; the arguments are as in `cross_entropy`.

    Examples:
      >>> import jax.numpy as jnp
      >>> accuracy(jnp.array([[0.0, 1.0], [2.0, 1.0]]), jnp.array([1, 1])).value
      Array(0.5, dtype=float32)
    """
    mask = not_ignored(targets, mask, ignore)
    logits, targets, mask = _masked(logits, targets, mask)
    if inexact(targets):
        _probability_shape(logits, targets)
        targets = targets.argmax(-1)
    targets = _classes(logits, targets)
    return mean(logits.argmax(-1) == targets, mask, _of_classes(class_weights, targets, logits.shape[-1], weights))


def binary_accuracy(
    logits: Array,
    targets: Array,
    mask: Array | None = None,
    *,
    weights: Array | None = None,
    ignore: int | None = None,
) -> Mean:
    """The share of logits on the target's side of 0; the arguments are as in `binary_cross_entropy`.

    Examples:
      >>> import jax.numpy as jnp
      >>> binary_accuracy(jnp.array([0.3, 2.0]), jnp.array([1, 0])).value
      Array(0.5, dtype=float32)
    """
    mask = not_ignored(targets, mask, ignore)
    logits, targets, mask = _masked(logits, targets, mask)
    return mean((_match(logits, targets) > 0) == (targets.astype(logits.dtype) > 0.5), mask, weights)


def perplexity(
    logits: Array,
    targets: Array,
    mask: Array | None = None,
    *,
    weights: Array | None = None,
    class_weights: Array | Sequence[float] | None = None,
    ignore: int | None = None,
) -> Perplexity:
    """The exponential of the mean cross-entropy; the arguments are as in `cross_entropy`.

    Examples:
      >>> import jax.numpy as jnp
      >>> perplexity(jnp.zeros((3, 8)), jnp.array([1, 5, 7])).value.round(4)
      Array(8., dtype=float32)
    """
    options = {"weights": weights, "class_weights": class_weights, "ignore": ignore}
    return Perplexity(*cross_entropy(logits, targets, mask, **options))


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


def not_ignored(targets: PyTree, mask: PyTree, ignore: float | None, xp: Any = jnp) -> PyTree:
    """The mask without targets that do not count; `xp` is jax.numpy or numpy."""
    if ignore is None:
        return mask
    if isinstance(ignore, bool) or not isinstance(ignore, (int, float, np.number)):
        raise TypeError(f"ignore: expected a number, the value of targets that do not count, got {ignore!r}")
    targets = xp.asarray(targets)
    counts = ~xp.isnan(targets) if ignore != ignore else targets != ignore
    return counts if mask is None else counts & xp.asarray(mask).reshape(mask.shape + (1,) * (counts.ndim - mask.ndim))


def _product(of_class: Array, weights: PyTree) -> Array:
    """The weights of classes times those of samples, if any, which may lack axes at the end."""
    if weights is None:
        return of_class
    weights = jnp.asarray(weights, of_class.dtype)
    return of_class * weights.reshape(weights.shape + (1,) * (of_class.ndim - weights.ndim))


def _of_classes(class_weights, targets, size, weights):
    """The weight of every target: that of its class, times its own."""
    if class_weights is None:
        return weights
    return _product(_table(class_weights, size)[jnp.clip(targets, 0, size - 1)], weights)


def _table(class_weights: PyTree, size: int) -> Array:
    """The weights of `size` classes."""
    if isinstance(class_weights, Mapping):
        raise TypeError("class_weights: expected a number for each class in their order, got a dict; pass its values")
    table = jnp.asarray(class_weights, accumulator())
    if table.shape != (size,):
        raise ValueError(f"class_weights: expected ({size},), one for each class, got {table.shape}")
    return table


def _known(known, losses):
    """The losses, or NaN where a target is not `known`; a constant, since `jax_debug_nans` would report a result."""
    return jnp.where(known, losses, np.array(np.nan, losses.dtype))


def _classes(logits, targets):
    """Returns the targets in a dtype that can hold the number of classes; uint8 holds no 256."""
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets: expected classes of shape {logits.shape[:-1]} for logits {logits.shape}, got {targets.dtype} "
            f"of shape {targets.shape}{_advice(targets.shape, logits.shape[:-1], logits.shape)}"
        )
    return targets.astype(int)


def _advice(targets: tuple[int, ...], wanted: tuple[int, ...], predictions: tuple[int, ...]) -> str:
    """What to do about targets of another shape than `wanted`, that of the predictions or of their classes."""
    single = _without_one(targets)
    if wanted == predictions[:-1] and targets == predictions:
        return "; classes of one-hot rows are targets.argmax(-1)"
    if single == wanted or (single != targets and single == predictions[:-1] and predictions[-1:] == (1,)):
        return "; leave out the last axis of the targets, targets[..., 0]"
    of_sequence = (*wanted[:1], *wanted[2:])
    if len(wanted) > 1 and len(predictions) > 2 and single in (of_sequence, _without_one(of_sequence)):
        return "; the model has one output for each step: wrap it in Pool(...) for one for each sequence"
    if predictions and wanted == predictions and single == predictions[:-1]:
        return (
            f"; the model puts out {predictions[-1]} numbers where there is one target: let it end in one, as "
            "Linear(..., 1) does, or take cross_entropy for classes"
        )
    return ""


def _without_one(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:-1] if shape[-1:] == (1,) else shape


def _probability_shape(logits, targets):
    if targets.shape == logits.shape[:-1]:
        raise TypeError(f"targets: expected classes as integers, or probabilities {logits.shape}, got {targets.dtype}")
    _same_shape(logits, targets)


def _same_shape(ys, targets):
    if targets.shape != ys.shape:
        advice = _advice(targets.shape, ys.shape, ys.shape)
        raise ValueError(f"targets: expected shape {ys.shape} as the predictions, got {targets.shape}{advice}")


def _match(ys, targets):
    """Returns ys in the shape of the targets, which may lack a last axis of 1."""
    if ys.shape == (*targets.shape, 1):
        return ys[..., 0]
    _same_shape(ys, targets)
    return ys
