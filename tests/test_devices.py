"""Beyond one device: meshes whose types say how rows are divided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from members import MEMBERS, draw_params, draw_x, floats

import jaxrnn

# What reads x by its own index, and what has time among its rows.
UNDIVIDED = ["two_inputs", "repeat", "pool_repeat"]
SOME = ["gru", "min_gru", "mlstm", "stack", "zoneout"]


def full(names):
    return [pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.mark.parametrize("name", [*SOME, *full(name for name in MEMBERS if name not in (*SOME, *UNDIVIDED))])
def test_rows_of_an_explicit_mesh(name):
    """`jax.make_mesh` as it comes: fresh carries, noise and what the engines put out have the rows' sharding."""
    cell = MEMBERS[name]
    params = jax.tree.map(jnp.asarray, draw_params(cell, dtype=np.float32))
    xs = jax.tree.map(jnp.asarray, draw_x(cell, 3, 4, 2, dtype=np.float32))
    key = jax.random.key(0)

    def run(params, xs):
        whole = jaxrnn.scan(cell, params, None, xs, key=key)[1]
        reset = jnp.zeros((4, 2), bool).at[2, 0].set(True)  # of no device's rows
        parts = jaxrnn.scan(cell, params, None, xs, reset=reset, lengths=jnp.array([4, 3]), reverse=cell.causal)[1]
        return sum((jnp.sin(y) ** 2).sum() for y in jax.tree.leaves((whole, parts)))

    both = jax.jit(jax.value_and_grad(run, (0, 1), allow_int=True))
    expected = both(params, xs)
    mesh = jax.make_mesh((1,), ("rows",))
    with jax.set_mesh(mesh):
        divided = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "rows"))), xs)
        whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        found = both(whole, divided)
        ys = jax.jit(lambda params, xs: jaxrnn.scan(cell, params, None, xs)[1])(whole, divided)
    at = 0 if cell.ends_time else 1
    assert all(jax.typeof(y).sharding.spec[at] == "rows" for y in jax.tree.leaves(ys))
    for a, b in zip(floats(found), floats(expected), strict=True):
        np.testing.assert_allclose(a, b, 1e-4, 1e-5)


@pytest.mark.parametrize("check_vma", [True, *full([False])])
@pytest.mark.parametrize("name", ["zoneout", *full(name for name in MEMBERS if name != "zoneout")])
def test_rows_of_a_shard_map(name, check_vma):
    """Every device runs its rows; gradients of params are summed over devices."""
    cell = MEMBERS[name]
    params = jax.tree.map(jnp.asarray, draw_params(cell, dtype=np.float32))
    xs = jax.tree.map(jnp.asarray, draw_x(cell, 3, 4, 2, dtype=np.float32))
    reset, lengths = jnp.zeros((4, 2), bool).at[2, 0].set(True), jnp.array([4, 3])

    def run(params, xs, reset, lengths):
        whole = jaxrnn.scan(cell, params, None, xs, reset=reset)[1]
        parts = jaxrnn.scan(cell, params, None, xs, lengths=lengths, reverse=cell.causal)[1]
        return sum((jnp.sin(y) ** 2).sum() for y in jax.tree.leaves((whole, parts)))

    gradient = jax.grad(run, allow_int=True)

    def part(*arrays):
        def summed(leaf):  # which a gradient of what does not vary is already
            return leaf if check_vma or not jnp.issubdtype(leaf.dtype, jnp.inexact) else jax.lax.psum(leaf, "rows")

        return jax.tree.map(summed, gradient(*arrays))

    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec(None, "rows")
    specs = PartitionSpec(), rows, rows, PartitionSpec("rows")
    mapped = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check_vma)
    found, expected = (jax.jit(each)(params, xs, reset, lengths) for each in (mapped, gradient))
    for a, b in zip(floats(found), floats(expected), strict=True):
        np.testing.assert_allclose(a, b, 1e-4, 1e-5)
