"""Sequences whose time is divided over the devices of a mesh: each has a part of the steps.

What crosses from a part to the next one is a state, and how a part changes it. Where the recurrence is linear that is
known without the state: s ↦ total s + last. So all parts are computed at once, and no device holds the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn.engines.arrays import select, varying_like
from jaxrnn.engines.walk import Walk
from jaxrnn.typing import PyTree


class Part(NamedTuple):
    """What the steps of one device make of the state before them, a function of `change`, of `last`, what they make of
    zeros, and of that state. Where `cut` (*batch) it is `last`; where `ends`, the next steps start fresh.
    """

    change: PyTree
    last: Array
    cut: Array | None
    ends: Array | None


def part(walk: Walk, change: PyTree, last: Array) -> Part:
    """The part of the steps of a walk."""
    valid, start = walk.flags
    if start is None or walk.reset is None:
        return Part(change, last, None, None)
    ends = None
    if walk.reverse:
        ends = walk.reset[0] if valid is None else (walk.reset & _first(valid)).any(0)
    return Part(change, last, start.any(0), ends)


def _first(valid: Array) -> Array:
    """Whether each step is the first valid one."""
    return valid & (jnp.cumsum(valid, axis=0, dtype=jnp.int32) == 1)


def states(
    own: Part, first: Array, function: Callable[[PyTree, Array, Array], Array], walk: Walk, fresh: Any = 0
) -> tuple[Array, Array]:
    """Returns the state before the steps of this device, and the state after those of all.

    Args:
      own: What the steps of this device do.
      first: The state before all steps.
      function: `function(change, last, state)`.
      walk: The walk over the steps of this device.
      fresh: The state that a sequence begins with.
    """
    axis_name = walk.axis_name
    assert axis_name is not None

    def follow(states, each):
        state, _ = states
        new = function(each.change, each.last, state)
        new = new if each.cut is None else select(each.cut, each.last, new)
        state = new if each.ends is None else select(each.ends, jnp.broadcast_to(fresh, new.shape), new)
        return (state, new), state

    parts = of_all_devices(own, axis_name)
    first, fresh, parts = varying_like((first, jnp.asarray(fresh, first.dtype), parts))
    (_, last), after = lax.scan(follow, (first, first), parts, reverse=walk.reverse)
    every = jnp.concatenate([after[1:], first[None]] if walk.reverse else [first[None], after[:-1]])
    before = lax.dynamic_index_in_dim(every, lax.axis_index(axis_name), keepdims=False)
    return before, of_all_devices(last, axis_name)[0]


def added(total: Array, last: Array, state: Array) -> Array:
    """What elementwise coefficients make of a state."""
    return total * state + last


def check_axis_name(axis_name: str) -> None:
    """Raises an error where there is no such axis."""
    try:
        lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name: expected an axis of the `jax.shard_map` around this call, got {axis_name!r}"
        ) from error


def of_all_devices(tree: PyTree, axis_name: str) -> PyTree:
    """The arrays of every device, one above another, known to be the same everywhere."""
    count, place = lax.axis_size(axis_name), lax.axis_index(axis_name)

    def gather(leaf):
        if leaf.dtype == bool:
            return gather(leaf.astype(jnp.int8)).astype(bool)
        # As a sum, since the type of a gather says that devices differ.
        return lax.psum(jnp.zeros((count, *leaf.shape), leaf.dtype).at[place].set(leaf), axis_name)

    return jax.tree.map(gather, tree)
