"""Saved models: what comes back, what is refused, and what a hostile file cannot do."""

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import MEMBERS, Own, TwoInputs, draw_params, every_member_and_option

import jaxrnn
from jaxrnn import GRU, LSTM, Apply, Bidirectional, Cell, Dropout, Embed, Linear, Pool, Stack
from jaxrnn.cells import state_space
from jaxrnn.training import saving
from jaxrnn.training.saving import DTYPES, load, save

CALLABLES = [name for name in MEMBERS if name.endswith("callable")]


class Mixed(Cell):
    """A user's own cell with fields of every kind, and params of every shape."""

    values: tuple = ()
    inner: Cell | None = None
    dtype: str = "float32"

    def init(self, key, dtype=jnp.float32):
        dtype = jnp.dtype(self.dtype)
        return {
            "scalar": jnp.zeros((), dtype),
            "empty": jnp.zeros((0, 3), dtype),
            "none": None,
            "w": jnp.zeros(5, dtype),
        }

    def initial_carry(self, params, batch_shape=()):
        return ()

    def step(self, params, carry, x, noise=None):
        return carry, x


def same(loaded, params):
    """The same bits, dtypes and structure, as JAX arrays."""
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert isinstance(a, jax.Array)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def files(path):
    """Everything under a path."""
    return {str(p.relative_to(path)): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


@every_member_and_option()
def test_every_member_comes_back(cell, tmp_path):
    params = draw_params(cell)
    if cell in [MEMBERS[name] for name in CALLABLES]:
        with pytest.raises(TypeError, match=r"(Apply.fn|Bidirectional.merge): expected .* a callable cannot be saved"):
            save(tmp_path / "model", cell, params)
        assert os.listdir(tmp_path) == []
        return
    save(tmp_path / "model", cell, params)
    again, loaded = load(tmp_path / "model", cells=(Own, TwoInputs))
    assert again == cell
    assert repr(again) == repr(cell)
    same(loaded, params)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(name, tmp_path):
    dtype = DTYPES[name]
    kinds = {"bool": "bool", "int": "int32", "uint": "int32", "complex": "complex64"}
    cell = Mixed(dtype=kinds.get(name.rstrip("0123456789"), "float32"))
    bits = np.random.default_rng(0).integers(0, 256, 8 * 5 * 16, np.uint8)
    if name == "bool" or "int2" in name or "int4" in name or "float4" in name:
        bits &= {"bool": 1, "int2": 1, "uint2": 3, "int4": 7, "uint4": 15, "float4_e2m1fn": 15}[name]
    w = bits.view(dtype)[:5]
    params = {"scalar": w[:1].reshape(()), "empty": w[:0].reshape(0, 3), "none": None, "w": w}
    wide = dtype.itemsize // (2 if dtype.kind == "c" else 1) == 8
    with jax.enable_x64(wide):
        save(tmp_path / "model", cell, params)
        same(load(tmp_path / "model", cells=(Mixed,))[1], params)
        save(tmp_path / "model", cell, jax.tree.map(jnp.asarray, params))
        same(load(tmp_path / "model", cells=(Mixed,))[1], params)
    if wide:
        with pytest.raises(ValueError, match=rf"params\['empty'\] is {name}: load it under jax.enable_x64"):
            load(tmp_path / "model", cells=(Mixed,))


def test_params_in_another_dtype_or_layout(tmp_path):
    cell = GRU(2, 3)
    params = cell.init(jax.random.key(0), jnp.bfloat16)
    save(tmp_path / "a", cell, params)
    same(load(tmp_path / "a")[1], params)
    other = jax.tree.map(lambda a: np.asfortranarray(np.asarray(a).astype(">f4")), params)
    save(tmp_path / "b", cell, other._replace(b_hn=None))
    same(load(tmp_path / "b")[1], jax.tree.map(lambda a: a.astype(np.float32), params)._replace(b_hn=None))


def test_every_kind_of_field(tmp_path):
    values = (
        None,
        True,
        False,
        3,
        -(10**30),
        0.1,
        -0.0,
        1e-320,
        math.inf,
        -math.inf,
        "ä\ud800\n",
        (),
        ((1,), ("b", 2.0)),
    )
    cell = Mixed(values, Mixed((LSTM(2, 3, activation=("elu", 0.5)),)))
    params = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), jax.eval_shape(cell.init, jax.random.key(0)))
    save(tmp_path / "model", cell, params)
    again, _ = load(tmp_path / "model", cells=[Mixed])
    assert again == cell
    assert repr(again) == repr(cell)  # 1 is not 1.0 or True, 0.0 not −0.0
    save(tmp_path / "model", Mixed((math.nan,)), params)
    assert math.isnan(load(tmp_path / "model", cells=(Mixed,))[0].values[0])


def test_a_class_of_your_own_is_never_taken_for_one_of_jaxrnn(tmp_path):
    own = type("GRU", (GRU,), {"__module__": __name__, "__annotations__": {}})
    save(tmp_path / "own", own(2, 3), draw_params(GRU(2, 3)))
    save(tmp_path / "theirs", GRU(2, 3), draw_params(GRU(2, 3)))
    assert type(load(tmp_path / "own", cells=(own,))[0]) is own
    assert type(load(tmp_path / "theirs", cells=(own,))[0]) is GRU
    with pytest.raises(ValueError, match=r"unknown cell 'GRU'; if GRU is a cell of yours, pass cells=\(GRU,\)"):
        load(tmp_path / "own")


def test_a_field_left_out_has_its_default_as_in_files_of_older_versions(tmp_path):
    path = saved(tmp_path, lambda index: index["cell"]["fields"].pop("reset_after"))
    assert load(path)[0] == GRU(2, 3)


def test_saving_again_replaces_the_model_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "model"
    save(path, GRU(2, 3), draw_params(GRU(2, 3), 1))
    (path / "notes.txt").write_text("mine")
    save(path, LSTM(2, 3), draw_params(LSTM(2, 3), 2))
    assert load(path)[0] == LSTM(2, 3)
    same(load(path)[1], draw_params(LSTM(2, 3), 2))
    assert len(files(path)) == 3
    assert (path / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path / "deep") == ["model"]
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", GRU(2, 3), draw_params(GRU(2, 3)))
    assert load(tmp_path / "empty")[0] == GRU(2, 3)


def test_foreign_files_and_directories_are_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "cell.json").write_text("{}")
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    before = files(tmp_path)
    for name in ("file", "directory", "link"):
        with pytest.raises(FileExistsError, match=f"{name}: expected nothing or a saved model there"):
            save(tmp_path / name, GRU(2, 3), draw_params(GRU(2, 3)))
    assert files(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["directory", "file", "link"]


@pytest.mark.parametrize("call", ["open", "os.fsync", "os.replace", "os.rename"])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_save_leaves_what_was_there(call, number, existing, tmp_path, monkeypatch):
    path, params = tmp_path / "model", draw_params(GRU(2, 3), 1)
    if existing:
        save(path, GRU(2, 3), params)
    count = 0

    def interrupting(original):
        def run(*arguments, **keywords):
            nonlocal count
            count += "rb" not in arguments
            if count == number:
                raise KeyboardInterrupt
            return original(*arguments, **keywords)

        return run

    owner, name = (os, call.removeprefix("os.")) if call.startswith("os.") else (saving, call)
    original = open if call == "open" else getattr(os, name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupting(original), raising=False)
        try:
            save(path, LSTM(2, 3), draw_params(LSTM(2, 3), 2))
        except KeyboardInterrupt:
            assert count == number
        else:
            assert call == "os.rename"  # once for a new model, never for another
            assert count < number
            return
    assert os.listdir(tmp_path) == (["model"] if existing else [])
    if existing:
        assert not [name for name in os.listdir(path) if name.endswith(".tmp")]
        assert load(path)[0] == GRU(2, 3)
        same(load(path)[1], params)
        save(path, LSTM(2, 3), draw_params(LSTM(2, 3), 2))
        assert len(files(path)) == 2


@pytest.mark.parametrize(
    ("cell", "params", "error", "words"),
    [
        (GRU(2, 3), draw_params(LSTM(2, 3)), TypeError, r"params: GRU\(.*\) takes .*GRUParams"),
        (GRU(2, 3), draw_params(GRU(2, 4)), ValueError, r"params.w_x: expected shape \(2, 9\), got \(2, 12\)"),
        (LSTM(2, 3), draw_params(LSTM(2, 3, peephole=True)), ValueError, r"params.peephole: expected None, got shape"),
        (Linear(1, 1), draw_params(Linear(1, 1))._replace(b=0.5), TypeError, "params.b: expected an array, got float"),
        (
            Stack((Linear(1, 1),)),
            (draw_params(Linear(1, 1))._replace(b=np.zeros(1, int)),),
            ValueError,
            r"params\[0\].b: expected a dtype of the kind of float32, got int64",
        ),
        (GRU, None, TypeError, "cell: expected a jaxrnn.Cell, got <class"),
        (LSTM(2, 3, activation=jnp.sin), draw_params(LSTM(2, 3)), TypeError, "LSTM.activation: expected None"),
        (Stack((Apply(jnp.sin),)), ((),), TypeError, r"Stack.cells\[0\].fn: expected None.* a callable cannot"),
        (Mixed((b"x",)), None, TypeError, r"Mixed.values\[0\]: expected None"),
    ],
)
def test_what_cannot_be_saved(cell, params, error, words, tmp_path):
    with pytest.raises(error, match=words):
        save(tmp_path / "model", cell, params)
    assert os.listdir(tmp_path) == []


def saved(tmp_path, change=lambda index: None, cell=GRU(2, 3)):  # noqa: B008
    """A saved model, its index changed."""
    path = tmp_path / "model"
    save(path, cell, draw_params(cell))
    index = json.loads((path / "cell.json").read_text())
    replaced = change(index)
    (path / "cell.json").write_text(json.dumps(index if not isinstance(replaced, dict) else replaced))
    return path


def fields(**values):
    return lambda index: index["cell"]["fields"].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.update(format="x"), "cell.json: not a model of jaxrnn"),
        (lambda index: index.update(version=2), "cell.json: expected version 1, got 2"),
        (lambda index: index.pop("params") and None, "cell.json: expected format, version, cell, params and arrays"),
        (lambda index: index.update(more=1), "cell.json: expected format, version, cell, params and arrays"),
        (lambda index: index.update(cell=3), "cell.json: expected a cell, got 3"),
        (lambda index: index.update(cell={"cell": "jaxrnn.GRU"}), "cell.json: expected a value or a cell, got"),
        (lambda index: index["cell"].update(cell="jaxrnn.scan"), "cell.json: unknown cell 'jaxrnn.scan'"),
        (lambda index: index["cell"].update(cell="jaxrnn.Cell"), "cell.json: unknown cell 'jaxrnn.Cell'"),
        (lambda index: index["cell"].update(cell="os.system"), "cell.json: unknown cell 'os.system'"),
        (lambda index: index["cell"].update(cell="GRU"), "cell.json: unknown cell 'GRU'"),
        (fields(extra=1), r"cell.json: jaxrnn.GRU has no fields \['extra'\]"),
        (
            lambda index: index["cell"]["fields"].pop("hidden_size") and None,
            "jaxrnn.GRU cannot have these fields: .*size",
        ),
        (fields(hidden_size=-1), "cannot have these fields: GRU.hidden_size: expected at least 1, got -1"),
        (fields(hidden_size="3"), "cannot have these fields: GRU.hidden_size: expected an integer"),
        (fields(hidden_size=4), r"cell.json: params.w_x: expected shape \(2, 12\), got \(2, 9\)"),
        (fields(hidden_size=10**8), r"cell.json: params.w_x: expected shape \(2, 300000000\)"),
        (fields(hidden_size=10**300), "has no params"),
        (fields(activation={"eval": "1"}), "cell.json: expected a value or a cell, got {'eval': '1'}"),
        (fields(activation={"float": "1"}), "cell.json: expected a value or a cell, got {'float': '1'}"),
        (fields(activation="os.system"), "cannot have these fields: activation: expected one of"),
        (lambda index: index.update(arrays="../../secret"), "arrays: expected the name of a file of params"),
        (lambda index: index.update(arrays=None), "arrays: expected the name of a file of params"),
        (lambda index: index.update(arrays=f"params-{'0' * 64}.bin"), "No such file"),
        (lambda index: index["params"].pop() and None, r"cell.json: params: expected a list of 5, those of GRU\("),
        (lambda index: index.update(params={}), "cell.json: params: expected a list of 5"),
        (lambda index: index["params"][0].update(dtype="object"), "params.w_x: expected null or dtype and shape"),
        (lambda index: index["params"][0].update(dtype="int32"), "params.w_x: expected a dtype of the kind of float32"),
        (lambda index: index["params"][0].update(shape=[2, 10]), r"params.w_x: expected shape \(2, 9\), got \(2, 10\)"),
        (lambda index: index["params"][0].update(shape=[-1, 2, 9]), "params.w_x: expected null or dtype and shape"),
        (lambda index: index["params"][0].update(offset=1), "params.w_x: expected null or dtype and shape"),
        (
            lambda index: index["params"].__setitem__(0, None),
            r"expected \d+ bytes, got \d+: truncated or of another model",
        ),
        (
            lambda index: index["params"][0].update(dtype="float16"),
            r"expected \d+ bytes, got \d+: truncated or of another",
        ),
    ],
)
def test_a_changed_index_is_refused(change, words, tmp_path):
    path = saved(tmp_path, change)
    with pytest.raises(ValueError, match=words) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("cell", [jaxrnn.S5(2, 3), jaxrnn.S4D(2, 3), jaxrnn.S4D(2, 3, spectrum="hippo")])
def test_nothing_is_computed_of_a_size_that_a_file_names(cell, tmp_path, monkeypatch):
    """The eigenvalues of thousands of states would take minutes and gigabytes."""
    name = "hidden_size" if hasattr(cell, "hidden_size") else "states"
    path = saved(tmp_path, fields(**{name: 10**8}), cell)
    monkeypatch.setattr(state_space, "eigenvectors", None)
    with pytest.raises(ValueError, match=r"params.log_decay: expected shape \(.*100000000,?\), got"):
        load(path)


@pytest.mark.parametrize("members", [0, 1, 3])
def test_many_members_in_one_file(members, tmp_path):
    """With an axis in front of every array; what fits only in part says so."""
    cell = Stack((LSTM(2, 3), Dropout(0.1), Linear(3, 3)))
    one = draw_params(cell)
    params = jax.tree.map(lambda a: np.stack([a + k for k in range(members)] or [a])[:members], one)
    save(tmp_path / "model", cell, params)
    same(load(tmp_path / "model")[1], params)
    mixed = (params[0], params[1], one[2])
    with pytest.raises(ValueError, match=rf"params\[2\].w: expected shape \({members}, 3, 3\), got \(3, 3\)"):
        save(tmp_path / "other", cell, mixed)
    index = json.loads((tmp_path / "model" / "cell.json").read_text())
    index["params"][1]["shape"][0] = members + 1
    (tmp_path / "model" / "cell.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"params\[0\].w_h: expected shape \({members}, 3, 12\), got"):
        load(tmp_path / "model")


def test_numbers_that_are_not_those_that_were_written(tmp_path):
    path = saved(tmp_path)
    (arrays,) = path.glob("*.bin")
    whole = arrays.read_bytes()
    for content, words in [
        (whole[:-1], r"expected \d+ bytes, got \d+: truncated"),
        (b"", "got 0: truncated"),
        (whole + b"x", r"expected \d+ bytes, got \d+: truncated or of another model"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "the bytes are not those that were written"),
    ]:
        arrays.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            load(path)
    arrays.unlink()
    with pytest.raises(ValueError, match="No such file"):
        load(path)
    os.mkfifo(arrays)
    with pytest.raises(ValueError, match="expected a file"):
        load(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cell.json: expected JSON"),
        (b'{"format": "jaxrnn", "vers', "cell.json: expected JSON"),
        (b"\xff\xfe\x00", "cell.json: expected JSON"),
        (b"[]", "cell.json: not a model of jaxrnn"),
        (b'{"format": NaN}', "cell.json: expected JSON: NaN is not JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"format": ' + b"1" * 5000 + b"}", "cell.json: expected JSON"),
        (pickle.dumps({"format": "jaxrnn"}), "cell.json: expected JSON"),
        (b" " * (saving.INDEX_LIMIT + 1), "cell.json: longer than 1048576 bytes"),
    ],
    ids=range(9),
)
def test_what_is_no_index(content, words, tmp_path):
    path = saved(tmp_path)
    (path / "cell.json").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load(path)
    with pytest.raises(FileExistsError, match="is left alone"):
        save(path, GRU(2, 3), draw_params(GRU(2, 3)))
    assert (path / "cell.json").read_bytes() == content


@pytest.mark.parametrize("depth", [300, 3000])
def test_cells_in_cells_in_cells(depth, tmp_path):
    path = saved(tmp_path)
    deep = '{"cell": "jaxrnn.Residual", "fields": {"cell": ' * depth + "null" + "}}" * depth
    index = json.loads((path / "cell.json").read_text()) | {"cell": "CELL"}
    (path / "cell.json").write_text(json.dumps(index).replace('"CELL"', deep))
    with pytest.raises(ValueError, match=r"nested too deeply|Residual.cell: expected a jaxrnn.Cell, got None"):
        load(path)


def test_paths_that_hold_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: no saved model there"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="No such file"):
        load(tmp_path)
    (tmp_path / "file").write_text("{}")
    with pytest.raises(ValueError, match="Not a directory"):
        load(tmp_path / "file")


def test_cells_must_be_classes_with_names_of_their_own(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(TypeError, match=r"cells\[0\]: expected a class of cells, got GRU\("):
        load(path, cells=(GRU(2, 3),))
    with pytest.raises(TypeError, match=r"cells\[0\]: expected a class of cells"):
        load(path, cells=(Cell,))
    with pytest.raises(ValueError, match="cells: two classes are named Own"):
        load(path, cells=(Own, type("Own", (Own,), {"__annotations__": {}})))


def test_every_builtin_cell_is_known():
    known = set(saving._known(()))
    assert {
        f"jaxrnn.{type(cell).__name__}" for cell in MEMBERS.values() if not isinstance(cell, (Own, TwoInputs))
    } <= known
    assert not known & {"jaxrnn.Cell", "jaxrnn.Layer", "jaxrnn.GatedCell"}


def test_a_loaded_model_runs(tmp_path):
    cell = Stack((Embed(7, 2), Bidirectional(GRU(2, 3), GRU(2, 3)), Dropout(0.1), Pool(LSTM(6, 4)), Linear(4, 2)))
    params = draw_params(cell)
    save(str(tmp_path / "model"), cell, params)
    again, loaded = load(str(tmp_path / "model"))
    jax.tree.map(lambda a: a.block_until_ready(), loaded)
    shutil.rmtree(tmp_path / "model")
    xs = np.arange(5)[:, None] % 7
    np.testing.assert_array_equal(
        jaxrnn.scan(again, loaded, None, xs)[1], jaxrnn.scan(cell, jax.tree.map(jnp.asarray, params), None, xs)[1]
    )


def test_more_cells_than_load_reads_are_not_saved(tmp_path):
    cell = jaxrnn.Stack((jaxrnn.Apply(("scaled_tanh", 1.0, 2.0)),) * 10_000)
    with pytest.raises(ValueError, match=r"cell: expected at most 1048576 bytes of JSON, which `load` reads, got"):
        saving.save(tmp_path / "model", cell, cell.init(jax.random.key(0)))
    assert not os.listdir(tmp_path)
