"""benchmarks/: every script runs and writes what --out asks for; what is compared, and in which turns. No times."""

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from compiled import work

from jaxrnn.engines.cpu import library as native

pytest.importorskip("matplotlib")
if sys.platform != "linux":
    pytest.skip("the benchmarks are for Linux", allow_module_level=True)

PROMOTION = "standard"  # Optax divides floats by integers
FOLDER = Path(__file__).parents[1] / "benchmarks"
OURS = "native" if native.absent() is None else "xla"
SCRIPTS = {
    "cells": f"--cells lstm --shapes 16,3,3,4 --passes backward --contestants {OURS} torch keras flax haiku equinox",
    "cells both ways": "--cells gru --shapes 1,3,3,4 --layers 2 --bidirectional --contestants xla torch onnxruntime",
    "streaming": f"--cells lstm --units 4 --contestants {OURS} empty",
    "dtypes": "--cells GRU S6 GLA --shape 2,3,4,16 --contestants float32 float64",
    "step": "--cells GLA S6 GRU --size 3",
    "accelerator": "--quick --cells LSTM LRU --dtypes float32",
    "training": f"--cells gru --shapes 2,5,16,24 --contestants {OURS} torch",
    "compile_time": f"--cells gru --shape 2,3,3,4 --contestants {OURS}",
    "memory": f"--steps 9 --rows 2 --inputs 3 --units 4 --contestants {OURS}-remat torch",
    "linear": f"--shapes 9,3 --dtypes float32 complex64 --contestants {OURS} lax.scan floor --steps 5 --cells GRU S6",
    "linear cells": "--shapes --steps 5 9 --cells GRU MinGRU",
    "matrix": f"--shapes 1,9,2,3,4 --kinds delta --contestants {OURS} chunked onnxruntime",
    "options": f"--options zoneout layer_norm MGU --shapes 3,5,4,6 --contestants {OURS} xla",
    "mamba": "--shapes 1,5,8 --contestants xla transformers",
    "programs": "--targets cpu v5e --cells Elman --shape 3,2,3,4 --contestants forward",
    "scaling": f"--base 2,3,3,4 --points 2 --axes B --contestants {OURS} torch",
}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the peers


@pytest.fixture(scope="module")
def load():
    """Imports a benchmark by its name; the product of matrices is a small one, and what is compiled stays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        contest = importlib.import_module("helpers.contest")
        patch.setattr(contest, "PRODUCT", 16)
        patch.setattr(contest, "BLOCK", 0.0)
        patch.setattr(contest, "REST", 0.0)
        patch.setattr(jax, "clear_caches", lambda: None)
        yield importlib.import_module


@pytest.mark.parametrize(
    "name",
    [name if name in ("cells", "memory", "linear") else pytest.param(name, marks=pytest.mark.full) for name in SCRIPTS],
)
def test_a_benchmark_runs_and_writes(load, tmp_path, capsys, name):
    """Three files that name the command and the machine; the table is also printed."""
    script, out = load(name.split()[0]), tmp_path / "new" / "v1.0"
    assert script.main([*SCRIPTS[name].split(), "--repeats", "1", "--out", str(out)]) == 0
    text, data = Path(f"{out}.md").read_text(encoding="utf-8"), json.loads(Path(f"{out}.json").read_text())
    assert Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")
    assert data["command"].startswith(f"python benchmarks/{name.split()[0]}.py --")
    assert data.get("rows") or data["cells"]
    for line in (data["command"], data["machine"], f"jax {jax.__version__}"):
        assert line in text
    printed = capsys.readouterr().out
    assert all(line in printed for line in text.splitlines() if line.startswith("|"))


def test_whoever_is_absent_is_named(load, monkeypatch, capsys):
    contest, streaming = load("helpers.contest"), load("streaming")
    monkeypatch.setattr(contest.native, "absent", lambda: "no compiler")
    monkeypatch.setattr(contest.importlib.util, "find_spec", lambda module: None if module == "torch" else module)
    args = contest.parse(contest.parser("streaming.py", None, streaming.CONTESTANTS), [])
    assert args.contestants == ["xla", "empty", "onnxruntime"]
    assert "absent: native (no compiler); torch (not installed)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        contest.parse(contest.parser("streaming.py", None, ["native"]), [])
    assert "none is here" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--repeats 0", "--threads 0", "--shapes 1,2,3", "--shapes 0,1,1,1", "--cells rnn"])
def test_bad_flags(load, capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        load("cells").main(flags.split())
    assert stopped.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("backward", [False, True])
def test_other_results_are_no_contest(load, monkeypatch, backward):
    """Outputs that are off by a hundredth, and gradients alone that are."""
    cells, peers = load("cells"), load("helpers.peers")
    build = peers.ours("xla")

    def tampered(cell, params):
        network = build(cell, params)

        def outputs(weights, xs):
            ys = network.outputs(weights, xs)
            return ys + 0.01 * (ys - jax.lax.stop_gradient(ys)) if backward else 1.01 * ys

        return network._replace(outputs=outputs)

    monkeypatch.setitem(peers.NETWORKS, "flax", tampered)
    task = peers.task("lstm", peers.Shape(2, 3, 3, 4))
    contestants = {name: cells.in_jax(name)(task, backward, 1) for name in ("xla", "flax")}
    with pytest.raises(AssertionError, match="flax against xla"):
        cells.contest.agree(contestants)


def test_they_take_turns(load):
    """After two calls to see how long they take, in every round each has one call before those that are timed."""
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = load("helpers.contest").interleaved(runs, 2)
    assert "".join(calls) == "ab" + "ab" + 2 * ("aaaa" + "bbbb")
    assert [len(each) for each in found.values()] == [2, 2]


def test_the_lead_is_of_the_fastest_peer(load):
    contest = load("helpers.contest")
    assert contest.lead({"native": 2.0, "xla": 1.0, "torch": 5.0, "flax": 4.0}, "native") == 2
    assert contest.lead({"native": 2.0, "xla": 1.0}, "native") is None


def test_operations(load):
    """As XLA counts them for the products alone: the layer above reads both directions."""
    peers = load("helpers.peers")
    shape = peers.Shape(3, 5, 7, 11)
    assert peers.operations("gru", shape) == 2 * 3 * 5 * (7 + 11) * 3 * 11
    both = 2 * (2 * 3 * 5 * (7 + 11) * 4 * 11) + 2 * (2 * 3 * 5 * (22 + 11) * 4 * 11)
    assert peers.operations("lstm", shape, 2, True) == both
    sizes = [w.size for w in jax.tree.leaves(peers.task("lstm", shape, 2, True).params) if np.ndim(w) == 2]
    assert both == 2 * 3 * 5 * sum(sizes)


def test_exponents(load):
    exponent = load("scaling").exponent
    assert [exponent([1, 2, 8], [3.0, 6.0, 384.0], k) for k in range(3)] == [None, 1.0, 3.0]
    assert exponent([1, 2], [None, 1.0], 1) is None


def shares(folder, name, rows):
    """A file of a benchmark, with these shares of cells."""
    row = {"shape": [2, 3, 4, 5], "layers": 1, "bidirectional": False, "pass": "forward", "ms": {"native": 1.0}}
    found = [{"cell": cell} | row | {"share": share} for cell, share in rows.items()]
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"command": f"python {name}.py", "machine": name, "absent": {}, "rows": found}))
    return str(path)


@pytest.mark.parametrize(
    ("lstm", "flags", "status"),
    [(0.73, "", 0), (0.71, "", 1), (1.2, "", 0), (0.71, "--most 0.2", 0), (float("nan"), "", 1)],
)
def test_a_share_may_not_fall_by_more_than_a_tenth(load, tmp_path, capsys, lstm, flags, status):
    old = shares(tmp_path, "old", {"lstm": 0.8, "gru": 0.5, "elman": 0.5})
    new = shares(tmp_path, "new", {"gru": 0.5, "lstm": lstm, "mgu": 0.1})
    assert load("compare").main([old, new, *flags.split()]) == status
    printed = capsys.readouterr().out
    assert f"{status} of 2 shares fell" in printed
    assert "1 were not measured again" in printed
    assert f"| lstm 2,3,4,5 layers=1 bidirectional=False forward | 80.0% | {lstm:.1%} |" in printed


def test_layers_and_directions_are_not_confused(load, tmp_path):
    old = Path(shares(tmp_path, "old", {"lstm": 0.8}))
    new = Path(shares(tmp_path, "new", {"lstm": 0.1}))
    new.write_text(new.read_text().replace('"layers": 1', '"layers": 2'))
    with pytest.raises(SystemExit) as stopped:
        load("compare").main([str(old), str(new)])
    assert stopped.value.code == 2


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"command": "", "machine": "", "rows": [{"ms": 1}]}'])
def test_what_is_no_result_is_refused(load, tmp_path, capsys, text):
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        load("compare").main([str(path), str(path)])
    assert stopped.value.code == 2
    assert "odd.json: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("releases/*/*.json")), ids=lambda path: f"{path.parent.name}, {path.name}"
)
def test_a_release_has_lost_nothing_to_itself(load, capsys, path):
    data = json.loads(path.read_text())
    assert load("compare").main([str(path), str(path)]) == 0
    assert f"0 of {len(data['rows'])} shares fell" in capsys.readouterr().out


PROGRAM = """
%cut (p: f32[5,4], i: s32[]) -> f32[1,4] {
  %p = f32[5,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %piece = f32[1,4]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,4}
}

%put (p: f32[5,4], x: f32[1,4], i: s32[]) -> f32[5,4] {
  %p = f32[5,4]{1,0} parameter(0)
  %x = f32[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %put = f32[5,4]{1,0} dynamic-update-slice(%p, %x, %i, %i)
}

%more (t: (s32[], f32[5,4])) -> pred[] {
  %t = (s32[], f32[5,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (t: (s32[], f32[5,4])) -> (s32[], f32[5,4]) {
  %t = (s32[], f32[5,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %all = f32[5,4]{1,0} get-tuple-element(%t), index=1
  %piece = f32[1,4]{1,0} fusion(%all, %i), kind=kLoop, calls=%cut
  %near = f32[1,4]{1,0:T(1,128)S(1)} negate(%piece)
  %new = f32[5,4]{1,0} fusion(%all, %near, %i), kind=kLoop, calls=%put
  ROOT %both = (s32[], f32[5,4]{1,0}) tuple(%i, %new)
}

ENTRY %main (x: f32[5,4]) -> f32[5,4] {
  %x = f32[5,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %double = f32[5,4]{1,0} add(%x, %x)
  %first = (s32[], f32[5,4]{1,0}) tuple(%zero, %double)
  %loop = (s32[], f32[5,4]{1,0}) while(%first), condition=%more, body=%body
  ROOT %last = f32[5,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_what_a_program_moves():
    """Parts of arrays that are cut and updated, an array in a core's memory, steps of a loop."""
    cut, negate, put = 16 + 4 + 16, 16 + 0, 4 + 16
    assert work(PROGRAM) == (1 + 5 * 3, 3 * 80 + 5 * (cut + negate + put))
