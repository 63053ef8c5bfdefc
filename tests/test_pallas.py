"""The kernels in Pallas, by interpreters: the numbers of XLA's loop, and no two threads at one place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import in_full

import jaxrnn
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


def test_nobody_takes_it_unnamed():
    cell, xs = jaxrnn.MinGRU(3, 5), jnp.ones((7, 2, 3))
    for platform in ("cpu", "gpu", "tpu"):
        (call,) = jaxrnn.explain(cell, cell.init(jax.random.key(0)), None, xs, platform=platform).calls
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


def test_a_race_is_seen(monkeypatch, capfd):
    """A kernel that does not wait for what it reads."""
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    kernel = interpreted("cuda")
    monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None)
    (a, b, h), *_ = draw((9, 2, 70), (9, 2, 70))
    pallas.scan(a, b, h, reverse=False, shifted=False, kernel=kernel)[0].block_until_ready()
    assert "RACE DETECTED" in capfd.readouterr().out
