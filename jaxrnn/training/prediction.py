"""Predictions of a trained model over data of any length, with few compiled programs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxrnn import check
from jaxrnn.cell import Cell
from jaxrnn.sequence import scan
from jaxrnn.training.batches import check_valid, host
from jaxrnn.training.evaluation import check_members, check_params, to_host
from jaxrnn.training.losses import check_axes
from jaxrnn.training.placement import placement_on
from jaxrnn.training.ragged import Bucketed, bucket, pad
from jaxrnn.typing import Bools, Integers, PyTree


def predict(
    cell: Cell,
    params: PyTree,
    xs: PyTree,
    *,
    lengths: Integers | None = None,
    mask: Bools | None = None,
    batch_size: int = 128,
    members: bool = False,
    mesh: Any = None,
) -> PyTree:
    """Computes the outputs of `cell` for every row of `xs`, without noise.

    Args:
      cell: The model.
      params: The params of the model. `jax.vmap` may go over them; the predictions are then JAX arrays.
      xs: An array (N, T, ...), or a pytree of such arrays; or a list of N sequences (T_i, ...) of any lengths, which
        are padded to few shapes.
      lengths: For arrays, the number of valid steps, integers (N,).
      mask: For arrays, the valid steps in any pattern, bool (N, T), in place of lengths.
      batch_size: The number of rows per jitted call. The last call is filled up. Data that fit into a single call have
        their rows and steps rounded up by at most a quarter, so that few compiled programs serve requests of any size.
      members: Whether the params have a leading axis of members, as `fit` returns them for many models.
      mesh: As in `fit`: the devices that divide the rows of every call among them, or the members. Of several
        processes, each predicts the rows that it has, on its own devices.

    Returns:
      NumPy arrays (N, T, ...), or (N, ...) for a cell that gives one output per sequence (`ends_time`); for a list and
      any other cell, a list of N arrays (T_i, ...). They are in the order of xs. With `members` every array has a
      leading axis of members.

    Raises:
      ValueError: If an argument does not fit.
      TypeError: If an argument does not fit.

    Examples:
      >>> import jax, numpy as np, jaxrnn
      >>> model = jaxrnn.GRU(3, 4)
      >>> ys = predict(model, model.init(jax.random.key(0)), [np.ones((7, 3)), np.ones((2, 3))])
      >>> [y.shape for y in ys]
      [(7, 4), (2, 4)]
    """
    check.a_cell("cell", cell)
    check_params(params)
    batch_size = check.integer("batch_size", batch_size)
    for name, value in (("xs", xs), ("lengths", lengths), ("mask", mask)):
        if not all(map(check.concrete, jax.tree.leaves(value))):
            raise TypeError(f"{name}: expected arrays whose numbers are known, got traced ones; use jaxrnn.scan there")
    if members:
        check_members(params)
    where = placement_on(mesh, None, params, params, members=members)
    if where is None:
        return _predict(cell, params, xs, lengths, mask, batch_size, members, None)
    with where.running():
        where, params = where.on_own_devices(params)
        params = where.put_params(params)
        return _predict(cell, params, xs, lengths, mask, batch_size, members, where)


def _predict(cell, params, xs, lengths, mask, batch_size, members, where):
    run = functools.partial(_run, cell, params, members=members, where=where)
    if isinstance(xs, list):
        for name, value in (("lengths", lengths), ("mask", mask)):
            if value is not None:
                raise ValueError(f"{name}: expected None for a list of sequences, which have their own lengths")
        return _of_list(cell, run, xs, batch_size, members)
    xs, rows = host(xs, "xs")
    check_axes(cell, xs)
    steps = jax.tree.leaves(xs)[0].shape[1]
    lengths, mask = check_valid(lengths, mask, rows, steps)
    if rows <= batch_size:
        return run(xs, lengths, mask, shape=_rounded_shape(rows, steps, batch_size))
    parts = []
    for at in range(0, rows, batch_size):
        part = jax.tree.map(lambda leaf: leaf[at : at + batch_size], (xs, lengths, mask))  # noqa: B023
        parts.append(run(*part, shape=(batch_size, steps)))
    return _joined(parts, members)


@functools.partial(jax.jit, static_argnames=("members", "where"))
def _outputs(cell, params, xs, lengths, mask, *, members, where):
    def run(params, inputs):
        xs, lengths, mask = inputs
        return scan(cell, params, None, xs, lengths=lengths, mask=mask, time_axis=1)[1]

    each = jax.vmap(run, in_axes=(0, None)) if members else run
    if where is None:
        return each(params, (xs, lengths, mask))
    if members:
        return where.by_member(each)(params, (xs, lengths, mask))
    by_rows = where.by_rows(lambda params, _, inputs: ((), each(params, inputs)))
    return by_rows(where.whole(params), None, (xs, lengths, mask))[1]


def _run(cell, params, xs, lengths, mask, *, shape, members, where):
    """Runs one call, with rows and steps filled up to `shape`; the added entries are cut off its outputs."""
    if where is not None and not members:
        shape = -(-shape[0] // where.mesh.size) * where.mesh.size, shape[1]
    rows, steps = jax.tree.leaves(xs)[0].shape[:2]
    if lengths is None and mask is None and shape[1] > steps:
        lengths = np.full(rows, steps, np.int32)
    xs, mask = jax.tree.map(lambda leaf: _filled(leaf, shape[1] - steps, axis=1), (xs, mask))
    filled = jax.tree.map(lambda leaf: _filled(leaf, shape[0] - rows, axis=0), (xs, lengths, mask))
    ys = _outputs(cell, params, *filled, members=members, where=where)
    kept = (slice(rows),) if cell.ends_time else (slice(rows), slice(steps))
    return jax.tree.map(lambda leaf: to_host(leaf)[(slice(None),) * members + kept], ys)


def _filled(leaf, missing, *, axis):
    shape = (*leaf.shape[:axis], missing, *leaf.shape[axis + 1 :])
    return np.concatenate([leaf, np.zeros(shape, leaf.dtype)], axis) if missing else leaf


def _rounded_shape(rows, steps, batch_size):
    return min(_rounded(rows), batch_size), _rounded(steps)


def _rounded(number: int) -> int:
    """Rounds up to a number with at most three binary digits before the zeros: four numbers for each power of 2."""
    unit = 1 << max(number.bit_length() - 3, 0)
    return -(-number // unit) * unit


def _joined(parts, members):
    def join(*leaves):
        xp = jnp if isinstance(leaves[0], jax.core.Tracer) else np
        return xp.concatenate(leaves, 1 if members else 0)

    return jax.tree.map(join, *parts)


def _of_list(cell, run, sequences, batch_size, members):
    if len(sequences) <= batch_size:
        padded, lengths = pad(sequences)
        parts = [Bucketed(np.arange(len(sequences)), padded, lengths)]
    else:
        parts = bucket(sequences, batch_size)
    check_axes(cell, parts[0].xs)
    outputs = []
    for _, xs, lengths in parts:
        steps = jax.tree.leaves(xs)[0].shape[1]
        shape = _rounded_shape(len(lengths), steps, batch_size) if len(parts) == 1 else (batch_size, steps)
        outputs.append(run(xs, lengths, None, shape=shape))
    each = (slice(None),) * members
    if cell.ends_time:
        order = np.argsort(np.concatenate([part.indices for part in parts]))
        return jax.tree.map(lambda leaf: leaf[(*each, order)], _joined(outputs, members))
    rows: list[PyTree] = [None] * len(sequences)
    for (indices, _, lengths), ys in zip(parts, outputs, strict=True):
        for k, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            rows[index] = jax.tree.map(lambda leaf: leaf[(*each, k, slice(length))], ys)  # noqa: B023
    return rows
