"""examples/sweep.py: its short mode, the equality that comes before the times, and the exit status."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
SPEC = importlib.util.spec_from_file_location("sweep", Path(__file__).parents[1] / "examples" / "sweep.py")
sweep = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sweep)

PROMOTION = "standard"  # Optax divides floats by integers


@pytest.fixture(scope="module")
def result():
    return sweep.run(sweep.parse(["--quick"]))


def test_the_short_mode_learns(result):
    """The members differ, by seed and by rate, and the best of them know digits that they have not seen."""
    assert result.held_out.shape == (4, 2)
    assert len(np.unique(result.held_out)) == 8
    assert result.held_out.min() < math.log(10) - 0.5
    assert result.held_out[0].min() > result.held_out[2].max()
    assert min(min(times) for times in result.times.values()) > 0


@pytest.mark.parametrize("way", ["step", "train"])
def test_losses_that_differ_are_no_comparison(monkeypatch, way):
    """Here one of the loops gets other batches than the sweep."""
    monkeypatch.setattr(sweep, "ROWS", 2)
    compiled = sweep.compiled

    def tampered(function, state, batches):
        program, seconds = compiled(function, state, batches)
        if state.step.ndim or function.__name__ != way:
            return program, seconds
        return lambda state, batches: program(state, batches._replace(xs=1 - batches.xs)), seconds

    monkeypatch.setattr(sweep, "compiled", tampered)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        sweep.run(sweep.parse(["--quick"]))


@pytest.mark.parametrize(("run", "status"), [(6.0, 0), (4.0, 1), (math.nan, 1)])
def test_the_margin_decides_the_exit_status(result, monkeypatch, tmp_path, capsys, run, status):
    """Twice as fast is wanted; compile times do not count."""
    times = {
        sweep.CALLS: sweep.Times(100.0, run),
        sweep.TRAININGS: sweep.Times(100.0, 0.1),
        sweep.SWEEP: sweep.Times(1.0, 2.5),
    }
    monkeypatch.setattr(sweep, "run", lambda args: result._replace(times=times))
    out = tmp_path / "sweep.png"
    assert sweep.main(["--quick", "--margin", "2", "--out", str(out)]) == 0
    assert "too small to win, and not judged" in capsys.readouterr().out
    assert sweep.main(["--margin", "2", "--out", str(out)]) == status
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "100.00" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--margin much", "--seed 0.5", "--unknown"])
def test_bad_flags(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        sweep.main(flags.split())
    assert stopped.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err
