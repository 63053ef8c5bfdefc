"""Programs written by `jax.export`: read in another process, of any sizes, for every platform."""

import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from members import CELLS, COMPOSITIONS, LAYERS, MEMBERS, OwnParams, Pair, draw_carry, draw_params, draw_x, floats
from tiers import in_full, mostly_in_full

import jaxrnn
from jaxrnn.engines.cpu import library
from jaxrnn.exporting import KERNEL_CHECKS
from jaxrnn.training import cross_entropy, train

PROMOTION = "standard"  # Adam of Optax mixes dtypes

for _own in (OwnParams, Pair):  # as a user does
    jax.export.register_namedtuple_serialization(_own, serialized_name=f"tests.{_own.__name__}")
kernels_needed = pytest.mark.skipif(library.absent() is not None, reason=f"no compiled kernels: {library.absent()}")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
TIME, BATCH = 5, 3
RESET = jnp.zeros((TIME, BATCH), bool).at[2, 0].set(True)
LENGTHS = jnp.array([5, 3, 1])
MODEL = jaxrnn.Stack(
    jaxrnn.Embed(7, 4),
    jaxrnn.Bidirectional(jaxrnn.LSTM(4, 3), jaxrnn.LSTM(4, 3)),
    jaxrnn.Pool(jaxrnn.GRU(6, 4), ("mean", "last")),
    jaxrnn.Linear(8, 3),
)


@pytest.fixture(autouse=True)
def _flatbuffers():
    pytest.importorskip("flatbuffers")  # in which JAX writes programs, and which it does not bring


def draw(cell, dtype=np.float32):
    params = jax.tree.map(jnp.asarray, draw_params(cell, dtype=dtype))
    return params, jax.tree.map(jnp.asarray, draw_x(cell, 3, TIME, BATCH, dtype=dtype))


def rewritten(exported, **options):
    return jax.export.deserialize(exported.serialize(**options))


def calls_kernels(exported):
    return "@jaxrnn_" in exported.mlir_module()


def of_any_size(tree, *axes):
    """Shapes like those of `tree`, with other sizes in front."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*axes, *x.shape[len(axes) :]), x.dtype), tree)


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(floats(found), floats(expected), strict=True):
        kind = complex if jnp.iscomplexobj(b) else float
        np.testing.assert_allclose(np.asarray(a).astype(kind), np.asarray(b).astype(kind), 10 * tolerance, tolerance)


def of_any_sizes(arguments):
    """Those of `scan_of` for any number of steps and rows."""
    params, xs, lengths, reset = arguments
    time, rows = jax.export.symbolic_shape("time, rows")
    return params, of_any_size(xs, time, rows), of_any_size(lengths, rows), of_any_size(reset, time, rows)


def scan_of(cell):
    return jax.jit(lambda params, xs, lengths, reset: jaxrnn.scan(cell, params, None, xs, lengths=lengths, reset=reset))


def gradient_of(cell):
    def loss(params, xs, lengths, reset):
        found = jaxrnn.scan(cell, params, None, xs, lengths=lengths, reset=reset)
        return sum((jnp.sin(y.real.astype(jnp.float32)) ** 2).sum() for y in floats(found))

    return jax.jit(jax.grad(loss, allow_int=True))


# In another process.

FRESH = """
import sys, jax, jax.export, numpy as np
import jaxrnn
folder = sys.argv[1]
for name in sys.argv[2:]:
    exported = jax.export.deserialize(open(f"{folder}/{name}", "rb").read())
    given = np.load(f"{folder}/{name}.given.npz").values()
    arguments = jax.tree.unflatten(exported.in_tree, list(given))[0]
    np.savez(f"{folder}/{name}.found.npz", *jax.tree.leaves(exported.call(*arguments)))
"""


def programs():
    """By name: a function, its arguments, the shapes it is exported for, and whether it calls kernels."""
    found = {}
    for name in ("lstm", "lstm_projection_peephole", "min_gru", "s6", "kda"):
        arguments = (*draw(MEMBERS[name]), LENGTHS, RESET)
        found[name] = scan_of(MEMBERS[name]), arguments, arguments, True
    params = jax.tree.map(jnp.asarray, draw_params(MODEL, dtype=np.float32))
    tokens = jnp.arange(TIME * BATCH).reshape(BATCH, TIME) % 7

    def run(params, tokens, lengths, implementation=None):
        options = {"lengths": lengths, "time_axis": 1, "implementation": implementation}
        return jaxrnn.scan(MODEL, params, None, tokens, **options)[1]

    arguments = params, tokens, LENGTHS
    by_xla = jax.jit(lambda *arrays: run(*arrays, implementation="xla"))
    shapes = jax.export.symbolic_args_specs(arguments, (None, "rows, time", "rows"))
    found |= {
        "model": (jax.jit(run), arguments, arguments, True),
        "model without kernels": (by_xla, arguments, arguments, False),
        "model of any size": (jax.jit(run), arguments, shapes, False),
    }
    cell = jaxrnn.LSTM(2, 3)
    params, xs = draw(cell)
    carry = jax.tree.map(jnp.asarray, draw_carry(cell, params, BATCH))
    step = jax.jit(lambda params, carry, x: jaxrnn.step(cell, params, carry, x), donate_argnums=1)
    found["step"] = step, (params, carry, xs[0]), (params, carry, xs[0]), True
    return found


def test_a_fresh_process_runs_what_was_written(tmp_path):
    """It imports the package, and nothing else: types and kernels are known."""
    with jax.numpy_dtype_promotion("strict"):
        written = programs()
    for name, (run, arguments, shapes, kernels) in written.items():
        exported = jax.export.export(run, disabled_checks=KERNEL_CHECKS if kernels else ())(*shapes)
        assert calls_kernels(exported) == (kernels and library.absent() is None), name
        (tmp_path / name).write_bytes(exported.serialize())
        np.savez(tmp_path / f"{name}.given.npz", *jax.tree.leaves(arguments))
    fresh = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH, str(tmp_path), *written], capture_output=True, text=True
    )
    assert fresh.returncode == 0, fresh.stderr
    for name, (run, arguments, _, _) in written.items():
        found = list(np.load(tmp_path / f"{name}.found.npz").values())
        assert_close(found, jax.tree.leaves(run(*arguments)))


@kernels_needed
def test_the_checks_are_those_of_all_kernels():
    """Each is needed: JAX refuses what calls a kernel."""
    assert len(set(KERNEL_CHECKS)) == len(KERNEL_CHECKS) == len(library.targets())
    for name in ("gru", "gru_reset_before", "min_gru", "s6", "gla"):
        run, arguments = gradient_of(MEMBERS[name]), (*draw(MEMBERS[name]), LENGTHS, RESET)
        with pytest.raises(ValueError, match="custom calls whose targets have no compatibility guarantees"):
            jax.export.export(run)(*arguments)
        assert calls_kernels(jax.export.export(run, disabled_checks=KERNEL_CHECKS)(*arguments))


@pytest.mark.full
def test_a_trained_model_is_written():
    """The predictions of the program are those of `predict`, for other numbers of rows and steps, too."""
    tokens, kinds = np.arange(60).reshape(12, 5) % 7, np.arange(12) % 3
    trained = train(MODEL, (tokens, kinds), cross_entropy, optimizer=optax.adam(1e-2), epochs=1, progress=False)

    def predict(tokens, lengths):
        return jaxrnn.scan(MODEL, trained.params, None, tokens, lengths=lengths, time_axis=1)[1]

    shapes = jax.export.symbolic_args_specs((tokens, kinds), ("rows, time", "rows"))
    exported = rewritten(jax.export.export(jax.jit(predict))(*shapes))
    ragged = [tokens[0], tokens[1, :2], tokens[2, :1]]
    padded, lengths = np.stack([np.pad(each, (0, 5 - len(each))) for each in ragged]), np.array([5, 2, 1])
    assert_close(exported.call(padded, lengths), trained.predict(ragged))


def test_donation_and_types_are_kept():
    cell = jaxrnn.Stack(jaxrnn.LSTM(2, 3), jaxrnn.Pool(jaxrnn.GRU(3, 4)))
    params, xs = draw(cell)
    carry = jax.tree.map(jnp.asarray, draw_carry(cell, params, BATCH))
    step = jax.jit(lambda params, carry, x: jaxrnn.step(cell, params, carry, x), donate_argnums=1)
    expected = jax.tree.map(np.asarray, jaxrnn.step(cell, params, carry, xs[0]))
    exported = rewritten(jax.export.export(step, disabled_checks=KERNEL_CHECKS)(params, carry, xs[0]))
    found = jax.jit(exported.call, donate_argnums=1)(params, carry, xs[0])
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(carry) if leaf.dtype == np.float32)
    assert_close(found, expected)


def test_the_carry_of_a_flax_cell_is_written():
    cell = jaxrnn.linen.LinenCell(linen.GRUCell(3), 2)
    params = cell.init(jax.random.key(0))
    carry, x = cell.initial_carry(params, (BATCH,)), jnp.ones((BATCH, 2))
    step = jax.jit(lambda params, carry, x: jaxrnn.step(cell, params, carry, x))
    exported = rewritten(jax.export.export(step, disabled_checks=KERNEL_CHECKS)(params, carry, x))
    assert_close(exported.call(params, carry, x), step(params, carry, x))


# Of any sizes.

SOME = ("gru", "min_gru_log", "qrnn", "s6", "mlstm", "classifier")


@pytest.mark.parametrize("name", mostly_in_full(list(MEMBERS), *SOME))
def test_any_number_of_steps_and_rows(name):
    """Without a kernel, as `explain` says; nothing that is parallel over time is left."""
    cell = MEMBERS[name]
    arguments = (*draw(cell), LENGTHS, RESET)
    run, shapes = scan_of(cell), of_any_sizes(arguments)
    exported = rewritten(jax.export.export(run, platforms=PLATFORMS)(*shapes))
    assert not calls_kernels(exported)
    assert_close(exported.call(*arguments), run(*arguments))
    for platform in ("cpu", "gpu"):
        told = jaxrnn.explain(cell, arguments[0], None, shapes[1], platform=platform)
        assert all(call.implementation == "xla" and "native" in call.refused for call in told.calls)


@pytest.mark.parametrize("name", mostly_in_full([name for name in MEMBERS if MEMBERS[name].causal], "lstm", "s5"))
def test_a_step_of_any_number_of_rows(name):
    cell = MEMBERS[name]
    params, xs = draw(cell)
    carry, x = jax.tree.map(jnp.asarray, draw_carry(cell, params, BATCH)), jax.tree.map(lambda x: x[0], xs)
    (rows,) = jax.export.symbolic_shape("rows")
    step = jax.jit(lambda params, carry, x: jaxrnn.step(cell, params, carry, x))
    exported = rewritten(jax.export.export(step)(params, of_any_size(carry, rows), of_any_size(x, rows)))
    assert_close(exported.call(params, carry, x), step(params, carry, x))


@pytest.mark.parametrize("name", ["gru", "min_gru", "min_gru_log", "s6", "gla"])
def test_sizes_that_are_symbols_are_the_reason(name):
    cell = MEMBERS[name]
    params, xs = draw(cell)
    time, rows = jax.export.symbolic_shape("time, rows")
    shapes = params, of_any_size(xs, time, rows)
    (call,) = jaxrnn.explain(cell, params, None, shapes[1]).calls
    assert call.refused["native"] == "the kernels take shapes of numbers, not (time, rows, 2)"
    for named in ("native", "associative", "chunked"):
        run = jax.jit(lambda params, xs: jaxrnn.scan(cell, params, None, xs, implementation=named))
        with pytest.raises(ValueError, match=rf"cannot run .* as '{named}': .*; supported here: \['xla'\]"):
            jax.export.export(run)(*shapes)


def test_parallel_forms_take_any_number_of_rows():
    """What they need is the number of steps."""
    cell = MEMBERS["min_gru"]
    params, xs = draw(cell)
    (rows,) = jax.export.symbolic_shape("rows")
    assert jaxrnn.explain(cell, params, None, of_any_size(xs, TIME, rows), platform="gpu").calls[0].implementation == (
        "associative"
    )
    run = jax.jit(lambda params, xs: jaxrnn.scan(cell, params, None, xs)[1])
    exported = jax.export.export(run, platforms=PLATFORMS)(params, of_any_size(xs, TIME, rows))
    assert_close(exported.call(params, xs), run(params, xs))


@pytest.mark.parametrize("name", ["lstm", *in_full(["rg_lru", "mamba2"])])
def test_checkpointing_over_any_number_of_steps(name):
    cell = MEMBERS[name]
    params, xs = draw(cell)
    (time,) = jax.export.symbolic_shape("time")
    run = jax.jit(jax.grad(lambda params, xs: (jaxrnn.scan(cell, params, None, xs, remat_every=2)[1] ** 2).sum()))
    exported = jax.export.export(run)(params, of_any_size(xs, time))
    assert_close(exported.call(params, xs), run(params, xs))


@pytest.mark.parametrize("name", ["gru", *in_full(["lstm_projection_peephole", "lru", "s6", "kda"])])
def test_vmap_over_an_axis_of_any_size(name):
    cell = MEMBERS[name]
    params, xs = draw(cell)

    def loss(params, xs):
        ys = jax.vmap(lambda xs: jaxrnn.scan(cell, params, None, xs)[1], 1)(xs)
        return (ys**2).sum()

    (rows,) = jax.export.symbolic_shape("rows")
    run = jax.jit(jax.grad(loss))
    exported = jax.export.export(run, platforms=PLATFORMS)(params, of_any_size(xs, TIME, rows))
    assert_close(exported.call(params, xs), run(params, xs))


# For every platform.


@pytest.mark.parametrize("name", mostly_in_full(list(MEMBERS), "lstm"))
def test_every_platform_alone_and_all_together(name):
    """Without a kernel for accelerators: JAX would refuse it. Gradients, too."""
    cell = MEMBERS[name]
    arguments = (*draw(cell), LENGTHS, RESET)
    for run in (scan_of(cell), gradient_of(cell)):
        for platform in PLATFORMS[1:]:
            jax.export.export(run, platforms=[platform])(*arguments)
        exported = rewritten(jax.export.export(run, platforms=PLATFORMS, disabled_checks=KERNEL_CHECKS)(*arguments))
        assert_close(exported.call(*arguments), run(*arguments))


@pytest.mark.parametrize("name", mostly_in_full([*CELLS, *LAYERS, *COMPOSITIONS], "gru"))
def test_gradients_of_what_was_read(name):
    cell = MEMBERS[name]
    arguments = (*draw(cell), LENGTHS, RESET)

    def loss(params, xs, lengths, reset):
        return (jaxrnn.scan(cell, params, None, xs, lengths=lengths, reset=reset)[1] ** 2).sum()

    if not isinstance(jax.eval_shape(lambda *given: scan_of(cell)(*given)[1], *arguments), jax.ShapeDtypeStruct):
        pytest.skip("ys are a tree")
    exported = jax.export.export(jax.jit(loss), disabled_checks=KERNEL_CHECKS)(*arguments)
    found = jax.grad(rewritten(exported, vjp_order=1).call, allow_int=True)(*arguments)
    assert_close(found, jax.grad(loss, allow_int=True)(*arguments))


@pytest.mark.parametrize("dtype", ["bfloat16", *in_full(["float16", "float64"])])
@pytest.mark.parametrize("name", mostly_in_full(list(CELLS), "gru", "min_gru"))
def test_other_dtypes(name, dtype):
    tolerance = {"bfloat16": 3e-2, "float16": 3e-3, "float64": 1e-10}[dtype]
    with jax.enable_x64(dtype == "float64"):
        cell, run = MEMBERS[name], scan_of(MEMBERS[name])
        arguments = (*draw(cell, jnp.dtype(dtype)), LENGTHS, RESET)
        for shapes in (arguments, of_any_sizes(arguments)):
            exported = rewritten(jax.export.export(run, disabled_checks=KERNEL_CHECKS)(*shapes))
            assert_close(exported.call(*arguments), run(*arguments), tolerance)
