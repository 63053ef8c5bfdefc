"""Beyond one device and one process: meshes whose types say how rows are divided, programs written to files."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from members import CELLS, COMPOSITIONS, LAYERS, MEMBERS, OwnParams, Pair, draw_params, draw_x, floats

import jaxrnn

for _own in (OwnParams, Pair):  # as a user does
    jax.export.register_namedtuple_serialization(_own, serialized_name=f"tests.{_own.__name__}")
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


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("lstm", "bidirectional") else [pytest.mark.full])
        for name in (*CELLS, *LAYERS, *COMPOSITIONS)
    ],
)
def test_a_program_is_written_and_read(name):
    """Params and carries of every type go through `jax.export`, without a kernel."""
    pytest.importorskip("flatbuffers")  # in which JAX writes programs, and which it does not bring
    cell = MEMBERS[name]
    params = jax.tree.map(jnp.asarray, draw_params(cell, dtype=np.float32))
    xs = jax.tree.map(jnp.asarray, draw_x(cell, 3, 4, 2, dtype=np.float32))
    run = jax.jit(lambda params, xs: jaxrnn.scan(cell, params, None, xs, implementation="xla"))
    written = jax.export.export(run)(params, xs).serialize()
    found = jax.export.deserialize(written).call(params, xs)
    for a, b in zip(floats(found), floats(run(params, xs)), strict=True):
        np.testing.assert_allclose(a, b, 1e-6, 1e-6)


@pytest.mark.parametrize("name", ["gru", "min_gru", *full(["lstm", "elman", "mgu", "lru", "stack", "classifier"])])
def test_a_batch_of_any_size(name):
    """Kernels take numbers for sizes, so XLA's form runs by itself."""
    cell = MEMBERS[name]
    params = jax.tree.map(jnp.asarray, draw_params(cell, dtype=np.float32))
    xs = jax.tree.map(jnp.asarray, draw_x(cell, 3, 4, 3, dtype=np.float32))
    run = jax.jit(lambda params, xs: jaxrnn.scan(cell, params, None, xs)[1])
    (rows,) = jax.export.symbolic_shape("rows")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0], rows, *x.shape[2:]), x.dtype), xs)
    found = jax.export.export(run)(params, shapes).call(params, xs)
    np.testing.assert_allclose(found, run(params, xs), 1e-5, 1e-6)


def test_a_named_kernel_of_any_size_is_refused():
    cell = MEMBERS["gru"]
    (rows,) = jax.export.symbolic_shape("rows")
    shapes = cell.init(jax.random.key(0)), jax.ShapeDtypeStruct((4, rows, 2), jnp.float32)
    run = jax.jit(lambda params, xs: jaxrnn.scan(cell, params, None, xs, implementation="native"))
    with pytest.raises(ValueError, match="the kernels take shapes of numbers"):
        jax.export.export(run)(*shapes)
