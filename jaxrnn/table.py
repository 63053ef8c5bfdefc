"""A table of a cell's layers and parameters."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrnn import check
from jaxrnn.cell import Cell, input_size, output_size
from jaxrnn.typing import DTypeLike, PyTree, Size


class SummaryRow(NamedTuple):
    """One cell: its path, class and output size or None, and the shapes, number and bytes of its own parameters."""

    path: str
    layer: str
    output_size: Size
    shapes: dict[str, tuple[int, ...]]
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    bytes: int


class Summary(NamedTuple):
    """The rows of a table, and the total numbers of parameters and bytes; it prints as the table."""

    rows: tuple[SummaryRow, ...]
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    bytes: int

    def __str__(self):
        table: list[tuple[str, ...]] = [("layer", "output", "parameters", "count", "bytes")]
        for row in self.rows:
            output = "?" if row.output_size is None else str(row.output_size)
            shapes = ", ".join(f"{name} {'×'.join(map(str, shape)) or '1'}" for name, shape in row.shapes.items())
            counts = (f"{row.count:,}", f"{row.bytes:,}") if row.shapes else ("", "")
            table.append((f"{row.path} {row.layer}".strip(), output, shapes, *counts))
        table.append(("total", "", "", f"{self.count:,}", f"{self.bytes:,}"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]

        def line(row):
            cells = [text.ljust(width) for text, width in zip(row[:3], widths, strict=False)]
            cells += [text.rjust(width) for text, width in zip(row[3:], widths[3:], strict=True)]
            return "  ".join(cells).rstrip()

        head, *body, total = map(line, table)
        rule = "─" * (sum(widths) + 2 * len(widths) - 2)
        return "\n".join([head, rule, *body, rule, total])

    def _repr_pretty_(self, printer, cycle):
        """As a table in a notebook."""
        printer.text(str(self))


def summary(cell: Cell, dtype: DTypeLike = jnp.float32) -> Summary:
    """Lists the layers of `cell` with their output sizes and the shapes, numbers and bytes of their parameters.

    It allocates no parameters.

    Args:
      cell: Any cell.
      dtype: The dtype of the parameters.

    Examples:
      >>> import jaxrnn
      >>> print(jaxrnn.summary(jaxrnn.Stack((jaxrnn.LSTM(3, 16), jaxrnn.Linear(16, 2)))))
      layer     output  parameters                 count  bytes
      ─────────────────────────────────────────────────────────
      Stack     2
      0 LSTM    16      w_x 3×64, w_h 16×64, b 64  1,280  5,120
      1 Linear  2       w 16×2, b 2                   34    136
      ─────────────────────────────────────────────────────────
      total                                        1,314  5,256
    """
    check.a_cell("cell", cell)
    try:
        jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype: expected that of the parameters, got {check.brief(dtype)}") from None
    params = jax.eval_shape(lambda key: cell.init(key, dtype), check.shape_of_key())
    rows = tuple(_rows("", cell, params, input_size(cell)))
    return Summary(rows, sum(row.count for row in rows), sum(row.bytes for row in rows))


def _rows(path: str, cell: Cell, params: PyTree, given: Any):
    parts = cell.parts(params, given)
    inside = {id(leaf) for part in parts for leaf in jax.tree.leaves(part.params)}
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    own = [(jax.tree_util.keystr(path, simple=True, separator="."), x) for path, x in leaves if id(x) not in inside]
    count = sum(math.prod(leaf.shape) for _, leaf in own)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for _, leaf in own)
    shapes = {name: leaf.shape for name, leaf in own}
    yield SummaryRow(path, type(cell).__name__, output_size(cell, given), shapes, count, size)
    for part in parts:
        yield from _rows(f"{path}.{part.name}".strip("."), part.cell, part.params, part.given)
