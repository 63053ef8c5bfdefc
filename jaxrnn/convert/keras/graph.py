"""Reads a functional Keras model as one chain of layers."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

from jaxrnn.convert.keras.config import Fields, list_of
from jaxrnn.convert.keras.layers import POOLINGS
from jaxrnn.typing import Foreign, Named, PyTree


def chain(fields: Fields) -> list[PyTree]:
    """The configs of the layers of a functional model, from its input to its output. The layers must form one chain."""
    graph = _Graph(fields)
    name, path = graph.end("output_layers"), []
    while name is not None:
        if name in path[-1:] or len(path) > len(graph.entries):
            raise ValueError(f"{fields.place}: expected one chain of layers, got a cycle through {short(name)}")
        path.append(name)
        name = graph.reads(name)[0]
    if path[-1] != graph.end("input_layers"):
        raise ValueError(f"{fields.place}: expected one chain from input to output, got one from {short(path[-1])}")
    _check_masks(graph, path[::-1])
    return [graph.entry(name) for name in path[::-1]]


class _Graph:
    def __init__(self, fields: Fields):
        self.fields, self.entries = fields, {}
        for entry in list_of(fields, "layers"):
            inner = entry.get("config") if isinstance(entry, Mapping) else None
            name = entry.get("name", inner.get("name")) if isinstance(inner, Mapping) else None
            if not isinstance(name, str) or name in self.entries:
                fields.refuse("layers", name, "layers with names that differ")
            self.entries[name] = entry
        for name, entry in list(self.entries.items()):
            if entry.get("class_name") == "Concatenate":
                self.join(name, entry)

    def join(self, name: str, entry: Foreign) -> None:
        """Replaces a Concatenate of poolings of one tensor by one layer that holds them and reads that tensor."""
        match self.call(name):
            case [[*names]], kwargs if names and not kwargs and all(isinstance(each, _Name) for each in names):
                pools = [self.entry(each) for each in names]
                alike = all(pool.get("class_name") in [*POOLINGS] for pool in pools)
                if alike and len(set(map(self.reads, names))) == 1:
                    self.entries = {each: self.entries[each] for each in self.entries if each not in names}
                    config = {**entry["config"], "layers": pools}
                    self.entries[name] = {**entry, "config": config, "inbound_nodes": pools[0]["inbound_nodes"]}

    def entry(self, name: str) -> Foreign:
        if name not in self.entries:
            self.fields.refuse("layers", sorted(self.entries), f"a layer {short(name)}")
        return self.entries[name]

    def end(self, which: str) -> str:
        """The name of the layer that is the only input or output."""
        value = self.fields.take(which)
        while isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        match value:
            case [str(name), 0, 0]:
                return name
            case [[str(name), 0, int(k)], *_] if which == "output_layers":
                tensors = [list(each) if isinstance(each, (list, tuple)) else each for each in value]
                if tensors == [[name, 0, k + n] for n in range(len(value))]:  # all are one layer's
                    return name
        return self.fields.refuse(which, value, "one tensor, [name, 0, 0]")

    def call(self, name: str) -> tuple[list[PyTree], Named]:
        """The arguments of a layer's only call. A tensor is replaced by the name of the layer that makes it."""
        match self.entry(name).get("inbound_nodes"):
            case []:
                return [], {}
            case [{"args": [*args], "kwargs": dict(kwargs)}]:
                named = {key: _tensor(value) for key, value in kwargs.items()}
                return [[*map(_tensor, v)] if isinstance(v, list) else _tensor(v) for v in args], named
            case [[[str(source), 0, 0]]]:  # Keras 1
                return [_Name(source)], {}
            case [[[str(source), 0, 0, {**kwargs}]]]:  # Keras 2
                return [_Name(source)], kwargs
            case [[_, _, *_] as several]:
                return [[*map(_tensor, several)]], {}
        raise ValueError(f"{self.fields.place}: layer {short(name)}: expected one call")

    def reads(self, name: str) -> tuple[str | None, str | None]:
        """The name of the layer that makes the only input of a layer, and of the one that makes its mask."""
        args, kwargs = self.call(name)
        mask = kwargs.pop("mask", None)
        others = [key for key, value in kwargs.items() if value is not None and value is not False]
        if (args and (len(args) != 1 or not isinstance(args[0], _Name))) or others:
            raise ValueError(
                f"{self.fields.place}: layer {short(name)} ({short(self.entry(name).get('class_name'))}): "
                f"expected one input tensor in one chain of layers, got {short(args)} and {short(others)}; "
                "a decoder's layer is converted by itself, and its initial_state is the carry of scan"
            )
        if mask is not None and not isinstance(mask, _Name):
            raise ValueError(f"{self.fields.place}: layer {short(name)}: mask: expected a tensor, got {short(mask)}")
        return (args[0] if args else None), mask


class _Name(str):
    """The name of the layer that makes a tensor."""


def _tensor(value: Any) -> Foreign:
    match value:
        case {"class_name": "__keras_tensor__", "config": {"keras_history": [str(name), 0, 0]}}:
            return _Name(name)
        case [str(name), 0, 0] | [str(name), 0, 0, {}]:  # Keras 1 and 2
            return _Name(name)
    return value


def _check_masks(graph: _Graph, path: list[str]) -> None:
    """Raises unless every mask passed to a layer is that of the chain's own Masking or Embedding: x ≠ its value."""
    own = {}
    for name in path:
        match graph.entry(name):
            case {"class_name": "Masking", "config": {"mask_value": value}}:
                own[graph.reads(name)[0]] = value
            case {"class_name": "Embedding"}:
                own[graph.reads(name)[0]] = 0
    for name in path:
        mask = graph.reads(name)[1]
        if mask is not None and not _is_own(graph, mask, own):
            raise ValueError(
                f"{graph.fields.place}: layer {short(name)}: mask: expected that of a Masking or Embedding layer of "
                f"the chain, got {short(mask)}"
            )
    for name in graph.entries.keys() - set(path):
        if graph.entry(name).get("class_name") not in ("NotEqual", "Any"):
            raise ValueError(f"{graph.fields.place}: layer {short(name)} is not on the chain from input to output")


def _is_own(graph: _Graph, mask: str, own: dict[str | None, Foreign]) -> bool:
    args, _ = graph.call(mask)
    if graph.entry(mask).get("class_name") == "Any" and args and isinstance(args[0], _Name):
        mask = args[0]
        args, _ = graph.call(mask)
    return graph.entry(mask).get("class_name") == "NotEqual" and len(args) == 2 and own.get(args[0], args) == args[1]
