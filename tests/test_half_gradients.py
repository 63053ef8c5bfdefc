"""Gradients in half precision over long sequences: what is summed over the steps is summed in at least float32."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import CELLS, COMPOSITIONS, LAYERS, LINEAR_OPTIONS, D, H, draw_x, is_floating, redraw

import jaxrnn
from jaxrnn import GRU, LSTM, MGU, Elman, GatedCell, IndRNN

T, B = 2048, 4
DTYPES = [jnp.bfloat16, jnp.float16]
PLAIN = CELLS | LAYERS | LINEAR_OPTIONS
OPTIONS = {
    "lstm_norm": LSTM(D, H, layer_norm=True, peephole=True, coupled=True),
    "lstm_clip": LSTM(D, H, cell_clip=0.7, gate_clip=0.8),
    "gru_norm": GRU(D, H, layer_norm=True),
    "gru_before_norm": GRU(D, H, reset_after=False, layer_norm=True),
    "elman_softsign": Elman(D, H, activation="softsign"),
}
FAST = ("lstm_projection_peephole", "own", "embed")
LOOPS = {"gated_scan": "xla", "linear_scan": "xla", "matrix_scan": "chunked"}  # kernels would compute in float32


# Of S6 the terms of a sum over the steps cancel, and the norm makes this GRU chaotic: with inputs around 0, rounding x
# alone moves the gradients of float32 by more than the bound; those of "everything", five layers deep, by half of it.
# They read inputs around 1, with small gains.
CANCELLING = [PLAIN["s6"], OPTIONS["gru_before_norm"], COMPOSITIONS["everything"]]

# Their y, which nothing bounds, would be so large that its rounding alone moved the gradients by more.
UNBOUNDED = [PLAIN["gla"], PLAIN["ret_net"], PLAIN["mamba2"]]


def draw(cell, dtype):
    """Params small enough for what is long ago to be forgotten, as it must be for float32 to tell the gradient."""
    shapes = jax.eval_shape(lambda key: cell.init(key, jnp.float32), jax.random.key(0))

    def smaller(path, leaf):
        gain = cell in CANCELLING and "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(0.3 * leaf if gain else leaf).astype(dtype)

    return jax.tree_util.tree_map_with_path(smaller, redraw(shapes, 1, 0.25 if cell in UNBOUNDED else 0.4))


def inputs(cell, dtype):
    xs = jax.tree.map(jnp.asarray, draw_x(cell, 3, T, B, dtype=dtype))
    if getattr(cell, "timed", False):  # the last one is the time that passed
        xs = xs.at[..., -1].set(jnp.abs(xs[..., -1]))
    return 1 + xs / 4 if cell in CANCELLING else xs


def widen(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if is_floating(leaf) else leaf, tree)


def gradients(cell, params, xs, **options):
    floating = [leaf for leaf in jax.tree.leaves(xs) if is_floating(leaf)]
    structure = jax.tree.structure(xs)

    @jax.jit
    @jax.grad
    def run(point):
        params, floating = point
        given = iter(floating)
        leaves = [next(given) if is_floating(leaf) else leaf for leaf in jax.tree.leaves(xs)]
        ys = jaxrnn.scan(cell, params, None, jax.tree.unflatten(structure, leaves), **options)[1]
        return sum((jnp.sin(y.astype(jnp.float32)) ** 2).sum() for y in jax.tree.leaves(ys))

    return run((params, floating))


def near(found, expected, bound=0.01):
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < bound, f"{jax.tree_util.keystr(path)}: off by {error:.3f} of its size"


def every(cells):
    return [
        pytest.param(cell, id=name, marks=() if name in FAST else pytest.mark.full)
        for name, cell in cells.items()
        if name not in ("apply", "dropout", "dropout_sequence")
    ]


@pytest.mark.parametrize("dtype", [DTYPES[0], pytest.param(DTYPES[1], marks=pytest.mark.full)], ids=["bf16", "f16"])
@pytest.mark.parametrize("cell", every(PLAIN | OPTIONS))
def test_gradients_of_a_long_sequence(cell, dtype):
    """Of weights, biases, gains and inputs: those of float32 within 1%, by what accelerators run."""
    params = draw(cell, dtype)
    xs = inputs(cell, dtype)
    near(gradients(cell, params, xs, implementation=LOOPS), gradients(cell, widen(params), widen(xs)))


@pytest.mark.parametrize("name", ["lstm_projection_peephole", pytest.param("own", marks=pytest.mark.full)])
def test_with_gradient_checkpointing_and_resets(name):
    cell = CELLS[name]
    params = draw(cell, jnp.bfloat16)
    xs = inputs(cell, jnp.bfloat16)
    reset = np.arange(T * B).reshape(T, B) % 97 == 0
    options = {"reset": reset, "lengths": np.array([T, T - 7, 5, T])}
    found = gradients(cell, params, xs, remat_every=64, implementation=LOOPS, **options)
    near(found, gradients(cell, widen(params), widen(xs), **options))


@pytest.mark.full
@pytest.mark.parametrize("name", ["stack", "bidirectional_stack", "zoneout", "parallel", "everything"])
def test_compositions(name):
    cell = COMPOSITIONS[name]
    params = draw(cell, jnp.bfloat16)
    xs = inputs(cell, jnp.bfloat16)
    near(gradients(cell, params, xs, implementation=LOOPS), gradients(cell, widen(params), widen(xs)), 0.03)


def test_a_rollout_too():
    """A decoder on its own output, whose loop is not `scan`'s."""
    cell = GRU(D, D)
    params = draw(cell, jnp.bfloat16)

    def loss(params):
        x = jnp.ones((B, D), params.w_x.dtype)
        inputs = jnp.sin(jnp.arange(T * B * D, dtype=jnp.float32)).reshape(T, B, D).astype(x.dtype)
        kept = jaxrnn.rollout(cell, params, None, x, T, feedback=lambda y, key, z: (y + z, y), inputs=inputs)[1]
        return (jnp.sin(kept.astype(jnp.float32)) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))
    near(gradient(params), gradient(widen(params)))


class Plain(GatedCell):
    """A user's gated cell, with a gain inside its update and a matrix of gains."""

    size: int
    hidden_size: int

    def init(self, key, dtype=jnp.float32):
        return jaxrnn.elman_init(key, self.size, self.hidden_size, dtype=dtype)

    def initial_carry(self, params, batch_shape=()):
        return jaxrnn.ElmanCarry(self.zeros(params, batch_shape, self.hidden_size))

    def weights(self, params):
        return jaxrnn.GatedWeights(params.w_x, None, params.w_h, None, {"gain": params.b, "mix": params.w_h})

    def update(self, theta, carry, u, v, w):
        h = jnp.tanh(u + v * theta["gain"].reshape((1,) * (v.ndim - 1) + (-1,)) + carry.h @ theta["mix"] / 4)
        return jaxrnn.ElmanCarry(h), h


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_gated_cell_of_ones_own(mode):
    """θ may hold what is no vector; derivatives are those of the loop of steps, in both modes, of second order too."""
    cell = Plain(3, 4)
    params = redraw(cell.init(jax.random.key(0)), 4)
    xs = redraw(jnp.zeros((5, 2, 3)), 5)
    direction = redraw(params, 6)

    def by_scan(params):
        return jnp.sin(jaxrnn.scan(cell, params, None, xs)[1]).sum()

    def by_steps(params):
        carry, total = cell.initial_carry(params, (2,)), 0.0
        for x in xs:
            carry, y = cell.step(params, carry, x)
            total = total + jnp.sin(y).sum()
        return total

    def derivatives(value):
        first = jax.grad(value)
        if mode == "reverse":
            return first(params), jax.grad(lambda p: sum(map(jnp.vdot, first(p), direction)))(params)
        slope = lambda p: jax.jvp(value, (p,), (direction,))[1]
        return slope(params), jax.jvp(slope, (params,), (direction,))[1]

    found, expected = (jax.jit(lambda value=value: derivatives(value))() for value in (by_scan, by_steps))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-4, 2e-5), found, expected)


@pytest.mark.parametrize("cell", [LSTM(3, 5), MGU(3, 5)], ids=str)
def test_a_narrower_carry_rounds_no_output_of_a_derivative(cell):
    """A carry in bfloat16 between outputs in float32: what is kept of the steps for the derivative is the carry."""
    params, xs = redraw(cell.init(jax.random.key(0)), 1), jax.random.normal(jax.random.key(2), (7, 2, 3))
    carry = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), cell.initial_carry(params, (2,)))

    def outputs(params):
        return jaxrnn.scan(cell, params, carry, xs, implementation=LOOPS)[1]

    np.testing.assert_array_equal(jax.vjp(outputs, params)[0], outputs(params))


@jax.custom_vjp
def spike(x):
    return (x > 0).astype(x.dtype)


spike.defvjp(lambda x: (spike(x), x), lambda x, d: (d / (1 + jnp.abs(x)) ** 2,))


class Spiking(Plain):
    """A unit that fires, with a surrogate for the derivative that it does not have."""

    def update(self, theta, carry, u, v, w):
        h = 0.9 * carry.h + 0.1 * spike(u + v)
        return jaxrnn.ElmanCarry(h), h


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_an_update_with_a_derivative_of_its_own(batch):
    cell = Spiking(3, 4)
    params, xs = redraw(cell.init(jax.random.key(0)), 4), redraw(jnp.zeros((5, *batch, 3)), 5)

    def by_steps(params):
        carry, total = cell.initial_carry(params, batch), 0.0
        for x in xs:
            carry, y = cell.step(params, carry, x)
            total = total + jnp.sin(y).sum()
        return total

    found = jax.grad(lambda params: jnp.sin(jaxrnn.scan(cell, params, None, xs)[1]).sum())(params)
    assert jnp.abs(found.w_h).max() > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), found, jax.grad(by_steps)(params))


def test_a_gradient_of_weights_is_one_product_after_the_loop():
    """Nothing of the size of a weight is carried from step to step in the backward pass."""
    # The weights of the recurrent products, of this size, are read there; no sum of their cotangents is.
    for cell, size, read in ((LSTM(5, 7, peephole=True), "7x4x7", 1), (MGU(5, 7), "7x7", 2), (IndRNN(5, 7), "5x7", 0)):
        params = cell.init(jax.random.key(0))
        run = jax.jit(
            jax.grad(
                lambda p, cell=cell: jaxrnn.scan(cell, p, None, jnp.ones((11, 3, 5)), implementation="xla")[1].sum()
            )
        )
        text = run.lower(params).as_text()
        loops = [line for line in text.splitlines() if "stablehlo.while" in line]
        assert len(loops) == 2
        assert loops[1].count(f"tensor<{size}xf32>") == read, f"{cell}: {loops[1]}"


AS_USERS_COMPILE = """
import jax, jax.numpy as jnp, jaxrnn
for cell in (jaxrnn.SLSTM(8, 64, heads=4), jaxrnn.RGLRU(64, blocks=4)):
    params = cell.init(jax.random.key(0), jnp.bfloat16)
    xs = jnp.ones((50, 8, cell.input_size), jnp.bfloat16)
    loss = lambda params: jaxrnn.scan(cell, params, None, xs, implementation="xla")[1].astype(jnp.float32).sum()
    jax.block_until_ready(jax.jit(lambda params: (jax.grad(loss)(params), jax.jvp(loss, (params,), (params,))))(params))
    jax.block_until_ready(jax.jit(lambda params, x: jaxrnn.step(cell, params, None, x))(params, xs[0]))
"""


def test_products_by_block_run_as_users_compile():
    """Without the flags of these tests, XLA on the CPU has no product of bfloat16 by block."""
    run = [sys.executable, "-c", AS_USERS_COMPILE]
    subprocess.run(run, check=True, env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}, timeout=300)
