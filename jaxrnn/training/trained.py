"""The short way: a model, data and an error in, a trained model out."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxrnn import check
from jaxrnn.cell import Cell
from jaxrnn.foreign_names import check_arguments
from jaxrnn.table import Summary, summary
from jaxrnn.training.errors import Error, Metrics
from jaxrnn.training.evaluation import evaluate
from jaxrnn.training.fitting import fit
from jaxrnn.training.history import History, short
from jaxrnn.training.losses import make_loss
from jaxrnn.training.prediction import predict
from jaxrnn.training.saving import save
from jaxrnn.training.step import TrainState, best_params, train_state
from jaxrnn.typing import Named, PyTree


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trained:
    """A trained model: what `train` returns.

    Args:
      model: The cell.
      loss: The loss that it was trained with, of `make_loss`.
      state: The state of training after the last step.
      history: The metrics of every step and of every validation.

    Examples:
      >>> import numpy as np, jaxrnn
      >>> from jaxrnn.training import squared_error, train
      >>> xs = np.ones((6, 3, 1), np.float32)
      >>> trained = train(jaxrnn.GRU(1, 1), (xs, xs), squared_error, epochs=1, progress=False)
      >>> trained.predict(xs).shape
      (6, 3, 1)
    """

    model: Cell
    loss: Callable
    state: TrainState
    history: History

    def __repr__(self) -> str:
        """The model and how its training went, without arrays."""
        last = {name: short(column[-1]) for name, column in self.history.epochs().items() if len(column)}
        told = "".join(f", {name.replace(' ', '_')}={value}" for name, value in last.items())
        return f"Trained({self.model}{told}, ended={self.history.ended!r})"

    @property
    def params(self) -> PyTree:
        """The params of the best validation, or the last ones where there was no validation."""
        return best_params(self.state)

    def predict(self, xs: PyTree, **options: Any) -> PyTree:
        """`jaxrnn.training.predict` with these params: the model's outputs for arrays (N, T, ...), or for a list."""
        return predict(self.model, self.params, xs, **options)

    def evaluate(self, data: PyTree, **options: Any) -> Named:
        """`jaxrnn.training.evaluate` with these params: every metric over `data`, without noise."""
        return evaluate(self.loss, self.params, data, **options)

    def summary(self) -> Summary:
        """`jaxrnn.summary` of the model."""
        return summary(self.model)

    def save(self, path: Any) -> None:
        """`jaxrnn.training.save` of the model with these params, for `jaxrnn.training.load`."""
        save(path, self.model, self.params)


_MONITORED = "validation=Validation(data, monitor, patience=...)"
_OF_CLASSES = "functools.partial(cross_entropy, class_weights=(...)) as the error"
_OF_SAMPLES = "Batch(xs, targets, weights=...) as the data"
_OPTIMIZER = "optimizer=optax.adam(...), with a rate or a schedule"
_OTHER_OPTIONS = {
    "callbacks": f"checkpoints=, progress=, and {_MONITORED}",
    "class_weight": _OF_CLASSES,
    "class_weights": _OF_CLASSES,
    "key": "seed=",
    "learning_rate": _OPTIMIZER,
    "loss": "the third argument, error",
    "lr": _OPTIMIZER,
    "patience": _MONITORED,
    "sample_weight": _OF_SAMPLES,
    "validation_data": "validation=",
    "validation_split": "validation=(xs, targets), which you cut off the data",
    "verbose": "progress=",
    "weights": _OF_SAMPLES,
}


def train(
    model: Cell,
    data: PyTree,
    error: Error,
    *,
    metrics: Metrics = None,
    optimizer: optax.GradientTransformation | None = None,
    validation: PyTree = None,
    epochs: int = 10,
    batch_size: int = 32,
    seed: int = 0,
    params: PyTree = None,
    **options: Any,
) -> Trained:
    """Trains a model: `make_loss`, `train_state` and `fit` in one call.

    It is these three lines, with two keys made of `seed`, and a third that draws the params:

        loss = make_loss(model, error, metrics=metrics)
        state = train_state(model.init(init), optimizer, noise)
        state, history = fit(loss, state, data, optimizer=optimizer, key=order, ...)

    Args:
      model: The cell.
      data: As in `fit`: a pair (xs, targets) of arrays, batch first, (N, T, ...), or a `Batch`, or a source of batches.
      error: As in `make_loss`, for instance `cross_entropy`.
      metrics: As in `make_loss`.
      optimizer: An optimizer of Optax; None for `optax.adam(1e-3)`.
      validation: As in `fit`: held-out data, or `Validation(data, ...)`. The params of the best one are kept.
      epochs: The number of passes over the data.
      batch_size: The number of rows in a batch, for arrays.
      seed: Of all that is random: params, the order of the data, noise.
      params: The params to begin with; None draws them.
      options: More of `fit`: `checkpoints`, `progress`, `accumulate`, `compute_dtype`, `nonfinite`, `shuffle`,
        `mesh`, ...

    Examples:
      >>> import numpy as np, jaxrnn
      >>> from jaxrnn.training import accuracy, cross_entropy, train
      >>> model = jaxrnn.Stack(jaxrnn.Pool(jaxrnn.GRU(1, 8)), jaxrnn.Linear(8, 2))
      >>> xs, kinds = np.ones((6, 3, 1), np.float32), np.array([0, 1, 0, 1, 0, 1])
      >>> trained = train(model, (xs, kinds), cross_entropy, metrics=[accuracy], epochs=2, progress=False)
      >>> sorted(trained.evaluate((xs, kinds)))
      ['accuracy', 'loss']
    """
    check.a_cell("model", model)
    known = inspect.signature(fit).parameters.keys() - {"key"}
    check_arguments(
        "train", options, known, lambda name, _: _OTHER_OPTIONS.get(name, f"the options are {sorted(known)}")
    )
    if params is not None:
        check.params(model, params)
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    loss = make_loss(model, error, metrics=metrics)
    init, noise, order = jax.random.split(jax.random.key(check.integer("seed", seed, least=0)), 3)
    state = train_state(model.init(init) if params is None else params, optimizer, noise)
    state, history = fit(
        loss,
        state,
        data,
        optimizer=optimizer,
        validation=validation,
        epochs=epochs,
        batch_size=batch_size,
        key=order,
        **options,
    )
    return Trained(model, loss, state, history)
