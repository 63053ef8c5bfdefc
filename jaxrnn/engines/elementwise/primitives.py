"""Linear recurrences of single units by compiled kernels on the CPU: the calls of the kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrnn.engines.elementwise import programs
from jaxrnn.engines.elementwise.programs import FLAGS, STEPS, Problem, Result
from jaxrnn.engines.primitives import Recurrence

ARRAYS = ("u", "h", "b", "x", "rate", *FLAGS, "fresh")  # in the order of the kernels
UNITS = ("min_gru", "min_gru signed", "min_lstm", "min_lstm signed", "hgrn", "sru", "sru tanh", "qrnn", "rg_lru")


def _given(problem: Problem) -> list[Array]:
    """The arrays of a problem, without elements where they are absent."""
    arrays = [(name, getattr(problem, name)) for name in ARRAYS]
    return [jnp.zeros(0, bool if name in FLAGS else jnp.float32) if each is None else each for name, each in arrays]


def _options(problem: Problem) -> dict[str, np.generic]:
    return {"unit": np.int64(UNITS.index(problem.unit.name)), "bound": np.float32(problem.unit.bound)}


def _like(array: Array | None, rows: int | None = None) -> jax.ShapeDtypeStruct:
    if array is None:
        return jax.ShapeDtypeStruct((0,), jnp.float32)
    return jax.ShapeDtypeStruct(array.shape if rows is None else (rows, *array.shape[1:]), array.dtype)


def _native_forward(problem: Problem, shapes: Result, *, reverse: bool) -> Result:
    call = jax.ffi.ffi_call("jaxrnn_elementwise_forward", tuple(map(_like, shapes)))
    ys, last, hs = call(*_given(problem), reverse=reverse, **_options(problem))
    return Result(ys, last, None if shapes.hs is None else hs)


def _native_backward(problem: Problem, kept: Result, d_ys: Array, d_last: Array, *, reverse: bool) -> Problem:
    rows = problem.h.shape[0]
    weights = [_like(weight, rows) for weight in (problem.b, problem.rate)]  # a cotangent of each row for a weight
    shapes = _like(problem.u), _like(problem.h), weights[0], _like(problem.x), weights[1], _like(problem.fresh)
    call = jax.ffi.ffi_call("jaxrnn_elementwise_backward", shapes)
    hs = jnp.zeros(0, d_ys.dtype) if kept.hs is None else kept.hs
    found = call(*_given(problem), kept.ys, hs, d_ys, d_last, reverse=reverse, **_options(problem))

    def own(name, array):
        given = getattr(problem, name)
        if given is None or name not in ("b", "rate"):
            return None if given is None else array
        return array.reshape(given.shape[0], -1, given.shape[1]).sum(1)

    names = ("u", "h", "b", "x", "rate", "fresh")
    cotangents = {name: own(name, array) for name, array in zip(names, found, strict=True)}
    return problem.replace(**cotangents, **dict.fromkeys(FLAGS))


run = Recurrence(
    "elementwise",
    forward=programs.forward,
    tangent=programs.tangent,
    backward=programs.backward,
    native_forward=_native_forward,
    native_backward=_native_backward,
    timed=lambda problem: (*STEPS, "ys", "hs"),
)
