"""Cells with options by the kernel that has them inside: as their own loop in float64, with every derivative."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import mostly_in_full

import jaxrnn
from jaxrnn import GRU, LSTM, MGU, SLSTM, Elman, IndRNN, LearnedCarry, RecurrentDropout, Zoneout
from jaxrnn.cells.activations import ACTIVATIONS, ALONG_FEATURES, activation
from jaxrnn.engines.cpu import library

X64 = True

pytestmark = pytest.mark.skipif(library.absent() is not None, reason="there is no kernel")

# Each of inputs D and units H.
CELLS = {
    "elman": lambda d, h: Elman(d, h, ("elu", 0.7), gate_clip=0.6),
    "indrnn": IndRNN,
    "indrnn tanh": lambda d, h: RecurrentDropout(IndRNN(d, h, "tanh"), 0.3),
    "peephole": lambda d, h: LSTM(d, h, peephole=True),
    "coupled": lambda d, h: LSTM(d, h, coupled=True),
    "coupled input": lambda d, h: LSTM(d, h, coupled="input", peephole=True),
    "clips": lambda d, h: LSTM(d, h, cell_clip=0.3, gate_clip=0.5, peephole=True),
    "activations": lambda d, h: LSTM(
        d,
        h,
        gate_activation=("hard_sigmoid", 0.3, 0.4),
        activation="gelu",
        output_activation=("scaled_tanh", 1.5, 0.6),
    ),
    "norm": lambda d, h: LSTM(d, h, layer_norm=True),
    "norm coupled": lambda d, h: LSTM(d, h, layer_norm=True, coupled=True, peephole=True, cell_clip=0.5),
    "projection": lambda d, h: LSTM(d, h, projection_size=max(1, h // 3)),
    "wide projection": lambda d, h: LSTM(d, h, projection_size=h + 5, layer_norm=True, peephole=True),
    "gru": lambda d, h: GRU(d, h, activation="softsign", gate_clip=0.7),
    "gru norm": lambda d, h: GRU(d, h, layer_norm=True),
    "before": lambda d, h: GRU(d, h, reset_after=False, activation="silu", gate_activation="hard_sigmoid"),
    "before norm": lambda d, h: GRU(d, h, reset_after=False, layer_norm=True),
    "mgu": MGU,
    "slstm": SLSTM,
    "slstm heads": lambda d, h: SLSTM(d, h, heads=next(n for n in (4, 3, 7, 1) if h % n == 0)),
    "dropout": lambda d, h: RecurrentDropout(LSTM(d, h), 0.3),
    "dropout gru": lambda d, h: RecurrentDropout(GRU(d, h), 0.3),
    "dropout before": lambda d, h: RecurrentDropout(GRU(d, h, reset_after=False), 0.3),
    "zoneout": lambda d, h: Zoneout(LSTM(d, h), (0.2, 0.4)),
    "zoneout all": lambda d, h: Zoneout(
        RecurrentDropout(LSTM(d, h, layer_norm=True, projection_size=3), 0.3), (0.2, 0.4)
    ),
    "zoneout mgu": lambda d, h: Zoneout(RecurrentDropout(MGU(d, h), 0.3), 0.25),
    "zoneout slstm": lambda d, h: Zoneout(SLSTM(d, h), (0.3, 0.0, 0.0, 0.0)),
}
some = pytest.mark.parametrize("name", mostly_in_full(list(CELLS), "zoneout all", "slstm heads", "mgu"))
NATIVE = {"gated_scan": "native"}


def draw(name, shape):
    """A layer with a learned start, and params, a carry and xs in float64."""
    steps, rows, inputs, units = shape
    rng, layer = np.random.default_rng(steps), LearnedCarry(CELLS[name](inputs, units))
    params = layer.init(jax.random.key(0), jnp.float64)

    def moved(x):
        return 0.5 * np.asarray(x) + 0.4 * min(1, 2 / max(1, x.size) ** 0.25) * rng.normal(size=x.shape)

    carry = layer.initial_carry(params, (rows,))
    return layer, (jax.tree.map(moved, params), jax.tree.map(moved, carry), rng.normal(size=(steps, rows, inputs)))


def ways(steps, rows):
    rng = np.random.default_rng(rows)
    resets, holes = rng.random((steps, rows)) < 0.3, rng.random((steps, rows)) < 0.7
    return {
        "plain": {},
        "all": {"key": jax.random.key(3), "reset": resets, "mask": holes},
        "reverse": {"reverse": True, "lengths": rng.integers(0, steps + 1, rows), "reset": resets},
        "batch-major": {"key": jax.random.key(5), "reset": resets.T, "time_axis": 1},
        "remat": {"key": jax.random.key(5), "reset": resets, "remat_every": 3},
    }


def single(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def close(found, wanted, bound):
    for one, (path, other) in zip(jax.tree.leaves(found), jax.tree.leaves_with_path(wanted), strict=True):
        at = bound * max(1, np.abs(other).max(initial=0))
        np.testing.assert_allclose(one, other, rtol=0, atol=at, err_msg=jax.tree_util.keystr(path))


def loss(layer, params, carry, xs, implementation, **options):
    xs = jnp.swapaxes(xs, 0, 1) if options.get("time_axis") else xs
    result = jaxrnn.scan(layer, params, carry, xs, implementation=implementation, **options)
    carry, ys = result
    return jnp.sin(ys).sum() + sum(jnp.cos(1.3 * leaf).sum() for leaf in jax.tree.leaves(carry)), result


def run(layer, arrays, implementation, options):
    """The last carry, ys, and all gradients."""
    own = functools.partial(loss, layer, implementation=implementation, **options)
    gradient, result = jax.jit(jax.grad(own, (0, 1, 2), has_aux=True))(*arrays)
    return result, gradient


# Steps, rows, inputs, units: blocks that are not full, one row, several threads by rows and by units.
SHAPES = [(7, 4, 3, 37), (5, 1, 3, 70), (3, 33, 9, 132)]
MORE = [(6, 11, 5, 21), (140, 5, 3, 9), (1, 2, 1, 1), (0, 3, 2, 5), (4, 0, 3, 2), (4, 2, 3, 600)]


@some
@pytest.mark.parametrize(
    "shape", [SHAPES[0], *(pytest.param(each, marks=pytest.mark.full) for each in SHAPES[1:] + MORE)]
)
def test_values_and_gradients_are_those_of_the_loop(name, shape):
    layer, arrays = draw(name, shape)
    for options in ways(*shape[:2]).values():
        wanted = run(layer, arrays, "xla", options)
        close(run(layer, single(arrays), NATIVE, options), wanted, 1e-4)
        close(run(layer, arrays, NATIVE, options), wanted, 1e-10)


@pytest.mark.parametrize("name", mostly_in_full(list(CELLS), "mgu"))
def test_higher_derivatives_and_members(name):
    layer, arrays = draw(name, (5, 3, 4, 6))
    options = {"key": jax.random.key(1), "reset": np.arange(15).reshape(5, 3) % 4 == 0}

    def own(implementation, params, carry, xs):
        return loss(layer, params, carry, xs, implementation, **options)[0]

    def derivatives(implementation, params, carry, xs):
        value = functools.partial(own, implementation)
        forward = jax.jvp(lambda p, x: value(p, carry, x), (params, xs), (jax.tree.map(jnp.cos, params), xs))
        back = jax.grad(lambda x: (jax.grad(value)(params, carry, x).cell.w_x ** 2).sum())(xs)
        return forward, back

    wanted = derivatives("xla", *arrays)
    close(derivatives(NATIVE, *single(arrays)), wanted, 2e-3)
    several = jax.tree.map(lambda x: jnp.stack([x, x[::-1], -x]), single(arrays))
    one = jax.jit(jax.value_and_grad(functools.partial(own, NATIVE), (0, 1, 2)))
    for axes in ((0, 0, 0), (None, 0, 0), (0, None, None), (None, None, 0)):
        given = [
            tree if axis == 0 else jax.tree.map(lambda x: x[1], tree) for tree, axis in zip(several, axes, strict=True)
        ]
        every = jax.jit(jax.vmap(one, axes))(*given)
        for k in range(3):
            mine = [
                tree if axis is None else jax.tree.map(lambda x, k=k: x[k], tree)
                for tree, axis in zip(given, axes, strict=True)
            ]
            close(jax.tree.map(lambda x, k=k: x[k], every), one(*mine), 1e-5)


def test_both_directions_are_one_call():
    inner = LSTM(3, 5, peephole=True)
    layer = jaxrnn.Bidirectional(RecurrentDropout(inner, 0.2), RecurrentDropout(inner, 0.2))
    params, xs = layer.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (6, 4, 3), jnp.float32)
    options = {"key": jax.random.key(2), "lengths": np.array([6, 0, 3, 5])}

    def both(implementation):
        def own(params, xs):
            return jnp.sin(jaxrnn.scan(layer, params, None, xs, implementation=implementation, **options)[1]).sum()

        return jax.value_and_grad(own, (0, 1))(params, xs)

    close(both(NATIVE), both("xla"), 1e-5)
    program = jax.jit(lambda xs: jaxrnn.scan(inner, params[0], None, xs)[1]).trace(xs)
    assert program.lower(lowering_platforms=("cpu",)).as_text().count("jaxrnn_staged_forward") >= 1
    assert "jaxrnn_staged" not in program.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name not in ALONG_FEATURES])
def test_every_activation_of_the_kernel_has_its_value_and_slope(name):
    edges = [-6.0, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0]
    xs = np.concatenate([np.linspace(-30, 30, 301), np.linspace(-0.9, 0.9, 40), edges]).astype(np.float32)
    numbers = tuple(0.75 + number for number in ACTIVATIONS[name][1])
    for spec in (name, (name, *numbers)) if numbers else (name,):
        cell = Elman(1, 1, spec)
        params = jaxrnn.ElmanParams(jnp.ones((1, 1)), jnp.zeros((1, 1)), None)

        def of_kernel(x, cell=cell, params=params):
            ys = jaxrnn.scan(cell, jax.tree.map(jnp.float32, params), None, x[None, :, None], implementation=NATIVE)[1]
            return ys.sum(), ys[0, :, 0]

        slopes, ys = jax.grad(of_kernel, has_aux=True)(jnp.asarray(xs))
        wide = jnp.asarray(xs, jnp.float64)
        function = activation(spec)
        with np.errstate(over="ignore"):
            wanted, wanted_slopes = function(wide), jax.vmap(jax.grad(lambda x, f=function: f(x)))(wide)
        np.testing.assert_allclose(ys, wanted, 3e-6, 2e-6)
        np.testing.assert_allclose(slopes, wanted_slopes, 5e-6, 1e-6)


def test_a_function_of_ones_own_has_no_kernel_and_says_so():
    cell = LSTM(3, 4, activation=jnp.sin)
    params, xs = cell.init(jax.random.key(0)), jnp.ones((5, 2, 3), jnp.float32)
    (call,) = jaxrnn.explain(cell, params, None, xs, platform="cpu").calls
    assert call.implementation == "xla"
    assert "no kernel has the activation" in call.refused["native"]
    with pytest.raises(ValueError, match="no kernel has the activation"):
        jaxrnn.scan(cell, params, None, xs, implementation="native")


@some
def test_padding_is_inert(name):
    layer, arrays = draw(name, (6, 3, 4, 5))
    params, carry, xs = single(arrays)
    mask = np.arange(6)[:, None] < np.array([[6, 2, 0]])
    options = {"mask": mask, "key": jax.random.key(0)}
    spoiled = jnp.where(mask[..., None], xs, jnp.nan)
    both = [run(layer, (params, carry, each), NATIVE, options) for each in (xs, spoiled)]
    jax.tree.map(np.testing.assert_array_equal, *both)
    result, _ = both[0]
    np.testing.assert_array_equal(result[1][~mask], 0)


def test_calls_from_several_threads_do_not_disturb_each_other():
    layer, arrays = draw("norm coupled", (9, 12, 8, 70))
    run_once = jax.jit(jax.grad(lambda *arrays: loss(layer, *arrays, NATIVE)[0], (0, 1, 2)))
    given = single(arrays)
    wanted, found = run_once(*given), []

    def work():
        found.extend(run_once(*given) for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    for each in found:
        close(each, wanted, 1e-5)
