"""Targets that an error can be taken of, as values: checked on the host, before any step is taken with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

Check = Callable[[str, np.ndarray, np.ndarray | None, Any], None]
"""`check(name, targets, mask, size)`: of the entries where `mask`, a prefix of the axes, is true; `size` is the number
of predictions for each of them, None where it is not known. Wrong shapes are left to the error itself."""


def finite(name: str, targets: np.ndarray, mask: np.ndarray | None, size: Any) -> None:
    """The targets are numbers, neither NaN nor infinite."""
    if jnp.issubdtype(targets.dtype, jnp.inexact):
        _require(np.isfinite(targets), name, "finite numbers", targets, mask)


def chances(name: str, targets: np.ndarray, mask: np.ndarray | None, size: Any) -> None:
    """The targets lie in [0, 1]."""
    if targets.dtype != bool:
        _require((targets >= 0) & (targets <= 1), name, "0, 1 or a probability between", targets, mask)


def classes(name: str, targets: np.ndarray, mask: np.ndarray | None, size: int | None) -> None:
    """The targets are classes in [0, size), or probabilities of them that sum to 1 over the last axis."""
    if targets.dtype == bool:
        return
    if jnp.issubdtype(targets.dtype, jnp.integer):
        known = targets >= 0 if size is None else (targets >= 0) & (targets < size)
        _require(known, name, f"classes 0 to {'C − 1' if size is None else size - 1}", targets, mask)
    elif targets.ndim and size in (None, targets.shape[-1]):
        _require(targets >= 0, name, "probabilities, or classes as integers", targets, mask)
        sums = targets.sum(-1, dtype=np.float64)
        # Wide enough for a table of two decimals, and for what was rounded to the dtype.
        close = np.abs(sums - 1) <= max(0.01, float(jnp.finfo(targets.dtype).eps) ** 0.5)
        _require(close, name, "probabilities of sum 1 over the last axis", sums, mask)


def _require(right: np.ndarray, name: str, expected: str, values: np.ndarray, mask: np.ndarray | None) -> None:
    if right.all():
        return
    wrong = ~right
    if mask is not None:
        if mask.shape != values.shape[: mask.ndim]:
            return
        wrong &= mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    if wrong.any():
        at = np.unravel_index(wrong.argmax(), wrong.shape)
        raise ValueError(f"{name}: expected {expected}, got {values[at]} at {list(map(int, at))}")
