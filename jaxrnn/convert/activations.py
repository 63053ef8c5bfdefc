"""The activations in other frameworks: one table, and functions that look up in both directions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrnn.cells.activations import ACTIVATIONS, ALONG_FEATURES, Activation
from jaxrnn.typing import Foreign, Named, PyTree

Framework = Literal["jax", "torch", "keras", "onnx"]


class There(NamedTuple):
    """An activation in another framework.

    name: The name of its function (in JAX the function itself), module, layer or operator. numbers: The options that
    are its numbers α (0) or β (1). fixed: The other options, each with the value that makes it this activation.
    """

    name: Any
    numbers: Mapping[str, int] = {}
    fixed: Mapping[str, PyTree] = {}


class Known(NamedTuple):
    """The counterparts of an activation in other frameworks, or None where there is none.

    jax: The function, for Flax and Equinox too. torch: The module. keras: The name of the activation, or a layer if the
    activation has numbers. onnx: The operator, or a name that only an RNN has. rnn: Whether ONNX's RNN, LSTM and GRU
    have it.
    """

    jax: There | None
    torch: There | None
    keras: There | None
    onnx: There | None
    rnn: bool = False


_ALPHA, _ALPHA_BETA = {"alpha": 0}, {"alpha": 0, "beta": 1}
_SELU = {"alpha": 1.6732632423543772, "gamma": 1.0507009873554805}

# Of two that share a name, the one with the fixed options comes first.
KNOWN: dict[str, Known] = {
    "identity": Known(There(jax.nn.identity), There("Identity"), There("linear"), There("Identity")),
    "affine": Known(None, None, None, There("Affine", _ALPHA_BETA), rnn=True),
    "exponential": Known(There(jnp.exp), None, There("exponential"), There("Exp")),
    "relu": Known(There(jax.nn.relu), There("ReLU"), There("relu"), There("Relu"), rnn=True),
    "relu6": Known(There(jax.nn.relu6), There("ReLU6"), There("relu6"), There("Clip", fixed={"min": 0.0, "max": 6.0})),
    "leaky_relu": Known(
        There(jax.nn.leaky_relu, {"negative_slope": 0}),
        There("LeakyReLU", {"negative_slope": 0}),
        There("LeakyReLU", {"negative_slope": 0}),
        There("LeakyRelu", _ALPHA),
        rnn=True,
    ),
    "thresholded_relu": Known(
        None,
        There("Threshold", {"threshold": 0}, {"value": 0}),
        There("ReLU", {"threshold": 0}),
        There("ThresholdedRelu", _ALPHA),
        rnn=True,
    ),
    "elu": Known(There(jax.nn.elu, _ALPHA), There("ELU", _ALPHA), There("ELU", _ALPHA), There("Elu", _ALPHA), rnn=True),
    "celu": Known(There(jax.nn.celu, _ALPHA), There("CELU", _ALPHA), There("celu"), There("Celu", _ALPHA)),
    "selu": Known(There(jax.nn.selu), There("SELU"), There("selu"), There("Selu", fixed=_SELU)),
    "gelu": Known(
        There(jax.nn.gelu, fixed={"approximate": False}),
        There("GELU", fixed={"approximate": "none"}),
        There("gelu"),
        There("Gelu", fixed={"approximate": "none"}),
    ),
    "gelu_tanh": Known(
        There(jax.nn.gelu, fixed={"approximate": True}),
        There("GELU", fixed={"approximate": "tanh"}),
        None,
        There("Gelu", fixed={"approximate": "tanh"}),
    ),
    "silu": Known(There(jax.nn.silu), There("SiLU"), There("silu"), There("Swish", fixed={"alpha": 1.0})),
    "hard_silu": Known(There(jax.nn.hard_silu), There("Hardswish"), There("hard_silu"), There("HardSwish")),
    "mish": Known(There(jax.nn.mish), There("Mish"), There("mish"), There("Mish")),
    "softplus": Known(
        There(jax.nn.softplus),
        There("Softplus", fixed={"beta": 1, "threshold": 20}),
        There("softplus"),
        There("Softplus"),
        rnn=True,
    ),
    "squareplus": Known(There(jax.nn.squareplus, {"b": 0}), None, There("squareplus"), None),
    "softshrink": Known(
        None, There("Softshrink", {"lambd": 0}), There("soft_shrink"), There("Shrink", {"lambd": 0, "bias": 0})
    ),
    "hardshrink": Known(
        None, There("Hardshrink", {"lambd": 0}), There("hard_shrink"), There("Shrink", {"lambd": 0}, {"bias": 0.0})
    ),
    "tanhshrink": Known(None, There("Tanhshrink"), There("tanh_shrink"), None),
    "tanh": Known(There(jnp.tanh), There("Tanh"), There("tanh"), There("Tanh"), rnn=True),
    "scaled_tanh": Known(None, None, None, There("ScaledTanh", _ALPHA_BETA), rnn=True),
    "hard_tanh": Known(
        There(jax.nn.hard_tanh),
        There("Hardtanh", {"min_val": 0, "max_val": 1}),
        There("hard_tanh"),
        There("Clip", {"min": 0, "max": 1}),
    ),
    "softsign": Known(There(jax.nn.soft_sign), There("Softsign"), There("softsign"), There("Softsign"), rnn=True),
    "sigmoid": Known(There(jax.nn.sigmoid), There("Sigmoid"), There("sigmoid"), There("Sigmoid"), rnn=True),
    "log_sigmoid": Known(There(jax.nn.log_sigmoid), There("LogSigmoid"), There("log_sigmoid"), None),
    "keras_hard_sigmoid": Known(
        There(jax.nn.hard_sigmoid),
        There("Hardsigmoid"),
        There("hard_sigmoid"),
        There("HardSigmoid", fixed={"alpha": 1 / 6, "beta": 0.5}),
        rnn=True,
    ),
    "hard_sigmoid": Known(None, None, None, There("HardSigmoid", _ALPHA_BETA), rnn=True),
    "softmax": Known(
        There(jax.nn.softmax, fixed={"axis": -1}),
        There("Softmax", fixed={"dim": -1}),
        There("softmax"),
        There("Softmax", fixed={"axis": -1}),
    ),
    "log_softmax": Known(
        There(jax.nn.log_softmax, fixed={"axis": -1}),
        There("LogSoftmax", fixed={"dim": -1}),
        There("log_softmax"),
        There("LogSoftmax", fixed={"axis": -1}),
    ),
}
_SAME_IN_JAX = ((lax.tanh, jnp.tanh), (lax.logistic, jax.nn.sigmoid), (lax.exp, jnp.exp))


def canonical(spec: Activation) -> Activation:
    """An activation in one form: without its numbers if all are the defaults, otherwise with all of them."""
    if callable(spec):
        return spec
    name, *given = spec if isinstance(spec, tuple) else (spec,)
    defaults = ACTIVATIONS[name][1]
    numbers = (*given, *defaults[len(given) :])
    return name if numbers == defaults else (name, *numbers)  # type: ignore[return-value]


def there(spec: Activation, framework: Framework) -> tuple[PyTree, Named] | None:
    """The name of an activation in a framework and all its options, or None if the framework does not have it."""
    spec = canonical(spec)
    if callable(spec):
        return None
    name, *numbers = spec if isinstance(spec, tuple) else (spec, *ACTIVATIONS[spec][1])
    place = getattr(KNOWN[name], framework)
    if place is None or (not place.numbers and isinstance(spec, tuple)):
        return None
    return place.name, {**place.fixed, **{option: float(numbers[k]) for option, k in place.numbers.items()}}


def options(framework: Framework, name: Any) -> Named:
    """The options that distinguish activations of one name: a value that an option may have, or None for any number."""
    places = [place for place in _places(framework).values() if _same(place.name, name)]
    return {option: place.fixed.get(option) for place in places for option in (*place.fixed, *place.numbers)}


def here(framework: Framework, name: Any, given: Mapping[str, PyTree]) -> Activation | None:
    """The activation with this name and these options in a framework, or None if there is none."""
    single = np.float32 if framework == "onnx" else float  # which ONNX's numbers are
    for ours, place in _places(framework).items():
        if not _same(place.name, name) or any(not _equal(single, given[key], v) for key, v in place.fixed.items()):
            continue
        numbers = [*ACTIVATIONS[ours][1]]
        for option, k in place.numbers.items():
            value = given[option]
            if isinstance(value, bool) or not isinstance(value, Real):
                break
            numbers[k] = numbers[k] if single(value) == single(numbers[k]) else float(value)
        else:
            if all(_equal(single, given[option], numbers[k]) for option, k in place.numbers.items()):
                return canonical((ours, *numbers))  # type: ignore[arg-type]
    return None


def names(framework: Framework) -> list[PyTree]:
    """The framework's names of all activations, each once."""
    return list(dict.fromkeys(place.name for place in _places(framework).values()))


def name_of(place: str, function: Foreign, *, elementwise: bool = False) -> Activation:
    """The name of a JAX function, or of a `functools.partial` of one. `place` says where it was, for error messages."""
    inner, given = function, {}
    if isinstance(function, partial) and not function.args:
        inner, given = function.func, function.keywords
    inner = next((known for same, known in _SAME_IN_JAX if same is inner), inner)
    known = options("jax", inner)
    if given.keys() <= known.keys():
        spec = here("jax", inner, _defaults(inner, known) | given)
        if spec is not None and not (elementwise and spec in ALONG_FEATURES):
            return spec
    described = getattr(function, "__name__", None) or repr(function)
    expected = ", ".join(each.__name__ for each in names("jax"))
    raise ValueError(f"{place}: expected an activation of JAX, one of {expected}; got {described}")


def function_of(spec: Activation) -> Callable[..., PyTree] | None:
    """The JAX function of this name, with the options that differ from its defaults, or None if JAX has none."""
    found = there(spec, "jax")
    if found is None:
        return None
    function, given = found
    defaults = _defaults(function, given)
    changed = {option: value for option, value in given.items() if value != defaults[option]}
    return partial(function, **changed) if changed else function


def _places(framework: Framework) -> dict[str, There]:
    return {ours: place for ours, row in KNOWN.items() if (place := getattr(row, framework)) is not None}


def _defaults(function: Callable[..., Foreign], known: Mapping[str, PyTree]) -> Named:
    parameters = inspect.signature(function).parameters if known else {}
    return {option: parameters[option].default for option in known}


def _same(name: Any, other: Any) -> bool:
    return name is other or (isinstance(name, str) and name == other)


def _equal(single: Callable[[PyTree], PyTree], given: Any, wanted: Any) -> bool:
    if isinstance(given, Real) and isinstance(wanted, Real):
        return single(given) == single(wanted)
    return type(given) is type(wanted) and given == wanted
