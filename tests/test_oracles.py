"""Every cell against NumPy oracles: values, gradients by finite differences of the oracle, and initial weights."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.linalg
from tiers import mostly_in_full

import jaxrnn
from jaxrnn.cells.rg_lru import bounded_sqrt
from jaxrnn.cells.state_space import eigenvectors

T, B, D, H, P = 4, 3, 2, 6, 5

# What a cell says by a field and its free function reads off the params.
STRUCTURE = ("peephole", "coupled", "projection_size", "layer_norm", "heads")

LSTM_OPTIONS = {
    "peephole": True,
    "coupled": True,
    "projection_size": P,
    "layer_norm": True,
    "cell_clip": 0.6,
    "gate_clip": 0.8,
    "gate_activation": ("hard_sigmoid", 0.3, 0.4),
    "activation": ("scaled_tanh", 1.3, 0.7),
    "output_activation": "softsign",
    "without b": None,
}
GRU_OPTIONS = {
    "reset_after": False,
    "layer_norm": True,
    "gate_clip": 0.8,
    "gate_activation": ("hard_sigmoid", 0.3, 0.4),
    "activation": ("scaled_tanh", 1.3, 0.7),
    "without b": None,
    "without b_hn": None,
}


class Case(NamedTuple):
    """A cell, its free function, its oracle, and the parameters that are left out."""

    cell: jaxrnn.Cell
    free: Callable
    oracle: Callable
    absent: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        sizes = ("input_size", "input_channels", "hidden_size", "spatial_shape", "kernel_size", "log_space")
        fields = dataclasses.asdict(self.cell)
        return {name: value for name, value in fields.items() if name not in sizes}

    @property
    def clips(self) -> dict[str, None]:
        return {name: None for name, value in self.options.items() if name.endswith("clip") and value}


def covering(options):
    """Six choices of options in which every two, of up to ten, meet on and off in all four ways.

    Any two triples out of five rows share one, and neither holds the other (Kleitman & Spencer 1973).
    """
    triples = list(itertools.islice(itertools.combinations(range(5), 3), len(options)))
    return [tuple(name for name, rows in zip(options, triples, strict=True) if k in rows) for k in range(6)]


def choices(cell, free, oracle, options):
    """The covering choices of all options; each option of the equations alone, in the full tier."""
    alone = [(name,) for name in options if "activation" not in name and "without" not in name]
    for on in dict.fromkeys([(), *alone, *covering(options)]):
        fields = {name: options[name] for name in on if not name.startswith("without")}
        absent = tuple(name.removeprefix("without ") for name in on if name.startswith("without"))
        name = " ".join([cell.__name__, *(on or ("plain",))])
        marks = [pytest.mark.full] if on in alone else []
        yield pytest.param(Case(cell(D, H, **fields), free, oracle, absent), id=name, marks=marks)


def elman(id, absent=(), **fields):
    return pytest.param(Case(jaxrnn.Elman(D, H, **fields), jaxrnn.elman_step, oracles.elman_step, absent), id=id)


def lstm_input(on):
    fields = {"coupled": "input", "gate_activation": "softsign"} | {name: LSTM_OPTIONS[name] for name in on}
    id = " ".join(["LSTM input", *on])
    return pytest.param(Case(jaxrnn.LSTM(D, H, **fields), jaxrnn.lstm_step, oracles.lstm_step, ()), id=id)


def indrnn(id, absent=(), **fields):
    return pytest.param(Case(jaxrnn.IndRNN(D, H, **fields), jaxrnn.indrnn_step, oracles.indrnn_step, absent), id=id)


def mgu(id, absent=()):
    return pytest.param(Case(jaxrnn.MGU(D, H), jaxrnn.mgu_step, oracles.mgu_step, absent), id=id)


def minimal(id, absent=(), **fields):
    return [
        pytest.param(Case(cell(D, H, **fields), free, oracle, absent), id=f"{cell.__name__} {id}")
        for cell, free, oracle in (
            (jaxrnn.MinGRU, jaxrnn.min_gru_step, oracles.min_gru_step),
            (jaxrnn.MinLSTM, jaxrnn.min_lstm_step, oracles.min_lstm_step),
        )
    ]


def hgrn(id, absent=(), **fields):
    return pytest.param(Case(jaxrnn.HGRN(D, H, **fields), jaxrnn.hgrn_step, oracles.hgrn_step, absent), id=id)


def slstm(id, absent=(), **fields):
    return pytest.param(Case(jaxrnn.SLSTM(D, H, **fields), jaxrnn.slstm_step, oracles.slstm_step, absent), id=id)


def conv(id, spatial_shape, absent=(), **fields):
    cell = jaxrnn.ConvLSTM(spatial_shape, D, H, **fields)
    return pytest.param(Case(cell, jaxrnn.conv_lstm_step, oracles.conv_lstm_step, absent), id=id)


CASES = [
    elman("Elman plain"),
    elman("Elman without b", absent=("b",)),
    elman("Elman relu", activation="relu"),
    elman("Elman gate_clip", gate_clip=1.2),
    elman("Elman leaky_relu", activation=("leaky_relu", 0.3)),
    elman("Elman affine", activation=("affine", 0.8, 0.1)),
    *choices(jaxrnn.LSTM, jaxrnn.lstm_step, oracles.lstm_step, LSTM_OPTIONS),
    *(lstm_input(on) for on in ((), ("peephole", "gate_clip"), ("layer_norm", "projection_size"))),
    *choices(jaxrnn.GRU, jaxrnn.gru_step, oracles.gru_step, GRU_OPTIONS),
    mgu("MGU plain"),
    mgu("MGU without b", absent=("b",)),
    indrnn("IndRNN plain"),
    indrnn("IndRNN tanh", activation="tanh"),
    indrnn("IndRNN without b", absent=("b",)),
    *minimal("plain"),
    *minimal("any sign", positive=False),
    *minimal("without b", absent=("b",)),
    hgrn("HGRN plain"),
    hgrn("HGRN bound", lower_bound=0.4),
    hgrn("HGRN without b", absent=("b",)),
    slstm("SLSTM plain"),
    slstm("SLSTM heads", heads=3),
    slstm("SLSTM without b", absent=("b",), heads=2),
    conv("ConvLSTM 1D", (7,)),
    conv("ConvLSTM 1D even kernel strides dilation", (8,), kernel_size=4, strides=3, dilation=2),
    conv("ConvLSTM 2D", (4, 5), kernel_size=(3, 2)),
    conv("ConvLSTM 2D strides", (5, 6), kernel_size=(2, 3), strides=(3, 2)),
    conv("ConvLSTM 2D VALID", (5, 7), kernel_size=(2, 3), strides=2, dilation=(1, 2), padding="VALID"),
    conv("ConvLSTM 2D options", (3, 4), ("b",), gate_activation="keras_hard_sigmoid", activation="softsign"),
    conv("ConvLSTM 3D", (3, 4, 2), kernel_size=(2, 3, 1), strides=(1, 2, 1)),
]
# In the fast tier, every cell as it is by default, and the covering choices of options.
CASES = [
    case
    if case.id.endswith(("plain", "1D", "3D")) or case.id.startswith(("LSTM", "GRU"))
    else pytest.param(*case.values, id=case.id, marks=pytest.mark.full)
    for case in CASES
]
every_case = pytest.mark.parametrize("case", CASES)


def redraw(rng, tree, scale=1.0):
    """Random normal numbers in place of every array."""
    return jax.tree.map(lambda leaf: scale * rng.normal(size=leaf.shape), tree)


def weighted_sum(weights, tree):
    return sum((w * leaf).sum() for w, leaf in zip(jax.tree.leaves(weights), jax.tree.leaves(tree), strict=True))


class Problem(NamedTuple):
    params: Any
    carry: Any
    xs: np.ndarray
    weights: Any


@functools.cache
def problem(case) -> Problem:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(case.cell.init, jax.random.key(0))._replace(**dict.fromkeys(case.absent))
    params = redraw(rng, shapes, 0.8)
    # Only its shapes are read.
    carry = redraw(rng, jax.eval_shape(lambda: case.cell.initial_carry(shapes, (B,))))
    xs = rng.normal(size=(T, B, *np.atleast_1d(case.cell.input_size)))
    ys = np.empty((T, *carry.h.shape))
    return Problem(params, carry, xs, redraw(rng, (carry, ys)))


class Outcome(NamedTuple):
    scan: Any
    gradients: Any
    free: Any
    gates: Any


@functools.cache
def outcome(case) -> Outcome:
    """What the library computes, in one compilation."""
    cell = case.cell
    free_options = {name: value for name, value in case.options.items() if name not in STRUCTURE or value == "input"}

    def loss(params, carry, xs, weights):
        result = jaxrnn.scan(cell, params, carry, xs)
        return weighted_sum(weights, result), result

    def compute(params, carry, xs, weights):
        gradients, result = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, carry, xs, weights)
        free = case.free(params, carry, xs[0], **free_options)
        return Outcome(result, gradients, free, cell.gates(params, carry, xs[0]))

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(compute)(*problem(case)))


def assert_close(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, err_msg=jax.tree_util.keystr(path), **tolerance)


close = functools.partial(assert_close, rtol=1e-10, atol=1e-12)


@every_case
def test_scan_is_the_oracle(case):
    params, carry, xs, _ = problem(case)
    close(outcome(case).scan, oracles.unroll(case.oracle, params, carry, xs, **case.options))


@every_case
def test_free_function_is_the_oracle(case):
    params, carry, xs, _ = problem(case)
    close(outcome(case).free, case.oracle(params, carry, xs[0], **case.options)[:2])


@pytest.mark.parametrize("case", [case for case in CASES if case.id.endswith(("plain", "1D", "GRU reset_after"))])
def test_unbatched_is_the_oracle(case):
    params, carry, xs, _ = problem(case)
    carry, xs = jax.tree.map(lambda leaf: leaf[0], carry), xs[:, 0]
    with jax.enable_x64(True):
        result = jax.jit(functools.partial(jaxrnn.scan, case.cell))(params, carry, xs)
    close(jax.tree.map(np.asarray, result), oracles.unroll(case.oracle, params, carry, xs, **case.options))


@every_case
def test_gates_are_the_oracle(case):
    params, carry, xs, _ = problem(case)
    close(outcome(case).gates._asdict(), case.oracle(params, carry, xs[0], **case.options)[2])


@every_case
def test_gradients_are_finite_differences_of_the_oracle(case):
    params, carry, xs, weights = problem(case)
    leaves, structure = jax.tree.flatten((params, carry, xs))
    gradients = jax.tree.leaves_with_path(outcome(case).gradients)
    rng = np.random.default_rng(1)

    def loss(k, moved):
        params, carry, xs = structure.unflatten([*leaves[:k], moved, *leaves[k + 1 :]])
        return weighted_sum(weights, oracles.unroll(case.oracle, params, carry, xs, **case.options))

    for k, (path, gradient) in enumerate(gradients):
        assert np.linalg.norm(gradient) > 0, jax.tree_util.keystr(path)
        for _ in range(2):
            direction = rng.normal(size=gradient.shape)
            direction *= 3e-6 / np.linalg.norm(direction)
            difference = (loss(k, leaves[k] + direction) - loss(k, leaves[k] - direction)) / 2
            tolerance = 1e-6 * np.linalg.norm(gradient) * np.linalg.norm(direction)
            np.testing.assert_allclose(
                np.vdot(gradient, direction), difference, 0, tolerance, err_msg=jax.tree_util.keystr(path)
            )


@pytest.mark.parametrize("case", [each for each in CASES if each.values[0].clips])
def test_clips_are_reached(case):
    params, carry, xs, _ = problem(case)
    unclipped, ys = oracles.unroll(case.oracle, params, carry, xs, **case.options | case.clips)
    assert np.abs(outcome(case).scan[1] - ys).max() > 1e-3
    assert np.abs(outcome(case).scan[0].h - unclipped.h).max() > 1e-3


@pytest.mark.parametrize("options", [LSTM_OPTIONS, GRU_OPTIONS])
def test_every_two_options_meet_in_all_four_ways(options):
    chosen = covering(options)
    for a, b in itertools.combinations(options, 2):
        assert {(a in on, b in on) for on in chosen} == set(itertools.product((True, False), repeat=2))


SPECS = [
    *("identity", "relu", "tanh", "sigmoid", "softsign", "softplus", "affine", "leaky_relu", "thresholded_relu"),
    *("scaled_tanh", "hard_sigmoid", "elu", "keras_hard_sigmoid", "silu", "gelu"),
    *(("affine", 0.7), ("affine", 0.7, -0.2), ("leaky_relu", 0.3), ("thresholded_relu", 0.4), ("scaled_tanh", 1.3)),
    *(("scaled_tanh", 1.3, 0.6), ("hard_sigmoid", 0.4), ("hard_sigmoid", 0.4, 0.3), ("elu", 0.5)),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_activation_and_its_derivative(spec):
    x = np.array([-750.0, -40, -3.1, -1.3, -0.45, -0.1, 0.05, 0.35, 0.9, 1.7, 3.3, 40, 750])
    with jax.enable_x64(True):
        y, tangent = jax.jvp(jaxrnn.activation(spec), (jnp.asarray(x),), (jnp.ones_like(x),))
    np.testing.assert_allclose(y, oracles.activate(spec, x), rtol=1e-14, atol=1e-15)
    step = 1e-5
    difference = (oracles.activate(spec, x + step) - oracles.activate(spec, x - step)) / (2 * step)
    np.testing.assert_allclose(tangent, difference, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("spec", ["relu", "elu", ("leaky_relu", 0.3), "softsign"], ids=str)
def test_activation_at_zero(spec):
    assert jaxrnn.activation(spec)(0.0) == 0


def bilinear(cell, free, oracle, **options):
    return cell, free, oracle, {"discretization": "bilinear"} | options


STATES = {
    "LRU": (jaxrnn.LRU(D, H), jaxrnn.lru_step, oracles.lru_step, {}),
    "S5": (jaxrnn.S5(D, H), jaxrnn.s5_step, oracles.s5_step, {}),
    "S5 bilinear": bilinear(jaxrnn.S5(D, H, "bilinear"), jaxrnn.s5_step, oracles.s5_step),
    "S5 timed": (jaxrnn.S5(D + 1, H, timed=True), jaxrnn.s5_step, oracles.s5_step, {"timed": True}),
    "S4D": (jaxrnn.S4D(D, H), jaxrnn.s4d_step, oracles.s4d_step, {}),
    "S4D bilinear timed": bilinear(
        jaxrnn.S4D(D + 1, H, discretization="bilinear", timed=True), jaxrnn.s4d_step, oracles.s4d_step, timed=True
    ),
    "S6": (jaxrnn.S6(D, H, 2), jaxrnn.s6_step, oracles.s6_step, {}),
    "SRU": (jaxrnn.SRU(D, H), jaxrnn.sru_step, oracles.sru_step, {}),
    "SRU square": (jaxrnn.SRU(D, D, "tanh"), jaxrnn.sru_step, oracles.sru_step, {"activation": "tanh"}),
    "QRNN": (jaxrnn.QRNN(D, H, 3), jaxrnn.qrnn_step, oracles.qrnn_step, {}),
    "QRNN of one": (jaxrnn.QRNN(D, H, 1), jaxrnn.qrnn_step, oracles.qrnn_step, {}),
    "CausalConv": (jaxrnn.CausalConv(D, 4), jaxrnn.causal_conv_step, oracles.causal_conv_step, {}),
}


@pytest.mark.parametrize("name", mostly_in_full(STATES, "LRU", "S5", "S4D bilinear timed", "S6", "SRU", "QRNN"))
def test_cell_is_the_oracle(name):
    """Values, and gradients by finite differences; real and imaginary parts of the carry apart."""
    cell, free, oracle, options = STATES[name]
    rng = np.random.default_rng(0)
    params = redraw(rng, jax.eval_shape(cell.init, jax.random.key(0)), 0.8)
    fresh = jax.eval_shape(lambda params: cell.initial_carry(params, (B,)), params)
    parts = [rng.normal(size=(1 + jnp.iscomplexobj(leaf), *leaf.shape)) for leaf in fresh]
    xs, weights = rng.normal(size=(T, B, cell.input_size)), rng.normal(size=(T, B, cell.output_size))

    def carry(parts):
        def whole(each):
            if len(each) == 1:
                return each[0]
            return each[0] + 1j * each[1] if isinstance(each, np.ndarray) else jax.lax.complex(*each)

        return type(fresh)(*map(whole, parts))

    def seen(result):
        last, ys = result
        return (weights * ys).sum() + sum((leaf.real - 2 * leaf.imag).sum() for leaf in last)

    def loss(params, parts, xs):
        result = jaxrnn.scan(cell, params, carry(parts), xs)
        return seen(result), result

    with jax.enable_x64(True):
        gradients, result = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, parts, xs)
        once = free(params, carry(parts), xs[0], **options)
    expected = oracles.unroll(oracle, params, carry(parts), xs, **options)
    expected_once = oracle(params, carry(parts), xs[0], **options)[:2]
    for one, other in zip(jax.tree.leaves((result, once)), jax.tree.leaves((expected, expected_once)), strict=True):
        np.testing.assert_allclose(one, other, 1e-10, 1e-12)

    leaves, structure = jax.tree.flatten((params, parts, xs))
    for k, gradient in enumerate(jax.tree.leaves(gradients)):
        if gradient.size == 0:
            continue
        direction = rng.normal(size=gradient.shape)
        direction *= 3e-6 / np.linalg.norm(direction)

        def moved(sign, k=k, direction=direction):
            params, parts, xs = structure.unflatten([*leaves[:k], leaves[k] + sign * direction, *leaves[k + 1 :]])
            return seen(oracles.unroll(oracle, params, carry(parts), xs, **options))

        tolerance = 1e-6 * np.linalg.norm(gradient) * np.linalg.norm(direction)
        np.testing.assert_allclose(np.vdot(gradient, direction), (moved(1) - moved(-1)) / 2, 0, tolerance)


def test_log_space_is_real_space():
    """Values and gradients, of states of any sign, over steps of which some are invalid and some begin anew."""
    rng = np.random.default_rng(0)
    xs, h = rng.normal(size=(T, B, D)), rng.normal(size=(B, H))
    valid, reset = rng.random((2, T, B)) < 0.6
    for cell in (jaxrnn.MinGRU, jaxrnn.MinLSTM):
        with jax.enable_x64(True):
            params = redraw(rng, jax.eval_shape(cell(D, H).init, jax.random.key(0)), 2)
            learned = jaxrnn.LearnedCarryParams(params, type(cell(D, H).initial_carry(params))(rng.normal(size=H)))
            runs = []
            for form in ("real", None, "xla", "associative", "chunked"):

                def run(learned, h, xs, form=form, cell=cell):
                    own = jaxrnn.LearnedCarry(cell(D, H, log_space=form != "real"))
                    last, ys = jaxrnn.scan(
                        own,
                        learned,
                        type(learned.carry)(h),
                        xs,
                        mask=valid,
                        reset=reset,
                        implementation=None if form == "real" else form,
                    )
                    return (ys**2).sum() + last.h.sum(), (last, ys)

                runs.append(jax.value_and_grad(run, (0, 1, 2), has_aux=True))
            found = jax.jit(lambda *given, runs=runs: [run(*given) for run in runs])(learned, h, xs)
            for each in found[1:]:
                for one, other in zip(jax.tree.leaves(each), jax.tree.leaves(found[0]), strict=True):
                    np.testing.assert_allclose(one, other, 1e-9, 1e-11)
        with pytest.raises(ValueError, match="log_space needs positive"):
            cell(D, H, positive=False, log_space=True)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_window_holds_the_last_valid_inputs_of_its_sequence(reverse):
    """Against lists that grow step by step, whole and cut in two."""
    rng = np.random.default_rng(0)
    steps, rows, size = 11, 6, 4
    cell = jaxrnn.CausalConv(D, size)
    learned = jaxrnn.LearnedCarry(cell)
    params = redraw(rng, jax.eval_shape(learned.init, jax.random.key(0)), 1)
    xs, first = rng.normal(size=(steps, rows, D)), rng.normal(size=(rows, size - 1, D))
    valid, reset = rng.random((steps, rows)) < 0.6, rng.random((steps, rows)) < 0.3
    expected, windows = np.zeros((steps, rows, D)), []
    for row in range(rows):
        seen, boundary = list(first[row]), False
        for t in range(steps)[:: -1 if reverse else 1]:
            if not valid[t, row]:
                continue
            if boundary if reverse else reset[t, row]:
                seen = list(np.asarray(params.carry.window))
            boundary = reset[t, row]
            seen.append(xs[t, row])
            expected[t, row] = (np.array(seen[-size:]) * params.cell.w).sum(0) + params.cell.b
        windows.append(seen[1 - size :])
    with jax.enable_x64(True):
        carry = jaxrnn.CausalConvCarry(first)
        flags = {"mask": valid, "reset": reset, "reverse": reverse}
        for more in ({}, {"remat_every": 3}):
            last, ys = jax.jit(lambda xs, more=more: jaxrnn.scan(learned, params, carry, xs, **flags, **more))(xs)
            np.testing.assert_allclose(ys, expected, 1e-12, 1e-12)
            np.testing.assert_allclose(last.window, windows, 1e-12, 1e-12)


@pytest.mark.full
def test_s5_begins_as_hippo():
    """Half of the conjugate pairs stand for the whole real system of 2 P states, held over steps of one length."""
    pairs, step = 3, 0.07
    size = 2 * pairs
    with jax.enable_x64(True):
        cell = jaxrnn.S5(size, pairs, step_min=step, step_max=step)
        params = jax.jit(lambda key: cell.init(key, jnp.float64))(jax.random.key(0))
        n = np.arange(size)
        root = np.sqrt(2 * n + 1)
        legs = -np.where(n[:, None] > n, np.outer(root, root), 0) - np.diag(n + 1)
        normal = legs + np.outer(root, root) / 2
        # B and C of the whole system, from those of its eigenvectors.
        values = np.linalg.eigvals(normal)
        eigenvalue = -np.exp(params.log_decay) + 1j * np.asarray(params.frequency)
        np.testing.assert_allclose(np.sort(values.imag), np.sort([*eigenvalue.imag, *-eigenvalue.imag]), atol=1e-10)
        np.testing.assert_allclose(values.real, -0.5, atol=1e-10)
        whole, held = np.zeros(size), scipy.linalg.expm(normal * step)
        xs = np.random.default_rng(0).normal(size=(9, size))
        _, vectors = eigenvectors(pairs)
        w_x, w_y = np.asarray(params.w_x), np.asarray(params.w_y)
        b, c = w_x[:, :pairs] + 1j * w_x[:, pairs:], w_y[:pairs] - 1j * w_y[pairs:]
        b, c = 2 * np.real(vectors @ b.T), 2 * np.real(c.T @ vectors.conj().T)
        expected = []
        for x in xs:
            whole = held @ whole + np.linalg.solve(normal, (held - np.eye(size)) @ b @ x)
            expected.append(c @ whole + np.asarray(params.d) * x)
        _, ys = jax.jit(lambda xs: jaxrnn.scan(cell, params, None, xs))(xs)
        np.testing.assert_allclose(ys, expected, 1e-9, 1e-9)
    drawn = jaxrnn.s5_init(jax.random.key(0), 2, 500).log_step
    np.testing.assert_allclose(np.quantile(drawn, [0, 0.5, 1]), np.log([1e-3, 1e-2, 1e-1]), atol=0.2)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_rg_lru_is_the_oracle(blocks):
    """Values, and gradients by finite differences, of rows that have started and of rows that have not."""
    cell = jaxrnn.RGLRU(H, blocks)
    rng = np.random.default_rng(0)
    params = redraw(rng, jax.eval_shape(cell.init, jax.random.key(0)), 0.8)
    h, xs, weights = rng.normal(size=(B, H)), rng.normal(size=(T, B, H)), rng.normal(size=(T, B, H))
    carry = functools.partial(jaxrnn.RGLRUCarry, started=np.array([True, False, True]))

    def loss(params, h, xs):
        last, ys = jaxrnn.scan(cell, params, carry(h), xs)
        return (weights * ys).sum() + last.h.sum(), (last, ys)

    with jax.enable_x64(True):
        gradients, result = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, h, xs)
        free, gates = jaxrnn.rg_lru_step(params, carry(h), xs[0]), cell.gates(params, carry(h), xs[0])
    expected = oracles.unroll(oracles.rg_lru_step, params, carry(h), xs)
    *once, activated = oracles.rg_lru_step(params, carry(h), xs[0])
    ours, theirs = jax.tree.leaves((result, free, gates._asdict())), jax.tree.leaves((expected, tuple(once), activated))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, 1e-10, 1e-12)

    leaves, structure = jax.tree.flatten((params, h, xs))
    for k, gradient in enumerate(jax.tree.leaves(gradients)):
        direction = rng.normal(size=gradient.shape)
        direction *= 3e-6 / np.linalg.norm(direction)

        def moved(sign, k=k, direction=direction):
            params, h, xs = structure.unflatten([*leaves[:k], leaves[k] + sign * direction, *leaves[k + 1 :]])
            last, ys = oracles.unroll(oracles.rg_lru_step, params, carry(h), xs)
            return (weights * ys).sum() + last.h.sum()

        tolerance = 1e-6 * np.linalg.norm(gradient) * np.linalg.norm(direction)
        np.testing.assert_allclose(np.vdot(gradient, direction), (moved(1) - moved(-1)) / 2, 0, tolerance)


def test_rg_lru_begins_with_the_whole_input():
    """At the first valid step of a sequence, and after every reset, the input enters without the root."""
    cell = jaxrnn.RGLRU(2)
    params = cell.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (6, 2))
    mask, reset = jnp.array([0, 1, 1, 0, 1, 1], bool), jnp.array([0, 0, 0, 1, 1, 0], bool)
    whole = cell.gates(params, None, xs).i * xs
    for reverse, begins in ((False, [1, 4]), (True, [5, 2])):
        _, ys = jaxrnn.scan(cell, params, None, xs, mask=mask, reset=reset, reverse=reverse)
        np.testing.assert_allclose(ys[jnp.array(begins)], whole[jnp.array(begins)], 1e-6)
        rest = [t for t in (1, 2, 4, 5) if t not in begins]
        assert np.abs(ys[jnp.array(rest)] - whole[jnp.array(rest)]).min() > 1e-3


def test_rg_lru_draws_its_decay_and_bounds_its_slope():
    params = jaxrnn.rg_lru_init(jax.random.key(0), 4000, blocks=1000)
    a = np.exp(-8 * np.logaddexp(0, params.decay))
    np.testing.assert_allclose(np.quantile(a**2, [0, 0.5, 1]), [0.81, (0.81 + 0.999**2) / 2, 0.999**2], atol=0.01)
    slope = jax.grad(bounded_sqrt)
    np.testing.assert_allclose([slope(x) for x in (0.0, 1e-9, 1e-4, 4.0)], [1000, 1000, 50, 0.25], 1e-5)


def test_slstm_begins_by_itself_and_stays_in_range():
    """From zeros the first normaliser is 1, and gates of ±300 overflow nowhere."""
    cell = jaxrnn.SLSTM(D, H, heads=2)
    params = cell.init(jax.random.key(0))
    np.testing.assert_array_equal(params.b.reshape(4, H)[1], np.tile(np.linspace(3, 6, H // 2, dtype=np.float32), 2))
    carry, _ = jax.jit(lambda params: jaxrnn.step(cell, params, None, jnp.ones(D)))(params)
    np.testing.assert_array_equal(carry.n, np.ones(H))
    xs = 1000 * jax.random.normal(jax.random.key(1), (50, D))

    def loss(params):
        ys = jaxrnn.scan(cell, params, None, xs)[1]
        return ys.sum(), ys

    gradient, ys = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert np.abs(ys).max() <= 1
    assert all(np.isfinite(leaf).all() for leaf in gradient)


@pytest.mark.parametrize(("r_min", "r_max", "max_phase"), [(0.0, 1.0, 6.28), (0.9, 0.999, 0.3)])
def test_lru_draws_its_ring(r_min, r_max, max_phase):
    """Uniform by area, and an input scale that keeps the variance."""
    params = jaxrnn.lru_init(jax.random.key(0), 3, 4000, r_min=r_min, r_max=r_max, max_phase=max_phase)
    modulus, phase = np.exp(-np.exp(params.nu)), np.exp(params.theta)
    area = (modulus**2 - r_min**2) / (r_max**2 - r_min**2)
    for drawn in (area, phase / max_phase):
        np.testing.assert_allclose(np.quantile(drawn, [0, 0.25, 0.5, 0.75, 1]), [0, 0.25, 0.5, 0.75, 1], atol=0.03)
    np.testing.assert_allclose(np.exp(params.gamma) ** 2, 1 - modulus**2, 1e-3, 1e-4)


KEY = jax.random.key(3)
SHAPES = {
    jaxrnn.Elman(D, H): jaxrnn.ElmanParams((D, H), (H, H), (H,)),
    jaxrnn.LSTM(D, H): jaxrnn.LSTMParams((D, 4 * H), (H, 4 * H), (4 * H,)),
    jaxrnn.LSTM(D, H, peephole=True, coupled=True, projection_size=P, layer_norm=True): jaxrnn.LSTMParams(
        (D, 3 * H), (P, 3 * H), (3 * H,), (2, H), (H, P), jaxrnn.LSTMNorm((3 * H,), (3 * H,), (H,), (H,))
    ),
    jaxrnn.GRU(D, H): jaxrnn.GRUParams((D, 3 * H), (H, 3 * H), (3 * H,), (H,)),
    jaxrnn.GRU(D, H, reset_after=False, layer_norm=True): jaxrnn.GRUParams(
        (D, 3 * H), (H, 3 * H), (3 * H,), None, jaxrnn.GRUNorm((3 * H,), (3 * H,))
    ),
    jaxrnn.MGU(D, H): jaxrnn.MGUParams((D, 2 * H), (H, 2 * H), (2 * H,)),
    jaxrnn.IndRNN(D, H): jaxrnn.IndRNNParams((D, H), (H,), (H,)),
    jaxrnn.MinGRU(D, H): jaxrnn.MinGRUParams((D, 2 * H), (2 * H,)),
    jaxrnn.MinLSTM(D, H): jaxrnn.MinLSTMParams((D, 3 * H), (3 * H,)),
    jaxrnn.HGRN(D, H): jaxrnn.HGRNParams((D, 2 * H), (2 * H,)),
    jaxrnn.ConvLSTM((5, 4), D, H, kernel_size=(3, 2)): jaxrnn.ConvLSTMParams(
        (3, 2, D, 4 * H), (3, 2, H, 4 * H), (4 * H,)
    ),
}
CELLS = list(SHAPES)
every_cell = pytest.mark.parametrize("cell", CELLS, ids=repr)

INPUTS, UNITS = 40, 100
LARGE = [cell(INPUTS, UNITS) for cell in (jaxrnn.Elman, jaxrnn.LSTM, jaxrnn.GRU, jaxrnn.MGU, jaxrnn.IndRNN)]
PROJECTED = jaxrnn.LSTM(INPUTS, UNITS, projection_size=INPUTS)


draw = jax.jit(lambda cell, key, dtype: cell.init(key, dtype), static_argnums=(0, 2))


def initial(cell, seed=3, dtype=jnp.float32):
    return draw(cell, jax.random.key(seed), dtype)


@every_cell
def test_initial_shapes(cell):
    assert jax.tree.map(jnp.shape, initial(cell)) == SHAPES[cell]


@every_cell
def test_initial_vectors_are_zero_but_for_the_forget_bias_and_gains(cell):
    params = initial(cell)
    gates = {jaxrnn.LSTM: "ifgo", jaxrnn.ConvLSTM: "ifgo", jaxrnn.MinLSTM: "fin"}.get(type(cell), "")
    gates = "fgo" if getattr(cell, "coupled", False) else gates
    expected = np.concatenate([np.full(H, float(gate == "f")) for gate in gates]) if gates else 0
    np.testing.assert_array_equal(params.b, np.broadcast_to(expected, params.b.shape))
    for name in ("peephole", "b_hn"):
        if getattr(params, name, None) is not None:
            assert not np.any(getattr(params, name))
    if getattr(params, "norm", None) is not None:
        gains = params.norm._asdict()
        assert not np.any(gains.pop("b_c", 0))
        for gain in gains.values():
            assert np.all(np.asarray(gain) == 1)


@pytest.mark.parametrize("cell", [*CELLS[:6], PROJECTED, jaxrnn.LSTM(D, H, projection_size=9)], ids=repr)
def test_initial_recurrent_weights_are_orthogonal_per_gate(cell):
    blocks = oracles.columns(np.asarray(initial(cell).w_h, np.float64), cell.hidden_size)
    for w in blocks:
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)
    for a, b in itertools.combinations(blocks, 2):
        assert np.abs(a - b).max() > 0.1


def assert_variance(weights, fan_in):
    """Mean 0 and variance 1 / fan_in to five standard errors, and no tail beyond two deviations of the uncut normal."""
    weights = np.asarray(weights, np.float64).ravel() * np.sqrt(fan_in)
    assert abs(weights.mean()) < 5 / np.sqrt(weights.size)
    assert abs(weights.var() - 1) < 5 / np.sqrt(weights.size)
    assert np.abs(weights).max() < 2.3


@pytest.mark.parametrize("cell", LARGE, ids=repr)
def test_initial_input_weights_have_variance_one_over_inputs(cell):
    blocks = oracles.columns(np.asarray(initial(cell).w_x), UNITS)
    for w in blocks:
        assert_variance(w, INPUTS)
    for a, b in itertools.combinations(blocks, 2):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.06


def test_initial_projection_has_variance_one_over_hidden_units():
    assert_variance(initial(PROJECTED).w_p, UNITS)


def test_initial_kernels_have_variance_one_over_fan_in():
    params = initial(jaxrnn.ConvLSTM((8, 8), 20, 10, kernel_size=(3, 2)))
    assert_variance(params.w_x, 3 * 2 * 20)
    assert_variance(params.w_h, 3 * 2 * 10)


def test_initial_recurrent_weights_of_indrnn_are_uniform():
    w = np.asarray(initial(LARGE[-1]).w_h)
    assert w.min() >= 0
    assert w.max() < 1
    np.testing.assert_allclose(np.quantile(w, [0.0, 0.25, 0.5, 0.75, 1]), [0, 0.25, 0.5, 0.75, 1], atol=0.15)


@every_cell
def test_initial_weights_in_bfloat16_are_those_in_float32_rounded(cell):
    half, single = initial(cell, dtype=jnp.bfloat16), initial(cell)
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(single), strict=True):
        assert (a.dtype, b.dtype) == (jnp.bfloat16, jnp.float32)
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


def test_initial_weights_in_float64():
    with jax.enable_x64(True):
        params = initial(jaxrnn.Elman(D, H), dtype=jnp.float64)
    assert {leaf.dtype for leaf in params} == {np.dtype(np.float64)}
    w = np.asarray(params.w_h)
    np.testing.assert_allclose(w @ w.T, np.eye(H), atol=1e-14)


@every_cell
def test_initial_weights_come_from_the_key(cell):
    first, again, other = initial(cell), initial(cell), initial(cell, seed=4)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(first.w_x - other.w_x).max() > 0.1
    if hasattr(first, "w_h"):
        assert np.abs(first.w_h - other.w_h).max() > 0.1


def test_irnn_init():
    params = jax.jit(lambda key: jaxrnn.irnn_init(key, INPUTS, UNITS, scale=0.9))(KEY)
    np.testing.assert_array_equal(params.w_h, np.float32(0.9) * np.eye(UNITS, dtype=np.float32))
    assert not np.any(params.b)
    w = np.asarray(params.w_x, np.float64)
    assert w.shape == (INPUTS, UNITS)
    np.testing.assert_allclose(w.std(), 1e-3, rtol=0.05)
    assert abs(w.mean()) < 1e-4
    half = jax.jit(lambda key: jaxrnn.irnn_init(key, INPUTS, UNITS, scale=0.9, dtype=jnp.bfloat16))(KEY)
    for a, b in zip(half, params, strict=True):
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


CHRONO = {
    "LSTM": (jaxrnn.LSTM(INPUTS, UNITS), slice(UNITS, 2 * UNITS), slice(0, UNITS)),
    "LSTM peephole coupled": (jaxrnn.LSTM(INPUTS, UNITS, peephole=True, coupled=True), slice(0, UNITS), None),
    "GRU": (jaxrnn.GRU(INPUTS, UNITS), slice(UNITS, 2 * UNITS), None),
    "GRU reset before": (jaxrnn.GRU(INPUTS, UNITS, reset_after=False), slice(UNITS, 2 * UNITS), None),
}


@pytest.mark.parametrize(("cell", "keep", "take"), list(CHRONO.values()), ids=list(CHRONO))
def test_chrono_init(cell, keep, take):
    before = jax.tree.map(lambda leaf: np.full(leaf.shape, 7, np.float32), jax.eval_shape(cell.init, KEY))
    before = jax.tree.map(jnp.asarray, before)
    after = jaxrnn.chrono_init(jax.random.key(5), before, max_steps=100)
    for a, b in zip(jax.tree.leaves(after._replace(b=None)), jax.tree.leaves(before._replace(b=None)), strict=True):
        np.testing.assert_array_equal(a, b)

    b, expected = np.array(after.b), np.array(before.b)
    steps = np.exp(b[keep])
    assert steps.min() >= 1
    assert steps.max() <= 99 + 1e-4
    np.testing.assert_allclose(np.quantile(steps, [0, 0.25, 0.5, 0.75, 1]), [1, 25.5, 50, 74.5, 99], atol=14)
    expected[keep] = b[keep]
    if take is not None:
        expected[take] = -b[keep]
    np.testing.assert_array_equal(b, expected)


def test_chrono_init_in_bfloat16_is_that_in_float32_rounded():
    params = initial(jaxrnn.LSTM(D, H))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    b = jaxrnn.chrono_init(KEY, params, max_steps=50).b
    np.testing.assert_array_equal(jaxrnn.chrono_init(KEY, half, max_steps=50).b, b.astype(jnp.bfloat16))


def test_chrono_init_says_what_it_takes():
    params = initial(jaxrnn.LSTM(D, H))
    with pytest.raises(TypeError, match="params: expected LSTMParams or GRUParams, got ElmanParams"):
        jaxrnn.chrono_init(KEY, initial(jaxrnn.Elman(D, H)), max_steps=10)
    with pytest.raises(ValueError, match="params: expected a bias"):
        jaxrnn.chrono_init(KEY, params._replace(b=None), max_steps=10)
    with pytest.raises(ValueError, match="max_steps: expected at least 3, got 2"):
        jaxrnn.chrono_init(KEY, params, max_steps=2)
    assert jaxrnn.chrono_init(KEY, params, max_steps=3).b.shape == params.b.shape
