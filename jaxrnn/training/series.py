"""Time series: windows of past and future, and scaling."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxrnn import check
from jaxrnn.engines.arrays import cast, inexact
from jaxrnn.training.batches import as_array
from jaxrnn.typing import PyTree


def windows(series: PyTree, length: int, horizon: int, *, stride: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a series into windows of `length` steps, each with the `horizon` steps that follow it.

        xs[n] = series[n stride : n stride + length]
        targets[n] = series[n stride + length : n stride + length + horizon]

    Args:
      series: The series (L, ...).
      length: The number of steps that a model sees.
      horizon: The number of steps that it predicts.
      stride: The number of steps between the starts of two windows.

    Returns:
      xs (N, length, ...) and targets (N, horizon, ...), with N = (L − length − horizon) // stride + 1. They are
      read-only views, which take no memory of their own; `Arrays` copies only the rows of a batch.

    Raises:
      ValueError: If the series is shorter than length + horizon.

    Examples:
      >>> import numpy as np
      >>> from jaxrnn.training.series import windows
      >>> xs, targets = windows(np.arange(7), 3, 2, stride=2)
      >>> xs.tolist(), targets.tolist()
      ([[0, 1, 2], [2, 3, 4]], [[3, 4], [5, 6]])
    """
    series = as_array(series, "series")
    length, horizon, stride = (
        check.integer("length", length),
        check.integer("horizon", horizon),
        check.integer("stride", stride),
    )
    if series.ndim == 0 or len(series) < length + horizon:
        raise ValueError(
            f"series: expected at least length + horizon = {length + horizon} steps, got shape {series.shape}"
        )
    stretches = np.lib.stride_tricks.sliding_window_view(series, length + horizon, axis=0)[::stride]
    stretches = np.moveaxis(stretches, -1, 1)
    return stretches[:, :length], stretches[:, length:]


class Scaler(NamedTuple):
    """Scales each feature by z = (x − mean) / scale; mean and scale have the last axis of x, (D,), or are scalars.

    It is a pytree of two arrays. As JSON it is `[a.tolist() for a in scaler]`; `Scaler(*map(np.asarray, value))` reads
    it back.

    Examples:
      >>> import numpy as np
      >>> from jaxrnn.training.series import Scaler
      >>> series = np.array([[1.0, 5.0], [3.0, 5.0], [np.nan, 5.0], [9.0, 6.0]])
      >>> scaler = Scaler.fit(series[:3])
      >>> scaler.mean.tolist(), scaler.scale.tolist()
      ([2.0, 5.0], [1.0, 1.0])
      >>> scaler.transform(series).tolist()
      [[-1.0, 0.0], [1.0, 0.0], [nan, 0.0], [7.0, 1.0]]
    """

    mean: Any
    scale: Any

    @staticmethod
    def fit(series: PyTree) -> Scaler:
        """Computes the mean and standard deviation of every feature over all other axes, leaving out NaN.

        Fit on the training part of the data, so that the model knows nothing of later values. A feature that is
        constant there has scale 1. Padding is left out if it is NaN, as `pad(..., value=np.nan)` makes it.

        Args:
          series: The series (..., D), or (L,) for a series of numbers.

        Returns:
          A scaler in float32, or in float64 for a series of float64 or of 32- or 64-bit integers.

        Raises:
          ValueError: If a feature has no finite number, or an infinite one.
        """
        series = as_array(series, "series")
        axes = tuple(range(max(series.ndim - 1, 1)))
        if series.ndim == 0 or np.issubdtype(series.dtype, np.complexfloating):
            raise ValueError(f"series: expected real numbers (..., D), got {series.dtype} of shape {series.shape}")
        values = series.astype(np.float64)
        given = ~np.isnan(values)
        if np.isinf(values).any() or not given.any(axes).all():
            raise ValueError("series: expected a finite number of every feature, and no infinite one")
        mean = values.mean(axes, where=given)
        scale = values.std(axes, where=given)
        least = values.min(axes, where=given, initial=np.inf)
        most = values.max(axes, where=given, initial=-np.inf)
        dtype = np.result_type(series.dtype, np.float32)
        # Rounding may leave a constant feature some deviation, and a feature of tiny numbers none.
        scale = np.where(least < most, scale, 1).astype(dtype)
        return Scaler(mean.astype(dtype), np.where(scale > 0, scale, np.ones_like(scale)))

    def transform(self, xs: PyTree) -> PyTree:
        """Returns (xs − mean) / scale for NumPy or JAX arrays (..., D), in the dtype of xs if it is floating."""
        mean, scale = self._like(xs)
        return (xs - mean) / scale

    def inverse(self, zs: Any) -> PyTree:
        """Returns zs scale + mean."""
        mean, scale = self._like(zs)
        return zs * scale + mean

    def inverse_scale(self, deviations: Any) -> PyTree:
        """Returns standard deviations, or differences, in the units of the series: deviations scale."""
        return deviations * self._like(deviations)[1]

    def _like(self, xs):
        size = np.shape(self.mean)[-1] if np.ndim(self.mean) else None
        if size is not None and np.shape(xs)[-1:] != (size,):
            raise ValueError(
                f"series: expected (..., {size}), all features that the scaler was fitted on, got {np.shape(xs)}; for "
                f"one of them use Scaler(scaler.mean[k], scaler.scale[k])"
            )
        mean, scale = cast(self, xs.dtype) if inexact(xs) else self
        front = (1,) * (xs.ndim - mean.ndim)
        return mean.reshape(front + mean.shape), scale.reshape(front + scale.shape)
