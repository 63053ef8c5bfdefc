"""Finds one recurrent node of a model, in the graph or in a subgraph (of If, Loop, Scan)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from typing import NamedTuple

from jaxrnn.convert.onnx.read import RECURRENT, File, Input, Model, array, inputs_of, node, opset, value_info
from jaxrnn.typing import Foreign, PyTree


class Scope(NamedTuple):
    """A graph. For a subgraph, also the graph around it, and the position there of the node that holds it."""

    graph: Foreign
    outer: Scope | None = None
    place: int = 0

    @property
    def holder(self) -> Foreign:
        """The node that has this subgraph."""
        return self.outer.graph.node[self.place]  # type: ignore[union-attr]

    def inside(self, place: int) -> Iterator[Scope]:
        """The subgraphs of a node."""
        for each in self.graph.node[place].attribute:
            yield from (Scope(graph, self, place) for graph in ([each.g] if each.type == 5 else each.graphs))

    def around(self) -> list[Scope]:
        """This scope and the scopes around it, the outermost first."""
        return ([] if self.outer is None else self.outer.around()) + [self]


class Found(NamedTuple):
    """A recurrent node, given by the graph that it is in and its position there."""

    scope: Scope
    place: int

    @property
    def proto(self) -> Foreign:
        """The NodeProto."""
        return self.scope.graph.node[self.place]

    @property
    def names(self) -> list[str]:
        """The names that find it: its own and those of its outputs, also after the names of the nodes around it."""
        own = [name for name in (self.proto.name, *self.proto.output) if name]
        holders = [each.holder for each in self.scope.around()[1:]]
        path = "".join(f"{each.name or '/'.join(each.output)}/" for each in holders)
        return list(dict.fromkeys([*own, *(path + name for name in own)]))

    def above(self) -> list[PyTree]:
        """The nodes that run before this one, in an order in which they can run."""
        scopes = self.scope.around()
        places = [*(each.place for each in scopes[1:]), self.place]
        return [each for scope, place in zip(scopes, places, strict=True) for each in scope.graph.node[:place]]

    def before(self) -> list[str]:
        """The operators that compute X."""
        wanted, ops = set(self.proto.input[:1]) - {""}, []
        for each in reversed(self.above()):
            if wanted.intersection(each.output):
                wanted.update(filter(None, each.input))
                ops.append(each.op_type)
        return ops[::-1]

    def after(self) -> list[str]:
        """The operators that use the outputs of this node, directly or through other nodes."""
        reached, ops = set(filter(None, self.proto.output)), []
        for scope in reversed(self.scope.around()):
            for each in scope.graph.node:
                if reached.intersection(each.input):
                    reached.update(filter(None, each.output))
                    ops.append(each.op_type)
            if scope.outer is not None:
                reached.update(filter(None, scope.holder.output))
        return ops


def recurrent_nodes(file: File) -> list[Found]:
    """All recurrent nodes of a model, including those in subgraphs."""
    found, scopes = [], [Scope(file.proto.graph)]
    for scope in scopes:
        for place, each in enumerate(scope.graph.node):
            if each.op_type in RECURRENT and each.domain in ("", "ai.onnx"):
                found.append(Found(scope, place))
            scopes += scope.inside(place)
    return found


def labels(found: list[Found]) -> list[str]:
    """For each node, a name that no other node has, if there is one."""
    counts = Counter(name for each in found for name in each.names)
    return [next((n for n in each.names if counts[n] == 1), "/".join(each.proto.output)) for each in found]


def find_node(file: File, name: str) -> Found:
    """The recurrent node with this name."""
    found = recurrent_nodes(file)
    called = [each for each in found if name in each.names]
    if len(called) != 1:
        known = ", ".join(map(repr, labels(found))) or "there is none"
        raise ValueError(f"node: expected the name or an output of one recurrent node ({known}), got {name!r}")
    return called[0]


def alone(file: File, found: Found, foldable: Container[str]) -> Model:
    """A graph of this node and of the nodes that compute its constants, whose operators are in `foldable`.

    All other values that it reads become inputs.
    """
    recurrent = node(found.proto, file.data)
    x, y = (*recurrent.inputs, "")[0], "the output of the recurrent node"
    scopes = found.scope.around()
    tensors = {each.name: each for scope in scopes for each in scope.graph.initializer}
    shapes = _shapes(scopes) | inputs_of(recurrent._replace(inputs=(x,)), ())
    constants, makers = set(tensors) - {x}, []
    for each in found.above():
        read = set(filter(None, each.input)) - constants
        sizes = each.op_type == "Shape" and read <= set(shapes)
        if (sizes or (each.op_type in foldable and not read)) and x not in each.output:
            constants.update(each.output)
            makers.append(each)
    wanted, kept = set(recurrent.inputs) & constants, []
    for each in reversed(makers):
        if wanted.intersection(each.output):
            wanted.update(filter(None, each.input))
            kept.append(node(each, file.data))
    stored = wanted & constants & set(tensors)
    arrays = {name: array(f"onnx: initializer {name!r}", tensors[name], file.data) for name in stored}
    inputs = {name: shapes[name] for name in wanted - constants} | inputs_of(recurrent, constants)
    recurrent = recurrent._replace(outputs=(y, *recurrent.outputs[1:]))
    room = file.proto.ByteSize() + file.data.bytes
    return Model(inputs, arrays, [*kept[::-1], recurrent], (y,), opset(file), room)


def _shapes(scopes: list[Scope]) -> dict[str, Input]:
    """The values for which the model states the number of axes."""
    found = {}
    for scope in scopes:
        for each in (*scope.graph.input, *scope.graph.value_info):
            try:
                value = value_info(each.name, each)
            except ValueError:
                continue
            if value.dims is not None:
                found[each.name] = value
    return found
