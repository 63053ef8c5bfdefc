"""examples/generate.py: its curves, its baselines, and a short run."""

import importlib.util
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

for name in "rich", "matplotlib", "sklearn":
    pytest.importorskip(name)
PATH = Path(__file__).parents[1] / "examples" / "generate.py"
SPEC = importlib.util.spec_from_file_location("generate", PATH)
generate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generate)

PROMOTION = "standard"  # Optax divides floats by integers


@pytest.fixture(scope="module")
def runs():
    """The result, and the three parts that were written."""
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        write = generate.write
        patch.setattr(generate, "write", lambda words, rng: parts.append((words, write(words, rng))) or parts[-1][1])
        return generate.run(generate.parse(["--quick"])), parts


def test_curves():
    """An upright e of middling style returns to the line after its letter's time, a tall letter is tall."""
    words = np.array([[0, 1, 4], [2, 3, 2]])
    curves = generate.write(words, np.random.default_rng(0))
    assert curves.vectors.shape == (2, 3 * 5 + 5)
    np.testing.assert_array_equal(curves.vectors[:, :15].reshape(2, 3, 5).argmax(2), words)
    assert (np.abs(curves.vectors[:, 15:]) <= 1).all()
    pen = curves.offsets.cumsum(1)
    size = 1 + 0.25 * curves.vectors[:, 16]
    np.testing.assert_allclose(pen[:, :, 1].max(1), size * [2.1, 1.9], rtol=0.05)
    np.testing.assert_allclose(pen[:, :, 1].min(1), size * [-1.6, 0], rtol=0.05, atol=1e-6)
    spacing = 0.9 + 0.2 * curves.vectors[:, 17]
    np.testing.assert_allclose(pen[:, -1], np.stack([3 * spacing, 0 * spacing], 1), atol=1e-5)
    assert (curves.offsets[:, -1] == 0).all()  # the word is over, the pen rests


def test_distance():
    """A wrong offset displaces the pen from there on."""
    offsets = np.zeros((2, 3, 2))
    wrong = offsets.copy()
    wrong[:, 1] = 3, 4
    assert generate.distance(wrong, offsets) == pytest.approx((50 / 3) ** 0.5)


def test_parts_share_no_word(runs):
    words = [set(map(tuple, words)) for words, _ in runs[1]]
    assert len(words) == 3
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(words, 2))


def test_a_short_run_learns(runs):
    """It draws new words better than a linear map, far better than the mean curve; kernels are a strong baseline."""
    result, ((_, test), _, (_, training)) = runs
    mean = generate.distance(training.offsets.mean(0), test.offsets)
    assert result.errors["the network"] < result.errors["linear regression"] < 0.8 * mean
    assert result.errors["kernel ridge regression"] < result.errors["linear regression"]
    assert generate.distance(np.diff(result.drawn, axis=1, prepend=0), test.offsets) == pytest.approx(
        result.errors["the network"], rel=1e-4
    )


def test_teacher_forcing_agrees_where_the_past_is_right(runs):
    """The two ways of running are one network: fed its own curve as the right one, it puts out that curve."""
    curves = runs[1][1][1]
    curves = generate.Curves(curves.vectors[:3], curves.offsets[:3])
    network = generate.jaxrnn.Stack((generate.jaxrnn.GRU(22, 4), generate.jaxrnn.Linear(4, 2)))
    writer = generate.Writer(network, np.array([2.0, 3.0], np.float32), teacher=True)

    @jax.jit
    def both(params):
        drawn = writer.draw(params, generate.Curves(curves.vectors, curves.offsets[:, :5]))
        return drawn, writer.copy(params, generate.Curves(curves.vectors, drawn))

    drawn, copied = both(jax.jit(network.init)(jax.random.key(0)))
    np.testing.assert_allclose(copied, drawn, rtol=1e-5, atol=1e-6)
    assert np.abs(drawn).max() > 0.1


def test_status_and_picture(runs, monkeypatch, tmp_path, capsys):
    """The status follows the margin, the strongest baseline counts, and the picture is written."""
    result = runs[0]
    monkeypatch.setattr(generate, "run", lambda args: result)
    out = tmp_path / "words.png"
    network, *others = result.errors.values()
    assert result.gain == 1 - network / min(others)
    assert generate.main(["--out", str(out), "--margin", str(result.gain)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert generate.main(["--out", str(out), "--margin", "1"]) == 1
    assert f"{network:.3f}" in capsys.readouterr().out


def test_no_folder_for_the_picture(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        generate.main(["--out", str(tmp_path / "none" / "words.png")])
    assert exit_.value.code == 2
    assert "--out: there is no folder" in capsys.readouterr().err
