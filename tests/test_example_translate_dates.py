"""examples/translate_dates.py: its dates, its baseline, and a short run."""

import importlib.util
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn

for name in "rich", "matplotlib":
    pytest.importorskip(name)
PATH = Path(__file__).parents[1] / "examples" / "translate_dates.py"
SPEC = importlib.util.spec_from_file_location("translate_dates", PATH)
dates = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(dates)

PROMOTION = "standard"  # Optax divides floats by integers


@pytest.fixture(scope="module")
def result():
    return dates.run(dates.parse(["--quick"]))


def test_dates_say_what_they_mean():
    """Every style can be read, most texts in spite of a slip; few slips make another date of it."""
    days = np.arange("1969-01-01", "2069-01-01", 73, dtype="datetime64[D]")
    written = dates.write(days, np.random.default_rng(0))
    assert [meaning for _, meaning in written] == days.astype(str).tolist()
    parsed = [(dates.mend_and_parse(text), meaning) for text, meaning in written]
    assert 0.85 < np.mean([answer == meaning for answer, meaning in parsed]) < 1
    assert np.mean([answer in (meaning, "") for answer, meaning in parsed]) > 0.9


@pytest.mark.parametrize("text", ["3rd of march, 1987", "tuesdya 3 mmrch 1987", "mar 3rd '87", "3.3.87", "19870303"])
def test_the_baseline_reads_the_styles_and_mends_words(text):
    assert dates.mend_and_parse(text) == "1987-03-03"


def test_what_the_baseline_cannot_read():
    assert dates.mend_and_parse("3 1987") == ""


def test_encode():
    batch = dates.encode([("3.3.87", "1987-03-03")])
    assert [dates.LETTERS[k] for k in batch.xs[0, : batch.lengths[0]]] == list("3.3.87")
    assert [dates.ISO[k] for k in batch.targets[0]] == list("1987-03-03")


def test_padding_is_never_looked_at():
    cell = dates.Attend(jaxrnn.GRU(6, 3))
    weights = jax.jit(cell.init)(jax.random.key(0))
    states = np.random.default_rng(1).normal(size=(2, 5, 3)).astype(np.float32)
    visible = np.arange(5) < np.array([[4], [2]])

    @jax.jit
    def run(states):
        params = weights._replace(states=states, visible=visible)
        return jaxrnn.scan(jaxrnn.EmitCarry(cell), params, None, jnp.ones((4, 2, 3)))[1]

    out = run(states)
    a = np.asarray(out.carry.a)
    np.testing.assert_allclose(a.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(a[:, ~visible], 0)
    np.testing.assert_array_equal(out.y, run(np.where(visible[..., None], states, np.float32(9))).y)


@pytest.mark.full
def test_a_short_run_learns(result):
    """More characters of days never seen than the commonest of each place, on its own output."""
    days = np.array([list(meaning) for _, meaning in result.test])
    commonest = np.mean([np.unique(column, return_counts=True)[1].max() for column in days.T]) / len(days)
    assert result.characters > commonest + 0.1
    assert 0 < result.network < result.characters
    assert 0.85 < result.baseline < 1
    np.testing.assert_allclose(result.attention.sum(-1), 1, rtol=1e-5)


@pytest.mark.full
def test_status_and_picture(result, monkeypatch, tmp_path, capsys):
    """The status follows the margin, and the picture is written."""
    monkeypatch.setattr(dates, "run", lambda args: result)
    out = tmp_path / "dates.png"
    gain = result.network - result.baseline
    assert dates.main(["--out", str(out), "--margin", str(gain)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert dates.main(["--out", str(out), "--margin", str(gain + 1e-6)]) == 1
    assert f"{result.network:.1%}" in capsys.readouterr().out


def test_no_folder_for_the_picture(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        dates.main(["--out", str(tmp_path / "none" / "dates.png")])
    assert exit_.value.code == 2
    assert "--out: there is no folder" in capsys.readouterr().err


def test_test_days_are_not_trained_on(monkeypatch):
    """No day is in two of the three parts."""
    parts = []
    monkeypatch.setattr(dates, "write", lambda days, rng: parts.append(set(days.tolist())) or [("1", "1969-01-01")])
    monkeypatch.setattr(dates, "fit", _stop)
    with pytest.raises(StopIteration):
        dates.run(dates.parse(["--quick"]))
    assert len(parts) == 3
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(parts, 2))


def _stop(*args, **keywords):
    raise StopIteration
