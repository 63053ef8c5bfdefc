"""examples/data_parallel.py: its short mode, in processes of their own, and the exit status."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
SCRIPT = Path(__file__).parents[1] / "examples" / "data_parallel.py"
SPEC = importlib.util.spec_from_file_location("data_parallel", SCRIPT)
data_parallel = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(data_parallel)

PROMOTION = "standard"  # Optax divides floats by integers
NAMES = data_parallel.ONE, "2 devices", "divided params"


def started(*flags):
    """The process of the short mode."""
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "COLUMNS": "100"}
    command = [sys.executable, "-W", "error", str(SCRIPT), "--quick", *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_devices_train_as_one(tmp_path):
    with started("--devices", "2", "--out", str(tmp_path / "out.png")) as process:
        told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert "the losses of all steps differ by at most" in told
    one, two, divided = (next(line for line in told.splitlines() if f"│ {name} " in line) for name in NAMES)
    assert one.split("│")[2:] == two.split("│")[2:]
    size, part = (int(line.split("│")[3].replace(",", "")) for line in (one, divided))
    assert size / 2 < part < 0.6 * size
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    flags = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--devices", "1"]
    outs = [tmp_path / f"{k}.png" for k in range(2)]
    both = [started(*flags, "--process", str(k), "--out", str(out)) for k, out in enumerate(outs)]
    told = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert "│ 2 devices " in told[0]
    assert "epoch" not in told[1]
    assert [out.exists() for out in outs] == [True, False]


@pytest.mark.parametrize(("last", "status"), [(1.00001, 0), (1.001, 1), (np.nan, 1)])
def test_the_margin_decides_the_exit_status(monkeypatch, tmp_path, capsys, last, status):
    losses = np.linspace(2, 1, 5)
    others = {name: data_parallel.Training(losses * [1, 1, 1, 1, last], 0.5, 10) for name in NAMES[1:]}
    result = data_parallel.Result({data_parallel.ONE: data_parallel.Training(losses, 0.5, 10), **others})
    monkeypatch.setattr(data_parallel, "run", lambda args: result)
    monkeypatch.setattr(data_parallel.jax.config, "update", lambda name, value: None)  # devices are there already
    out = tmp_path / "out.png"
    assert data_parallel.main(["--out", str(out)]) == status
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "allowed are 0.0001" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", ["--devices 0", "--process 1", "--coordinator here:1", "--processes 2", "--margin much"]
)
def test_bad_flags(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        data_parallel.main(flags.split())
    assert stopped.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err
