"""Several processes on this machine that train together, connected by Gloo."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
from interrupted import flat

from jaxrnn.training import evaluate, load, predict, restore
from jaxrnn.training.checkpoint import CheckpointError

PROMOTION = "standard"  # Adam of Optax mixes dtypes
SCRIPT = Path(__file__).parent / "processes.py"


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.contextmanager
def started(scenario, folder, count=2, devices=2):
    """The processes of a scenario, killed at the end of the block."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(SCRIPT.parent.parent)}
    command = [sys.executable, "-W", "error", str(SCRIPT), scenario, str(free_port()), str(count)]
    with contextlib.ExitStack() as stack:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
        running = []
        try:
            for k in range(count):
                running.append(stack.enter_context(subprocess.Popen([*command, str(k), str(folder)], **pipes)))
            yield running
        finally:
            for process in running:
                process.kill()


def ended(scenario, folder, **options):
    """What each process prints until it ends, without an error."""
    with started(scenario, folder, **options) as running:
        told = [process.communicate(timeout=300) for process in running]
        assert [process.returncode for process in running] == [0] * len(running), "\n".join(err for _, err in told)
    return [out for out, _ in told]


def close(found, expected, prefix=""):
    for name, value in flat(expected).items():
        np.testing.assert_allclose(found[f"{prefix}{name}"], value, 5e-5, 5e-5, err_msg=name)


@pytest.mark.full
def test_parts_of_the_data_train_one_model(tmp_path):
    """Params whole and divided, a last batch that is whole, validation: as one process with all the rows."""
    out = ended("trains", tmp_path)
    assert re.search("epoch 3/3 .*val loss", out[0])
    assert "epoch" not in out[1]
    first, second = (np.load(tmp_path / f"{k}.npz") for k in range(2))
    assert sorted(first) == sorted(second)
    for name in set(first) - {"['ys']", "ys"}:
        np.testing.assert_array_equal(first[name], second[name])
    expected = processes.train(processes.whole_batches(2), validation=processes.DATA)
    close(first, processes.plain(expected), "['found']")
    close(first, processes.plain(expected), "['again']")
    arrays = processes.train(processes.DATA, key=jax.random.key(3), shuffle=True)
    close(first, processes.plain(arrays), "['arrays']")
    params = expected[0].best.params
    ys = predict(processes.MODEL, params, processes.XS, lengths=processes.DATA.lengths)
    np.testing.assert_allclose(np.concatenate([first["ys"], second["ys"]]), ys, 1e-4, 1e-4)
    np.testing.assert_allclose(first["loss"], evaluate(processes.LOSS, params, processes.DATA)["loss"], 1e-4)
    np.testing.assert_allclose(load(tmp_path / "model")[1][0].w_h, params[0].w_h, 5e-5, 5e-5)


@pytest.mark.full
def test_members_on_the_devices_of_all(tmp_path):
    ended("many", tmp_path)
    states = jax.vmap(lambda key: processes.train_state(processes.MODEL.init(key), processes.ADAM, key))
    states = states(jax.random.split(jax.random.key(0), 8))
    validation = processes.Validation(processes.DATA, patience=1)
    expected = processes.train(processes.DATA, state=states, validation=validation, epochs=4)
    params = expected[0].params
    results = {
        "found": processes.plain(expected),
        "loss": evaluate(processes.LOSS, params, processes.DATA, members=True)["loss"],
        "ys": predict(processes.MODEL, params, processes.XS, lengths=processes.DATA.lengths, members=True),
    }
    for k in range(2):
        close(np.load(tmp_path / f"{k}.npz"), results)


@pytest.mark.full
def test_what_must_be_the_same(tmp_path):
    ended("differs", tmp_path)
    assert {path.name for path in tmp_path.glob("*.done")} == {"0.done", "1.done"}


def steps_saved(folder):
    return [int(path.name.split("_")[1]) for path in (folder / "run").glob("step_*") if path.name[5:].isdigit()]


@pytest.mark.full
@pytest.mark.parametrize("killed", [0, 1])
def test_a_run_of_which_one_process_is_killed(tmp_path, killed):
    """The other one ends with an error that says so; started again they end as if nothing had been, bit for bit."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    ended("resumes", whole)
    with started("resumes", broken) as running:
        begun = time.monotonic()
        while not steps_saved(broken):
            time.sleep(0.01)
            assert time.monotonic() - begun < 200
        os.kill(running[killed].pid, signal.SIGKILL)
        other = running[1 - killed]
        _, told = other.communicate(timeout=60)
        assert other.returncode != 0
        assert "ProcessError: process" in told or "another task died" in told, told
    assert 0 < max(steps_saved(broken)) < 30
    ended("resumes", broken)
    for k in range(2):
        first, second = np.load(whole / f"{k}.npz"), np.load(broken / f"{k}.npz")
        assert sorted(first) == sorted(second)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)

    # One process of four devices, or of one, goes on from there with the whole data.
    like = processes.make_state()
    state = restore(broken / "run", like).state
    np.testing.assert_array_equal(state.params[0].w_h, np.load(broken / "0.npz")["[0].params[0].w_h"])
    with pytest.raises(CheckpointError, match="holds another run than this one: data"):
        processes.train(processes.DATA, checkpoints=broken / "run")
