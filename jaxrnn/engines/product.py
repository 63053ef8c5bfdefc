"""The product of a sequence and a weight, as a primitive of its own for the sake of its derivative.

The cotangent of the weight is a sum over all steps and rows, xᵀ d. JAX writes it as (dᵀ x)ᵀ, for which XLA copies d on
the CPU and then takes its slow loop: five times the time, most of that of a training step of a linear recurrence.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.extend.core.primitives import dot_general_p
from jax.interpreters import ad, batching, mlir

from jaxrnn.engines.arrays import accumulator, cast, evaluated, varying_like


def dot(x: Array, w: Array) -> Array:
    """Computes x w over the last axis of `x`, accumulated in at least float32."""
    if x.shape[-1:] != w.shape[:1]:
        raise ValueError(f"x: expected (..., {w.shape[0]}) for weights of shape {w.shape}, got {x.shape}")
    return product_p.bind(*varying_like((x, w)), dtype=accumulator(x.dtype), sharding=None)


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


def _contracted(x: Array, w: Array) -> tuple:
    return ((x.ndim - 1,), (0,)), ((), ())


def _leading(x: Array, d: Array) -> tuple:
    axes = tuple(range(x.ndim - 1))
    return (axes, axes), ((), ())


def _primitive(name: str, dimensions) -> Primitive:
    """A bilinear primitive that is `lax.dot_general` with `dimensions(x, y)`."""
    made = Primitive(f"jaxrnn_{name}")

    def program(x, y, *, dtype, sharding):
        return lax.dot_general(x, y, dimensions(x, y), preferred_element_type=dtype, out_sharding=sharding)

    def abstract(x, y, *, dtype, sharding):
        options = {"precision": None, "preferred_element_type": dtype, "out_sharding": sharding}
        return dot_general_p.abstract_eval(x, y, dimension_numbers=dimensions(x, y), **options)[0]

    def batched(arrays, axes, *, dtype, sharding):
        x, y = arrays
        if name == "product" and axes[1] is None and sharding is None:
            return made.bind(jnp.moveaxis(x, axes[0], 0), y, dtype=dtype, sharding=sharding), 0
        return jax.vmap(functools.partial(program, dtype=dtype, sharding=sharding), axes)(x, y), 0

    made.def_impl(evaluated(made, ("dtype", "sharding")))
    made.def_abstract_eval(abstract)
    mlir.register_lowering(made, mlir.lower_fun(program, multiple_results=False))
    batching.primitive_batchers[made] = batched
    return made


product_p, gram_p = _primitive("product", _contracted), _primitive("gram", _leading)


def _bound(primitive: Primitive, x: Array, y: Array, aval) -> Array:
    """The cotangent of an array of type `aval`: in the wider dtype of both factors, then in its own."""
    explicit = not aval.sharding.mesh.empty and not aval.sharding.mesh.are_all_axes_auto
    wide = accumulator(x.dtype, y.dtype)
    factors = varying_like((x.astype(wide), y.astype(wide)))
    return primitive.bind(*factors, dtype=wide, sharding=aval.sharding if explicit else None).astype(aval.dtype)


def _product(x, w, like):
    return _bound(product_p, x, w, like.aval)


def _gram(x, d, like):
    return _bound(gram_p, x, d, like.aval)


# The cotangent d of a product is (..., K); that of a sum over steps and rows is (D, K).
ad.defbilinear(product_p, lambda d, x, w, **_: _product(d, w.T, x), lambda d, x, w, **_: _gram(x, d, w))
ad.defbilinear(gram_p, lambda d, x, y, **_: _product(y, d.T, x), lambda d, x, y, **_: _product(x, d, y))
