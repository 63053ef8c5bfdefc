"""Gated recurrences with options by compiled kernels on the CPU: three primitives on trees of arrays, so that every
transformation works on them.

forward: the recurrence. tangent: its derivative, linear in the tangents. backward: the transpose of that derivative. On
the CPU, `forward` and `backward` are kernels. `tangent`, higher derivatives and all other platforms run the loop over
the cell's own update, and its derivatives.

Every array has an axis of members M in front: weights (M, ...), rows (M, B, ...), sequences (M, T, B, ...), or
(M, B, T, ...) if they are batch-major. Arrays that a primitive is not linear in may have one member for all.
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

from jaxrnn.engines.arrays import evaluated, varying_like
from jaxrnn.engines.cpu import library
from jaxrnn.engines.gated.primitives import FEW
from jaxrnn.engines.gated.programs import count_members
from jaxrnn.engines.gated.recurrence import GatedWeights, How, gated_recurrence
from jaxrnn.engines.loop import in_chunks
from jaxrnn.engines.walk import Flags, Walk, starts
from jaxrnn.typing import PyTree

FAMILIES = ("elman", "indrnn", "lstm", "lstm coupled", "gru", "gru before", "mgu", "slstm")


class Gate(NamedTuple):
    """An activation that a kernel computes: its number, α and β."""

    code: int
    alpha: float = 0.0
    beta: float = 0.0


class Rule(NamedTuple):
    """What the gates of a kernel do.

    family: One of `FAMILIES`. gate, candidate, output: its activations φ, ψ and χ. gate_clip, cell_clip: bounds, 0 for
    none. input: whether the gate that coupled ones have is i. norm: whether products and cell state are normalised.
    projected: whether h is a product of what the gates give. heads: those of a block-diagonal product.
    """

    family: str
    gate: Gate = Gate(0)
    candidate: Gate = Gate(0)
    output: Gate = Gate(0)
    gate_clip: float = 0.0
    cell_clip: float = 0.0
    input: bool = False
    norm: bool = False
    projected: bool = False
    heads: int = 1


class Given(NamedTuple):
    """The weights that a kernel takes: w_x (D, G), w_h (S, F), and if a first product is not all that follows from it,
    w_2; b (G,), and the vectors theta (K, H) that the gates read. Those that a rule does not use are None.
    """

    w_x: PyTree
    w_h: PyTree
    b: PyTree = None
    w_2: PyTree = None
    theta: PyTree = None


class Problem(NamedTuple):
    """The arrays of a call, absent ones None. stay: for every leaf of the carry, which entries keep their value."""

    xs: PyTree
    weights: PyTree
    carry: PyTree
    fresh: PyTree
    mask: PyTree = None
    stay: PyTree = None
    valid: PyTree = None
    start: PyTree = None


class Result(NamedTuple):
    """The results of `forward`; with `save` also what its kernel keeps for `backward`."""

    ys: PyTree
    carry: PyTree
    kept: PyTree = None
    rests: PyTree = None


class Call(NamedTuple):
    """What a call is told that is not an array; see `How` for `rates`."""

    cell: Any
    rule: Rule
    rates: tuple[float, ...] | None
    directions: tuple[bool, ...]
    batch_major: bool
    named: bool


SEQUENCES = {"xs", "stay", "valid", "start", "ys", "kept", "rests"}
GATES: dict[str, int] = dict(zip(FAMILIES, (1, 1, 4, 3, 3, 3, 2, 4), strict=True))
STATS = 16  # numbers that a norm keeps of a step beside normalised products and c'

forward_p = Primitive("jaxrnn_staged_forward")
tangent_p = Primitive("jaxrnn_staged_tangent")
backward_p = Primitive("jaxrnn_staged_backward")
_OPTIONS = ("tree", "call", "save", "wrt")


def _names(tree: PyTree) -> list[str]:
    """For every leaf, the field of its `Problem` or `Result`."""
    fields = set(Problem._fields) | set(Result._fields)
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [next(key.name for key in path if getattr(key, "name", None) in fields) for path, _ in paths]


def _row_axis(name: str, call: Call) -> int | None:
    if name in SEQUENCES:
        return 1 if call.batch_major else 2
    return None if name == "weights" else 1


def _count(*trees: PyTree) -> int:
    return count_members(leaf.shape[0] for leaf in jax.tree.leaves(trees))


def _only(problem: Problem, names) -> Problem:
    """The problem without fields of other names."""
    return Problem(*(each if name in names else None for name, each in zip(Problem._fields, problem, strict=True)))


# The programs, of one member whose sequences are time-major. What a kernel keeps they neither write nor read.


def _forward_one(call: Call, reverse: bool, problem: Problem) -> Result:
    xs, weights, carry, fresh, mask, stay, *flags = problem
    how = How(call.cell, jnp.float32, jnp.float32, reverse, rates=call.rates)
    fresh = carry if fresh is None else fresh
    carry, ys = gated_recurrence(how, weights, carry, fresh, mask, xs, stay, Flags(*flags))
    return Result(ys, carry)


def _put(problem: Problem, moving: Problem) -> Problem:
    return Problem(*(old if new is None else new for old, new in zip(problem, moving, strict=True)))


def _tangent_one(call, reverse, problem, kept, moved) -> Result:
    moving = _only(problem, [name for name, each in zip(Problem._fields, moved, strict=True) if each is not None])
    return jax.jvp(lambda moving: _forward_one(call, reverse, _put(problem, moving)), (moving,), (moved,))[1]


def _backward_one(call, reverse, problem, kept, cotangents, *, wrt) -> Problem:
    def run(moving):
        return _forward_one(call, reverse, _put(problem, moving))

    return jax.vjp(run, _only(problem, wrt))[1](cotangents)[0]


def _members(one, call: Call, *trees, **options) -> PyTree:
    """Runs `one` for all members of trees, each along its direction."""
    arrays, structure = jax.tree.flatten(trees)
    patterns, count = len(call.directions), _count(trees)

    def turn(tree):
        leaves, structure = jax.tree.flatten(tree)
        pairs = zip(leaves, _names(tree), strict=True)
        swap = [jnp.swapaxes(x, 0, 1) if call.batch_major and name in SEQUENCES else x for x, name in pairs]
        return jax.tree.unflatten(structure, swap)

    def some(first, reverse):
        shared = [array.shape[0] == 1 and count != 1 for array in arrays]
        chosen = [x[0] if one else x[first::patterns] for x, one in zip(arrays, shared, strict=True)]

        def run(*arrays):
            return turn(one(call, reverse, *turn(jax.tree.unflatten(structure, arrays)), **options))

        return jax.vmap(run, [None if one else 0 for one in shared])(*chosen)

    parts = [some(*each) for each in enumerate(call.directions)]
    if patterns == 1:
        return parts[0]
    return jax.tree.map(lambda *each: jnp.stack(each, 1).reshape(count, *each[0].shape[1:]), *parts)


def _forward(call: Call, problem: Problem, *, save, wrt) -> Result:
    found = _members(_forward_one, call, problem)
    if not save:
        return found
    shapes = _forward_shapes(call, problem, save=True, wrt=wrt)
    nothing = [None if each is None else jnp.full(each.shape, jnp.nan, each.dtype) for each in shapes[2:]]
    return Result(found.ys, found.carry, *nothing)


def _tangent(call: Call, problem: Problem, kept: Result, moved: Problem, *, save, wrt) -> Result:
    return _members(_tangent_one, call, problem, kept, moved)


def _backward(call: Call, problem: Problem, kept: Result, cotangents: Result, *, save, wrt) -> Problem:
    return _members(_backward_one, call, problem, kept, cotangents, wrt=wrt)


# The shapes of results: all members of everything.


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _sizes(call: Call, problem: Problem) -> tuple[tuple[int, int], int, int]:
    """Steps and rows in their order, H, and the other states than h in multiples of H."""
    units = problem.weights.w_x.shape[-1] // GATES[call.rule.family]
    return problem.xs.shape[1:3], units, len(jax.tree.leaves(problem.carry)) - 1


def _forward_shapes(call: Call, problem: Problem, *, save, wrt) -> Result:
    count, (steps, units, states), rule = _count(problem), _sizes(call, problem), call.rule
    carry = jax.tree.map(lambda leaf: _float(count, *leaf.shape[1:]), problem.carry)
    found = Result(_float(count, *steps, jax.tree.leaves(carry)[0].shape[-1]), carry)
    if not save:
        return found
    gates = GATES[rule.family]
    kept = (gates + (rule.family == "gru")) * units
    if rule.norm:
        kept = (2 * gates + rule.family.startswith("lstm")) * units + STATS
    return found._replace(
        kept=_float(count, *steps, kept), rests=_float(count, *steps, states * units) if states else None
    )


def _tangent_shapes(call: Call, problem: Problem, kept: Result, moved: Problem, *, save, wrt) -> Result:
    return _forward_shapes(call, problem, save=False, wrt=wrt)


def _backward_shapes(call: Call, problem: Problem, kept: Result, cotangents: Result, *, save, wrt) -> Problem:
    count = _count(problem, kept, cotangents)
    return jax.tree.map(lambda leaf: _float(count, *leaf.shape[1:]), _only(problem, wrt))


# The kernels.


def _beside(leaves: Sequence[Array]) -> Array | None:
    return jnp.concatenate(leaves, -1) if leaves else None


def _arrays(problem: Problem, given: Given) -> list[Array | None]:
    """What both kernels take, in their order."""
    h, *rest = jax.tree.leaves(problem.carry)
    fresh_h, *fresh = jax.tree.leaves(problem.fresh) or [None]
    stay_h, *stay = jax.tree.leaves(problem.stay) or [None]
    states = (
        h,
        _beside(rest),
        fresh_h,
        _beside(fresh),
        problem.valid,
        problem.start,
        problem.mask,
        stay_h,
        _beside(stay),
    )
    return [problem.xs, given.w_x, *states, given.w_h, given.w_2, given.theta]


def _run(name: str, call: Call, members: int, arrays, shapes) -> list[Array | None]:
    """Runs a kernel. What has no elements is not handed over, but for the first three, which tell the sizes."""
    rule, codes = call.rule, (call.rule.gate, call.rule.candidate, call.rule.output)
    arguments = [k for k, array in enumerate(arrays) if k < 3 or (array is not None and array.size)]
    results = [k for k, shape in enumerate(shapes) if shape is not None and math.prod(shape.shape)]
    switches = rule.input, rule.norm, rule.projected, call.rates is not None, rule.heads
    rates = (*(call.rates or ()), 0.0, 0.0, 0.0, 0.0)[:4]
    values = [*(number for code in codes for number in code[1:]), rule.gate_clip, rule.cell_clip, *rates]
    found = jax.ffi.ffi_call(name, [shapes[k] for k in results])(
        *[arrays[k] for k in arguments],
        numbers=np.array([FAMILIES.index(rule.family), *(code.code for code in codes), *switches], np.int64),
        values=np.array(values, np.float32),
        batch_major=call.batch_major,
        directions=np.int64(sum(reverse << k for k, reverse in enumerate(call.directions))),
        pattern=np.int64(len(call.directions)),
        members=np.int64(members),
        here=np.int64(sum(1 << k for k in arguments) + sum(1 << 32 + k for k in results)),
    )
    whole = [None if shape is None else jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
    for k, array in zip(results, found, strict=True):
        whole[k] = array
    return whole


def _apart(call: Call, problem: Problem, h: PyTree, rest: PyTree) -> PyTree:
    """The carry, from h and the other states beside each other."""
    leaves, structure = jax.tree.flatten(problem.carry)
    states = [] if rest is None else jnp.split(rest, len(leaves) - 1, axis=-1)
    return jax.tree.unflatten(structure, [h, *states])


def _even(weights: GatedWeights, members: int) -> GatedWeights:
    """The weights of every member."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (members, *leaf.shape[1:])), weights)


def _native_forward(call: Call, problem: Problem, *, save, wrt) -> Result:
    shapes, members = _forward_shapes(call, problem, save=save, wrt=wrt), _count(problem)
    given = jax.vmap(call.cell.arrange)(_even(problem.weights, _count(problem.weights)))
    h, *rest = jax.tree.leaves(shapes.carry)
    together = _float(*rest[0].shape[:-1], sum(each.shape[-1] for each in rest)) if rest else None
    results = [shapes.ys, h, together, shapes.kept, shapes.rests]
    ys, h, rest, kept, rests = _run(forward_p.name, call, members, [*_arrays(problem, given), given.b], results)
    return Result(ys, _apart(call, problem, h, rest), kept, rests)


def _native_backward(call: Call, problem: Problem, kept: Result, cotangents: Result, *, save, wrt) -> Problem:
    members = _count(problem, kept, cotangents)
    shapes = _backward_shapes(call, problem, kept, cotangents, save=save, wrt=wrt)
    weights = _even(problem.weights, members if "weights" in wrt else _count(problem.weights))
    given, pull = jax.vjp(jax.vmap(call.cell.arrange), weights)

    def states(tree):
        h, *rest = jax.tree.leaves(tree) or [None]
        return h, _float(*rest[0].shape[:-1], sum(each.shape[-1] for each in rest)) if rest else None

    def like(array):
        return None if array is None or "weights" not in wrt else _float(*array.shape)

    d_h, *d_rest = jax.tree.leaves(cotangents.carry)
    moving = Given(*map(like, given))
    results = [
        shapes.xs,
        *states(shapes.carry),
        *states(shapes.fresh),
        moving.w_x,
        moving.w_h,
        moving.w_2,
        moving.theta,
    ]
    arrays = [*_arrays(problem, given), kept.ys, kept.kept, kept.rests, cotangents.ys, d_h, _beside(d_rest)]
    d_xs, d_h, d_rest, f_h, f_rest, w_x, w_h, w_2, theta, b = _run(
        backward_p.name, call, members, arrays, [*results, moving.b]
    )
    return Problem(
        xs=d_xs,
        weights=pull(varying_like(Given(w_x, w_h, b, w_2, theta), weights))[0] if "weights" in wrt else None,
        carry=_apart(call, problem, d_h, d_rest),
        fresh=None if f_h is None else _apart(call, problem, f_h, f_rest),
    )


_PROGRAMS = {forward_p: _forward, tangent_p: _tangent, backward_p: _backward}
_SHAPES = {forward_p: _forward_shapes, tangent_p: _tangent_shapes, backward_p: _backward_shapes}
_KERNELS = {forward_p: _native_forward, backward_p: _native_backward}


# The primitives' rules.


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
    names = _names(jax.tree.unflatten(tree, avals))
    places = [(aval, _row_axis(name, call)) for aval, name in zip(avals, names, strict=True)]
    specs = [aval.sharding.spec[axis] for aval, axis in places if axis is not None]
    rows = next((spec for spec in specs if spec is not None), None)
    found = _outputs(primitive, avals, tree=tree, call=call, **options)

    def abstract(out, name):
        spec: list[PyTree] = [None] * len(out.shape)
        axis = _row_axis(name, call)
        if axis is not None:
            spec[axis] = rows
        sharding = avals[0].sharding.update(spec=PartitionSpec(*spec))
        return avals[0].update(shape=out.shape, dtype=out.dtype, weak_type=False, sharding=sharding)

    return [abstract(*each) for each in zip(jax.tree.leaves(found), _names(found), strict=True)]


def _batched(primitive, arrays, axes, *, tree, call, wrt, **options):
    """The new axis becomes one of members where weights differ, else of rows."""
    names, fixed = _names(jax.tree.unflatten(tree, arrays)), _fixed(tree) or len(arrays)
    count = next(array.shape[axis] for array, axis in zip(arrays, axes, strict=True) if axis is not None)
    members = count_members(a.shape[1 if axis == 0 else 0] for a, axis in zip(arrays, axes, strict=True))
    apart = any(axis is not None and name == "weights" for axis, name in zip(axes, names, strict=True))
    by_member = apart or (primitive is backward_p and "weights" in wrt)

    def fold(array, axis, name, shared):
        place: Any = 0 if by_member else _row_axis(name, call)
        if axis is None:
            if place is None or (by_member and shared and array.shape[0] == 1):
                return array
            array, axis = jnp.broadcast_to(array[None], (count, *array.shape)), 0
        array = jnp.moveaxis(array, axis, place)
        if by_member and array.shape[1] != members:
            array = jnp.broadcast_to(array, (count, members, *array.shape[2:]))
        return array.reshape(*array.shape[:place], count * array.shape[place + 1], *array.shape[place + 2 :])

    folded = [fold(*each, k < fixed) for k, each in enumerate(zip(arrays, axes, names, strict=True))]
    options |= {"tree": tree, "call": call, "wrt": wrt}
    found = primitive.bind(*varying_like(folded), **options)
    places = [0 if by_member else _row_axis(name, call) for name in _names(_outputs(primitive, folded, **options))]
    unfolded = [
        array
        if at is None
        else array.reshape(*array.shape[:at], count, array.shape[at] // count, *array.shape[at + 1 :])
        for array, at in zip(found, places, strict=True)
    ]
    return unfolded, places


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
    members = _count(problem)
    always = {"carry"} | ({"fresh"} if problem.fresh is not None else set())
    wrt = tuple(name for name in Problem._fields if name in always or (name in ("xs", "weights") and moves[name]))

    def whole(primal, tangent):
        """The tangent for every member."""
        tangent = ad.instantiate_zeros(tangent)
        if tangent.shape[0] != members <= FEW:
            return jnp.concatenate([tangent] * members)
        return jnp.broadcast_to(tangent, (members, *tangent.shape[1:]))

    moved = jax.tree.map(whole, _only(problem, wrt), _only(d_problem, wrt))
    options = {"call": call, "wrt": wrt}
    shapes = _forward_shapes(call, problem, save=True, wrt=())
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
            structure, other = jax.tree.structure(_only(problem, wrt)), tangent_p
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


def _on_cpu(kernel, program):
    native, by_xla = (mlir.lower_fun(each, multiple_results=True) for each in (kernel, program))

    def rule(ctx, *operands, call, **options):
        # XLA does not know how to divide a kernel among devices.
        devices = getattr(ctx.module_context.axis_context, "num_devices", 1)
        return (native if devices in (None, 1) or call.named else by_xla)(ctx, *operands, call=call, **options)

    return rule


for _primitive, _program in _PROGRAMS.items():
    _primitive.multiple_results = True
    _primitive.def_impl(evaluated(_primitive, _OPTIONS))
    _primitive.def_abstract_eval(functools.partial(_abstract, _primitive))
    batching.primitive_batchers[_primitive] = functools.partial(_batched, _primitive)
    if _primitive in _KERNELS:
        mlir.register_lowering(_primitive, _elsewhere(_flat(_program)))
        library.register(_primitive, _on_cpu(_flat(_KERNELS[_primitive]), _flat(_program)))
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
    batch = xs.shape[1:-1]
    rows, members, by_batch = math.prod(batch), len(layers), walk.batch_major and bool(batch)
    directions = tuple(layer.reverse for layer in layers)
    call = Call(cell, rule, rates, directions, by_batch, walk.named("gated_scan") is not None)

    def together(*leaves):
        return leaves[0][None] if len(leaves) == 1 else jnp.stack(leaves)

    def of_rows(*leaves):
        return together(*leaves).reshape(members, rows, leaves[0].shape[-1])

    def sequence(arrays, *last):
        """Brings (T, *batch, *last), of each recurrence or of all, to the layout of the call. An axis is moved before
        another one is put in front, so that XLA sees it move back.
        """
        if by_batch:
            arrays = [jnp.moveaxis(array, 0, len(batch)) for array in arrays]
        length = arrays[0].shape[len(batch) if by_batch else 0]
        return together(*arrays).reshape(len(arrays), *((rows, length) if by_batch else (length, rows)), *last)

    def back(array, length):
        """Of one recurrence."""
        if by_batch:
            return jnp.moveaxis(array.reshape(*batch, length, array.shape[-1]), len(batch), 0)
        return array.reshape(length, *batch, array.shape[-1])

    masks = [layer.mask for layer in layers]

    def run(_, state, inputs):
        xs, valid, start, stay = inputs
        problem = Problem(
            xs=sequence([xs], xs.shape[-1]),
            weights=jax.tree.map(together, *(layer.weights for layer in layers)),
            carry=jax.tree.map(of_rows, *state),
            fresh=None if start is None else jax.tree.map(of_rows, *(layer.fresh for layer in layers)),
            mask=None if masks[0] is None else of_rows(*masks),
            stay=None if stay is None else [sequence([each], each.shape[-1]) for each in stay],
            valid=None if valid is None else sequence([valid]),
            start=None if start is None else sequence(start),
        )
        found = _bind(forward_p, problem, call=call, save=False, wrt=())
        ys, *leaves = found
        states = [leaf.reshape(members, *batch, leaf.shape[-1]) for leaf in leaves]
        structure = jax.tree.structure(state[0])
        new = tuple(jax.tree.unflatten(structure, [each[m] for each in states]) for m in range(members))
        return new, tuple(back(ys[m], xs.shape[0]) for m in range(members))

    valid, reset = walk.valid, walk.reset
    start = None if reset is None else [starts(reset, valid, reverse) for reverse in directions]
    carry = tuple(layer.carry for layer in layers)
    state, ys = in_chunks(run, (), carry, (xs, valid, start, stay), walk)
    return list(zip(state, ys, strict=True))
