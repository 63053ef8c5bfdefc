"""`jaxrnn.step`: one step by the engines of `scan`, as named; and `rollout`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import draw_carry, draw_params, draw_x

import jaxrnn
from jaxrnn import (
    GRU,
    LSTM,
    S6,
    SLSTM,
    Bidirectional,
    Cell,
    ConvLSTM,
    Elman,
    EmitCarry,
    GatedDeltaNet,
    MinGRU,
    Stack,
    Zoneout,
)
from jaxrnn.engines.cpu import library as native

needed = pytest.mark.skipif(native.absent() is not None, reason=f"no compiled kernels: {native.absent()}")


def program(cell, implementation):
    params = draw_params(cell, dtype=np.float32)
    run = jax.jit(lambda x: jaxrnn.step(cell, params, None, x, implementation=implementation))
    return run.lower(draw_x(cell, 0, 2, dtype=np.float32)).as_text()


@needed
@pytest.mark.parametrize("cell", [LSTM(2, 3), MinGRU(2, 3), Stack((MinGRU(2, 3), GRU(3, 4)))])
def test_a_named_implementation_runs(cell):
    assert "jaxrnn_" in program(cell, "native")
    assert "jaxrnn_" in program(cell, None)
    assert "custom_call @jaxrnn_" not in program(cell, "xla")


@pytest.mark.parametrize("cell", [ConvLSTM((4,), 2, 3, 3), GRU(2, 3, activation=jnp.sin)])
def test_what_cannot_run_says_so(cell):
    params = cell.init(jax.random.key(0))
    x = draw_x(cell, 0, 2, dtype=np.float32)
    with pytest.raises(ValueError, match=r"implementation: .* cannot run .* as 'native'"):
        jaxrnn.step(cell, params, None, x, implementation="native")
    with pytest.raises(ValueError, match=r"implementation: expected one of"):
        jaxrnn.step(cell, params, None, x, implementation="fastest")


EAGER = [
    SLSTM(2, 4, heads=2),
    GRU(2, 3, layer_norm=True),
    ConvLSTM((4,), 2, 3),
    S6(2, 3),
    MinGRU(2, 3),
    GatedDeltaNet(2, heads=2, key_size=2, value_size=3),
    Zoneout(EmitCarry(LSTM(2, 3)), 0.2),
    Stack((LSTM(2, 3), Elman(3, 2))),
]


@pytest.mark.parametrize("run", [jaxrnn.step, jaxrnn.scan])
@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("cell", EAGER)
def test_an_eager_call_compiles_once(cell, implementation, run, caplog):
    params = draw_params(cell, dtype=np.float32)
    x = draw_x(cell, 0, *([2] if run is jaxrnn.step else [5, 2]), dtype=np.float32)
    carry, _ = run(cell, params, None, x, implementation=implementation)
    run(cell, params, carry, x, implementation=implementation)
    with jax.log_compiles():
        run(cell, params, carry, x, implementation=implementation)
    assert not [record for record in caplog.records if "Compiling" in record.message]


@pytest.mark.parametrize("wrap", [lambda cell: cell, EmitCarry, lambda cell: Zoneout(cell, 0.5)])
def test_an_eager_call_runs_a_class_as_it_is_now(wrap):
    class Own(Sum):
        pass

    def last():
        return jaxrnn.scan(wrap(Own()), (), None, jnp.ones((3, 1)))[0]

    first = last()
    Own.step = lambda self, params, carry, x, noise=None: (carry + 2 * x, carry)
    assert last() == 2 * first


class Sum(Cell):
    def init(self, key, dtype=jnp.float32):
        return ()

    def initial_carry(self, params, batch_shape=()):
        return jnp.zeros((*batch_shape, 1))

    def step(self, params, carry, x, noise=None):
        return carry + x, carry


def test_a_backward_cell_cannot_step():
    cell = Stack((GRU(2, 3), Bidirectional(GRU(3, 4), GRU(3, 4))))
    with pytest.raises(TypeError, match="cannot run step by step"):
        jaxrnn.step(cell, cell.init(jax.random.key(0)), None, jnp.ones(2))


@functools.partial(jax.jit, static_argnums=0)
def _helper(cell, params, carry, x):
    return cell.step(params, carry, x)


class Helped(Cell):
    """A user's own cell that steps another one in a jitted helper."""

    inner: Cell

    def init(self, key, dtype=jnp.float32):
        return self.inner.init(key, dtype)

    def initial_carry(self, params, batch_shape=()):
        return self.inner.initial_carry(params, batch_shape)

    def step(self, params, carry, x, noise=None):
        return _helper(self.inner, params, carry, x)


def test_a_jitted_helper_runs_as_asked_each_time():
    """Whoever traced it first decides nothing for the next."""
    cell = Helped(LSTM(2, 3))
    programs = [program(cell, each) for each in (None, "xla", None)]
    assert "custom_call @jaxrnn_" not in programs[1]
    assert programs[0] == programs[2]


@functools.partial(jax.jit, static_argnums=0)
def _helped_scan(cell, params, carry, xs, fresh, walk):
    return cell.scan(params, carry, xs, fresh=fresh, noise=None, walk=walk)


class Scanned(Helped):
    """The same of a whole sequence."""

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        return _helped_scan(self.inner, params, carry, xs, fresh, walk)


def test_a_jitted_scan_runs_as_asked_each_time():
    cell = Scanned(MinGRU(2, 3))
    params, xs = draw_params(cell, dtype=np.float32), draw_x(cell, 0, 7, 2, dtype=np.float32)

    def traced(implementation, **keywords):
        run = functools.partial(jaxrnn.scan, cell, implementation=implementation, **keywords)
        return str(jax.make_jaxpr(run)(params, None, xs))

    for name in ("xla", "chunked", "associative"):
        assert f"form={name}" in traced(name)
        assert "reverse=False" in traced(name)
        assert "reverse=True" in traced(name, reverse=True)
    assert ("form=None" if native.absent() else "named=False") in traced(None)
    for platform, name in (("gpu", "associative"), ("cpu", "native" if native.absent() is None else "xla")):
        (call,) = jaxrnn.explain(cell, params, None, xs, platform=platform).calls
        assert call.implementation == name


def test_explain_of_one_step():
    cell = Stack((MinGRU(2, 3), GRU(3, 4)))
    params, x = draw_params(cell, dtype=np.float32), draw_x(cell, 0, 5, dtype=np.float32)
    calls = jaxrnn.explain(cell, params, None, x, platform="gpu", one_step=True).calls
    assert [(call.engine, call.implementation) for call in calls] == [
        ("linear_scan", "associative"),
        ("gated_scan", "xla"),
    ]
    with pytest.raises(ValueError, match=r"cannot run .* as 'associative'"):
        jaxrnn.explain(cell, params, None, x, one_step=True, implementation="associative")


def test_rollout_reads_inputs_of_each_step():
    cell = GRU(3, 2)
    params = draw_params(cell, dtype=np.float32)
    carry, known = draw_carry(cell, params, 4), draw_x(GRU(1, 2), 1, 5, 4, dtype=np.float32)
    x = start = draw_x(cell, 2, 4, dtype=np.float32)

    def feedback(y, key, known):
        return jnp.concatenate([y, known], -1), y

    end, ys = jaxrnn.rollout(cell, params, carry, start, 5, feedback=feedback, inputs=known)
    for t in range(5):
        carry, y = jaxrnn.step(cell, params, carry, x)
        np.testing.assert_allclose(ys[t], y, 1e-5, 1e-6)
        x, _ = feedback(y, None, known[t])
    np.testing.assert_allclose(end.h, carry.h, 1e-5, 1e-6)
    with pytest.raises(ValueError, match=r"inputs: expected a leading axis of 4, .* got shape \(5, 4, 1\)"):
        jaxrnn.rollout(cell, params, None, start, 4, feedback=feedback, inputs=known)


def test_rollout_in_shard_map():
    """Rows that vary over a mesh, from a carry that does not yet."""
    cell = GRU(2, 2)
    params = cell.init(jax.random.key(0))
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def run(params, x):
        return jaxrnn.rollout(cell, params, None, x, 3, feedback=lambda y, key: (y, y))[1]

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(spec(), spec("rows")), out_specs=spec(None, "rows"))
    x = jnp.ones((4, 2))
    np.testing.assert_allclose(jax.jit(mapped)(params, x), run(params, x), 1e-6, 1e-6)
