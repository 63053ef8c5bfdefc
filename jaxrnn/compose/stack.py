"""Cells made of several cells, and cells one above another."""

# What other cells are by a class variable, some here are by a property.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cell import Cell, Part, input_size, output_size, scan_one_step, take_step
from jaxrnn.engines.arrays import inexact
from jaxrnn.layers import Layer
from jaxrnn.typing import DTypeLike, PyTree


def _concatenate(*ys: Any) -> PyTree:
    def join(*leaves):
        """Joins leaves; integers and flags beside floating numbers become floating."""
        dtype = next((leaf.dtype for leaf in leaves if inexact(leaf)), leaves[0].dtype)
        return jnp.concatenate([leaf if inexact(leaf) else leaf.astype(dtype) for leaf in leaves], axis=-1)

    return jax.tree.map(join, *ys)


class Several(Cell[tuple, tuple]):
    """A cell made of a tuple of `cells`, with tuples of params, carries and noise."""

    cells: tuple[Cell, ...]

    transparent = True

    def __post_init__(self):
        if not isinstance(self.cells, tuple) or not self.cells:
            raise TypeError(f"{self._name}.cells: expected a tuple of at least one cell, got {self.cells!r}")
        for k, cell in enumerate(self.cells):
            check.a_cell(f"{self._name}.cells[{k}]", cell)

    @property
    def _name(self):
        return type(self).__name__

    @property
    def causal(self) -> bool:
        return all(cell.causal for cell in self.cells)

    @property
    def time_divides(self) -> bool:
        return all(cell.time_divides for cell in self.cells)

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> tuple:
        keys = jax.random.split(key, len(self.cells))
        return tuple(cell.init(each, dtype) for cell, each in zip(self.cells, keys, strict=True))

    def initial_carry(self, params: PyTree, batch_shape: tuple[int, ...] = ()) -> tuple:
        self._check(params)
        return tuple(cell.initial_carry(p, batch_shape) for cell, p in zip(self.cells, params, strict=True))

    def noise(self, key, length, batch_shape):
        drawn = []
        for cell, each in zip(self.cells, jax.random.split(key, len(self.cells)), strict=True):
            drawn.append(cell.noise(each, length, batch_shape))
            length = self._length_above(cell, length)
        return tuple(sequence for sequence, _ in drawn), tuple(steps for _, steps in drawn)

    def with_parts(self, params, parts):
        return dataclasses.replace(self, cells=tuple(part.cell for part in parts)), tuple(part.params for part in parts)

    def _length_above(self, cell, length):
        return length

    def _check(self, params):
        if not isinstance(params, tuple) or len(params) != len(self.cells):
            raise TypeError(
                f"params: {self._name} takes a tuple of {len(self.cells)}, one per cell, got {_kind(params)}"
            )


class Stack(Several):
    """Cells one above another: each cell reads the output of the cell below.

    A sequence runs layer by layer; a step runs through all layers. Params and carry are tuples with one entry per cell.

    Args:
      layers: Cells of any sizes and kinds, one by one or as one tuple. After a `Pool`, only layers without time may
        follow.
      cells: The same cells, given by name.
      skip: Skip connections: every cell reads x and the output of the cell below, and the output is those of all cells,
        concatenated (Graves 2013).

    Raises:
      ValueError: If sizes do not fit; the message names the two cells.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.Stack((jaxrnn.Embed(10, 4), jaxrnn.Pool(jaxrnn.LSTM(4, 8)), jaxrnn.Linear(8, 2)))
      >>> carry, y = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.zeros((7, 5), int))
      >>> y.shape
      (5, 2)

    References:
      Skip connections: Graves 2013, Generating sequences with recurrent neural networks, arXiv 1308.0850.
    """

    skip: bool = False

    def __init__(self, *layers: Cell | Sequence[Cell], cells: Sequence[Cell] = (), skip: bool = False):
        if layers and cells:
            raise TypeError("Stack: expected cells one by one or as `cells`, got both")
        one = len(layers) == 1 and isinstance(layers[0], (tuple, list))
        object.__setattr__(self, "cells", (layers[0] if one else layers) or cells)
        object.__setattr__(self, "skip", skip)
        self.__post_init__()

    def __post_init__(self):
        super().__post_init__()
        size, ended = None, None
        for k, cell in enumerate(self.cells):
            if ended is not None and (cell.ends_time or jax.tree.leaves(check.shapes_of_carry(cell))):
                raise ValueError(
                    f"Stack.cells[{k}]: expected one without carry, since cells[{ended}] ends the time axis, "
                    f"got {cell!r}"
                )
            if cell.ends_time:
                ended = k
            if k and not fits(self._reads(size), input_size(cell), any_rank=isinstance(cell, Layer)):
                raise ValueError(
                    f"Stack: cells[{k}] reads size {input_size(cell)} and gets {self._reads(size)} from "
                    f"cells[{k - 1}]: {cell!r} above {self.cells[k - 1]!r}"
                )
            size = output_size(cell, input_size(cell) if k == 0 else self._reads(size))
        if self.skip and ended is not None:
            raise ValueError("Stack: with skip no cell may end the time axis; put Pool around the Stack")

    def _reads(self, below):
        """Returns the size that a cell reads above a cell of output size `below`."""
        if not self.skip:
            return below
        first = self.input_size
        return first + below if isinstance(first, int) and isinstance(below, int) else None

    @property
    def input_ndim(self):
        first = next((cell for cell in self.cells if not (cell.keeps_size and input_size(cell) is None)), self.cells[0])
        return first.input_ndim

    @property
    def input_size(self) -> PyTree:
        if self.skip:
            return input_size(self.cells[0])
        for cell in self.cells:
            size = input_size(cell)  # once, since a Stack of Stacks asks all below it
            if size is not None or not cell.keeps_size:
                return size
        return None

    @property
    def output_size(self) -> PyTree:
        size, sizes = self.input_size, []
        for k, cell in enumerate(self.cells):
            size = output_size(cell, size if k == 0 else self._reads(size))
            sizes.append(size)
        if not self.skip:
            return size
        return sum(sizes) if all(isinstance(size, int) for size in sizes) else None

    @property
    def keeps_size(self) -> bool:
        return not self.skip and all(cell.keeps_size for cell in self.cells)

    @property
    def ends_time(self) -> bool:
        return any(cell.ends_time for cell in self.cells)

    def _length_above(self, cell, length):
        # What follows the end of time acts once even if there was no step at all.
        return max(length, 1) if cell.ends_time else length

    def step(self, params, carry, x, noise=None):
        self._check(params)
        carries, ys = [], []
        for k, cell in enumerate(self.cells):
            new, y = take_step(cell, params[k], carry[k], self._input(x, ys), part(noise, k))
            carries.append(new)
            ys.append(y)
        return tuple(carries), self._output(ys)

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        self._check(params)
        carries, ys, ended = [], [], False
        for k, cell in enumerate(self.cells):
            inputs, drawn = self._input(xs, ys), part(noise, k)
            if ended:
                drawn = drawn and (drawn[0], walk.last(drawn[1]))
                new, y = scan_one_step(cell, params[k], carry[k], inputs, noise=drawn, walk=walk)
            else:
                new, y = cell.scan(params[k], carry[k], inputs, fresh=fresh[k], noise=drawn, walk=walk)
            ended = ended or cell.ends_time
            carries.append(new)
            ys.append(y)
        return tuple(carries), self._output(ys)

    def _input(self, x, ys):
        if not ys:
            return x
        return _concatenate(x, ys[-1]) if self.skip else ys[-1]

    def _output(self, ys):
        return _concatenate(*ys) if self.skip else ys[-1]

    def parts(self, params, given=None):
        parts, below = [], None
        for k, cell in enumerate(self.cells):
            reads = given if k == 0 else self._reads(below)
            below = output_size(cell, reads)
            parts.append(Part(str(k), cell, params[k], reads))
        return tuple(parts)


def _kind(params):
    return f"a tuple of {len(params)}" if type(params) is tuple else type(params).__name__


def part(noise, k):
    """The noise of the k-th cell."""
    return None if noise is None else (noise[0][k], noise[1][k])


def fits(given, wanted, any_rank: bool = False) -> bool:
    """Whether an array of size `given` can be read where size `wanted` is expected; None is an unknown size."""
    if any_rank and isinstance(given, tuple) and isinstance(wanted, int):
        given = given[-1]
    return given is None or wanted is None or given == wanted
