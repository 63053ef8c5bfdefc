"""Arrays from other frameworks: each has a name, is checked, and is taken once.

Converters compute with NumPy and convert to JAX arrays only at the end, since JAX would compile every operation for
every shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxrnn.typing import DTypeLike, PyTree


class Arrays:
    """Named arrays of one floating dtype, without NaN or infinity. Each must be taken once, and none may be left over.

    Args:
      source: The name of their source, for error messages.
      arrays: The arrays by name, as anything that NumPy can read.

    Raises:
      TypeError: If a value is not an array of floating numbers.
      ValueError: If the dtypes differ, if a number is not finite, or if the dtype is float64 and `jax.enable_x64` is
        off.
    """

    def __init__(self, source: str, arrays: Mapping[str, PyTree]):
        self.source = source
        self._left = {name: _floating(f"{source}: {name}", array) for name, array in arrays.items()}
        for name, array in self._left.items():
            first, other = next(iter(self._left.items()))
            if array.dtype != other.dtype:
                raise ValueError(f"{source}: {name} is {array.dtype}, and {first} is {other.dtype}: expected one dtype")

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array that has not been taken yet."""
        return self._array(name).shape

    def take(self, name: str, *shape: int | None) -> PyTree:
        """Takes the array of this name, which must have this shape; None stands for any size."""
        array = self._array(name)
        if len(array.shape) != len(shape) or any(w not in (None, n) for n, w in zip(array.shape, shape, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{self.source}: {name}: expected shape ({wanted}), got {array.shape}")
        return self._left.pop(name)

    def finish(self) -> None:
        """Raises unless every array has been taken."""
        if self._left:
            raise ValueError(f"{self.source}: unexpected arrays: {', '.join(map(repr, self._left))}")

    def _array(self, name: str) -> np.ndarray:
        if name not in self._left:
            left = ", ".join(map(repr, self._left)) or "none"
            raise ValueError(f"{self.source}: {name!r} is missing; there are {left}")
        return self._left[name]


def refuse_tracer(name: str, value: Any) -> None:
    """Raises if `value` is a tracer: an array in a function that JAX is tracing, which has no numbers yet."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name}: expected numbers, got a tracer: convert outside of jax.jit, jax.grad, jax.vmap and the like"
        )


def _floating(name: str, value: Any) -> np.ndarray:
    refuse_tracer(name, value)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}: {error}") from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name}: expected floating numbers, got {array.dtype}")
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(f"{name} is {array.dtype}: convert under jax.enable_x64(True), or cast it first")
    if not np.isfinite(array.astype(np.float64)).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return array


def ones(size: int, dtype: DTypeLike) -> PyTree:
    """The scale for a LayerNorm that has none."""
    return np.ones(size, dtype)


def to_numpy(params: PyTree) -> PyTree:
    """The tree with NumPy arrays as leaves. It raises for NaN, infinity and tracers."""

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _floating(f"params{jax.tree_util.keystr(path)}", leaf), params
    )
