"""Converts initial and final states of torch's recurrent modules to carries, and back."""

from __future__ import annotations

import jax
import numpy as np

from jaxrnn import check
from jaxrnn.cell import Cell
from jaxrnn.cells.elman import ElmanCarry
from jaxrnn.cells.gru import GRUCarry
from jaxrnn.cells.lstm import LSTMCarry
from jaxrnn.convert.torch.tensors import dense, tensor
from jaxrnn.engines.arrays import on_device
from jaxrnn.typing import Foreign, PyTree


def carry_from_torch(cell: Cell, states: PyTree) -> PyTree:
    """Converts torch's initial or final states to the carry of a recurrent cell, or of a model with one such module.

    Args:
      cell: The cell that takes the carry.
      states: h_0, or (h_0, c_0) of LSTMs, as tensors or arrays (L · directions, *batch, H) with one row for each layer
        and direction.

    Raises:
      ValueError: If the rows or sizes are not those of the cell.
      TypeError: If the states of the cell are not like those of torch's modules.

    Examples:
      >>> import jaxrnn, numpy as np
      >>> cell = jaxrnn.Bidirectional(jaxrnn.GRU(3, 4), jaxrnn.GRU(3, 4))
      >>> carry_from_torch(cell, np.zeros((2, 5, 4), "float32")).backward.h.shape
      (5, 4)
    """
    rows, structure = _rows(cell)
    given = tuple(states) if isinstance(states, (tuple, list)) else (states,)
    if len(given) != len(rows[0]):
        raise ValueError(f"states: expected {', '.join(rows[0]._fields)} of {cell!r}, got {len(given)} states")
    stacks = [dense(f"states: {name}", state) for name, state in zip(rows[0]._fields, given, strict=True)]
    batch_shape = stacks[0].shape[1:-1]
    for name, stack, row in zip(rows[0]._fields, stacks, rows[0], strict=True):
        if stack.shape != (wanted := (len(rows), *batch_shape, *row.shape)):
            raise ValueError(f"states: {name}: expected shape {wanted}, got {stack.shape}: {cell!r}")
    carries = [type(row)(*(stack[k] for stack in stacks)) for k, row in enumerate(rows)]
    return jax.tree.map(on_device, jax.tree.unflatten(structure, carries))


def carry_to_torch(cell: Cell, carry: PyTree) -> PyTree:
    """Converts a carry to torch's states.

    The states are the tensor h_n, or (h_n, c_n) of LSTMs, with one row for each layer and direction.

    Raises:
      ValueError: If `carry` is not a carry of the cell, or if the states of the cell are not like those of torch's
        modules.
      TypeError: If `carry` is not a carry of the cell, or if the states of the cell are not like those of torch's
        modules.

    Examples:
      >>> import jax, jaxrnn
      >>> cell = jaxrnn.LSTM(3, 4)
      >>> carry = cell.initial_carry(cell.init(jax.random.key(0)), (5,))
      >>> h_n, c_n = carry_to_torch(cell, carry)  # doctest: +SKIP
      >>> h_n.shape  # doctest: +SKIP
      torch.Size([1, 5, 4])
    """
    wanted, structure = _rows(cell)
    rows, given = jax.tree.flatten(carry, is_leaf=_is_state)
    if given != structure or {type(row) for row in rows} != {type(wanted[0])}:
        raise TypeError(f"carry: {cell!r} takes {check.shapes_of_carry(cell)}, got {carry!r}")
    for row in rows:
        for name, state, size in zip(row._fields, row, wanted[0], strict=True):
            if np.shape(state)[-1:] != size.shape:
                raise ValueError(f"carry: {name}: {cell!r} expects shape (..., {size.shape[0]}), got {np.shape(state)}")
    stacks = [
        tensor(np.stack([dense(f"carry: {name}", getattr(row, name)) for row in rows])) for name in wanted[0]._fields
    ]
    return tuple(stacks) if len(stacks) > 1 else stacks[0]


def _is_state(node: Foreign) -> bool:
    return isinstance(node, (ElmanCarry, GRUCarry, LSTMCarry))


def _rows(cell: Cell) -> tuple[list[PyTree], PyTree]:
    """The carries of the recurrent cells in torch's order, and the structure of the whole carry."""
    rows: list[PyTree]
    rows, structure = jax.tree.flatten(check.shapes_of_carry(cell), is_leaf=_is_state)
    kinds = {(type(row), *(state.shape for state in row)) if _is_state(row) else type(row) for row in rows}
    if len(kinds) != 1 or not all(map(_is_state, rows)):
        raise TypeError(f"cell: expected RNNs, GRUs or LSTMs, all of one kind and size, got {cell!r}")
    return rows, structure
