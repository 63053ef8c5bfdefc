"""The loss of a model: an error of what a cell puts out for a batch, with what can be checked before training."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import check
from jaxrnn.cell import Cell, input_size, output_size
from jaxrnn.compose.pool import Pool
from jaxrnn.compose.stack import Stack
from jaxrnn.engines.walk import Implementation
from jaxrnn.layers import Apply, Dropout, Embed
from jaxrnn.sequence import scan
from jaxrnn.training.batches import Batch, check_valid
from jaxrnn.training.errors import (
    Error,
    Metric,
    Metrics,
    absolute_error,
    accuracy,
    binary_accuracy,
    binary_cross_entropy,
    cross_entropy,
    not_ignored,
    perplexity,
    squared_error,
)
from jaxrnn.training.targets import Check, chances, classes, finite, require
from jaxrnn.typing import Named, PyTree


def make_loss(
    cell: Cell,
    error: Error,
    *,
    metrics: Metrics = None,
    remat_every: int | None = None,
    implementation: Implementation = None,
) -> CellLoss:
    """Makes `loss(params, batch, key) -> (scalar, metrics)`, the error of the outputs of `cell` for a `Batch`.

    Padding, by `lengths` or `mask`, does not count: a padded batch and the same sequences one by one give the same loss
    and gradients.

    Args:
      cell: The model.
      error: A function `(ys, targets, mask) -> Mean`, for instance `cross_entropy`.
      metrics: More functions of this kind, by name, or as a list, where each has its own name.
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
    metrics: Metrics = None,
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
    _check_error("error", error)
    metrics = _named_metrics(metrics)
    _check_head(cell, [error, *metrics.values()])

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
        weighted = {} if batch.weights is None else {"weights": jnp.asarray(batch.weights)}
        measured = {name: each(ys, targets, mask, **weighted) for name, each in ({"loss": error} | metrics).items()}
        if not hasattr(measured["loss"], "value"):
            raise TypeError(
                "error: expected a function that returns a Mean, as jaxrnn.training.mean(values, mask) is, got "
                f"{type(measured['loss']).__name__}"
            )
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
        of = name.removesuffix("targets")
        rows, steps = jnp.shape(jax.tree.leaves(batch.xs)[0])[:2]
        check_valid(batch.lengths, batch.mask, rows, steps)
        _check_inputs(self.cell, batch, f"{of}xs")
        if not isinstance(batch.targets, np.ndarray):
            return  # trees are for errors of the user's own
        size = output_size(self.cell, input_size(self.cell))
        size = size[-1] if isinstance(size, tuple) else size
        mask = None if self.cell.ends_time else valid_steps(batch, np)
        for error in self.errors:
            function, options = _unbound(error)
            if function in (cross_entropy, perplexity, accuracy) and size == 1:
                other = binary_accuracy if function is accuracy else binary_cross_entropy
                raise ValueError(
                    f"predictions: {function.__name__} expects logits of at least two classes, and the model puts out "
                    f"1; use {other.__name__}"
                )
            if function in CHECKS:
                seen = not_ignored(batch.targets, mask, options.get("ignore"), np)
                try:
                    CHECKS[function](name, batch.targets, seen, size)
                except ValueError as wrong:
                    ignore = _unbound(self.errors[0])[1].get("ignore")
                    if error is self.errors[0] or ignore is None or "ignore" in options:
                        raise
                    raise ValueError(
                        f"{wrong}; the metric needs functools.partial({function.__name__}, ignore={ignore}), too"
                    ) from None

    def of_rows(self, batch: PyTree, *, noise: bool) -> bool:
        """Whether it is known to be a mean over rows to which every row gives its part, whatever the others are.

        Noise is drawn for all rows at once.
        """
        known = [_unbound(error)[0] for error in self.errors]
        if known[0] is perplexity or not all(error in CHECKS for error in known):
            return False
        if not noise:
            return True
        rows, steps = jax.tree.leaves(_as_batch(self.cell, batch).xs)[0].shape[:2]
        drawn = jax.eval_shape(lambda key: self.cell.noise(key, steps, (rows,)), check.shape_of_key())
        return not jax.tree.leaves(drawn)


def _unbound(error: Callable) -> tuple[Callable, Named]:
    """An error and the options that `functools.partial` gave it."""
    if isinstance(error, functools.partial) and not error.args:
        return error.func, error.keywords
    return error, {}


def _named_metrics(metrics: Metrics) -> dict[str, Callable[..., Metric]]:
    """Metrics by name."""
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        if isinstance(metrics, str) or not isinstance(metrics, Sequence):
            hint = f"; pass a list, [{_ours(metrics)}]" if _ours(metrics) else ""
            raise TypeError(f"metrics: expected functions by name, or a list of them, got {check.brief(metrics)}{hint}")
        for metric in metrics:
            _check_error("metrics", metric)
        named = [getattr(_unbound(metric)[0], "__name__", "") for metric in metrics]
        if "" in named or len(set(named)) < len(named):
            raise ValueError(
                f"metrics: expected functions of different names, got {named}; name them, {{name: function}}"
            )
        metrics = dict(zip(named, metrics, strict=True))
    for name, metric in metrics.items():
        _check_error(f"metrics[{name!r}]", metric)
    if "loss" in metrics:
        raise ValueError("metrics: the name 'loss' is that of the error itself")
    return dict(metrics)


def _check_error(name: str, error: Any) -> None:
    """It is a function of (ys, targets, mask)."""
    expected = f"{name}: expected a function such as jaxrnn.training.cross_entropy"
    if isinstance(error, (Cell, CellLoss)) or not callable(error):
        hint = f"; pass the function {_ours(error)}" if _ours(error) else ""
        raise TypeError(f"{expected}, got {check.brief(error)}{hint}")
    if getattr(error, "__module__", "").startswith("optax"):
        raise TypeError(
            f"{expected}, got Optax's {error.__name__}; "
            f"lambda ys, targets, mask: jaxrnn.training.mean({error.__name__}(ys, targets), mask) is one"
        )
    with contextlib.suppress(ValueError):  # some have no signature
        signature = inspect.signature(error)
        try:
            signature.bind(None, None, None)
        except TypeError:
            raise TypeError(
                f"{name}: expected a function of outputs, targets and a mask, which may be None, got one of {signature}"
            ) from None


def _ours(name: Any) -> str | None:
    """Our function for what others call by a name."""
    plain = name.lower().replace("_", "").replace("loss", "") if isinstance(name, str) else ""
    ours = _OTHER_NAMES.get(plain)
    return f"jaxrnn.training.{ours}" if ours else None


_OTHER_NAMES = {
    "acc": "accuracy",
    "accuracy": "accuracy",
    "absoluteerror": "absolute_error",
    "bce": "binary_cross_entropy",
    "binaryaccuracy": "binary_accuracy",
    "binarycrossentropy": "binary_cross_entropy",
    "categoricalcrossentropy": "cross_entropy",
    "ce": "cross_entropy",
    "crossentropy": "cross_entropy",
    "l1": "absolute_error",
    "mae": "absolute_error",
    "meanabsoluteerror": "absolute_error",
    "meansquarederror": "squared_error",
    "mse": "squared_error",
    "perplexity": "perplexity",
    "sparsecategoricalcrossentropy": "cross_entropy",
    "squarederror": "squared_error",
}


_SIGMOIDS = (
    *("sigmoid", "log_sigmoid", "hard_sigmoid", "keras_hard_sigmoid"),
    *(jax.nn.sigmoid, jax.nn.log_sigmoid, jax.nn.hard_sigmoid),
)
_SOFTMAX = ("softmax", jax.nn.softmax)


def _check_head(cell: Cell, errors: Sequence[Callable]) -> None:
    """A model for an error of logits does not end in the function that the error applies itself."""
    top = cell
    while isinstance(top, (Stack, Pool)):
        top = (
            next((c for c in reversed(top.cells) if not isinstance(c, Dropout)), top)
            if isinstance(top, Stack)
            else top.cell
        )
    spec = top.fn[0] if isinstance(top, Apply) and isinstance(top.fn, tuple) else getattr(top, "fn", None)
    for error in errors:
        function, _ = _unbound(error)
        wrong = {
            cross_entropy: _SIGMOIDS + _SOFTMAX,
            perplexity: _SIGMOIDS + _SOFTMAX,
            binary_cross_entropy: _SIGMOIDS + _SOFTMAX,
            binary_accuracy: _SIGMOIDS + _SOFTMAX,
        }.get(function, ())
        if isinstance(top, Apply) and spec in wrong:
            last = isinstance(cell, Stack) and cell.cells[-1] is top
            how = ", Stack(cell.cells[:-1]) with params[:-1]," if last else ""
            raise ValueError(
                f"cell: it ends in {top!r}, and {function.__name__} takes logits, which are what it reads: train "
                f"without this layer{how} and apply it to predictions"
            )


CHECKS: dict[Callable, Check] = {
    cross_entropy: classes,
    perplexity: classes,
    accuracy: classes,
    binary_cross_entropy: chances,
    binary_accuracy: chances,
    squared_error: finite,
    absolute_error: finite,
}


def _check_inputs(cell: Cell, batch: Batch, name: str) -> None:
    """xs of valid steps are finite, and tokens are in the vocabulary."""
    valid = valid_steps(batch, np)
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch.xs):
        if isinstance(leaf, np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            known = np.isfinite(leaf)
            what = "finite numbers; say which steps are missing by lengths or mask"
        elif isinstance(leaf, np.ndarray) and isinstance(first := _first(cell), Embed):
            known = (leaf >= 0) & (leaf < first.vocabulary)
            what = f"tokens 0 to {first.vocabulary - 1}, those of {first!r}"
        else:
            continue
        require(known, f"{name}{jax.tree_util.keystr(path)}", what, leaf, valid)


def _first(cell: Cell) -> Cell:
    """The cell that reads xs."""
    while isinstance(cell, (Stack, Pool)):
        cell = cell.cells[0] if isinstance(cell, Stack) else cell.cell
    return cell


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
