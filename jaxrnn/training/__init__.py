"""Training: from arrays to a trained, saved, resumed model, in pure pieces and one loop above them."""

from jaxrnn.training.batches import Arrays, Batch, Source
from jaxrnn.training.evaluate import evaluate, predict
from jaxrnn.training.fit import NonFiniteError, fit
from jaxrnn.training.history import BadStep, History
from jaxrnn.training.losses import (
    Mean,
    Perplexity,
    absolute_error,
    accuracy,
    binary_accuracy,
    binary_cross_entropy,
    cross_entropy,
    make_loss,
    make_truncated_loss,
    mean,
    perplexity,
    squared_error,
)
from jaxrnn.training.step import Best, TrainState, make_eval, make_step, train_state

__all__ = [
    "Arrays",
    "BadStep",
    "Batch",
    "Best",
    "History",
    "Mean",
    "NonFiniteError",
    "Perplexity",
    "Source",
    "TrainState",
    "absolute_error",
    "accuracy",
    "binary_accuracy",
    "binary_cross_entropy",
    "cross_entropy",
    "evaluate",
    "fit",
    "make_eval",
    "make_loss",
    "make_step",
    "make_truncated_loss",
    "mean",
    "perplexity",
    "predict",
    "squared_error",
    "train_state",
]
