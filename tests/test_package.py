"""The package: what importing it costs, and what it names."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import jaxrnn

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PACKAGE = Path(jaxrnn.__file__).parent


def python(*arguments, timeout=300):
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT)


def test_import_loads_jax_and_numpy_alone():
    code = (
        "import sys, jax, jax.numpy; before = set(sys.modules); import jaxrnn; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    run = python("-W", "error", "-c", code)
    assert run.returncode == 0, run.stderr
    loaded = set(ast.literal_eval(run.stdout))
    assert "jaxrnn" in loaded
    assert loaded <= {"jaxrnn", "jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum"}


def test_converters_import_no_framework():
    peers = "torch", "keras", "flax", "haiku", "equinox", "onnx", "safetensors"
    run = python("-W", "error", "-c", f"import sys, jaxrnn.convert; print(set(sys.modules) & {set(peers)})")
    assert run.stdout.strip() == "set()", run.stderr


def test_every_public_name_is_documented_with_an_example():
    values = ("Params", "Carry", "Gates", "Norm", "Weights", "Pair", "Part", "Emitted", "Row", "Summary", "Explanation")
    for name in jaxrnn.__all__:
        thing = getattr(jaxrnn, name)
        assert thing.__doc__, name
        if not name.endswith(values) and name not in ("Layer", "GatedCell", "LinearCell"):
            assert ">>>" in thing.__doc__, name


LAYERS = [
    "typing",
    "foreign_names",
    "attributes",
    "engines",
    "cell",
    "check",
    "cells",
    "arguments",
    "sequence",
    "layers",
    "compose",
    "table",
    "exporting",
    "flax",
    "linen",
    "nnx",
    "convert",
    "training",
    "analysis",
    "",
]


def imports():
    """Of every module, the modules of the package that it imports when it is imported itself."""
    files = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    found = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxrnn"):
                within = {f"{node.module}.{each.name}" for each in node.names}
                found[name] |= within & set(files) or {node.module}
    return found


def test_imports_point_downwards():
    """Types and engines first, what is built on all of them last."""

    def layer(module):
        return LAYERS.index([*module.split("."), ""][1])

    for name, modules in imports().items():
        for module in modules:
            assert layer(module) <= layer(name), f"{name} imports {module}"


def test_no_imports_go_round():
    graph = imports()
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        if name in done:
            return
        open_.append(name)
        for module in sorted(graph[name]):
            visit(module)
        done.add(open_.pop())

    for name in graph:
        visit(name)


def test_no_file_shares_its_name_with_a_function_of_its_package():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        functions = {
            node.name
            for path in folder.glob("*.py")
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef)
        }
        assert not functions & {path.stem for path in folder.glob("*.py")}, folder


@pytest.mark.skipif(PACKAGE.parent != ROOT, reason="the package is not that of this tree")
@pytest.mark.parametrize("checker", ["pyright", pytest.param("mypy", marks=pytest.mark.full)])
def test_an_editable_install_is_a_path_that_type_checkers_read(tmp_path, checker):
    """The hook that `pip install -e .` calls writes a plain path, so they find every name without running it."""
    pytest.importorskip("setuptools", "77")
    program = shutil.which(checker, path=str(Path(sys.executable).parent))
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "*.so", "build", "*.egg-info"))
    build = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    none = {"CC": "false", "CXX": "false"}  # the kernels are optional, and take minutes
    run = subprocess.run(
        [sys.executable, "-c", build], cwd=source, env=os.environ | none, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    (path,) = site.glob("*.pth")
    assert path.read_text().strip() == str(source)
    if program is None:
        pytest.skip(f"needs {checker}")
    file = tmp_path / "names.py"
    names = [name for name in jaxrnn.__all__ if name != "__version__"]
    lines = ["import jaxrnn", "import jaxrnn.training", *(f"jaxrnn.{name}" for name in names), "jaxrnn.training.train"]
    file.write_text("\n".join([*lines, "reveal_type(jaxrnn.LSTM(3, 4).init)"]))
    settings = {"include": [file.name], "extraPaths": [str(source)], "reportUnusedExpression": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    flags, none_found = {
        "pyright": (["--pythonpath", sys.executable], "0 errors"),
        "mypy": (["--follow-imports=silent", file.name], "no issues found"),
    }[checker]
    run = subprocess.run(
        [program, *flags],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "LSTMParams" in run.stdout, run.stdout
    assert none_found in run.stdout, run.stdout


@pytest.mark.parametrize("file", ["CHANGELOG.md", "CITATION.cff"])
def test_a_version_is_named_everywhere(file):
    """In the changelog it is the newest that has a date."""
    pattern = {"CHANGELOG.md": r"^## (\S+), \d{4}-\d\d-\d\d$", "CITATION.cff": r"^version: (\S+)$"}[file]
    assert re.findall(pattern, (ROOT / file).read_text(), re.M)[0] == jaxrnn.__version__
