"""Training on the devices of a mesh: the same as on one device."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrnn import GRU, MGU, Dropout, Linear, Pool, Stack, scan
from jaxrnn.engines.cpu.library import absent
from jaxrnn.training import (
    Batch,
    Mean,
    NonFiniteError,
    Streams,
    Validation,
    accuracy,
    cross_entropy,
    evaluate,
    fit,
    load,
    make_loss,
    make_truncated_loss,
    perplexity,
    predict,
    restore,
    save,
    squared_error,
    train,
    train_state,
)

PROMOTION = "standard"  # Adam of Optax mixes dtypes
RNG = np.random.default_rng(0)
N, T = 38, 6
XS = RNG.normal(size=(N, T, 2)).astype(np.float32)
LENGTHS = RNG.integers(0, T + 1, N)
DATA = Batch(XS, (XS[..., 0] > 0).astype(np.int32), LENGTHS)  # the rows of a device count by their steps
POOLED = DATA._replace(targets=DATA.targets[:, 0])
MODEL = Stack(GRU(2, 8), Linear(8, 2))
NOISY = Stack(Pool(GRU(2, 8)), Dropout(0.3), Linear(8, 2))
NOISE = Stack(GRU(2, 8), Dropout(0.3))
ADAM = optax.adam(0.03)
FSDP = {"w_": PartitionSpec(None, "rows"), r"\.w$": PartitionSpec("rows")}


def a_mesh(kind="explicit", shape=(4,), names=("rows",)):
    types = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
    return jax.make_mesh(shape, names, axis_types=(types[kind],) * len(shape), devices=jax.devices()[:4])


def state_of(model=MODEL, optimizer=ADAM, carry=None):
    return train_state(model.init(jax.random.key(0)), optimizer, jax.random.key(1), carry=carry)


def run(loss, state, data=DATA, **options):
    options = {"optimizer": ADAM, "epochs": 3, "batch_size": 16, "key": jax.random.key(2), "progress": False} | options
    return fit(loss, state, data, **options)


def close(a, b, tolerance=2e-5):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), tolerance, tolerance, err_msg=str(path))


def same(found, expected):
    """The states and histories of two trainings."""
    close(found[0], expected[0])
    assert found[1].ended == expected[1].ended
    close(found[1][:6], expected[1][:6])


def own_loss(params, batch, key):
    """It is no mean over rows: rows share their greatest error."""
    ys = predictions(params, batch)
    return (jax.nn.relu(ys) ** 2).mean() + jnp.abs(ys).max(), {"spread": ys.std()}


def predictions(params, batch):
    return scan(MODEL, params, None, batch.xs, lengths=batch.lengths, time_axis=1)[1]


LOSSES = {
    "gru": make_loss(MODEL, cross_entropy, metrics=[accuracy, perplexity]),
    "dropout": make_loss(NOISY, cross_entropy),
    "own": own_loss,
    "own_error": make_loss(MODEL, lambda ys, targets, mask: Mean(jnp.abs(ys).max(), jnp.ones(()))),
    "perplexity": make_loss(MODEL, perplexity),
}


def full(*values):
    return [pytest.param(*value, marks=pytest.mark.full) for value in values]


@pytest.mark.parametrize(
    ("name", "kind", "sharding"),
    [
        ("gru", "explicit", FSDP),
        *full(
            ("own", "explicit", None),
            ("gru", "auto", None),
            ("dropout", "auto", None),
            ("dropout", "explicit", FSDP),
            ("own", "auto", FSDP),
        ),
        *full(("own_error", "explicit", FSDP), ("perplexity", "auto", None)),
    ],
)
def test_it_is_the_training_of_one_device(name, kind, sharding):
    """Also the last batch, of 6 rows; noise; and losses that are no mean over rows."""
    mesh, model = a_mesh(kind), NOISY if name == "dropout" else MODEL
    options = {"validation": DATA, "accumulate": 2 if name in ("gru", "dropout") else 1}
    if name == "dropout":
        options |= {"data": POOLED, "validation": POOLED}
    expected, given = run(LOSSES[name], state_of(model), **options), state_of(model)
    found = run(LOSSES[name], given, mesh=mesh, sharding=sharding, **options)
    same(found, expected)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    close(given, state_of(model))
    state = found[0]
    run(LOSSES[name], state, mesh=mesh, **options | {"epochs": 1})
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state))
    specs = [PartitionSpec(None, "rows"), PartitionSpec("rows")] if sharding else [PartitionSpec()] * 2
    for params in (state.params, state.opt_state[0].mu, state.opt_state[0].nu, state.best.params):
        assert [params[0].w_h.sharding.spec, params[-1].w.sharding.spec] == specs
    assert state.opt_state[0].nu[0].w_h.addressable_shards[0].data.shape == ((8, 6) if sharding else (8, 24))


@pytest.mark.parametrize("under", [False, *full((True,))])
def test_what_is_trained_predicts_and_is_saved(tmp_path, under):
    """On the mesh and, brought to it or not, without it; also where the user has set the mesh, of explicit types."""
    mesh = a_mesh()
    with jax.set_mesh(mesh) if under else contextlib.nullcontext():
        trained = train(MODEL, DATA, cross_entropy, epochs=1, mesh=mesh, sharding=FSDP, progress=False)
        params = trained.params
        found = trained.predict(XS, lengths=LENGTHS, mesh=mesh), trained.evaluate(DATA, mesh=mesh, batch_size=16)
        save(tmp_path / "model", MODEL, params)
    plain = load(tmp_path / "model")[1]
    assert params[0].w_h.sharding.spec == FSDP["w_"]
    expected = predict(MODEL, plain, XS, lengths=LENGTHS), evaluate(trained.loss, plain, DATA)
    close(found, expected)
    sequences = [x[:n] for x, n in zip(XS, LENGTHS, strict=True)]
    rows = predict(MODEL, plain, sequences, batch_size=9, mesh=mesh)
    close(rows, [ys[:n] for ys, n in zip(expected[0], LENGTHS, strict=True)])


def test_arrays_on_devices_stay_there(monkeypatch):
    """Whether they lie on the mesh, or on one device."""
    loss, mesh, once = LOSSES["gru"], a_mesh(), {"epochs": 1}
    expected = run(loss, state_of(), **once)
    rows = NamedSharding(mesh, PartitionSpec("rows"))
    even = jax.tree.map(lambda leaf: leaf[:36], DATA)
    divided = jax.device_put(even, rows)
    pulled = []
    as_numpy = np.asarray
    monkeypatch.setattr(
        np, "asarray", lambda value, *more, **how: pulled.append(value) or as_numpy(value, *more, **how)
    )
    same(run(loss, state_of(), jax.tree.map(jnp.asarray, DATA), mesh=mesh, **once), expected)
    found = run(loss, state_of(), divided, mesh=mesh, **once)
    batches = [jax.device_put(jax.tree.map(lambda leaf: leaf[k : k + 12], even), rows) for k in (0, 12, 24)]
    listed = run(loss, state_of(), batches, mesh=mesh, **once)
    monkeypatch.undo()
    assert pulled
    assert all(value.ndim < 3 for value in pulled if isinstance(value, jax.Array))
    same(found, run(loss, state_of(), even, **once))
    same(listed, run(loss, state_of(), even, batch_size=12, shuffle=False, **once))


@pytest.mark.full
def test_batches_with_numbers_that_belong_to_no_row():
    """Every device has them whole."""

    def loss(params, batch, key):
        return batch["scale"] * (batch["xs"] @ params["w"]).mean() ** 2, {}

    batches = [{"xs": XS[k : k + 12, 0], "scale": np.float32(k + 1)} for k in (0, 12, 24)]
    state = train_state({"w": jnp.ones(2)}, ADAM, jax.random.key(1))
    same(run(loss, state, batches, validation=batches, mesh=a_mesh()), run(loss, state, batches, validation=batches))


@pytest.mark.full
def test_windows_of_long_sequences():
    """Every device carries on with its own rows."""
    cell = Stack(GRU(2, 4), Linear(4, 2))
    loss, carry = make_truncated_loss(cell, squared_error), cell.initial_carry(cell.init(jax.random.key(0)), (8,))

    def train(**options):
        source = Streams(list(XS), list(-XS), streams=8, window=5)
        return run(loss, state_of(cell, carry=carry), source, validation=source, **options)

    found = train(mesh=a_mesh())
    same(found, train())
    same(train(mesh=a_mesh(), accumulate=2), train(accumulate=2))
    assert found[0].carry[0].h.sharding.spec == PartitionSpec("rows")


def member(key, rate):
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=rate)
    return train_state(NOISY.init(key), optimizer, key)


@pytest.mark.full
def test_members():
    """Devices divide them, with the same numbers as without a mesh: noise, validation, and who stops when."""
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)
    states = jax.vmap(member)(jax.random.split(jax.random.key(0), 8), jnp.geomspace(0.3, 1e-3, 8))
    options = {"optimizer": optimizer, "epochs": 6, "validation": Validation(POOLED, patience=2), "data": POOLED}
    expected, mesh = run(LOSSES["dropout"], states, **options), a_mesh()
    found = run(LOSSES["dropout"], states, mesh=mesh, **options)
    same(found, expected)
    assert found[0].params[0].w_h.sharding.spec == PartitionSpec("rows")
    best = found[0].best.params
    ys = predict(NOISY, best, XS, lengths=LENGTHS, members=True, mesh=mesh)
    close(ys, predict(NOISY, expected[0].best.params, XS, lengths=LENGTHS, members=True))
    metrics = evaluate(LOSSES["dropout"], best, POOLED, members=True, mesh=mesh)
    close(metrics["loss"], found[0].best.value)
    with pytest.raises(ValueError, match="divides the 8 members, got 3"):
        run(LOSSES["dropout"], states, mesh=jax.make_mesh((3,), ("x",), devices=jax.devices()[:3]), **options)
    with pytest.raises(ValueError, match="sharding: expected None for many models"):
        run(LOSSES["dropout"], states, mesh=mesh, sharding=FSDP, **options)


@pytest.mark.full
def test_a_mesh_of_two_axes():
    """Rows are divided over all axes, params as the rules say."""
    mesh = a_mesh(shape=(2, 2), names=("a", "b"))
    sharding = {"w_h": PartitionSpec("a", "b"), "w_x": PartitionSpec(None, ("a", "b"))}
    found = run(LOSSES["gru"], state_of(), mesh=mesh, sharding=sharding)
    same(found, run(LOSSES["gru"], state_of()))
    assert found[0].params[0].w_h.addressable_shards[0].data.shape == (4, 12)
    same(run(LOSSES["gru"], found[0], mesh=mesh), run(LOSSES["gru"], run(LOSSES["gru"], state_of())[0]))


@pytest.mark.parametrize("devices", [2, *full((1,), (4,), (0,))])
def test_a_checkpoint_continues_on_another_number_of_devices(tmp_path, devices):
    """With the sharding of the state that goes on; the whole run is that of one device. 0 means no mesh."""
    loss, validation = LOSSES["gru"], DATA
    expected = run(loss, state_of(), epochs=4, validation=validation)
    options = {"mesh": a_mesh(), "sharding": FSDP, "validation": validation}
    first = run(loss, state_of(), epochs=2, checkpoints=tmp_path / "run", **options)
    if devices == 4:
        restored = restore(tmp_path / "run", first[0]).state
        assert restored.params[0].w_h.sharding == first[0].params[0].w_h.sharding
        same((restored._replace(data=None), first[1]), first)
    if devices:
        options["mesh"] = jax.make_mesh((devices,), ("rows",), devices=jax.devices()[:devices])
    else:
        options = {"validation": validation}
    found = run(loss, state_of(), epochs=4, checkpoints=tmp_path / "run", **options)
    same(found, expected)
    assert found[0].params[0].w_h.sharding.num_devices == max(devices, 1)


def test_the_last_good_state_lies_on_the_mesh():
    """Also where a step is not finite."""
    bad = DATA._replace(xs=np.where(np.arange(N)[:, None, None] == 37, np.float32(3e38), XS))
    loss = make_loss(Stack(Linear(2, 1)), squared_error)
    targets = np.zeros((N, T, 1), np.float32)
    state = train_state(loss.cell.init(jax.random.key(0)), ADAM, jax.random.key(1))
    with pytest.raises(NonFiniteError) as raised:
        run(loss, state, Batch(bad.xs, targets), mesh=a_mesh(), shuffle=False)
    assert raised.value.state.step == 2
    assert raised.value.state.params[0].w.sharding.mesh == a_mesh()


def program(loss, **options):
    """The optimized text of the program of a `fit`."""
    from jaxrnn.training import fitting

    chunks = []
    make = fitting.make_chunk.__wrapped__

    def spied(*arguments, **keywords):
        chunk = make(*arguments, **keywords)
        return lambda *given: chunks.append(chunk.lower(*given).compile().as_text()) or chunk(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "make_chunk", spied)
        run(loss, epochs=1, **options)
    return chunks[0]


def collectives(text):
    """The collectives of a program, and whether each is in a loop inside of the loop over steps of training."""
    found, loops, computation = [], set(), ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            computation = line.split()[0]
        kind = re.search(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(", line)
        found += [(kind[1], computation)] if kind else []
        loop = re.search(r" while\(.* body=([^,]+)", line)
        if loop and computation != "ENTRY":
            loops.add(loop[1])
    return [(kind, computation in loops) for kind, computation in found]


@pytest.mark.parametrize(
    ("cell", "sharding"),
    [(GRU(2, 8), FSDP), *full((MGU(2, 8), None), (MGU(2, 8), FSDP), (GRU(2, 8), None), (NOISE, None), (NOISE, FSDP))],
)
def test_gradients_are_reduced_once_and_rows_stay_where_they_are(cell, sharding):
    """No collective is in a loop over time, whether devices run the loss for their rows or, with noise, as one. The
    kernels run."""
    model = Stack(cell, Linear(8, 2))
    loss = make_loss(model, cross_entropy)
    parts = 1 if cell is NOISE else 2
    text = program(loss, state=state_of(model), mesh=a_mesh(), sharding=sharding, accumulate=parts)
    found = collectives(text)
    assert not any(inside for _, inside in found)
    kinds = sorted(kind for kind, _ in found)
    # Of a loss as one, the loss itself; with parts of params, also the norm of the gradient and whether it is finite.
    reductions = 1 + (cell is NOISE) + 2 * (sharding is not None)
    assert kinds == ["all-gather"] * (3 if sharding else 0) + ["all-reduce"] * reductions
    assert absent() is not None or isinstance(cell, MGU) or "jaxrnn" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": 4}, "mesh: expected a jax.sharding.Mesh"),
        ({"sharding": FSDP}, "sharding: expected None without a mesh"),
        ({"mesh": 1, "sharding": [FSDP]}, "sharding: expected a dict"),
        ({"mesh": 1, "sharding": {"w_": "rows"}}, r"sharding\['w_'\]: expected a jax.sharding.PartitionSpec"),
        ({"mesh": 1, "sharding": {"w_y": PartitionSpec()}}, r"sharding\['w_y'\]: it decides for none of the params"),
        (
            {"mesh": 1, "sharding": {"w_x": PartitionSpec("rows")}},
            r"does not divide params\[0\].w_x, of shape \(2, 24\)",
        ),
        ({"mesh": 1, "sharding": {"w_x": PartitionSpec("row")}}, "does not divide params"),
    ],
)
def test_what_is_refused(options, message):
    options = options | ({"mesh": a_mesh()} if options.get("mesh") == 1 else {})
    with pytest.raises((TypeError, ValueError), match=message):
        run(LOSSES["gru"], state_of(), **options)
