"""Programs for a GPU and a TPU that are not here, by their compilers: what a step runs, and what devices exchange."""

import jax
import jax.numpy as jnp
import pytest
from compiled import collectives, inside_loops, kernels_in_loops, loops
from members import MEMBERS, draw_params, draw_x
from targets import absent, compiled

import jaxrnn
from jaxrnn import GRU, LRU, LSTM, MGU, S4D, S6, SLSTM, Elman, GatedDeltaNet, MinGRU

pytestmark = pytest.mark.accelerator
T, B = 24, 8

# Of a training step of one layer, in float32 or bfloat16: the most instructions that an H100 runs at every step of its
# two loops, and a TPU v5e of both.
PINS = {
    "Elman": (Elman(16, 16), [4, 4], 9),
    "LSTM": (LSTM(16, 16), [4, 6], 17),
    "LSTM peephole": (LSTM(16, 16, peephole=True), [4, 6], 21),
    "GRU": (GRU(16, 16), [4, 6], 20),
    "GRU before": (GRU(16, 16, reset_after=False), [6, 9], 23),
    "MGU": (MGU(16, 16), [6, 8], 17),
    "SLSTM": (SLSTM(16, 16, heads=4), [4, 6], 42),
}

# Cells, and the most sums: one of all gradients, and one of complex states.
DIVIDED = [(LSTM(16, 16), 1), (MGU(16, 16), 1), (MinGRU(16, 16), 1), (LRU(16, 16), 2), (GatedDeltaNet(16, 2, 8, 8), 1)]
DIVIDED += [(S6(16, 4), 1), (S4D(16, 4), 1), (SLSTM(16, 16, heads=2), 1), (LSTM(16, 16, peephole=True), 1)]


def needs(target):
    why = absent(target)
    if why is not None:
        pytest.skip(why)


def training(cell, **options):
    def loss(params, xs):
        ys = jaxrnn.scan(cell, params, None, xs, **options)[1]
        return sum((jnp.sin(y) ** 2).sum() for y in jax.tree.leaves(ys))

    return jax.grad(loss, allow_int=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", ["h100", "v5e"])
@pytest.mark.parametrize("name", PINS)
def test_a_gated_cell_trains_in_two_loops(name, target, dtype):
    needs(target)
    cell, each, both = PINS[name]
    params = jax.eval_shape(lambda key: cell.init(key, jnp.dtype(dtype)), jax.random.key(0))
    xs = jax.ShapeDtypeStruct((T, B, 16), dtype)
    text = compiled(target, training(cell), params, (xs, 1)).as_text()
    assert loops(text) == 2
    found = kernels_in_loops(text)
    if target == "h100":
        assert all(count <= most for count, most in zip(found, each, strict=True))
    else:
        assert sum(found) <= both


@pytest.mark.parametrize("target", ["4 h100", "4 v5e"])
@pytest.mark.parametrize(("cell", "sums"), DIVIDED, ids=str)
def test_devices_exchange_gradients_once(cell, sums, target):
    """Rows are divided: gradients are added up after the loops, and nothing is gathered."""
    needs(target)
    params = jax.eval_shape(cell.init, jax.random.key(0))
    xs = jax.ShapeDtypeStruct((T, B, 16), jnp.float32)
    text = compiled(target, training(cell), params, (xs, 1)).as_text()
    assert not any(collectives(inside_loops(text)).values())
    found = collectives(text)
    assert found.pop("all-reduce") <= sums
    assert not any(found.values())


@pytest.mark.parametrize(
    ("name", "products"), [("Elman", 1), ("LSTM", 1), ("LSTM peephole", 1), ("GRU", 1), ("MGU", 2)]
)
def test_devices_exchange_states_of_units(name, products):
    """Columns of weights are divided: a step gathers what a product reads, and sums its cotangent."""
    needs("4 h100")
    cell, *_ = PINS[name]
    params = jax.eval_shape(cell.init, jax.random.key(0))
    xs = jax.ShapeDtypeStruct((T, B, 16), jnp.float32)
    text = compiled("4 h100", training(cell), params, (xs, None), columns=True).as_text()
    found = collectives(inside_loops(text))
    assert found["all-to-all"] == found["collective-permute"] == 0
    assert sum(found.values()) <= 2 * products


@pytest.mark.parametrize("target", ["h100", "v5e"])
@pytest.mark.parametrize("shape", [(128, 4, 256), (70, 3, 5), (1, 600), (65, 2, 3, 130)], ids=str)
def test_a_pallas_kernel_compiles(shape, target):
    """With resets, and its derivatives, which are the same kernel in the other direction."""
    needs(target)

    def loss(_, arrays):
        a, b, reset = arrays
        return jnp.sin(jaxrnn.linear_scan(a, b, reset=reset, implementation="pallas")[1]).sum()

    floats, flags = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:2], bool)
    text = compiled(target, jax.grad(loss, 1, allow_int=True), {}, ((floats, floats, flags), 0)).as_text()
    assert loops(text) == 0
    assert "custom-call" in text


@pytest.mark.parametrize(
    "cell",
    [
        LSTM(16, 512),
        LSTM(16, 5),
        GRU(16, 130),
        GRU(16, 256, reset_after=False),
        *(Elman(16, 16, activation=name) for name in ("tanh", "relu")),
    ],
    ids=str,
)
def test_a_pallas_kernel_of_gates_compiles(cell):
    """With resets, forward and backward: the only loops are those of the two kernels."""
    needs("v5e")

    def loss(params, arrays):
        xs, reset = arrays
        return jnp.sin(jaxrnn.scan(cell, params, None, xs, reset=reset, implementation="pallas")[1]).sum()

    arrays = jax.ShapeDtypeStruct((70, 130, 16), jnp.float32), jax.ShapeDtypeStruct((70, 130), bool)
    params = jax.eval_shape(cell.init, jax.random.key(0))
    text = compiled("v5e", jax.grad(loss), params, (arrays, 1)).as_text()
    assert loops(text) == 0
    assert text.count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize("cell", [S6(16, 4), S4D(16, 4), SLSTM(16, 16, heads=2)], ids=str)
@pytest.mark.parametrize("target", ["h100", "v5e"])
def test_other_cells_compile(cell, target):
    needs(target)
    params = jax.eval_shape(cell.init, jax.random.key(0))
    xs = jax.ShapeDtypeStruct((T, B, 16), jnp.float32)
    assert "jaxrnn_" not in compiled(target, training(cell), params, (xs, 1)).as_text()


@pytest.mark.parametrize("cell", [S4D(128, 16), S6(128, 16)], ids=str)
def test_states_of_channels_take_little_memory(cell):
    """A gradient of 128 steps of 8 rows of 128 channels, beside what cuBLAS takes where S6 multiplies matrices."""
    needs("h100")
    params = jax.eval_shape(cell.init, jax.random.key(0))
    xs = jax.ShapeDtypeStruct((128, 8, 128), jnp.float32)
    memory = compiled("h100", training(cell), params, (xs, 1)).memory_analysis().temp_size_in_bytes
    assert memory <= 10e6 + (33554432 if isinstance(cell, S6) else 0)


@pytest.mark.parametrize("target", ["h100", "4 h100", "v5e"])
@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_compiles(name, target):
    """Forward with its training step, without a kernel of the CPU."""
    needs(target)
    cell = MEMBERS[name]
    params, xs = draw_params(cell), draw_x(cell, 3, 6, 4)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, xs))
    assert 'custom_call_target="jaxrnn_' not in compiled(target, training(cell), shapes[0], (shapes[1], 1)).as_text()
