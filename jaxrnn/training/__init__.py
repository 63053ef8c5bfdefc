"""Training: from arrays to a trained, saved and resumed model, with pure functions and one loop above them."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from jaxrnn.attributes import of_module as _of_module
from jaxrnn.training.batches import Arrays, Batch, Source
from jaxrnn.training.checkpoint import CheckpointError, Checkpoints, Restored, restore
from jaxrnn.training.errors import (
    Mean,
    Perplexity,
    absolute_error,
    accuracy,
    binary_accuracy,
    binary_cross_entropy,
    cross_entropy,
    mean,
    perplexity,
    squared_error,
)
from jaxrnn.training.evaluation import Validation, evaluate
from jaxrnn.training.fitting import NonFiniteError, fit
from jaxrnn.training.history import BadStep, History
from jaxrnn.training.losses import make_loss, make_truncated_loss
from jaxrnn.training.prediction import predict
from jaxrnn.training.processes import ProcessError
from jaxrnn.training.ragged import Bucketed, Buckets, bucket, pad, unpad
from jaxrnn.training.saving import load, save
from jaxrnn.training.series import Scaler, windows
from jaxrnn.training.slow_weights import labels
from jaxrnn.training.step import Best, TrainState, best_params, make_eval, make_step, train_state
from jaxrnn.training.streams import Streams
from jaxrnn.training.trained import Trained, train

__all__ = [
    "Arrays",
    "BadStep",
    "Batch",
    "Best",
    "Bucketed",
    "Buckets",
    "CheckpointError",
    "Checkpoints",
    "History",
    "Mean",
    "NonFiniteError",
    "Perplexity",
    "ProcessError",
    "Restored",
    "Scaler",
    "Source",
    "Streams",
    "TrainState",
    "Trained",
    "Validation",
    "absolute_error",
    "accuracy",
    "best_params",
    "binary_accuracy",
    "binary_cross_entropy",
    "bucket",
    "cross_entropy",
    "evaluate",
    "fit",
    "labels",
    "load",
    "make_eval",
    "make_loss",
    "make_step",
    "make_truncated_loss",
    "mean",
    "pad",
    "perplexity",
    "predict",
    "restore",
    "save",
    "squared_error",
    "train",
    "train_state",
    "unpad",
    "windows",
]

if not _TYPE_CHECKING:
    __getattr__ = _of_module(__name__)
