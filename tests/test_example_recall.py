"""examples/recall.py: its tasks, its models, short trainings, and the exit status."""

import importlib.util
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrnn

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
PATH = Path(__file__).parents[1] / "examples" / "recall.py"
SPEC = importlib.util.spec_from_file_location("recall", PATH)
recall = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(recall)

PROMOTION = "standard"  # Optax divides floats by integers


def test_every_key_is_asked_for_once_and_its_value_is_the_target():
    tokens, targets = map(np.asarray, recall.recall(jax.random.key(0), 40))
    assert tokens.shape == targets.shape == (40, recall.ROWS)
    pairs, rest = np.split(tokens, [2 * recall.PAIRS])
    assert (targets[: 2 * recall.PAIRS] == -1).all()
    for row in range(recall.ROWS):
        keys, values = pairs[::2, row], pairs[1::2, row]
        assert len(set(keys)) == recall.PAIRS
        assert keys.max() < recall.KEYS <= values.min()
        assert values.max() < recall.BLANK
        table, asked = dict(zip(keys, values - recall.KEYS, strict=True)), rest[:, row] != recall.BLANK
        assert sorted(rest[asked, row]) == sorted(keys)
        np.testing.assert_array_equal(
            targets[2 * recall.PAIRS :, row], [table.get(token, -1) for token in rest[:, row]]
        )
    assert (rest != recall.BLANK).any(1).all()  # anywhere


def test_parity_counts_the_ones():
    bits, odd = recall.parity(jax.random.key(0), 30)
    np.testing.assert_array_equal(odd, np.cumsum(bits, axis=0) % 2)
    assert 0.45 < np.mean(bits) < 0.55


def test_permutations_are_applied_one_after_the_other():
    drawn, products = map(np.asarray, recall.permutations(jax.random.key(0), 12))
    orders = np.array(list(itertools.permutations(range(3))))
    assert set(drawn.ravel()) == set(range(6))
    for row in range(recall.ROWS):
        things = np.arange(3)
        for number, product in zip(drawn[:, row], products[:, row], strict=True):
            things = orders[number][things]
            np.testing.assert_array_equal(things, orders[product])


def test_the_models_that_recall_are_of_equal_size():
    task = recall.TASKS["recall"]
    sizes = [jaxrnn.summary(recall.network(task, model.cell)).count for model in recall.models("recall").values()]
    assert max(sizes) < 1.03 * min(sizes)


def short(name, kind, steps):
    """A training of few steps, its shares of right answers, and whether it should answer."""
    task, model = recall.TASKS[name], recall.models(name)[kind]
    each = recall.learn(task._replace(steps=steps), model.cell, seeds=1, seed=0)
    assert each.losses.shape == (1, steps)
    return each.shares, model.answers


CASES = [("recall", kind, 400) for kind in recall.models("recall")]
CASES += [("parity", kind, 300) for kind in recall.models("parity")]
CASES += [("permutations", kind, 700) for kind in recall.models("permutations")]


@pytest.mark.full
@pytest.mark.parametrize(("name", "kind", "steps"), CASES)
def test_matrices_answer_and_the_others_do_not(name, kind, steps):
    shares, answers = short(name, kind, steps)
    assert shares.min() > 0.9 if answers else shares.max() < 0.6


@pytest.mark.parametrize(
    ("turning", "other", "status"),
    [((1.0, 1.0, 0.5), 0.5, 0), ((1.0, 0.9, 0.9), 0.5, 1), ((1.0, 1.0, 1.0), 0.7, 1), ((1.0, 1.0, np.nan), 0.5, 1)],
)
def test_theory_has_to_be_met(monkeypatch, tmp_path, capsys, turning, other, status):
    shares = dict(zip(recall.models("parity"), (turning, (0.5, other, 0.5)), strict=True))
    runs = {kind: recall.Run(np.array(each), np.ones((3, 40)), 1000, 1.0) for kind, each in shares.items()}
    monkeypatch.setattr(recall, "run", lambda args: {"parity": runs})
    out = tmp_path / "recall.png"
    assert recall.main(["--out", str(out)]) == status
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "theory" in capsys.readouterr().out
    assert recall.main(["--quick", "--out", str(out)]) == 0
    assert "not judged" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--wanted much", "--tasks chess", "--unknown"])
def test_bad_flags(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        recall.main(flags.split())
    assert stopped.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err
