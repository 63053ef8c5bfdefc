"""Analysis: what can be solved on paper, what an independent computation gives, and figures that hold the data."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import MEMBERS, Own, draw_carry, draw_params, draw_x, floats, some_members, weighted_sum

import jaxrnn
from jaxrnn import (
    GRU,
    LSTM,
    MGU,
    Bidirectional,
    Cell,
    Elman,
    ElmanParams,
    Embed,
    GRUGates,
    IndRNN,
    IndRNNParams,
    LearnedCarry,
    Linear,
    LSTMCarry,
    LSTMGates,
    Pool,
    Stack,
    WeightDrop,
    Zoneout,
)
from jaxrnn.analysis import (
    STYLE,
    GradientFlow,
    JacobianSpectrum,
    LyapunovSpectrum,
    MemoryLength,
    Saturation,
    TrainingMemory,
    gate_saturation,
    gradient_flow,
    lyapunov_exponents,
    memory_length,
    plot_gate_saturation,
    plot_gradient_flow,
    plot_lyapunov_exponents,
    plot_memory_length,
    plot_singular_values,
    plot_training_memory,
    singular_values,
    training_memory,
)
from jaxrnn.analysis.observation import as_real, from_real

X64 = True

# h' = a h + x
A = 0.7
LEAK = IndRNN(1, 1, activation="identity")
LEAK_PARAMS = IndRNNParams(w_x=np.ones((1, 1)), w_h=np.array([A]), b=None)


def linear(matrix):
    """h' = h A + x, as an Elman network."""
    size = len(matrix)
    return Elman(size, size, activation="identity"), ElmanParams(np.eye(size), np.array(matrix), None)


def rotation(angle, scale):
    return scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


class Logistic(Cell):
    """c' = 4 c (1 − c), whose Lyapunov exponent is log 2, with a number that is not floating beside it."""

    def init(self, key, dtype=jnp.float32):
        return ()

    def initial_carry(self, params, batch_shape=()):
        return {"c": jnp.full(batch_shape, 0.3), "n": jnp.zeros(batch_shape, jnp.int32)}

    def step(self, params, carry, x, noise=None):
        c = carry["c"] + x[..., 0]
        return {"c": 4 * c * (1 - c), "n": carry["n"] + 1}, c


class Complex(Cell):
    """c' = λ c + x, complex."""

    def init(self, key, dtype=jnp.complex128):
        return jnp.array([0.3 + 0.4j, 2j], dtype)

    def initial_carry(self, params, batch_shape=()):
        return jnp.zeros((*batch_shape, 2), params.dtype)

    def step(self, params, carry, x, noise=None):
        carry = params * carry + x
        return carry, carry.real


# gradient flow


def test_gradient_of_a_leaky_integrator():
    xs = np.ones((6, 4, 1))
    xs[4:, 1] = np.nan
    reset = np.zeros((6, 4), bool)
    reset[2, 3] = True
    marks = {"lengths": np.array([6, 4, 0, 6]), "reset": reset}
    t = np.arange(6)
    expected = np.stack(
        [A ** (6 - t), np.where(t < 4, A ** (4.0 - t), 0), 0.0 * t, np.where(t < 2, 0, A ** (6 - t))], axis=1
    )
    flow = gradient_flow(LEAK, LEAK_PARAMS, None, xs, lambda carry, ys: carry.h.sum(), **marks)
    np.testing.assert_allclose(flow.norms.h, expected, 1e-12)
    np.testing.assert_allclose(flow.total, expected, 1e-12)
    assert flow.loss == jaxrnn.scan(LEAK, LEAK_PARAMS, None, xs, **marks)[0].h.sum()

    back = [A ** (t + 1.0), np.where(t < 4, A ** (t + 1.0), 0), 0.0 * t, np.where(t < 2, A ** (t + 1.0), 0)]
    flow = gradient_flow(LEAK, LEAK_PARAMS, None, xs, lambda carry, ys: carry.h.sum(), reverse=True, **marks)
    np.testing.assert_allclose(flow.total, np.stack(back, axis=1), 1e-12)

    batch_first = {"lengths": marks["lengths"], "reset": reset.T, "time_axis": 1}
    flow = gradient_flow(LEAK, LEAK_PARAMS, None, xs.swapaxes(0, 1), lambda carry, ys: ys[:, -1].sum(), **batch_first)
    np.testing.assert_allclose(flow.total[:, 0], expected[:, 0], 1e-12)
    np.testing.assert_array_equal(flow.total[:, 1:3], 0)  # their last output is padding


def test_gradients_that_vanish_beyond_the_square_root_of_the_smallest_number():
    with jax.enable_x64(False):
        params = jax.tree.map(jnp.float32, LEAK_PARAMS._replace(w_h=np.array([1e-6])))
        flow = gradient_flow(LEAK, params, None, np.ones((5, 1), np.float32), lambda carry, ys: carry.h.sum())
        np.testing.assert_allclose(flow.total, [1e-30, 1e-24, 1e-18, 1e-12, 1e-6], 1e-5)
        assert flow.total.dtype == jnp.float32


def test_gradient_of_a_stack_is_that_of_the_rest_of_the_sequence():
    cell, t = Stack((GRU(2, 3), Linear(3, 2), LSTM(2, 4))), 2
    params, xs = draw_params(cell), draw_x(cell, 3, 5, 6)
    carry = draw_carry(cell, params, 6)
    flow = jax.jit(lambda xs: gradient_flow(cell, params, carry, xs, lambda *results: weighted_sum(results)))(xs)
    assert flow.norms[1] == ()
    assert flow.norms[2].c.shape == flow.total.shape == (5, 6)

    middle, early = jaxrnn.scan(cell, params, carry, xs[:t])

    @jax.jit
    def rest(middle):
        end, late = jaxrnn.scan(cell, params, middle, xs[t:])
        return weighted_sum((end, jnp.concatenate([early, late])))

    gradient = jax.grad(rest)(middle)
    for norm, leaf in zip(jax.tree.leaves(flow.norms), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(norm[t], np.linalg.norm(leaf, axis=-1), 1e-10)
    np.testing.assert_allclose(flow.loss, rest(middle), 1e-12)
    np.testing.assert_allclose(flow.total[t], np.sqrt(sum(n[t] ** 2 for n in jax.tree.leaves(flow.norms))), 1e-12)
    step = jax.tree.map(lambda leaf: 1e-6 * np.ones_like(leaf), middle)
    difference = rest(jax.tree.map(jnp.add, middle, step)) - rest(jax.tree.map(jnp.subtract, middle, step))
    np.testing.assert_allclose(difference / 2e-6, sum(leaf.sum() for leaf in jax.tree.leaves(gradient)), 1e-6)


def test_gradient_in_both_directions():
    cell = LearnedCarry(Bidirectional(Own(3), WeightDrop(LSTM(2, 4), 0.5)))
    params, xs, key = draw_params(cell), draw_x(cell, 3, 5), jax.random.key(3)
    carry = cell.initial_carry(params)

    def loss(carry):
        return weighted_sum(jaxrnn.scan(cell, params, carry, xs, key=key))

    flow = jax.jit(lambda xs: gradient_flow(cell, params, None, xs, lambda *ends: weighted_sum(ends), key=key))(xs)
    value, gradient = jax.jit(jax.value_and_grad(loss))(carry)
    np.testing.assert_allclose(flow.loss, value, 1e-12)
    np.testing.assert_allclose(flow.norms.forward[0], np.linalg.norm(gradient.forward), 1e-10)
    np.testing.assert_allclose(flow.norms.backward.h[-1], np.linalg.norm(gradient.backward.h), 1e-10)
    np.testing.assert_allclose(flow.norms.backward.c[-1], np.linalg.norm(gradient.backward.c), 1e-10)


def test_gradient_through_backward():
    cell = jaxrnn.Backward(GRU(2, 3))
    params, xs = draw_params(cell), draw_x(cell, 3, 5)
    flow = gradient_flow(cell, params, None, xs, lambda *ends: weighted_sum(ends))
    gradient = jax.grad(lambda carry: weighted_sum(jaxrnn.scan(cell, params, carry, xs)))(cell.initial_carry(params))
    np.testing.assert_allclose(flow.norms.h[-1], np.linalg.norm(gradient.h), 1e-10)


def test_what_runs_beside_one_another_is_seen():
    cell = jaxrnn.griffin_block(4, 3)
    params, xs = draw_params(cell), draw_x(cell, 3, 5)
    flow = gradient_flow(cell, params, None, xs, lambda *ends: weighted_sum(ends))
    loss = jax.grad(lambda carry: weighted_sum(jaxrnn.scan(cell, params, carry, xs)), allow_int=True)
    gradient = loss(cell.initial_carry(params))
    convolution, recurrence = flow.norms[0][0][1:]
    np.testing.assert_allclose(recurrence.h[0], np.linalg.norm(gradient[0][0][2].h), 1e-10)
    np.testing.assert_allclose(convolution.window[0], np.linalg.norm(gradient[0][0][1].window), 1e-10)


@some_members("two_inputs", "classifier", "zoneout_own")
def test_looking_changes_no_number(cell):
    if not jax.tree.leaves(jax.eval_shape(cell.initial_carry, draw_params(cell))):
        pytest.skip("it has no carry")
    params, xs, key = draw_params(cell), draw_x(cell, 3, 5, 4), jax.random.key(3)
    marks = {"lengths": np.array([5, 0, 3, 2]), "key": key}
    if "Pool" not in repr(cell):
        marks["reset"] = np.arange(20).reshape(5, 4) % 7 == 3
    flow = jax.jit(lambda xs: gradient_flow(cell, params, None, xs, lambda *ends: weighted_sum(ends), **marks))(xs)
    expected = jax.jit(lambda xs: weighted_sum(jaxrnn.scan(cell, params, None, xs, **marks)))(xs)
    np.testing.assert_allclose(flow.loss, expected, 1e-12)
    total = np.asarray(flow.total)
    assert total.shape == (5, 4)
    assert np.isfinite(total).all()
    assert total[:, 0].any()
    assert not total[:, 1].any()
    assert len(jax.tree.leaves(flow.norms)) == len(floats(jax.tree.leaves(flow.norms)))


def test_analysis_under_jit_and_vmap():
    def both(a, xs):
        params = LEAK_PARAMS._replace(w_h=a)
        flow = gradient_flow(LEAK, params, None, xs, lambda carry, ys: carry.h.sum())
        return flow.total, lyapunov_exponents(LEAK, params, None, xs).exponents

    a = np.array([[0.5], [2.0]])
    total, exponents = jax.jit(jax.vmap(both, in_axes=(0, None)))(a, np.ones((4, 1)))
    np.testing.assert_allclose(total, a ** np.arange(4, 0, -1), 1e-12)
    np.testing.assert_allclose(exponents, np.log(a), 1e-12)


def test_an_empty_sequence_and_a_narrow_one():
    with jax.enable_x64(False):
        cell = MGU(2, 3)
        params = draw_params(cell, dtype=jnp.bfloat16)

        @jax.jit
        def all_of(xs):
            return (
                gradient_flow(cell, params, None, xs, lambda carry, ys: carry.h.sum()).total,
                singular_values(cell, params, None, xs).singular_values,
                lyapunov_exponents(cell, params, None, xs),
            )

        for length in (0, 2):
            total, values, spectrum = all_of(draw_x(cell, 3, length, 4, dtype=jnp.bfloat16))
            assert (total.shape, total.dtype) == ((length, 4), jnp.float32)
            assert (values.shape, values.dtype) == ((length, 4, 3), jnp.float32)
            assert spectrum.steps.tolist() == [length] * 4
            assert np.isfinite(spectrum.exponents).all()


# Jacobians


def test_singular_values_of_a_linear_map():
    matrix = np.array([[0.0, 3.0, 0.0], [0.1, 0.0, 0.0], [0.0, 0.0, -0.5]])
    cell, params = linear(matrix)
    mask = np.array([[True, True], [False, True], [True, True], [True, False]])
    spectrum = singular_values(cell, params, None, np.ones((4, 2, 3)), mask=mask)
    np.testing.assert_allclose(spectrum.singular_values, mask[..., None] * np.array([3, 0.5, 0.1]), 1e-12, 1e-15)
    np.testing.assert_array_equal(spectrum.valid, mask)


def test_singular_values_along_a_trajectory():
    cell, t = LSTM(2, 3), 2
    params, xs = draw_params(cell), draw_x(cell, 3, 5)
    reset = np.arange(5) == 3
    values = singular_values(cell, params, None, xs, reset=reset).singular_values
    carry, _ = jaxrnn.scan(cell, params, None, xs[:t])

    def jacobian(carry, x):
        """By differences."""

        def step(vector):
            new, _ = cell.step(params, jaxrnn.LSTMCarry(vector[:3], vector[3:]), x)
            return np.concatenate(new)

        vector = np.concatenate(carry)
        rows = [(step(vector + e) - step(vector - e)) / 2e-6 for e in 1e-6 * np.eye(6)]
        return np.linalg.svd(np.stack(rows, axis=1), compute_uv=False)

    np.testing.assert_allclose(values[t], jacobian(carry, xs[t]), 1e-6, 1e-8)
    np.testing.assert_allclose(values[3], jacobian(cell.initial_carry(params), xs[3]), 1e-6, 1e-8)


def test_lyapunov_exponents_of_linear_maps():
    cell, params = linear(np.diag([0.5, 0.9, 0.2]))
    xs = np.ones((150, 2, 3))
    marks = {"lengths": np.array([150, 140]), "warmup": 100}
    spectrum = jax.jit(lambda xs: lyapunov_exponents(cell, params, None, xs, **marks))(xs)
    np.testing.assert_array_equal(spectrum.steps, [50, 40])
    np.testing.assert_allclose(spectrum.exponents, np.log([[0.9, 0.5, 0.2]] * 2), 1e-10)
    first = jax.jit(lambda xs: lyapunov_exponents(cell, params, None, xs, count=1, **marks).exponents)(xs)
    np.testing.assert_allclose(first, np.log([[0.9]] * 2), 1e-10)
    cell, params = linear(rotation(1.0, 1.1))
    np.testing.assert_allclose(
        lyapunov_exponents(cell, params, None, xs[:9, 0, :2]).exponents, np.log([1.1, 1.1]), 1e-12
    )


def test_lyapunov_exponents_of_chaos_and_of_complex_numbers():
    spectrum = lyapunov_exponents(Logistic(), (), None, np.zeros((3000, 1)))
    np.testing.assert_allclose(spectrum.exponents, [np.log(2)], atol=0.01)
    cell = Complex()
    params = cell.init(jax.random.key(0))
    expected = np.array([2, 2, 0.5, 0.5])
    values = singular_values(cell, params, None, np.ones((3, 2), complex)).singular_values
    np.testing.assert_allclose(values, [expected] * 3, 1e-12)
    exponents = lyapunov_exponents(cell, params, None, np.ones((40, 2), complex), warmup=30).exponents
    np.testing.assert_allclose(exponents, np.log(expected), 1e-10)


def test_an_invalid_step_turns_no_perturbation():
    cell = Elman(2, 3)
    params, xs = draw_params(cell), draw_x(cell, 3, 8)
    mask = np.array([1, 0, 1, 1, 0, 0, 1, 0], bool)
    run = jax.jit(lambda xs, mask: lyapunov_exponents(cell, params, None, xs, mask=mask).exponents)
    np.testing.assert_allclose(run(xs, mask), run(xs[mask], np.ones(4, bool)), 1e-10)


def test_numbers_of_every_kind_as_real_ones_and_back():
    tree = {"a": np.ones((2, 3)) * [1, 2, 3], "n": np.arange(2), "z": np.array([1 + 2j, 3 - 4j])}
    tree = jax.tree.map(jnp.asarray, tree)
    vector = as_real(tree)
    np.testing.assert_array_equal(vector, [1, 2, 3, 1, 2, 3, 1, 3, 2, -4])
    assert jax.tree.all(jax.tree.map(jnp.array_equal, from_real(vector, tree), tree))


def test_a_singular_map_forgets_at_once():
    cell, params = linear(np.diag([0.5, 0.0]))
    exponents = lyapunov_exponents(cell, params, None, np.ones((6, 2)), warmup=2).exponents
    np.testing.assert_allclose(exponents, [np.log(0.5), -np.inf], 1e-12)


# gates


def test_saturation_counts_valid_steps():
    cell = GRU(1, 2)
    params = jax.tree.map(np.zeros_like, cell.init(jax.random.key(0), jnp.float64))
    # Of both units: r reads 100 x and −100 x, z a bias, n 100 x and nothing.
    params = params._replace(w_x=np.array([[100.0, -100, 0, 0, 100, 0]]), b=np.array([0.0, 0, 9, -9, 0, 0]))
    xs = np.array([[1.0, -1, 1, -1], [1, 1, 0, np.nan], [np.nan] * 4]).T[..., None]
    lengths = np.array([4, 3, 0])
    low, high = gate_saturation(cell, params, None, xs, lengths=lengths)
    np.testing.assert_allclose(low.r, [2 / 7, 4 / 7])
    np.testing.assert_allclose(high.r, [4 / 7, 2 / 7])
    np.testing.assert_allclose((low.z, high.z), ([0, 1], [1, 0]))
    np.testing.assert_allclose((low.n, high.n), ([2 / 7, 0], [4 / 7, 0]))  # low is near −1
    wide = gate_saturation(cell, params, None, xs, lengths=lengths, ranges={"n": (0, 1), "z": (-2, 3)}, margin=0.3)
    np.testing.assert_allclose((wide.low.n, wide.high.z), ([3 / 7, 1], [0, 0]))


def test_saturation_of_a_composition():
    zoned = Zoneout(WeightDrop(LSTM(2, 3), 0.1), 0.1)
    cell = Stack((Embed(7, 2), zoned, Linear(3, 2), Bidirectional(MGU(2, 4), Own(3))))
    with pytest.raises(TypeError, match="Own"):
        gate_saturation(Own(3), draw_params(Own(3)), None, np.ones((5, 2)))
    params = draw_params(cell)
    embed, lstm, up, both = params
    forget = np.repeat([0.0, 20, 0, 0], 3)
    params = (embed, lstm._replace(b=forget), up, both._replace(forward=both.forward._replace(b=np.full(8, -30.0))))
    lengths = np.array([5, 3, 0, 1, 2, 4])
    result = jax.jit(lambda xs: gate_saturation(cell, params, None, xs, lengths=lengths))(draw_x(cell, 3, 5, 6))
    assert result[0] == result[2] == ()
    assert result[3].backward is None
    np.testing.assert_array_equal((result[1].low.f, result[1].high.f), ([0] * 3, [1] * 3))
    np.testing.assert_array_equal((result[3].forward.low.f, result[3].forward.low.n), [[1] * 4] * 2)


# memory length


def test_memory_of_a_leaky_integrator():
    xs = np.ones((6, 4, 1))
    mask = np.ones((6, 4), bool)
    mask[4:, 1] = mask[2, 2] = mask[:, 3] = False
    reset = np.zeros((6, 4), bool)
    reset[4, 2] = True
    k = np.arange(6)
    expected = np.stack([A**k, np.where(k < 4, A**k, 0), np.where(k < 2, A**k, 0), 0.0 * k], axis=1)
    memory = jax.jit(lambda xs: memory_length(LEAK, LEAK_PARAMS, None, xs, mask=mask, reset=reset))(xs)
    np.testing.assert_allclose(memory.influence, expected, 1e-12)
    lag = [(k * row).sum() / max(row.sum(), 1) for row in expected.T]
    np.testing.assert_allclose(memory.mean_lag, lag, 1e-12)
    one = memory_length(LEAK, LEAK_PARAMS, None, xs, mask=mask, samples=1, key=jax.random.key(0))
    np.testing.assert_allclose(one.influence[:, :2], expected[:, :2], 1e-12)
    np.testing.assert_allclose(one.influence[:, 2], np.where(k < 5, A**k, 0), 1e-12)  # in valid steps, without a reset
    marks = {"lengths": np.array([6, 4, 6, 0]), "reverse": True, "time_axis": 1}
    back = jax.jit(lambda xs: memory_length(LEAK, LEAK_PARAMS, None, xs, **marks))(xs.swapaxes(0, 1))
    np.testing.assert_allclose(back.influence[:, :2], expected[:, :2], 1e-12)
    forever = jax.jit(lambda xs: memory_length(LEAK, LEAK_PARAMS, None, xs))(np.ones((200, 1)))
    np.testing.assert_allclose(forever.mean_lag, A / (1 - A), 1e-10)


def test_memory_of_compositions():
    cell = Pool(Bidirectional(GRU(2, 1), IndRNN(2, 2)), "mean")
    params, xs = draw_params(cell), draw_x(cell, 3, 5, 2)
    lengths = np.array([5, 3])
    sampled = {"samples": 300, "key": jax.random.key(0)}
    memory, many = jax.jit(
        lambda xs: [memory_length(cell, params, None, xs, lengths=lengths, **how) for how in ({}, sampled)]
    )(xs)
    jacobian = jax.jit(jax.jacobian(lambda xs: jaxrnn.scan(cell, params, None, xs, lengths=lengths)[1]))(xs)
    for row, length in enumerate(lengths):
        norms = np.linalg.norm(jacobian[row, :, :, row], axis=(0, 2))  # outputs and inputs
        np.testing.assert_allclose(memory.influence[:, row], [*norms[:length][::-1], *[0] * (5 - length)], 1e-10)
    np.testing.assert_allclose(many.influence, memory.influence, 0.2)


# training memory


def square(carry, ys):
    return jnp.sum(ys**2)


def test_residuals_of_a_linear_network_can_be_counted():
    cell, (time, batch, size), k = Elman(2, 3, activation=lambda x: x), (60, 5, 3), 6  # by the loop
    params = draw_params(cell)
    xs = jax.ShapeDtypeStruct((time, batch, 2), jnp.float64)
    carry, whole = batch * size * 8, 2 * time * batch * size * 8
    memory = training_memory(cell, params, None, xs, square)
    assert memory[:4] == (carry + whole // 2, whole, 0, whole)  # h before and y of each step
    remat = training_memory(cell, params, None, xs, square, remat_every=k)
    chunks = time // k * carry + whole // 2  # a carry for each chunk, and y for the loss
    assert chunks <= remat.residuals <= chunks + 2 * carry
    assert remat.recomputed == whole * k // time
    assert remat.estimated == remat.residuals + remat.recomputed


def test_remat_takes_less_memory_in_the_compiled_program():
    cell = LSTM(4, 16)
    params = draw_params(cell)
    xs = np.ones((8, 1024, 4))
    results = {
        k: training_memory(cell, params, None, xs, lambda carry, ys: carry.h.sum(), remat_every=k, time_axis=1)
        for k in (None, 32)
    }
    assert results[32].measured < results[None].measured / 5
    assert results[32].estimated < results[None].estimated / 5
    for memory in results.values():
        assert 0.5 < memory.measured / memory.estimated < 2


# figures


def line_data(ax):
    return {line.get_label(): np.asarray(line.get_ydata()) for line in ax.lines}


def test_figures_of_gradients_hold_the_data():
    rng = np.random.default_rng(0)
    h, c = rng.uniform(1, 2, (2, 5, 3))
    h[3:, 2] = c[3:, 2] = h[4, 1] = c[4, 1] = 0  # padding
    flow = GradientFlow(np.array(1.0), (LSTMCarry(h, c), ()), np.hypot(h, c))
    ax = plot_gradient_flow(flow).axes[0]
    assert (list(line_data(ax)), ax.get_yscale()) == (["0.h", "0.c"], "log")
    np.testing.assert_allclose(line_data(ax)["0.c"], [*np.median(c[:3], axis=1), np.median(c[3, :2]), c[4, 0]])
    several = {"one": flow, "two": flow._replace(total=3 * flow.total)}
    lines = line_data(plot_gradient_flow(several).axes[0])
    np.testing.assert_allclose(lines["one"][:3], np.median(np.hypot(h, c)[:3], axis=1))
    np.testing.assert_allclose(lines["two"], 3 * lines["one"])

    memory = MemoryLength(h, np.array([1.0, 2.0, 1.5]))
    ((label, influence), *_) = line_data(plot_memory_length({"a": memory}).axes[0]).items()
    np.testing.assert_allclose(influence[:3], np.median(h[:3], axis=1))
    assert label == "a, mean lag 1.5"


def test_figures_of_jacobians_hold_the_data():
    values = -np.sort(-np.random.default_rng(0).uniform(1, 2, (5, 3, 4)))
    every, one = np.ones((5, 3), bool), np.arange(3) == np.zeros((5, 1))
    figure = plot_singular_values({"a": JacobianSpectrum(values, every), "b": JacobianSpectrum(values, one)})
    a, b = map(line_data, figure.axes)
    assert [ax.get_title() for ax in figure.axes] == ["a", "b"]
    np.testing.assert_allclose(a["greatest"], np.median(values[:, :, 0], axis=1))
    np.testing.assert_allclose(b["least"], values[:, 0, -1])

    ax = plot_lyapunov_exponents(LyapunovSpectrum(values[0], np.array([5, 0, 5]))).axes[0]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), values[0, [0, 2]].mean(0))  # a row of no steps says nothing


def test_figure_of_gates_holds_the_data():
    rng = np.random.default_rng(0)
    lstm = Saturation(LSTMGates(*rng.uniform(0, 0.5, (4, 3))), LSTMGates(*rng.uniform(0, 0.5, (4, 3))))
    gru = Saturation(GRUGates(*rng.uniform(0, 0.5, (3, 2))), GRUGates(*rng.uniform(0, 0.5, (3, 2))))
    figure = plot_gate_saturation({"b": (lstm, (), gru), "a": (lstm, (), gru)})
    panels = {ax.get_title(): ax for ax in figure.axes}
    assert list(panels) == ["i", "f", "g", "o", "r", "z", "n"]
    offsets = panels["f"].collections[1].get_offsets()
    np.testing.assert_allclose(offsets, np.stack([lstm.low.f, lstm.high.f], axis=1))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b 0", "b 2", "a 0", "a 2"]


def test_figure_of_training_memory_holds_the_data(tmp_path):
    used = {None: TrainingMemory(1, 4096, 0, 4096, 5120), 8: TrainingMemory(1, 1024, 512, 1536, None)}
    figure = plot_training_memory(used)
    ax = figure.axes[0]
    assert [bar.get_height() for bar in ax.patches] == [4, 1, 0, 0.5, 5, 0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("remat_every", "memory (KiB)")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["none", "8"]
    figure.savefig(tmp_path / "memory.pdf")
    assert plot_training_memory({"LSTM": used[None]}).axes[0].get_xlabel() == ""


def test_matplotlib_is_imported_only_to_draw():
    code = (
        "import sys, jaxrnn.analysis as analysis; assert 'matplotlib' not in sys.modules\n"
        "memory = analysis.TrainingMemory(1, 2, 3, 5, 4)\n"
        "analysis.plot_training_memory(memory); assert 'matplotlib.pyplot' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_one_style_and_no_trace_of_it():
    """Figures are drawn in STYLE, which other figures can take, and matplotlib's settings stay."""
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    figure = plot_training_memory(TrainingMemory(1, 2, 3, 5, 4))
    assert dict(matplotlib.rcParams) == before
    assert (figure.dpi, figure.axes[0].xaxis.label.get_size()) == (200, 9)
    with matplotlib.rc_context(STYLE):
        own = matplotlib.figure.Figure().subplots()
    assert own.figure.dpi == 200
    assert [line.get_color() for line in own.plot([0, 1], np.eye(2))] == ["#0072B2", "#D55E00"]


EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("**/*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_draw_in_the_same_style(path):
    text = path.read_text(encoding="utf-8")
    assert ("Figure(" in text) == ("STYLE" in text)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "jaxrnn\[plot\]"'):
        plot_training_memory(TrainingMemory(1, 2, 3, 5, 4))


# errors

XS = np.ones((4, 1))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gradient_flow(GRU, (), None, XS, square), TypeError, r"cell: expected a jaxrnn\.Cell"),
        (lambda: gradient_flow(LEAK, LEAK_PARAMS, None, XS, None), TypeError, "loss: expected a function"),
        (
            lambda: gradient_flow(LEAK, LEAK_PARAMS, None, XS, lambda carry, ys: ys),
            ValueError,
            r"loss: expected a real scalar, got float64\[4, 1\]",
        ),
        (lambda: gradient_flow(Linear(1, 1), draw_params(Linear(1, 1)), None, XS, square), TypeError, "with a carry"),
        (lambda: gradient_flow(LEAK, (), None, XS, square), TypeError, "params: .* takes IndRNNParams, got tuple"),
        (
            lambda: gradient_flow(LEAK, LEAK_PARAMS, None, XS, square, lengths=np.array(9)),
            ValueError,
            "lengths: expected 0 to 4",
        ),
        (lambda: singular_values("gru", (), None, XS), TypeError, r"cell: expected a jaxrnn\.Cell"),
        (lambda: singular_values(Pool(LEAK), LEAK_PARAMS, None, XS), TypeError, "analyse the cell inside the Pool"),
        (
            lambda: singular_values(MEMBERS["bidirectional"], draw_params(MEMBERS["bidirectional"]), None, XS),
            ValueError,
            "xs: .* expects",
        ),
        (
            lambda: singular_values(
                Bidirectional(LEAK, LEAK), jaxrnn.BidirectionalPair(LEAK_PARAMS, LEAK_PARAMS), None, XS
            ),
            TypeError,
            "cannot run step by step",
        ),
        (lambda: lyapunov_exponents(Linear(1, 1), draw_params(Linear(1, 1)), None, XS), TypeError, "with a carry"),
        (
            lambda: lyapunov_exponents(LEAK, LEAK_PARAMS, None, XS, count=2),
            ValueError,
            "count: expected at most 1, the size of the carry, got 2",
        ),
        (lambda: lyapunov_exponents(LEAK, LEAK_PARAMS, None, XS, count=0), ValueError, "count: expected at least 1"),
        (lambda: lyapunov_exponents(LEAK, LEAK_PARAMS, None, XS, warmup=1.5), TypeError, "warmup: expected an integer"),
        (lambda: gate_saturation(LEAK, LEAK_PARAMS, None, XS, margin=0.5), ValueError, "margin: .* got 0.5"),
        (
            lambda: gate_saturation(LEAK, LEAK_PARAMS, None, XS, ranges={"h": (1, 1)}),
            ValueError,
            r"ranges: .* for 'h', got \(1, 1\)",
        ),
        (lambda: memory_length(None, (), None, XS), TypeError, "cell: expected"),
        (
            lambda: memory_length(Embed(3, 1), draw_params(Embed(3, 1)), None, np.zeros(4, int)),
            TypeError,
            "xs: expected floating; embed tokens first",
        ),
        (lambda: memory_length(LEAK, LEAK_PARAMS, None, XS[:0]), ValueError, "xs: expected at least one step"),
        (lambda: memory_length(LEAK, LEAK_PARAMS, None, XS, samples=3), TypeError, "give samples and key"),
        (
            lambda: memory_length(LEAK, LEAK_PARAMS, None, XS, samples=0, key=jax.random.key(0)),
            ValueError,
            "samples: expected at least 1",
        ),
        (lambda: training_memory(1, (), None, XS, square), TypeError, "cell: expected"),
        (lambda: training_memory(LEAK, LEAK_PARAMS, None, XS, 1.0), TypeError, "loss: expected a function"),
        (
            lambda: training_memory(LEAK, LEAK_PARAMS, None, XS, square, remat_every=0),
            ValueError,
            "remat_every: expected at least 1",
        ),
        (lambda: plot_gradient_flow([1]), TypeError, "flows: expected GradientFlow or a dict of label to GradientFlow"),
        (lambda: plot_singular_values({}), TypeError, "spectra: expected JacobianSpectrum"),
        (lambda: plot_lyapunov_exponents({"a": 1}), TypeError, "spectra: expected LyapunovSpectrum"),
        (lambda: plot_gate_saturation({"a": None}), TypeError, "saturations: expected what gate_saturation returns"),
        (lambda: plot_gate_saturation((1, Saturation(1, 2))), TypeError, "saturations: expected"),
        (lambda: plot_memory_length(None), TypeError, "memories: expected MemoryLength"),
        (lambda: plot_training_memory(3), TypeError, "memories: expected TrainingMemory"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
