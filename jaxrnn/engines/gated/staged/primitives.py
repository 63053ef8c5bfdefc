"""Gated recurrences with options by compiled kernels on the CPU: three primitives on trees of arrays, so that every
transformation works on them.

On the CPU, `forward` and `backward` are kernels. `tangent`, higher derivatives and all other platforms use `programs`,
where the three primitives and their arrays are described.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from jaxrnn.engines.arrays import evaluated, folded, mapped_over_nothing, repeated, unfolded, varying_like
from jaxrnn.engines.cpu import library
from jaxrnn.engines.gated.layout import Layout, together
from jaxrnn.engines.gated.primitives import FEW
from jaxrnn.engines.gated.programs import count_members
from jaxrnn.engines.gated.recurrence import GatedWeights
from jaxrnn.engines.gated.staged import kernels, programs
from jaxrnn.engines.gated.staged.programs import (
    Call,
    Problem,
    Result,
    all_members,
    forward_shapes,
    names_of,
    only,
    row_axis,
)
from jaxrnn.engines.gated.staged.rule import Rule
from jaxrnn.engines.loop import in_chunks
from jaxrnn.engines.partition import MEMBERS, ROWS, Factors, axes, lowering
from jaxrnn.engines.walk import Walk, starts
from jaxrnn.typing import PyTree

forward_p = Primitive("jaxrnn_staged_forward")
tangent_p = Primitive("jaxrnn_staged_tangent")
backward_p = Primitive("jaxrnn_staged_backward")
_OPTIONS = ("tree", "call", "save", "wrt")
_PROGRAMS = {forward_p: programs.forward, tangent_p: programs.tangent, backward_p: programs.backward}
_SHAPES = {
    forward_p: programs.forward_shapes,
    tangent_p: programs.tangent_shapes,
    backward_p: programs.backward_shapes,
}
_KERNELS = {forward_p: kernels.native_forward, backward_p: kernels.native_backward}


def _flat(program):
    def run(*arrays, tree, call, **options):
        return jax.tree.leaves(program(call, *jax.tree.unflatten(tree, arrays), **options))

    return run


def _bind(primitive, *trees, **options: Any) -> list[Array]:
    leaves, structure = jax.tree.flatten(trees)
    return primitive.bind(*varying_like(leaves), tree=structure, **options)


def _outputs(primitive, arrays, *, tree, call, **options) -> PyTree:
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    return _SHAPES[primitive](call, *jax.tree.unflatten(tree, shapes), **options)


def _abstract(primitive, *avals, tree, call, **options):
    """Rows of the results are divided among devices as those of the inputs are."""
    names = names_of(jax.tree.unflatten(tree, avals))
    places = [(aval, row_axis(name, call)) for aval, name in zip(avals, names, strict=True)]
    specs = [aval.sharding.spec[axis] for aval, axis in places if axis is not None]
    rows = next((spec for spec in specs if spec is not None), None)
    found = _outputs(primitive, avals, tree=tree, call=call, **options)

    def abstract(out, name):
        spec: list[PyTree] = [None] * len(out.shape)
        axis = row_axis(name, call)
        if axis is not None:
            spec[axis] = rows
        sharding = avals[0].sharding.update(spec=PartitionSpec(*spec))
        return avals[0].update(shape=out.shape, dtype=out.dtype, weak_type=False, sharding=sharding)

    return [abstract(*each) for each in zip(jax.tree.leaves(found), names_of(found), strict=True)]


def _batched(primitive, arrays, axes, *, tree, call, wrt, **options):
    """The new axis becomes one of members where weights differ, else of rows."""
    names, fixed = names_of(jax.tree.unflatten(tree, arrays)), _fixed(tree) or len(arrays)
    mapped = next((array, axis) for array, axis in zip(arrays, axes, strict=True) if axis is not None)
    count = mapped[0].shape[mapped[1]]
    if count == 0:
        return mapped_over_nothing(primitive, arrays, axes, tree=tree, call=call, wrt=wrt, **options)
    members = count_members(a.shape[1 if axis == 0 else 0] for a, axis in zip(arrays, axes, strict=True))
    apart = any(axis is not None and name == "weights" for axis, name in zip(axes, names, strict=True))
    by_member = apart or (primitive is backward_p and "weights" in wrt)

    def fold(array, axis, name, shared):
        place: Any = 0 if by_member else row_axis(name, call)
        if axis is None:
            if place is None or (by_member and shared and array.shape[0] == 1):
                return array
            array, axis = repeated(array, *mapped), 0
        array = jnp.moveaxis(array, axis, place)
        if by_member and array.shape[1] != members:
            array = jnp.broadcast_to(array, (count, members, *array.shape[2:]))
        return folded(array, place)

    given = [fold(*each, k < fixed) for k, each in enumerate(zip(arrays, axes, names, strict=True))]
    options |= {"tree": tree, "call": call, "wrt": wrt}
    places = [0 if by_member else row_axis(name, call) for name in names_of(_outputs(primitive, given, **options))]
    found = zip(primitive.bind(*varying_like(given), **options), places, strict=True)
    return [array if place is None else unfolded(array, place, count) for array, place in found], places


def _fixed(tree) -> int:
    """The number of arrays in which `tangent` and `backward` are not linear."""
    return sum(child.num_leaves for child in tree.children()[:2]) if len(tree.children()) > 1 else 0


def _jvp_by_xla(primitive, primals, tangents, options):
    """Differentiates the program."""
    moving = [k for k, primal in enumerate(primals) if primal.dtype != bool]

    def run(*arrays):
        whole = list(primals)
        for k, array in zip(moving, arrays, strict=True):
            whole[k] = array
        return _flat(_PROGRAMS[primitive])(*whole, **options)

    return jax.jvp(run, [primals[k] for k in moving], [ad.instantiate_zeros(tangents[k]) for k in moving])


def _is_zero(tangent) -> bool:
    return type(tangent) is ad.Zero


def _forward_jvp(primals, tangents, *, tree, call, save, wrt):
    (problem,), (d_problem,) = (jax.tree.unflatten(tree, each) for each in (primals, tangents))
    moves = {
        name: not all(map(_is_zero, jax.tree.leaves(each, is_leaf=_is_zero)))
        for name, each in zip(Problem._fields, d_problem, strict=True)
    }
    if save or moves["mask"]:
        return _jvp_by_xla(forward_p, primals, tangents, {"tree": tree, "call": call, "save": save, "wrt": wrt})
    members = all_members(problem)
    always = {"carry"} | ({"fresh"} if problem.fresh is not None else set())
    wrt = tuple(name for name in Problem._fields if name in always or (name in ("xs", "weights") and moves[name]))

    def whole(primal, tangent):
        """The tangent for every member."""
        tangent = ad.instantiate_zeros(tangent)
        if tangent.shape[0] != members <= FEW:
            return jnp.concatenate([tangent] * members)
        return jnp.broadcast_to(tangent, (members, *tangent.shape[1:]))

    moved = jax.tree.map(whole, only(problem, wrt), only(d_problem, wrt))
    options = {"call": call, "wrt": wrt}
    shapes = forward_shapes(call, problem, save=True, wrt=())
    found = jax.tree.unflatten(jax.tree.structure(shapes), _bind(forward_p, problem, save=True, call=call, wrt=()))
    kept = found._replace(carry=None)
    return jax.tree.leaves(Result(found.ys, found.carry)), _bind(tangent_p, problem, kept, moved, save=False, **options)


def _linear_jvp(primitive):
    """Returns the JVP rule of a primitive that is linear in all but its first arguments."""

    def rule(primals, tangents, *, tree, **options):
        count = _fixed(tree)
        if all(map(_is_zero, tangents[:count])):
            moved = [ad.instantiate_zeros(tangent) for tangent in tangents[count:]]
            run = functools.partial(primitive.bind, tree=tree, **options)
            return run(*varying_like(primals)), run(*varying_like([*primals[:count], *moved]))
        return _jvp_by_xla(primitive, primals, tangents, {"tree": tree, **options})

    return rule


def _transposed(primitive):
    """Returns the rule by which `tangent` and `backward` are each other's transpose."""

    def rule(cotangents, *arrays, tree, call, save, wrt):
        count = _fixed(tree)
        problem, kept, _ = jax.tree.unflatten(tree, [*arrays[:count], *[0] * (len(arrays) - count)])
        given = list(map(ad.instantiate_zeros, cotangents))
        if primitive is tangent_p:
            structure, other = jax.tree.structure(Result(0, problem.carry)), backward_p
        else:
            structure, other = jax.tree.structure(only(problem, wrt)), tangent_p
        found = _bind(other, problem, kept, jax.tree.unflatten(structure, given), call=call, save=save, wrt=wrt)
        return [None] * count + [
            cotangent if ad.is_undefined_primal(array) else None
            for array, cotangent in zip(arrays[count:], found, strict=True)
        ]

    return rule


def _elsewhere(program):
    """Returns the lowering rule for platforms without a kernel."""
    by_xla = mlir.lower_fun(program, multiple_results=True)

    def rule(ctx, *operands, call, **options):
        if call.named:
            platforms = ", ".join(ctx.module_context.platforms)
            raise ValueError(f"implementation: 'native' has kernels for the CPU, and this is compiled for {platforms}")
        return by_xla(ctx, *operands, call=call, **options)

    return rule


def _factors(primitive, avals_in, avals_out, options) -> Factors:
    """Members, of which a device takes both directions, and rows."""
    call, trees = options["call"], jax.tree.unflatten(options["tree"], avals_in)
    results = _outputs(primitive, avals_in, **options)
    sizes = {MEMBERS: count_members(aval.shape[0] for aval in avals_in), ROWS: trees[0].xs.shape[row_axis("xs", call)]}

    def named(aval, name):
        at = row_axis(name, call)
        return axes(aval.shape, {0: (MEMBERS,)} | ({} if at is None else {at: (ROWS,)}), sizes)

    arguments, made = (
        [named(*each) for each in zip(avals, names_of(tree), strict=True)]
        for avals, tree in ((avals_in, trees), (avals_out, results))
    )
    return Factors(arguments, made, sizes, {MEMBERS: len(call.directions)})


def _on_cpu(primitive, kernel, program):
    native, by_xla = (mlir.lower_fun(each, multiple_results=True) for each in (kernel, program))
    return lowering(primitive, native, by_xla, functools.partial(_factors, primitive))


for _primitive, _program in _PROGRAMS.items():
    _primitive.multiple_results = True
    _primitive.def_impl(evaluated(_primitive, _OPTIONS))
    _primitive.def_abstract_eval(functools.partial(_abstract, _primitive))
    batching.primitive_batchers[_primitive] = functools.partial(_batched, _primitive)
    if _primitive in _KERNELS:
        mlir.register_lowering(_primitive, _elsewhere(_flat(_program)))
        library.register(_primitive, _on_cpu(_primitive, _flat(_KERNELS[_primitive]), _flat(_program)))
    else:
        mlir.register_lowering(_primitive, mlir.lower_fun(_flat(_program), multiple_results=True))
ad.primitive_jvps[forward_p] = _forward_jvp
for _primitive in (tangent_p, backward_p):
    ad.primitive_jvps[_primitive] = _linear_jvp(_primitive)
    ad.primitive_transposes[_primitive] = _transposed(_primitive)


class Layer(NamedTuple):
    """One recurrence of a call."""

    weights: GatedWeights
    carry: PyTree  # leaves (*batch, ...)
    fresh: PyTree
    mask: Array | None
    reverse: bool


def scan(
    cell, rule: Rule, layers: Sequence[Layer], xs: Array, walk: Walk, rates: tuple[float, ...] | None, stay: PyTree
) -> list:
    """Runs recurrences of the same sizes over the first axis of `xs`, all at once: (carry, ys) of each.

    Args:
      cell: What they all are.
      rule: What its kernel does.
      layers: The values that differ among the recurrences.
      xs: The inputs, (T, *batch, D).
      walk: The walk of the first recurrence; with `remat_every`, of all.
      rates: See `How`.
      stay: For every leaf of the carry which entries stay, (T, *batch, ...), or None; for all recurrences.
    """
    layout, members = Layout(xs.shape[1:-1], walk.batch_major and xs.ndim > 2), len(layers)
    directions = tuple(layer.reverse for layer in layers)
    call = Call(cell, rule, rates, directions, layout.by_batch, walk.named("gated_scan") is not None)
    masks: list[Any] = [layer.mask for layer in layers]

    def entries(stay, leaf):
        return layout.sequence([jnp.broadcast_to(stay.astype(bool), (stay.shape[0], *leaf.shape))], leaf.shape[-1])

    def run(_, state, inputs):
        xs, valid, start, stay = inputs
        problem = Problem(
            xs=layout.sequence([xs], xs.shape[-1]),
            weights=jax.tree.map(together, *(layer.weights for layer in layers)),
            carry=jax.tree.map(layout.rows, *state),
            fresh=None if start is None else jax.tree.map(layout.rows, *(layer.fresh for layer in layers)),
            mask=None if masks[0] is None else layout.rows(*masks),
            stay=None
            if stay is None
            else [entries(*each) for each in zip(stay, jax.tree.leaves(state[0]), strict=True)],
            valid=None if valid is None else layout.sequence([valid]),
            start=None if start is None else layout.sequence(start),
        )
        found = _bind(forward_p, problem, call=call, save=False, wrt=())
        ys, *leaves = found
        states = [leaf.reshape(members, *layout.batch, leaf.shape[-1]) for leaf in leaves]
        structure = jax.tree.structure(state[0])
        new = tuple(jax.tree.unflatten(structure, [each[m] for each in states]) for m in range(members))
        return new, tuple(layout.back(ys[m]) for m in range(members))

    valid, reset = walk.valid, walk.reset
    start = None if reset is None else [starts(reset, valid, reverse) for reverse in directions]
    carry = tuple(layer.carry for layer in layers)
    state, ys = in_chunks(run, (), carry, (xs, valid, start, stay), walk)
    return list(zip(state, ys, strict=True))
