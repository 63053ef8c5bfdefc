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
    xs = np.array([[97, 98, 99, 100, 0, 0]], np.int32)
    one = tag.Batch(xs, np.array([[1, 2, 3, 4, 0, 0]]), np.array([4]))
    other = one._replace(xs=np.array([[97, 98, 99, 120, 7, 7]], np.int32))
    length, tag.LENGTH = tag.LENGTH, 6
    try:
        (a, tags), (b, _) = tag.windows(one, 1), tag.windows(other, 1)
    finally:
        tag.LENGTH = length
    assert tags.tolist() == [1, 2, 3, 4]
    assert (a[:2] != b[:2]).nnz == 2  # the pair that begins at the right neighbour of the second character
    assert (a[2] != b[2]).nnz > 2


@pytest.mark.parametrize(("margin", "status"), [(-1, 0), (1, 1)])
def test_the_exit_status_follows_the_margin(result, monkeypatch, capsys, tmp_path, margin, status):
    monkeypatch.setattr(tag, "run", lambda args: result)
    out = tmp_path / "tag.png"
    assert tag.main(["--quick", f"--margin={margin}", "--out", str(out)]) == status
    assert out.read_bytes().startswith(b"\x89PNG")
    assert f"{result.accuracy('bidirectional'):.3f}" in capsys.readouterr().out
