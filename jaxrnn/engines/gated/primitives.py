"""Gated recurrences by compiled kernels on the CPU: three primitives, so that every transformation works on them.

On the CPU, `forward` and `backward` are kernels. `tangent`, higher derivatives and all other platforms use the programs
of `programs`, where the three primitives and their arrays are described.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from jaxrnn.engines.arrays import evaluated, folded, mapped_over_nothing, repeated, unfolded, varying_like
from jaxrnn.engines.cpu import library
from jaxrnn.engines.gated import pallas, programs
from jaxrnn.engines.gated.layout import Layout, together
from jaxrnn.engines.gated.programs import (
    INPUTS,
    OUTPUTS,
    Fixed,
    Moving,
    Read,
    Written,
    count_members,
    linear_shapes,
    row_axis,
    zeros,
)
from jaxrnn.engines.loop import in_chunks
from jaxrnn.engines.partition import MEMBERS, ROWS, Factors, axes, lowering, on_one_device
from jaxrnn.engines.walk import Walk, starts
from jaxrnn.typing import PyTree

FEW = 8  # members whose cotangents are added one by one, since XLA is slow to reduce a short axis
KINDS = {"elman_tanh": 0, "elman_relu": 1, "lstm": 2, "gru": 3, "gru_before": 4}

forward_p = Primitive("jaxrnn_gated_forward")
tangent_p = Primitive("jaxrnn_gated_tangent")
backward_p = Primitive("jaxrnn_gated_backward")
_REFERENCE = {forward_p: programs.forward, tangent_p: programs.tangent, backward_p: programs.backward}
_PALLAS = {forward_p: pallas.forward, backward_p: pallas.backward}
_OPTIONS = ("kind", "directions", "batch_major", "named", "save", "wrt")


@functools.cache
def _shapes(primitive, shapes, **options):
    return jax.eval_shape(functools.partial(_REFERENCE[primitive], **options), *shapes)


def _names(primitive):
    """Returns the names of its inputs and of its outputs."""
    name = primitive.name.removeprefix("jaxrnn_gated_")
    return INPUTS[name], OUTPUTS[name]


def _abstract(primitive):
    """Rows of the results are divided among devices as those of the inputs are."""
    inputs, outputs = _names(primitive)

    def rule(*avals, **options):
        shapes = tuple(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
        axis_of = functools.partial(row_axis, batch_major=options["batch_major"])
        places = [(aval, axis_of(name)) for aval, name in zip(avals, inputs, strict=True) if aval.size]
        specs = [aval.sharding.spec[axis] for aval, axis in places if axis is not None]
        rows = next((spec for spec in specs if spec is not None), None)

        def abstract(out, name):
            spec: list[PyTree] = [None] * len(out.shape)
            axis = axis_of(name)
            if axis is not None and out.shape[axis]:  # also of what has no numbers
                spec[axis] = rows
            sharding = avals[0].sharding.update(spec=PartitionSpec(*spec))
            return avals[0].update(shape=out.shape, dtype=out.dtype, weak_type=False, sharding=sharding)

        return [abstract(*each) for each in zip(_shapes(primitive, shapes, **options), outputs, strict=True)]

    return rule


def _bind(primitive, *arrays, **options):
    return primitive.bind(*varying_like(arrays), **options)


def _batched(primitive):
    inputs, outputs = _names(primitive)

    def rule(arrays, axes, **options):
        axis_of = functools.partial(row_axis, batch_major=options["batch_major"])
        mapped = next((array, axis) for array, axis in zip(arrays, axes, strict=True) if axis is not None)
        count = mapped[0].shape[mapped[1]]
        if count == 0:
            return mapped_over_nothing(primitive, arrays, axes, **options)
        members = count_members(a.shape[1 if axis == 0 else 0] for a, axis in zip(arrays, axes, strict=True))
        by_member = (primitive is backward_p and "weights" in options["wrt"]) or any(
            axis is not None and axis_of(name) is None for axis, name in zip(axes, inputs, strict=True)
        )

        def fold(array, axis, name, shared):
            """Folds the new axis into that of members, or of rows."""
            place: Any = 0 if by_member else axis_of(name)
            if axis is None:
                if place is None or (by_member and shared and array.shape[0] == 1):
                    return array
                array, axis = repeated(array, *mapped), 0
            array = jnp.moveaxis(array, axis, place)
            if by_member and array.shape[1] != members:
                array = jnp.broadcast_to(array, (count, members, *array.shape[2:]))
            return folded(array, place)

        fixed = len(Fixed._fields) if primitive is not forward_p else len(arrays)
        given = [fold(*each, k < fixed) for k, each in enumerate(zip(arrays, axes, inputs, strict=True))]
        places = [0 if by_member else axis_of(name) for name in outputs]
        results = zip(_bind(primitive, *given, **options), places, strict=True)
        return [array if place is None else unfolded(array, place, count) for array, place in results], places

    return rule


def _instantiate(tangents):
    return [ad.instantiate_zeros(tangent) for tangent in tangents]


def _jvp_by_xla(reference, primals, tangents, options):
    """Differentiates XLA's form."""
    moving = [k for k, primal in enumerate(primals) if primal.dtype != bool]

    def run(*arrays):
        whole = list(primals)
        for k, array in zip(moving, arrays, strict=True):
            whole[k] = array
        return reference(*whole, **options)

    return jax.jvp(run, [primals[k] for k in moving], _instantiate([tangents[k] for k in moving]))


def _forward_jvp(primals, tangents, *, save, **options):
    if save:
        return _jvp_by_xla(_REFERENCE[forward_p], primals, tangents, options | {"save": True})
    read, out = Read(*primals), Written(*_bind(forward_p, *primals, save=True, **options))
    moving = Moving(*(tangent for name, tangent in zip(Read._fields, tangents, strict=True) if name in Moving._fields))
    wrt = () if type(moving.xs) is ad.Zero else ("xs",)
    if any(type(tangent) is not ad.Zero for tangent in (moving.w_x, moving.w_h, moving.b, moving.b_hn)):
        wrt += ("weights", *(name for name in ("b", "b_hn") if getattr(read, name).size))
    fixed = Fixed(*read, out.ys, out.kept, out.cs)
    shapes = linear_shapes(fixed, out.h.shape[0], wrt)

    def whole(tangent, shape):
        """Returns a tangent for every member, or no elements for an array that is absent."""
        if math.prod(shape.shape) == 0:
            return jnp.zeros(shape.shape, shape.dtype)
        tangent = ad.instantiate_zeros(tangent)
        if tangent.shape[0] != shape.shape[0] <= FEW:
            return jnp.concatenate([tangent] * shape.shape[0])
        return jnp.broadcast_to(tangent, shape.shape)

    linear = [whole(*each) for each in zip(moving, shapes, strict=True)]
    moved = _bind(tangent_p, *fixed, *linear, wrt=wrt, **options)
    nothing = [array[..., :0] for array in (out.kept, out.cs)]
    return [out.ys, out.h, out.c, *nothing], [*moved, *zeros(nothing)]


def _linear_jvp(primitive):
    """Returns the JVP rule of a primitive that is linear in all but its first arguments."""

    def rule(primals, tangents, **options):
        count = len(Fixed._fields)
        if all(type(tangent) is ad.Zero for tangent in tangents[:count]):
            moved = _bind(primitive, *primals[:count], *_instantiate(tangents[count:]), **options)
            return _bind(primitive, *primals, **options), moved
        return _jvp_by_xla(_REFERENCE[primitive], primals, tangents, options)

    return rule


def _transpose(other):
    def rule(cotangents, *arrays, **options):
        count = len(Fixed._fields)
        fixed, linear = arrays[:count], arrays[count:]
        found = _bind(other, *fixed, *_instantiate(cotangents), **options)
        return [None] * count + [
            cotangent if ad.is_undefined_primal(array) else None for array, cotangent in zip(linear, found, strict=True)
        ]

    return rule


def _by_xla(primitive):
    return mlir.lower_fun(_REFERENCE[primitive], multiple_results=True)


def _by_pallas(primitive):
    def rule(ctx, *operands, **options):
        platforms = ", ".join(ctx.module_context.platforms)
        if platforms not in ("cpu", "tpu"):
            raise ValueError(f"implementation: 'pallas' is compiled for a TPU, and this is for {platforms}")
        run = functools.partial(_PALLAS[primitive], interpret=platforms == "cpu")
        return on_one_device(run)(ctx, *operands, **options)

    return rule


def _elsewhere(primitive):
    """Returns the lowering rule for platforms without a compiled kernel."""
    by_xla, by_pallas = _by_xla(primitive), _by_pallas(primitive)

    def rule(ctx, *operands, **options):
        if options["named"] == "native":
            platforms = ", ".join(ctx.module_context.platforms)
            raise ValueError(f"implementation: 'native' has kernels for the CPU, and this is compiled for {platforms}")
        return (by_pallas if options["named"] == "pallas" else by_xla)(ctx, *operands, **options)

    return rule


def _factors(primitive, avals_in, avals_out, options) -> Factors:
    """Members, of which a device takes both directions, and rows."""
    inputs, outputs = _names(primitive)
    xs = row_axis("xs", options["batch_major"])
    sizes = {MEMBERS: count_members(aval.shape[0] for aval in avals_in), ROWS: avals_in[0].shape[xs]}

    def named(aval, name):
        at = row_axis(name, options["batch_major"])
        return axes(aval.shape, {0: (MEMBERS,)} | ({} if at is None else {at: (ROWS,)}), sizes)

    arguments, results = (
        [named(*each) for each in zip(avals, names, strict=True)]
        for avals, names in ((avals_in, inputs), (avals_out, outputs))
    )
    return Factors(arguments, results, sizes, {MEMBERS: len(options["directions"])})


def _on_cpu(primitive):
    by_xla, by_pallas = _by_xla(primitive), _by_pallas(primitive)

    def alone(ctx, *operands, kind, directions, batch_major, named, **options):
        names, _ = _names(primitive)
        taken = [k for k, name in enumerate(names) if primitive is forward_p or name not in ("b", "b_hn")]
        # What has no elements is not handed over, but for the first three, which tell the sizes.
        arguments = [k for k in taken if k < 3 or ctx.avals_in[k].size]
        places = {k: place for place, k in enumerate(taken)}
        results = [k for k, aval in enumerate(ctx.avals_out) if aval.size]
        call = jax.ffi.ffi_lowering(library.target(primitive.name, ctx.avals_in[0].dtype))
        found = call(
            ctx.replace(avals_in=[ctx.avals_in[k] for k in arguments], avals_out=[ctx.avals_out[k] for k in results]),
            *[operands[k] for k in arguments],
            kind=np.int64(KINDS[kind]),
            batch_major=batch_major,
            directions=np.int64(sum(reverse << k for k, reverse in enumerate(directions))),
            pattern=np.int64(len(directions)),
            members=np.int64(count_members(aval.shape[0] for aval in ctx.avals_in)),
            here=np.int64(sum(1 << places[k] for k in arguments) + sum(1 << 32 + k for k in results)),
        )
        whole: list[PyTree] = [
            None if aval.size else mlir.ir_constant(np.zeros(aval.shape, aval.dtype)) for aval in ctx.avals_out
        ]
        for k, value in zip(results, found, strict=True):
            whole[k] = value
        return whole

    compiled = lowering(primitive, alone, by_xla, functools.partial(_factors, primitive))

    def rule(ctx, *operands, **options):
        return (by_pallas if options["named"] == "pallas" else compiled)(ctx, *operands, **options)

    return rule


for _primitive in _REFERENCE:
    _primitive.multiple_results = True
    _primitive.def_impl(evaluated(_primitive, _OPTIONS))
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
    library.register(_primitive, _on_cpu(_primitive))


class Layer(NamedTuple):
    """One recurrence of a call."""

    weights: tuple[Array, Array | None, Array, Array | None]  # w_x (D, G), b (G,), w_h (H, G), b_hn (H,)
    carry: PyTree  # a named tuple of h, or h and c, (*batch, H)
    fresh: PyTree
    reverse: bool


def _weight(arrays, dtype):
    """Joins one weight of all layers: zeros where some lack it, no elements where all do."""
    one = next((array for array in arrays if array is not None), None)
    if one is None:
        return jnp.zeros((1, 0), dtype)
    return together(*(jnp.zeros_like(one) if array is None else array for array in arrays))


def scan(kind: str, layers: Sequence[Layer], xs: Array, walk: Walk) -> list:
    """Runs recurrences of the same sizes over the first axis of `xs`, all at once: (carry, ys) of each.

    Args:
      kind: One of the names in `KINDS`.
      layers: The values that differ among the recurrences.
      xs: The inputs, (T, *batch, D).
      walk: The walk of the first recurrence; with `remat_every`, of all.
    """
    named, layout = walk.named("gated_scan"), Layout(xs.shape[1:-1], walk.batch_major and xs.ndim > 2)
    members, size = len(layers), layers[0].weights[2].shape[0]
    directions = tuple(layer.reverse for layer in layers)

    def carries(trees, present=True):
        """Returns h and c, without elements where they are absent."""
        arrays = [layout.rows(*each) for each in zip(*trees, strict=True)]
        arrays += [arrays[0][:1, :, :0]] * (2 - len(arrays))
        return arrays if present else [array[..., :0] for array in arrays]

    def flags(arrays, like):
        return jnp.zeros((*like.shape[:2], 0), bool) if arrays is None else layout.sequence(arrays)

    w_x, b, w_h, b_hn = (_weight(arrays, xs.dtype) for arrays in zip(*(each.weights for each in layers), strict=True))

    def run(_, state, inputs):
        xs, valid, start = inputs
        xs = layout.sequence([xs], xs.shape[-1])
        h, c = carries(state)
        fresh_h, fresh_c = carries([layer.fresh for layer in layers], start is not None)
        read = Read(
            xs=xs,
            w_x=w_x,
            w_h=w_h,
            h=h,
            c=c,
            fresh_h=fresh_h,
            fresh_c=fresh_c,
            valid=flags(None if valid is None else [valid], xs),
            start=flags(start, xs),
            b=b,
            b_hn=b_hn,
        )
        ys, h, c, *_ = _bind(
            forward_p,
            *read,
            kind=kind,
            directions=directions,
            batch_major=layout.by_batch,
            named=named,
            save=False,
        )
        states = [array.reshape(members, *layout.batch, size) for array in (h, c)[: len(state[0])]]
        new = tuple(tuple(each[m] for each in states) for m in range(members))
        return new, tuple(layout.back(ys[m]) for m in range(members))

    valid, reset = walk.valid, walk.reset
    start = None if reset is None else [starts(reset, valid, reverse) for reverse in directions]
    carry = tuple(tuple(layer.carry) for layer in layers)
    state, ys = in_chunks(run, (), carry, (xs, valid, start), walk)
    return list(zip(state, ys, strict=True))
