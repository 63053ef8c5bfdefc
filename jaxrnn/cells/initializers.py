"""How weights are drawn. All compute in at least float32 and cast, since QR has no half precision."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn.engines.arrays import accumulator


def per_gate(initializer: Callable, key: Array, rows: int, columns: int, gates: int, dtype) -> Array:
    """(rows, gates · columns), each gate's block drawn by itself."""
    wide = accumulator(dtype)
    blocks = [initializer(each, (rows, columns), wide) for each in jax.random.split(key, gates)]
    return jnp.concatenate(blocks, axis=1).astype(dtype)


def lecun_normal(key: Array, rows: int, columns: int, gates: int, dtype) -> Array:
    """Normal of variance 1/rows, truncated, per gate."""
    return per_gate(jax.nn.initializers.lecun_normal(), key, rows, columns, gates, dtype)


def orthogonal(key: Array, rows: int, columns: int, gates: int, dtype) -> Array:
    """Orthogonal (semi-orthogonal where not square), per gate."""
    return per_gate(jax.nn.initializers.orthogonal(), key, rows, columns, gates, dtype)
