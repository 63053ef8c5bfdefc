"""examples/translate_dates.py: its dates, its baselines, and a short run."""

import importlib.util
import itertools
from datetime import date
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
    """Texts without a slip are parsed to their meaning; half or more of those with words have one."""
    days = np.arange(date(1969, 1, 1).toordinal(), date(2069, 1, 1).toordinal(), 73)
    written = dates.write(days, np.random.default_rng(0))
    assert [meaning for _, meaning in written] == [date.fromordinal(day).isoformat() for day in days]
    parsed = [(dates.strptime(text), meaning) for text, meaning in written]
    assert all(answer in (meaning, "") for answer, meaning in parsed)
    assert 0.3 < np.mean([answer == meaning for answer, meaning in parsed]) < 0.8


@pytest.mark.parametrize("text", ["3rd of march, 1987", "tuesday 3 march 1987", "mar 3rd '87", "3.3.87", "19870303"])
def test_strptime_reads_the_styles(text):
    assert dates.strptime(text) == dates.mended(text) == "1987-03-03"


def test_mended():
    assert dates.strptime("tuesdya 3 mmrch 1987") == ""
    assert dates.mended("tuesdya 3 mmrch 1987") == "1987-03-03"


def test_encode():
    batch = dates.encode([("3.3.87", "1987-03-03")])
    assert [dates.LETTERS[k] for k in batch.xs[0, : batch.lengths[0]]] == list("3.3.87")
    assert [dates.ISO[k] for k in batch.targets[0]] == list("1987-03-03")


def test_padding_is_never_looked_at():
    cell = dates.Attend(3)
    weights = jax.jit(cell.init)(jax.random.key(0))
    states = jax.random.normal(jax.random.key(1), (2, 5, 3))
    visible = jnp.arange(5) < jnp.array([[4], [2]])

    @jax.jit
    def run(states):
        params = weights._replace(states=states, visible=visible)
        return jaxrnn.scan(jaxrnn.EmitCarry(cell), params, None, jnp.ones((4, 2, 3)))[1]

    out = run(states)
    np.testing.assert_allclose(out.carry.a.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(out.carry.a[:, ~visible], 0)
    np.testing.assert_array_equal(out.y, run(jnp.where(visible[..., None], states, 9.0)).y)


def test_a_short_run_learns(result):
    """More characters of days never seen than the commonest of each place, on its own output."""
    days = np.array([list(meaning) for _, meaning in result.test])
    commonest = np.mean([np.unique(column, return_counts=True)[1].max() for column in days.T]) / len(days)
    assert result.characters > commonest + 0.1
    assert list(result.right) == ["the network", "strptime", "strptime, words mended"]
    assert 0 < result.right["the network"] < 1
    assert 0.3 < result.right["strptime"] < result.right["strptime, words mended"] < 1
    np.testing.assert_allclose(result.attention.sum(-1), 1, rtol=1e-5)


def test_status_and_picture(result, monkeypatch, tmp_path, capsys):
    """The status follows the margin, the strongest baseline counts, and the picture is written."""
    monkeypatch.setattr(dates, "run", lambda args: result)
    out = tmp_path / "dates.png"
    network, *others = result.right.values()
    assert result.gain == network - max(others)
    assert dates.main(["--out", str(out), "--margin", str(result.gain)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert dates.main(["--out", str(out), "--margin", "2"]) == 1
    assert f"{network:.1%}" in capsys.readouterr().out


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
