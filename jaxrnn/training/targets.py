"""Checks on the host, before any step is taken, that an error function is defined for the values of the targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrnn.typing import DTypeLike, PyTree, Size

Check = Callable[[str, np.ndarray, np.ndarray | None, Any], None]
"""`check(name, targets, mask, size)` checks the entries where `mask`, which has the first axes of the targets, is true.
`size` is the number of predictions for each of them, or None if it is not known. Wrong shapes are left to the error
function itself."""


def rounding(dtype: DTypeLike) -> float:
    """The rounding error that is allowed for a probability computed in this dtype."""
    return float(jnp.finfo(dtype).eps) ** 0.5 if jnp.issubdtype(dtype, jnp.floating) else 0


def is_chance(targets: PyTree) -> PyTree:
    """Whether each of the targets, in NumPy or JAX, lies in [0, 1]."""
    slack = rounding(targets.dtype)
    if targets.dtype == bool:
        return targets | ~targets
    return (targets >= -slack) & (targets <= 1 + slack)


def finite(name: str, targets: np.ndarray, mask: np.ndarray | None, size: Size) -> None:
    """Checks that the targets are numbers, neither NaN nor infinite."""
    if jnp.issubdtype(targets.dtype, jnp.inexact):
        require(np.isfinite(targets), name, "finite numbers", targets, mask)


def chances(name: str, targets: np.ndarray, mask: np.ndarray | None, size: Size) -> None:
    """Checks that the targets lie in [0, 1]."""
    require(is_chance(targets), name, "0, 1 or a probability between", targets, mask)


def classes(name: str, targets: np.ndarray, mask: np.ndarray | None, size: int | None) -> None:
    """Checks that the targets are classes in [0, size), or probabilities of them that sum to 1 over the last axis."""
    if targets.dtype == bool:
        return
    if jnp.issubdtype(targets.dtype, jnp.integer):
        known = targets >= 0 if size is None else (targets >= 0) & (targets < size)
        require(known, name, f"classes 0 to {'C − 1' if size is None else size - 1}", targets, mask)
    elif targets.ndim and size in (None, targets.shape[-1]):
        require(targets >= -rounding(targets.dtype), name, "probabilities, or classes as integers", targets, mask)
        sums = targets.sum(-1, dtype=np.float64)
        # A table of two decimals will do.
        require(
            np.abs(sums - 1) <= max(0.01, rounding(targets.dtype)),
            name,
            "probabilities of sum 1 over the last axis",
            sums,
            mask,
        )


def require(right: np.ndarray, name: str, expected: str, values: np.ndarray, mask: np.ndarray | None) -> None:
    """Raises for the first entry that is not right where the mask, a prefix of the axes, is true."""
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
