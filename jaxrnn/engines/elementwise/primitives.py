"""Linear recurrences of single units by compiled kernels on the CPU: the calls of the kernels."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrnn.engines.cpu import library
from jaxrnn.engines.elementwise import programs
from jaxrnn.engines.elementwise.programs import FLAGS, STEPS, WEIGHTS, Problem, Result
from jaxrnn.engines.primitives import Recurrence

ARRAYS = ("xs", "w", "h", "b", "theta", "w_y", *FLAGS, "fresh")  # in the order of the kernels
COTANGENTS = ("xs", "w", "h", "b", "theta", "fresh", "w_y")  # in their order, too
UNITS = (
    *("min_gru", "min_gru signed", "min_gru logs", "min_lstm", "min_lstm signed", "min_lstm logs", "hgrn"),
    *("sru", "sru tanh", "sru skip", "sru tanh skip", "qrnn", "rg_lru", "lru"),
)


def _given(problem: Problem) -> list[Array]:
    """The arrays of a problem, without elements where they are absent."""
    arrays = [(name, getattr(problem, name)) for name in ARRAYS]
    return [
        jnp.zeros(0, bool if name in FLAGS else problem.xs.dtype) if each is None else each for name, each in arrays
    ]


def _options(problem: Problem) -> dict[str, np.generic]:
    unit = problem.unit
    return {"unit": np.int64(UNITS.index(unit.name)), "taps": np.int64(problem.taps), "bound": np.float64(unit.bound)}


def _call(name: str, problem: Problem, results: Iterable[Array | None]):
    """The call of a kernel that gives arrays like these."""
    dtype = problem.xs.dtype
    shapes = tuple(jax.ShapeDtypeStruct((0,) if each is None else each.shape, dtype) for each in results)
    return jax.ffi.ffi_call(library.target(name, dtype), shapes)


def _native_forward(problem: Problem, shapes: Result, *, reverse: bool) -> Result:
    call = _call("jaxrnn_elementwise_forward", problem, shapes)
    found = call(*_given(problem), reverse=reverse, **_options(problem))
    ys, last, *kept = found
    kept = [None if shape is None else each for shape, each in zip(shapes[2:], kept, strict=True)]
    return Result(ys, last, *kept)


def _native_backward(
    problem: Problem, kept: Result, d_ys: Array, d_last: Array, *, reverse: bool, wrt: tuple[str, ...]
) -> Problem:
    asked = {name: getattr(problem, name) if name in (*wrt, "h") else None for name in COTANGENTS}
    several = problem.taps > 1 and "xs" in wrt
    seen = functools.partial(programs.seen, taps=problem.taps, reverse=reverse)
    xs = jax.ShapeDtypeStruct(problem.xs.shape, problem.xs.dtype)
    if several:
        asked["xs"] = jax.eval_shape(seen, xs)
    call = _call("jaxrnn_elementwise_backward", problem, asked.values())
    saved = [jnp.zeros(0, d_ys.dtype) if each is None else each for each in (kept.ys, kept.hs, kept.sums)]
    found = call(*_given(problem), *saved, d_ys, d_last, reverse=reverse, **_options(problem))
    whole = {name: None if asked[name] is None else each for name, each in zip(COTANGENTS, found, strict=True)}
    if several:
        (whole["xs"],) = jax.linear_transpose(seen, xs)(whole["xs"])
    return problem.replace(**whole, **dict.fromkeys(FLAGS))


run = Recurrence(
    "elementwise",
    forward=programs.forward,
    tangent=programs.tangent,
    backward=programs.backward,
    native_forward=_native_forward,
    native_backward=_native_backward,
    timed=lambda problem: (*STEPS, "ys", "hs", "sums"),
    weights=WEIGHTS,
    spared=("xs", *WEIGHTS),
)
