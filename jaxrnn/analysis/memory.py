"""How far back a recurrence remembers."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import check
from jaxrnn.analysis.observation import as_real, norm
from jaxrnn.cell import Cell
from jaxrnn.engines.arrays import inexact, select
from jaxrnn.engines.walk import final
from jaxrnn.sequence import scan
from jaxrnn.typing import Bools, Integers, Named, PyTree


class MemoryLength(NamedTuple):
    """The influence of the input k valid steps back, (T, *batch), k from 0; and its mean lag in steps, (*batch)."""

    influence: Array
    mean_lag: Array


def memory_length(
    cell: Cell,
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    *,
    samples: int | None = None,
    key: Array | None = None,
    lengths: Integers | None = None,
    mask: Bools | None = None,
    reset: Bools | None = None,
    reverse: bool = False,
    time_axis: int = 0,
) -> MemoryLength:
    """The effective memory length: how many steps back, on average, the input lies that the last output depends on.

        I_k      = ‖∂y_T/∂x_{T−k}‖_F,    y_T the output of the last valid step, k valid steps later than x_{T−k}
        mean_lag = Σ_k k I_k / Σ_k I_k

    The mean lag is that of a distributed lag model (Koyck 1954). For h' = a h + x, I_k = |a|^k, and the mean lag of a
    long sequence is |a|/(1 − |a|): 1 step for a = 0.5, and 99 for 0.99.

    Args:
      cell: As in `jaxrnn.scan`; any composition. For a cell that gives one output per sequence (`ends_time`), y_T is
        that output.
      params: As in `jaxrnn.scan`.
      carry: As in `jaxrnn.scan`.
      xs: Floating inputs. For tokens, embed them first and pass the cells above the embedding.
      samples: None to use all entries of y_T, with one backward pass each. Or, for large outputs, the number of random
        directions v ∈ {±1}, over which the mean of ‖vᵀ ∂y_T/∂x‖² is I_k² (Hutchinson).
      key: A `jax.random` key for the directions.
      lengths: As in `jaxrnn.scan`.
      mask: As in `jaxrnn.scan`.
      reset: As in `jaxrnn.scan`. Beyond a reset the influence is 0.
      reverse: As in `jaxrnn.scan`.
      time_axis: As in `jaxrnn.scan`.

    Returns:
      A `MemoryLength`, with the lag first whatever `time_axis` is; 0 where the last output depends on no input.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxrnn import IndRNN, IndRNNParams
      >>> from jaxrnn.analysis import memory_length
      >>> params = IndRNNParams(w_x=jnp.ones((1, 1)), w_h=jnp.array([0.5]), b=None)
      >>> memory = memory_length(IndRNN(1, 1), params, None, jnp.ones((30, 1)))
      >>> memory.influence[:4], memory.mean_lag.round(4)
      (Array([1.   , 0.5  , 0.25 , 0.125], dtype=float32), Array(1., dtype=float32))
    """
    check.a_cell("cell", cell)
    if not all(inexact(jnp.asarray(leaf)) for leaf in jax.tree.leaves(xs)):
        raise TypeError("xs: expected floating; embed tokens first, and give the cells above the Embed")
    if (samples is None) != (key is None):
        raise TypeError("samples: give samples and key, or neither")
    keywords: Named = {"lengths": lengths, "mask": mask, "reset": reset, "reverse": reverse}
    xs = jax.tree.map(jnp.asarray, xs)
    leaf, ndim = jax.tree.leaves(xs)[0], jax.tree.leaves(cell.input_ndim)[0]
    if not leaf.size:
        raise ValueError(f"xs: expected at least one step and row, got shape {leaf.shape}")

    def output(xs):
        _, ys = scan(cell, params, carry, xs, time_axis=time_axis, **keywords)
        if not cell.ends_time:
            ys = jax.tree.map(lambda y: jnp.moveaxis(y, time_axis, 0), ys)
            ys = final(ys, valid, reverse)
        return as_real(ys, valid.ndim - 1)

    valid = _valid(jnp.moveaxis(leaf, time_axis, 0).shape[: leaf.ndim - ndim], lengths, mask, time_axis)
    y, pull = jax.vjp(output, xs)
    if samples is None or key is None:
        directions = jnp.eye(y.shape[-1], dtype=y.dtype)
    else:
        samples = check.integer("samples", samples, least=1)
        directions = jax.random.rademacher(key, (samples, y.shape[-1]), y.dtype) / samples**0.5

    def add(influence, direction):
        (gradient,) = pull(jnp.broadcast_to(direction, y.shape))
        leaves = [jnp.moveaxis(leaf, time_axis, 0) for leaf in jax.tree.leaves(gradient)]
        return jnp.hypot(influence, norm(as_real(leaves, valid.ndim), valid.ndim)), None

    influence, _ = lax.scan(add, jnp.zeros(valid.shape, y.dtype), directions)
    influence = _by_lag(influence, valid, reverse)
    lags = jnp.arange(len(valid), dtype=y.dtype).reshape(-1, *(1,) * (valid.ndim - 1))
    total = influence.sum(0)
    mean = (lags * influence).sum(0) / jnp.where(total > 0, total, jnp.ones_like(total))
    return MemoryLength(influence, mean)


def _valid(shape: tuple[int, ...], lengths, mask, time_axis) -> Array:
    """The valid steps in the given shape (T, *batch); `scan` checks the arguments."""
    if mask is not None:
        return jnp.moveaxis(jnp.asarray(mask), time_axis, 0)
    steps = jnp.arange(shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
    return jnp.broadcast_to(steps < (shape[0] if lengths is None else jnp.asarray(lengths)[None]), shape)


def _by_lag(influence: Array, valid: Array, reverse: bool) -> Array:
    """Sorts the first axis by the number of valid steps back from the one processed last; the rest is 0."""
    after = lax.cumsum(valid.astype(jnp.int32), reverse=not reverse) - 1
    order = jnp.argsort(jnp.where(valid, after, len(valid)), axis=0)
    return jnp.take_along_axis(select(valid, influence, jnp.zeros_like(influence)), order, axis=0)
