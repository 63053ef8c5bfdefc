"""Checkpoints: a run that is interrupted, however, ends as if it had not been; what is damaged says so."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from interrupted import ADAM, MODEL, flat, run
from tiers import in_full

import jaxrnn
from jaxrnn import GRU
from jaxrnn.training import Buckets, Validation, fit, lock, make_loss, squared_error, train_state
from jaxrnn.training.checkpoint import CheckpointError, Checkpoints, Saver, restore
from jaxrnn.training.history import empty_history
from jaxrnn.training.leaves import pack, unpack

PROMOTION = "standard"  # Adam of Optax mixes dtypes
SCRIPT = Path(__file__).parent / "interrupted.py"


def same(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


@contextlib.contextmanager
def running(directory, result, truncated):
    """The run in a process of its own, from the moment at which training begins; killed at the end of the block."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(directory.parent / "cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(SCRIPT.parent.parent)}
    command = [sys.executable, str(SCRIPT), str(directory), str(result), truncated]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def check_kills(tmp_path, kills, truncated):
    """Once through; then again, killed so many times at random moments: the same result, bit for bit."""
    begun = time.monotonic()
    with running(tmp_path / "whole", tmp_path / "whole.npz", truncated) as process:
        assert process.wait(timeout=300) == 0
    seconds = time.monotonic() - begun
    chance, hit = random.Random(kills), []
    # Later kills come at a longer time, as what was saved before is not done again.
    for k in range(kills):
        with running(tmp_path / "killed", tmp_path / "killed.npz", truncated) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=chance.uniform(0.05, 1.5) * seconds / (1 + k % 3))
            hit.append("after the end" if process.poll() is not None else steps_saved(tmp_path / "killed"))
        if hit[-1] == "after the end":
            (tmp_path / "killed").rename(tmp_path / f"ended{k}")
    assert any(where != "after the end" for where in hit)
    with running(tmp_path / "killed", tmp_path / "killed.npz", truncated) as process:
        assert process.wait(timeout=300) == 0
    whole, killed = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "killed.npz")
    assert sorted(whole) == sorted(killed)
    for name in whole:
        np.testing.assert_array_equal(whole[name], killed[name], err_msg=f"{name}, killed at {hit}")


def steps_saved(directory):
    return sorted(int(path.name.removeprefix("step_")) for path in directory.glob("step_*") if "tmp" not in path.name)


def test_a_run_killed_ends_as_if_it_had_not_been(tmp_path):
    check_kills(tmp_path, 1, "truncated")


@pytest.mark.full
@pytest.mark.parametrize("truncated", ["whole", "truncated"])
def test_a_run_killed_twenty_times_ends_as_if_it_had_not_been(tmp_path, truncated):
    check_kills(tmp_path, 20, truncated)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("truncated", [*in_full([False]), True])
def test_a_run_ended_in_the_middle_of_an_epoch_goes_on(tmp_path, monkeypatch, truncated):
    """Bit for bit, history and best included; and the checkpoints of the way are kept as asked."""
    whole = run(tmp_path / "whole", truncated=truncated, epochs=4)
    from jaxrnn.training import checkpoint

    save, count = checkpoint.Run.save, []

    def save_and_stop(self, state, history):
        save(self, state, history)
        count.append(int(state.step))
        if len(count) == 3:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Run, "save", save_and_stop)
        with pytest.raises(Interrupted):
            run(tmp_path / "cut", truncated=truncated, epochs=4)
    assert 0 < count[-1] < whole[0].step
    same(run(tmp_path / "cut", truncated=truncated, epochs=4), whole)
    assert whole[1].ended == "epochs"
    kept = steps_saved(tmp_path / "cut")
    assert len(kept) <= 3
    assert int(whole[0].step) in kept
    assert kept == steps_saved(tmp_path / "whole")


def test_a_finished_run_can_be_read_and_made_longer(tmp_path):
    whole = run(tmp_path / "whole", truncated=False, epochs=3)
    short = run(tmp_path / "short", truncated=False, epochs=2)
    restored = restore(tmp_path / "short", short[0])
    fresh = jax.eval_shape(lambda key: train_state(MODEL.init(key), ADAM, key), jax.random.key(0))
    same(restore(tmp_path / "short", fresh), restored)
    same(restored.state._replace(data=None), short[0])
    same(restored.history, short[1])
    assert restored.state.data["epoch"] == 2
    same(run(tmp_path / "short", truncated=False, epochs=2), short)
    longer = run(tmp_path / "short", truncated=False, epochs=3)
    same(longer, whole)


class Odd(NamedTuple):
    none: jax.Array
    empty: tuple
    scalar: jax.Array


def test_empty_and_zero_size_leaves_and_every_dtype_survive(tmp_path):
    params = Odd(jnp.zeros((0, 3)), (), jnp.float16(1.5)), {"b": jnp.ones(2, jnp.bfloat16), "n": None}
    state = train_state(params, optax.adam(0.1), jax.random.key(7))
    state = state._replace(key=jax.random.key(7, impl="rbg"), data={"epoch": 3, "source": {"words": [1, 2]}})
    saver = Saver(Checkpoints(tmp_path / "odd"))
    saver.save(state, empty_history(), start=0, value=None)
    saver.close()
    restored = restore(tmp_path / "odd", state).state
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert [leaf.dtype for leaf in jax.tree.leaves(restored.params)] == [leaf.dtype for leaf in jax.tree.leaves(params)]
    same(restored._replace(data=None), state._replace(data=None))
    assert restored.data == state.data


@pytest.mark.parametrize(("maximize", "kept"), [(False, [1, 5, 6]), (True, [3, 4, 6])])
def test_the_best_and_the_last_are_kept(tmp_path, maximize, kept):
    state = train_state(jnp.ones(2), optax.sgd(0.1), jax.random.key(0))
    saver = Saver(Checkpoints(tmp_path / "run", keep=2), maximize=maximize)
    for step, value in enumerate([1.0, 3.0, 5.0, 4.0, 2.0, None], 1):
        saver.save(state._replace(step=jnp.int32(step)), empty_history(), start=0, value=value)
    saver.close()
    assert steps_saved(tmp_path / "run") == kept


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    with jax.numpy_dtype_promotion("standard"):
        return directory, run(directory, truncated=False, epochs=1)


def copy(finished, tmp_path):
    import shutil

    return Path(shutil.copytree(finished[0], tmp_path / "copy")), finished[1][0]


def listing(directory):
    return {path: path.stat().st_size for path in sorted(directory.rglob("*")) if path.is_file()}


# Orbax leaves its event loops open when reading fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_truncated_checkpoint_says_so_and_nothing_is_lost(finished, tmp_path):
    """Each of its files in turn, cut in half or emptied: an error or, where it does not matter, the same state."""
    directory, state = copy(finished, tmp_path)
    newest = max(directory.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    refused = 0
    for path in sorted(newest.rglob("*")):
        if not path.is_file() or not path.stat().st_size:
            continue
        whole = path.read_bytes()
        for kept in (len(whole) // 2, 0):
            path.write_bytes(whole[:kept])
            before = listing(directory)
            try:
                same(restore(directory, state).state._replace(data=None), state)
            except CheckpointError as error:
                refused += 1
                assert str(directory) in str(error)  # noqa: PT017
            assert listing(directory) == before
        path.write_bytes(whole)
    assert refused >= 4
    same(restore(directory, state).state._replace(data=None), state)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_flipped_bit_is_found(finished, tmp_path):
    directory, state = copy(finished, tmp_path)
    newest = max(directory.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        restore(directory, state)


def test_other_numbers_than_were_saved_are_found():
    """As files may be read without an error and yet not be what was written."""
    arrays, leaves = pack(({"w": jnp.arange(3.0)},))
    same(unpack(({"w": jnp.zeros(3)},), leaves, arrays, "there"), ({"w": np.arange(3.0, dtype=np.float32)},))
    with pytest.raises(CheckpointError, match="there is damaged: the checksum"):
        unpack(({"w": jnp.zeros(3)},), leaves, {name: array + 1 for name, array in arrays.items()}, "there")


def test_a_checkpoint_of_another_model_says_so(finished):
    directory, (state, _) = finished
    other = state._replace(params=jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape, 2)), state.params))
    with pytest.raises(CheckpointError, match=r"of another model, optimizer or setting: \.params\[0\]\.w_x is float32"):
        restore(directory, other)
    with pytest.raises(CheckpointError, match="of another model, optimizer or setting"):
        restore(directory, state._replace(opt_state=optax.sgd(0.1).init(state.params)))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 77; there are \["):
        restore(directory, state, step=77)


def test_a_foreign_directory_is_left_alone(finished, tmp_path):
    state = finished[1][0]
    photos = tmp_path / "photos"
    (photos / "step_1").mkdir(parents=True)
    (photos / "step_1" / "photo").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for where in (photos, tmp_path / "file"):
        before = listing(tmp_path)
        with pytest.raises(CheckpointError, match=str(where)):
            run(where, truncated=False, epochs=1)
        with pytest.raises(CheckpointError, match=str(where)):
            restore(where, state)
        assert listing(tmp_path) == before
    with pytest.raises(CheckpointError, match="no checkpoints"):
        restore(tmp_path / "nowhere", state)
    assert not (tmp_path / "nowhere").exists()


def test_another_run_in_the_same_directory_raises(finished, tmp_path):
    directory, state = copy(finished, tmp_path)
    optimizer = optax.adam(0.01)
    with pytest.raises(CheckpointError, match="began at step 0, this one begins at 4"):
        fit(lambda *_: 0.0, state, [np.ones(2)], optimizer=optimizer, epochs=1, checkpoints=directory)


def test_a_plain_iterator_cannot_resume_and_says_so(tmp_path):
    def loss(params, batch, key):
        return ((params - batch) ** 2).sum(), {}

    optimizer = optax.sgd(0.1)
    state = train_state(jnp.ones(2), optimizer, jax.random.key(0))
    batches = [np.zeros(2, np.float32)] * 6
    keywords = {"optimizer": optimizer, "epochs": 1, "checkpoints": Checkpoints(tmp_path / "run", every=2)}
    fit(loss, state, iter(batches), steps_per_call=2, **keywords)
    with pytest.raises(ValueError, match="a plain iterable cannot go on from a checkpoint"):
        fit(loss, state, iter(batches), steps_per_call=2, **keywords)


def entries(directory):
    return {path: path.stat().st_mtime_ns for path in [directory, *directory.rglob("*")]}


def test_reading_beside_a_run_that_saves_changes_nothing(finished, tmp_path, capfd):
    """Not even what looks like the leftovers of a run that was killed: it may be what another one is writing."""
    directory, state = copy(finished, tmp_path)
    for name in ("step_99.orbax-checkpoint-tmp", "step_99.orbax-checkpoint-tmp-7"):
        (directory / name).mkdir()
        (directory / name / "arrays").write_text("half")
    before = entries(tmp_path)
    with contextlib.closing(lock.Lock(directory)):
        during = entries(tmp_path)
        same(restore(directory, state).state._replace(data=None), state)
        assert entries(tmp_path) == during
    assert before.keys() <= during.keys()
    assert capfd.readouterr() == ("", "")


def train(directory, **changes):
    """A short run of two steps, with something changed."""
    data = (XS, -XS)
    arguments = {"seed": 0, "data": data, "epochs": 1, "batch_size": 4, "key": jax.random.key(2)}
    arguments |= {"optimizer": optax.adam(0.1), "validation": data} | changes
    loss, seed = arguments.pop("loss"), arguments.pop("seed")
    params = GRU(2, 2).init(jax.random.key(seed))
    state = train_state(params, arguments["optimizer"], jax.random.key(1))
    return fit(loss, state, arguments.pop("data"), checkpoints=directory, **arguments)


XS = np.random.default_rng(0).normal(size=(8, 3, 2)).astype(np.float32)
HALF = 0.5


def scaled(factor):
    """A loss of one's own, with a number in its closure and another one from its module."""

    def loss(params, batch, key):
        _, ys = jaxrnn.scan(CELL, params, None, batch[0], time_axis=1)
        return factor * HALF * jnp.square(ys - batch[1]).mean(), {}

    return loss


CELL = GRU(2, 2)
OWN = {"loss": scaled(1.0)}
RATED = {"optimizer": optax.inject_hyperparams(optax.adam)(learning_rate=0.1)}
BUCKETS = {"data": Buckets(list(XS), list(-XS), 4, shuffle=False), "validation": None}


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        (OWN, OWN | {"data": (XS + 1, -XS)}, r"data\[0\] was float32\[8, 3, 2\]"),
        (OWN, OWN | {"validation": (XS, XS)}, r"validation\[1\] was float32\[8, 3, 2\]"),
        (OWN, {"loss": scaled(2.0)}, r"loss\.factor was 1\.0 and is 2\.0"),
        (OWN, OWN | {"optimizer": optax.adam(0.1, b1=0.8)}, r"optimizer\..*b1 was 0\.9 and is 0\.8"),
        (OWN, OWN | {"optimizer": optax.adam(0.2)}, r"optimizer\..*step_size was -0\.1 and is -0\.2"),
        (OWN, OWN | {"seed": 5}, r"params\.w_x was float32\[2, 6\]"),
        (OWN, OWN | {"key": jax.random.key(3)}, "order was key"),
        (OWN, OWN | {"batch_size": 2}, "batch_size was 4 and is 2"),
        (OWN, OWN | {"accumulate": 2}, "accumulate was 1 and is 2"),
        (OWN, OWN | {"compute_dtype": jnp.bfloat16}, r"compute_dtype was None and is dtype\(bfloat16\)"),
        (OWN, OWN | {"validation": Validation((XS, -XS), maximize=True)}, r"monitor\[1\] was False and is True"),
        (OWN, {"loss": make_loss(GRU(2, 2), squared_error)}, r"loss was .*scaled.<locals>.loss \(code"),
        (BUCKETS | OWN, BUCKETS | OWN | {"data": Buckets(list(XS), list(XS), 4, shuffle=False)}, r"data\.targets"),
        (
            OWN,
            OWN
            | {"epochs": 2, "validation": Validation((XS, -XS), patience=3), "steps_per_call": 1, "nonfinite": "skip"},
            None,
        ),
        (OWN | RATED, OWN | {"optimizer": optax.inject_hyperparams(optax.adam)(learning_rate=0.3)}, None),
        (OWN, {"loss": scaled(1.0), "optimizer": optax.adam(0.1)}, None),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_only_the_same_run_goes_on(first, then, words, tmp_path):
    train(tmp_path / "run", **first)
    before = steps_saved(tmp_path / "run")
    if words is None:
        train(tmp_path / "run", **then)
        return
    with pytest.raises(CheckpointError, match=f"holds another run than this one: {words}"):
        train(tmp_path / "run", **then)
    assert steps_saved(tmp_path / "run") == before


def test_members_resume_too(tmp_path):
    def loss(params, batch, key):
        noise = 0.0 if key is None else jax.random.normal(key)
        return ((params - batch + 0.1 * noise) ** 2).sum(), {}

    optimizer = optax.adam(0.1)
    keys = jax.random.split(jax.random.key(0), 3)
    states = jax.vmap(lambda key: train_state(jax.random.normal(key, (2,)), optimizer, key))(keys)
    data = np.arange(12, dtype=np.float32).reshape(6, 2)
    keywords = {"optimizer": optimizer, "batch_size": 2, "key": keys[0], "validation": data}
    whole = fit(loss, states, data, epochs=4, **keywords)
    fit(loss, states, data, epochs=2, checkpoints=tmp_path / "run", **keywords)
    same(fit(loss, states, data, epochs=4, checkpoints=tmp_path / "run", **keywords), whole)


def test_a_second_run_in_the_same_directory_is_refused_while_the_first_goes_on(tmp_path):
    """In the same process and in another one; and not when the first has ended, or was killed."""
    first = Saver(Checkpoints(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=f"run: another run is saving .* there: process {os.getpid()} on"):
        train(tmp_path / "run", **OWN)
    first.close()
    train(tmp_path / "run", **OWN)
    code = "import pathlib, sys, time; from jaxrnn.training.lock import Lock; x = Lock(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", f"{code}; print('ready', flush=True); time.sleep(300)", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=SCRIPT.parent.parent) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(CheckpointError, match=f"another run .* process {process.pid} on"):
            Saver(Checkpoints(tmp_path / "run"))
        process.kill()
    Saver(Checkpoints(tmp_path / "run")).close()


@pytest.mark.parametrize("again", [False, True])
def test_a_directory_that_is_deleted_while_training_runs_is_told(again, tmp_path):
    import shutil

    saver = Saver(Checkpoints(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run")
    if again:
        Saver(Checkpoints(tmp_path / "run")).close()
    state = train_state(jnp.ones(2), optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(CheckpointError, match="run: was deleted, moved or replaced while training"):
        saver.save(state, empty_history(), start=0, value=None)
    saver.close()
    assert not list(tmp_path.glob("run/step*"))


def test_a_directory_that_cannot_be_locked_says_so(tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock, "_try_lock", refuse)
    with pytest.raises(CheckpointError, match=r"run: cannot be locked for one run: .*not supported"):
        Saver(Checkpoints(tmp_path / "run"))


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep": 0}])
def test_wrong_settings_raise(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"checkpoints.{next(iter(wrong))}: expected at least 1"):
        Saver(Checkpoints(tmp_path / "run", **wrong))
    assert not (tmp_path / "run").exists()


def test_the_mark_is_plain_json(finished):
    assert json.loads((finished[0] / "jaxrnn-run.json").read_text()) == {"format": 3}
