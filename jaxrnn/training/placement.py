"""Where the arrays of training lie: devices divide the rows of every batch among them, or the members of a state."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrnn import check
from jaxrnn.training.processes import agree, agree_on, connected, spread, to_host
from jaxrnn.typing import PyTree

Rules = Mapping[str, PartitionSpec]
WHOLE = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of training lie.

    mesh: the devices, with axes of type Auto, so that a program inside need not say how its arrays are divided.
    given: the mesh as the user made it.
    members: whether the devices divide the members of the state; otherwise they divide the rows of batches.
    params: how each leaf of the params is divided while no step needs it, in the order of `jax.tree.leaves`.
    """

    mesh: Mesh
    given: Mesh
    members: bool = False
    params: tuple[PartitionSpec, ...] = ()

    @property
    def first(self) -> PartitionSpec:
        """The first axis divided over all devices."""
        return PartitionSpec(self.mesh.axis_names)

    @property
    def processes(self) -> int:
        """The number of processes whose devices are in the mesh."""
        return len({device.process_index for device in self.mesh.devices.flat})

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around all that runs here: in place of a mesh that the user has set, and with errors of lost processes."""
        with contextlib.ExitStack() as stack:
            if not jax.sharding.get_abstract_mesh().empty:
                stack.enter_context(jax.set_mesh(self.mesh))
            if self.processes > 1:
                stack.enter_context(connected())
            yield

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def rows(self, size: int) -> PartitionSpec:
        """How `size` rows are divided; a number that the devices do not divide stays whole."""
        return WHOLE if self.members or size % self.mesh.size else self.first

    def specs(self, state: PyTree) -> PyTree:
        """How every leaf of a `TrainState` is divided, with None for its fields of the host."""
        best = state.best
        if self.members:
            every = jax.tree.map(lambda _: self.first, state._replace(data=None))
            numbers = best and every.best._replace(value=WHOLE, step=WHOLE, stale=WHOLE)
            return every._replace(step=WHOLE, stopped=WHOLE, best=numbers)
        params = jax.tree.unflatten(jax.tree.structure(state.params), self.params)
        return state._replace(
            params=params,
            opt_state=_like_params(state.opt_state, state.params, self.params),
            carry=jax.tree.map(lambda leaf: self.rows(leaf.shape[0]), state.carry),
            step=WHOLE,
            key=WHOLE,
            data=None,
            best=best and best._replace(params=params, value=WHOLE, step=WHOLE, stale=WHOLE),
            stopped=WHOLE,
        )

    def put_state(self, state: PyTree) -> PyTree:
        """Places a copy of a state, which must be the same in all processes."""
        bare = state._replace(data=None)
        if self.processes > 1:
            agree_on("state", bare)
        return jax.tree.map(self.put, bare, self.specs(bare))._replace(data=state.data)

    def put_params(self, params: PyTree) -> PyTree:
        """Places params, which must be the same in all processes."""
        if self.processes > 1:
            agree_on("params", params)
        leaves, structure = jax.tree.flatten(params)
        specs = [self.first] * len(leaves) if self.members else self.params
        return structure.unflatten(map(self.put, leaves, specs))

    def put(self, leaf: Any, spec: PartitionSpec) -> jax.Array:
        """Places a copy of an array that every process has whole, or that lies on the mesh already."""
        sharding = self.sharding(spec)
        if self.processes == 1 or spread(leaf):
            return _copy_to(sharding, leaf)
        if _is_key(leaf):
            words = self.put(jax.random.key_data(leaf), spec)
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
        array = _narrow(np.asarray(leaf))
        return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])

    def handed_back(self, state: PyTree) -> PyTree:
        """The state on the mesh as the user made it."""
        if self.given == self.mesh:
            return state

        def back(leaf):
            return _copy_to(NamedSharding(self.given, leaf.sharding.spec), leaf)

        return jax.tree.map(back, state._replace(data=None))._replace(data=state.data)

    def keeps(self, leaf: Any) -> bool:
        """Whether data are used where they lie; what lies in one of several processes is its part, as in NumPy."""
        return isinstance(leaf, jax.Array) and (self.processes == 1 or spread(leaf))

    def put_batches(self, tree: PyTree, axis: int) -> PyTree:
        """Places batches whose rows are along `axis`.

        Of NumPy arrays every process gives its part of the rows; where the devices divide members, all of them.
        """

        def place(leaf):
            if leaf.ndim <= axis:
                return self.put(leaf, WHOLE)
            if self.processes == 1 or spread(leaf):
                return jax.device_put(leaf, self.sharding(self._at(axis, leaf.shape[axis])))
            leaf = _narrow(np.asarray(leaf))
            spec = self._at(axis, leaf.shape[axis] * self.processes)
            if self.members:
                return self.put(leaf, WHOLE)
            if spec != WHOLE:
                return jax.make_array_from_process_local_data(self.sharding(spec), leaf)
            return self.put(_all_parts(leaf, axis), WHOLE)

        return jax.tree.map(place, tree)

    def _at(self, axis: int, size: int) -> PartitionSpec:
        rows = self.rows(size)
        return WHOLE if rows == WHOLE else PartitionSpec(*[None] * axis, *rows)

    def keep(self, state: PyTree) -> PyTree:
        """In a program: the state lies as `specs` says."""
        bare = state._replace(data=None)
        kept = jax.tree.map(self._constrained, bare, self.specs(bare))
        return kept._replace(data=state.data)

    def whole(self, tree: PyTree) -> PyTree:
        """In a program: every device has all of `tree`."""
        return jax.tree.map(lambda leaf: self._constrained(leaf, WHOLE), tree)

    def divided(self, params: PyTree) -> PyTree:
        """In a program: params, or what has their structure, lie as params do."""
        leaves, structure = jax.tree.flatten(params)
        return structure.unflatten(map(self._constrained, leaves, self.params))

    def divided_rows(self, tree: PyTree) -> PyTree:
        """In a program: the rows of batches, or of a carry, are divided."""
        return jax.tree.map(lambda leaf: self._constrained(leaf, self.rows(leaf.shape[0])) if leaf.ndim else leaf, tree)

    def _constrained(self, leaf, spec):
        return lax.with_sharding_constraint(leaf, self.sharding(spec))

    def by_member(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(members, *whole)` of trees with an axis of members first, run by every device for its own."""

        def run(members, *whole):
            specs = (self.first, *[WHOLE] * len(whole))
            return self._mapped(function, specs, self.first)(members, *whole)

        return run

    def by_rows(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(params, carry, batch, *whole) -> (sums, rows)`, run by every device for its own rows.

        Rows are those of carry and batch. The sums are over all devices.
        """

        def device(*arguments):
            sums, rows = function(*arguments)
            return lax.psum(sums, self.mesh.axis_names), rows

        def run(params, carry, batch, *whole):
            specs = (WHOLE, self.first, self.first, *[WHOLE] * len(whole))
            return self._mapped(device, specs, (WHOLE, self.first))(params, carry, batch, *whole)

        return run

    def _mapped(self, function, in_specs, out_specs):
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def on_own_devices(self, params: PyTree) -> tuple[Placement, PyTree]:
        """The placement on this process's devices alone, and params from all of them."""
        if self.processes == 1:
            return self, params
        devices = [device for device in self.mesh.devices.flat if device.process_index == jax.process_index()]
        mesh = Mesh(np.array(devices), ("devices",), axis_types=(AxisType.Auto,))
        return Placement(mesh, mesh, self.members, (WHOLE,) * len(self.params)), to_host(params)


def placement_on(
    mesh: Any, sharding: Rules | None, state: PyTree, params: PyTree, *, members: bool
) -> Placement | None:
    """The placement on `mesh`, None without one; `sharding` are the rules for `params`, and `state` what is placed."""
    if mesh is None:
        if sharding is not None:
            raise ValueError(f"sharding: expected None without a mesh, got {check.brief(sharding)}")
        if spread(state):
            raise ValueError(
                "mesh: expected the mesh on which params lie, since they lie on devices of several processes"
            )
        return None
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f'mesh: expected a jax.sharding.Mesh, as jax.make_mesh((4,), ("rows",)) makes, got {check.brief(mesh)}'
        )
    _check_processes(mesh)
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    if members:
        _check_members(mesh, params)
        if sharding is not None:
            raise ValueError("sharding: expected None for many models, which the devices divide as they are")
        return Placement(auto, mesh, True)
    return Placement(auto, mesh, False, _specs_of(auto, sharding, params))


def _check_processes(mesh: Mesh) -> None:
    owners = [device.process_index for device in mesh.devices.flat]
    if set(owners) == {jax.process_index()}:
        return
    counts = {owners.count(k) for k in range(jax.process_count())}
    if len(counts) > 1:
        raise ValueError(
            f"mesh: expected devices of this process alone, or as many of each of the {jax.process_count()} processes, "
            f"got devices of the processes {owners}"
        )
    agree("mesh", f"{mesh.shape_tuple} of {[device.id for device in mesh.devices.flat]}")


def _check_members(mesh: Mesh, params: PyTree) -> None:
    count = jax.tree.leaves(params)[0].shape[0]
    if count % mesh.size:
        raise ValueError(f"mesh: expected a number of devices that divides the {count} members, got {mesh.size}")


def _specs_of(mesh: Mesh, rules: Rules | None, params: PyTree) -> tuple[PartitionSpec, ...]:
    """How each leaf of the params is divided: by the first rule whose pattern is found in its path.

    Without rules, params that lie on these devices already stay as they are.
    """
    if rules is None:
        return tuple(_present(mesh, leaf) for leaf in jax.tree.leaves(params))
    if not isinstance(rules, Mapping):
        raise TypeError(f"sharding: expected a dict of patterns and PartitionSpecs, got {check.brief(rules)}")
    unused, specs = dict.fromkeys(rules), []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        pattern = next((pattern for pattern in rules if re.search(pattern, name)), None)
        if pattern is None:
            specs.append(WHOLE)
        else:
            unused.pop(pattern, None)
            specs.append(_fitting(mesh, pattern, rules[pattern], name, leaf))
    if unused:
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise ValueError(f"sharding[{next(iter(unused))!r}]: it decides for none of the params, which are {names}")
    return tuple(specs)


def _present(mesh: Mesh, leaf: Any) -> PartitionSpec:
    there = getattr(leaf, "sharding", None)
    if not isinstance(there, NamedSharding) or there.mesh.shape_tuple != mesh.shape_tuple:
        return WHOLE
    return there.spec if (there.mesh.devices == mesh.devices).all() else WHOLE


def _fitting(mesh: Mesh, pattern: str, spec: Any, name: str, leaf: Any) -> PartitionSpec:
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"sharding[{pattern!r}]: expected a jax.sharding.PartitionSpec, got {check.brief(spec)}")
    try:
        NamedSharding(mesh, spec).shard_shape(leaf.shape)
    except ValueError as error:
        raise ValueError(
            f"sharding[{pattern!r}]: {spec} does not divide params{name}, of shape {leaf.shape}, over a mesh of "
            f"{dict(mesh.shape)}; a rule before it, {{{re.escape(name)!r}: PartitionSpec()}}, keeps it whole"
        ) from error
    return spec


def _like_params(opt_state: PyTree, params: PyTree, specs: tuple[PartitionSpec, ...]) -> PyTree:
    """Leaves of an optimizer's state that stand for one of the params are divided as it is: its path ends theirs."""
    known = [
        (path, leaf.shape, spec)
        for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(params), specs, strict=True)
    ]

    def spec_of(path, leaf):
        for end, shape, spec in known:
            if shape == leaf.shape and path[len(path) - len(end) :] == end:
                return spec
        return WHOLE

    return jax.tree_util.tree_map_with_path(spec_of, opt_state)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _copy_to(sharding: NamedSharding, leaf: Any) -> jax.Array:
    """A copy, which `device_put` makes only where it must."""
    if not isinstance(leaf, jax.Array):
        return jax.device_put(np.array(leaf), sharding)
    if not _is_key(leaf):
        return jax.device_put(_under(leaf.sharding, jnp.copy, leaf), sharding)
    words = _under(leaf.sharding, lambda key: jnp.copy(jax.random.key_data(key)), leaf)
    wrap = functools.partial(jax.random.wrap_key_data, impl=jax.random.key_impl(leaf))
    return _under(sharding, wrap, jax.device_put(words, sharding))


def _under(sharding: Any, function: Callable[..., jax.Array], array: jax.Array) -> jax.Array:
    """`function(array)` on the mesh of a sharding, whichever is set."""
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    with jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext():
        return function(array)


def _narrow(array: np.ndarray) -> np.ndarray:
    """In the dtype that JAX gives it, which without x64 has no 64 bits."""
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


def _all_parts(part: np.ndarray, axis: int) -> np.ndarray:
    """The rows of all processes, one after the other along `axis`."""
    from jax.experimental.multihost_utils import process_allgather

    return np.concatenate(list(process_allgather(part)), axis)


@functools.lru_cache(maxsize=16)
def _taking(sharding: NamedSharding) -> Callable:
    return jax.jit(lambda leaf, rows: jnp.take(leaf, rows, axis=0), out_shardings=sharding)


def take_rows(where: Placement, tree: PyTree, rows: np.ndarray) -> PyTree:
    """Rows of arrays that lie on devices, divided over the mesh."""
    return jax.tree.map(_taking(where.sharding(where.rows(len(rows)))), tree, jax.tree.map(lambda _: rows, tree))
