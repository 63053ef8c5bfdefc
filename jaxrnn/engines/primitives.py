"""A recurrence with kernels on the CPU as three primitives, so that every transformation works on it.

On the CPU, `forward` and `backward` are kernels. `tangent`, higher derivatives and all other platforms use programs in
JAX. A primitive takes the arrays that are there, and a tree that tells which.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from jaxrnn.engines.arrays import evaluated, folded, mapped_over_nothing, repeated, unfolded, varying_like
from jaxrnn.engines.cpu import library
from jaxrnn.engines.partition import MEMBERS, ROWS, Factors, axes, lowering
from jaxrnn.typing import PyTree


class Recurrence:
    """Three primitives. A problem is a NamedTuple of arrays or None, and so is a result, which begins with ys and the
    last state and then holds what is kept for derivatives.

    Args:
      name: That of the kernels: jaxrnn_{name}_forward and jaxrnn_{name}_backward.
      forward: The program `forward(problem, reverse=, save=)`, which returns a result; with `save`, one that keeps.
      tangent: `tangent(problem, kept, moved, reverse=)`, the tangents of ys and of the last state. It is linear in
        `moved`, a problem that has None in place of flags.
      backward: `backward(problem, kept, d_ys, d_last, reverse=)`, its transpose: a problem of cotangents.
      native_forward: The kernel as `native_forward(problem, shapes, reverse=)`, where `shapes` is its result.
      native_backward: The kernel, called as `backward` is.
      timed: Tells which arrays have rows as their second axis, after time, and not as their first.
      weights: Arrays whose first axis is of members, each for as many rows. Those of one member serve any rows.
      spared: Arrays whose cotangents need not be computed where nobody asks: `backward` takes `wrt`, too, the names for
        which they are asked.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Callable[..., PyTree],
        tangent: Callable[..., PyTree],
        backward: Callable[..., PyTree],
        native_forward: Callable[..., PyTree],
        native_backward: Callable[..., PyTree],
        timed: Callable[[PyTree], Collection[str]],
        weights: Collection[str] = (),
        spared: Collection[str] = (),
    ):
        self.timed, self.weights, self.spared = timed, frozenset(weights), frozenset(spared)
        self.forward, self.tangent, self.backward = (
            Primitive(f"jaxrnn_{name}_{part}") for part in ("forward", "tangent", "backward")
        )

        def run_forward(problem, *, reverse, save, wrt):
            return forward(problem, reverse=reverse, save=save)

        def run_tangent(problem, kept, moved, *, reverse, save, wrt):
            return tangent(problem, kept, moved, reverse=reverse)

        def asked(wrt):
            return {"wrt": wrt} if self.spared else {}

        def run_backward(problem, kept, cotangents, *, reverse, save, wrt):
            return backward(problem, kept, *cotangents, reverse=reverse, **asked(wrt))

        def call_forward(problem, *, reverse, save, wrt):
            # Without their shardings, which not every program takes.
            given = jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype), problem)
            shapes = jax.eval_shape(functools.partial(run_forward, reverse=reverse, save=save, wrt=wrt), given)
            return native_forward(problem, shapes, reverse=reverse)

        def call_backward(problem, kept, cotangents, *, reverse, save, wrt):
            return native_backward(problem, kept, *cotangents, reverse=reverse, **asked(wrt))

        self.programs = {self.forward: run_forward, self.tangent: run_tangent, self.backward: run_backward}
        kernels = {self.forward: call_forward, self.backward: call_backward}
        for primitive, program in self.programs.items():
            primitive.multiple_results = True
            primitive.def_impl(evaluated(primitive, ("tree", "reverse", "named", "save", "wrt")))
            primitive.def_abstract_eval(functools.partial(self._abstract, primitive))
            batching.primitive_batchers[primitive] = functools.partial(self._batched, primitive)
            if primitive in kernels:
                mlir.register_lowering(primitive, _elsewhere(_flat(program)))
                library.register(primitive, self._on_cpu(primitive, _flat(kernels[primitive]), _flat(program)))
            else:
                mlir.register_lowering(primitive, mlir.lower_fun(_flat(program), multiple_results=True))
        ad.primitive_jvps[self.forward] = self._forward_jvp
        for primitive in (self.tangent, self.backward):
            ad.primitive_jvps[primitive] = functools.partial(self._linear_jvp, primitive)
        ad.primitive_transposes[self.tangent] = self._tangent_transposed
        ad.primitive_transposes[self.backward] = self._backward_transposed

    def __call__(self, problem: PyTree, *, reverse: bool, named: bool) -> tuple[Array, Array]:
        """Runs a problem of float32: (ys, the last state); `named` is whether the kernel was asked for by its name."""
        ys, last, *_ = _bind(self.forward, (problem,), reverse=reverse, named=named, save=False, wrt=())
        return ys, last

    def _results(self, primitive, arrays, tree, *, named, **options) -> PyTree:
        """The shapes of the results, in their NamedTuple."""
        shapes = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)
        return _shapes(self.programs[primitive], tree, shapes, **options)

    def _abstract(self, primitive, *avals, tree, **options):
        """Rows of the results are divided among devices as those of the first array are, which are its second axis."""
        x, *_ = avals
        rows = x.sharding.spec[1]
        problem = jax.tree.unflatten(tree, avals)[0]
        timed = self.timed(problem)
        found = self._results(primitive, avals, tree, **options)

        def abstract(out, name):
            # Weights have no rows: their first axis is of members.
            own = getattr(problem, name, None) if primitive is self.backward else None
            of_rows = name in timed or own is None or own.sharding.spec[0] is not None
            spec = [None, rows] if name in timed else [rows if of_rows else None]
            sharding = x.sharding.update(spec=PartitionSpec(*spec, *[None] * (len(out.shape) - len(spec))))
            return x.update(shape=out.shape, dtype=out.dtype, weak_type=False, sharding=sharding)

        return [abstract(out, name) for out, name in zip(jax.tree.leaves(found), _names(found), strict=True)]

    def _factors(self, primitive, avals_in, avals_out, options) -> Factors:
        """Rows, of which members have as many each."""
        shapes = jax.tree.unflatten(options["tree"], avals_in)
        timed, rows = self.timed(shapes[0]), avals_in[0].shape[1]
        results = self._results(primitive, avals_in, **options)

        def place(name):
            return int(name in timed)

        arrays = list(zip(avals_in, map(place, _names(shapes)), strict=True))
        members = next((aval.shape[at] for aval, at in arrays if aval.shape[at] not in (0, 1, rows)), 1)
        sizes = {MEMBERS: members, ROWS: rows // members}

        def named(aval, at):
            own = (MEMBERS, ROWS) if aval.shape[at] == rows else (MEMBERS,)
            return axes(aval.shape, {at: own}, sizes)

        made = zip(avals_out, map(place, _names(results)), strict=True)
        return Factors([named(*each) for each in arrays], [named(*each) for each in made], sizes)

    def _on_cpu(self, primitive, kernel, program):
        native, by_xla = (mlir.lower_fun(each, multiple_results=True) for each in (kernel, program))

        def alone(ctx, *operands, **options):
            known = all(isinstance(size, int) for aval in ctx.avals_in for size in aval.shape)
            return (native if known or options["named"] else by_xla)(ctx, *operands, **options)

        return lowering(primitive, alone, by_xla, functools.partial(self._factors, primitive))

    def _batched(self, primitive, arrays, axes, *, tree, **options):
        """The new axis becomes one of rows; and of members, where weights or their cotangents differ."""
        mapped = next((array, axis) for array, axis in zip(arrays, axes, strict=True) if axis is not None)
        count = mapped[0].shape[mapped[1]]
        if count == 0:
            return mapped_over_nothing(primitive, arrays, axes, tree=tree, **options)
        tree_of_arrays = jax.tree.unflatten(tree, arrays)
        timed, names = self.timed(tree_of_arrays[0]), _names(tree_of_arrays)
        shared = not self.weights & set(options["wrt"] if primitive is self.backward else ()) and all(
            axis is None and array.shape[0] == 1
            for array, axis, name in zip(arrays, axes, names, strict=True)
            if name in self.weights
        )

        def fold(array, axis, name):
            if shared and name in self.weights:
                return array
            place = int(name in timed)
            if axis is None:
                array, axis = repeated(array, *mapped), 0
            return folded(jax.numpy.moveaxis(array, axis, place), place)

        given = [fold(*each) for each in zip(arrays, axes, names, strict=True)]
        found = primitive.bind(*varying_like(given), tree=tree, **options)
        places = [int(name in timed) for name in _names(self._results(primitive, given, tree, **options))]
        return [unfolded(*each, count) for each in zip(found, places, strict=True)], places

    def _jvp_by_xla(self, primitive, primals, tangents, options):
        """Differentiates the program."""
        moving = [k for k, primal in enumerate(primals) if primal.dtype != bool]

        def run(*arrays):
            whole = list(primals)
            for k, array in zip(moving, arrays, strict=True):
                whole[k] = array
            return _flat(self.programs[primitive])(*whole, **options)

        return jax.jvp(run, [primals[k] for k in moving], [ad.instantiate_zeros(tangents[k]) for k in moving])

    def _forward_jvp(self, primals, tangents, *, tree, save, wrt, **options):
        if save:
            return self._jvp_by_xla(
                self.forward, primals, tangents, {"tree": tree, "save": True, "wrt": wrt, **options}
            )
        (problem,) = jax.tree.unflatten(tree, primals)
        names = _names((problem,))
        wrt = tuple(
            name
            for name, primal, tangent in zip(names, primals, tangents, strict=True)
            if primal.dtype != bool and not (name in self.spared and type(tangent) is ad.Zero)
        )
        moved = [
            ad.instantiate_zeros(tangent) if name in wrt else None
            for name, tangent in zip(names, tangents, strict=True)
        ]
        (moved,) = jax.tree.unflatten(tree, moved)
        found = _bind(self.forward, (problem,), save=True, wrt=(), **options)
        shapes = self._results(self.forward, primals, tree, save=True, wrt=(), **options)
        kept = jax.tree.unflatten(jax.tree.structure(shapes), found)
        return found[:2], _bind(self.tangent, (problem, kept, moved), save=False, wrt=wrt, **options)

    def _linear_jvp(self, primitive, primals, tangents, *, tree, **options):
        """`tangent` and `backward` are linear in their last arguments."""
        count = _fixed(tree)
        if all(type(tangent) is ad.Zero for tangent in tangents[:count]):
            moved = [ad.instantiate_zeros(tangent) for tangent in tangents[count:]]
            run = functools.partial(primitive.bind, tree=tree, **options)
            return run(*varying_like(primals)), run(*varying_like([*primals[:count], *moved]))
        return self._jvp_by_xla(primitive, primals, tangents, {"tree": tree, **options})

    def _tangent_transposed(self, cotangents, *arrays, tree, **options):
        count = _fixed(tree)
        problem, kept, _ = jax.tree.unflatten(tree, [*arrays[:count], *[0] * (len(arrays) - count)])
        given = tuple(map(ad.instantiate_zeros, cotangents))
        return [None] * count + list(_bind(self.backward, (problem, kept, given), **options))

    def _backward_transposed(self, cotangents, *arrays, tree, **options):
        count = _fixed(tree)
        problem, kept, _ = jax.tree.unflatten(tree, [*arrays[:count], *[0] * (len(arrays) - count)])
        given = iter(map(ad.instantiate_zeros, cotangents))
        moved = [next(given) if name in options["wrt"] else None for name in _names((problem,))]
        moved = jax.tree.unflatten(jax.tree.structure(problem), moved)
        return [None] * count + list(_bind(self.tangent, (problem, kept, moved), **options))


def _names(tree: PyTree) -> list[str]:
    """The names of the arrays of a tree, from their place in a problem, in a result, or in (ys, last)."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [path[-1].name if hasattr(path[-1], "name") else ("ys", "last")[path[-1].idx] for path, _ in leaves]


def _flat(program):
    """A program as a function of arrays one by one, which returns a list."""

    def run(*arrays, tree, named, **options):
        return jax.tree.leaves(program(*jax.tree.unflatten(tree, arrays), **options))

    return run


@functools.cache
def _shapes(program, tree, shapes, **options) -> PyTree:
    return jax.eval_shape(functools.partial(program, **options), *jax.tree.unflatten(tree, shapes))


def _bind(primitive, tree: PyTree, **options: Any) -> list[Array]:
    leaves, structure = jax.tree.flatten(tree)
    return primitive.bind(*varying_like(leaves), tree=structure, **options)


def _fixed(tree) -> int:
    """The number of arrays in which a primitive is not linear."""
    return sum(child.num_leaves for child in tree.children()[:2])


def _elsewhere(program):
    """Returns the lowering rule for platforms without a kernel."""
    by_xla = mlir.lower_fun(program, multiple_results=True)

    def rule(ctx, *operands, **options):
        if options["named"]:
            platforms = ", ".join(ctx.module_context.platforms)
            raise ValueError(f"implementation: 'native' has kernels for the CPU, and this is compiled for {platforms}")
        return by_xla(ctx, *operands, **options)

    return rule
