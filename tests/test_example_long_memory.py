"""examples/long_memory.py: its models, its short mode, and the exit status."""

import importlib.util
import math
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
PATH = Path(__file__).parents[1] / "examples" / "long_memory.py"
SPEC = importlib.util.spec_from_file_location("long_memory", PATH)
long_memory = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(long_memory)

PROMOTION = "standard"  # Optax divides floats by integers


@pytest.fixture(scope="module")
def result():
    return long_memory.run(long_memory.parse(["--quick"]))


def test_the_task_is_to_add_one_number_of_either_half():
    batch = long_memory.adding(np.random.default_rng(0), 500, 7)
    numbers, flags = np.moveaxis(batch.xs, -1, 0)
    assert (flags[:, :3].sum(1) == 1).all()
    assert (flags[:, 3:].sum(1) == 1).all()
    np.testing.assert_allclose(batch.targets, np.where(flags == 1, numbers, 0).sum(1), rtol=1e-6)


def test_the_models_are_of_equal_size():
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
        for model in long_memory.models(32).values()
    ]
    assert max(sizes) < 1.03 * min(sizes)


@pytest.mark.full
def test_the_short_mode_learns(result):
    assert result.chance == pytest.approx(1 / 6, rel=0.15)
    run = result.runs["MinGRU"]
    assert run.error < 0.03
    assert run.losses.shape == (300,)
    assert run.losses[-20:].mean() < 0.03 < run.losses[0]


@pytest.mark.parametrize(
    ("mine", "lstm", "status"), [(0.05, 0.06, 0), (0.05, 0.04, 1), (0.08, 0.2, 1), (math.nan, 0.2, 1)]
)
@pytest.mark.full
def test_the_margin_is_kept(result, monkeypatch, tmp_path, capsys, mine, lstm, status):
    errors = {"MinGRU": mine, "LSTM": lstm}
    runs = {name: run._replace(error=errors[name]) for name, run in result.runs.items()}
    monkeypatch.setattr(long_memory, "run", lambda args: result._replace(chance=0.17, runs=runs))
    out = tmp_path / "long.png"
    assert long_memory.main(["--quick", "--margin", "0.1", "--out", str(out)]) == 0
    assert "too small to win, and not judged" in capsys.readouterr().out
    assert long_memory.main(["--margin", "0.1", "--out", str(out)]) == status
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "chance" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--margin much", "--seed 0.5", "--unknown"])
def test_bad_flags(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        long_memory.main(flags.split())
    assert stopped.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err
