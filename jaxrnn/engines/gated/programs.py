"""The gated recurrences that compiled kernels compute, in JAX. They run where there is no kernel, and for higher
derivatives.

forward: the recurrence, and what is kept of it. tangent: its derivative, linear in the tangents. backward: the
transpose of that derivative. The gates, which kernels keep, the programs neither write nor read.

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
from jax import Array

from jaxrnn.engines.arrays import lifted
from jaxrnn.engines.gated import derivative
from jaxrnn.engines.gated.gates import gates_of
from jaxrnn.engines.gated.recurrence import GatedWeights, How, Problem, Recurrence, time_steps
from jaxrnn.typing import PyTree


class Carry(NamedTuple):
    """The carry of every kind."""

    h: Array
    c: Array | None


def _recurrence(kind: str) -> Recurrence:
    """What a kind does after its products; θ is b_hn, or ()."""

    def lstm(theta, carry, u, v, w):
        i, f, g, o = gates_of(u + v, carry.h)
        c = jax.nn.sigmoid(f) * carry.c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return Carry(h, c), h

    def elman(theta, carry, u, v, w):
        h = jnp.tanh(u + v) if kind == "elman_tanh" else jax.nn.relu(u + v)
        return Carry(h, None), h

    def gru(theta, carry, u, v, w):
        (u_r, u_z, u_n), (v_r, v_z, *q) = gates_of(u, carry.h), gates_of(v, carry.h)
        r, z = jax.nn.sigmoid(u_r + v_r), jax.nn.sigmoid(u_z + v_z)
        if kind == "gru":
            (q,) = q
            w = r * (q + lifted(theta, q) if len(theta) else q)
        h = (1 - z) * jnp.tanh(u_n + w) + z * carry.h
        return Carry(h, None), h

    def reset(theta, carry, s, u, v):
        return jax.nn.sigmoid(gates_of(u, s)[0] + gates_of(v, s)[0]) * s

    update = {"lstm": lstm, "elman_tanh": elman, "elman_relu": elman}.get(kind, gru)
    return Recurrence(update, reset)


def zeros(tree):
    """Returns a tree of zeros like `tree`."""
    return jax.tree.map(jnp.zeros_like, tree)


def there(array: Array | None) -> Any:
    """The array, or None where it has no columns."""
    return array if array is not None and array.shape[-1] else None


def weights_of(kind: str, arrays: Read | Moving) -> GatedWeights:
    """The weights of a kind, or their tangents; those that have no columns are None."""
    w_x, w_h, b, b_hn = map(there, (arrays.w_x, arrays.w_h, arrays.b, arrays.b_hn))
    first, second = w_h, None
    if kind == "gru_before" and w_h is not None:
        first, second = jnp.split(w_h, [2 * w_h.shape[0]], axis=1)
    return GatedWeights(w_x, b, first, second, b_hn)


def problem_of(kind: str, read: Read) -> Problem:
    """The recurrence of one member."""
    weights, flags = weights_of(kind, read), (flag if flag.size else None for flag in (read.valid, read.start))
    carry = Carry(read.h, there(read.c))
    # Invalid steps are computed from the fresh carry.
    fresh = Carry(read.fresh_h, there(read.fresh_c)) if read.fresh_h.shape[-1] else zeros(carry)
    weights = weights if weights.theta is not None else weights._replace(theta=())
    return Problem(read.xs, weights, carry, fresh, None, None, *flags)


def how_of(kind: str, read: Read, reverse: bool) -> How:
    """What its loop is told."""
    return How(_recurrence(kind), read.xs.dtype, read.xs.dtype, reverse, apart=True)


def forward_one(*arrays, kind, reverse, save, loop=time_steps):
    """Runs `loop` for one member whose sequences are time-major."""
    read = Read(*arrays)
    carry, ys, states = loop(how_of(kind, read, reverse), problem_of(kind, read), save)
    nothing = ys[..., :0]
    if not save:
        return ys, carry.h, read.c if carry.c is None else carry.c, nothing, nothing
    gates = {"lstm": 4, "gru": 4, "gru_before": 3}.get(kind, 0)
    kept = jnp.full((*ys.shape[:-1], gates * ys.shape[-1]), jnp.nan, ys.dtype)  # so that nobody reads it unseen
    return ys, carry.h, read.c if carry.c is None else carry.c, kept, nothing if states.c is None else states.c


def _tangent_one(*arrays, kind, reverse):
    """Computes the tangents of ys, h', c'."""
    count = len(Fixed._fields)
    fixed, moving = Fixed(*arrays[:count]), Moving(*arrays[count:])
    read = Read(*fixed[: len(Read._fields)])
    carry, fresh = Carry(moving.h, there(moving.c)), Carry(moving.fresh_h, there(moving.fresh_c))
    moved = Problem(there(moving.xs), weights_of(kind, moving), carry, fresh if moving.fresh_h.shape[-1] else None)
    states = Carry(fixed.ys, there(fixed.cs))
    new, ys = derivative.tangent(how_of(kind, read, reverse), problem_of(kind, read), states, moved)
    return ys, new.h, moving.c if new.c is None else new.c


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
    """The inputs of `tangent` and `backward` in which they are not linear: those of `Read`, and what is kept."""

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


def by_members(name, function):
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


forward, tangent = by_members("forward", forward_one), by_members("tangent", _tangent_one)


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
        rows = jax.typeof(array).sharding  # the tangents of rows are divided as they are
        return jax.ShapeDtypeStruct((members, *array.shape[1:-1], last), fixed.xs.dtype, sharding=rows)

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
