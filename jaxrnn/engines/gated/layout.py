"""The arrays of a call's recurrences as its primitives take them: members in front, all axes of a batch as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


def together(*leaves: Array) -> Array:
    """The arrays of all members."""
    return leaves[0][None] if len(leaves) == 1 else jnp.stack(leaves)


class Layout(NamedTuple):
    """batch: its axes; by_batch: whether sequences are batch-major."""

    batch: tuple[int, ...]
    by_batch: bool

    def rows(self, *leaves: Array) -> Array:
        """(M, B, H) of (*batch, H)."""
        return together(*leaves).reshape(len(leaves), math.prod(self.batch), leaves[0].shape[-1])

    def sequence(self, arrays: Sequence[Array], *last: int) -> Array:
        """(M, T, B, *last), or batch-major, of (T, *batch, *last) of each recurrence or of all. An axis is moved before
        another one is put in front, so that XLA sees it move back.
        """
        length, rows = arrays[0].shape[0], math.prod(self.batch)
        if self.by_batch:
            arrays = [jnp.moveaxis(array, 0, len(self.batch)) for array in arrays]
        steps = (rows, length) if self.by_batch else (length, rows)
        return together(*arrays).reshape(len(arrays), *steps, *last)

    def back(self, array: Array) -> Array:
        """(T, *batch, H) of a sequence of one recurrence."""
        if self.by_batch:
            return jnp.moveaxis(array.reshape(*self.batch, *array.shape[1:]), len(self.batch), 0)
        return array.reshape(array.shape[0], *self.batch, array.shape[-1])
