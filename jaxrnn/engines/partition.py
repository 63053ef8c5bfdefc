"""Kernels in a program that JAX divides among devices: XLA does not know how to divide a call, so it is told.

Axes of arrays are named by factors: an axis of rows that belong to members, one after the other, is `(MEMBERS, ROWS)`.
Each device computes its own part of every factor; what a result lacks a factor of is a sum over it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from jaxrnn.typing import PyTree

try:  # without which a primitive is lowered before its devices are known, and XLA's program runs
    from jax._src.dispatch import prim_requires_devices_during_lowering as _on_known_devices
except ImportError:
    _on_known_devices = set()

MEMBERS, ROWS = "m", "r"
Axes = tuple[tuple[str, ...], ...]  # of one array: the factors of each axis


class Factors(NamedTuple):
    """How the axes of a call's `arguments` and `results` are divided, the `sizes` of all factors, and for some a `unit`
    whose multiples a device can take.
    """

    arguments: Sequence[Axes]
    results: Sequence[Axes]
    sizes: Mapping[str, int]
    unit: Mapping[str, int] = {}


def axes(shape: Sequence[int], places: Mapping[int, tuple[str, ...]], sizes: Mapping[str, int]) -> Axes:
    """The factors of the axes of an array: those of `places`, where its size is that of the factors."""

    def of(k, size):
        named = tuple(name for name in places.get(k, ()) if sizes[name] != 1)
        return named if size == math.prod(sizes[name] for name in named) else ()

    return tuple(of(k, size) for k, size in enumerate(shape))


def lowering(
    primitive: Primitive,
    alone: Callable[..., PyTree],
    undivided: Callable[..., PyTree],
    factors: Callable[..., Factors],
) -> Callable[..., PyTree]:
    """The lowering rule of a primitive whose kernel has rows of its own.

    Args:
      primitive: The primitive; `bind` inside of one device is lowered by `alone`.
      alone: Its lowering rule on one device.
      undivided: Its lowering rule where nobody knows the devices or their mesh, or a size is a symbol, as in an export.
      factors: `factors(arguments, results, options)`, of abstract arrays.
    """
    _on_known_devices.add(primitive)

    def rule(ctx, *operands, **options):
        if not all(isinstance(size, int) for aval in ctx.avals_in for size in aval.shape):
            return undivided(ctx, *operands, **options)
        context = ctx.module_context.axis_context
        if getattr(context, "num_devices", 1) in (None, 1):
            return alone(ctx, *operands, **options)
        mesh = context.abstract_mesh or jax.sharding.get_abstract_mesh()
        if context.device_assignment is None or mesh.size != context.num_devices or _x64_elsewhere() != _x64():
            return undivided(ctx, *operands, **options)
        context = dataclasses.replace(context, abstract_mesh=mesh)
        ctx = ctx.replace(module_context=ctx.module_context.replace(axis_context=context))
        found = factors(ctx.avals_in, ctx.avals_out, options)
        run = _divided(functools.partial(primitive.bind, **options), ctx.avals_in, ctx.avals_out, found)
        return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)

    return rule


def on_known_devices(primitive: Primitive, alone: Callable[..., Array], divided: Callable[..., Array]):
    """The lowering rule of a primitive that is `alone` on one device and inside of one, and `divided` where XLA divides
    the program among several.
    """
    _on_known_devices.add(primitive)

    def rule(ctx, *operands, **options):
        several = getattr(ctx.module_context.axis_context, "num_devices", 1) not in (None, 1)
        return mlir.lower_fun(divided if several else alone, multiple_results=False)(ctx, *operands, **options)

    return rule


def on_one_device(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The lowering rule of a function that knows no mesh and no numbers of 64 bits, as kernels in Pallas do: it runs on
    one device, or in `shard_map`.
    """
    no_mesh = jax.sharding.AbstractMesh((), ())

    def rule(ctx, *operands, **options):
        with jax.sharding.use_abstract_mesh(no_mesh), jax.enable_x64(False):
            ctx = ctx.replace(avals_in=[aval.update(sharding=None) for aval in ctx.avals_in])
            return mlir.lower_fun(function, multiple_results=True)(ctx, *operands, **options)

    return rule


def _x64() -> bool:
    return jnp.result_type(float) == jnp.float64


def _x64_elsewhere() -> bool:
    """Whether x64 is on in the thread in which XLA divides a call, which knows nothing of `jax.enable_x64` here."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_x64).result()


def _divided(call, avals_in, avals_out, factors: Factors):
    """`call` as a function that XLA divides. What has no elements does not go through it."""
    given = [k for k, aval in enumerate(avals_in) if aval.size]
    made = [k for k, aval in enumerate(avals_out) if aval.size]
    of_given, of_made = [factors.arguments[k] for k in given], [factors.results[k] for k in made]

    def run(*arrays):
        local, whole = _local_sizes(of_given, arrays), iter(arrays)

        def absent(aval, named):
            pairs = zip(aval.shape, named, strict=True)
            return jnp.zeros([local.get(axis, size) if axis else size for size, axis in pairs], aval.dtype)

        found = call(
            *(
                next(whole) if aval.size else absent(aval, named)
                for aval, named in zip(avals_in, factors.arguments, strict=True)
            )
        )
        return tuple(found[k] for k in made)

    def partition(mesh, arguments, results):
        owners = _owners(mesh, arguments, of_given, factors)

        def shardings(named_of_all):
            return tuple(
                NamedSharding(
                    mesh, PartitionSpec(*(sum((owners[name] for name in axis), ()) or None for axis in named))
                )
                for named in named_of_all
            )

        def summed(array, named):
            rest = owners.keys() - set(itertools.chain(*named))
            over = tuple(itertools.chain(*(owners[name] for name in sorted(rest))))
            return lax.psum(array, over) if over else array

        def local(*arrays):
            return tuple(summed(*each) for each in zip(run(*arrays), of_made, strict=True))

        return mesh, local, shardings(of_made), shardings(of_given)

    divided = custom_partitioning(run)
    divided.def_partition(partition, sharding_rule=lambda *_: _rule(of_given, of_made, factors.sizes))

    def outer(*arrays):
        found = iter(divided(*(arrays[k] for k in given)) if made else ())
        return [next(found) if aval.size else jnp.zeros(aval.shape, aval.dtype) for aval in avals_out]

    return outer


def _local_sizes(named_of_all: Sequence[Axes], arrays) -> dict[tuple[str, ...], int]:
    """The size of an axis of these factors in the part of one device."""
    pairs = zip(named_of_all, arrays, strict=True)
    return {axis: size for named, array in pairs for axis, size in zip(named, array.shape, strict=True)}


def _owners(mesh, arguments, named_of_all, factors: Factors) -> dict[str, tuple[str, ...]]:
    """The axes of the mesh that each factor is divided among: as in the first array that has it divided."""
    owners: dict[str, tuple[str, ...]] = {}

    def settle(axis, entry):
        names = [] if entry is None else [entry] if isinstance(entry, str) else list(entry)
        for factor in axis:
            left = factors.sizes[factor] // factors.unit.get(factor, 1)
            while names and left % mesh.shape[names[0]] == 0 and not any(names[0] in each for each in owners.values()):
                left //= mesh.shape[names[0]]
                owners[factor] = (*owners.get(factor, ()), names.pop(0))
            if left > 1:
                return  # what comes after it is in pieces

    for argument, named in zip(arguments, named_of_all, strict=True):
        spec = argument.sharding.spec
        for axis, entry in zip(named, (*spec, *[None] * (len(named) - len(spec))), strict=True):
            if axis and entry is not None and not set(axis) & owners.keys():
                settle(axis, entry)
    return {name: owners.get(name, ()) for name in factors.sizes}


def _rule(of_given, of_made, sizes) -> tuple[str, dict[str, Any]]:
    """What Shardy is told: named factors pass through, all other axes are whole on every device."""
    others = (f"n{k}" for k in itertools.count())
    whole = []

    def name(axis):
        if not axis:
            whole.append(next(others))
            return whole[-1]
        return axis[0] if len(axis) == 1 else f"({' '.join(axis)})"

    left, right = (", ".join(" ".join(map(name, named)) for named in each) for each in (of_given, of_made))
    named = [axis for array in (*of_given, *of_made) for axis in array if axis]
    alone = {axis[0] for axis in named if len(axis) == 1}
    joint = {factor for axis in named if len(axis) > 1 for factor in axis} - alone
    return f"{left} -> {right}", {
        "need_replication_factors": tuple(whole),
        **{factor: sizes[factor] for factor in sorted(joint)},
    }
