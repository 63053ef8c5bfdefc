"""Diagonal recurrences by compiled kernels on the CPU: the calls of the kernels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrnn.engines.cpu import library
from jaxrnn.engines.diagonal import programs
from jaxrnn.engines.diagonal.programs import Problem, Result, chunk_size, steps_of
from jaxrnn.engines.primitives import Recurrence

LINE, GROUP = 16, 256  # channels of a block, and of the largest group of blocks, which is a task of one thread
TASKS = 4  # that each call divides into, if it can


def _given(problem: Problem) -> list[Array]:
    """The arrays of a problem, without elements where they are absent."""
    nothing = {name: jnp.zeros(0, bool if name in ("valid", "start") else problem.x.dtype) for name in Problem._fields}
    return [nothing[name] if each is None else each for name, each in problem._asdict().items()]


def _like(problem: Problem, array: Array | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((0,) if array is None else array.shape, problem.x.dtype)


def _native_forward(problem: Problem, shapes: Result, *, reverse: bool) -> Result:
    like = functools.partial(_like, problem)
    call = jax.ffi.ffi_call(
        library.target("jaxrnn_diagonal_forward", problem.x.dtype), tuple(like(each) for each in shapes)
    )
    ys, last, kept = call(*_given(problem), reverse=reverse, chunk=np.int64(chunk_size(problem.x.shape[0])))
    return Result(ys, last, None if shapes.kept is None else kept)


def _native_backward(
    problem: Problem, kept: Result, d_ys: Array, d_last: Array, *, reverse: bool, wrt: tuple[str, ...]
) -> Problem:
    x, a, b, _, h, step, *_ = problem
    rows, channels = x.shape[1:]
    like = functools.partial(_like, problem)
    of_rows = like(h)  # a cotangent of each row for a weight
    of_b = of_rows
    if step is not None:  # a sum of each group of channels
        groups = max(-(-channels // GROUP), min(-(-channels // LINE), -(-TASKS // rows)))
        of_b = jax.ShapeDtypeStruct((groups, *b.shape), b.dtype)
    shapes = like(x if "x" in wrt else None), of_rows, of_b, of_b, like(h), like(step), like(problem.fresh)
    call = jax.ffi.ffi_call(library.target("jaxrnn_diagonal_backward", x.dtype), shapes)
    chunk = np.int64(chunk_size(x.shape[0]))
    found = call(*_given(problem), kept.kept, d_ys, d_last, reverse=reverse, chunk=chunk)
    d_x, d_a, d_b, d_c, d_h, d_step, d_fresh = found

    def of_members(array):
        return array.reshape(a.shape[0], -1, *array.shape[1:]).sum(1)

    d_b, d_c = (each.sum(0) if step is not None else of_members(each) for each in (d_b, d_c))
    found = Problem(
        d_x,
        of_members(d_a),
        d_b,
        d_c,
        d_h,
        None if step is None else d_step,
        fresh=None if problem.fresh is None else d_fresh,
    )
    return found if "x" in wrt else found._replace(x=None)


def _timed(problem: Problem) -> tuple[str, ...]:
    return (*steps_of(problem), "ys", "kept")


run = Recurrence(
    "diagonal",
    forward=programs.forward,
    tangent=programs.tangent,
    backward=programs.backward,
    native_forward=_native_forward,
    native_backward=_native_backward,
    timed=_timed,
    spared=("x",),
)
