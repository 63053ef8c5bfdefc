"""The compiled CPU kernels: the numbers of XLA's form, under every transformation, on every instruction set."""

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sanitize
from members import weighted_sum
from tiers import mostly_in_full

import jaxrnn
from jaxrnn import GRU, LSTM, Elman, LearnedCarry
from jaxrnn.engines.cpu import library as native
from jaxrnn.engines.gated import programs

ABSENT = native.absent()
needed = pytest.mark.skipif(ABSENT is not None, reason=f"no compiled kernels: {ABSENT}")
KINDS = {
    "elman": lambda d, h: Elman(d, h),
    "relu": lambda d, h: Elman(d, h, activation="relu"),
    "lstm": LSTM,
    "gru": GRU,
    "gru_before": lambda d, h: GRU(d, h, reset_after=False),
}
# Steps, rows, inputs, units: tiles and blocks that are not full, one, enough for several threads, results of megabytes.
SHAPES = [(3, 13, 7, 21), (6, 2, 9, 131)]
MORE_SHAPES = [(5, 4, 3, 2), (1, 1, 1, 1), (9, 25, 30, 70), (40, 1, 5, 33), (140, 64, 3, 61)]
RNG = np.random.default_rng(0)


def draw(tree, scale=0.4):
    return jax.tree.map(lambda leaf: jnp.asarray(scale * RNG.normal(size=leaf.shape), leaf.dtype), tree)


def problem(kind, shape):
    steps, rows, inputs, units = shape
    cell = KINDS[kind](inputs, units)
    params = draw(jax.eval_shape(cell.init, jax.random.key(0)), min(0.4, units**-0.5))
    carry = draw(jax.eval_shape(lambda p: cell.initial_carry(p, (rows,)), params), 1.0)
    return cell, params, carry, jnp.asarray(RNG.normal(size=(steps, rows, inputs)), jnp.float32)


def flags(steps, rows):
    return {
        "plain": {},
        "lengths": {"lengths": jnp.asarray(RNG.integers(0, steps + 1, rows))},
        "resets, holes": {"reset": RNG.random((steps, rows)) < 0.4, "mask": RNG.random((steps, rows)) < 0.7},
        "reverse": {
            "reverse": True,
            "lengths": RNG.integers(0, steps + 1, rows),
            "reset": RNG.random((steps, rows)) < 0.3,
        },
        "remat": {"remat_every": 2, "reset": RNG.random((steps, rows)) < 0.3},
    }


def both_ways(function):
    """What `function` of an implementation's name gives, for the kernels and for XLA's form."""
    return [jax.tree.map(np.asarray, jax.jit(function, static_argnums=0)(name)) for name in ("native", "xla")]


def close(ours, theirs, tolerance=2e-5):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        bound = tolerance * max(1.0, abs(b).max(initial=0))
        np.testing.assert_allclose(a, b, tolerance, bound, err_msg=jax.tree_util.keystr(path))


def gradients(cell, params, carry, xs):
    """A function of an implementation's name: values and gradients with every kind of flags, in one program."""
    ways = flags(*xs.shape[:2])

    def run(name):
        def loss(params, carry, xs, options):
            result = jaxrnn.scan(cell, params, carry, xs, implementation=name, **options)
            return weighted_sum(result), result

        gradient = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
        return {way: gradient(params, carry, xs, options) for way, options in ways.items()}

    return run


def full(values):
    """Of the full tier only."""
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


@needed
@pytest.mark.parametrize("shape", [*SHAPES, *full(MORE_SHAPES)], ids=str)
@pytest.mark.parametrize("kind", mostly_in_full(KINDS, "lstm", "gru"))
def test_values_and_gradients(kind, shape):
    close(*both_ways(gradients(*problem(kind, shape))))


@needed
@pytest.mark.parametrize("kind", mostly_in_full(KINDS, "lstm", "gru"))
def test_values_and_gradients_in_float64(kind):
    with jax.enable_x64(True):
        cell, *arrays = problem(kind, SHAPES[0])
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), arrays)
        close(*both_ways(gradients(cell, *wide)), 1e-12)


@pytest.mark.parametrize("shape", [(0, 3, 2, 5), (4, 0, 3, 2), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", mostly_in_full(KINDS, "lstm"))
def test_tangents_of_nothing_and_of_one_step(kind, shape):
    """Those of the program that runs where there is no kernel."""
    cell, *arrays = problem(kind, shape)
    ways = flags(*shape[:2]).values()

    def tangents(name):
        def run(*arrays):
            return [jaxrnn.scan(cell, *arrays, implementation=name, **options) for options in ways]

        return jax.jvp(run, arrays, arrays)

    close(tangents(None), tangents("xla"))


@needed
@pytest.mark.parametrize("shape", [(0, 3, 2, 5), (4, 0, 3, 2)], ids=str)
@pytest.mark.parametrize("kind", ["lstm", *full(["elman", "relu", "gru", "gru_before"])])
def test_values_and_gradients_of_nothing(kind, shape):
    close(*both_ways(gradients(*problem(kind, shape))))


@needed
@pytest.mark.parametrize("length", [6, 0])
@pytest.mark.parametrize("kind", ["gru", *full(["elman", "relu", "lstm", "gru_before"])])
def test_a_learned_start_gets_its_gradient(kind, length):
    inner, params, carry, xs = problem(kind, (length, 4, 3, 5))
    cell = LearnedCarry(inner)
    params = jaxrnn.LearnedCarryParams(params, jax.tree.map(lambda leaf: leaf[0], carry))
    reset = RNG.random((length, 4)) < 0.4

    def run(name):
        return jax.grad(
            lambda params: weighted_sum(jaxrnn.scan(cell, params, None, xs, reset=reset, implementation=name))
        )(params)

    close(*both_ways(run))


TRANSFORMATIONS = {
    "forward mode": lambda f, p, x: jax.jvp(f, (p, x), (p, x)),
    "linearize": lambda f, p, x: jax.linearize(f, p, x)[1](p, x),
    "forward over reverse": lambda f, p, x: jax.jvp(jax.grad(f), (p, x), (p, x)),
    "reverse over forward": lambda f, p, x: jax.grad(lambda p: jax.jvp(f, (p, x), (p, x))[1])(p),
    "reverse over reverse": lambda f, p, x: jax.grad(lambda p: weighted_sum(jax.grad(f)(p, x)))(p),
    "hessian of xs": lambda f, p, x: jax.hessian(f, 1)(p, x),
    "checkpoint": lambda f, p, x: jax.grad(jax.checkpoint(f))(p, x),
    "vmap over xs": lambda f, p, x: jax.vmap(jax.grad(f, (0, 1)), (None, 0))(p, jnp.stack([x, 2 * x, -x])),
    "vmap over xs, last axis": lambda f, p, x: jax.vmap(jax.grad(f, (0, 1)), (None, 3))(p, jnp.stack([x, 2 * x], 3)),
    "vmap over params": lambda f, p, x: jax.vmap(jax.grad(f, (0, 1)), (0, None))(several(p), x),
    "vmap over both": lambda f, p, x: jax.vmap(jax.grad(f, (0, 1)))(several(p), jnp.stack([x, 2 * x, -x])),
    "vmap in vmap": lambda f, p, x: jax.vmap(jax.vmap(jax.grad(f), (None, 0)), (0, None))(
        several(p), jnp.stack([x, 2 * x])
    ),
    "jacobian forward": lambda f, p, x: jax.jacfwd(lambda x: jax.grad(f)(p, x))(x),
    "inside scan": lambda f, p, x: jax.lax.scan(lambda s, _: (s - 0.1 * jax.grad(f, 1)(p, s), f(p, s)), x, None, 3),
}
USUAL = ("forward mode", "reverse over reverse", "checkpoint", "vmap over both")


def several(tree):
    return jax.tree.map(lambda leaf: jnp.stack([leaf, 1.1 * leaf, 0.5 * leaf]), tree)


@needed
@pytest.mark.parametrize("how", [*USUAL, *full([how for how in TRANSFORMATIONS if how not in USUAL])])
@pytest.mark.parametrize("kind", ["gru", *full(["elman", "relu", "lstm", "gru_before"])])
def test_transformations(kind, how):
    cell, params, carry, xs = problem(kind, (3, 2, 3, 4))
    reset = np.array([[0, 0], [0, 1], [1, 0]], bool)

    def run(name):
        def loss(params, xs):
            return weighted_sum(jaxrnn.scan(cell, params, carry, xs, reset=reset, implementation=name))

        return TRANSFORMATIONS[how](loss, params, xs)

    close(*both_ways(run), 1e-4)


@needed
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_is_not_finite_crosses_padding_or_a_reset(kind):
    cell, params, carry, xs = problem(kind, (5, 3, 3, 4))
    xs = xs.at[2, 0].set(np.nan)
    reset = np.zeros((5, 3), bool)
    reset[3, 0] = True

    def loss(xs):
        ys = jaxrnn.scan(cell, params, carry, xs, reset=reset, implementation="native")[1]
        return weighted_sum(ys.at[2, 0].set(0)), ys

    gradient, ys = jax.jit(jax.grad(loss, has_aux=True))(xs)
    assert np.isnan(ys[2, 0]).any()
    assert np.isfinite(ys[3:]).all()
    assert np.isfinite(gradient[3:]).all()
    lengths = np.array([2, 5, 0])

    def padded(xs):
        return weighted_sum(jaxrnn.scan(cell, params, None, xs, lengths=lengths, implementation="native"))

    assert np.isfinite(jax.jit(jax.grad(padded))(xs)).all()


def ulps(ours, exact):
    """The distance of numbers from exact ones, in units of their last place."""
    return abs(ours.astype(np.longdouble) - exact) / np.spacing(abs(exact).astype(ours.dtype)).astype(np.longdouble)


@needed
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_functions_are_accurate(dtype):
    """tanh by an Elman cell without weights but 1; σ as a forget gate, by what becomes of c = 1."""
    with jax.enable_x64(dtype == np.float64):
        functions_are_accurate(dtype)


def functions_are_accurate(dtype):
    info = np.finfo(dtype)
    most, least, wide = (110, -44, np.longdouble) if dtype == np.float32 else (885, -322, np.longdouble)
    small = np.logspace(least, 1, 20_001)
    somewhere = np.exp2(np.random.default_rng(0).uniform(-8, 5, 200_000))  # where grids miss what rounds worst
    points = np.linspace(-most, most, 40_001), small, -small, somewhere, -somewhere
    x = np.concatenate(points).astype(dtype)[None, :, None]
    one = jnp.ones((1, 1), dtype)
    elman = jaxrnn.ElmanParams(one, 0 * one, None)
    tanh = np.asarray(jaxrnn.scan(Elman(1, 1), elman, None, x, implementation="native")[1])[0, :, 0]
    normal = abs(x.ravel()) > 8 * info.tiny  # below, a result is subnormal, which may be taken for 0
    exact = np.tanh(x.ravel().astype(wide))
    assert ulps(tanh, exact)[normal].max() <= 2
    lstm = jaxrnn.LSTMParams(jnp.array([[0.0, 1.0, 0.0, 0.0]], dtype), jnp.zeros((1, 4), dtype), None)
    carry = jaxrnn.LSTMCarry(jnp.zeros((x.shape[1], 1), dtype), jnp.ones((x.shape[1], 1), dtype))
    sigma = np.asarray(jaxrnn.scan(LSTM(1, 1), lstm, carry, x, implementation="native")[0].c)[:, 0]
    exact = np.exp(-np.logaddexp(0, -x.ravel().astype(wide)))
    assert ulps(sigma, exact)[exact > info.tiny].max() <= 2
    special = np.array([np.inf, -np.inf, np.nan], dtype)[None, :, None]
    ends = np.asarray(jaxrnn.scan(Elman(1, 1), elman, None, special, implementation="native")[1]).ravel()
    np.testing.assert_array_equal(ends, [1, -1, np.nan])


@needed
def test_the_same_call_gives_the_same_bits_from_many_threads():
    cell, params, carry, xs = problem("lstm", (40, 32, 24, 64))
    run = jax.jit(lambda carry, xs: jaxrnn.scan(cell, params, carry, xs, implementation="native"))
    expected = jax.tree.map(np.asarray, run(carry, xs))
    wrong = []

    def work():
        for _ in range(20):
            for a, b in zip(jax.tree.leaves(run(carry, xs)), jax.tree.leaves(expected), strict=True):
                # A call that finds the threads taken runs on its own, by the same tiles.
                if not np.array_equal(a, b):
                    wrong.append(abs(np.asarray(a) - b).max())

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


PROGRAM = """
import ctypes, json, sys
import jax, jax.numpy as jnp, numpy as np, jaxrnn
from jaxrnn.engines.cpu import library as native
assert native.absent() is None
rng = np.random.default_rng(0)
results = []
for cell in (jaxrnn.LSTM(5, 19), jaxrnn.GRU(5, 19), jaxrnn.GRU(5, 19, reset_after=False), jaxrnn.Elman(5, 19)):
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.4, p.dtype), cell.init(jax.random.key(0)))
    xs = jnp.asarray(rng.normal(size=(6, 7, 5)), jnp.float32)
    def loss(params):
        return (jaxrnn.scan(cell, params, None, xs, implementation=sys.argv[1])[1] ** 2).sum()
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    results.append([float(value), *(float(abs(leaf).sum()) for leaf in jax.tree.leaves(gradient))])
print(json.dumps(results))
"""


def program(name, **environment):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, name],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | environment,
    )
    assert run.returncode == 0, run.stderr
    return np.concatenate(json.loads(run.stdout))


def text(function, *arguments):
    """The compiled program."""
    return jax.jit(function).lower(*arguments).compile().as_text()


@needed
@pytest.mark.parametrize("kind", ["lstm", "gru_before", *full(["elman", "relu", "gru"])])
def test_batch_major_sequences_are_read_as_they_lie(kind):
    cell, params, carry, xs = problem(kind, (6, 4, 3, 5))
    reset = RNG.random((6, 4)) < 0.3
    lengths = np.array([6, 0, 3, 5])

    def loss(xs, axis):
        reset_ = np.moveaxis(reset, 0, axis)
        result = jaxrnn.scan(
            cell, params, carry, xs, lengths=lengths, reset=reset_, time_axis=axis, implementation="native"
        )
        return weighted_sum(result[0]) + weighted_sum(jnp.moveaxis(result[1], axis, 0)), result

    (_, (last, ys)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(xs, 0)
    turned = jnp.moveaxis(xs, 0, 1)
    (_, (last_1, ys_1)), gradient_1 = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(turned, 1)
    close((last, jnp.moveaxis(ys, 0, 1), jnp.moveaxis(gradient, 0, 1)), (last_1, ys_1, gradient_1))

    def run(xs):
        return jaxrnn.scan(cell, params, None, xs, time_axis=1, implementation="native")

    program = text(run, turned)
    assert "jaxrnn_gated_forward" in program
    assert not any(word in program for word in (" transpose(", " copy(")), program
    several_axes = jnp.stack([turned, 2 * turned])
    close(run(several_axes[1]), jax.tree.map(lambda leaf: leaf[1], cell_over_axes(cell, params, several_axes)))


def cell_over_axes(cell, params, xs):
    return jaxrnn.scan(cell, params, None, xs, time_axis=2, implementation="native")


@needed
@pytest.mark.parametrize("kind", ["lstm", *full(["elman", "relu", "gru", "gru_before"])])
def test_both_directions_are_one_call(kind):
    cell, params, carry, xs = problem(kind, (6, 4, 3, 5))
    both = jaxrnn.Bidirectional(cell, cell)
    params = jaxrnn.BidirectionalPair(params, draw(params))
    carry = jaxrnn.BidirectionalPair(carry, draw(carry))
    close(*map(jax.tree.leaves, both_ways(gradients(both, params, carry, xs))))
    assert text(lambda xs: jaxrnn.scan(both, params, None, xs), xs).count('custom_call_target="jaxrnn') == 1
    many = several(params)

    def gradient(name):
        return jax.vmap(jax.grad(lambda p: weighted_sum(jaxrnn.scan(both, p, None, xs, implementation=name))))(many)

    close(*map(jax.tree.leaves, both_ways(gradient)))


@needed
@pytest.mark.parametrize("kind", ["gru", *full(["elman", "lstm", "gru_before"])])
def test_an_array_that_one_direction_lacks(kind):
    """Zeros stand for it in the joint call."""
    cell, params, carry, xs = problem(kind, (4, 3, 2, 5))
    carry = jaxrnn.BidirectionalPair(carry, draw(carry))
    both = jaxrnn.Bidirectional(cell, cell)
    without = params._replace(b=None)
    other = params._replace(b_hn=None) if kind == "gru" else params
    given = jaxrnn.BidirectionalPair(without, other)
    close(*map(jax.tree.leaves, both_ways(gradients(both, given, carry, xs))))


@needed
@pytest.mark.parametrize("rows", [(2,), *full([(), (1,), (7,)])], ids=str)
@pytest.mark.parametrize("kind", mostly_in_full(KINDS, "lstm", "gru"))
def test_a_single_step(kind, rows):
    for inputs, units in [(1, 1), (11, 19), (40, 411)]:  # the last one with several threads, and several parts of each
        cell, params, carry, xs = problem(kind, (1, 7, inputs, units))
        carry = jax.tree.map(lambda leaf: leaf[0] if rows == () else leaf[: rows[0]], carry)
        x = xs[0, 0] if rows == () else xs[0, : rows[0]]

        def run(name):
            def loss(params, carry, x):
                result = jaxrnn.step(cell, params, carry, x, implementation=name)
                return weighted_sum(result), result

            value = jaxrnn.step(cell, params, carry, x, implementation=name)
            return value, jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, carry, x)

        close(*both_ways(run))
    program = text(lambda carry, x: jaxrnn.step(cell, params, carry, x), carry, x)
    assert program.count("custom_call_target") == 1


@needed
def test_a_call_of_another_shape_is_refused():
    """The binding itself, since nothing above it lets such a call pass."""
    shape = jax.ShapeDtypeStruct
    ones = functools.partial(jnp.ones, dtype=jnp.float32)
    right = [ones((1, 5, 2, 3)), ones((1, 3, 16)), ones((1, 4, 16)), ones((1, 2, 4)), ones((1, 2, 4)), ones((1, 16))]
    results = [shape(s, jnp.float32) for s in [(1, 5, 2, 4), (1, 2, 4), (1, 2, 4)]]
    here = 0b01000011111 | 0b111 << 32

    def call(arguments, results=results, **changed):
        options = {"kind": 2, "batch_major": False, "directions": 0, "pattern": 1, "members": 1, "here": here} | changed
        options = {k: v if isinstance(v, bool) else np.int64(v) for k, v in options.items()}
        return jax.block_until_ready(jax.ffi.ffi_call("jaxrnn_gated_forward", results)(*arguments, **options))

    def refused(*arguments, **changed):
        with pytest.raises(jax.errors.JaxRuntimeError, match="jaxrnn: "):
            call(*arguments, **changed)

    call(right)
    for k, wrong in enumerate([(1, 5, 2, 4), (1, 3, 15), (1, 4, 8), (1, 3, 4), (2, 2, 4), (1, 15)]):
        refused([*right[:k], ones(wrong), *right[k + 1 :]])
    for k in range(6):
        refused([*right[:k], jnp.ones(right[k].shape, jnp.int32), *right[k + 1 :]])
    for k in range(3):
        refused(right, [*results[:k], shape((*results[k].shape[:-1], 3), jnp.float32), *results[k + 1 :]])
    for changed in ({"kind": 5}, {"kind": -1}, {"pattern": 0}, {"batch_major": True}, {"members": 2}, {"members": -1}):
        refused(right, **changed)
    for bit in (0, 1, 3, 4, 5, 9, 10, 32, 33, 34, 35):  # one array fewer, or more, than there are
        refused(right, here=here ^ (1 << bit))
    refused(right[:-1])
    refused([*right, right[0]])
    refused(right, [*results, results[0]])


@needed
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_accelerator_runs_the_loop(options, dtype, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    cell = jaxrnn.LSTM(2, 3, **options)
    (call,) = jaxrnn.explain(cell, cell.init(jax.random.key(0)), None, jnp.ones((5, 2), dtype), platform="gpu").calls
    assert call.implementation == "xla"


@needed
def test_none_takes_the_kernels_on_the_cpu_alone():
    cell, params, _, xs = problem("lstm", (5, 4, 3, 2))
    (call,) = jaxrnn.explain(cell, params, None, xs, platform="cpu").calls
    assert call.implementation == "native"
    (call,) = jaxrnn.explain(cell, params, None, xs, platform="gpu").calls
    assert call.implementation == "xla"
    assert call.refused["native"] == "the kernels are compiled for the CPU"
    lowered = jax.jit(lambda xs: jaxrnn.scan(cell, params, None, xs)).trace(xs).lower(lowering_platforms=("cuda",))
    assert "jaxrnn_gated" not in lowered.as_text()
    named = jax.jit(lambda xs: jaxrnn.scan(cell, params, None, xs, implementation="native")).trace(xs)
    with pytest.raises(ValueError, match="'native' has kernels for the CPU, and this is compiled for cuda"):
        named.lower(lowering_platforms=("cuda",))


DEVICES = """
import sys, jax, jax.numpy as jnp, numpy as np, jaxrnn
from jax.sharding import NamedSharding, PartitionSpec as P
assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
cells = (jaxrnn.LSTM(3, 5), jaxrnn.GRU(3, 5), jaxrnn.Bidirectional(jaxrnn.Elman(3, 5), jaxrnn.Elman(3, 5)),
         jaxrnn.MGU(3, 5), jaxrnn.MinGRU(3, 5), jaxrnn.MinLSTM(3, 5, log_space=True), jaxrnn.RGLRU(3),
         jaxrnn.QRNN(3, 5, 3), jaxrnn.LRU(3, 5), jaxrnn.S6(3, 4))
for cell in cells[int(sys.argv[1])::2]:
    params = cell.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (7, 4, 3))
    reset = jax.random.bernoulli(jax.random.key(2), 0.3, (7, 4))
    lengths = jnp.array([7, 0, 3, 5])
    def loss(params, xs, reset, lengths):
        ys = jaxrnn.scan(cell, params, None, xs, reset=reset, lengths=lengths)[1]
        return (jnp.sin(ys) ** 2).sum(), ys
    both = jax.value_and_grad(loss, has_aux=True)
    (value, ys), gradient = jax.jit(both)(params, xs, reset, lengths)
    rows, row = NamedSharding(mesh, P(None, "rows")), NamedSharding(mesh, P("rows"))
    placed = jax.device_put(xs, rows), jax.device_put(reset, rows), jax.device_put(lengths, row)
    compiled = jax.jit(both).lower(params, *placed).compile()
    assert "all-gather" not in compiled.as_text()
    (value_2, ys_2), gradient_2 = compiled(params, *placed)
    assert ys_2.sharding.is_equivalent_to(rows, 3), ys_2.sharding

    def local(params, xs, reset, lengths):
        (value, ys), gradient = both(params, xs, reset, lengths)
        return jax.lax.psum(value, "rows"), ys, gradient
    sequence = P(None, "rows")
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), sequence, sequence, P("rows")),
                                   out_specs=(P(), sequence, P()), check_vma=True))
    program = mapped.lower(params, xs, reset, lengths).compile().as_text()
    kernel = {"Bidirectional": "gated_backward", "LSTM": "gated_backward", "GRU": "gated_backward",
              "MinGRU": "elementwise_backward", "RGLRU": "elementwise_backward", "QRNN": "elementwise_backward",
              "S6": "diagonal_backward"}
    if jaxrnn.engines.cpu.library.absent() is None and type(cell).__name__ in kernel:
        assert kernel[type(cell).__name__] in program, cell
    value_3, ys_3, gradient_3 = mapped(params, xs, reset, lengths)
    for other in ((value_2, ys_2, gradient_2), (value_3, ys_3, gradient_3)):
        for a, b in zip(jax.tree.leaves((value, ys, gradient)), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, 1e-5, 1e-5)
"""


@pytest.mark.full
@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.full)])
def test_two_devices_divide_the_rows(half):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags}
    run = subprocess.run(
        [sys.executable, "-c", DEVICES, str(half)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
@pytest.mark.parametrize("sanitizer", sanitize.SANITIZERS)
def test_sanitizers_find_nothing(sanitizer):
    assert "0 wrong" in sanitize.run(sanitizer, 100, "g++", "baseline")


@pytest.mark.full
@needed
def test_every_instruction_set():
    expected = program("xla")
    for instructions in ("baseline", "avx2"):
        ours = program("native", JAXRNN_INSTRUCTIONS=instructions, JAXRNN_NUM_THREADS="1")
        np.testing.assert_allclose(ours, expected, 1e-4)


@needed
def test_one_trace_serves_equal_calls():
    cell, params, carry, xs = problem("gru", (5, 4, 3, 2))
    traces = []

    @jax.jit
    def run(params, xs):
        traces.append(1)
        return jax.grad(lambda p: weighted_sum(jaxrnn.scan(cell, p, carry, xs, implementation="native")))(params)

    run(params, xs)
    run(jax.tree.map(lambda leaf: 2 * leaf, params), xs + 1)
    assert len(traces) == 1


class Leaky(LSTM):
    """With an update of its own, which no kernel may leave out."""

    input_size: int
    hidden_size: int

    def update(self, theta, carry, u, v, w):
        new, y = super().update(theta, carry, u, v, w)
        return new, 0.5 * y


@pytest.mark.parametrize(
    ("cell", "dtype", "why"),
    [
        (LSTM(3, 4, activation=jnp.sin), jnp.float32, "no kernel has the activation"),
        (Leaky(3, 4), jnp.float32, "no kernel computes what Leaky does"),
    ],
)
def test_what_no_kernel_computes_says_so(cell, dtype, why):
    with jax.enable_x64(True):
        params, xs = cell.init(jax.random.key(0), dtype), jnp.ones((5, 2, 3), dtype)
        key = jax.random.key(1)
        with pytest.raises(ValueError, match=f"as 'native': {why}"):
            jaxrnn.scan(cell, params, None, xs, key=key, implementation="native")
        (call,) = jaxrnn.explain(cell, params, None, xs, key=key).calls
        assert call.implementation == "xla"
        assert why in call.refused["native"]


HALVES = {
    "lstm": LSTM(3, 5),
    "lstm, layer_norm": LSTM(3, 5, layer_norm=True),
    "slstm": jaxrnn.SLSTM(3, 6, heads=2),
    "both directions": jaxrnn.Bidirectional(jaxrnn.GRU(3, 5), jaxrnn.GRU(3, 5)),
    "qrnn": jaxrnn.QRNN(3, 5),
    "lru": jaxrnn.LRU(3, 5),
    "rg_lru": jaxrnn.RGLRU(3),
    "s6": jaxrnn.S6(3, 4),
    "s4d": jaxrnn.S4D(3, 4),
    "gated_delta_net": jaxrnn.GatedDeltaNet(3, 2, 4, 5),
    "mlstm": jaxrnn.MLSTM(3, 2, 4, 5),
}


@needed
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", mostly_in_full(HALVES, "lstm", "gated_delta_net"))
def test_half_precision_is_computed_in_single(name, dtype):
    cell = HALVES[name]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), cell.init(jax.random.key(0)))
    xs = jax.random.normal(jax.random.key(1), (7, 2, 3), dtype)
    lengths = jnp.array([7, 4])

    def run(params, xs, **options):
        def loss(params, xs):
            ys = jaxrnn.scan(cell, params, None, xs, lengths=lengths, **options)[1]
            return (ys.astype(jnp.float32) ** 2).sum(), ys

        (_, ys), gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, xs)
        return ys, gradient

    found = run(params, xs)
    wide, wide_xs = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, xs))
    assert found[0].dtype == dtype
    np.testing.assert_array_equal(found[0], run(wide, wide_xs)[0].astype(dtype))
    loop = run(wide, wide_xs, implementation="xla")
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(loop), strict=True):
        assert one.dtype == dtype
        close = 4 * float(jnp.finfo(dtype).eps) * max(1, float(jnp.abs(other).max()))
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=0, atol=close)
    for call in jaxrnn.explain(cell, params, None, xs, platform="cpu").calls:
        assert call.implementation == "native"
    (call, *_) = jaxrnn.explain(cell, params, None, xs, platform="gpu").calls
    assert call.implementation != "native"


def test_kernels_for_a_newer_jaxlib_are_not_registered():
    assert native.newer("0.4.30") is None
    assert "compiled for jaxlib 99.1.0, newer than" in native.newer("99.1.0")
    code = """
import jax, jax.numpy as jnp, jaxlib.version
jaxlib.version.__version__ = "0.4.30"
import jaxrnn
cell = jaxrnn.GRU(3, 4)
params = cell.init(jax.random.key(0))
print(jaxrnn.explain(cell, params, None, jnp.ones((7, 3))))
print(float(jaxrnn.scan(cell, params, None, jnp.ones((7, 3)))[1].sum()))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert "not native" in run.stdout
    assert ABSENT is not None or "newer than" in run.stdout


@needed
@pytest.mark.parametrize("limit", ["all", "0", "-3", "2x", ""])
def test_a_number_of_threads_that_is_none_is_told_and_not_obeyed(limit):
    library = Path(native.__file__).with_name("_kernels.so")
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).jaxrnn_threads())"
    run, most = (
        subprocess.run(
            [sys.executable, "-c", code, str(library)],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
            env=os.environ | {"JAXRNN_NUM_THREADS": number},
        )
        for number in (limit, "99999")
    )
    assert run.stdout == most.stdout
    told = f"jaxrnn: JAXRNN_NUM_THREADS: expected a number from 1, got '{limit}'; using {run.stdout}"
    assert run.stderr == (told if limit else "")


STARVED = """
import resource, sys
import jax, jax.numpy as jnp, jaxrnn
cell = jaxrnn.GRU(64, 256)
params, xs = cell.init(jax.random.key(0)), jnp.ones((4, 64, 64))
run = jax.jit(lambda xs: jaxrnn.scan(cell, params, None, xs, implementation="native")[1]).lower(xs).compile()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, resource.RLIM_INFINITY))
starved = [float(run(xs).sum()) for _ in range(3)]
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert starved == [float(run(xs).sum())] * 3, starved
print("done")
"""


@needed
@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) == 1, reason="needs two processors, /proc")
def test_a_call_that_gets_no_threads_runs_on_its_own():
    """Each takes a GiB of stack here, more than the limit leaves."""
    command = ["bash", "-c", 'ulimit -s 1048576 && exec "$0" -c "$1"', sys.executable, STARVED]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.stdout == "done\n", run.stderr


def test_a_carry_of_an_empty_row_reaches_no_gradient_on_other_platforms():
    """The program of the backward pass reads no carry at an invalid step."""
    steps, rows, inputs, units = 5, 2, 3, 4

    def drawn(*shape):
        return jnp.asarray(RNG.normal(size=(1, *shape)), jnp.float32)

    carry, none = drawn(rows, units).at[0, 1].set(jnp.nan), jnp.zeros((1, rows, 0))
    read = programs.Read(
        xs=drawn(steps, rows, inputs),
        w_x=drawn(inputs, 4 * units),
        w_h=drawn(units, 4 * units),
        h=carry,
        c=carry,
        fresh_h=none,
        fresh_c=none,
        valid=jnp.stack([jnp.ones(steps, bool), jnp.zeros(steps, bool)], 1)[None],
        start=jnp.zeros((1, steps, 0), bool),
        b=drawn(4 * units),
        b_hn=jnp.zeros((1, 0)),
    )
    options = {"kind": "lstm", "directions": (False,), "batch_major": False, "named": False}
    ys, h, c, *kept = programs.forward(*read, save=True, **options)
    cotangents = [jnp.ones_like(each) for each in (ys, h, c)]
    found = programs.backward(*read, ys, *kept, *cotangents, wrt=("xs", "weights", "b"), **options)
    assert all(jnp.isfinite(each).all() for each in found)
