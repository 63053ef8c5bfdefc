"""README and site: every block of Python runs, every public name is in the reference, every link leads on."""

import contextlib
import importlib
import importlib.util
import json
import re
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_package import README, ROOT, python

import jaxrnn

DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (README, *sorted(DOCS.rglob("*.md")))}
# Pages that train for longer or import other frameworks are in the full tier, but for these.
FAST = ("README.md", "docs/index.md", "docs/getting-started/functional.md", "docs/own/cell.md")
MODULES = (
    "jaxrnn",
    "jaxrnn.linen",
    "jaxrnn.nnx",
    "jaxrnn.training",
    "jaxrnn.convert",
    "jaxrnn.analysis",
    "jaxrnn.exporting",
)
IMPORTED = {"dm-haiku": "haiku"}  # distributions whose module has another name

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)
NEED = re.compile(r'`pip install "?([\w-][^-`"][^`"]*)"?`')

WITHOUT = """
import re, sys

FINDERS = sys.meta_path[:]

class Present:
    def find_spec(self, name, *where):
        if name.partition(".")[0] not in ABSENT:
            return next((spec for finder in FINDERS if (spec := finder.find_spec(name, *where))), None)

    def find_distributions(self, *of):
        for finder in FINDERS:
            for each in getattr(finder, "find_distributions", lambda *_: ())(*of):
                if re.sub("[-_.]+", "-", each.name).lower() in THERE:
                    yield each

sys.meta_path[:] = [Present()]
"""
RUN = """
import linecache, time

for name, text in PAGES:
    linecache.cache[name] = len(text), None, text.splitlines(True), name
    begun = time.perf_counter()
    exec(compile(text, name, "exec"), {"__name__": "__main__"})
    print(f"{name}: {time.perf_counter() - begun:.1f} s")
"""


def code(text):
    """The blocks of a page one after another, with empty lines in place of all else, so that errors name the line."""
    lines = [""] * text.count("\n")
    for block in BLOCK.finditer(text):
        at = text.count("\n", 0, block.start(1))
        lines[at : at + block[1].count("\n")] = block[1].splitlines()
    return "\n".join(lines) + "\n"


def cases(text):
    """What `pip install` must bring, by the words above a block, and the page up to the last block that it serves."""
    found = {}
    for block in BLOCK.finditer(text):
        found[tuple(sorted(set(NEED.findall(text[: block.start()]))))] = text[: block.end() + 1]
    return found.items()


def groups():
    """Pages that need the same, and that are of the same tier, run in one process."""
    found = {}
    for name, path in PAGES.items():
        for needs, text in cases(path.read_text()):
            found.setdefault((needs, name in FAST), []).append((name, code(text)))
    return [
        pytest.param(needs, pages, marks=[] if fast else [pytest.mark.full], id=" and ".join(needs) or "nothing else")
        for (needs, fast), pages in found.items()
    ]


def brought(*lines):
    """The names of the distributions that pip installs for these requirements."""
    found, todo = set(), [Requirement(line) for line in lines]
    while todo:
        requirement = todo.pop()
        for extra in ("", *requirement.extras):
            key = canonicalize_name(requirement.name), extra
            if key in found:
                continue
            found.add(key)
            with contextlib.suppress(metadata.PackageNotFoundError):
                below = map(Requirement, metadata.requires(requirement.name) or ())
                todo += [each for each in below if each.marker is None or each.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


@pytest.mark.parametrize(("needs", "pages"), groups())
def test_the_code_of_pages_runs_after_their_own_commands(needs, pages):
    """All blocks of a page in their order, with nothing that can be imported but what the commands bring."""
    for need in needs:
        name = Requirement(need).name
        if importlib.util.find_spec(IMPORTED.get(name, name)) is None:
            pytest.skip(f"needs {need}")
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    there = brought(*dependencies, *needs)
    owners = metadata.packages_distributions().items()
    absent = {name for name, of in owners if not there & {canonicalize_name(each) for each in of}} - {"jaxrnn"}
    assert absent >= {"pytest", "sklearn"}
    given = f"ABSENT, THERE, PAGES = {absent!r}, {there | {'jaxrnn'}!r}, {pages!r}"
    run = python("-W", "error", "-c", f"{given}\n{WITHOUT}\n{RUN}", timeout=1200)
    print(run.stdout)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", PAGES)
def test_every_block_of_python_is_one_that_runs(name):
    text = PAGES[name].read_text()
    assert len(re.findall(r"```\s*py", text)) == len(BLOCK.findall(text))


def documented():
    """The names that pages of the reference document."""
    pages = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    found = re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)$", pages, re.M)
    return [name for name in found if name not in MODULES]


def test_every_public_name_is_on_a_page_of_the_reference_once():
    names = [f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__]
    assert sorted(set(documented()) - {"jaxrnn.typing"}) == sorted(names)
    assert len(documented()) == len(set(documented()))
    text = (DOCS / "reference" / "typing.md").read_text()
    assert all(f"`{name}`" in text for name in importlib.import_module("jaxrnn.typing").__all__)


def test_the_version_is_among_those_that_the_site_offers():
    assert jaxrnn.__version__ in {each["version"] for each in json.loads((DOCS / "versions.json").read_text())}


def test_every_cell_is_in_the_table_of_cells():
    text = (DOCS / "cells.md").read_text()
    for name in jaxrnn.__all__:
        thing = getattr(jaxrnn, name)
        if isinstance(thing, type) and issubclass(thing, jaxrnn.Cell):
            assert f"`{name}" in text, name


def test_every_example_is_on_a_page():
    text = "\n".join(path.read_text() for path in PAGES.values())
    for path in (ROOT / "examples").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in text, path


def test_the_readme_is_short_and_has_its_commands_and_the_words_that_are_searched_for():
    text = README.read_text()
    assert len(text.splitlines()) <= 130
    assert len(re.findall(r"^    pip install -e .*char_lm.py$", text, re.M)) == 1
    assert len(re.findall(r"^    pip install -e .*pytest.*$", text, re.M)) == 1
    words = "gradient checkpointing", "backpropagation through time", "batch first", "hidden state", "teacher forcing"
    for word in (*words, "packed sequences"):
        assert word in " ".join(text.lower().split()), word


@pytest.mark.parametrize("name", PAGES)
def test_the_links_of_a_page_lead_to_files(name):
    """As they are read in the repository; the builder of the site checks its own."""
    path = PAGES[name]
    assert "[](" not in path.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", BLOCK.sub("", path.read_text())):
        if "://" not in target and "_drawings/" not in target:
            assert (path.parent / target).exists(), target
