"""What `scan` means, one sequence and one step at a time."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from members import has_direction

from jaxrnn import Backward, Bidirectional, LearnedCarry, Pool, Residual, Stack
from jaxrnn.compose.noise import WeightDropNoise


@functools.cache
def jitted_step(cell):
    run = jax.jit(lambda params, carry, x, noise: cell.step(params, carry, x, noise))
    return lambda *arguments: jax.tree.map(np.asarray, run(*arguments))


def begins_fresh(valid, reset, reverse):
    """For one row: which valid steps start from the fresh carry, by the definition of `reset`."""
    steps = [t for t in range(len(valid)) if valid[t]]
    if not reverse:
        return {t for t in steps if reset[t]}
    return {t for t, following in itertools.pairwise(steps) if reset[following]}


def _row(tree, *index):
    return jax.tree.map(
        lambda leaf: leaf[index] if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)[index], tree
    )


def _stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def reference(cell, params, carry, xs, valid, reset, reverse=False, noise=None, fresh=None):
    """(final carry, ys) for xs (T, B, ...), valid and reset (T, B) of NumPy booleans: cell.step, row by row.

    What holds a Bidirectional or a Backward cannot step; it is taken apart by its definition first.
    """
    if fresh is None:
        fresh = jax.tree.map(np.asarray, jax.jit(lambda params: cell.initial_carry(params, ()))(params))
    flags = (valid, reset, reverse)
    match cell:
        case Stack(cells=cells) if has_direction(cell):
            carries, ended = [], False
            for k, each in enumerate(cells):
                if ended:
                    new, xs = each.step(params[k], carry[k], xs)
                else:
                    new, xs = reference(each, params[k], carry[k], xs, *flags, _part(noise, k), fresh[k])
                carries.append(new)
                ended = ended or each.ends_time
            return tuple(carries), xs
        case Bidirectional():
            a, ya = reference(cell.forward, params[0], carry[0], xs, *flags, _part(noise, 0), fresh[0])
            b, yb = reference(
                cell.backward, params[1], carry[1], xs, valid, reset, not reverse, _part(noise, 1), fresh[1]
            )
            ys = (cell.merge if callable(cell.merge) else _MERGES[cell.merge])(ya, yb)
            keep = valid.reshape(valid.shape + (1,) * (ys.ndim - 2))
            return type(carry)(a, b), ys if cell.ends_time else np.where(keep, ys, 0)
        case Backward():
            return reference(cell.cell, params, carry, xs, valid, reset, not reverse, noise, fresh)
        case Pool() if cell._by_direction is not None:
            return reference(cell._by_direction, params, carry, xs, *flags, noise, fresh)
        case Pool(cell=inner) if has_direction(cell):
            new, ys = reference(inner, params, carry.cell, xs, *flags, noise, fresh.cell)
            return _pooled(cell, carry._replace(cell=new), fresh, ys, *flags)
        case LearnedCarry() if has_direction(cell):
            return reference(cell.cell, params.cell, carry, xs, *flags, noise, fresh)
        case Residual() if has_direction(cell):
            carry, ys = reference(cell.cell, params, carry, xs, *flags, noise, fresh)
            return carry, np.where(valid[..., None], xs + ys, 0)
    return _step_by_step(cell, params, carry, xs, *flags, noise, fresh)


_MERGES = {
    "concat": lambda a, b: np.concatenate([a, b], -1),
    "sum": np.add,
    "mul": np.multiply,
    "average": lambda a, b: (a + b) / 2,
}


def _part(noise, k):
    return None if noise is None else (noise[0][k], noise[1][k])


def _step_by_step(cell, params, carry, xs, valid, reset, reverse, noise, fresh):
    step = jitted_step(cell)
    length, batch = valid.shape
    sequence, steps = (None, None) if noise is None else noise
    carries, outputs, zero = [], [], None
    for b in range(batch):
        begin = begins_fresh(valid[:, b], reset[:, b], reverse)
        state, row = _row(carry, b), [None] * length
        for t in reversed(range(length)) if reverse else range(length):
            drawn = None if noise is None else (_sequence_noise(sequence, b), _row(steps, t, b))
            if valid[t, b]:
                state, row[t] = step(params, fresh if t in begin else state, _row(xs, t, b), drawn)
            elif zero is None:
                zero = jax.tree.map(np.zeros_like, step(params, fresh, _row(xs, t, b), drawn)[1])
        carries.append(state)
        outputs.append(row)
    if cell.ends_time:
        ys = [_final(row, reverse) for row in outputs]
        empty = _without_steps(cell, params, _stack(carries), noise)
        return _stack(carries), np.stack([empty[b] if y is None else y for b, y in enumerate(ys)])
    ys = [_stack([zero if row[t] is None else row[t] for row in outputs]) for t in range(length)]
    return _stack(carries), _stack(ys)


def _sequence_noise(sequence, b):
    """The row of what is drawn per sequence and row; what is drawn for all rows has no batch axis."""
    if isinstance(sequence, WeightDropNoise):
        return WeightDropNoise(sequence.keep, _sequence_noise(sequence.cell, b))
    if type(sequence) is tuple:
        return tuple(_sequence_noise(each, b) for each in sequence)
    return _row(sequence, b)


def _pooled(cell, carry, fresh, ys, valid, reset, reverse):
    """(carry, y) of a Pool, from the outputs of its cell."""
    if isinstance(cell.how, tuple):
        each = [
            _pooled(Pool(cell.cell, how), carry._replace(value=a), fresh._replace(value=b), ys, valid, reset, reverse)
            for how, a, b in zip(cell.how, carry.value, fresh.value, strict=True)
        ]
        values = tuple(one.value for one, _ in each)
        return each[0][0]._replace(value=values), np.concatenate([y for _, y in each], -1)
    value, count = np.array(carry.value), np.array(carry.count)
    for b in range(valid.shape[1]):
        begin = begins_fresh(valid[:, b], reset[:, b], reverse)
        for t in reversed(range(len(valid))) if reverse else range(len(valid)):
            if not valid[t, b]:
                continue
            if t in begin:
                value[b], count[b] = fresh.value, fresh.count
            seen = {"last": ys[t, b], "mean": value[b] + ys[t, b], "max": np.maximum(value[b], ys[t, b])}
            value[b] = ys[t, b] if cell.how == "max" and not count[b] else seen[cell.how]
            count[b] += 1
    carry = carry._replace(value=value, count=count)
    return carry, _without_steps(cell, None, carry, None)


def _final(row, reverse):
    done = [y for y in row if y is not None]
    return None if not done else done[0 if reverse else -1]


def _without_steps(cell, params, carry, noise):
    """What a cell that ends time puts out of its carry alone, (B, ...)."""
    if isinstance(cell, Pool) and isinstance(cell.how, tuple):
        each = [
            _without_steps(Pool(cell.cell, how), None, carry._replace(value=value), None)
            for how, value in zip(cell.how, carry.value, strict=True)
        ]
        return np.concatenate(each, -1)
    if isinstance(cell, Pool):
        count = np.maximum(carry.count, 1).reshape(-1, *(1,) * (carry.value.ndim - 1))
        return carry.value / count if cell.how == "mean" else carry.value
    at = next(k for k, each in enumerate(cell.cells) if each.ends_time)
    y = _without_steps(cell.cells[at], params[at], carry[at], None)
    for k in range(at + 1, len(cell.cells)):
        part = _part(noise, k)
        _, y = cell.cells[k].step(params[k], carry[k], y, part and (part[0], _row(part[1], 0)))
    return y
