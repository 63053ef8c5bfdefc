"""Finds the modules of a state_dict from names and shapes, and says which facts these do not give."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jaxrnn.cell import Cell
from jaxrnn.convert.arrays import Arrays
from jaxrnn.convert.torch.weights import GATES, Part, recurrent
from jaxrnn.layers import Embed, LayerNorm, Linear

RECURRENT = re.compile(r"(weight|bias)_(ih|hh|hr)(_l\d+)?(_reverse)?")

# The modules that a weight and a bias of so many axes may belong to.
OWNERS = {
    (2, 1): ("Linear",),
    (2, None): ("Embedding", "Linear"),
    (1, 1): ("LayerNorm",),
    (1, None): ("LayerNorm", "RMSNorm", "PReLU"),
}


def named_parts(
    arrays: Arrays,
    names: list[str],
    *,
    parts: Mapping[str, str | None] | None,
    activation: str | None,
    epsilon: float | None,
    ordered: bool,
) -> list[Part]:
    """The modules to which arrays of these names and shapes belong, in the order in which they run.

    `ordered` says whether the order of the names has a meaning.
    """
    groups = _groups(arrays.source, names)
    if parts is None:
        parts = dict.fromkeys(_order(arrays.source, groups, ordered))
    if not isinstance(parts, Mapping) or set(parts) != set(groups):
        raise ValueError(f"{arrays.source}: parts: expected a mapping of the names {list(groups)}, got {parts!r}")
    found = [_part(arrays, name, groups[name], kind, activation, epsilon) for name, kind in parts.items()]
    kinds = {kind for kind, _ in found}
    for argument, value, kind in (("activation", activation, "RNN"), ("epsilon", epsilon, "LayerNorm")):
        if value is not None and kind not in kinds:
            raise ValueError(f"{arrays.source}: {argument}={value!r}: there is no {kind} that it could be of")
    return [part for _, part in found]


def _groups(source: str, names: list[str]) -> dict[str, dict[str, str]]:
    """For each part, a mapping from the names of its arrays within the part to their full names."""
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        part, _, array = name.rpartition(".")
        if array not in ("weight", "bias") and not RECURRENT.fullmatch(array):
            raise ValueError(f"{source}: unexpected name {name!r}: no array of an RNN, Embedding, Linear or LayerNorm")
        groups.setdefault(part, {})[array] = name
    return groups


def _order(source: str, groups: dict[str, dict[str, str]], ordered: bool) -> list[str]:
    """The parts in order: numbered parts by number, others as they come if this is torch's own order."""
    paths = [part.split(".") for part in groups]
    start = 0  # of what follows the prefix that all have in common
    while all(len(path) > start + 1 and path[start] == paths[0][start] for path in paths):
        start += 1
    if all(key.isdecimal() and key.isascii() and len(key) < 10 for path in paths for key in path[start:]):
        return sorted(groups, key=lambda part: [int(key) for key in part.split(".")[start:]])
    # In torch every weight comes before the biases, and a file or a mapping sorted by name begins with biases.
    by_name = any(next(iter(group)).startswith("bias") for group in groups.values())
    if len(groups) > 1 and (by_name or not ordered):
        raise ValueError(
            f"{source}: its names are in no order that tells which part runs first: say so by parts=, with the names "
            f"{list(groups)} in order, each with its torch class, or None where the shapes tell that"
        )
    return list(groups)


def _part(
    arrays: Arrays, name: str, group: dict[str, str], given: str | None, activation: str | None, epsilon: float | None
) -> tuple[str, Part]:
    where = f"{arrays.source}: {name!r}" if name else arrays.source
    prefix = f"{name}." if name else ""
    if any(array.startswith("weight_ih") for array in group):
        kind, part = _recurrent(arrays, where, prefix, group, activation)
        if given is not None and given.removesuffix("Cell") != kind:
            raise ValueError(f"{where}: its shapes are of {kind}, not of {given!r}")
        return kind, part
    axes = tuple(len(arrays.shape(prefix + key)) if key in group else None for key in ("weight", "bias"))
    owners = OWNERS.get(axes)  # type: ignore[arg-type]
    if owners is None:
        raise ValueError(f"{where}: {', '.join(group)} of {axes} axes belong to no RNN, Embedding, Linear or LayerNorm")
    if given is None and len(owners) > 1:
        raise ValueError(f"{where}: its arrays may be of {' or '.join(owners)}: say which by parts={{{name!r}: ...}}")
    kind = given or owners[0]
    if kind not in owners:
        raise ValueError(f"{where}: its shapes are of {' or '.join(owners)}, not of {kind!r}")
    cell = _layer(where, kind, arrays.shape(f"{prefix}weight"), epsilon)
    return kind, Part(prefix, cell, bias="bias" in group)


def _layer(where: str, kind: str, shape: tuple[int, ...], epsilon: float | None) -> Cell:
    match kind:
        case "Embedding":
            return Embed(*shape)
        case "Linear":
            return Linear(shape[1], shape[0])
        case "LayerNorm":
            if epsilon is None:
                raise ValueError(f"{where}: no array tells the eps of its LayerNorm: give epsilon= (1e-5 unless set)")
            return LayerNorm(shape[0], epsilon)
    raise ValueError(f"{where}: jaxrnn has no counterpart of {kind}")


def _recurrent(
    arrays: Arrays, where: str, prefix: str, group: dict[str, str], activation: str | None
) -> tuple[str, Part]:
    layered = any("_l" in array for array in group)
    suffix = "_l0" if layered else ""
    below = _matrix(arrays, f"{prefix}weight_ih{suffix}")[1]
    rows, size = _matrix(arrays, f"{prefix}weight_hh{suffix}")
    projected = f"weight_hr{suffix}" in group
    hidden = _matrix(arrays, f"{prefix}weight_hr{suffix}")[1] if projected else size
    kind = next((kind for kind, gates in GATES.items() if gates * hidden == rows), None)
    if kind is None or (projected and kind != "LSTM"):
        blocks = "4 (LSTM) with a projection" if projected else "1 (RNN), 3 (GRU) or 4 (LSTM)"
        raise ValueError(f"{where}: weight_hh{suffix}: expected {blocks} blocks of {hidden} rows, got {rows} rows")
    if kind == "RNN" and activation not in ("tanh", "relu"):
        raise ValueError(
            f"{where}: no array tells the RNN's nonlinearity: activation= 'tanh' or 'relu', got {activation!r}"
        )
    layers = 1
    while f"weight_ih_l{layers}" in group:
        layers += 1
    cell = recurrent(
        kind,
        below,
        hidden,
        activation=activation if kind == "RNN" and activation else "tanh",
        projection_size=size if projected else None,
        bidirectional=f"weight_ih{suffix}_reverse" in group and layered,
        layers=layers,
    )
    return kind, Part(prefix, cell, layered, bias=any(array.startswith("bias") for array in group))


def _matrix(arrays: Arrays, name: str) -> tuple[int, ...]:
    shape = arrays.shape(name)
    if len(shape) != 2:
        raise ValueError(f"{arrays.source}: {name}: expected two axes, got shape {shape}")
    return shape
