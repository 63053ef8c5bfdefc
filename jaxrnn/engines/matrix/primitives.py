"""Matrix recurrences by compiled kernels on the CPU: three primitives, so that every transformation works on them.

On the CPU, `forward` and `backward` are kernels. `tangent`, higher derivatives and all other platforms use the programs
of `programs`, where the arrays are described. A primitive takes the arrays that are there, and a tree that tells which.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from jaxrnn.engines.arrays import evaluated, varying_like
from jaxrnn.engines.cpu import library
from jaxrnn.engines.matrix import programs
from jaxrnn.engines.matrix.programs import CHUNK, STEPS, Problem, Result
from jaxrnn.typing import PyTree

forward_p = Primitive("jaxrnn_matrix_forward")
tangent_p = Primitive("jaxrnn_matrix_tangent")
backward_p = Primitive("jaxrnn_matrix_backward")
_OPTIONS = ("tree", "reverse", "named", "save")
_TIMED = {*STEPS, "ys", "reads", "states"}  # rows are the second axis, else the first


def _names(tree: Any) -> list[str]:
    """The names of the arrays of a tree, from their place in a Problem or a Result."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.tree.unflatten(tree, range(tree.num_leaves)))
    return [path[-1].name if hasattr(path[-1], "name") else ("ys", "last")[path[-1].idx] for path, _ in leaves]


def _run_forward(arrays, *, tree, reverse, save):
    (problem,) = jax.tree.unflatten(tree, arrays)
    return jax.tree.leaves(programs.forward(problem, reverse=reverse, save=save))


def _run_tangent(arrays, *, tree, reverse, save):
    return jax.tree.leaves(programs.tangent(*jax.tree.unflatten(tree, arrays), reverse=reverse))


def _run_backward(arrays, *, tree, reverse, save):
    problem, kept, cotangents = jax.tree.unflatten(tree, arrays)
    return jax.tree.leaves(programs.backward(problem, kept, *cotangents, reverse=reverse))


_REFERENCE = {forward_p: _run_forward, tangent_p: _run_tangent, backward_p: _run_backward}


def _reference(primitive):
    """The program of a primitive, of its arrays one by one."""

    def run(*arrays, named, **options):
        return _REFERENCE[primitive](arrays, **options)

    return run


@functools.cache
def _shapes(primitive, shapes, **options):
    return jax.eval_shape(functools.partial(_reference(primitive), **options), *shapes)


def _outputs(primitive, tree, save) -> list[str]:
    """The names of the results."""
    if primitive is backward_p:
        problem = jax.tree.unflatten(tree, [0] * tree.num_leaves)[0]
        return [
            name for name, each in zip(Problem._fields, problem, strict=True) if each is not None and name != "start"
        ]
    names = ["ys", "last"]
    if primitive is forward_p and save:
        problem = jax.tree.unflatten(tree, [0] * tree.num_leaves)[0]
        names += ["reads", "states"] if problem.reads else ["states"]
    return names


def _abstract(primitive):
    """Rows of the results are divided among devices as those of v are."""

    def rule(*avals, tree, save, **options):
        shapes = tuple(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
        v = jax.tree.unflatten(tree, avals)[0].v
        rows = v.sharding.spec[1]

        def abstract(out, name):
            spec = [None, rows] if name in _TIMED else [rows]
            sharding = v.sharding.update(spec=PartitionSpec(*spec, *[None] * (len(out.shape) - len(spec))))
            return v.update(shape=out.shape, dtype=out.dtype, weak_type=False, sharding=sharding)

        found = _shapes(primitive, shapes, tree=tree, save=save, **options)
        return [abstract(*each) for each in zip(found, _outputs(primitive, tree, save), strict=True)]

    return rule


def _bind(primitive, tree: PyTree, **options):
    leaves, structure = jax.tree.flatten(tree)
    return primitive.bind(*varying_like(leaves), tree=structure, **options)


def bind(problem: Problem, *, reverse: bool, named: bool) -> Result:
    """Runs a problem of float32; `named` is whether the kernel was asked for by its name."""
    return Result(*_bind(forward_p, (problem,), reverse=reverse, named=named, save=False))


def _batched(primitive):
    """The new axis becomes one of rows."""

    def rule(arrays, axes, *, tree, save, **options):
        count = next(array.shape[axis] for array, axis in zip(arrays, axes, strict=True) if axis is not None)

        def fold(array, axis, name):
            place = int(name in _TIMED)
            if axis is None:
                array, axis = jnp.broadcast_to(array[None], (count, *array.shape)), 0
            array = jnp.moveaxis(array, axis, place)
            return array.reshape(*array.shape[:place], count * array.shape[place + 1], *array.shape[place + 2 :])

        folded = [fold(*each) for each in zip(arrays, axes, _names(tree), strict=True)]
        found = primitive.bind(*varying_like(folded), tree=tree, save=save, **options)
        places = [int(name in _TIMED) for name in _outputs(primitive, tree, save)]
        return [
            array.reshape(*array.shape[:at], count, array.shape[at] // count, *array.shape[at + 1 :])
            for array, at in zip(found, places, strict=True)
        ], places

    return rule


def _jvp_by_xla(primitive, primals, tangents, options):
    """Differentiates XLA's form."""
    moving = [k for k, primal in enumerate(primals) if primal.dtype != bool]

    def run(*arrays):
        whole = list(primals)
        for k, array in zip(moving, arrays, strict=True):
            whole[k] = array
        return _reference(primitive)(*whole, **options)

    return jax.jvp(run, [primals[k] for k in moving], [ad.instantiate_zeros(tangents[k]) for k in moving])


def _forward_jvp(primals, tangents, *, tree, save, **options):
    if save:
        return _jvp_by_xla(forward_p, primals, tangents, {"tree": tree, "save": True, **options})
    (problem,) = jax.tree.unflatten(tree, primals)
    moved = [
        None if primal.dtype == bool else ad.instantiate_zeros(t) for primal, t in zip(primals, tangents, strict=True)
    ]
    (moved,) = jax.tree.unflatten(tree, moved)
    found = _bind(forward_p, (problem,), save=True, **options)
    kept = Result(*found) if problem.reads else Result(found[0], found[1], None, found[2])
    return found[:2], _bind(tangent_p, (problem, kept, moved), save=False, **options)


def _linear_jvp(primitive):
    """Returns the JVP rule of a primitive that is linear in its last arguments."""

    def rule(primals, tangents, *, tree, **options):
        count = _fixed(tree)
        if all(type(tangent) is ad.Zero for tangent in tangents[:count]):
            moved = [ad.instantiate_zeros(tangent) for tangent in tangents[count:]]
            run = functools.partial(primitive.bind, tree=tree, **options)
            return run(*varying_like(primals)), run(*varying_like([*primals[:count], *moved]))
        return _jvp_by_xla(primitive, primals, tangents, {"tree": tree, **options})

    return rule


def _fixed(tree) -> int:
    """The number of arrays in which a primitive is not linear."""
    return sum(child.num_leaves for child in tree.children()[:2])


def _tangent_transposed(cotangents, *arrays, tree, **options):
    count = _fixed(tree)
    problem, kept, _ = jax.tree.unflatten(tree, [*arrays[:count], *[0] * (len(arrays) - count)])
    given = tuple(map(ad.instantiate_zeros, cotangents))
    return [None] * count + list(_bind(backward_p, (problem, kept, given), **options))


def _backward_transposed(cotangents, *arrays, tree, **options):
    count = _fixed(tree)
    problem, kept, _ = jax.tree.unflatten(tree, [*arrays[:count], *[0] * (len(arrays) - count)])
    given = dict(zip(_outputs(backward_p, tree, False), map(ad.instantiate_zeros, cotangents), strict=True))
    moved = Problem(**{name: given.get(name) for name in Problem._fields})  # type: ignore[arg-type]
    return [None] * count + list(_bind(tangent_p, (problem, kept, moved), **options))


def _absent(problem: Problem) -> list[Array]:
    """The arrays of a problem, without elements where they are absent."""
    nothing = {name: jnp.zeros(0, problem.v.dtype) for name in Problem._fields} | {"start": jnp.zeros(0, bool)}
    return [nothing[name] if each is None else each for name, each in problem._asdict().items()]


def _native_forward(*arrays, tree, reverse, named, save):
    (problem,) = jax.tree.unflatten(tree, arrays)
    names = _outputs(forward_p, tree, save)
    shapes = dict(
        zip(
            names,
            _shapes(forward_p, _as_shapes(arrays), tree=tree, reverse=reverse, named=named, save=save),
            strict=True,
        )
    )
    nothing = jax.ShapeDtypeStruct((0,), problem.v.dtype)
    call = jax.ffi.ffi_call(forward_p.name, tuple(shapes.get(name, nothing) for name in Result._fields))
    found = dict(zip(Result._fields, call(*_absent(problem), reverse=reverse, chunk=np.int64(CHUNK)), strict=True))
    return [found[name] for name in names]


def _native_backward(*arrays, tree, reverse, named, save):
    problem, kept, cotangents = jax.tree.unflatten(tree, arrays)
    steps, rows, heads, _ = problem.v.shape
    nothing = jax.ShapeDtypeStruct((0,), problem.v.dtype)

    def whole(name):
        """The shape of a cotangent with all heads."""
        array = getattr(problem, name)
        if array is None:
            return nothing
        return jax.ShapeDtypeStruct(
            (steps, rows, heads, *array.shape[3:]) if name in STEPS else array.shape, array.dtype
        )

    order = [name for name in Problem._fields if name != "start"]
    call = jax.ffi.ffi_call(backward_p.name, tuple(map(whole, order)))
    saved = [jnp.zeros(0, problem.v.dtype) if each is None else each for each in kept]
    found = call(*_absent(problem), *saved, *cotangents, reverse=reverse, chunk=np.int64(CHUNK))
    results = []
    for name, each in zip(order, found, strict=True):
        array = getattr(problem, name)
        if array is not None:  # heads that share an array add to one cotangent
            results.append(each if each.shape == array.shape else each.sum(2, keepdims=True))
    return results


def _as_shapes(arrays):
    return tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)


_NATIVE = {forward_p: _native_forward, backward_p: _native_backward}


def _elsewhere(primitive):
    """Returns the lowering rule for platforms without a kernel."""
    by_xla = mlir.lower_fun(_reference(primitive), multiple_results=True)

    def rule(ctx, *operands, **options):
        if options["named"]:
            platforms = ", ".join(ctx.module_context.platforms)
            raise ValueError(f"implementation: 'native' has kernels for the CPU, and this is compiled for {platforms}")
        return by_xla(ctx, *operands, **options)

    return rule


def _on_cpu(primitive):
    native = mlir.lower_fun(_NATIVE[primitive], multiple_results=True)
    by_xla = mlir.lower_fun(_reference(primitive), multiple_results=True)

    def rule(ctx, *operands, **options):
        # XLA does not know how to divide a kernel among devices.
        devices = getattr(ctx.module_context.axis_context, "num_devices", 1)
        alone = devices in (None, 1) and all(isinstance(size, int) for aval in ctx.avals_in for size in aval.shape)
        return (native if alone or options["named"] else by_xla)(ctx, *operands, **options)

    return rule


for _primitive in _REFERENCE:
    _primitive.multiple_results = True
    _primitive.def_impl(evaluated(_primitive, _OPTIONS))
    _primitive.def_abstract_eval(_abstract(_primitive))
    batching.primitive_batchers[_primitive] = _batched(_primitive)
ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[tangent_p] = _linear_jvp(tangent_p)
ad.primitive_jvps[backward_p] = _linear_jvp(backward_p)
ad.primitive_transposes[tangent_p] = _tangent_transposed
ad.primitive_transposes[backward_p] = _backward_transposed
mlir.register_lowering(tangent_p, mlir.lower_fun(_reference(tangent_p), multiple_results=True))
for _primitive in _NATIVE:
    mlir.register_lowering(_primitive, _elsewhere(_primitive))
    library.register(_primitive, _on_cpu(_primitive))
