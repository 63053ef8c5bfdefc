"""examples/tag.py in its short mode: its result, its picture, its exit statuses; its tags and windows."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

for package in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(package)
SPEC = importlib.util.spec_from_file_location("tag", Path(__file__).parents[1] / "examples" / "tag.py")
tag = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tag)

PROMOTION = "standard"  # Optax divides floats by integers

CODE = '''\
def f(x):  # two
    """A line
    and if."""
    return print(x + 1.5)
'''
TAGS = """\
kkk conoo  #####
    sssssssss
ssssssssssssss
    kkkkkk cccccon o 000o
"""


@pytest.fixture(scope="module")
def result():
    with jax.numpy_dtype_promotion("standard"):
        return tag.run(tag.parse(["--quick"]))


@pytest.mark.full
def test_every_model_is_better_than_the_most_frequent_tag(result):
    frequent = np.bincount(result.test.targets[result.counted]).max() / result.counted.sum()
    assert result.accuracy("bidirectional") > max(frequent + 0.05, 0.5)
    assert result.accuracy("forward only") > frequent
    assert result.accuracy("window regression") > frequent + 0.05


def test_tags_of_a_small_module():
    letters = dict(zip(" knc0os#", range(8), strict=True))
    expected = [[letters[letter] for letter in row] for row in TAGS.splitlines()]
    assert tag.tag(CODE) == list(zip(CODE.splitlines(), expected, strict=True))


def test_windows_see_no_padding_and_no_more_than_the_radius():
    def windows(*codes):
        return tag.windows(tag.Batch(np.array([codes]), np.array([[1, 2, 3, 4, 0, 0]]), np.array([4])), 1)

    length, tag.LENGTH = tag.LENGTH, 6
    try:
        (a, tags), (padded, _), (other, _) = windows(*b"abcd\0\0"), windows(*b"abcdef"), windows(*b"abcx\0\0")
    finally:
        tag.LENGTH = length
    assert tags.tolist() == [1, 2, 3, 4]
    assert (a != padded).nnz == 0
    assert (a[0] != other[0]).nnz == 0
    assert (a[2] != other[2]).nnz > 0


@pytest.mark.full
@pytest.mark.parametrize(("margin", "status"), [(-1, 0), (1, 1)])
def test_the_exit_status_follows_the_margin(result, monkeypatch, capsys, tmp_path, margin, status):
    monkeypatch.setattr(tag, "run", lambda args: result)
    out = tmp_path / "tag.png"
    assert tag.main(["--quick", f"--margin={margin}", "--out", str(out)]) == 0
    assert "too small to win, and not judged" in capsys.readouterr().out
    assert tag.main([f"--margin={margin}", "--out", str(out)]) == status
    assert out.read_bytes().startswith(b"\x89PNG")
    assert f"{result.accuracy('bidirectional'):.3f}" in capsys.readouterr().out
