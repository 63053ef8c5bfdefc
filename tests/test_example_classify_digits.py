"""examples/classify_digits.py in its short mode: its result, its picture, its exit statuses."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

for package in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(package)
SPEC = importlib.util.spec_from_file_location("digits", Path(__file__).parents[1] / "examples" / "classify_digits.py")
digits = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(digits)

PROMOTION = "standard"  # Optax divides floats by integers


@pytest.fixture(scope="module")
def result():
    with jax.numpy_dtype_promotion("standard"):
        return digits.run(digits.parse(["--quick"]))


def test_more_rows_are_better_than_chance_and_than_fewer(result):
    assert result.network[0] > 0.2
    assert result.network[-1] > 0.6
    assert result.network[-1] > result.network[0] + 0.2
    assert result.baseline[-1] > 0.85
    assert result.predicted.shape == (8, 597)
    np.testing.assert_allclose(result.network, (result.predicted == digits.load()[2].labels).mean(1))


def test_every_length_cuts_each_digit_eight_times():
    part = digits.Digits(np.arange(3)[:, None, None] * np.ones((8, 8)), np.array([7, 1, 4]))
    batch = digits.every_length(part)
    assert batch.lengths.tolist() == [k for k in range(1, 9) for _ in range(3)]
    assert batch.targets.tolist() == [7, 1, 4] * 8
    assert batch.xs[:, 0, 0].tolist() == [0, 1, 2] * 8


def test_parts_do_not_overlap():
    parts = digits.load()
    assert [len(part.labels) for part in parts] == [900, 300, 597]
    assert len(np.unique(np.concatenate([part.images for part in parts]), axis=0)) == 1797


@pytest.mark.parametrize(("margin", "status"), [(-1, 0), (1, 1)])
def test_the_exit_status_follows_the_margin(result, monkeypatch, capsys, tmp_path, margin, status):
    monkeypatch.setattr(digits, "run", lambda args: result)
    out = tmp_path / "digits.png"
    assert digits.main(["--quick", f"--margin={margin}", "--out", str(out)]) == 0
    assert "too small to win, and not judged" in capsys.readouterr().out
    assert digits.main([f"--margin={margin}", "--out", str(out)]) == status
    assert out.read_bytes().startswith(b"\x89PNG")
    assert f"{result.network.mean():.3f}" in capsys.readouterr().out
