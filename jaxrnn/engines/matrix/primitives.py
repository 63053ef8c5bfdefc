"""Matrix recurrences by compiled kernels on the CPU: the calls of the kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrnn.engines.cpu import library
from jaxrnn.engines.matrix import programs
from jaxrnn.engines.matrix.programs import CHUNK, STEPS, Problem, Result
from jaxrnn.engines.primitives import Recurrence
from jaxrnn.typing import PyTree

TIMED = (*STEPS, "ys", "reads", "states")


def _given(problem: Problem) -> list[Array]:
    """The arrays of a problem, without elements where they are absent."""
    nothing = {name: jnp.zeros(0, problem.v.dtype) for name in Problem._fields} | {"start": jnp.zeros(0, bool)}
    return [nothing[name] if each is None else each for name, each in problem._asdict().items()]


def _native_forward(problem: Problem, shapes: Result, *, reverse: bool) -> Result:
    nothing = jax.ShapeDtypeStruct((0,), problem.v.dtype)
    name = library.target("jaxrnn_matrix_forward", problem.v.dtype)
    call = jax.ffi.ffi_call(name, tuple(nothing if each is None else each for each in shapes))
    ys, last, *kept = call(*_given(problem), reverse=reverse, chunk=np.int64(CHUNK))
    return Result(ys, last, *(None if shape is None else each for shape, each in zip(shapes[2:], kept, strict=True)))


def _native_backward(problem: Problem, kept: Result, d_ys: Array, d_last: Array, *, reverse: bool) -> Problem:
    steps, rows, heads, _ = problem.v.shape
    arrays = {name: each for name, each in problem._asdict().items() if name != "start"}

    def shape(name, array):
        """That of a cotangent with all heads."""
        if array is None:
            return jax.ShapeDtypeStruct((0,), problem.v.dtype)
        of_heads = (steps, rows, heads, *array.shape[3:]) if name in STEPS else array.shape
        return jax.ShapeDtypeStruct(of_heads, array.dtype)

    def summed(array, found) -> PyTree:
        """Heads that share an array add to one cotangent."""
        if array is None or found.shape == array.shape:
            return None if array is None else found
        return found.sum(2, keepdims=True)

    name = library.target("jaxrnn_matrix_backward", problem.v.dtype)
    call = jax.ffi.ffi_call(name, tuple(shape(*each) for each in arrays.items()))
    saved = [jnp.zeros(0, problem.v.dtype) if each is None else each for each in kept]
    found = call(*_given(problem), *saved, d_ys, d_last, reverse=reverse, chunk=np.int64(CHUNK))
    return Problem(**{name: summed(array, each) for (name, array), each in zip(arrays.items(), found, strict=True)})


run = Recurrence(
    "matrix",
    forward=programs.forward,
    tangent=programs.tangent,
    backward=programs.backward,
    native_forward=_native_forward,
    native_backward=_native_backward,
    timed=lambda problem: TIMED,
)
