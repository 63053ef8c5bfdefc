"""examples/flax_models.py: its task, its baseline, the two models, the short mode, and the exit status."""

import importlib.util
import math
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
SPEC = importlib.util.spec_from_file_location("flax_models", Path(__file__).parents[1] / "examples" / "flax_models.py")
flax_models = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(flax_models)

PROMOTION = "standard"  # Optax divides floats by integers


@pytest.fixture(scope="module")
def result():
    return flax_models.run(flax_models.parse(["--quick"]))


def test_walks():
    batch = flax_models.walks(np.random.default_rng(0), 50, 5, 9)
    assert set(batch.lengths) == {5, 6, 7, 8, 9}
    for moves, places in zip(batch.xs, batch.targets, strict=True):
        at = 0
        for move, place in zip(moves, places, strict=True):
            at = (at + (-1, 0, 1)[move]) % 4
            assert place == at


def test_the_baseline_knows_what_the_last_moves_tell():
    """Where the place is the move before the last, and at the start 3, a table of two moves is always right."""
    rng = np.random.default_rng(0)

    def part(count):
        batch = flax_models.walks(rng, count, 6, 6)
        return batch._replace(targets=np.hstack([np.full((count, 1), 3), batch.xs[:, :-1]]))

    training, validation, test = part(300), part(50), part(50)
    assert flax_models.baseline(training, validation, test) == 1
    shuffled = test._replace(targets=rng.permuted(test.targets, axis=1))
    assert flax_models.baseline(training, validation, shuffled) < 0.6


@pytest.mark.parametrize("make", [flax_models.linen_model, flax_models.nnx_model])
def test_decay_is_of_matrices_alone(make):
    params, _ = make(0)
    chosen = jax.tree_util.tree_leaves_with_path(flax_models.matrices(params))
    names = sorted(jax.tree_util.keystr(path).split("'")[-2] for path, flag in chosen if flag)
    assert names == ["kernel", "w_h", "w_x"]
    rest = [leaf.ndim for (_, flag), leaf in zip(chosen, jax.tree.leaves(params), strict=True) if not flag]
    assert sorted(rest) == [1, 1, 1, 2]  # biases of the cell and of the dense layer, and the embedding


@pytest.mark.parametrize("make", [flax_models.linen_model, flax_models.nnx_model])
def test_padding_counts_for_nothing_and_noise_needs_a_key(make):
    params, logits = make(0)
    loss = flax_models.make_loss(logits)
    batch = flax_models.walks(np.random.default_rng(0), 4, 3, 6)
    padding = np.arange(6) >= batch.lengths[:, None]
    assert padding.any()
    other = batch._replace(xs=np.where(padding, 1, batch.xs), targets=np.where(padding, 0, batch.targets))
    value = loss(params, batch, None)[0]
    assert value == loss(params, other, None)[0]
    assert value != loss(params, batch, jax.random.key(0))[0]


@pytest.mark.full
def test_the_short_mode_learns(result):
    accuracies = result.accuracies
    assert 1 / 4 < accuracies["baseline"] < 0.5
    assert min(accuracies["linen"], accuracies["NNX"]) > accuracies["baseline"] + 0.05
    assert result.gain() == min(accuracies["linen"], accuracies["NNX"]) - accuracies["baseline"]
    for history in result.histories.values():
        assert history.train["accuracy"][-20:].mean() > history.train["accuracy"][:20].mean() + 0.2


@pytest.mark.parametrize(
    ("linen", "other", "status"),
    [(0.9, 0.91, 0), (0.9, 0.95, 1), (0.62, 0.6, 1), (0.6, 0.62, 1), (0.9, math.nan, 1), (math.nan, 0.9, 1)],
)
@pytest.mark.full
def test_the_margin_and_the_difference_decide(result, monkeypatch, tmp_path, capsys, linen, other, status):
    accuracies = {"baseline": 0.4, "linen": linen, "NNX": other}
    monkeypatch.setattr(flax_models, "run", lambda args: result._replace(accuracies=accuracies))
    out = tmp_path / "flax.png"
    assert flax_models.main(["--quick", "--margin", "0.3", "--out", str(out)]) == 0
    assert "too small to win, and not judged" in capsys.readouterr().out
    assert flax_models.main(["--margin", "0.3", "--out", str(out)]) == status
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "baseline" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--margin much", "--seed 0.5", "--unknown"])
def test_bad_flags(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        flax_models.main(flags.split())
    assert stopped.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err
