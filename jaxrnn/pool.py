"""From a sequence to one output."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn.cell import Cell, check_cell
from jaxrnn.compose import Stack
from jaxrnn.engines.arrays import accumulator, inexact, select
from jaxrnn.engines.loop import final, starts
from jaxrnn.parallel import Bidirectional
from jaxrnn.wrap import Backward, Wrapper


class PoolCarry(NamedTuple):
    """The cell's carry; of the steps since the last fresh start the pooled outputs (..., O) and the number (...)."""

    cell: Any
    value: Array
    count: Array


class Pool(Wrapper):
    """One y for a whole sequence: the cell's last, mean or greatest output over the valid steps; 0 without any.

    It pools what came since the last reset, and goes on across chunks: the pooled outputs are part of the carry. One
    step puts out what is pooled so far. Of a `Bidirectional` or `Backward` (also on top of a `Stack`), "last" is each
    direction's own final output: the forward cell's at the last valid step, the backward cell's at the first.

    Args:
      cell: a cell that says its output size.
      how: "last", "mean" or "max".

        >>> import jax, jax.numpy as jnp, jaxrnn
        >>> cell = jaxrnn.Pool(jaxrnn.GRU(3, 4), "mean")
        >>> jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 5, 3)))[1].shape
        (5, 4)
    """

    how: str = "last"

    ends_time = True
    pointwise = False  # type: ignore[assignment]
    recurrent_state = None  # type: ignore[assignment]
    recurrent_weights = ()  # type: ignore[assignment]

    def __post_init__(self):
        check_cell(self, "cell", self.cell)
        if self.how not in ("last", "mean", "max"):
            raise ValueError(f"Pool: how must be 'last', 'mean' or 'max', got {self.how!r}")
        if self.cell.ends_time:
            raise ValueError(f"Pool: {self.cell!r} ends the time axis already")
        if self.output_size is None:
            raise TypeError(
                f"Pool: cell must say its output size, by a field or property `output_size`; got {self.cell!r}"
            )

    @property
    def _by_direction(self) -> Cell | None:
        """The cell that pools each direction by itself, where "last" asks for it."""
        match self.how, self.cell:
            case "last", Bidirectional(forward=forward, backward=backward, merge=merge):
                return Bidirectional(Pool(forward), Pool(backward), merge)
            case "last", Backward(cell=cell):
                return Backward(Pool(cell))
            case "last", Stack(cells=(*below, top)) if _both_directions(self.cell):
                return Stack((*below, Pool(top)))
        return None

    def initial_carry(self, params: Any, batch_shape: tuple[int, ...] = ()) -> Any:
        if self._by_direction:
            return self._by_direction.initial_carry(params, batch_shape)
        size = self.output_size
        dtype = accumulator(*(leaf.dtype for leaf in jax.tree.leaves(params) if inexact(leaf)))
        return PoolCarry(
            self.cell.initial_carry(params, batch_shape),
            jnp.zeros((*batch_shape, *(size if isinstance(size, tuple) else (size,))), dtype),
            jnp.zeros(batch_shape, jnp.int32),
        )

    def step(self, params, carry, x, noise=None):
        if self._by_direction:
            return self._by_direction.step(params, carry, x, noise)
        cell, y = self.cell.step(params, carry.cell, x, noise)
        seen = carry.count > 0
        new = y.astype(carry.value.dtype)
        match self.how:
            case "last":
                value = new
            case "mean":
                value = carry.value + new
            case _:
                value = select(seen, jnp.maximum(carry.value, new), new)
        carry = PoolCarry(cell, value, carry.count + 1)
        return carry, self._output(carry).astype(y.dtype)

    def scan(self, params, carry, xs, *, fresh, valid, reset, reverse, noise, remat_every, implementation):
        arguments = {
            "valid": valid,
            "reset": reset,
            "reverse": reverse,
            "noise": noise,
            "remat_every": remat_every,
            "implementation": implementation,
        }
        if self._by_direction:
            return self._by_direction.scan(params, carry, xs, fresh=fresh, **arguments)
        cell, ys = self.cell.scan(params, carry.cell, xs, fresh=fresh.cell, **arguments)
        value, count, pooled = carry.value, carry.count, valid
        start = starts(reset, valid, reverse)
        if start is not None:
            counted = start.astype(jnp.int32)
            after = lax.cumsum(counted, reverse=not reverse) - counted
            pooled = after == 0 if valid is None else valid & (after == 0)
            restarted = start.any(0)
            value, count = select(restarted, (fresh.value, fresh.count), (value, count))
        new = ys.shape[0] if pooled is None else pooled.sum(0, dtype=count.dtype)
        carry = PoolCarry(cell, self._pooled(value, count, ys, pooled, reverse), count + new)
        return carry, self._output(carry).astype(ys.dtype)

    def _pooled(self, value, count, ys, pooled, reverse):
        """`value`, which holds `count` outputs, with the `pooled` ones of `ys`, or all."""
        ys = ys.astype(value.dtype)
        if ys.shape[0] == 0:
            return value

        def others(fill):
            return ys if pooled is None else select(pooled, ys, jnp.full_like(ys, fill))

        any_new = jnp.ones(count.shape, bool) if pooled is None else pooled.any(0)
        match self.how:
            case "last":
                return select(any_new, final(ys, pooled, reverse), value)
            case "mean":
                return value + others(0).sum(0)
            case _:
                new = select(any_new, others(-jnp.inf).max(0), value)
                return select((count > 0) & any_new, jnp.maximum(value, new), new)

    def _output(self, carry):
        if self.how != "mean":
            return carry.value
        count = jnp.maximum(carry.count, 1).astype(carry.value.dtype)
        return carry.value / count.reshape(count.shape + (1,) * (carry.value.ndim - count.ndim))


def _both_directions(cell: Cell) -> bool:
    """Whether a backward cell puts out what `cell` does."""
    match cell:
        case Stack(cells=(*_, top), skip=False):
            return _both_directions(top)
    return isinstance(cell, (Bidirectional, Backward))
