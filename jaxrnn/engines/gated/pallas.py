"""The gated recurrences of `programs` for a TPU, in Pallas: a core walks over all steps with the recurrent weights and
the carry in its memory. Backward, it walks in the other direction and transposes each step; what that step reads
besides, and the gradients of weights, are products over all steps. It has run in interpreters and compilers only, so no
platform takes it unless it is named.

Units are padded to whole vectors, gate by gate: what is added computes what no weight reads.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn.engines.gated import derivative, programs
from jaxrnn.engines.gated.programs import Carry, Fixed, Moved, Moving, Read
from jaxrnn.engines.gated.recurrence import How, Problem, input_product
from jaxrnn.typing import PyTree

LANES = 128  # columns of a vector
ROWS, STEPS = 128, 64  # the most that a block holds
SEQUENCES, WEIGHTS = 8 << 20, 96 << 20  # bytes on the chip: of the blocks of all sequences, at most of the weights


def refusal(units: int, columns: int) -> str | None:
    """Why the recurrent weights (H, G) do not stay on a chip, or None."""
    size = 4 * (units + -units % LANES) * columns // units * (units + -units % LANES)
    if size <= WEIGHTS:
        return None
    return f"{size >> 20} MiB of recurrent weights do not fit into the {WEIGHTS >> 20} MiB that it keeps on the chip"


def _padded(array: Array, units: int, *axes: int) -> Array:
    """With whole vectors of units in every part of axes of parts · H."""
    missing = -units % LANES
    for axis in axes or (array.ndim - 1,) if missing else ():
        front, back = array.shape[:axis], array.shape[axis + 1 :]
        parts = array.reshape(*front, array.shape[axis] // units, units, *back)
        parts = jnp.pad(parts, [(0, missing * (k == axis + 1)) for k in range(parts.ndim)])
        array = parts.reshape(*front, parts.shape[axis] * parts.shape[axis + 1], *back)
    return array


def _own(array: Array, units: int) -> Array:
    """The columns that `_padded` was given."""
    whole = units + -units % LANES
    parts = array.reshape(*array.shape[:-1], array.shape[-1] // whole, whole)[..., :units]
    return parts.reshape(*array.shape[:-1], parts.shape[-2] * units)


def _walk(begin, step, given: tuple, made: tuple, units: int, *, reverse: bool, interpret: bool) -> PyTree:
    """Runs `step` at every step of every block of rows, one after another.

    Args:
      begin: `begin(given, made)`, of references: what is done before the first step.
      step: `step(t, given, made)`.
      given: Trees of sequences (T, B, C), of rows (B, C), and of what is the same for all rows.
      made: Trees of the sequences and rows that are written, as shapes. Those of rows stay on the chip.
      units: H, of which last axes have one or several, but for those of flags, int32.
      reverse: Whether the last step comes first.
      interpret: Whether XLA interprets it.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def wide(leaf):
        return leaf if leaf.dtype == jnp.int32 else _padded(leaf, units)

    sequences, rows, whole = given
    given = jax.tree.map(wide, sequences), jax.tree.map(wide, rows), whole
    shapes = jax.eval_shape(lambda made: jax.tree.map(wide, made), made)
    length, count = jax.tree.leaves(sequences)[0].shape[:2]
    block = min(ROWS, count)
    of_step = 8 * block * sum(max(leaf.shape[-1], LANES) for leaf in jax.tree.leaves((given[0], shapes[0])))
    size = max(1, min(STEPS, length, SEQUENCES // of_step))  # two blocks are on the chip at once
    blocks = pl.cdiv(length, size)
    ragged = length - (blocks - 1) * size  # steps of the last block; what is behind them is never read

    def kernel(*refs):
        given, made = refs[:3], refs[3:]
        k = pl.program_id(1)
        pl.when(k == 0)(lambda: begin(given, made))
        steps = jnp.where(k == (0 if reverse else blocks - 1), ragged, size)

        def body(i, nothing):
            step(steps - 1 - i if reverse else i, given, made)
            return nothing

        lax.fori_loop(0, steps, body, 0)

    def of_sequence(leaf):
        return pl.BlockSpec((size, block, leaf.shape[-1]), lambda r, k: (blocks - 1 - k if reverse else k, r, 0))

    def of_rows(leaf):
        return pl.BlockSpec((block, leaf.shape[-1]), lambda r, k: (r, 0))

    def of_all(leaf):
        return pl.BlockSpec(leaf.shape, lambda r, k: (0, 0), pipeline_mode=pl.Buffered(1))

    def specs(trees):
        return tuple(jax.tree.map(of, tree) for of, tree in zip((of_sequence, of_rows, of_all), trees, strict=False))

    resident = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(whole))
    found = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(count, block), blocks),
        in_specs=specs(given),
        out_specs=specs(shapes),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=resident + 3 * SEQUENCES
        ),
        interpret=interpret,
    )(*given)
    return jax.tree.map(lambda leaf: _own(leaf, units), found)


def _flags(problem: Problem) -> dict[str, Array]:
    """The flags (T, B, 1) that a call has."""
    named = {"valid": problem.valid, "follows": problem.flags.follows}
    return {name: each[..., None].astype(jnp.int32) for name, each in named.items() if each is not None}


def _where(flags, name: str, t, on: PyTree, off: PyTree) -> PyTree:
    """`on` where a flag is true at step t, and where a call has no such flag."""
    if name not in flags:
        return on
    flag = flags[name][t] != 0
    return jax.tree.map(lambda on, off: jnp.where(flag, on, off), on, off)


def _weights(problem: Problem, units: int) -> dict[str, Any]:
    """What a step reads of the weights."""
    weights = problem.weights
    found = {name: getattr(weights, name) for name in ("w_h", "w_2") if getattr(weights, name) is not None}
    found = {name: _padded(each, units, 0, 1) for name, each in found.items()}
    return found | {"theta": jax.tree.map(lambda leaf: _padded(leaf, units)[None], weights.theta)}


def _theta(whole, like: Array) -> PyTree:
    """θ for every row."""
    return jax.tree.map(lambda ref: jnp.broadcast_to(ref[...], like.shape), whole["theta"])


def _product(x: Array, w, transposed: bool = False) -> Array:
    dimensions = ((1,), (int(transposed),)), ((), ())
    return lax.dot_general(x, w[...], dimensions, preferred_element_type=x.dtype)


def _read(refs: PyTree, at: Any = ...) -> PyTree:
    return jax.tree.map(lambda ref: ref[at], refs)


def _write(refs: PyTree, values: PyTree, at: Any = ...) -> None:
    def write(ref, value):
        ref[at] = value

    jax.tree.map(write, refs, values)


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, tree)


def _time_steps(how: How, problem: Problem, keep: bool, *, interpret: bool) -> tuple[PyTree, Array, PyTree]:
    """Runs the time loop, as `time_steps` does."""
    if 0 in problem.xs.shape[:2]:
        return programs.time_steps(how, problem, keep)
    cell: Any = how.cell
    units = problem.carry.h.shape[-1]
    u = input_product(problem.weights, problem.xs, how.dtype, how.wide)

    def begin(given, made):
        _write(made[1], _read(given[1][0]))

    def step(t, given, made):
        (u, flags), (_, fresh), whole = given
        states, last = made
        old = _read(last)
        carry = _where(flags, "follows", t, old, _read(fresh))
        u, theta = u[t], _theta(whole, carry.h)
        v = _product(carry.h, whole["w_h"])
        w = _product(cell.second_input(theta, carry, carry.h, u, v), whole["w_2"]) if "w_2" in whole else None
        new, _ = cell.update(theta, carry, u, v, w)
        _write(last, _where(flags, "valid", t, new, old))
        new = _where(flags, "valid", t, new, _zeros(new))
        _write(states, new if keep else new._replace(c=None), t)

    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*u.shape[:2], units), leaf.dtype), problem.carry)
    given = (u, _flags(problem)), (problem.carry, problem.fresh), _weights(problem, units)
    made = (like if keep else like._replace(c=None)), problem.carry
    states, last = _walk(begin, step, given, made, units, reverse=how.reverse, interpret=interpret)
    return last, states.h, states


def _backward_one(*arrays, kind, reverse, wrt, interpret):
    """Computes the cotangents of `Moving` from those of `Moved`."""
    count = len(Fixed._fields)
    fixed, cotangents = Fixed(*arrays[:count]), Moved(*arrays[count:])
    read = Read(*fixed[: len(Read._fields)])
    how, problem = programs.how_of(kind, read, reverse), programs.problem_of(kind, read)
    cell: Any = how.cell
    units = read.h.shape[-1]
    states = Carry(fixed.ys, programs.there(fixed.cs))
    (_, *of_steps), inputs = derivative.arguments(how, problem, states)

    def begin(given, made):
        d_last, (d_carry, *others) = given[1], made[1]
        _write(d_carry, _read(d_last))
        _write(others, _zeros(_read(others)))

    def step(t, given, made):
        ((carry, u, v, w), d_ys, flags), _, whole = given
        d_products, (d_carry, d_fresh, d_theta) = made
        (carry, u, v, w), after = _read((carry, u, v, w), t), _read(d_carry)
        theta = _theta(whole, carry.h)
        d_new = _where(flags, "valid", t, after._replace(h=after.h + d_ys[t]), _zeros(after))
        _, update = jax.vjp(lambda *args: cell.update(*args)[0], theta, carry, u, v, w)
        moved, d_before, d_u, d_v, d_w = update(d_new)
        d_s = jnp.zeros_like(carry.h)
        if w is not None:
            _, second_input = jax.vjp(cell.second_input, theta, carry, carry.h, u, v)
            found = second_input(_product(d_w, whole["w_2"], transposed=True))
            moved, d_before, d_s, d_u, d_v = jax.tree.map(jnp.add, (moved, d_before, d_s, d_u, d_v), found)
        d_before = d_before._replace(h=d_before.h + d_s + _product(d_v, whole["w_h"], transposed=True))
        follows = _where(flags, "follows", t, d_before, _zeros(d_before))
        _write(d_carry, _where(flags, "valid", t, follows, after))
        _write(d_products, (d_u, d_v, d_w), t)
        _write(d_theta, jax.tree.map(lambda ref, new: ref[...] + new, d_theta, moved))
        if d_fresh is not None:
            _write(d_fresh, jax.tree.map(lambda ref, new, all: ref[...] + (all - new), d_fresh, follows, d_before))

    rows = Carry(cotangents.h, programs.there(cotangents.c))
    given = (of_steps, cotangents.ys, _flags(problem)), rows, _weights(problem, units)
    d_theta = jax.tree.map(lambda _: rows.h, problem.weights.theta)
    made = tuple(of_steps[1:]), (rows, rows if fixed.start.size else None, d_theta)
    made = _walk(begin, step, given, made, units, reverse=not reverse, interpret=interpret)
    d_products, (d_carry, d_fresh, d_theta) = made

    def products(moving):
        weights = programs.weights_of(kind, moving)
        return derivative.tangents_of_products(problem, programs.there(moving.xs), weights, of_steps[1:], inputs)

    of_one = Fixed(*(array[None] for array in fixed))
    shapes = programs.linear_shapes(of_one, 1, wrt)
    shapes = Moving(*(jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype) for shape in shapes))
    (moving,) = jax.linear_transpose(products, shapes)(d_products)
    moving = moving._replace(h=d_carry.h, c=moving.c if d_carry.c is None else d_carry.c)
    if d_fresh is not None:
        moving = moving._replace(fresh_h=d_fresh.h, fresh_c=moving.fresh_c if d_fresh.c is None else d_fresh.c)
    return moving if "b_hn" not in wrt else moving._replace(b_hn=d_theta.sum(0))


def forward(*arrays, interpret: bool, **options) -> list[Array]:
    """Does what `programs.forward` does."""
    loop = functools.partial(_time_steps, interpret=interpret)
    return programs.by_members("forward", functools.partial(programs.forward_one, loop=loop))(*arrays, **options)


def backward(*arrays, interpret: bool, **options) -> list[Array]:
    """Does what `programs.backward` does."""
    if 0 in arrays[0].shape[1:3]:  # steps and rows
        return programs.backward(*arrays, **options)
    one = functools.partial(_backward_one, wrt=options["wrt"], interpret=interpret)
    return programs.by_members("backward", one)(*arrays, **options)
