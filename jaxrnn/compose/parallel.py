"""Cells side by side, whose outputs are merged: all in one direction, or two in opposite directions."""

# What other cells are by a class variable, some here are by a property.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cell import Cell, Part, input_size, output_size, take_step
from jaxrnn.compose.stack import Several, fits, part
from jaxrnn.typing import DTypeLike, Foreign, PyTree

MERGES: dict[str, Callable[..., PyTree]] = {
    "concat": lambda *ys: jnp.concatenate(ys, axis=-1),
    "sum": lambda *ys: functools.reduce(operator.add, ys),
    "mul": lambda *ys: functools.reduce(operator.mul, ys),
    "average": lambda *ys: functools.reduce(operator.add, ys) / len(ys),
    "tuple": lambda *ys: ys,
}


def _merge(merge: str | Callable[..., PyTree], ys: PyTree) -> PyTree:
    return merge(*ys) if callable(merge) else jax.tree.map(MERGES[merge], *ys)


def _merged_size(merge: str | Callable[..., PyTree], sizes: Any) -> PyTree:
    """Returns the size of the merged output, or None if it is not known."""
    if callable(merge) or merge == "tuple" or None in sizes:
        return None
    if merge != "concat":
        return sizes[0]
    return sum(sizes) if isinstance(sizes[0], int) else (*sizes[0][:-1], sum(size[-1] for size in sizes))


def _check_merge(cell: Any, sizes: Any) -> None:
    name, merge = type(cell).__name__, cell.merge
    if callable(merge):
        return
    if merge not in MERGES:
        raise ValueError(f"{name}.merge: expected one of {sorted(MERGES)} or a callable, got {merge!r}")
    if merge not in ("concat", "tuple") and not all(fits(sizes[0], size) for size in sizes):
        raise ValueError(f"{name}: merge {merge!r} needs equal sizes, got {tuple(sizes)}: {cell!r}")


class Parallel(Several):
    """Cells side by side: all read the same x, and y = merge(their outputs).

    Params and carry are tuples with one entry per cell.

    Args:
      cells: Cells with the same input size.
      merge: How the outputs are merged: "concat" (along the last axis), "sum", "mul", "average", "tuple" (the outputs
        as they are), or a callable of all outputs, which is compared by identity.

    Raises:
      ValueError: If sizes do not fit.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> gate = jaxrnn.Stack((jaxrnn.Linear(3, 4), jaxrnn.Apply("sigmoid")))
      >>> cell = jaxrnn.Parallel((jaxrnn.GRU(3, 4), gate), "mul")
      >>> jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 5, 3)))[1].shape
      (7, 5, 4)
    """

    merge: str | Callable[..., PyTree] = "concat"

    def __post_init__(self):
        super().__post_init__()
        for k, cell in enumerate(self.cells):
            if not fits(self.input_size, input_size(cell)):
                raise ValueError(f"Parallel: cells[{k}] reads size {input_size(cell)}, not {self.input_size}: {cell!r}")
            if cell.ends_time != self.ends_time:
                raise ValueError("Parallel: either all cells or none may end the time axis")
        _check_merge(self, self._sizes)

    @property
    def _sizes(self):
        return [output_size(cell, self.input_size) for cell in self.cells]

    @property
    def input_ndim(self):
        return next((cell for cell in self.cells if input_size(cell) is not None), self.cells[0]).input_ndim

    @property
    def input_size(self) -> PyTree:
        return next((size for size in map(input_size, self.cells) if size is not None), None)

    @property
    def output_size(self) -> PyTree:
        return _merged_size(self.merge, self._sizes)

    @property
    def ends_time(self) -> bool:
        return self.cells[0].ends_time

    def step(self, params, carry, x, noise=None):
        self._check(params)
        return self._run([take_step(cell, params[k], carry[k], x, part(noise, k)) for k, cell in enumerate(self.cells)])

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        self._check(params)
        carry, ys = self._run(
            [
                cell.scan(params[k], carry[k], xs, fresh=fresh[k], noise=part(noise, k), walk=walk)
                for k, cell in enumerate(self.cells)
            ]
        )
        return carry, ys if self.ends_time else walk.without_padding(ys)

    def _run(self, results):
        return tuple(new for new, _ in results), _merge(self.merge, [y for _, y in results])

    def parts(self, params, given=None):
        return tuple(Part(str(k), cell, params[k], given) for k, cell in enumerate(self.cells))


class BidirectionalPair(NamedTuple):
    """The params or the carries of the forward cell and of the backward cell."""

    forward: Foreign
    backward: Foreign


class Bidirectional(Cell[BidirectionalPair, BidirectionalPair]):
    """Two cells that run over the same sequence in opposite directions; y[t] = merge(forward y[t], backward y[t]).

    The backward cell begins at the last valid step, and a reset begins a new sequence for both.

    It cannot run step by step, since the backward cell needs the end of the sequence first.

    Args:
      forward: The cell that runs from the first step to the last.
      backward: The cell that runs from the last valid step to the first; both read the same input.
      merge: How the outputs are merged: "concat" (along the last axis), "sum", "mul", "average", "tuple" (the outputs
        as they are), or a callable of both outputs, which is compared by identity.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.Bidirectional(jaxrnn.GRU(3, 4), jaxrnn.GRU(3, 6))
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 5, 3)))
      >>> ys.shape, carry.backward.h.shape
      ((7, 5, 10), (5, 6))

    References:
      Schuster & Paliwal 1997, Bidirectional recurrent neural networks, https://doi.org/10.1109/78.650093.
    """

    forward: Cell
    backward: Cell
    merge: str | Callable[[PyTree, PyTree], PyTree] = "concat"

    causal = False
    transparent = True

    def __post_init__(self):
        check.fields(self, forward=check.a_cell, backward=check.a_cell)
        if not fits(input_size(self.forward), input_size(self.backward)):
            raise ValueError(
                f"Bidirectional: forward reads size {input_size(self.forward)} and backward "
                f"{input_size(self.backward)}: {self.forward!r} and {self.backward!r}"
            )
        if self.forward.ends_time != self.backward.ends_time:
            raise ValueError("Bidirectional: either both cells or neither may end the time axis")
        _check_merge(self, self._output_sizes)

    @property
    def _output_sizes(self):
        return output_size(self.forward, self.input_size), output_size(self.backward, self.input_size)

    @property
    def input_ndim(self):
        return self.forward.input_ndim

    @property
    def input_size(self) -> PyTree:
        return input_size(self.forward) or input_size(self.backward)

    @property
    def output_size(self) -> PyTree:
        return _merged_size(self.merge, self._output_sizes)

    @property
    def ends_time(self) -> bool:
        return self.forward.ends_time

    @property
    def time_divides(self) -> bool:
        return self.forward.time_divides and self.backward.time_divides

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> BidirectionalPair:
        forward, backward = jax.random.split(key)
        return BidirectionalPair(self.forward.init(forward, dtype), self.backward.init(backward, dtype))

    def initial_carry(self, params: PyTree, batch_shape: tuple[int, ...] = ()) -> BidirectionalPair:
        self._check(params)
        return BidirectionalPair(
            self.forward.initial_carry(params.forward, batch_shape),
            self.backward.initial_carry(params.backward, batch_shape),
        )

    def noise(self, key, length, batch_shape):
        forward, backward = jax.random.split(key)
        a = self.forward.noise(forward, length, batch_shape)
        b = self.backward.noise(backward, length, batch_shape)
        return (a[0], b[0]), (a[1], b[1])

    def step(self, params, carry, x, noise=None):
        raise TypeError(
            f"{self!r} cannot run step by step: its backward cell begins at the end of the sequence. "
            "Run whole sequences with jaxrnn.scan."
        )

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        self._check(params)
        noises = [part(noise, k) for k in range(2)]
        if self.forward == self.backward:
            results = self.forward.scan_both(params, carry, xs, fresh=fresh, noise=noises, walk=walk)
        else:
            cells, walks = (self.forward, self.backward), (walk, walk.opposite)
            results = [
                cell.scan(params[k], carry[k], xs, fresh=fresh[k], noise=noises[k], walk=walks[k])
                for k, cell in enumerate(cells)
            ]
        (forward, a), (backward, b) = results
        ys = _merge(self.merge, (a, b))
        return BidirectionalPair(forward, backward), ys if self.ends_time else walk.without_padding(ys)

    def _check(self, params):
        if not isinstance(params, BidirectionalPair):
            raise TypeError(f"params: Bidirectional takes BidirectionalPair, got {type(params).__name__}")

    def parts(self, params, given=None):
        forward = Part("forward", self.forward, params.forward, given)
        return forward, Part("backward", self.backward, params.backward, given)

    def with_parts(self, params, parts):
        forward, backward = parts
        cell = dataclasses.replace(self, forward=forward.cell, backward=backward.cell)
        return cell, BidirectionalPair(forward.params, backward.params)
