"""Takes torch modules apart into the modules that have weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np

from jaxrnn.compose.stack import Stack
from jaxrnn.convert.activations import here, names, options
from jaxrnn.convert.arrays import Arrays
from jaxrnn.convert.torch.tensors import named_arrays
from jaxrnn.convert.torch.weights import Part, read_part, recurrent
from jaxrnn.layers import Apply, Dropout, Embed, LayerNorm, Linear
from jaxrnn.typing import DTypeLike, Foreign, Named, PyTree, WithParams

# Parts that run one after another, in sequences within sequences as modules are within modules.
Parts = Part | Sequence["Parts"]


def read_module(module: Foreign) -> WithParams:
    """The cell of a module, which runs its children one after another, and its params as NumPy arrays."""
    name, parts = type(module).__name__, module_parts(module)
    named = named_arrays(name, module_weights(module))
    return read_parts(parts, Arrays(name, named), named)


def read_parts(parts: Parts, arrays: Arrays, named: Mapping[str, np.ndarray]) -> WithParams:
    """The cell of the parts and its params, which take all arrays. `named` holds the arrays before any is taken."""
    dtype = next(iter(named.values())).dtype if named else np.dtype("float32")
    cell, params = _built(parts, arrays, dtype)
    arrays.finish()
    return cell, params


def _built(parts: Parts, arrays: Arrays, dtype: DTypeLike) -> WithParams:
    if isinstance(parts, Part):
        return parts.cell, read_part(parts, arrays, dtype)
    built = [_built(part, arrays, dtype) for part in parts]
    try:
        return Stack(tuple(cell for cell, _ in built)), tuple(params for _, params in built)
    except ValueError as error:
        raise ValueError(
            f"{arrays.source}: its parts cannot run one after another: {error}. With parts= a state_dict can tell "
            "another order"
        ) from error


def module_weights(module: Foreign) -> Named:
    """The parameters of a module by name. It raises if two names share one parameter."""
    named = dict(module.named_parameters(remove_duplicate=False))
    seen: dict[PyTree, str] = {}
    for name, weight in named.items():
        first = seen.setdefault(id(weight) if weight.is_meta else (weight.device, weight.data_ptr()), name)
        if first != name and weight.numel():
            raise ValueError(
                f"{type(module).__name__}: {name} is tied to {first}, and params hold two that are trained apart: "
                "convert the state_dict if that is meant"
            )
    return named


def module_parts(module: Foreign, name: str = "", seen: set[int] | None = None) -> Parts:
    """The parts of a module, in the order in which they are defined."""
    seen = set() if seen is None else seen
    kind = type(module)
    if id(module) in seen:
        _refuse(module, name, "it is used twice, and its weights would be two that are trained apart")
    seen.add(id(module))
    _check_plain(module, name)
    ours = not kind.__module__.startswith("torch.")
    if ours or kind.__name__ in ("Sequential", "ModuleList"):
        return _children(module, name, seen)
    if kind.__name__ not in MODULES or not kind.__module__.startswith("torch.nn.modules."):
        _refuse(module, name, "jaxrnn has no counterpart")
    if module._modules:
        _refuse(module, name, f"it has modules inside: {', '.join(module._modules)}")
    for field, value in FIXED.get(kind.__name__, {}).items():
        if getattr(module, field) != value:
            _refuse(module, name, f"expected {field}={value!r}, got {getattr(module, field)!r}")
    try:
        return MODULES[kind.__name__](f"{name}." if name else "", module)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where(module, name)}: {error}") from error


def _children(module: Foreign, name: str, seen: set[int]) -> list[Parts]:
    if own := [key for key, value in module._parameters.items() if value is not None]:
        _refuse(module, name, f"{', '.join(own)} belong to none of its children, so what they do is not known")
    if not children(module):
        _refuse(module, name, "jaxrnn has no counterpart")
    return [module_parts(child, f"{name}.{key}" if name else key, seen) for key, child in children(module)]


def children(module: Foreign) -> list[tuple[str, PyTree]]:
    """The direct children of a module by name, in the order in which they are defined."""
    return [(key, child) for key, child in module._modules.items() if child is not None]


def _check_plain(module: Foreign, name: str) -> None:
    """Raises if something that changes its computation has been added to the module."""
    if hasattr(module, "parametrizations"):
        _refuse(module, name, "its weights are parametrized: torch.nn.utils.parametrize.remove_parametrizations first")
    if hooks := [key for key in ("_forward_hooks", "_forward_pre_hooks") if getattr(module, key, None)]:
        _refuse(module, name, f"it has {hooks[0].strip('_')}, and what they do is not known: remove them first")
    if "forward" in vars(module):
        _refuse(module, name, "its forward has been replaced")
    if buffers := [key for key, value in module._buffers.items() if value is not None]:
        _refuse(module, name, f"jaxrnn has no counterpart of its buffers {', '.join(buffers)}")


def where(module: Foreign, name: str) -> str:
    """A module in error messages: its name, if it has one, and its class."""
    return f"{name!r} ({type(module).__name__})" if name else type(module).__name__


def _refuse(module: Foreign, name: str, why: str) -> NoReturn:
    raise ValueError(f"{where(module, name)}: {why}")


def _recurrent(name: str, module: Foreign) -> Part:
    kind = type(module).__name__
    layered = not kind.endswith("Cell")
    options: Named = {"activation": getattr(module, "nonlinearity", "tanh")}
    if layered:
        options |= {
            "projection_size": module.proj_size or None,
            "bidirectional": module.bidirectional,
            "layers": module.num_layers,
            "dropout": float(module.dropout),
        }
    cell = recurrent(kind.removesuffix("Cell"), module.input_size, module.hidden_size, **options)
    return Part(name, cell, layered, bias=module.bias)


def _layer_norm(name: str, module: Foreign) -> Part:
    if len(module.normalized_shape) != 1:
        raise ValueError(f"expected one normalised axis, got normalized_shape={tuple(module.normalized_shape)}")
    cell = LayerNorm(module.normalized_shape[0], module.eps)
    return Part(name, cell, bias=module.bias is not None, affine=module.weight is not None)


def _activation(name: str, module: Foreign) -> Part:
    kind = type(module).__name__
    known = options("torch", kind)
    given = {option: getattr(module, option) for option in known}
    fn = here("torch", kind, given)
    if fn is None:
        expected = ", ".join(f"{key}={'a number' if value is None else repr(value)}" for key, value in known.items())
        raise ValueError(f"expected {expected}, got {', '.join(f'{key}={value!r}' for key, value in given.items())}")
    return Part(name, Apply(fn))


def _linear(name: str, module: Foreign) -> Part:
    return Part(name, Linear(module.in_features, module.out_features), bias=module.bias is not None)


MODULES = {
    **dict.fromkeys(("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"), _recurrent),
    **dict.fromkeys(names("torch"), _activation),
    "Embedding": lambda name, module: Part(name, Embed(module.num_embeddings, module.embedding_dim)),
    "Linear": _linear,
    "LayerNorm": _layer_norm,
    "Dropout": lambda name, module: Part(name, Dropout(float(module.p))),
}

# Fields with values that have no counterpart.
FIXED: dict[str, Named] = {
    "Embedding": {"max_norm": None, "scale_grad_by_freq": False},
}
