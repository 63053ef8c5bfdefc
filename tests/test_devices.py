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
EXPLICIT = ["lstm", "gru_reset_before", "mgu", "slstm", "min_gru", "lru", "s6", "rg_lru"]
MORE = ["elman", "gru", "indrnn", "lstm_projection_peephole", "min_lstm", "sru", "s5", "hgrn", "conv_lstm_1d", "own"]
MATRIX = [
    "mlstm",
    "kda",
    "delta_product",
    "gla",
    "hgrn2",
    "linear_attention",
    "mamba2",
    "ret_net",
    "rwkv7",
    "matrix_blocks",
]


def full(names):
    return [pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.mark.parametrize(
    "name", [*EXPLICIT[2:5], *MATRIX[:1], *full([*EXPLICIT[:2], *EXPLICIT[5:], *MORE, *MATRIX[1:]])]
)
def test_rows_of_an_explicit_mesh(name):
    """`jax.make_mesh` as it comes: fresh carries and what the engines put out have the rows' sharding."""
    cell = MEMBERS[name]
    params = jax.tree.map(jnp.asarray, draw_params(cell, dtype=np.float32))
    xs = jnp.asarray(draw_x(cell, 3, 4, 2, dtype=np.float32))

    def run(params, xs):
        whole = jaxrnn.scan(cell, params, None, xs)[1]
        flags = {
            "lengths": jnp.array([4, 3]),
            "reset": jnp.zeros((4, 2), bool).at[2, 0].set(True),
        }  # of no device's rows
        parts = jaxrnn.scan(cell, params, None, xs, **flags, reverse=True)[1]
        return (jnp.sin(whole) ** 2).sum() + (jnp.cos(parts) * jnp.sin(parts)).sum()

    both = jax.jit(jax.value_and_grad(run, (0, 1)))
    expected = both(params, xs)
    mesh = jax.make_mesh((1,), ("rows",))
    with jax.set_mesh(mesh):
        divided = jax.device_put(xs, NamedSharding(mesh, PartitionSpec(None, "rows")))
        whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        found = both(whole, divided)
        ys = jax.jit(lambda params, xs: jaxrnn.scan(cell, params, None, xs)[1])(whole, divided)
    assert jax.typeof(ys).sharding.spec[1] == "rows"
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
