"""The calls of the kernels of gated recurrences with options."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrnn.engines.arrays import varying_like
from jaxrnn.engines.cpu import library
from jaxrnn.engines.gated.recurrence import GatedWeights
from jaxrnn.engines.gated.staged.programs import (
    Call,
    Problem,
    Result,
    all_members,
    backward_shapes,
    forward_shapes,
)
from jaxrnn.engines.gated.staged.rule import FAMILIES, Given
from jaxrnn.typing import PyTree


def _beside(leaves: Sequence[Array]) -> Array | None:
    return jnp.concatenate(leaves, -1) if leaves else None


def _arrays(problem: Problem, given: Given) -> list[Array | None]:
    """What both kernels take, in their order."""
    h, *rest = jax.tree.leaves(problem.carry)
    fresh_h, *fresh = jax.tree.leaves(problem.fresh) or [None]
    stay_h, *stay = jax.tree.leaves(problem.stay) or [None]
    states = (
        h,
        _beside(rest),
        fresh_h,
        _beside(fresh),
        problem.valid,
        problem.start,
        problem.mask,
        stay_h,
        _beside(stay),
    )
    return [problem.xs, given.w_x, *states, given.w_h, given.w_2, given.theta]


def _run(name: str, call: Call, members: int, arrays, shapes) -> list[Array | None]:
    """Runs a kernel. What has no elements is not handed over, but for the first three, which tell the sizes."""
    rule, codes = call.rule, (call.rule.gate, call.rule.candidate, call.rule.output)
    arguments = [k for k, array in enumerate(arrays) if k < 3 or (array is not None and array.size)]
    results = [k for k, shape in enumerate(shapes) if shape is not None and math.prod(shape.shape)]
    switches = rule.input, rule.norm, rule.projected, call.rates is not None, rule.heads
    rates = (*(call.rates or ()), 0.0, 0.0, 0.0, 0.0)[:4]
    values = [*(number for code in codes for number in code[1:]), rule.gate_clip, rule.cell_clip, *rates]
    found = jax.ffi.ffi_call(library.target(name, arrays[0].dtype), [shapes[k] for k in results])(
        *[arrays[k] for k in arguments],
        numbers=np.array([FAMILIES.index(rule.family), *(code.code for code in codes), *switches], np.int64),
        values=np.array(values, np.float64),
        batch_major=call.batch_major,
        directions=np.int64(sum(reverse << k for k, reverse in enumerate(call.directions))),
        pattern=np.int64(len(call.directions)),
        members=np.int64(members),
        here=np.int64(sum(1 << k for k in arguments) + sum(1 << 32 + k for k in results)),
    )
    whole = [None if shape is None else jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
    for k, array in zip(results, found, strict=True):
        whole[k] = array
    return whole


def _shape_beside(arrays: Sequence[jax.ShapeDtypeStruct]) -> jax.ShapeDtypeStruct | None:
    """The shape of states beside each other."""
    if not arrays:
        return None
    one, size = arrays[0], sum(each.shape[-1] for each in arrays)
    return jax.ShapeDtypeStruct((*one.shape[:-1], size), one.dtype)


def _apart(call: Call, problem: Problem, h: PyTree, rest: PyTree) -> PyTree:
    """The carry, from h and the other states beside each other."""
    leaves, structure = jax.tree.flatten(problem.carry)
    states = [] if rest is None else jnp.split(rest, len(leaves) - 1, axis=-1)
    return jax.tree.unflatten(structure, [h, *states])


def _even(weights: GatedWeights, members: int) -> GatedWeights:
    """The weights of every member."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (members, *leaf.shape[1:])), weights)


def native_forward(call: Call, problem: Problem, *, save, wrt) -> Result:
    """Runs `programs.forward` by its kernel."""
    shapes, members = forward_shapes(call, problem, save=save, wrt=wrt), all_members(problem)
    given = jax.vmap(call.cell.arrange)(_even(problem.weights, all_members(problem.weights)))
    h, *rest = jax.tree.leaves(shapes.carry)
    together = _shape_beside(rest)
    results = [shapes.ys, h, together, shapes.kept, shapes.rests]
    ys, h, rest, kept, rests = _run(
        "jaxrnn_staged_forward", call, members, [*_arrays(problem, given), given.b], results
    )
    return Result(ys, _apart(call, problem, h, rest), kept, rests)


def native_backward(call: Call, problem: Problem, kept: Result, cotangents: Result, *, save, wrt) -> Problem:
    """Runs `programs.backward` by its kernel."""
    members = all_members(problem, kept, cotangents)
    shapes = backward_shapes(call, problem, kept, cotangents, save=save, wrt=wrt)
    weights = _even(problem.weights, members if "weights" in wrt else all_members(problem.weights))
    # Also what does not depend on the weights varies as they do.
    given, pull = jax.vjp(lambda weights: varying_like(jax.vmap(call.cell.arrange)(weights), weights), weights)

    def states(tree):
        h, *rest = jax.tree.leaves(tree) or [None]
        return h, _shape_beside(rest)

    def like(array):
        return None if array is None or "weights" not in wrt else jax.ShapeDtypeStruct(array.shape, array.dtype)

    d_h, *d_rest = jax.tree.leaves(cotangents.carry)
    moving = Given(*map(like, given))
    results = [
        shapes.xs,
        *states(shapes.carry),
        *states(shapes.fresh),
        moving.w_x,
        moving.w_h,
        moving.w_2,
        moving.theta,
    ]
    arrays = [*_arrays(problem, given), kept.ys, kept.kept, kept.rests, cotangents.ys, d_h, _beside(d_rest)]
    d_xs, d_h, d_rest, f_h, f_rest, w_x, w_h, w_2, theta, b = _run(
        "jaxrnn_staged_backward", call, members, arrays, [*results, moving.b]
    )
    return Problem(
        xs=d_xs,
        weights=pull(varying_like(Given(w_x, w_h, b, w_2, theta), weights))[0] if "weights" in wrt else None,
        carry=_apart(call, problem, d_h, d_rest),
        fresh=None if f_h is None else _apart(call, problem, f_h, f_rest),
    )
