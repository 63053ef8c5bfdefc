"""The product of a sequence and a weight, as a primitive of its own for the sake of its derivative.

The cotangent of the weight is a sum over all steps and rows, xᵀ d. JAX writes it as (dᵀ x)ᵀ, for which XLA copies d on
the CPU and then takes its slow loop: five times the time, most of that of a training step of a linear recurrence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.extend.core.primitives import dot_general_p
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding

from jaxrnn.engines.arrays import accumulator, cast, evaluated, varying_like
from jaxrnn.engines.partition import on_known_devices


def dot(x: Array, w: Array) -> Array:
    """Computes x w over the last axis of `x`, accumulated in at least float32; `w` may have columns on several axes."""
    if x.shape[-1:] != w.shape[:1]:
        raise ValueError(f"x: expected (..., {w.shape[0]}) for weights of shape {w.shape}, got {x.shape}")
    return product_p.bind(*varying_like((x, w)), count=1, dtype=accumulator(x.dtype), sharding=None)


def block_dot(x: Array, w: Array) -> Array:
    """Computes x w for a block-diagonal w (N, D/N, K/N): (..., K) of (..., D), accumulated in at least float32."""
    blocks, rows, columns = w.shape
    wide = accumulator(x.dtype)

    def by_block(x, w):
        return jnp.einsum("...nd,nde->...ne", x, w, preferred_element_type=wide)

    operands = x.reshape(*x.shape[:-1], blocks, rows), w
    if x.dtype == wide:
        product = by_block(*operands)
    else:  # XLA on the CPU has no such product of bfloat16
        product = lax.platform_dependent(*operands, cpu=lambda *both: by_block(*cast(both, wide)), default=by_block)
    return product.reshape(*x.shape[:-1], blocks * columns)


def _forward(x: Array, w: Array, count: int) -> tuple:
    return (range(x.ndim - count, x.ndim), range(count)), ((), ())


def _backward(d: Array, w: Array, count: int) -> tuple:
    return (range(d.ndim - count, d.ndim), range(w.ndim - count, w.ndim)), ((), ())


def _leading(x: Array, d: Array, count: int) -> tuple:
    return (range(x.ndim - count), range(x.ndim - count)), ((), ())


def _primitive(name: str, dimensions) -> Primitive:
    """A bilinear primitive that is `lax.dot_general` with `dimensions(x, y, count)`; a row of x has `count` axes."""
    made = Primitive(f"jaxrnn_{name}")

    def program(x, y, *, count, dtype, sharding):
        found = dimensions(x, y, count)
        return lax.dot_general(x, y, found, preferred_element_type=dtype, out_sharding=sharding)

    def merged(x, y, *, count, **options):
        """Over one axis: XLA on the CPU would turn a weight of which several are summed over, at every step."""
        if count == 1:
            return program(x, y, count=count, **options)
        x, y = (each.reshape(*each.shape[:-count], math.prod(each.shape[-count:])) for each in (x, y))
        return program(x, y, count=1, **options)

    def abstract(x, y, *, count, dtype, sharding):
        options = {"precision": None, "preferred_element_type": dtype, "out_sharding": sharding}
        return dot_general_p.abstract_eval(x, y, dimension_numbers=dimensions(x, y, count), **options)[0]

    def batched(arrays, axes, **options):
        x, y = arrays
        if name != "gram" and axes[1] is None and options["sharding"] is None:
            return made.bind(jnp.moveaxis(x, axes[0], 0), y, **options), 0
        return jax.vmap(functools.partial(program, **options), axes)(x, y), 0

    made.def_impl(evaluated(made, ("count", "dtype", "sharding")))
    made.def_abstract_eval(abstract)
    by_xla = mlir.lower_fun(program, multiple_results=False)
    mlir.register_lowering(made, on_known_devices(made, merged, program) if name == "product_back" else by_xla)
    batching.primitive_batchers[made] = batched
    return made


product_p = _primitive("product", _forward)  # x (..., D), w (D, K): x w
back_p = _primitive("product_back", _backward)  # d (..., K), w (D, K): d wᵀ
gram_p = _primitive("gram", _leading)  # x (..., D), d (..., K): xᵀ d


def _bound(primitive: Primitive, x: Array, y: Array, count: int, aval) -> Array:
    """The cotangent of an array of type `aval`: in the wider dtype of both factors, then in its own."""
    wide = accumulator(x.dtype, y.dtype)
    factors = varying_like((x.astype(wide), y.astype(wide)))
    # A weight that was put on no mesh has none in its type; what it is multiplied with has.
    meshes = [jax.typeof(each).sharding.mesh for each in factors]
    explicit = [mesh for mesh in meshes if not mesh.empty and not mesh.are_all_axes_auto]
    sharding = NamedSharding(explicit[0], aval.sharding.spec) if explicit else None
    return primitive.bind(*factors, count=count, dtype=wide, sharding=sharding).astype(aval.dtype)


_Product = tuple[Primitive, Array, Array, int]


def _transposes(made: Primitive, of_x: Callable[..., _Product], of_y: Callable[..., _Product]) -> None:
    """The cotangents of both factors as products of that of the result, d, and the other factor."""
    ad.defbilinear(
        made,
        lambda d, x, y, count, **_: _bound(*of_x(d, y, count), x.aval),
        lambda d, x, y, count, **_: _bound(*of_y(d, x, count), y.aval),
    )


_transposes(
    product_p,
    lambda d, w, count: (back_p, d, w, w.ndim - count),
    lambda d, x, count: (gram_p, x, d, count),
)
_transposes(
    back_p,
    lambda d, w, count: (product_p, d, w, w.ndim - count),
    lambda d, x, count: (gram_p, d, x, d.ndim - x.ndim + count),
)
_transposes(
    gram_p,
    lambda d, y, count: (back_p, y, d, d.ndim - count),
    lambda d, x, count: (product_p, x, d, count),
)
