"""Gated recurrences with options by the loop over the cell's own update, and its derivatives. They run where there is
no kernel, and for higher derivatives.

forward: the recurrence. tangent: its derivative, linear in the tangents. backward: the transpose of that derivative.

Every array has an axis of members M in front: weights (M, ...), rows (M, B, ...), sequences (M, T, B, ...), or
(M, B, T, ...) if they are batch-major. Arrays that a function is not linear in may have one member for all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrnn.engines.gated import derivative
from jaxrnn.engines.gated.programs import count_members, zeros
from jaxrnn.engines.gated.recurrence import How, Problem, time_steps
from jaxrnn.engines.gated.staged.rule import FAMILIES, Rule
from jaxrnn.typing import PyTree


class Result(NamedTuple):
    """The results of `forward`; with `save` also every state other than h, and what its kernel keeps for `backward`."""

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


def names_of(tree: PyTree) -> list[str]:
    """For every leaf, the field of its `Problem` or `Result`."""
    fields = set(Problem._fields) | set(Result._fields)
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [next(key.name for key in path if getattr(key, "name", None) in fields) for path, _ in paths]


def row_axis(name: str, call: Call) -> int | None:
    """Returns the axis of rows in an array of this field, or None."""
    if name in SEQUENCES:
        return 1 if call.batch_major else 2
    return None if name == "weights" else 1


def all_members(*trees: PyTree) -> int:
    """Returns the number of members of a call from its arrays."""
    return count_members(leaf.shape[0] for leaf in jax.tree.leaves(trees))


def only(problem: Problem, names) -> Problem:
    """The problem without fields of other names."""
    return Problem(*(each if name in names else None for name, each in zip(Problem._fields, problem, strict=True)))


# The programs, of one member whose sequences are time-major. What a kernel keeps they neither write nor read, but for
# the states of every step.


def _how(call: Call, reverse: bool, problem: Problem) -> How:
    return How(call.cell, problem.xs.dtype, problem.xs.dtype, reverse, rates=call.rates, apart=call.cell.gates_apart)


def _with_fresh(problem: Problem) -> Problem:
    """Invalid steps are computed from the fresh carry, which is zeros where the call has none."""
    return problem if problem.fresh is not None else problem._replace(fresh=zeros(problem.carry))


def _forward_one(call: Call, reverse: bool, problem: Problem, *, save: bool) -> Result:
    carry, ys, states = time_steps(_how(call, reverse, problem), _with_fresh(problem), save)
    _, *rests = jax.tree.leaves(states) or [None]
    return Result(ys, carry, rests=jnp.concatenate(rests, -1) if rests else None)


def _tangent_one(call: Call, reverse: bool, problem: Problem, kept: Result, moved: Problem) -> Result:
    leaves, structure = jax.tree.flatten(problem.carry)
    rests = [] if kept.rests is None else jnp.split(kept.rests, len(leaves) - 1, axis=-1)
    states = jax.tree.unflatten(structure, [kept.ys, *rests])
    carry, ys = derivative.tangent(_how(call, reverse, problem), _with_fresh(problem), states, moved)
    return Result(ys, carry)


def _backward_one(call, reverse, problem, kept, cotangents, *, wrt) -> Problem:
    def run(moved):
        return _tangent_one(call, reverse, problem, kept, moved)

    return jax.linear_transpose(run, only(problem, wrt))(cotangents)[0]


def _members(one, call: Call, *trees, **options) -> PyTree:
    """Runs `one` for all members of trees, each along its direction."""
    arrays, structure = jax.tree.flatten(trees)
    patterns, count = len(call.directions), all_members(trees)

    def turn(tree):
        leaves, structure = jax.tree.flatten(tree)
        pairs = zip(leaves, names_of(tree), strict=True)
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


def forward(call: Call, problem: Problem, *, save, wrt) -> Result:
    """Runs the recurrence; with `save`, NaN stands for what the kernel keeps, so that nobody reads it unseen."""
    found = _members(_forward_one, call, problem, save=save)
    if not save:
        return found
    kept = forward_shapes(call, problem, save=True, wrt=wrt).kept
    return found._replace(kept=jnp.full(kept.shape, jnp.nan, kept.dtype))


def tangent(call: Call, problem: Problem, kept: Result, moved: Problem, *, save, wrt) -> Result:
    """Computes the tangents of ys and of the carry."""
    return _members(_tangent_one, call, problem, kept, moved)


def backward(call: Call, problem: Problem, kept: Result, cotangents: Result, *, save, wrt) -> Problem:
    """Computes the cotangents of the fields `wrt`."""
    return _members(_backward_one, call, problem, kept, cotangents, wrt=wrt)


# The shapes of results: all members of everything.


def _floats(problem: Problem, *shape: int) -> jax.ShapeDtypeStruct:
    """The shape of an array in the dtype of a problem."""
    return jax.ShapeDtypeStruct(shape, problem.xs.dtype)


def _sizes(call: Call, problem: Problem) -> tuple[tuple[int, int], int, int]:
    """Steps and rows in their order, H, and the other states than h in multiples of H."""
    units = problem.weights.w_x.shape[-1] // GATES[call.rule.family]
    return problem.xs.shape[1:3], units, len(jax.tree.leaves(problem.carry)) - 1


def forward_shapes(call: Call, problem: Problem, *, save, wrt) -> Result:
    """The shapes of the results of `forward`."""
    count, (steps, units, states), rule = all_members(problem), _sizes(call, problem), call.rule
    carry = jax.tree.map(lambda leaf: _floats(problem, count, *leaf.shape[1:]), problem.carry)
    found = Result(_floats(problem, count, *steps, jax.tree.leaves(carry)[0].shape[-1]), carry)
    if not save:
        return found
    gates = GATES[rule.family]
    kept = (gates + (rule.family == "gru")) * units
    if rule.norm:
        kept = (2 * gates + rule.family.startswith("lstm")) * units + STATS
    return found._replace(
        kept=_floats(problem, count, *steps, kept),
        rests=_floats(problem, count, *steps, states * units) if states else None,
    )


def tangent_shapes(call: Call, problem: Problem, kept: Result, moved: Problem, *, save, wrt) -> Result:
    """Those of `tangent`."""
    return forward_shapes(call, problem, save=False, wrt=wrt)


def backward_shapes(call: Call, problem: Problem, kept: Result, cotangents: Result, *, save, wrt) -> Problem:
    """Those of `backward`."""
    count = all_members(problem, kept, cotangents)
    return jax.tree.map(lambda leaf: _floats(problem, count, *leaf.shape[1:]), only(problem, wrt))
