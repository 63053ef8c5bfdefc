"""A step of a cell as a primitive: one kernel on the CPU in place of many small operations.

A program is handed to other threads from a few operations on, which takes longer than a step. All derivatives, and all
other platforms, use a program in JAX.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from jaxrnn.engines.arrays import evaluated, mapped_over_nothing, varying_like
from jaxrnn.engines.cpu import library
from jaxrnn.engines.partition import ROWS, Factors, axes, lowering
from jaxrnn.engines.walk import Walk, refusals_of_sizes

Arrays = tuple[Array | None, ...]


def step_serves(walk: Walk, shape: Sequence[Any], engine: str, *, owner: Any, unlike: Collection[str]) -> bool:
    """Whether a sequence (T, ...) of `owner` is one step that the kernel of its class computes; if so, that is
    recorded.

    It is not where an implementation is named, and not where a subclass has another of the methods `unlike` than the
    class that says `step_by_kernel`.
    """
    whole = walk.valid is None and walk.reset is None and walk.axis_name is None
    if not (owner.step_by_kernel and shape[0] == 1 and whole and walk.named(engine) is None):
        return False
    if walk.platform not in (None, "cpu") or library.absent() is not None or refusals_of_sizes(shape):
        return False

    def depth(name):
        return next(k for k, each in enumerate(type(owner).__mro__) if name in vars(each))

    if any(depth(name) < depth("step_by_kernel") for name in unlike):
        return False
    walk.record(engine, "native", {}, cell=owner)
    return True


class Step:
    """A primitive of arrays that have rows as their first axis, and of weights, which have none.

    Args:
      name: That of the kernel: jaxrnn_{name}_step. It takes the arrays, the weights and the state, without elements
        where they are absent.
      program: `program(arrays, weights, state, **options)`, which returns (the next state, y), both with rows.
    """

    def __init__(self, name: str, program: Callable[..., tuple[Array, Array]]):
        self.program = program
        self.primitive = primitive = Primitive(f"jaxrnn_{name}_step")
        primitive.multiple_results = True
        primitive.def_impl(evaluated(primitive, ("tree", "options")))
        primitive.def_abstract_eval(self._abstract)
        ad.primitive_jvps[primitive] = self._jvp
        batching.primitive_batchers[primitive] = self._batched
        by_xla, by_kernel = (mlir.lower_fun(each, multiple_results=True) for each in (self._by_xla, self._by_kernel))
        mlir.register_lowering(primitive, by_xla)
        divided = lowering(primitive, by_kernel, by_xla, self._factors)

        def on_cpu(ctx, *operands, **options):
            return (divided if library.takes(ctx.avals_in[0].dtype) else by_xla)(ctx, *operands, **options)

        library.register(primitive, on_cpu)

    def __call__(self, arrays: Arrays, weights: Arrays, state: Array, **options: Any) -> tuple[Array, Array]:
        """(The next state, y) of arrays (*batch, F) or None, weights or None, and a state (*batch, ...)."""
        batch = next(array for array in arrays if array is not None).shape[:-1]

        def by_rows(array):
            return None if array is None else array.reshape(math.prod(batch), *array.shape[len(batch) :])

        leaves, tree = jax.tree.flatten((tuple(map(by_rows, arrays)), weights, by_rows(state)))
        found = self.primitive.bind(*varying_like(leaves), tree=tree, options=tuple(options.items()))
        last, ys = (each.reshape(*batch, *each.shape[1:]) for each in found)
        return last, ys

    def _by_xla(self, *leaves, tree, options):
        return list(self.program(*jax.tree.unflatten(tree, leaves), **dict(options)))

    def _by_kernel(self, *leaves, tree, options):
        arrays, weights, state = jax.tree.unflatten(tree, leaves)
        dtype = leaves[0].dtype
        given = [jnp.zeros(0, dtype) if each is None else each for each in (*arrays, *weights)]
        shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in self._shapes(leaves, tree, options)]
        return jax.ffi.ffi_call(library.target(self.primitive.name, dtype), shapes)(*given, state, **dict(options))

    def _shapes(self, leaves, tree, options):
        # Without their shardings, which not every program takes.
        given = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in leaves]
        return jax.eval_shape(functools.partial(self._by_xla, tree=tree, options=options), *given)

    def _abstract(self, *avals, tree, options):
        """Rows are divided among devices as those of the first array are."""
        x, *_ = avals

        def abstract(out):
            sharding = x.sharding.update(spec=PartitionSpec(x.sharding.spec[0], *[None] * (len(out.shape) - 1)))
            return x.update(shape=out.shape, dtype=out.dtype, weak_type=False, sharding=sharding)

        return [abstract(out) for out in self._shapes(avals, tree, options)]

    def _of_rows(self, tree) -> list[bool]:
        """Whether each leaf has rows."""
        arrays, _, state = jax.tree.unflatten(tree, range(tree.num_leaves))
        own = set(jax.tree.leaves((arrays, state)))
        return [k in own for k in range(tree.num_leaves)]

    def _factors(self, avals_in, avals_out, options) -> Factors:
        sizes = {ROWS: avals_out[0].shape[0]}
        given = zip(avals_in, self._of_rows(options["tree"]), strict=True)
        return Factors(
            [axes(aval.shape, {0: (ROWS,)} if rows else {}, sizes) for aval, rows in given],
            [axes(aval.shape, {0: (ROWS,)}, sizes) for aval in avals_out],
            sizes,
        )

    def _jvp(self, primals, tangents, **options):
        run = functools.partial(self._by_xla, **options)
        return jax.jvp(run, primals, tuple(map(ad.instantiate_zeros, tangents)))

    def _batched(self, leaves, axes, *, tree, options):
        """The new axis becomes one of rows, unless weights differ."""
        count = next(leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None)
        if count == 0:
            return mapped_over_nothing(self.primitive, leaves, axes, tree=tree, options=options)
        of_rows = self._of_rows(tree)
        if any(axis is not None and not rows for axis, rows in zip(axes, of_rows, strict=True)):
            run = functools.partial(self._by_xla, tree=tree, options=options)
            return jax.vmap(run, in_axes=tuple(axes))(*leaves), [0, 0]

        def fold(leaf, axis, rows):
            if not rows:
                return leaf
            whole = jnp.broadcast_to(leaf, (count, *leaf.shape)) if axis is None else jnp.moveaxis(leaf, axis, 0)
            return whole.reshape(count * whole.shape[1], *whole.shape[2:])

        folded = [fold(*each) for each in zip(leaves, axes, of_rows, strict=True)]
        found = self.primitive.bind(*varying_like(folded), tree=tree, options=options)
        return [each.reshape(count, each.shape[0] // count, *each.shape[1:]) for each in found], [0, 0]
