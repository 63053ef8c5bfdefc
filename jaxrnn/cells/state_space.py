"""Functions that diagonal state space cells share: steps of a continuous system, and its eigenvalues."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrnn import check
from jaxrnn.engines.arrays import lifted
from jaxrnn.typing import DTypeLike, PyTree

DISCRETIZATIONS = ("zoh", "bilinear")


def check_state_space(cell: Any) -> None:
    """Checks the fields that the cells have in common."""
    name = type(cell).__name__
    check.sizes(cell, "input_size")
    if cell.discretization not in DISCRETIZATIONS:
        raise ValueError(f"{name}.discretization: expected one of {DISCRETIZATIONS}, got {cell.discretization!r}")
    check.steps(cell)
    if cell.timed and cell.input_size < 2:
        raise ValueError(f"{name}.input_size: expected at least 2 with timed, the time included, got 1")


def elapsed(x: Array, timed: bool) -> tuple[Array, Array | None]:
    """Splits x into the input of the system and the time since the step before, or None."""
    return (x[..., :-1], x[..., -1]) if timed else (x, None)


def discretize(how: str, log_decay: Array, frequency: Array, step: Array) -> tuple[Array, Array]:
    """Returns (ā, b̄) of s' = λ s + u over one step, where λ = −exp(log_decay) + i frequency."""
    eigenvalue = lifted(lax.complex(-jnp.exp(log_decay), frequency), step)
    moved = lax.complex(step * eigenvalue.real, step * eigenvalue.imag)
    match how:
        case "zoh":
            return jnp.exp(moved), jnp.expm1(moved) / eigenvalue
        case "bilinear":
            below = 1 - moved / 2
            return (1 + moved / 2) / below, step.astype(moved.dtype) / below
        case _:
            raise ValueError(f"discretization: expected one of {DISCRETIZATIONS}, got {how!r}")


def draw_log_step(key: Array, shape: tuple[int, ...], least: float, most: float, dtype: DTypeLike) -> Array:
    """Draws log Δ uniformly."""
    return jax.random.uniform(key, shape, dtype, math.log(least), math.log(most))


def hippo(pairs: int, dtype: DTypeLike) -> tuple[Array, Array]:
    """Returns (eigenvalues, eigenvectors) of the normal part of HiPPO-LegS with 2 · pairs states, above the real axis.

    They are computed when a program runs, never where only shapes are asked for: for thousands of states this takes
    minutes.

    Returns:
      The values (2, pairs) and the vectors (2 · pairs, 2 · pairs), with real and imaginary parts side by side.
    """
    shapes = jax.ShapeDtypeStruct((2, pairs), dtype), jax.ShapeDtypeStruct((2 * pairs, 2 * pairs), dtype)

    def compute():
        values, vectors = eigenvectors(pairs)
        parts = np.stack([values.real, values.imag]), np.concatenate([vectors.real, vectors.imag], axis=1)
        return tuple(part.astype(shape.dtype) for part, shape in zip(parts, shapes, strict=True))

    return jax.pure_callback(compute, shapes)


@functools.lru_cache(maxsize=16)
def eigenvectors(pairs: int) -> tuple[PyTree, PyTree]:
    """Returns the results of `hippo` as complex numbers: (pairs,) and (2 · pairs, pairs)."""
    root = np.sqrt(1 + 2 * np.arange(2 * pairs))
    skew = np.tril(np.outer(root, root) / 2, -1)
    values, vectors = np.linalg.eigh(-1j * (skew.T - skew))
    return -0.5 + 1j * values[pairs:], vectors[:, pairs:]
