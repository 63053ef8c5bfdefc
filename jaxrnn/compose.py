"""Cells made of several cells."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cell import Cell, Part, check_cell, input_size, output_size
from jaxrnn.cells.gated import GatedCell
from jaxrnn.engines.arrays import zero_where_not
from jaxrnn.engines.loop import final
from jaxrnn.layers import Layer


def _concatenate(*ys: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *ys)


class Several(Cell):
    """A cell made of a tuple of `cells`, with tuples of params, carries and noise."""

    cells: tuple[Cell, ...]

    def __post_init__(self):
        if not isinstance(self.cells, tuple) or not self.cells:
            raise TypeError(f"{self._name}: cells must be a tuple of at least one cell, got {self.cells!r}")
        for k, cell in enumerate(self.cells):
            check_cell(self, f"cells[{k}]", cell)

    @property
    def _name(self):
        return type(self).__name__

    def init(self, key: Array, dtype: Any = jnp.float32) -> tuple:
        keys = jax.random.split(key, len(self.cells))
        return tuple(cell.init(each, dtype) for cell, each in zip(self.cells, keys, strict=True))

    def initial_carry(self, params: Any, batch_shape: tuple[int, ...] = ()) -> tuple:
        self._check(params)
        return tuple(cell.initial_carry(p, batch_shape) for cell, p in zip(self.cells, params, strict=True))

    def noise(self, key, length, batch_shape):
        drawn = []
        for cell, each in zip(self.cells, jax.random.split(key, len(self.cells)), strict=True):
            drawn.append(cell.noise(each, length, batch_shape))
            length = self._length_above(cell, length)
        return tuple(sequence for sequence, _ in drawn), tuple(steps for _, steps in drawn)

    def _length_above(self, cell, length):
        return length

    def _check(self, params):
        if not isinstance(params, tuple) or len(params) != len(self.cells):
            raise TypeError(
                f"params: {self._name} takes a tuple of {len(self.cells)}, one per cell, got {_kind(params)}"
            )


class Stack(Several):
    """Cells one above another: each reads what the one below puts out.

    A sequence runs layer by layer; a step runs through all of them. Params and carry are tuples, one entry per cell.

    Args:
      cells: cells of any sizes and kinds. After a `Pool` only layers without time may follow.
      skip: every cell reads (x, output below), and the output is that of all cells, concatenated (Graves 2013).

    Raises:
      ValueError: if sizes do not fit, naming the two cells.

    Reference: skip connections: Graves 2013, Generating sequences with recurrent neural networks.

        >>> import jax, jax.numpy as jnp, jaxrnn
        >>> cell = jaxrnn.Stack((jaxrnn.Embed(10, 4), jaxrnn.Pool(jaxrnn.LSTM(4, 8)), jaxrnn.Linear(8, 2)))
        >>> carry, y = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.zeros((7, 5), int))
        >>> y.shape
        (5, 2)
    """

    skip: bool = False

    def __post_init__(self):
        super().__post_init__()
        size, ended = None, None
        for k, cell in enumerate(self.cells):
            if ended is not None and (cell.ends_time or jax.tree.leaves(check.shapes_of_carry(cell))):
                raise ValueError(
                    f"Stack: cells[{ended}] ends the time axis, so cells[{k}] must have no carry: {cell!r}"
                )
            if cell.ends_time:
                ended = k
            if k and not _fits(self._reads(size), input_size(cell), any_rank=isinstance(cell, Layer)):
                raise ValueError(
                    f"Stack: cells[{k}] reads size {input_size(cell)} and gets {self._reads(size)} from "
                    f"cells[{k - 1}]: {cell!r} above {self.cells[k - 1]!r}"
                )
            size = output_size(cell, input_size(cell) if k == 0 else self._reads(size))
        if self.skip and ended is not None:
            raise ValueError("Stack: with skip no cell may end the time axis; put Pool around the Stack")

    def _reads(self, below):
        """The size that a cell reads, for a cell below of output size `below`."""
        if not self.skip:
            return below
        first = self.input_size
        return first + below if isinstance(first, int) and isinstance(below, int) else None

    @property
    def input_ndim(self):  # type: ignore[override]
        first = next((cell for cell in self.cells if not (cell.pointwise and input_size(cell) is None)), self.cells[0])
        return first.input_ndim

    @property
    def input_size(self) -> Any:
        if self.skip:
            return input_size(self.cells[0])
        for cell in self.cells:
            size = input_size(cell)  # once, since a Stack of Stacks asks all below it
            if size is not None or not cell.pointwise:
                return size
        return None

    @property
    def output_size(self) -> Any:
        size, sizes = self.input_size, []
        for k, cell in enumerate(self.cells):
            size = output_size(cell, size if k == 0 else self._reads(size))
            sizes.append(size)
        if not self.skip:
            return size
        return sum(sizes) if all(isinstance(size, int) for size in sizes) else None

    @property
    def pointwise(self) -> bool:  # type: ignore[override]
        return not self.skip and all(cell.pointwise for cell in self.cells)

    @property
    def ends_time(self) -> bool:  # type: ignore[override]
        return any(cell.ends_time for cell in self.cells)

    def _length_above(self, cell, length):
        # What follows the end of time acts once even if there was no step at all.
        return max(length, 1) if cell.ends_time else length

    def step(self, params, carry, x, noise=None):
        self._check(params)
        carries, ys = [], []
        for k, cell in enumerate(self.cells):
            new, y = cell.step(params[k], carry[k], self._input(x, ys), _part(noise, k))
            carries.append(new)
            ys.append(y)
        return tuple(carries), self._output(ys)

    def scan(self, params, carry, xs, *, fresh, valid, reset, reverse, noise, remat_every, implementation):
        self._check(params)
        carries, ys, ended = [], [], False
        for k, cell in enumerate(self.cells):
            inputs, part = self._input(xs, ys), _part(noise, k)
            if ended:
                part = part and (part[0], final(part[1], valid, reverse))
                new, y = cell.step(params[k], carry[k], inputs, part)
            else:
                new, y = cell.scan(
                    params[k],
                    carry[k],
                    inputs,
                    fresh=fresh[k],
                    valid=valid,
                    reset=reset,
                    reverse=reverse,
                    noise=part,
                    remat_every=remat_every,
                    implementation=implementation,
                )
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

    def parts(self, params, given):
        parts, below = [], None
        for k, cell in enumerate(self.cells):
            reads = given if k == 0 else self._reads(below)
            below = output_size(cell, reads)
            parts.append(Part(str(k), cell, params[k], reads))
        return tuple(parts)


def _kind(params):
    return f"a tuple of {len(params)}" if type(params) is tuple else type(params).__name__


def _part(noise, k):
    return None if noise is None else (noise[0][k], noise[1][k])


def _fits(given, wanted, any_rank: bool = False) -> bool:
    if any_rank and isinstance(given, tuple) and isinstance(wanted, int):
        given = given[-1]
    return given is None or wanted is None or given == wanted


MERGES: dict[str, Callable[..., Array]] = {
    "concat": lambda *ys: jnp.concatenate(ys, axis=-1),
    "sum": lambda *ys: functools.reduce(operator.add, ys),
    "mul": lambda *ys: functools.reduce(operator.mul, ys),
    "average": lambda *ys: functools.reduce(operator.add, ys) / len(ys),
}


def _merge(merge: str | Callable[..., Any], ys: Any) -> Any:
    return merge(*ys) if callable(merge) else jax.tree.map(MERGES[merge], *ys)


def _merged_size(merge: str | Callable[..., Any], sizes: Any) -> Any:
    """The size of what is merged, or None where it is not known."""
    if callable(merge) or None in sizes:
        return None
    if merge != "concat":
        return sizes[0]
    return sum(sizes) if isinstance(sizes[0], int) else (*sizes[0][:-1], sum(size[-1] for size in sizes))


class Parallel(Several):
    """Cells beside one another: all read the same x, and y = merge(their outputs).

    Params and carry are tuples, one entry per cell.

    Args:
      cells: cells of equal input.
      merge: "concat" (last axis), "sum", "mul", "average", or a callable of all outputs, compared by identity.

    Raises:
      ValueError: if sizes do not fit.

        >>> import jax, jax.numpy as jnp, jaxrnn
        >>> gate = jaxrnn.Stack((jaxrnn.Linear(3, 4), jaxrnn.Apply("sigmoid")))
        >>> cell = jaxrnn.Parallel((jaxrnn.GRU(3, 4), gate), "mul")
        >>> jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 5, 3)))[1].shape
        (7, 5, 4)
    """

    merge: str | Callable[..., Any] = "concat"

    def __post_init__(self):
        super().__post_init__()
        if not callable(self.merge) and self.merge not in MERGES:
            raise ValueError(f"Parallel: merge must be one of {sorted(MERGES)} or a callable, got {self.merge!r}")
        for k, cell in enumerate(self.cells):
            if not _fits(self.input_size, input_size(cell)):
                raise ValueError(f"Parallel: cells[{k}] reads size {input_size(cell)}, not {self.input_size}: {cell!r}")
            if self.merge in ("sum", "mul", "average") and not _fits(self._sizes[0], self._sizes[k]):
                raise ValueError(f"Parallel: merge {self.merge!r} needs equal sizes, got {self._sizes}")
            if cell.ends_time != self.ends_time:
                raise ValueError("Parallel: either all cells or none may end the time axis")

    @property
    def _sizes(self):
        return [output_size(cell, self.input_size) for cell in self.cells]

    @property
    def input_ndim(self):  # type: ignore[override]
        return next((cell for cell in self.cells if input_size(cell) is not None), self.cells[0]).input_ndim

    @property
    def input_size(self) -> Any:
        return next((size for size in map(input_size, self.cells) if size is not None), None)

    @property
    def output_size(self) -> Any:
        return _merged_size(self.merge, self._sizes)

    @property
    def ends_time(self) -> bool:  # type: ignore[override]
        return self.cells[0].ends_time

    def step(self, params, carry, x, noise=None):
        self._check(params)
        return self._run([cell.step(params[k], carry[k], x, _part(noise, k)) for k, cell in enumerate(self.cells)])

    def scan(self, params, carry, xs, *, fresh, noise, **arguments):
        self._check(params)
        carry, ys = self._run(
            [
                cell.scan(params[k], carry[k], xs, fresh=fresh[k], noise=_part(noise, k), **arguments)
                for k, cell in enumerate(self.cells)
            ]
        )
        return carry, ys if self.ends_time else zero_where_not(arguments["valid"], ys)

    def _run(self, results):
        return tuple(new for new, _ in results), _merge(self.merge, [y for _, y in results])

    def parts(self, params, given):
        return tuple(Part(str(k), cell, params[k], given) for k, cell in enumerate(self.cells))


class BidirectionalPair(NamedTuple):
    """What belongs to the forward and to the backward cell: params, carries."""

    forward: Any
    backward: Any


class Bidirectional(Cell):
    """Two cells over the same sequence in opposite directions; y[t] = merge(forward y[t], backward y[t]).

    The backward cell begins at the last valid step, and a reset begins a new sequence for both.

    Args:
      forward, backward: cells of equal input.
      merge: "concat" (last axis), "sum", "mul", "average", or a callable of both outputs, compared by identity.

    It cannot run step by step, since the backward cell needs the end of the sequence first.

    Reference: Schuster & Paliwal 1997, Bidirectional recurrent neural networks.

        >>> import jax, jax.numpy as jnp, jaxrnn
        >>> cell = jaxrnn.Bidirectional(jaxrnn.GRU(3, 4), jaxrnn.GRU(3, 6))
        >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 5, 3)))
        >>> ys.shape, carry.backward.h.shape
        ((7, 5, 10), (5, 6))
    """

    forward: Cell
    backward: Cell
    merge: str | Callable[[Any, Any], Any] = "concat"

    def __post_init__(self):
        check_cell(self, "forward", self.forward)
        check_cell(self, "backward", self.backward)
        if not callable(self.merge) and self.merge not in MERGES:
            raise ValueError(f"Bidirectional: merge must be one of {sorted(MERGES)} or a callable, got {self.merge!r}")
        if not _fits(input_size(self.forward), input_size(self.backward)):
            raise ValueError(
                f"Bidirectional: forward reads size {input_size(self.forward)} and backward "
                f"{input_size(self.backward)}: {self.forward!r} and {self.backward!r}"
            )
        if self.merge in ("sum", "mul", "average") and not _fits(*self._output_sizes):
            raise ValueError(
                f"Bidirectional: merge {self.merge!r} needs equal sizes, got {self._output_sizes}: "
                f"{self.forward!r} and {self.backward!r}"
            )
        if self.forward.ends_time != self.backward.ends_time:
            raise ValueError("Bidirectional: either both cells or neither may end the time axis")

    @property
    def _output_sizes(self):
        return output_size(self.forward, self.input_size), output_size(self.backward, self.input_size)

    @property
    def input_ndim(self):  # type: ignore[override]
        return self.forward.input_ndim

    @property
    def input_size(self) -> Any:
        return input_size(self.forward) or input_size(self.backward)

    @property
    def output_size(self) -> Any:
        return _merged_size(self.merge, self._output_sizes)

    @property
    def ends_time(self) -> bool:  # type: ignore[override]
        return self.forward.ends_time

    def init(self, key: Array, dtype: Any = jnp.float32) -> BidirectionalPair:
        forward, backward = jax.random.split(key)
        return BidirectionalPair(self.forward.init(forward, dtype), self.backward.init(backward, dtype))

    def initial_carry(self, params: Any, batch_shape: tuple[int, ...] = ()) -> BidirectionalPair:
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

    def scan(self, params, carry, xs, *, fresh, valid, reset, reverse, noise, remat_every, implementation):
        self._check(params)

        def run(scan, params, carry, fresh, noise, backwards):
            return scan(
                params,
                carry,
                xs,
                fresh=fresh,
                valid=valid,
                reset=reset,
                reverse=backwards,
                noise=noise,
                remat_every=remat_every,
                implementation=implementation,
            )

        noises = [_part(noise, k) for k in range(2)]
        cell = self.forward
        if cell == self.backward and isinstance(cell, GatedCell) and type(cell).scan is GatedCell.scan:
            (forward, a), (backward, b) = run(cell.scan_both, params, carry, fresh, noises, reverse)
        else:
            forward, a = run(self.forward.scan, params[0], carry[0], fresh[0], noises[0], reverse)
            backward, b = run(self.backward.scan, params[1], carry[1], fresh[1], noises[1], not reverse)
        ys = _merge(self.merge, (a, b))
        return BidirectionalPair(forward, backward), ys if self.ends_time else zero_where_not(valid, ys)

    def _check(self, params):
        if not isinstance(params, BidirectionalPair):
            raise TypeError(f"params: Bidirectional takes BidirectionalPair, got {type(params).__name__}")

    def parts(self, params, given):
        forward = Part("forward", self.forward, params.forward, given)
        return forward, Part("backward", self.backward, params.backward, given)
