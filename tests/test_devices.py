"""Beyond one device: rows, members and weights that a mesh divides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import collectives, inside_loops, loops
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from members import MEMBERS, draw_params, draw_x, floats

import jaxrnn

# What reads x by its own index, and what has time among its rows.
UNDIVIDED = ["two_inputs"]
FEW = ["lstm", "mgu", "min_gru"]
SOME = ["gru", "min_gru", "mlstm", "stack", "zoneout"]


def full(names):
    return [pytest.param(name, marks=pytest.mark.full) for name in names]


# Whose loops, of any function of a step, add up gradients of weights among devices at every step.
SUMMED_IN_LOOPS = ["conv_lstm_1d", "conv_lstm_2d", "conv_lstm_3d", "own", "two_inputs", "bidirectional_callable"]
SUMMED_IN_LOOPS += ["emit_carry", "zoneout_own", "zoneout_stack", "recurrent_dropout_conv", "pool_conv"]


def mesh_of(axes, kind=AxisType.Auto):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def put(tree, mesh, *spec):
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec))), tree)


@pytest.fixture
def x64():
    """float64, since two devices add in another order than one, and sums that cancel lose digits."""
    with jax.enable_x64(True):
        yield


def drawn(cell, *sizes, dtype=np.float32):
    return (
        jax.tree.map(jnp.asarray, each) for each in (draw_params(cell, dtype=dtype), draw_x(cell, *sizes, dtype=dtype))
    )


def agree(found, expected):
    for a, b in zip(floats(found), floats(expected), strict=True):
        np.testing.assert_allclose(a, b, 1e-4, 1e-5)


def compared(function, arrays, divided):
    """The text of the compiled programs of one device and of several, whose results agree."""
    one, several = (jax.jit(function).lower(*each).compile() for each in (arrays, divided))
    agree(several(*divided), one(*arrays))
    return one.as_text(), several.as_text()


@pytest.mark.parametrize("name", [*FEW, *full(name for name in MEMBERS if name not in FEW)])
def test_rows_divided_by_jit(name):
    """The kernels run on every device, which then add up the gradients of weights once."""
    cell = MEMBERS[name]
    params, xs = drawn(cell, 3, 5, 4)
    reset, lengths = jnp.zeros((5, 4), bool).at[2, 0].set(True), jnp.arange(4) + 2

    def run(params, xs, reset, lengths):
        whole = jaxrnn.scan(cell, params, None, xs, reset=reset, key=jax.random.key(0))[1]
        parts = jaxrnn.scan(cell, params, None, xs, lengths=lengths, reverse=cell.causal)[1]
        return sum((jnp.sin(y) ** 2).sum() for y in jax.tree.leaves((whole, parts)))

    mesh = mesh_of({"rows": 2})
    divided = (
        put(params, mesh), put(xs, mesh, None, "rows"), put(reset, mesh, None, "rows"), put(lengths, mesh, "rows")
    )  # fmt: skip
    gradient = jax.value_and_grad(run, allow_int=True)
    one, several = compared(gradient, (params, xs, reset, lengths), divided)
    assert loops(several) == loops(one)
    assert sum(collectives(several).values()) <= 3 or "repeat" in name
    if name not in SUMMED_IN_LOOPS:
        assert not any(collectives(inside_loops(several)).values())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "name", ["bidirectional", "s4d", *full(["lstm", "mgu", "slstm", "min_gru", "lru", "s6", "kda"])]
)
def test_members_divided_by_jit(name, shared):
    """Each device trains its own models, and none waits for another one."""
    cell, count = MEMBERS[name], 4
    params, xs = drawn(cell, 5, 8, 3)
    params = jax.tree.map(lambda leaf: jnp.stack([leaf * (1 + k / 8) for k in range(count)]), params)
    xs = xs if shared else jnp.stack([xs * (1 + k / 8) for k in range(count)])

    def run(params, xs):
        reset = jnp.zeros((8, 3), bool).at[2, 0].set(True)
        return (jnp.sin(jaxrnn.scan(cell, params, None, xs, reset=reset)[1]) ** 2).sum()

    mesh = mesh_of({"members": 2})
    gradients = jax.vmap(jax.value_and_grad(run, (0, 1)), (0, None if shared else 0))
    divided = put(params, mesh, "members"), put(xs, mesh, *[] if shared else ["members"])
    _, several = compared(gradients, (params, xs), divided)
    assert loops(several) == 0
    assert not any(collectives(several).values())


@pytest.mark.parametrize("kind", [AxisType.Auto, *full([AxisType.Explicit])])
@pytest.mark.parametrize("name", ["gru", *full(["lstm", "bidirectional", "mgu", "min_gru", "s6", "gated_delta_net"])])
@pytest.mark.parametrize("implementation", [None, "native"])
def test_weights_divided_by_jit(name, kind, implementation):
    """Weights in parts on two devices, rows on two: weights are gathered, xs is not."""
    cell = MEMBERS[name]
    params, xs = drawn(cell, 3, 5, 4)

    def run(params, xs):
        return (jnp.sin(jaxrnn.scan(cell, params, None, xs, implementation=implementation)[1]) ** 2).sum()

    def of(leaf):
        at = next((k for k, size in enumerate(leaf.shape) if size % 2 == 0), None)
        return () if at is None or kind is AxisType.Explicit else (*[None] * at, "units")

    mesh = mesh_of({"rows": 2, "units": 2}, kind)
    with jax.set_mesh(mesh):  # also for what is on one device: every device then computes all of it
        divided = jax.tree.map(lambda leaf: put(leaf, mesh, *of(leaf)), params), put(xs, mesh, None, "rows")
        one, several = compared(jax.value_and_grad(run), (params, xs), divided)
    assert loops(one) == loops(several) == 0
    assert f"f32[{','.join(map(str, xs.shape))}]" not in "".join(
        line for line in several.splitlines() if "all-gather(" in line
    )


# Gated cells with an even number of units, and how many products of a step read the state.
GATED: dict[str, tuple[jaxrnn.Cell, int]] = {
    "elman": (jaxrnn.Elman(3, 4), 1),
    "gru": (jaxrnn.GRU(3, 4), 1),
    "gru_reset_before": (jaxrnn.GRU(3, 4, reset_after=False), 2),
    "lstm": (jaxrnn.LSTM(3, 4), 1),
    "lstm_coupled": (jaxrnn.LSTM(3, 4, coupled=True, peephole=True), 1),
    "lstm_projection": (jaxrnn.LSTM(3, 4, projection_size=2), 2),
    "mgu": (jaxrnn.MGU(3, 4), 2),
    "recurrent_dropout": (jaxrnn.RecurrentDropout(jaxrnn.LSTM(3, 4), 0.3), 1),
    "zoneout": (jaxrnn.Zoneout(jaxrnn.GRU(3, 4), 0.2), 1),
}


def trained_by_columns(cell, implementation, *rows):
    """The text of a training step on devices that divide the columns of weights, and `rows` of xs."""
    params, xs = drawn(cell, 3, 5, 4, dtype=np.float64)

    def run(params, xs):
        return (jnp.sin(jaxrnn.scan(cell, params, None, xs, implementation=implementation)[1]) ** 2).sum()

    mesh = mesh_of({"units": 2})
    columns = jax.tree.map(lambda leaf: put(leaf, mesh, *[None] * (leaf.ndim - 1), "units"), params)
    _, several = compared(jax.value_and_grad(run), (params, xs), (columns, put(xs, mesh, *rows)))
    assert loops(several) == 2
    return several


@pytest.mark.usefixtures("x64")  # in which a mesh that nobody names is not known to kernels, and XLA's programs run
@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("name", ["gru", *full(name for name in GATED if name != "gru")])
def test_units_divided_by_jit(name, implementation):
    """Every device has its units of all gates: the state is gathered at a step, and its cotangent summed."""
    cell, products = GATED[name]
    inside = collectives(inside_loops(trained_by_columns(cell, implementation)))
    assert inside["all-gather"] + inside["all-reduce"] + inside["reduce-scatter"] <= 2 * products
    assert inside["all-to-all"] == inside["collective-permute"] == 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", ["xla", *full([None])])
@pytest.mark.parametrize("name", ["lstm", *full(["gru", "gru_reset_before", "mgu", "lstm_coupled"])])
def test_rows_and_columns_divided_by_jit(name, implementation):
    """The same devices divide rows and the columns of weights, which are gathered once."""
    cell, _ = GATED[name]
    assert not any(collectives(inside_loops(trained_by_columns(cell, implementation, None, "units"))).values())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [*SOME, *full(name for name in MEMBERS if name not in (*SOME, *UNDIVIDED))])
@pytest.mark.parametrize("devices", [2, *full([1])])
def test_rows_of_an_explicit_mesh(name, devices):
    """`jax.make_mesh` as it comes: fresh carries, noise and what the engines put out have the rows' sharding."""
    cell = MEMBERS[name]
    params, xs = drawn(cell, 3, 4, 2, dtype=np.float64)
    key = jax.random.key(0)

    def run(params, xs):
        whole = jaxrnn.scan(cell, params, None, xs, key=key)[1]
        reset = jnp.zeros((4, 2), bool).at[2, 0].set(True)  # of no device's rows
        parts = jaxrnn.scan(cell, params, None, xs, reset=reset, lengths=jnp.array([4, 3]), reverse=cell.causal)[1]
        return sum((jnp.sin(y) ** 2).sum() for y in jax.tree.leaves((whole, parts)))

    both = jax.jit(jax.value_and_grad(run, (0, 1), allow_int=True))
    expected = both(params, xs)
    mesh = mesh_of({"rows": devices}, AxisType.Explicit)
    with jax.set_mesh(mesh):
        whole, divided = put(params, mesh), put(xs, mesh, None, "rows")
        found = both(whole, divided)
        ys = jax.jit(lambda params, xs: jaxrnn.scan(cell, params, None, xs)[1])(whole, divided)
    at = 0 if cell.ends_time else 1
    assert all(jax.typeof(y).sharding.spec[at] == "rows" for y in jax.tree.leaves(ys))
    agree(found, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["gru", *full(name for name in MEMBERS if name not in ("gru", *UNDIVIDED))])
def test_params_that_were_put_on_no_mesh(name):
    """As `init` returns them; XLA's program, beside rows of an explicit mesh."""
    cell = MEMBERS[name]
    params, xs = drawn(cell, 3, 4, 2, dtype=np.float64)
    loops = {"gated_scan": "xla", "linear_scan": "xla", "matrix_scan": "xla"}

    def run(params, xs):
        ys = jaxrnn.scan(cell, params, None, xs, implementation=loops)[1]
        return sum((jnp.sin(y) ** 2).sum() for y in jax.tree.leaves(ys))

    both = jax.jit(jax.value_and_grad(run, (0, 1), allow_int=True))
    expected = both(params, xs)
    mesh = mesh_of({"rows": 2}, AxisType.Explicit)
    with jax.set_mesh(mesh):
        found = both(params, put(xs, mesh, None, "rows"))
    agree(found, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check_vma", [True, *full([False])])
@pytest.mark.parametrize("name", ["zoneout", *full(name for name in MEMBERS if name != "zoneout")])
def test_rows_of_a_shard_map(name, check_vma):
    """Every device runs its rows; gradients of params are summed over devices."""
    cell = MEMBERS[name]
    params, xs = drawn(cell, 3, 4, 2, dtype=np.float64)
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

    mesh = mesh_of({"rows": 2})
    rows = PartitionSpec(None, "rows")
    specs = PartitionSpec(), rows, rows, PartitionSpec("rows")
    mapped = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check_vma)
    found, expected = (jax.jit(each)(params, xs, reset, lengths) for each in (mapped, gradient))
    agree(found, expected)
