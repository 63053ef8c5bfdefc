"""examples/state_tracking.py: its tasks, a short parity, and the exit status."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
PATH = Path(__file__).parents[1] / "examples" / "state_tracking.py"
SPEC = importlib.util.spec_from_file_location("state_tracking", PATH)
state_tracking = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(state_tracking)

PROMOTION = "standard"  # Optax divides floats by integers


def test_parity_counts_the_ones():
    bits, odd = state_tracking.parity(jax.random.key(0), 30)
    np.testing.assert_array_equal(odd, np.cumsum(bits, axis=0) % 2)
    assert 0.45 < np.mean(bits) < 0.55


def test_copying_asks_for_the_marked_tokens_in_order():
    tokens, targets = map(np.asarray, state_tracking.copying(jax.random.key(0), 20))
    assert tokens.shape == targets.shape == (28, 16)
    for row in range(16):
        body = tokens[:20, row]
        np.testing.assert_array_equal(body[body < 8], targets[20:, row])
    assert (targets[:20] == -1).all()
    assert (tokens[20:] == state_tracking.ASK).all()
    assert (tokens[:20] < 8).any(1).all()  # anywhere


def short(name, steps, seeds):
    """Parity beyond the lengths of training: the shares of right answers."""
    task = state_tracking.TASKS["parity"]._replace(tested=60, steps=steps, rate=5e-3)
    model = state_tracking.MODELS["parity"][name]
    shares, losses = state_tracking.learn(task, model, seeds=seeds, seed=0)
    assert losses.shape == (seeds, steps)
    return shares, model.learns


@pytest.mark.full
@pytest.mark.parametrize(("name", "steps", "seeds"), [("GRU", 350, 2), ("MinGRU", 60, 1)])
def test_parity_needs_a_state_that_turns(name, steps, seeds):
    shares, learns = short(name, steps, seeds)
    assert learns == (name == "GRU")
    assert shares.max() > 0.97 if learns else abs(shares.max() - 0.5) < 0.1


@pytest.mark.full
@pytest.mark.parametrize("name", state_tracking.MODELS["parity"])
def test_parity_is_as_theory_says(name):
    shares, learns = short(name, 700, 2)
    assert shares.max() > 0.97 if learns else np.all(np.abs(shares - 0.5) < 0.1)


@pytest.mark.parametrize(("gru", "min_gru", "status"), [(1.0, 0.5, 0), (0.9, 0.5, 1), (1.0, 0.995, 1)])
def test_theory_has_to_be_met(monkeypatch, tmp_path, capsys, gru, min_gru, status):
    losses = np.ones((2, 40))
    found = {"parity": {"GRU": (np.array([gru, 0.6]), losses), "MinGRU": (np.array([0.5, min_gru]), losses)}}
    monkeypatch.setattr(state_tracking, "run", lambda args: found)
    out = tmp_path / "states.png"
    assert state_tracking.main(["--out", str(out)]) == status
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "theory" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--wanted much", "--tasks chess", "--unknown"])
def test_bad_flags(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        state_tracking.main(flags.split())
    assert stopped.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err
