"""S6 and S4D by their kernel: values against a loop in NumPy in float64, derivatives, and what is in memory."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxrnn
from jaxrnn.engines.cpu import library
from jaxrnn.engines.diagonal import programs

X64 = True

pytestmark = pytest.mark.skipif(library.absent() is not None, reason="there is no kernel")
full = functools.partial(pytest.param, marks=pytest.mark.full)

# Channels that fill no block of the kernel, some blocks, and several groups; states that fill no vector.
CELLS = {
    "s6": jaxrnn.S6(5, 3, 2),
    "s6_blocks": jaxrnn.S6(37, 19, 2),
    "s6_groups": jaxrnn.S6(300, 4, 2),
    "s4d": jaxrnn.S4D(5, 3),
    "s4d_blocks": jaxrnn.S4D(37, 6, "hippo", discretization="bilinear"),
}
SIZES = [(0, (2,)), (1, ()), (7, (2, 3)), (65, (3,)), (130, (2, 1)), (67, ())]


def draw(cell, length, batch, flags=False, seed=0):
    """A layer with a learned fresh carry, its params, a carry, xs, all in float64, and flags."""
    rng = np.random.default_rng(seed)
    layer = jaxrnn.LearnedCarry(cell)
    params = layer.init(jax.random.key(seed), jnp.float64)

    def moved(x):
        noise = rng.normal(size=x.shape) + (1j * rng.normal(size=x.shape) if np.iscomplexobj(x) else 0)
        # Of 300 channels, large sums x w_x would be rounded to float32 by more than a gradient may be off.
        return np.asarray(x) + min(0.2, 10 / cell.input_size) * noise

    params = jax.tree.map(moved, params)
    carry = jax.tree.map(moved, layer.initial_carry(params, batch))
    xs = rng.normal(size=(length, *batch, cell.input_size))
    drawn = {}
    if flags:
        drawn = {"mask": rng.random((length, *batch)) < 0.8, "reset": rng.random((length, *batch)) < 0.1}
    return layer, (params, carry, xs), drawn


def single(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.complex64 if np.iscomplexobj(x) else jnp.float32), tree)


def oracle(layer, params, carry, xs, *, mask=None, reset=None, reverse=False):
    """One step after the other, row by row of the batch."""
    cell = layer.cell
    step = oracles.s6_step
    if isinstance(cell, jaxrnn.S4D):
        step = functools.partial(oracles.s4d_step, discretization=cell.discretization)
    fresh = jax.tree.map(np.asarray, layer.initial_carry(params))
    (length, *batch), last, ys = xs.shape[:-1], carry.h.copy(), np.zeros(xs.shape)
    for row in np.ndindex(*batch):
        state, begin = type(carry)(last[row]), False
        for t in reversed(range(length)) if reverse else range(length):
            at = (t, *row)
            if mask is not None and not mask[at]:
                continue
            starts = reset is not None and reset[at]
            if begin or (starts and not reverse):
                state = fresh
            begin = starts and reverse  # in reverse, the step before the boundary begins
            state, ys[at], _ = step(params.cell, state, xs[at])
        last[row] = state.h
    return type(carry)(last), ys


def close(found, wanted, bound):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=bound * max(1, np.abs(other).max(initial=0)))


@pytest.mark.parametrize("name", ["s6_groups", full("s4d_blocks"), full("s6_blocks"), full("s6"), full("s4d")])
def test_the_loop_in_numpy(name):
    for k, (sizes, reverse) in enumerate(zip(SIZES, itertools.cycle([False, True]))):
        layer, arrays, drawn = draw(CELLS[name], *sizes, k != 1, seed=k)
        wanted = oracle(layer, *arrays, **drawn, reverse=reverse)
        found = jaxrnn.scan(layer, *single(arrays), **drawn, reverse=reverse, implementation="native")
        close(found, wanted, 1e-5)
        assert found[1].dtype == jnp.float32


@pytest.mark.parametrize("name", ["s6_blocks", full("s4d_blocks")])
def test_a_thousand_steps(name):
    layer, arrays, _ = draw(CELLS[name], 1000, (2,))
    for given, bound in ((single(arrays), 2e-5), (arrays, 1e-11)):
        close(jaxrnn.scan(layer, *given, implementation="native"), oracle(layer, *arrays), bound)


def loss(layer, params, carry, xs, **options):
    carry, ys = jaxrnn.scan(layer, params, carry, xs, **options)
    return jnp.sin(ys).sum() + sum(jnp.cos(part).sum() for x in jax.tree.leaves(carry) for part in (x.real, x.imag))


@pytest.mark.parametrize("name", ["s6", "s4d", full("s6_blocks"), full("s6_groups"), full("s4d_blocks")])
@pytest.mark.parametrize("reverse", [full(False), True])
def test_gradients_are_those_of_the_loop(name, reverse):
    """Of params, the learned carry among them, of the carry and of xs."""
    for k, (length, batch) in enumerate([(1, ()), (65, (2, 3)), (200, (3,))]):
        layer, arrays, drawn = draw(CELLS[name], length, batch, k > 0, seed=k)
        gradient = jax.jit(
            jax.grad(functools.partial(loss, layer, **drawn, reverse=reverse), (0, 1, 2)),
            static_argnames="implementation",
        )
        wanted = gradient(*arrays, implementation="xla")
        close(gradient(*single(arrays), implementation="native"), wanted, 1e-4)
        close(gradient(*arrays, implementation="native"), wanted, 1e-11)


@pytest.mark.full
@pytest.mark.parametrize("name", ["s6", "s4d"])
def test_every_derivative(name):
    """Forward mode, reverse of reverse, forward of reverse: the kernel's as the loop's in float64."""
    layer, arrays, drawn = draw(CELLS[name], 67, (2,), True)
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), arrays)

    @functools.partial(jax.jit, static_argnames="implementation")
    def derivatives(arrays, moved, implementation):
        def f(arrays):
            return loss(layer, *arrays, **drawn, implementation=implementation)

        def along(arrays):
            pairs = zip(*map(jax.tree.leaves, (jax.grad(f)(arrays), moved)), strict=True)
            return sum(jnp.vdot(one, other).real for one, other in pairs)

        return jax.jvp(f, (arrays,), (moved,))[1], jax.grad(along)(arrays), jax.jvp(jax.grad(f), (arrays,), (moved,))[1]

    wanted = derivatives(arrays, moved, "xla")
    close(derivatives(single(arrays), single(moved), "native"), wanted, 1e-3)


@pytest.mark.parametrize("name", [full("s6"), full("s4d")])
def test_vmap_over_anything(name):
    layer, arrays, drawn = draw(CELLS[name], 9, (2,), True)
    given = dict(zip(("params", "carry", "xs"), single(arrays), strict=True)) | drawn

    def value(each):
        each = dict(each)
        arrays = [each.pop(name) for name in ("params", "carry", "xs")]
        run = functools.partial(loss, layer, **each, implementation="native")
        return jax.value_and_grad(run, (0, 1, 2))(*arrays)

    for chosen in (["params"], ["carry", "mask"], ["xs", "reset"], list(given)):
        several = {
            name: jax.tree.map(lambda x: jnp.stack([x, jnp.flip(x, 0)]), each) if name in chosen else each
            for name, each in given.items()
        }
        axes = {name: 0 if name in chosen else None for name in given}
        found = jax.vmap(value, in_axes=(axes,))(several)
        for member in range(2):
            one = {
                name: jax.tree.map(lambda x, k=member: x[k], each) if name in chosen else each
                for name, each in several.items()
            }
            close(jax.tree.map(lambda x, k=member: x[k], found), value(one), 1e-4)


@pytest.mark.full
def test_vmap_of_vmap_over_params_and_rows():
    cell = CELLS["s6"]
    params = jax.vmap(lambda key: cell.init(key, jnp.float32))(jax.random.split(jax.random.key(0), 3))
    xs = jax.random.normal(jax.random.key(1), (2, 70, 4, 5), jnp.float32)

    def gradient(params, xs):
        return jax.grad(lambda params: jnp.sin(jaxrnn.scan(cell, params, None, xs)[1]).sum())(params)

    found = jax.vmap(jax.vmap(gradient, (None, 0)), (0, None))(params, xs)
    for k, row in np.ndindex(3, 2):
        one = gradient(jax.tree.map(lambda x, k=k: x[k], params), xs[row])
        close(jax.tree.map(lambda x, k=k, row=row: x[k, row], found), one, 1e-4)


@pytest.mark.parametrize("name", ["s6", "s4d"])
def test_padding_is_inert_and_nothing_crosses_a_start(name):
    layer, arrays, _ = draw(CELLS[name], 70, (3,))
    params, carry, xs = single(arrays)
    mask = np.arange(70)[:, None] < np.array([[70, 3, 0]])
    reset = np.arange(70)[:, None] == np.array([[40, 0, 70]])
    spoiled = jnp.where(mask[..., None], xs, jnp.nan), jax.tree.map(lambda x: x.at[1].set(jnp.nan), carry)

    def value(xs, carry):
        run = functools.partial(jaxrnn.scan, layer, mask=mask, reset=reset, implementation="native")
        ys = run(params, carry, xs)[1]
        return ys, jax.grad(lambda *arrays: jnp.sin(run(*arrays)[1]).sum(), (0, 2))(params, carry, xs)

    found, clean = value(*spoiled), value(xs, carry)
    jax.tree.map(np.testing.assert_array_equal, found, clean)


@pytest.mark.parametrize("cell", [jaxrnn.S6(64, 32), jaxrnn.S4D(64, 32)])
def test_no_states_of_steps_are_in_memory(cell):
    """The gradient needs less than one array of (T, D, N)."""
    params, xs = cell.init(jax.random.key(0), jnp.float32), jnp.zeros((1024, 64), jnp.float32)
    gradient = jax.jit(jax.grad(lambda params, xs: jaxrnn.scan(cell, params, None, xs)[1].sum(), (0, 1)))
    needed = gradient.lower(params, xs).compile().memory_analysis().temp_size_in_bytes
    assert needed < 0.5 * 1024 * 64 * 32 * 4


@pytest.mark.parametrize("cell", [jaxrnn.S6(3, 4), jaxrnn.S4D(3, 4)])
def test_explain_tells_what_runs(cell):
    xs = jnp.zeros((5, 3), jnp.float32)
    params = cell.init(jax.random.key(0), jnp.float32)

    def named(platform="cpu", **options):
        (call,) = jaxrnn.explain(cell, params, None, xs, platform=platform, **options).calls
        return call.engine, call.implementation

    assert named() == named(implementation="native") == ("linear_scan", "native")
    assert named(implementation={"linear_scan": "chunked"}) == ("linear_scan", "chunked")
    assert named("gpu") == ("linear_scan", "associative")
    program = jax.jit(lambda xs: jaxrnn.scan(cell, params, None, xs)).trace(xs)
    assert "jaxrnn_diagonal_forward" in program.lower(lowering_platforms=("cpu",)).as_text()
    assert "jaxrnn_diagonal" not in program.lower(lowering_platforms=("cuda",)).as_text()
    named = jax.jit(lambda xs: jaxrnn.scan(cell, params, None, xs, implementation="native")).trace(xs)
    with pytest.raises(ValueError, match="'native' has kernels for the CPU, and this is compiled for cuda"):
        named.lower(lowering_platforms=("cuda",))
    for dtype in (jnp.float64, jnp.bfloat16):
        params = cell.init(jax.random.key(0), dtype)
        (call,) = jaxrnn.explain(cell, params, None, xs.astype(dtype), platform="cpu").calls
        assert call.implementation == "native"


def test_irregular_times_have_no_kernel():
    cell = jaxrnn.S4D(4, 3, timed=True)
    (call,) = jaxrnn.explain(
        cell, cell.init(jax.random.key(0), jnp.float32), None, jnp.zeros((5, 4), jnp.float32)
    ).calls
    assert (call.implementation, "complex64" in call.refused["native"]) == ("xla", True)


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("fixed", [False, True])
def test_the_program_of_other_platforms_is_the_derivative(fixed, members):
    """Chunk by chunk, with flags, in both directions; a chunk is not full."""
    rng, (steps, rows, states, channels) = np.random.default_rng(0), (70, 4, 3, 5)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape) / 2)

    twice, x = (members, 2 * states, channels), drawn(steps, rows, channels)
    flags = {name: jnp.asarray(rng.random((steps, rows)) < part) for name, part in (("valid", 0.8), ("start", 0.1))}
    if fixed:
        state = rows, 2 * states, channels
        problem = programs.Problem(x, drawn(*twice), drawn(*twice), drawn(*twice), drawn(*state), fresh=drawn(*state))
    else:
        state, own = (rows, states, channels), (steps, rows, states)
        a, step = -jnp.abs(drawn(members, states, channels)), drawn(*x.shape)
        problem = programs.Problem(x, a, drawn(*own), drawn(*own), drawn(*state), step, fresh=drawn(*state))
    problem = problem._replace(**flags)
    wrt = tuple(name for name, each in problem._asdict().items() if each is not None and name not in flags)
    given = {name: getattr(problem, name) for name in wrt}
    cotangents = drawn(*x.shape), drawn(*state)
    for reverse in (False, True):

        def run(given, reverse=reverse):
            return programs.forward(problem._replace(**given), reverse=reverse)[:2]

        expected = jax.vjp(run, given)[1](cotangents)[0]
        kept = programs.forward(problem, reverse=reverse, save=True)
        found = programs.backward(problem, kept, *cotangents, reverse=reverse, wrt=wrt)
        for name in wrt:
            np.testing.assert_allclose(getattr(found, name), expected[name], 1e-9, 1e-9, err_msg=name)
