"""The functions of JAX that have a name among our activations: Flax's and Equinox's modules hold functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# The first function of a name is the one that goes out.
_FUNCTIONS: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("identity", jax.nn.identity),
    ("relu", jax.nn.relu),
    ("tanh", jnp.tanh),
    ("tanh", lax.tanh),
    ("sigmoid", jax.nn.sigmoid),
    ("sigmoid", lax.logistic),
    ("softsign", jax.nn.soft_sign),
    ("softplus", jax.nn.softplus),
    ("leaky_relu", jax.nn.leaky_relu),
    ("elu", jax.nn.elu),
    ("keras_hard_sigmoid", jax.nn.hard_sigmoid),
)


def name_of(place: str, function: Any) -> str:
    """The name of one of JAX's activations; `place` says where it was, for the message."""
    for name, known in _FUNCTIONS:
        if function is known:
            return name
    described = getattr(function, "__name__", None) or repr(function)
    known = ", ".join(known.__name__ for _, known in _FUNCTIONS)
    raise ValueError(f"{place}: expected an activation of JAX, one of {known}; got {described}")


def function_of(name: Any) -> Callable[..., Any] | None:
    """JAX's function of this name, or None where it has none."""
    return next((function for known, function in _FUNCTIONS if known == name), None)
