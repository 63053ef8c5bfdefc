"""The kernels in Pallas, by interpreters: the numbers of XLA's loop, and no two threads at one place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import in_full

import jaxrnn
from jaxrnn import GRU, LSTM, Bidirectional, Elman
from jaxrnn.engines.gated import pallas as gated
from jaxrnn.engines.gated import programs
from jaxrnn.engines.linear import pallas

# Blocks that are not full, one step, one column, several axes of a batch; what is constant along an axis.
SHAPES = [
    ((70, 3, 5), (70, 3, 5)),
    *in_full([((1, 2, 3), (1, 1, 3)), ((9, 1), (1, 1)), ((130, 9, 600), (130, 1, 600))]),
]


def draw(shape, of_a):
    rng = np.random.default_rng(0)
    arrays = rng.uniform(-1, 1, of_a), rng.normal(size=shape), rng.normal(size=shape[1:])
    mask, reset = rng.random(shape[:2]) < 0.7, rng.random(shape[:2]) < 0.2
    return [jnp.asarray(each, jnp.float32) for each in arrays], mask, reset


def close(found, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), found, expected)


def both(run):
    return [jax.jit(functools.partial(run, name))() for name in ("pallas", "xla")]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, reverse):
    arrays, mask, reset = draw(*shape)

    def run(name):
        def loss(*arrays):
            found = jaxrnn.linear_scan(*arrays, mask=mask, reset=reset, reverse=reverse, implementation=name)
            return sum(jnp.sin(each).sum() for each in found), found

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*arrays)

    close(*both(run))


def test_other_transformations():
    """Tangents, members of a vmap, half precision with sums in float32."""
    arrays, mask, reset = draw((9, 2, 3), (9, 2, 3))

    def run(name):
        scan = functools.partial(jaxrnn.linear_scan, mask=mask, reset=reset, implementation=name)
        members = jax.vmap(scan, (None, 1, None), 1)(arrays[0], jnp.stack([arrays[1]] * 2, 1), arrays[2])
        half = [each.astype(jnp.bfloat16) for each in arrays[:2]]
        return jax.jvp(scan, arrays, arrays[::1]), members, scan(*half)

    close(*both(run))
    assert jax.eval_shape(lambda: run("pallas"))[2][1].dtype == jnp.bfloat16


@pytest.mark.parametrize("cell", [jaxrnn.MinGRU(3, 5), *in_full([jaxrnn.MinLSTM(3, 5), jaxrnn.SRU(3, 5)])], ids=str)
def test_a_cell(cell):
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (7, 2, 3))

    def run(name):
        def loss(params):
            ys = jaxrnn.scan(cell, params, None, xs, lengths=jnp.array([7, 4]), implementation={"linear_scan": name})[1]
            return jnp.sin(ys).sum()

        return jax.value_and_grad(loss)(params)

    close(*both(run))


def test_a_mesh_of_explicit_axes():
    (a, b, h), *_ = draw((7, 2, 5), (7, 2, 5))

    def run(name):
        return jax.jit(lambda *arrays: jaxrnn.linear_scan(*arrays, implementation=name))(a, b, h)

    with jax.set_mesh(jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))):
        close(*both(run))


# Units that fill no vector, and more than one; one step, blocks of steps and of rows that are not full.
GATED = [
    (LSTM(3, 5), 7, 2),
    *in_full(
        [
            (GRU(3, 130, reset_after=False), 70, 3),
            (GRU(3, 5), 70, 130),
            (Elman(3, 4), 1, 1),
            (Elman(3, 4, activation="relu"), 7, 2),
            (LSTM(3, 1), 9, 2),
        ]
    ),
]


def trained(cell, length, rows, everything):
    """Values and gradients; with everything, under masks, resets and in the other direction."""
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (length, rows, 3))
    carry = jax.tree.map(lambda leaf: jnp.full((rows, *leaf.shape), 0.3), cell.initial_carry(params))
    at = np.arange(length * rows).reshape(length, rows)
    options = {"mask": at % 3 != 1, "reset": at % 4 == 2, "reverse": True} if everything else {}

    def run(name):
        def loss(params, carry, xs):
            found = jaxrnn.scan(cell, params, carry, xs, implementation=name, **options)
            return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(found)), found

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, carry, xs)

    return run


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("case", GATED, ids=str)
def test_a_gated_cell(case, everything):
    close(*both(trained(*case, everything)))


@pytest.mark.full
def test_other_transformations_of_a_gated_cell():
    """Tangents, second derivatives, members, both directions, chunks, half precision with sums in float32, nothing."""
    cell, both_ways = GRU(3, 5), Bidirectional(LSTM(3, 5), LSTM(3, 5))
    xs = jax.random.normal(jax.random.key(1), (7, 2, 3))
    members = jax.vmap(cell.init)(jax.random.split(jax.random.key(2), 3))
    params, directions = cell.init(jax.random.key(0)), both_ways.init(jax.random.key(0))

    def loss(name, cell, params, xs=xs, **options):
        ys = jaxrnn.scan(cell, params, None, xs, implementation=name, **options)[1]
        return jnp.sin(ys).astype(jnp.float32).sum()

    def run(name):
        of = functools.partial(loss, name, cell)
        return (
            jax.jvp(of, (params,), (params,)),
            jax.jvp(jax.grad(of), (params,), (params,)),
            jax.vmap(jax.grad(of))(members),
            jax.grad(functools.partial(loss, name, both_ways, lengths=jnp.array([7, 0])))(directions),
            jax.grad(functools.partial(of, remat_every=3))(params),
            jax.grad(functools.partial(of, xs=jnp.swapaxes(xs, 0, 1), time_axis=1))(params),
            [jax.grad(functools.partial(of, xs=nothing))(params) for nothing in (xs[:0], xs[:, :0])],
        )

    close(*both(run))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    close(*both(lambda name: jax.grad(functools.partial(loss, name, cell, xs=xs.astype(jnp.bfloat16)))(half)), 0.02)


def test_what_no_kernel_computes():
    params = LSTM(3, 5, peephole=True).init(jax.random.key(0))
    with pytest.raises(ValueError, match="as 'pallas': no Pallas kernel computes this LSTM, or its noise"):
        jaxrnn.scan(LSTM(3, 5, peephole=True), params, None, jnp.ones((7, 3)), implementation="pallas")
    large = jax.eval_shape(LSTM(3, 2560).init, jax.random.key(0))
    with pytest.raises(ValueError, match="100 MiB of recurrent weights do not fit into the 96 MiB"):
        jax.eval_shape(lambda p: jaxrnn.scan(LSTM(3, 2560), p, None, jnp.ones((7, 3)), implementation="pallas"), large)
    params = LSTM(3, 5).init(jax.random.key(0))
    with pytest.raises(ValueError, match="it is compiled for a TPU, not for gpu"):
        jaxrnn.explain(LSTM(3, 5), params, None, jnp.ones((7, 3)), platform="gpu", implementation="pallas")
    run = jax.jit(lambda xs: jaxrnn.scan(LSTM(3, 5), params, None, xs, implementation="pallas")[1])
    with pytest.raises(ValueError, match="'pallas' is compiled for a TPU, and this is for cuda"):
        run.trace(jnp.ones((7, 3))).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("cell", [jaxrnn.MinGRU(3, 5), GRU(3, 5)], ids=str)
def test_a_program_with_x64_for_a_tpu(cell):
    """Its kernels have no numbers of 64 bits."""
    with jax.enable_x64(True):
        params, xs = cell.init(jax.random.key(0), jnp.float32), jnp.ones((70, 2, 3), jnp.float32)
        run = jax.grad(lambda p, xs: jaxrnn.scan(cell, p, None, xs, implementation="pallas")[1].sum())
        lowered = jax.jit(run).trace(params, xs).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


@pytest.mark.parametrize("cell", [jaxrnn.MinGRU(3, 5), GRU(3, 5)], ids=str)
def test_nobody_takes_it_unnamed(cell):
    for platform in ("cpu", "gpu", "tpu"):
        (call,) = jaxrnn.explain(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 2, 3)), platform=platform).calls
        assert call.implementation != "pallas"


def test_what_they_do_not_compute():
    cell = jaxrnn.LRU(3, 5)
    with pytest.raises(ValueError, match="as 'pallas': the Pallas kernels compute in float32, not in complex64"):
        jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 3)), implementation="pallas")
    with pytest.raises(ValueError, match=r"matrix_scan cannot run .* as 'pallas': no Pallas kernel computes it"):
        jaxrnn.matrix_scan(*[jnp.ones((7, 3))] * 3, implementation="pallas")
    run = jax.jit(lambda b: jaxrnn.linear_scan(0.5, b, implementation="pallas")[1])
    with pytest.raises(ValueError, match=r"'pallas' is compiled for one of .*, and this is for rocm"):
        run.trace(jnp.ones(4)).lower(lowering_platforms=("rocm",))


def interpreted(platform):
    """A kernel by an interpreter that models the memories of a chip and its threads, and complains of races."""
    if platform == "tpu":
        from jax.experimental.pallas import tpu as pltpu

        interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    else:
        params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
        interpret = params.InterpretGPUParams(detect_races=True)
    return functools.partial({"tpu": pallas.on_tpu, "cuda": pallas.on_gpu}[platform], interpret=interpret)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_no_two_threads_race(platform, capfd):
    (a, b, h), _, reset = draw((70, 2, 70), (70, 2, 70))
    for reverse in (False, True):
        run = functools.partial(pallas.scan, a, b, h, reset[..., None], reverse=reverse, shifted=reverse)
        close(run(kernel=interpreted(platform)), run(kernel=functools.partial(pallas.on_tpu, interpret=True)))
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.full
def test_no_two_threads_race_over_gates(capfd):
    rng, (length, rows, size, units) = np.random.default_rng(0), (70, 130, 3, 6)
    inputs = (length, rows, size), (size, 4 * units), (units, 4 * units), *[(rows, units)] * 4
    numbers = [jnp.asarray(rng.normal(size=(1, *shape)), jnp.float32) for shape in (*inputs, (4 * units,), (0,))]
    flags = [jnp.asarray(rng.random((1, length, rows)) < part) for part in (0.7, 0.2)]
    arrays = [*numbers[:7], flags[0], flags[0] & flags[1], *numbers[7:]]
    options = {"kind": "lstm", "directions": (True,), "batch_major": False, "named": "pallas"}

    def run(forms, **interpret):
        ys, h, c, kept, cs = forms.forward(*arrays, **options, wrt=(), save=True, **interpret)
        wrt = ("xs", "weights", "b")
        return ys, h, c, forms.backward(*arrays, ys, kept, cs, ys, h, c, **options, wrt=wrt, **interpret)

    interpreter = interpreted("tpu").keywords
    close(jax.jit(functools.partial(run, gated, **interpreter))(), jax.jit(functools.partial(run, programs))(), 1e-4)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_a_race_is_seen(monkeypatch, capfd):
    """A kernel that does not wait for what it reads."""
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    kernel = interpreted("cuda")
    monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None)
    (a, b, h), *_ = draw((9, 2, 70), (9, 2, 70))
    pallas.scan(a, b, h, reverse=False, shifted=False, kernel=kernel)[0].block_until_ready()
    assert "RACE DETECTED" in capfd.readouterr().out
