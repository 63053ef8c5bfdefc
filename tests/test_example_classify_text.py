"""examples/classify_text.py in its short mode: its result, its picture, its exit statuses, its reading of files."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

for package in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(package)
PATH = Path(__file__).parents[1] / "examples" / "classify_text.py"
SPEC = importlib.util.spec_from_file_location("classify_text", PATH)
text = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(text)

PROMOTION = "standard"  # Optax divides floats by integers


@pytest.fixture(scope="module")
def result():
    with jax.numpy_dtype_promotion("standard"):
        return text.run(text.parse(["--quick"]))


def test_every_model_is_better_than_the_most_frequent_mark(result):
    frequent = np.bincount(result.test.classes).max() / len(result.test.classes)
    assert result.names == sorted("()[],:.=")
    assert min(result.accuracy(model) for model in result.predicted) > frequent + 0.05


@pytest.mark.parametrize(("margin", "status"), [(-1, 0), (1, 1)])
def test_the_exit_status_follows_the_margin(result, monkeypatch, capsys, tmp_path, margin, status):
    monkeypatch.setattr(text, "run", lambda args: result)
    out = tmp_path / "text.png"
    assert text.main(["--quick", f"--margin={margin}", "--out", str(out)]) == 0
    assert "too small to win, and not judged" in capsys.readouterr().out
    assert text.main([f"--margin={margin}", "--out", str(out)]) == status
    assert out.read_bytes().startswith(b"\x89PNG")
    assert f"{result.accuracy('network'):.3f}" in capsys.readouterr().out


def test_no_text_and_no_source_is_in_two_parts():
    found = {f"line {k}": ("ab"[k % 2], k % 20) for k in range(400)}
    parts, names = text.divide(found, text.parse([]))
    assert names == ["a", "b"]
    assert sorted(line for part in parts for line in part.texts) == sorted(found)
    sources = [{found[line][1] for line in part.texts} for part in parts]
    assert [len(each) for each in sources] == [12, 4, 4]
    assert len(set.union(*sources)) == 20
    assert all("ab"[c] == found[line][0] for part in parts for line, c in zip(part.texts, part.classes, strict=True))


def test_the_lines_of_python():
    found = text.read_lines()
    assert found == text.read_lines()
    assert len(found) > 30_000
    assert {label for label, _ in found.values()} == set("()[],:.=")
    assert max(map(len, found)) < text.LENGTH


def test_a_csv_file(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text('label,other,text\nx,1,"one, two"\ny,2, three \nx,3,' + 60 * "w" + "\n", encoding="utf-8")
    assert text.read_csv(path) == {"one, two": ("x", 1), "three": ("y", 2), text.LENGTH * "w": ("x", 3)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "expected the columns text and label"),
        (b"text,kind\na,b\n", "expected the columns text and label"),
        (b"text,label\na,x\n,y\n", "row 2 lacks a text or a label"),
        (b"text,label\na\n", "row 1 lacks a text or a label"),
        (b'text,label\n"a,x\n', "unexpected end of data"),
        (b"text,label\n\xff,x\n", "codec can't decode"),
        (b"text,label\na,x\nb,y\n", "expected at least 50 different texts of at least two labels, got 2 of 2"),
        (b"text,label\n" + b"".join(b"t%d,x\n" % k for k in range(60)), "got 60 of 1"),
    ],
)
def test_an_unusable_file_is_one_line_and_status_2(tmp_path, capsys, content, message):
    path = tmp_path / "texts.csv"
    if content is not None:
        path.write_bytes(content)
    assert text.main(["--data", str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("classify_text.py: error: ")
    assert message in output.err
    assert output.err.count("\n") == 1
