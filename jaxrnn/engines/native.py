"""Gated recurrences by compiled kernels on the CPU: three primitives, so that every transformation has them.

forward: the recurrence, and what is kept of it. tangent: its derivative, linear in the tangents. backward: the
transpose of that. `forward` and `backward` are kernels; `tangent`, and what is differentiated again, are XLA's.

Every array has an axis of members M in front: weights (M, ...), rows (M, B, ...), sequences (M, T, B, ...). What is
absent has a size of 0.
"""

from __future__ import annotations

import ctypes
import functools
import math
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxrnn.engines.arrays import dot
from jaxrnn.engines.loop import in_chunks

KINDS = {"elman_tanh": 0, "elman_relu": 1, "lstm": 2, "gru": 3, "gru_before": 4}
GATES = {"elman_tanh": 1, "elman_relu": 1, "lstm": 4, "gru": 3, "gru_before": 3}
KEPT = GATES | {"gru": 4}


def _split(array: Array, parts: int) -> list[Array]:
    return jnp.split(array, parts, axis=-1)


def _step(kind: str, u, w_h, b_hn, h, c):
    """One step of one member: (h', c', gates) of u = x w_x + b."""
    size = w_h.shape[0]
    match kind:
        case "lstm":
            i, f, g, o = _split(u + dot(h, w_h), 4)
            i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
            c = f * c + i * g
            return o * jnp.tanh(c), c, (i, f, g, o)
        case "gru":
            v = dot(h, w_h)
            q = v[..., 2 * size :] if b_hn.size == 0 else v[..., 2 * size :] + b_hn
            r, z = _split(jax.nn.sigmoid(u[..., : 2 * size] + v[..., : 2 * size]), 2)
            n = jnp.tanh(u[..., 2 * size :] + r * q)
            return (1 - z) * n + z * h, c, (r, z, n, q)
        case "gru_before":
            r, z = _split(jax.nn.sigmoid(u[..., : 2 * size] + dot(h, w_h[:, : 2 * size])), 2)
            n = jnp.tanh(u[..., 2 * size :] + dot(r * h, w_h[:, 2 * size :]))
            return (1 - z) * n + z * h, c, (r, z, n)
    a = u + dot(h, w_h)
    y = jnp.tanh(a) if kind == "elman_tanh" else jax.nn.relu(a)
    return y, c, (y,)


def _choose(flag: Array | None, on, off):
    return on if flag is None else jax.tree.map(lambda a, b: jnp.where(flag[..., None], a, b), on, off)


def _flags(valid, start, length):
    """Each as (T, B), or None where it is absent; at T = 0 nothing reads them."""
    return tuple(None if flag.size == 0 or length == 0 else flag for flag in (valid, start))


def _zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def _forward_one(xs, w_x, b, w_h, b_hn, h, c, fresh_h, fresh_c, valid, start, *, kind, reverse, save):
    length, rows, size = *xs.shape[:2], w_h.shape[0]
    flags = _flags(valid, start, length)
    u_bias = jnp.zeros((), xs.dtype) if b.size == 0 else b

    def body(state, inputs):
        x, (valid, start) = inputs
        h, c = _choose(None if start is None else start, (fresh_h, fresh_c), state) if start is not None else state
        new_h, new_c, gates = _step(kind, dot(x, w_x) + u_bias, w_h, b_hn, h, c)
        gates = jnp.concatenate(gates, -1)
        y, gates = _choose(valid, (new_h, gates), _zeros((new_h, gates)))
        state = _choose(valid, (new_h, new_c), state)
        return state, (y, *((gates, h, c) if save else ()))

    (h, c), (ys, *kept) = lax.scan(body, (h, c), (xs, flags), reverse=reverse)
    if not save:
        sizes = KEPT[kind] * size, size, c.shape[-1]
        kept = [jnp.zeros((0, rows, size), xs.dtype) for size in sizes]
    return ys, h, c, *kept


def _tangent_one(w_h, gates, s, c_before, valid, start, *linear, kind, reverse):
    """The tangents (ys', h', c') of a step's u and v and of the carries."""
    d_u, d_v, d_h, d_c, d_fresh_h, d_fresh_c = linear
    size, flags = w_h.shape[0], _flags(valid, start, s.shape[0])

    def body(state, inputs):
        d_u, d_v, gates, s, c, (valid, start) = inputs
        before = state if start is None else _choose(start, (d_fresh_h, d_fresh_c), state)
        d_s, d_c = before
        match kind:
            case "lstm":
                i, f, g, o = _split(gates, 4)
                a_i, a_f, a_g, a_o = _split(d_u + dot(d_s, w_h), 4)
                squashed = jnp.tanh(f * c + i * g)
                d_c = f * d_c + c * f * (1 - f) * a_f + g * i * (1 - i) * a_i + i * (1 - g * g) * a_g
                d_y = squashed * o * (1 - o) * a_o + o * (1 - squashed * squashed) * d_c
            case "gru" | "gru_before":
                after = kind == "gru"
                r, z, n = _split(gates, 4)[:3] if after else _split(gates, 3)
                v = dot(d_s, w_h if after else w_h[:, : 2 * size])
                v = v + d_v if after else v
                a_r, a_z = _split(d_u[..., : 2 * size] + v[..., : 2 * size], 2)
                d_r, d_z = r * (1 - r) * a_r, z * (1 - z) * a_z
                if after:
                    a_n = d_r * gates[..., 3 * size :] + r * v[..., 2 * size :]
                else:
                    a_n = dot(d_r * s + r * d_s, w_h[:, 2 * size :])
                d_n = (1 - n * n) * (d_u[..., 2 * size :] + a_n)
                d_y = (1 - z) * d_n + (s - n) * d_z + z * d_s
            case _:
                a = d_u + dot(d_s, w_h)
                d_y = (1 - gates * gates) * a if kind == "elman_tanh" else jnp.where(gates > 0, a, jnp.zeros_like(a))
        new = _choose(valid, (d_y, d_c), state)
        return new, _choose(valid, d_y, jnp.zeros_like(d_y))

    state, d_ys = lax.scan(body, (d_h, d_c), (d_u, d_v, gates, s, c_before, flags), reverse=reverse)
    return d_ys, *state


def _members(function):
    """`function` of one member, for all members."""

    @functools.wraps(function)
    def run(*arrays, **options):
        return list(jax.vmap(functools.partial(function, **options))(*arrays))

    return run


_forward_xla, _tangent_xla = _members(_forward_one), _members(_tangent_one)


def _backward_xla(*arrays, kind, reverse):
    """The transpose of `_tangent_xla`: cotangents of (d_u, d_v, d_h, d_c, d_fresh_h, d_fresh_c)."""
    fixed, cotangents = arrays[:6], list(arrays[6:])
    shapes = _linear_shapes(kind, *(jax.typeof(array) for array in (fixed[0], *cotangents)))
    run = functools.partial(_tangent_xla, *fixed, kind=kind, reverse=reverse)
    return list(jax.linear_transpose(run, *shapes)(cotangents))


def _linear_shapes(kind, w_h, d_ys, d_h, d_c):
    """Shapes of what `tangent` is linear in."""
    shape = jax.ShapeDtypeStruct
    u = shape((*d_ys.shape[:3], w_h.shape[2]), d_ys.dtype)
    v = u if kind == "gru" else shape((*d_ys.shape[:3], 0), d_ys.dtype)
    h, c = shape(d_h.shape, d_ys.dtype), shape(d_c.shape, d_ys.dtype)
    return u, v, h, c, h, c


FIXED = 6  # the arguments of `tangent` and `backward` that they are not linear in

forward_p = Primitive("jaxrnn_gated_forward")
tangent_p = Primitive("jaxrnn_gated_tangent")
backward_p = Primitive("jaxrnn_gated_backward")

_REFERENCE = {forward_p: _forward_xla, tangent_p: _tangent_xla, backward_p: _backward_xla}
# Where the rows are: weights have none.
_ROWS = {"w": None, "r": 1, "s": 2}
_LABELS = {
    forward_p: ("swwwwrrrrss", "srrsss"),
    tangent_p: ("wsssssssrrrr", "srr"),
    backward_p: ("wssssssrr", "ssrrrr"),
}


def _abstract(primitive):
    reference = _REFERENCE[primitive]

    def rule(*avals, **options):
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        return [jax.core.ShapedArray(out.shape, out.dtype) for out in _shapes(reference, tuple(shapes), **options)]

    return rule


@functools.cache
def _shapes(reference, shapes, **options):
    return jax.eval_shape(functools.partial(reference, **options), *shapes)


def _batched(primitive):
    inputs, outputs = _LABELS[primitive]

    def rule(arrays, axes, **options):
        count = next(array.shape[axis] for array, axis in zip(arrays, axes, strict=True) if axis is not None)
        by_member = any(axis is not None and label == "w" for axis, label in zip(axes, inputs, strict=True))

        def fold(array, axis, label):
            place = 0 if by_member else _ROWS[label]
            if place is None:
                return array
            if axis is None:
                array, axis = jnp.broadcast_to(array[None], (count, *array.shape)), 0
            array = jnp.moveaxis(array, axis, place)
            return array.reshape(*array.shape[:place], count * array.shape[place + 1], *array.shape[place + 2 :])

        folded = [fold(*each) for each in zip(arrays, axes, inputs, strict=True)]
        places = [0 if by_member else _ROWS[label] for label in outputs]
        results = primitive.bind(*folded, **options)
        results = [
            array.reshape(*array.shape[:place], count, array.shape[place] // count, *array.shape[place + 1 :])
            for array, place in zip(results, places, strict=True)
        ]
        return results, places

    return rule


def _instantiate(tangents):
    return [ad.instantiate_zeros(tangent) for tangent in tangents]


def _jvp_by_xla(reference, flags, primals, tangents, options):
    """By differentiating XLA's form; `flags` are the places of the booleans."""
    moving = [k for k in range(len(primals)) if k not in flags]

    def run(*arrays):
        whole = list(primals)
        for k, array in zip(moving, arrays, strict=True):
            whole[k] = array
        return reference(*whole, **options)

    return jax.jvp(run, [primals[k] for k in moving], _instantiate([tangents[k] for k in moving]))


def _forward_jvp(primals, tangents, *, kind, reverse, save):
    if save:
        return _jvp_by_xla(_forward_xla, (9, 10), primals, tangents, {"kind": kind, "reverse": reverse, "save": True})
    xs, w_x, b, w_h, b_hn, h, c, fresh_h, fresh_c, valid, start = primals
    ys, h_, c_, *kept = forward_p.bind(*primals, kind=kind, reverse=reverse, save=True)
    gates, s, _ = kept
    d_xs, d_w_x, d_b, d_w_h, d_b_hn, *d_carries = tangents[:9]
    size = w_h.shape[1]

    def product(s, w):
        return jnp.einsum("mtbi,mio->mtbo", s, w)

    u = jnp.zeros((*xs.shape[:3], w_h.shape[2]), xs.dtype)
    v = u if kind == "gru" else u[..., :0]
    if type(d_xs) is not ad.Zero:
        u = u + product(d_xs, w_x)
    if type(d_w_x) is not ad.Zero:
        u = u + product(xs, d_w_x)
    if type(d_b) is not ad.Zero and d_b.size:
        u = u + d_b[:, None, None]
    if type(d_w_h) is not ad.Zero:
        if kind == "gru":
            v = v + product(s, d_w_h)
        elif kind == "gru_before":
            second = product(gates[..., :size] * s, d_w_h[..., 2 * size :])
            u = u + jnp.concatenate([product(s, d_w_h[..., : 2 * size]), second], -1)
        else:
            u = u + product(s, d_w_h)
    if type(d_b_hn) is not ad.Zero and d_b_hn.size:
        v = v + jnp.pad(d_b_hn, ((0, 0), (2 * size, 0)))[:, None, None]
    moved = tangent_p.bind(w_h, *kept, valid, start, u, v, *_instantiate(d_carries), kind=kind, reverse=reverse)
    nothing = [jnp.zeros((*array.shape[:1], 0, *array.shape[2:]), array.dtype) for array in kept]
    return [ys, h_, c_, *nothing], [*moved, *nothing]


def _linear_jvp(primitive):
    """Of a primitive that is linear in all but its first arguments."""

    def rule(primals, tangents, **options):
        if all(type(tangent) is ad.Zero for tangent in tangents[:FIXED]):
            fixed = primals[:FIXED]
            moved = primitive.bind(*fixed, *_instantiate(tangents[FIXED:]), **options)
            return primitive.bind(*primals, **options), moved
        return _jvp_by_xla(_REFERENCE[primitive], (4, 5), primals, tangents, options)

    return rule


def _transpose(other):
    def rule(cotangents, *arrays, **options):
        fixed, linear = arrays[:FIXED], arrays[FIXED:]
        found = other.bind(*fixed, *_instantiate(cotangents), **options)
        return [None] * FIXED + [
            cotangent if ad.is_undefined_primal(array) else None for array, cotangent in zip(linear, found, strict=True)
        ]

    return rule


def _lowering(name):
    call = jax.ffi.ffi_lowering(name)

    def rule(ctx, *operands, kind, reverse, save=None):
        return call(ctx, *operands, kind=np.int64(KINDS[kind]), reverse=reverse)

    return rule


def _elsewhere(ctx, *operands, **options):
    platforms = ", ".join(ctx.module_context.platforms)
    raise ValueError(f"implementation: 'native' has kernels for the CPU, and this is compiled for {platforms}")


for _primitive in _REFERENCE:
    _primitive.multiple_results = True
    _primitive.def_impl(functools.partial(jax.jit(_primitive.bind, static_argnames=("kind", "reverse", "save"))))
    _primitive.def_abstract_eval(_abstract(_primitive))
    batching.primitive_batchers[_primitive] = _batched(_primitive)
ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[tangent_p] = _linear_jvp(tangent_p)
ad.primitive_jvps[backward_p] = _linear_jvp(backward_p)
mlir.register_lowering(tangent_p, mlir.lower_fun(_tangent_xla, multiple_results=True))
for _primitive in (forward_p, backward_p):
    mlir.register_lowering(_primitive, _elsewhere)
ad.primitive_transposes[tangent_p] = _transpose(backward_p)
ad.primitive_transposes[backward_p] = _transpose(tangent_p)


@functools.cache
def absent() -> str | None:
    """Why the kernels cannot be called, or None: then they are registered."""
    folder = Path(__file__).parent
    files = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_kernels{suffix}").is_file()]
    if not files:
        return "the package was installed without compiled kernels: it found no C++ compiler, or the build failed"
    try:
        library = ctypes.CDLL(str(files[0]))
        library.jaxrnn_jaxlib.restype = ctypes.c_char_p
        refusal = newer(library.jaxrnn_jaxlib().decode())
    except (OSError, AttributeError) as error:
        return f"the compiled kernels could not be loaded: {error}"
    if refusal is not None:
        return refusal
    for primitive in (forward_p, backward_p):
        target = jax.ffi.pycapsule(getattr(library, primitive.name))
        jax.ffi.register_ffi_target(primitive.name, target, platform="cpu")
        mlir.register_lowering(primitive, _lowering(primitive.name), platform="cpu")
    return None


def newer(version: str) -> str | None:
    """Why kernels compiled with the headers of this jaxlib cannot run here: newer ones stop the whole CPU backend."""
    compiled, running = (tuple(map(int, each.split(".")[:3])) for each in (version, jaxlib.__version__))
    if compiled <= running:
        return None
    return f"the kernels were compiled for jaxlib {version}, newer than the {jaxlib.__version__} that runs; build again"


def scan(kind: str, weights, carry, xs, *, fresh, valid, start, reverse: bool, every: int | None):
    """The recurrence over the first axis of `xs`: ((h, c), ys), or ((h,), ys).

    Args:
      kind: of `KINDS`.
      weights: w_x (D, G), b (G,) or None, w_h (H, G), b_hn (H,) or None.
      carry, fresh: named tuples of h, or h and c, each (*batch, H).
      xs: (T, *batch, D). valid, start: bool (T, *batch) or None.
      every: store one carry every so many steps for the backward pass, or None for all.
    """
    _, *batch, _ = xs.shape
    rows = math.prod(batch)

    def row(leaf):
        return leaf.reshape(1, rows, leaf.shape[-1])

    w_x, b, w_h, b_hn = weights
    size, dtype = w_h.shape[0], xs.dtype
    members = [w_x, *(jnp.zeros((0,), dtype) if bias is None else bias for bias in (b,)), w_h]
    members.append(jnp.zeros((0,), dtype) if b_hn is None else b_hn)
    members = [array[None] for array in members]
    nothing = jnp.zeros((rows, 0), dtype)

    def rows_of(tree):
        h, *c = tree
        return [row(h), row(c[0]) if c else nothing[None]]

    def run(carry, inputs):
        xs, valid, start = inputs
        length = xs.shape[0]
        no_flags = jnp.zeros((1, 0, rows), bool)
        flags = [no_flags if flag is None else flag.reshape(1, length, rows) for flag in (valid, start)]
        ys, h, c, *_ = forward_p.bind(
            xs.reshape(1, length, rows, xs.shape[-1]),
            *members,
            *rows_of(carry),
            *rows_of(fresh),
            *flags,
            kind=kind,
            reverse=reverse,
            save=False,
        )
        new = (h.reshape(*batch, size), c.reshape(*batch, size)) if len(carry) == 2 else (h.reshape(*batch, size),)
        return new, ys.reshape(length, *batch, size)

    return in_chunks(run, tuple(carry), (xs, valid, start), reverse, every)
