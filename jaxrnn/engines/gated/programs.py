"""The gated recurrences that compiled kernels compute, in JAX. They run where there is no kernel, and for higher
derivatives.

forward: the recurrence, and the values that are kept of it. tangent: its derivative, linear in the tangents. backward:
the transpose of that derivative.

Every array has an axis of members M in front: weights (M, ...), rows (M, B, ...), sequences (M, T, B, ...), or
(M, B, T, ...) if they are batch-major. Inputs may have one member for all. An absent array has a last axis of 0.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn.engines.arrays import lifted, select
from jaxrnn.engines.product import dot
from jaxrnn.typing import PyTree


def _split(array: Array, parts: int) -> list[Array]:
    return jnp.split(array, parts, axis=-1)


def _step(kind: str, u, w_h, b_hn, h, c):
    """Runs one step of one member from u = x w_x + b: (h', c', the values that are kept)."""
    size = w_h.shape[0]
    match kind:
        case "lstm":
            i, f, g, o = _split(u + dot(h, w_h), 4)
            i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
            c = f * c + i * g
            return o * jnp.tanh(c), c, jnp.concatenate([i, f, g, o], -1)
        case "gru":
            v = dot(h, w_h)
            q = v[..., 2 * size :] + lifted(b_hn, v) if b_hn.size else v[..., 2 * size :]
            r, z = _split(jax.nn.sigmoid(u[..., : 2 * size] + v[..., : 2 * size]), 2)
            n = jnp.tanh(u[..., 2 * size :] + r * q)
            return (1 - z) * n + z * h, c, jnp.concatenate([r, z, n, q], -1)
        case "gru_before":
            r, z = _split(jax.nn.sigmoid(u[..., : 2 * size] + dot(h, w_h[:, : 2 * size])), 2)
            n = jnp.tanh(u[..., 2 * size :] + dot(r * h, w_h[:, 2 * size :]))
            return (1 - z) * n + z * h, c, jnp.concatenate([r, z, n], -1)
    a = u + dot(h, w_h)
    return jnp.tanh(a) if kind == "elman_tanh" else jax.nn.relu(a), c, h[..., :0]


def _choose(flag: Array | None, on, off):
    return on if flag is None else select(flag, on, off)


def zeros(tree):
    """Returns a tree of zeros like `tree`."""
    return jax.tree.map(jnp.zeros_like, tree)


def _present(*flags):
    return tuple(flag if flag.size else None for flag in flags)


def _forward_one(xs, w_x, w_h, h, c, fresh_h, fresh_c, valid, start, b, b_hn, *, kind, reverse, save):
    flags = valid, start = _present(valid, start)
    us = dot(xs, w_x)
    us = us + lifted(b, us) if b.size else us

    def body(state, inputs):
        u, (valid, start) = inputs
        h, c = state if start is None else _choose(start, (fresh_h, fresh_c), state)
        results = _step(kind, u, w_h, b_hn, h, c)
        state = _choose(valid, results[:2], state)
        y, cs, kept = _choose(valid, results, zeros(results))
        return state, (y, *((kept, cs) if save else ()))

    (h, c), (ys, *kept) = lax.scan(body, (h, c), (us, flags), reverse=reverse)
    return ys, h, c, *(kept or (ys[..., :0], ys[..., :0]))


def _before(first, fresh, states, valid, start, reverse):
    """Returns the carry before every step, from the carries after every step, the first one and the fresh one."""
    length = states[0].shape[0]

    def shifted(first, states):
        first = first[None]
        return jnp.concatenate([states, first])[1:] if reverse else jnp.concatenate([first, states])[:-1]

    if valid is None:
        before = jax.tree.map(shifted, first, states)
    else:
        # The last valid step before each, by its place in [first, *states]: no loop.
        steps = jnp.arange(length, 0, -1) if reverse else jnp.arange(1, length + 1)
        seen = lax.cummax(jnp.where(valid, steps[:, None], 0), reverse=reverse)
        last = shifted(jnp.zeros_like(seen[0]), seen)

        def picked(first, states):
            whole = jnp.concatenate([first[None], jnp.flip(states, 0) if reverse else states])
            return jnp.take_along_axis(whole, last[..., None], axis=0)

        before = jax.tree.map(picked, first, states)
    return before if start is None else _choose(start, jax.tree.map(lifted, fresh, before), before)


def _coefficients(kind: str, kept, s, c_before, y, c):
    """What the tangent of every step multiplies, before the loop over them."""
    size = y.shape[-1]
    match kind:
        case "lstm":
            i, f, g, o = _split(kept, 4)
            squashed = jnp.tanh(c)
            of_c = jnp.concatenate([g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g)], -1)
            return of_c, f, squashed * o * (1 - o), o * (1 - squashed * squashed)
        case "gru" | "gru_before":
            r, z, n = _split(kept[..., : 3 * size], 3)
            second = kept[..., 3 * size :] if kind == "gru" else s
            return r * (1 - r) * second, r, (1 - z) * (1 - n * n), (s - n) * z * (1 - z), z
        case "elman_tanh":
            return (1 - y * y,)
    return ((y > 0).astype(y.dtype),)


def _moved(kind: str, w_h, d_u, d_v, coefficients, d_s, d_c):
    """The tangents of one step: (y, c')."""
    size = w_h.shape[0]
    match kind:
        case "lstm":
            of_c, f, of_o, of_y = coefficients
            a = d_u + dot(d_s, w_h)
            d_c = f * d_c + sum(_split(of_c * a[..., : 3 * size], 3))
            return of_o * a[..., 3 * size :] + of_y * d_c, d_c
        case "gru" | "gru_before":
            of_r, r, of_n, of_z, z = coefficients
            v = dot(d_s, w_h) + d_v if kind == "gru" else dot(d_s, w_h[:, : 2 * size])
            a_r, a_z = _split(d_u[..., : 2 * size] + v[..., : 2 * size], 2)
            if kind == "gru_before":
                d_n = dot(of_r * a_r + r * d_s, w_h[:, 2 * size :])
            else:
                d_n = of_r * a_r + r * v[..., 2 * size :]
            return of_n * (d_u[..., 2 * size :] + d_n) + of_z * a_z + z * d_s, d_c
    (slope,) = coefficients
    return slope * (d_u + dot(d_s, w_h)), d_c


def _tangent_one(
    xs, w_x, w_h, h, c, fresh_h, fresh_c, valid, start, ys, kept, cs,
    d_xs, d_w_x, d_w_h, d_h, d_c, d_fresh_h, d_fresh_c, d_b, d_b_hn,
    *, kind, reverse,
):  # fmt: skip
    """Computes the tangents of ys, h', c'."""
    size, after = w_h.shape[0], kind == "gru"
    flags = valid, start = _present(valid, start)
    s, c_before = _before((h, c), (fresh_h, fresh_c), (ys, cs), valid, start, reverse)
    d_u = jnp.zeros((*xs.shape[:2], w_h.shape[1]), xs.dtype)
    d_v = d_u if after else d_u[..., :0]
    if d_xs.size:
        d_u = d_u + dot(d_xs, w_x)
    if d_w_x.size:
        d_u = d_u + dot(xs, d_w_x)
    if d_b.size:
        d_u = d_u + lifted(d_b, d_u)
    if d_w_h.size:
        if after:
            d_v = d_v + dot(s, d_w_h)
        elif kind == "gru_before":
            second = dot(kept[..., :size] * s, d_w_h[:, 2 * size :])
            d_u = d_u + jnp.concatenate([dot(s, d_w_h[:, : 2 * size]), second], -1)
        else:
            d_u = d_u + dot(s, d_w_h)
    if d_b_hn.size:
        d_v = d_v + lifted(jnp.pad(d_b_hn, (2 * size, 0)), d_v)

    coefficients = _coefficients(kind, kept, s, c_before, ys, cs)

    def body(state, inputs):
        d_u, d_v, coefficients, (valid, start) = inputs
        d_s, d_c = state if start is None else _choose(start, (d_fresh_h, d_fresh_c), state)
        moved = _moved(kind, w_h, d_u, d_v, coefficients, d_s, d_c)
        return _choose(valid, moved, state), _choose(valid, moved[0], jnp.zeros_like(moved[0]))

    state, d_ys = lax.scan(body, (d_h, d_c), (d_u, d_v, coefficients, flags), reverse=reverse)
    return d_ys, *state


class Read(NamedTuple):
    """The inputs of `forward`: xs, weights, the carry, the fresh one, which steps are valid, and which start fresh."""

    xs: PyTree
    w_x: PyTree
    w_h: PyTree
    h: PyTree
    c: PyTree
    fresh_h: PyTree
    fresh_c: PyTree
    valid: PyTree
    start: PyTree
    b: PyTree
    b_hn: PyTree


class Written(NamedTuple):
    """The results of `forward`: the outputs, the last carry; and with `save` the gates and every c."""

    ys: PyTree
    h: PyTree
    c: PyTree
    kept: Any
    cs: Any


class Fixed(NamedTuple):
    """The inputs of `tangent` and `backward` in which they are not linear."""

    xs: PyTree
    w_x: PyTree
    w_h: PyTree
    h: PyTree
    c: PyTree
    fresh_h: PyTree
    fresh_c: PyTree
    valid: PyTree
    start: PyTree
    ys: PyTree
    kept: Any
    cs: Any


class Moving(NamedTuple):
    """The inputs in which `tangent` is linear; `backward` returns their cotangents."""

    xs: PyTree
    w_x: PyTree
    w_h: PyTree
    h: PyTree
    c: PyTree
    fresh_h: PyTree
    fresh_c: PyTree
    b: PyTree
    b_hn: PyTree


class Moved(NamedTuple):
    """The results whose tangents `tangent` returns, and in which `backward` is linear."""

    ys: PyTree
    h: PyTree
    c: PyTree


class Kind(enum.Enum):
    """The place of the rows in an array; a weight has none."""

    SEQUENCE = enum.auto()
    ROWS = enum.auto()
    WEIGHT = enum.auto()


KINDS: dict[str, Kind] = dict.fromkeys(("xs", "ys", "valid", "start", "kept", "cs"), Kind.SEQUENCE)
KINDS |= dict.fromkeys(("h", "c", "fresh_h", "fresh_c"), Kind.ROWS)
KINDS |= dict.fromkeys(("w_x", "w_h", "b", "b_hn"), Kind.WEIGHT)
INPUTS: dict[str, tuple[str, ...]] = {
    "forward": Read._fields,
    "tangent": Fixed._fields + Moving._fields,
    "backward": Fixed._fields + Moved._fields,
}
OUTPUTS: dict[str, tuple[str, ...]] = {"forward": Written._fields, "tangent": Moved._fields, "backward": Moving._fields}


def row_axis(name: str, batch_major: bool) -> int | None:
    """Returns the axis of rows in the array `name` of a call, or None."""
    match KINDS[name]:
        case Kind.SEQUENCE:
            return 1 if batch_major else 2
        case Kind.ROWS:
            return 1
    return None


def _members(name, function):
    """Extends `function`, for one member whose sequences are time-major, to all members."""
    inputs, outputs = INPUTS[name], OUTPUTS[name]

    def turn(arrays, names):
        pairs = zip(arrays, names, strict=True)
        return [jnp.swapaxes(array, 0, 1) if KINDS[name] is Kind.SEQUENCE else array for array, name in pairs]

    def run(*arrays, directions, batch_major, named, wrt=None, **options):
        count = count_members(array.shape[0] for array in arrays)

        def one(reverse):
            def run_one(*arrays):
                arrays = turn(arrays, inputs) if batch_major else arrays
                results = function(*arrays, reverse=reverse, **options)
                return turn(results, outputs) if batch_major else list(results)

            return run_one

        def some(reverse, first):
            shared = [array.shape[0] == 1 and count != 1 for array in arrays]
            chosen = [a[0] if one else a[first :: len(directions)] for a, one in zip(arrays, shared, strict=True)]
            return jax.vmap(one(reverse), [None if one else 0 for one in shared])(*chosen)

        parts = [some(reverse, k) for k, reverse in enumerate(directions)]
        if len(parts) == 1:
            return parts[0]
        return [jnp.stack(each, 1).reshape(count, *each[0].shape[1:]) for each in zip(*parts, strict=True)]

    return run


def count_members(sizes: Iterable[int]) -> int:
    """Returns the number of members of a call from the sizes of its arrays, each of which has all members or one for
    all.
    """
    counts = set(sizes) - {1}
    return counts.pop() if counts else 1


forward, tangent = _members("forward", _forward_one), _members("tangent", _tangent_one)


def backward(*arrays, wrt, **options):
    """Computes the transpose of `tangent`: cotangents of xs, weights and carries."""
    count = len(Fixed._fields)
    fixed, cotangents = Fixed(*arrays[:count]), list(arrays[count:])
    shapes = linear_shapes(fixed, count_members(array.shape[0] for array in arrays), wrt)
    run = functools.partial(tangent, *fixed, wrt=wrt, **options)
    # What has no numbers may be divided among devices in another way than the results.
    results = jax.eval_shape(run, *shapes)
    cotangents = [one if one.size else jnp.zeros_like(other) for one, other in zip(cotangents, results, strict=True)]
    return list(jax.linear_transpose(run, *shapes)(cotangents))


def linear_shapes(fixed: Fixed, members: int, wrt: tuple[str, ...]) -> Moving:
    """Returns the shapes of the inputs in which `tangent` is linear."""

    def like(array, present=True):
        last = array.shape[-1] if present else 0
        return jax.ShapeDtypeStruct((members, *array.shape[1:-1], last), fixed.xs.dtype)

    def bias(name, size):
        return jax.ShapeDtypeStruct((members, size if name in wrt else 0), fixed.xs.dtype)

    weights, (_, units, columns) = "weights" in wrt, fixed.w_h.shape
    return Moving(
        xs=like(fixed.xs, "xs" in wrt),
        w_x=like(fixed.w_x, weights),
        w_h=like(fixed.w_h, weights),
        h=like(fixed.h),
        c=like(fixed.c),
        fresh_h=like(fixed.fresh_h),
        fresh_c=like(fixed.fresh_c),
        b=bias("b", columns),
        b_hn=bias("b_hn", units),
    )
