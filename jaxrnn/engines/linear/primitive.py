"""The primitive of linear recurrences, and the programs that compute it.

There is one primitive, so that every transformation works on it. It is linear in b and in h before the first step, and
its transpose is itself, in the other direction and shifted:

    plain      h_k = A_k h_{k-1} + b_k          gives all h_k, and the last
    shifted    h_k = c_{k-1} + b_k, c_k = A_k h_k   gives all h_k, and the last c_k

Here a cut at step k means A_k = 0, by selection. The primitive is not linear in a; for a, the product rule gives the
tangent: the recurrence of ȧ_k h_{k-1} + ḃ_k.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from jaxrnn.engines.arrays import evaluated, varying_like
from jaxrnn.engines.cpu import library
from jaxrnn.engines.linear import pallas
from jaxrnn.engines.partition import Factors, axes, lowering, on_one_device

ELSEWHERE = "associative"  # what None means on accelerators
CHUNK = 128  # steps that "chunked" computes at once


# The forms, of a (·), b (T, ...), h (...), cut (·) or nothing. Sums are in the dtype of h.


def _before(coefficient: Array, cut: Array | None, h: Array) -> Array:
    """Returns A h, which a step adds to b."""
    product = coefficient.astype(h.dtype) * h
    return product if cut is None else jnp.where(cut, jnp.zeros_like(product), product)


def _sequential(a, b, h, *cut, reverse, shifted):
    moving = [x.shape[0] != 1 or b.shape[0] == 1 for x in (a, *cut)]
    fixed = [None if moves else x[0] for x, moves in zip((a, *cut), moving, strict=True)]

    def body(c, inputs):
        b, *rest = inputs
        rest = iter(rest)
        coefficient, *flag = [next(rest) if moves else x for x, moves in zip(fixed, moving, strict=True)]
        step = functools.partial(_before, coefficient, *(flag or [None]))
        new = (c if shifted else step(c)) + b.astype(c.dtype)
        return step(new) if shifted else new, new.astype(b.dtype)

    inputs = [b, *(x for x, moves in zip((a, *cut), moving, strict=True) if moves)]
    last, hs = lax.scan(body, h, inputs, reverse=reverse)
    return hs, last


def _combine(first, second):
    """Joins two stretches of steps to one: (product of coefficients, h from 0, whether there is a cut in it)."""
    a_1, b_1, *cut_1 = first
    a_2, b_2, *cut_2 = second
    if not cut_1:
        return a_2 * a_1, a_2 * b_1 + b_2
    (cut_1,), (cut_2,) = cut_1, cut_2
    product, moved = a_2 * a_1, a_2 * b_1
    return jnp.where(cut_2, 0, product), jnp.where(cut_2, 0, moved) + b_2, cut_1 | cut_2


def _unshifted(function):
    """Extends a form of the plain recurrence to the shifted one."""

    @functools.wraps(function)
    def run(a, b, h, *cut, reverse, shifted):
        wide = [jnp.broadcast_to(x, (b.shape[0], *x.shape[1:])) for x in (a, *cut)]
        if not shifted:
            return function(*wide[:1], b, h, *wide[1:], reverse=reverse)
        first, last = (slice(1, None), 0) if reverse else (slice(None, -1), -1)
        neutral = [jnp.ones_like(wide[0][:1]), *(jnp.zeros_like(x[:1]) for x in wide[1:])]
        moved = [
            jnp.concatenate([x[first], one] if reverse else [one, x[first]])
            for x, one in zip(wide, neutral, strict=True)
        ]
        hs, end = function(moved[0], b, h, *moved[1:], reverse=reverse)
        return hs, _before(wide[0][last], wide[1][last] if cut else None, end)

    return run


def _doubling(a, b, h, *cut, reverse):
    first = -1 if reverse else 0
    wide = b.astype(h.dtype)
    wide = wide.at[first].add(_before(a[first], cut[0][first] if cut else None, h))
    coefficients = jnp.broadcast_to(a.astype(h.dtype), b.shape)
    flags = [jnp.broadcast_to(x, b.shape) for x in cut]
    _, hs, *_ = lax.associative_scan(_combine, (coefficients, wide, *flags), reverse=reverse)
    return hs.astype(b.dtype), hs[0 if reverse else -1]


def _chunked(a, b, h, *cut, reverse):
    length = b.shape[0]
    size = min(CHUNK, length)
    missing = -length % size

    def pad(x, value):
        widths = [(missing, 0) if reverse else (0, missing)] + [(0, 0)] * (x.ndim - 1)
        x = jnp.pad(x, widths, constant_values=value)
        return x.reshape(-1, size, *x.shape[1:])

    inputs = pad(a, 1), pad(b, 0), *(pad(x, False) for x in cut)

    def body(h, inputs):
        hs, last = _doubling(inputs[0], inputs[1], h, *inputs[2:], reverse=reverse)
        return last, hs

    last, hs = lax.scan(body, h, inputs, reverse=reverse)
    hs = hs.reshape(-1, *hs.shape[2:])
    return hs[missing:] if reverse else hs[:length], last


def _native(a, b, h, *cut, reverse, shifted):
    inner = b.shape[1:]
    columns = math.prod(inner)
    a = jnp.broadcast_to(a, (a.shape[0], *inner)).reshape(a.shape[0], columns)
    flags = jnp.zeros((0, 0), bool)
    if cut:
        sizes = cut[0].shape[1:]
        axes = next((k for k in range(len(sizes), 0, -1) if sizes[k - 1] != 1), 0)  # all after them have one flag
        flags = jnp.broadcast_to(cut[0], (cut[0].shape[0], *inner[:axes], *sizes[axes:]))
        flags = flags.reshape(flags.shape[0], -1) if columns else jnp.zeros((0, 0), bool)
    shapes = jax.ShapeDtypeStruct((b.shape[0], columns), b.dtype), jax.ShapeDtypeStruct((columns,), h.dtype)
    call = jax.ffi.ffi_call(library.target(linear_scan_p.name, b.dtype), shapes)
    hs, last = call(a, b.reshape(-1, columns), h.reshape(columns), flags, reverse=reverse, shifted=shifted)
    return hs.reshape(b.shape), last.reshape(inner)


FORMS = {"native": _native, "xla": _sequential, "associative": _unshifted(_doubling), "chunked": _unshifted(_chunked)}

linear_scan_p = Primitive("jaxrnn_linear_scan")


def _abstract(a, b, h, *cut, reverse, shifted, form):
    def like(aval, *time):
        """Divides all axes but time among devices as those of b are."""
        sharding = b.sharding.update(spec=PartitionSpec(*time, *b.sharding.spec[1:]))
        return b.update(shape=aval.shape, dtype=aval.dtype, weak_type=False, sharding=sharding)

    return [like(b, None), like(h)]


def bind(*arrays, **options):
    """Binds the primitive to (a, b, h) and, where something is cut, to the cuts; options: reverse, shifted, form."""
    return linear_scan_p.bind(*varying_like(arrays), **options)


def _previous(h, hs, reverse):
    """Returns the state before every step, in the dtype of h."""
    hs = hs.astype(h.dtype)
    return jnp.concatenate([hs[1:], h[None]] if reverse else [h[None], hs[:-1]])


def _jvp(primals, tangents, *, reverse, shifted, form):
    a, b, h, *cut = primals
    d_a, d_b, d_h, *_ = tangents
    options = {"reverse": reverse, "shifted": shifted, "form": form}
    hs, last = bind(*primals, **options)
    d_b, d_h = ad.instantiate_zeros(d_b), ad.instantiate_zeros(d_h)
    if type(d_a) is ad.Zero:
        return [hs, last], bind(a, d_b, d_h, *cut, **options)
    state = hs.astype(h.dtype) if shifted else _previous(h, hs, reverse)
    if cut:  # also of what ȧ multiplies, since the transpose multiplies its cotangent by it
        state = jnp.where(cut[0], jnp.zeros_like(state), state)
    moved = _before(d_a, cut[0] if cut else None, state)
    if not shifted:
        return [hs, last], bind(a, d_b + moved.astype(d_b.dtype), d_h, *cut, **options)
    # Of the shifted recurrence, ȧ_k h_k enters after step k: with b_{k+1}, and at last with what comes out.
    moved = jnp.broadcast_to(moved, b.shape)
    zero = jnp.zeros_like(moved[:1])
    following = jnp.concatenate([moved[1:], zero] if reverse else [zero, moved[:-1]])
    d_hs, d_last = bind(a, d_b + following.astype(d_b.dtype), d_h, *cut, **options)
    return [hs, last], [d_hs, d_last + moved[0 if reverse else -1]]


def _transpose(cotangents, a, b, h, *cut, reverse, shifted, form):
    d_hs, d_last = map(ad.instantiate_zeros, cotangents)
    found = bind(a, d_hs, d_last, *cut, reverse=not reverse, shifted=not shifted, form=form)
    d_b, d_h = (
        cotangent if ad.is_undefined_primal(array) else None for array, cotangent in zip((b, h), found, strict=True)
    )
    return [None, d_b, d_h, *[None] * len(cut)]


def _batched(arrays, axes, **options):
    """The new axis comes after time, and first in h; a and the cuts have size 1 there if they lack it."""
    size = next(array.shape[axis] for array, axis in zip(arrays, axes, strict=True) if axis is not None)

    def moved(k, array, axis):
        place = 0 if k == 2 else 1
        if axis is not None:
            return jnp.moveaxis(array, axis, place)
        array = jnp.expand_dims(array, place)
        whole = (*array.shape[:place], size, *array.shape[place + 1 :])
        return jnp.broadcast_to(array, whole) if k in (1, 2) else array

    results = bind(*(moved(k, *each) for k, each in enumerate(zip(arrays, axes, strict=True))), **options)
    return results, [1, 0]


def _of_form(function):
    def run(*arrays, reverse, shifted, form):
        return function(*arrays, reverse=reverse, shifted=shifted)

    return run


def _rule(function):
    return mlir.lower_fun(_of_form(function), multiple_results=True)


_PALLAS = {
    "tpu": functools.partial(pallas.scan, kernel=pallas.on_tpu),
    "cuda": functools.partial(pallas.scan, kernel=pallas.on_gpu),
    "cpu": functools.partial(pallas.scan, kernel=functools.partial(pallas.on_tpu, interpret=True)),
}


def _by_pallas(ctx, *operands, **options):
    platforms = ctx.module_context.platforms
    if len(platforms) != 1 or platforms[0] not in _PALLAS:
        names = ", ".join(platforms)
        raise ValueError(f"implementation: 'pallas' is compiled for one of {list(_PALLAS)}, and this is for {names}")
    return on_one_device(_of_form(_PALLAS[platforms[0]]))(ctx, *operands, **options)


_RULES = {name: _rule(form) for name, form in FORMS.items()} | {"pallas": _by_pallas}


def _elsewhere(ctx, *operands, form, **options):
    """Lowers the primitive where there is no kernel."""
    if form == "native":
        platforms = ", ".join(ctx.module_context.platforms)
        raise ValueError(f"implementation: 'native' has kernels for the CPU, and this is compiled for {platforms}")
    platforms = ctx.module_context.platforms
    default = "xla" if tuple(platforms) == ("cpu",) else ELSEWHERE
    return _RULES[form or default](ctx, *operands, form=form, **options)


def _factors(avals_in, avals_out, options) -> Factors:
    """All axes but time."""
    inner = avals_in[1].shape[1:]
    names = [f"i{k}" for k in range(len(inner))]
    sizes = dict(zip(names, inner, strict=True))

    def named(aval, first):
        return axes(aval.shape, {k + first: (name,) for k, name in enumerate(names)}, sizes)

    return Factors(
        [named(aval, int(k != 2)) for k, aval in enumerate(avals_in)],
        [named(aval, int(k == 0)) for k, aval in enumerate(avals_out)],
        sizes,
    )


def _on_cpu(ctx, *operands, form, **options):
    sizes = all(isinstance(size, int) for size in ctx.avals_in[1].shape)
    if form in (None, "native") and sizes and library.takes(*(aval.dtype for aval in ctx.avals_in[:3])):
        return _by_kernel(ctx, *operands, form=form, **options)
    return _RULES[form or "xla"](ctx, *operands, form=form, **options)


_by_kernel = lowering(linear_scan_p, _RULES["native"], _RULES["xla"], _factors)

linear_scan_p.multiple_results = True
linear_scan_p.def_impl(evaluated(linear_scan_p, ("reverse", "shifted", "form")))
linear_scan_p.def_abstract_eval(_abstract)
ad.primitive_jvps[linear_scan_p] = _jvp
ad.primitive_transposes[linear_scan_p] = _transpose
batching.primitive_batchers[linear_scan_p] = _batched
mlir.register_lowering(linear_scan_p, _elsewhere)
library.register(linear_scan_p, _on_cpu)
