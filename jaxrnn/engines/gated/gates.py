"""Gates on an axis of their own: weights (..., gates H) as (..., gates, H), before a loop over time.

Where devices divide the columns of weights, each of them then has its units of all gates, and exchanges only the state
at a step. Of columns in blocks, one for each gate, it has other units of each gate, and would exchange all gates.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from jaxrnn.engines.arrays import evaluated
from jaxrnn.engines.partition import on_known_devices


def apart(columns: Array, size: int) -> Array:
    """A weight (..., gates size) as (..., gates, size); columns of one gate stay as they are."""
    count = columns.shape[-1] // size
    return columns if count == 1 else apart_p.bind(columns, count=count, weight=True)


def gates_of(product: Array, like: Array) -> list[Array]:
    """The gates of a product (..., gates H), or (..., gates, H), each with the units of `like` (..., H)."""
    size = like.shape[-1]
    if product.shape[-1] == size:
        product = together_p.bind(product, count=product.shape[-2], weight=False)
    return jnp.split(product, product.shape[-1] // size, axis=-1)


def _apart(columns, count):
    """Gate by gate, so that XLA divides the units of each; it would divide the gates of a reshaped array."""
    return jnp.stack(jnp.split(columns, count, axis=-1), axis=-2)


def _together(gates, count):
    return jnp.concatenate([gate.squeeze(-2) for gate in jnp.split(gates, count, axis=-2)], axis=-1)


def _shape_apart(shape, count):
    return *shape[:-1], count, shape[-1] // count


def _shape_together(shape, count):
    return *shape[:-2], count * shape[-1]


def _primitive(name: str, by_gate, shape_of) -> Primitive:
    """`by_gate(array, count)`. On one device it is a reshape, which moves nothing; on a TPU it does, at every step, so
    there it is one of weights only.
    """
    made = Primitive(f"jaxrnn_gates_{name}")

    def abstract(x, *, count, weight):
        *front, last = x.sharding.spec
        spec = (*front, None, last) if name == "apart" else (*front[:-1], last)
        sharding = x.sharding.update(spec=PartitionSpec(*spec))
        return x.update(shape=shape_of(x.shape, count), weak_type=False, sharding=sharding)

    def divided(x, *, count, weight):
        return by_gate(x, count)

    def alone(x, *, count, weight):
        return x.reshape(shape_of(x.shape, count))

    def on_tpu(x, *, count, weight):
        return (alone if weight else divided)(x, count=count, weight=weight)

    def batched(arrays, axes, **options):
        return made.bind(jnp.moveaxis(arrays[0], axes[0], 0), **options), 0

    made.def_impl(evaluated(made, ("count", "weight")))
    made.def_abstract_eval(abstract)
    mlir.register_lowering(made, on_known_devices(made, alone, divided))
    mlir.register_lowering(made, on_known_devices(made, on_tpu, divided), platform="tpu")
    batching.primitive_batchers[made] = batched
    return made


apart_p, together_p = _primitive("apart", _apart, _shape_apart), _primitive("together", _together, _shape_together)
ad.deflinear2(apart_p, lambda d, _, **options: [together_p.bind(d, **options)])
ad.deflinear2(together_p, lambda d, _, **options: [apart_p.bind(d, **options)])
