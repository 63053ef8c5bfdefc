"""Activations by name: the eleven of ONNX, Keras' hard sigmoid, SiLU, GELU and the identity."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

Activation = str | tuple[str, float] | tuple[str, float, float] | Callable[[Array], Array]

# name: (function of x, alpha and beta; the defaults of alpha and beta, as many as it takes)
ACTIVATIONS: dict[str, tuple[Callable[..., Array], tuple[float, ...]]] = {
    "identity": (lambda x: x, ()),
    "relu": (jax.nn.relu, ()),
    "tanh": (jnp.tanh, ()),
    "sigmoid": (jax.nn.sigmoid, ()),
    "softsign": (jax.nn.soft_sign, ()),
    "softplus": (jax.nn.softplus, ()),
    "affine": (lambda x, alpha, beta: alpha * x + beta, (1.0, 0.0)),
    "leaky_relu": (lambda x, alpha: jnp.where(x >= 0, x, alpha * x), (0.01,)),
    "thresholded_relu": (lambda x, alpha: jnp.where(x > alpha, x, jnp.zeros_like(x)), (1.0,)),
    "scaled_tanh": (lambda x, alpha, beta: alpha * jnp.tanh(beta * x), (1.0, 1.0)),
    "hard_sigmoid": (lambda x, alpha, beta: jnp.clip(alpha * x + beta, 0, 1), (0.2, 0.5)),
    "elu": (lambda x, alpha: jax.nn.elu(x, alpha), (1.0,)),
    "silu": (jax.nn.silu, ()),
    "gelu": (lambda x: jax.nn.gelu(x, approximate=False), ()),
    "keras_hard_sigmoid": (lambda x: jnp.clip(x / 6 + 0.5, 0, 1), ()),
}


def activation(spec: Activation) -> Callable[[Array], Array]:
    """The function that `spec` names.

    Args:
      spec: a name, `(name, alpha)` or `(name, alpha, beta)`, or an elementwise callable. A callable is compared by
        identity, and a cell that holds one may neither print as an expression nor pickle.

        identity x · relu max(x, 0) · tanh · sigmoid 1/(1 + e⁻ˣ) · softsign x/(1 + |x|) · softplus log(1 + eˣ)
        affine αx + β (1, 0) · leaky_relu x, or αx below 0 (0.01) · thresholded_relu x above α, else 0 (1)
        scaled_tanh α tanh(βx) (1, 1) · hard_sigmoid clip(αx + β, 0, 1) (0.2, 0.5) · elu x, or α(eˣ − 1) below 0 (1)
        keras_hard_sigmoid clip(x/6 + ½, 0, 1) · silu x/(1 + e⁻ˣ) · gelu x Φ(x), Φ that of the normal distribution

    Raises:
      ValueError: for a name that is not known, or more numbers than it takes.
      TypeError: for anything else.

    Reference: the activation functions of ONNX's RNN operators; Keras 3's `hard_sigmoid`.

        >>> import jaxrnn
        >>> float(jaxrnn.activation(("leaky_relu", 0.5))(-2.0))
        -1.0
    """
    if callable(spec):
        return spec
    name, *given = spec if isinstance(spec, tuple) else (spec,)
    if not isinstance(name, str) or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in given):
        raise TypeError(f"activation: expected a name, (name, alpha, beta) or a callable, got {spec!r}")
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {name!r}")
    function, defaults = ACTIVATIONS[name]
    if len(given) > len(defaults):
        raise ValueError(f"activation: {name} takes {len(defaults)} numbers, got {len(given)}")
    numbers = (*given, *defaults[len(given) :])
    return lambda x: function(x, *numbers)
