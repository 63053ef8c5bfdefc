"""Gated recurrences by compiled kernels on the CPU: three primitives, so that every transformation has them.

forward: the recurrence, and what is kept of it. tangent: its derivative, linear in the tangents. backward: the
transpose of that. On the CPU `forward` and `backward` are kernels; `tangent`, what is differentiated again, and what
runs elsewhere are XLA's.

Every array has an axis of members M in front: weights (M, ...), rows (M, B, ...), sequences (M, T, B, ...), or
(M, B, T, ...) if they are batch-major. What the primitives read may have one member for all. What is absent has a last
axis of 0.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from jaxrnn.engines.arrays import dot, select
from jaxrnn.engines.loop import in_chunks, starts

KINDS = {"elman_tanh": 0, "elman_relu": 1, "lstm": 2, "gru": 3, "gru_before": 4}
KEPT = {"elman_tanh": 0, "elman_relu": 0, "lstm": 4, "gru": 4, "gru_before": 3}


def _split(array: Array, parts: int) -> list[Array]:
    return jnp.split(array, parts, axis=-1)


def _step(kind: str, u, w_h, b_hn, h, c):
    """One step of one member: (h', c', what is kept) of u = x w_x + b."""
    size = w_h.shape[0]
    match kind:
        case "lstm":
            i, f, g, o = _split(u + dot(h, w_h), 4)
            i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
            c = f * c + i * g
            return o * jnp.tanh(c), c, jnp.concatenate([i, f, g, o], -1)
        case "gru":
            v = dot(h, w_h)
            q = v[..., 2 * size :] + b_hn if b_hn.size else v[..., 2 * size :]
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


def _zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def _present(*flags):
    return tuple(flag if flag.size else None for flag in flags)


def _forward_one(xs, w_x, w_h, h, c, fresh_h, fresh_c, valid, start, b, b_hn, *, kind, reverse, save):
    flags = valid, start = _present(valid, start)
    us = dot(xs, w_x)
    us = us + b if b.size else us

    def body(state, inputs):
        u, (valid, start) = inputs
        h, c = state if start is None else _choose(start, (fresh_h, fresh_c), state)
        results = _step(kind, u, w_h, b_hn, h, c)
        state = _choose(valid, results[:2], state)
        y, cs, kept = _choose(valid, results, _zeros(results))
        return state, (y, *((kept, cs) if save else ()))

    (h, c), (ys, *kept) = lax.scan(body, (h, c), (us, flags), reverse=reverse)
    return ys, h, c, *(kept or (ys[..., :0], ys[..., :0]))


def _before(first, fresh, states, valid, start, reverse):
    """The carry before every step, from those after every step, the first and the fresh one."""

    def body(state, inputs):
        new, valid, start = inputs
        before = state if start is None else _choose(start, fresh, state)
        return _choose(valid, new, state), before

    return lax.scan(body, first, (states, valid, start), reverse=reverse)[1]


def _tangent_one(
    xs, w_x, w_h, h, c, fresh_h, fresh_c, valid, start, ys, kept, cs,
    d_xs, d_w_x, d_w_h, d_h, d_c, d_fresh_h, d_fresh_c, d_b, d_b_hn,
    *, kind, reverse,
):  # fmt: skip
    """The tangents of ys, h', c'."""
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
        d_u = d_u + d_b
    if d_w_h.size:
        if after:
            d_v = d_v + dot(s, d_w_h)
        elif kind == "gru_before":
            second = dot(kept[..., :size] * s, d_w_h[:, 2 * size :])
            d_u = d_u + jnp.concatenate([dot(s, d_w_h[:, : 2 * size]), second], -1)
        else:
            d_u = d_u + dot(s, d_w_h)
    if d_b_hn.size:
        d_v = d_v + jnp.pad(d_b_hn, (2 * size, 0))

    def body(state, inputs):
        d_u, d_v, kept, s, c_before, y, c, (valid, start) = inputs
        d_s, d_c = state if start is None else _choose(start, (d_fresh_h, d_fresh_c), state)
        match kind:
            case "lstm":
                i, f, g, o = _split(kept, 4)
                a_i, a_f, a_g, a_o = _split(d_u + dot(d_s, w_h), 4)
                squashed = jnp.tanh(c)
                d_c = f * d_c + c_before * f * (1 - f) * a_f + g * i * (1 - i) * a_i + i * (1 - g * g) * a_g
                d_y = squashed * o * (1 - o) * a_o + o * (1 - squashed * squashed) * d_c
            case "gru" | "gru_before":
                r, z, n = _split(kept[..., : 3 * size], 3)
                v = dot(d_s, w_h) + d_v if after else dot(d_s, w_h[:, : 2 * size])
                a_r, a_z = _split(d_u[..., : 2 * size] + v[..., : 2 * size], 2)
                d_r, d_z = r * (1 - r) * a_r, z * (1 - z) * a_z
                if after:
                    a_n = d_r * kept[..., 3 * size :] + r * v[..., 2 * size :]
                else:
                    a_n = dot(d_r * s + r * d_s, w_h[:, 2 * size :])
                d_n = (1 - n * n) * (d_u[..., 2 * size :] + a_n)
                d_y = (1 - z) * d_n + (s - n) * d_z + z * d_s
            case _:
                a = d_u + dot(d_s, w_h)
                d_y = (1 - y * y) * a if kind == "elman_tanh" else jnp.where(y > 0, a, jnp.zeros_like(a))
        return _choose(valid, (d_y, d_c), state), _choose(valid, d_y, jnp.zeros_like(d_y))

    state, d_ys = lax.scan(body, (d_h, d_c), (d_u, d_v, kept, s, c_before, ys, cs, flags), reverse=reverse)
    return d_ys, *state


# Where the rows of an array are: in s, a sequence, r, rows, or w, weights, nowhere. What the recurrence reads (xs, w_x,
# w_h, h, c, fresh_h, fresh_c, valid, start) and the two biases; what is linear (the same without the flags); and what
# `tangent` and `backward` are not linear in (ys, kept and cs beside what the recurrence reads).
_READ, _BIASES, _LINEAR, _FIXED = "swwrrrrss", "ww", "swwrrrrww", "swwrrrrsssss"
_FLAGS = 7, 8
_LABELS = {
    "forward": (_READ + _BIASES, "srrss"),
    "tangent": (_FIXED + _LINEAR, "srr"),
    "backward": (_FIXED + "srr", _LINEAR),
}


def _members(name, function):
    """`function` of one member whose sequences are time-major, for all members."""
    inputs, outputs = _LABELS[name]

    def turn(arrays, labels):
        return [jnp.swapaxes(a, 0, 1) if label == "s" else a for a, label in zip(arrays, labels, strict=True)]

    def run(*arrays, directions, batch_major, named, wrt=None, **options):
        count = _count(array.shape[0] for array in arrays)

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


def _count(sizes: Iterable[int]) -> int:
    """The members of a call, of arrays with these many: all, or one for all."""
    counts = set(sizes) - {1}
    return counts.pop() if counts else 1


_forward_xla, _tangent_xla = _members("forward", _forward_one), _members("tangent", _tangent_one)


def _backward_xla(*arrays, wrt, **options):
    """The transpose of `_tangent_xla`: cotangents of xs, weights and carries."""
    fixed, cotangents = arrays[: len(_FIXED)], list(arrays[len(_FIXED) :])
    shapes = _linear_shapes(fixed, _count(array.shape[0] for array in arrays), wrt)
    run = functools.partial(_tangent_xla, *fixed, wrt=wrt, **options)
    return list(jax.linear_transpose(run, *shapes)(cotangents))


def _linear_shapes(fixed, members: int, wrt: tuple[str, ...]):
    """Shapes of what `tangent` is linear in."""
    xs, w_x, w_h, h, c, fresh_h, fresh_c = fixed[:7]

    def like(array, present=True):
        last = array.shape[-1] if present else 0
        return jax.ShapeDtypeStruct((members, *array.shape[1:-1], last), xs.dtype)

    def bias(name, size):
        return jax.ShapeDtypeStruct((members, size if name in wrt else 0), xs.dtype)

    weights = "weights" in wrt
    products = like(xs, "xs" in wrt), like(w_x, weights), like(w_h, weights)
    carries = like(h), like(c), like(fresh_h), like(fresh_c)
    return *products, *carries, bias("b", w_h.shape[2]), bias("b_hn", w_h.shape[1])


forward_p = Primitive("jaxrnn_gated_forward")
tangent_p = Primitive("jaxrnn_gated_tangent")
backward_p = Primitive("jaxrnn_gated_backward")
_REFERENCE = {forward_p: _forward_xla, tangent_p: _tangent_xla, backward_p: _backward_xla}
_batch_major: ContextVar[bool] = ContextVar("batch_major", default=False)
_OPTIONS = ("kind", "directions", "batch_major", "named", "save", "wrt")


@functools.cache
def _shapes(primitive, shapes, **options):
    return jax.eval_shape(functools.partial(_REFERENCE[primitive], **options), *shapes)


def _abstract(primitive):
    def rule(*avals, **options):
        shapes = tuple(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
        like = avals[0]

        def abstract(out):
            sharding = like.sharding.update(spec=PartitionSpec(*[None] * len(out.shape)))
            return like.update(shape=out.shape, dtype=out.dtype, weak_type=False, sharding=sharding)

        return [abstract(out) for out in _shapes(primitive, shapes, **options)]

    return rule


def _bind(primitive, *arrays, **options):
    """Under `shard_map` all arrays vary over the mesh axes that any of them varies over."""
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    every = frozenset().union(*varying)
    arrays = [
        array if own == every else lax.pcast(array, tuple(every - own), to="varying")
        for array, own in zip(arrays, varying, strict=True)
    ]
    return primitive.bind(*arrays, **options)


def _batched(primitive):
    inputs, outputs = _LABELS[primitive.name.removeprefix("jaxrnn_gated_")]

    def rule(arrays, axes, **options):
        rows = {"w": None, "r": 1, "s": 1 if options["batch_major"] else 2}
        count = next(array.shape[axis] for array, axis in zip(arrays, axes, strict=True) if axis is not None)
        members = _count(a.shape[1 if axis == 0 else 0] for a, axis in zip(arrays, axes, strict=True))
        by_member = (primitive is backward_p and "weights" in options["wrt"]) or any(
            axis is not None and label == "w" for axis, label in zip(axes, inputs, strict=True)
        )

        def fold(array, axis, label, shared):
            """The new axis into that of members, or of rows."""
            place = 0 if by_member else rows[label]
            if axis is None:
                if place is None or (by_member and shared and array.shape[0] == 1):
                    return array
                array, axis = jnp.broadcast_to(array[None], (count, *array.shape)), 0
            array = jnp.moveaxis(array, axis, place)
            if by_member and array.shape[1] != members:
                array = jnp.broadcast_to(array, (count, members, *array.shape[2:]))
            return array.reshape(*array.shape[:place], count * array.shape[place + 1], *array.shape[place + 2 :])

        fixed = len(_FIXED) if primitive is not forward_p else len(arrays)
        folded = [fold(*each, k < fixed) for k, each in enumerate(zip(arrays, axes, inputs, strict=True))]
        places = [0 if by_member else rows[label] for label in outputs]
        results = _bind(primitive, *folded, **options)
        unfolded = [
            array
            if place is None
            else array.reshape(*array.shape[:place], count, array.shape[place] // count, *array.shape[place + 1 :])
            for array, place in zip(results, places, strict=True)
        ]
        return unfolded, places

    return rule


def _instantiate(tangents):
    return [ad.instantiate_zeros(tangent) for tangent in tangents]


def _jvp_by_xla(reference, primals, tangents, options):
    """By differentiating XLA's form."""
    moving = [k for k in range(len(primals)) if k not in _FLAGS]

    def run(*arrays):
        whole = list(primals)
        for k, array in zip(moving, arrays, strict=True):
            whole[k] = array
        return reference(*whole, **options)

    return jax.jvp(run, [primals[k] for k in moving], _instantiate([tangents[k] for k in moving]))


def _forward_jvp(primals, tangents, *, save, **options):
    if save:
        return _jvp_by_xla(_REFERENCE[forward_p], primals, tangents, options | {"save": True})
    *read, b, b_hn = primals
    results = _bind(forward_p, *primals, save=True, **options)
    tangents = [tangent for k, tangent in enumerate(tangents) if k not in _FLAGS]
    wrt = () if type(tangents[0]) is ad.Zero else ("xs",)
    if any(type(tangents[k]) is not ad.Zero for k, label in enumerate(_LINEAR) if label == "w"):
        wrt += ("weights", *(name for name, bias in (("b", b), ("b_hn", b_hn)) if bias.size))
    fixed = *read, results[0], *results[3:]
    shapes = _linear_shapes(fixed, results[1].shape[0], wrt)

    def whole(tangent, shape):
        """A tangent of every member; of what is absent, nothing."""
        if math.prod(shape.shape) == 0:
            return jnp.zeros(shape.shape, shape.dtype)
        return jnp.broadcast_to(ad.instantiate_zeros(tangent), shape.shape)

    linear = [whole(*each) for each in zip(tangents, shapes, strict=True)]
    moved = _bind(tangent_p, *fixed, *linear, wrt=wrt, **options)
    nothing = [array[..., :0] for array in results[3:]]
    return [*results[:3], *nothing], [*moved, *_zeros(nothing)]


def _linear_jvp(primitive):
    """Of a primitive that is linear in all but its first arguments."""

    def rule(primals, tangents, **options):
        count = len(_FIXED)
        if all(type(tangent) is ad.Zero for tangent in tangents[:count]):
            moved = _bind(primitive, *primals[:count], *_instantiate(tangents[count:]), **options)
            return _bind(primitive, *primals, **options), moved
        return _jvp_by_xla(_REFERENCE[primitive], primals, tangents, options)

    return rule


def _transpose(other):
    def rule(cotangents, *arrays, **options):
        count = len(_FIXED)
        fixed, linear = arrays[:count], arrays[count:]
        found = _bind(other, *fixed, *_instantiate(cotangents), **options)
        return [None] * count + [
            cotangent if ad.is_undefined_primal(array) else None for array, cotangent in zip(linear, found, strict=True)
        ]

    return rule


def _by_xla(primitive):
    return mlir.lower_fun(_REFERENCE[primitive], multiple_results=True)


def _elsewhere(primitive):
    """Where there is no kernel."""
    by_xla = _by_xla(primitive)

    def rule(ctx, *operands, **options):
        if options["named"]:
            platforms = ", ".join(ctx.module_context.platforms)
            raise ValueError(f"implementation: 'native' has kernels for the CPU, and this is compiled for {platforms}")
        return by_xla(ctx, *operands, **options)

    return rule


def _on_cpu(primitive):
    call, by_xla = jax.ffi.ffi_lowering(primitive.name), _by_xla(primitive)

    def rule(ctx, *operands, kind, directions, batch_major, named, **options):
        # XLA does not know how to divide a kernel among devices.
        devices = getattr(ctx.module_context.axis_context, "num_devices", 1)
        if devices not in (None, 1) and not named:
            return by_xla(
                ctx, *operands, kind=kind, directions=directions, batch_major=batch_major, named=named, **options
            )
        bits = sum(reverse << k for k, reverse in enumerate(directions))
        return call(
            ctx,
            *operands,
            kind=np.int64(KINDS[kind]),
            batch_major=batch_major,
            directions=np.int64(bits),
            pattern=np.int64(len(directions)),
        )

    return rule


for _primitive in _REFERENCE:
    _primitive.multiple_results = True
    _primitive.def_impl(functools.partial(jax.jit(_primitive.bind, static_argnames=_OPTIONS)))
    _primitive.def_abstract_eval(_abstract(_primitive))
    batching.primitive_batchers[_primitive] = _batched(_primitive)
ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[tangent_p] = _linear_jvp(tangent_p)
ad.primitive_jvps[backward_p] = _linear_jvp(backward_p)
ad.primitive_transposes[tangent_p] = _transpose(backward_p)
ad.primitive_transposes[backward_p] = _transpose(tangent_p)
mlir.register_lowering(tangent_p, _by_xla(tangent_p))
for _primitive in (forward_p, backward_p):
    mlir.register_lowering(_primitive, _elsewhere(_primitive))


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
        targets = [jax.ffi.pycapsule(getattr(library, primitive.name)) for primitive in (forward_p, backward_p)]
    except (OSError, AttributeError) as error:
        return f"the compiled kernels could not be loaded: {error}"
    if refusal is not None:
        return refusal
    for primitive, target in zip((forward_p, backward_p), targets, strict=True):
        jax.ffi.register_ffi_target(primitive.name, target, platform="cpu")
        mlir.register_lowering(primitive, _on_cpu(primitive), platform="cpu")
    return None


def newer(version: str) -> str | None:
    """Why kernels compiled with the headers of this jaxlib cannot run here: newer ones stop the whole CPU backend."""
    running = jaxlib.version.__version__
    compiled, own = (tuple(map(int, each.split(".")[:3])) for each in (version, running))
    if compiled <= own:
        return None
    return f"the kernels were compiled for jaxlib {version}, newer than the {running} that runs; build again"


@contextmanager
def reading(*, batch_major: bool) -> Iterator[None]:
    """How the sequences at hand lie: where batch-major, kernels read and write them so, and nothing is copied."""
    token = _batch_major.set(batch_major)
    try:
        yield
    finally:
        _batch_major.reset(token)


class Layer(NamedTuple):
    """One recurrence of a call."""

    weights: tuple[Array, Array | None, Array, Array | None]  # w_x (D, G), b (G,), w_h (H, G), b_hn (H,)
    carry: Any  # a named tuple of h, or h and c, (*batch, H)
    fresh: Any
    reverse: bool


def scan(kind: str, layers: Sequence[Layer], xs: Array, *, valid, reset, every: int | None, named: bool) -> list:
    """Recurrences of the same sizes over the first axis of `xs`, all at once: (carry, ys) of each.

    Args:
      kind: of `KINDS`.
      layers: what differs among them.
      xs: (T, *batch, D). valid, reset: bool (T, *batch) or None.
      every: store one carry every so many steps for the backward pass, or None for all; then all in one direction.
      named: whether nothing else may run instead.
    """
    batch = xs.shape[1:-1]
    rows, members, size = math.prod(batch), len(layers), layers[0].weights[2].shape[0]
    by_batch = _batch_major.get() and bool(batch)
    directions = tuple(layer.reverse for layer in layers)

    def together(arrays):
        return arrays[0][None] if members == 1 else jnp.stack(arrays)

    def weight(k):
        arrays = [layer.weights[k] for layer in layers]
        return jnp.zeros((1, 0), xs.dtype) if arrays[0] is None else together(arrays)

    def carries(trees, present=True):
        """h and c, without elements where they are absent."""
        arrays = [together(each).reshape(members, rows, size) for each in zip(*trees, strict=True)]
        arrays += [jnp.zeros((1, rows, 0), xs.dtype)] * (2 - len(arrays))
        return arrays if present else [array[..., :0] for array in arrays]

    def sequence(arrays, *last):
        """(T, *batch, *last) of each, or of all, to that of the call; an axis is moved before another one is put in
        front, so that XLA sees it move back."""
        if by_batch:
            arrays = [jnp.moveaxis(array, 0, len(batch)) for array in arrays]
        length = arrays[0].shape[len(batch) if by_batch else 0]
        return together(arrays).reshape(len(arrays), *((rows, length) if by_batch else (length, rows)), *last)

    def flags(arrays, length):
        if arrays is not None:
            return sequence(arrays)
        return jnp.zeros((1, rows, 0) if by_batch else (1, length, 0), bool)

    w_x, b, w_h, b_hn = (weight(k) for k in range(4))

    def run(state, inputs):
        xs, valid, start = inputs
        length = xs.shape[0]
        ys, h, c, *_ = _bind(
            forward_p,
            sequence([xs], xs.shape[-1]),
            w_x,
            w_h,
            *carries(state),
            *carries([layer.fresh for layer in layers], start is not None),
            flags(None if valid is None else [valid], length),
            flags(start, length),
            b,
            b_hn,
            kind=kind,
            directions=directions,
            batch_major=by_batch,
            named=named,
            save=False,
        )
        states = [array.reshape(members, *batch, size) for array in (h, c)[: len(state[0])]]
        new = tuple(tuple(each[m] for each in states) for m in range(members))
        if by_batch:
            return new, tuple(jnp.moveaxis(ys[m].reshape(*batch, length, size), len(batch), 0) for m in range(members))
        return new, tuple(ys[m].reshape(length, *batch, size) for m in range(members))

    start = None if reset is None else [starts(reset, valid, reverse) for reverse in directions]
    carry = tuple(tuple(layer.carry) for layer in layers)
    state, ys = in_chunks(run, carry, (xs, valid, start), directions[0], every)
    return list(zip(state, ys, strict=True))
