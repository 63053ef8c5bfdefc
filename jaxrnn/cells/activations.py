"""Activations by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

Activation = str | tuple[str, float] | tuple[str, float, float] | Callable[[Array], Array]


def _gelu_tanh(x, /):
    # Beyond ±12 tanh is ±1 in every dtype, and its derivative would be 0 ∞.
    y = jnp.clip(x, -12, 12)
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


# name: (function of x, alpha and beta; the defaults of alpha and beta, as many as it takes)
ACTIVATIONS: dict[str, tuple[Callable[..., Array], tuple[float, ...]]] = {
    "identity": (lambda x: x, ()),
    "affine": (lambda x, alpha, beta: alpha * x + beta, (1.0, 0.0)),
    "exponential": (jnp.exp, ()),
    "relu": (jax.nn.relu, ()),
    "relu6": (jax.nn.relu6, ()),
    "leaky_relu": (lambda x, alpha: jnp.where(x >= 0, x, alpha * x), (0.01,)),
    "thresholded_relu": (lambda x, alpha: jnp.where(x > alpha, x, jnp.zeros_like(x)), (1.0,)),
    "elu": (lambda x, alpha: jax.nn.elu(x, alpha), (1.0,)),
    "celu": (lambda x, alpha: jax.nn.celu(x, alpha), (1.0,)),
    "selu": (jax.nn.selu, ()),
    "gelu": (lambda x: jax.nn.gelu(x, approximate=False), ()),
    "gelu_tanh": (_gelu_tanh, ()),
    "silu": (jax.nn.silu, ()),
    "hard_silu": (jax.nn.hard_silu, ()),
    "mish": (jax.nn.mish, ()),
    "softplus": (jax.nn.softplus, ()),
    "squareplus": (lambda x, alpha: (x + jnp.hypot(x, jnp.full_like(x, math.sqrt(alpha)))) / 2, (4.0,)),
    "softshrink": (lambda x, alpha: x - jnp.clip(x, -alpha, alpha), (0.5,)),
    "hardshrink": (lambda x, alpha: jnp.where(jnp.abs(x) > alpha, x, jnp.zeros_like(x)), (0.5,)),
    "tanhshrink": (lambda x: x - jnp.tanh(x), ()),
    "tanh": (jnp.tanh, ()),
    "scaled_tanh": (lambda x, alpha, beta: alpha * jnp.tanh(beta * x), (1.0, 1.0)),
    "hard_tanh": (lambda x, alpha, beta: jnp.clip(x, alpha, beta), (-1.0, 1.0)),
    "softsign": (jax.nn.soft_sign, ()),
    "sigmoid": (jax.nn.sigmoid, ()),
    "log_sigmoid": (jax.nn.log_sigmoid, ()),
    "hard_sigmoid": (lambda x, alpha, beta: jnp.clip(alpha * x + beta, 0, 1), (0.2, 0.5)),
    "keras_hard_sigmoid": (lambda x: jnp.clip(x / 6 + 0.5, 0, 1), ()),
    "softmax": (jax.nn.softmax, ()),
    "log_softmax": (jax.nn.log_softmax, ()),
}
ALONG_FEATURES = ("softmax", "log_softmax")


def activation(spec: Activation) -> Callable[[Array], Array]:
    """Returns the function that `spec` names.

        identity            x
        affine              α x + β; α = 1, β = 0
        exponential         eˣ
        relu                max(x, 0)
        relu6               clip(x, 0, 6)
        leaky_relu          x, or α x below 0; α = 0.01
        thresholded_relu    x above α, else 0; α = 1
        elu                 x, or α (eˣ − 1) below 0; α = 1
        celu                x, or α (exp(x/α) − 1) below 0; α = 1
        selu                λ x, or λ α (eˣ − 1) below 0; λ = 1.0507…, α = 1.6732…
        gelu                x Φ(x), Φ the distribution function of the standard normal distribution
        gelu_tanh           ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))), which is nearly gelu
        silu                x σ(x), also called swish
        hard_silu           x clip(x/6 + ½, 0, 1), also called hard swish
        mish                x tanh(log(1 + eˣ))
        softplus            log(1 + eˣ)
        squareplus          ½ (x + √(x² + α)); α = 4
        softshrink          x − clip(x, −α, α); α = ½
        hardshrink          x where |x| > α, else 0; α = ½
        tanhshrink          x − tanh(x)
        tanh                tanh(x)
        scaled_tanh         α tanh(β x); α = 1, β = 1
        hard_tanh           clip(x, α, β); α = −1, β = 1
        softsign            x / (1 + |x|)
        sigmoid             σ(x) = 1 / (1 + e⁻ˣ)
        log_sigmoid         log σ(x)
        hard_sigmoid        clip(α x + β, 0, 1); α = 0.2, β = ½
        keras_hard_sigmoid  clip(x/6 + ½, 0, 1), that of Keras 3, PyTorch and JAX
        softmax             eˣ / Σ eˣ over the last axis, the features
        log_softmax         x − log Σ eˣ over the last axis, the features

    `jax.nn`, `torch.nn`, Keras 3 and ONNX have most of them under similar names.

    Args:
      spec: A name, `(name, alpha)` or `(name, alpha, beta)`, or an elementwise callable. A callable is compared by
        identity, and a cell that holds one may neither print as an expression nor pickle. softmax and log_softmax are
        for `jaxrnn.Apply`: within a cell, an activation acts on each unit by itself.

    Raises:
      ValueError: If the name is not known, or if there are more numbers than it takes.
      TypeError: If `spec` is anything else.

    Examples:
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


def elementwise(spec: Activation) -> Callable[[Array], Array]:
    """Returns the function that `spec` names; raises an error if it does not act on every unit by itself."""
    function = activation(spec)
    name = spec[0] if isinstance(spec, tuple) else spec
    if name in ALONG_FEATURES:
        raise ValueError(f"activation: expected an elementwise one, got {name!r}; put Apply({name!r}) above")
    return function


def check_elementwise(*specs: Activation) -> None:
    """Raises an error unless each activation acts on every unit by itself."""
    for spec in specs:
        elementwise(spec)
