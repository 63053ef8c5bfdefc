"""examples/vanishing_gradients.py: its task, its short mode, and the exit status."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
PATH = Path(__file__).parents[1] / "examples" / "vanishing_gradients.py"
SPEC = importlib.util.spec_from_file_location("vanishing_gradients", PATH)
vanishing_gradients = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(vanishing_gradients)

PROMOTION = "standard"  # Optax divides floats by integers


@pytest.fixture(scope="module")
def result():
    return vanishing_gradients.run(vanishing_gradients.parse(["--quick"]))


def test_the_task_is_to_add_one_number_of_either_half():
    batch = vanishing_gradients.adding(np.random.default_rng(0), 500, 7)
    numbers, flags = np.moveaxis(batch.xs, -1, 0)
    assert set(np.unique(flags)) == {0, 1}
    assert (flags[:, :3].sum(1) == 1).all()
    assert (flags[:, 3:].sum(1) == 1).all()
    assert flags.any(0).all()
    np.testing.assert_allclose(batch.targets, np.where(flags == 1, numbers, 0).sum(1), rtol=1e-6)
    assert np.mean((batch.targets - 1) ** 2) == pytest.approx(1 / 6, rel=0.15)


@pytest.mark.full
def test_the_short_mode_learns_and_sees_gradients(result):
    assert result.chance == pytest.approx(1 / 6, rel=0.1)
    for name in ("LSTM", "GRU"):
        run = result.runs[name]
        assert run.error < 0.03
        assert run.losses.shape == (250,)
        assert run.losses[-20:].mean() < 0.03 < run.losses[0]
        # Of the gradient that leaves the last step, training brings more back to the first.
        start, end = (np.median(norms[0] / norms[-1]) for norms in (run.before, run.after))
        assert run.before.shape == run.after.shape == (10, 100)
        assert 0 < start < 0.5
        assert end > 2 * start


@pytest.mark.parametrize(
    ("lstm", "gru", "status"), [(0.05, 0.06, 0), (0.05, 0.08, 1), (0.08, 0.05, 1), (0.05, math.nan, 1)]
)
@pytest.mark.full
def test_both_have_to_keep_the_margin(result, monkeypatch, tmp_path, capsys, lstm, gru, status):
    errors = {"Elman": 0.3, "LSTM": lstm, "GRU": gru}
    runs = {name: run._replace(error=errors[name]) for name, run in result.runs.items()}
    monkeypatch.setattr(vanishing_gradients, "run", lambda args: result._replace(chance=0.17, runs=runs))
    out = tmp_path / "vanishing.png"
    assert vanishing_gradients.main(["--quick", "--margin", "0.1", "--out", str(out)]) == 0
    assert "too small to win, and not judged" in capsys.readouterr().out
    assert vanishing_gradients.main(["--margin", "0.1", "--out", str(out)]) == status
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "chance" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--margin much", "--seed 0.5", "--unknown"])
def test_bad_flags(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        vanishing_gradients.main(flags.split())
    assert stopped.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err
