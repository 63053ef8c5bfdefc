"""One of several processes that train together: `python processes.py SCENARIO PORT PROCESSES INDEX FOLDER`."""

import os
import re
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from interrupted import flat
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrnn import GRU, Dropout, Linear, Pool, Stack
from jaxrnn.training import (
    Batch,
    Checkpoints,
    ProcessError,
    Validation,
    accuracy,
    cross_entropy,
    evaluate,
    fit,
    load,
    make_loss,
    predict,
    restore,
    save,
    train_state,
)
from jaxrnn.training.processes import to_host

RNG = np.random.default_rng(0)
N, T = 36, 6
XS = RNG.normal(size=(N, T, 2)).astype(np.float32)
DATA = Batch(XS, (XS[:, 0, 0] > 0).astype(np.int32), RNG.integers(0, T + 1, N))
MODEL = Stack(Pool(GRU(2, 8)), Dropout(0.2), Linear(8, 2))
LOSS = make_loss(MODEL, cross_entropy, metrics=[accuracy])
ADAM = optax.adam(0.03)
FSDP = {"w_": PartitionSpec(None, "rows"), r"\.w$": PartitionSpec("rows")}


def make_state():
    return train_state(MODEL.init(jax.random.key(0)), ADAM, jax.random.key(1))


def rows(k, count):
    """The rows of process k of `count`."""
    return jax.tree.map(lambda leaf: leaf[k * N // count : (k + 1) * N // count], DATA)


def whole_batches(count):
    """The batches of 16 rows that `count` processes train on together, 8 of each one's rows; the last has 4."""
    parts = [rows(k, count) for k in range(count)]
    size = 16 // count
    starts = range(0, N // count, size)
    return [jax.tree.map(lambda *of: np.concatenate([leaf[at : at + size] for leaf in of]), *parts) for at in starts]


def train(data=None, state=None, **options):
    k, count = jax.process_index(), jax.process_count()
    options = {"optimizer": ADAM, "epochs": 3, "batch_size": 16, "shuffle": False, "steps_per_call": 2} | options
    data, state = rows(k, count) if data is None else data, make_state() if state is None else state
    return fit(LOSS, state, data, **options)


def a_mesh():
    return jax.make_mesh((jax.device_count(),), ("rows",))


def trains(folder):
    """Each process gives its part: of the data, of the validation, of what is predicted."""
    k, count, mesh = jax.process_index(), jax.process_count(), a_mesh()
    mine = rows(k, count)
    found = train(mesh=mesh, sharding=FSDP, validation=mine)
    again = train(mesh=mesh, validation=mine, progress=False)
    params = found[0].best.params
    metrics = evaluate(LOSS, params, mine, batch_size=16, mesh=mesh)
    ys = predict(MODEL, params, mine.xs, lengths=mine.lengths, mesh=mesh)
    assert ys.shape == (N // count, 2)
    save(folder / "model", MODEL, params)
    assert (load(folder / "model")[1][0].w_h == to_host(params)[0].w_h).all()
    total = PartitionSpec(*FSDP["w_"])
    assert params[0].w_h.sharding == NamedSharding(mesh, total)

    wholes = [jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("rows")), leaf) for leaf in mine]
    arrays = train(Batch(*wholes[:2], lengths=wholes[2]), mesh=mesh, sharding=FSDP, key=jax.random.key(3), shuffle=True)
    results = {"found": to_host(plain(found)), "again": to_host(plain(again)), "arrays": to_host(plain(arrays))}
    np.savez(folder / f"{k}.npz", ys=ys, loss=metrics["loss"], **flat(results))


def plain(result):
    """A state and its history without a typed key."""
    return result[0]._replace(key=jax.random.key_data(result[0].key)), result[1][:6]


def many(folder):
    """Members on the devices of all processes, which have the same data."""
    mesh = a_mesh()
    states = jax.vmap(lambda key: train_state(MODEL.init(key), ADAM, key))(jax.random.split(jax.random.key(0), 8))
    options = {"state": states, "data": DATA, "validation": Validation(DATA, patience=1), "epochs": 4}
    found = train(mesh=mesh, checkpoints=folder / "run", **options)
    metrics = evaluate(LOSS, found[0].params, DATA, members=True, mesh=mesh)
    ys = predict(MODEL, found[0].params, XS, lengths=DATA.lengths, members=True, mesh=mesh)
    results = {"found": to_host(plain(found)), "loss": metrics["loss"], "ys": ys}
    np.savez(folder / f"{jax.process_index()}.npz", **flat(results))


class Breaks(tuple):
    """A source of batches."""

    def state(self):
        return None

    def restore(self, state):
        pass


def differs(folder):
    """What must be the same in all processes and is not raises in all of them, and is named."""
    k, mesh = jax.process_index(), a_mesh()
    spoiled = jax.tree.map(lambda leaf: leaf + k if leaf.shape == (8, 24) else leaf, make_state())
    states = jax.vmap(lambda key: train_state(MODEL.init(key), ADAM, key))(jax.random.split(jax.random.key(0), 8))
    mine = rows(k, 2)
    fewer = jax.tree.map(lambda leaf: leaf[: 18 - 8 * k], mine)
    longer = mine._replace(xs=np.concatenate([mine.xs] * (k + 1), 1))
    on_mesh = train(mesh=mesh, epochs=0)[0]
    three = jax.make_mesh((3,), ("x",), devices=jax.devices()[:3])
    same = "expected the same in all processes; process 0 has "
    cases = [
        ({"state": spoiled}, f"state: {same}.params[0].w_h float32[8, 24]"),
        ({"batch_size": 16 + 2 * k}, f"fit: {same}batch_size=16, process 1 has batch_size=18"),
        ({"key": jax.random.key(k), "shuffle": True}, f"key: {same}"),
        ({"data": fewer}, f"data: {same}2 batches in one call, process 1 has 1 batches in one call"),
        (
            {"data": longer},
            f"data: {same}batches.xs of float32[2, 8, 6, 2], process 1 has batches.xs of float32[2, 8, 12",
        ),
        ({"data": [mine] * (k + 1)}, f"data: {same}batches.xs of float32[1, 18, 6, 2]"),
        (
            {"data": DATA._replace(xs=XS + k), "state": states},
            f"data: {same}batches.xs of float32[2, 16, 6, 2] with the numbers",
        ),
        (
            {"mesh": None, "state": on_mesh},
            "mesh: expected the mesh on which params lie, since they",
        ),
        ({"batch_size": 15}, "batch_size: expected a number that the 2 processes divide, got 15"),
        ({"mesh": three}, "mesh: expected devices of this process alone"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            train(**{"mesh": mesh, **options})
    wrong = mine._replace(targets=mine.targets + 7 * k)
    for data in (wrong, Breaks([mine, wrong])):  # known before the first step, and as the batches come
        for run in (train, lambda data, mesh: evaluate(LOSS, on_mesh.params, data, mesh=mesh)):
            raised = ValueError if k else ProcessError
            told = "targets: expected classes" if k else "process 1 raised ValueError: targets: expected classes"
            with pytest.raises(raised, match=told):
                run(data, mesh=mesh)
    own = Batch(mine.xs, mine.targets, mine.lengths)
    local = jax.make_mesh((2,), ("rows",), devices=jax.local_devices())
    alone = train(own, mesh=local, state=spoiled)  # on devices of this process alone, nothing needs to be the same
    assert not np.array_equal(alone[0].params[0].w_h, train(own, state=make_state())[0].params[0].w_h) or k == 0
    (folder / f"{k}.done").touch()


def resumes(folder):
    """Until it ends, or is killed, saving as it goes."""
    print("ready", flush=True)
    mine = rows(jax.process_index(), jax.process_count())
    options = {"mesh": a_mesh(), "sharding": FSDP, "validation": mine, "key": jax.random.key(5), "shuffle": True}
    where = Checkpoints(folder / "run", every=2, keep=2)
    try:
        found = train(epochs=10, checkpoints=where, **options)
    except ProcessError as error:
        print(f"ProcessError: {error}", file=sys.stderr, flush=True)
        os._exit(3)  # without waiting for the others, as the end of a process does
    again = restore(folder / "run", found[0]).state
    for a, b in zip(jax.tree.leaves(again._replace(data=None)), jax.tree.leaves(found[0]), strict=True):
        assert a.sharding == b.sharding
    np.savez(folder / f"{jax.process_index()}.npz", **flat(to_host(plain(found))))


SCENARIOS = {scenario.__name__: scenario for scenario in (trains, many, differs, resumes)}

if __name__ == "__main__":
    name, port, count, index, folder = sys.argv[1:]
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index), heartbeat_timeout_seconds=10)
    assert a_mesh().axis_types == (AxisType.Explicit,)
    SCENARIOS[name](Path(folder))
