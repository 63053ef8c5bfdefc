"""Helpers for all converters: a model as its layers in order, and errors that name the place."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, NoReturn

from jaxrnn import check
from jaxrnn.cell import Cell
from jaxrnn.compose.stack import Stack
from jaxrnn.convert.arrays import to_numpy
from jaxrnn.typing import PyTree, WithParams


class Placed(NamedTuple):
    """A cell of a model, its params, and its place: `cell`, `cell.cells[2]`, `cell.cells[2].forward`."""

    cell: Any  # a Cell, whose fields converters ask for by its class
    params: PyTree
    place: str = "cell"

    def part(self, name: str, params: PyTree) -> Placed:
        """The cell in the field `name`, with these params."""
        return Placed(getattr(self.cell, name), params, f"{self.place}.{name}")

    def refuse(self, why: str) -> NoReturn:
        """Raises the `ValueError` that says which cell cannot be converted, and why."""
        raise ValueError(f"{self.place}: {self.cell!r}: {why}")

    def only(self, *fields: str, why: str) -> None:
        """Raises unless all fields except these have their default values."""
        for field in dataclasses.fields(self.cell):
            value = getattr(self.cell, field.name)
            if field.name not in fields and field.default is not dataclasses.MISSING and value != field.default:
                raise ValueError(f"{self.place}: {self.cell!r}: {field.name}={value!r}: {why}")


def placed(cell: Cell, params: PyTree) -> Placed:
    """The whole model, with params as NumPy arrays. Checks that they are finite and have the shapes of the cell."""
    check.a_cell("cell", cell)
    check.params(cell, params)
    return Placed(cell, to_numpy(params))


def layers(model: Placed) -> list[Placed]:
    """The cells that run one after another: a `Stack`, and every `Stack` in it, is replaced by its cells."""
    match model.cell:
        case Stack(cells=cells, skip=skip):
            if skip:
                model.refuse("skip connections have no counterpart")
            inside = zip(cells, model.params, strict=True)
            return [
                each
                for k, (cell, params) in enumerate(inside)
                for each in layers(Placed(cell, params, f"{model.place}.cells[{k}]"))
            ]
    return [model]


def stacked(cells: list[WithParams]) -> WithParams:
    """Returns a single cell as it is, and several cells as a `Stack`."""
    if len(cells) == 1:
        return cells[0]
    return Stack(tuple(cell for cell, _ in cells)), tuple(params for _, params in cells)
