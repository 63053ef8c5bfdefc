"""Pooling: from a sequence to one output."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import check
from jaxrnn.cell import Cell, output_size, take_step
from jaxrnn.compose.parallel import Bidirectional
from jaxrnn.compose.stack import Stack
from jaxrnn.compose.wrap import Backward, Wrapper
from jaxrnn.engines.arrays import accumulator, inexact, select, zero_where_not
from jaxrnn.engines.walk import final
from jaxrnn.typing import PyTree

HOWS = ("last", "mean", "max", "end")


class PoolCarry(NamedTuple):
    """cell: the carry of the cell; value (..., O): the pooled outputs of the steps since the last fresh start; count
    (...): the number of these steps.
    """

    cell: Any
    value: Any
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]

    @property
    def handed_on(self) -> PyTree:
        """The carry of the pooled cell, from which a decoder continues."""
        return self.cell


class Pool(Wrapper):
    """One y for a whole sequence: the last, mean or greatest output of the cell over the valid steps, or 0 if there are
    none.

    It pools the steps since the last reset and continues across chunks, since the pooled outputs are part of the carry.
    One step gives the output pooled so far. For a `Bidirectional` or `Backward` (also on top of a `Stack`), "last" is
    each direction's own final output: that of the forward cell at the last valid step, and that of the backward cell at
    the first.

    Args:
      cell: A cell that states its output size.
      how: "last", "mean" or "max"; or "end", which is the last output, but 0 where the sequence ends with a step that
        is not valid (Keras' `zero_output_for_mask`); or a tuple of these, whose outputs are concatenated.

    Raises:
      ValueError: If `how` is anything else, or if the cell already ends the time axis.
      TypeError: If the cell does not state its output size.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.Pool(jaxrnn.GRU(3, 4), ("mean", "max"))
      >>> jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 5, 3)))[1].shape
      (5, 8)

      Its carry is a `PoolCarry`, whose field `cell` is the final carry of the cell itself. A decoder goes on from it:

      >>> encoder, decoder = jaxrnn.Pool(jaxrnn.LSTM(3, 4)), jaxrnn.LSTM(2, 4)
      >>> params = encoder.init(jax.random.key(0)), decoder.init(jax.random.key(1))
      >>> carry, _ = jaxrnn.scan(encoder, params[0], None, jnp.ones((7, 5, 3)))
      >>> jaxrnn.scan(decoder, params[1], carry, jnp.ones((6, 5, 2)))[1].shape
      (6, 5, 4)
    """

    how: str | tuple[str, ...] = "last"

    ends_time = True
    transparent = True

    @property
    def keeps_size(self) -> bool:
        return False

    @property
    def recurrent_state(self) -> str | None:
        return None

    @property
    def recurrent_weights(self) -> tuple[str, ...]:
        return ()

    def __post_init__(self):
        check.fields(self, cell=check.a_cell)
        hows = self.how if isinstance(self.how, tuple) else (self.how,)
        if not hows or any(how not in HOWS for how in hows):
            raise ValueError(f"Pool.how: expected one of {HOWS} or a tuple of them, got {self.how!r}")
        if hows is self.how and _both_directions(self.cell) and not {"mean", "max"}.issuperset(hows):
            raise ValueError(f"Pool: of two directions how={self.how!r} has no one last step; pool mean and max only")
        if self.cell.ends_time:
            raise ValueError(f"Pool.cell: expected one that does not end the time axis already, got {self.cell!r}")
        if self.output_size is None:
            raise TypeError(
                f"Pool.cell: expected one that says its output size, by a field or property `output_size`, "
                f"got {self.cell!r}"
            )

    @property
    def output_size(self) -> PyTree:
        size = output_size(self.cell, self.input_size)
        if size is None or isinstance(self.how, str):
            return size
        return len(self.how) * size if isinstance(size, int) else (*size[:-1], len(self.how) * size[-1])

    @property
    def _by_direction(self) -> Cell | None:
        """The cell that pools each direction by itself, where "last" or "end" needs it."""
        match self.how, self.cell:
            case "last" | "end" as how, Bidirectional(forward=forward, backward=backward, merge=merge):
                return Bidirectional(Pool(forward, how), Pool(backward, how), merge)
            case "last" | "end" as how, Backward(cell=cell):
                return Backward(Pool(cell, how))
            case "last" | "end" as how, Stack(cells=(*below, top)) if _both_directions(self.cell):
                return Stack((*below, Pool(top, how)))
        return None

    def initial_carry(self, params: PyTree, batch_shape: tuple[int, ...] = ()) -> PyTree:
        if self._by_direction:
            return self._by_direction.initial_carry(params, batch_shape)
        size = output_size(self.cell, self.input_size)
        shape = (*batch_shape, *(size if isinstance(size, tuple) else (size,)))
        dtype = accumulator(*(leaf.dtype for leaf in jax.tree.leaves(params) if inexact(leaf)))
        return PoolCarry(
            self.cell.initial_carry(params, batch_shape),
            jax.tree.map(lambda how: jnp.zeros(shape, dtype), self.how),
            jnp.zeros(batch_shape, jnp.int32),
        )

    def step(self, params, carry, x, noise=None):
        if self._by_direction:
            return self._by_direction.step(params, carry, x, noise)
        cell, y = take_step(self.cell, params, carry.cell, x, noise)
        seen = carry.count > 0

        def pooled(how, value):
            new = y.astype(value.dtype)
            match how:
                case "mean":
                    return value + new
                case "max":
                    return select(seen, jnp.maximum(value, new), new)
            return new

        carry = PoolCarry(cell, jax.tree.map(pooled, self.how, carry.value), carry.count + 1)
        return carry, self._output(carry, None).astype(y.dtype)

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        if self._by_direction:
            return self._by_direction.scan(params, carry, xs, fresh=fresh, noise=noise, walk=walk)
        cell, ys = self.cell.scan(params, carry.cell, xs, fresh=fresh.cell, noise=noise, walk=walk)
        (valid, start), reverse = walk.flags, walk.reverse
        value, count, pooled = carry.value, carry.count, valid
        if start is not None:
            counted = start.astype(jnp.int32)
            after = lax.cumsum(counted, reverse=not reverse) - counted
            pooled = after == 0 if valid is None else valid & (after == 0)
            restarted = start.any(0)
            value, count = select(restarted, (fresh.value, fresh.count), (value, count))
        new = ys.shape[0] if pooled is None else pooled.sum(0, dtype=count.dtype)
        values = jax.tree.map(lambda how, old: _pooled(how, old, count, ys, pooled, reverse), self.how, value)
        ended = None if valid is None or ys.shape[0] == 0 else valid[0 if reverse else -1]
        carry = PoolCarry(cell, values, count + new)
        return carry, self._output(carry, ended).astype(ys.dtype)

    def _output(self, carry, ended):
        """Returns y from the carry; `ended` says whether the last step of the sequence was valid, and None means that
        it was.
        """
        count = jnp.maximum(carry.count, 1)

        def output(how, value):
            match how:
                case "mean":
                    return value / count.astype(value.dtype).reshape(count.shape + (1,) * (value.ndim - count.ndim))
                case "end":
                    return zero_where_not(ended, value)
            return value

        ys = jax.tree.map(output, self.how, carry.value)
        return jnp.concatenate(ys, axis=-1) if isinstance(ys, tuple) else ys


def _pooled(how, value, count, ys, pooled, reverse):
    """Pools the outputs `ys` where `pooled` is true, or all, into `value`, which already holds `count` outputs."""
    ys = ys.astype(value.dtype)
    if ys.shape[0] == 0:
        return value

    def others(fill):
        return ys if pooled is None else select(pooled, ys, jnp.full_like(ys, fill))

    any_new = jnp.ones(count.shape, bool) if pooled is None else pooled.any(0)
    match how:
        case "last" | "end":
            return select(any_new, final(ys, pooled, reverse), value)
        case "mean":
            return value + others(0).sum(0)
        case _:
            new = select(any_new, others(-jnp.inf).max(0), value)
            return select((count > 0) & any_new, jnp.maximum(value, new), new)


def _both_directions(cell: Cell) -> bool:
    """Whether a backward cell produces the output of `cell`, alone or with a forward one."""
    match cell:
        case Stack(cells=(*_, top), skip=False):
            return _both_directions(top)
    return isinstance(cell, (Bidirectional, Backward))
