"""The README and the site: every block of Python runs, every public name is in the reference, and every link leads on."""

import importlib
import importlib.util
import re
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_package import ROOT, WITHOUT, brought, python

import jaxrnn

DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}
# Pages that train for longer, or import other frameworks.
SLOW = set()
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)
NEED = re.compile(r"`pip install (\w[^`]*)`")
MODULES = ("jaxrnn", "jaxrnn.linen", "jaxrnn.nnx", "jaxrnn.training", "jaxrnn.convert", "jaxrnn.analysis")

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
    lines, at = [""] * text.count("\n"), 0
    for block in BLOCK.finditer(text):
        at = text.count("\n", 0, block.start(1))
        lines[at : at + block[1].count("\n")] = block[1].splitlines()
    return "\n".join(lines) + "\n"


def needs(text):
    """What a page says that `pip install` must bring."""
    return tuple(sorted(set(NEED.findall(text)))) if BLOCK.search(text) else ()


def groups():
    """Pages that need the same, and that are of the same tier, run in one process."""
    found = {}
    for name, path in PAGES.items():
        text = path.read_text()
        if BLOCK.search(text):
            found.setdefault((needs(text), name in SLOW), []).append((name, code(text)))
    for (its, slow), pages in found.items():
        marks = [pytest.mark.full] if slow else []
        yield pytest.param(its, pages, marks=marks, id=" and ".join([*its, "slow"] if slow else its) or "nothing else")


@pytest.mark.parametrize(("its", "pages"), list(groups()))
def test_the_code_of_a_page_runs_after_its_own_commands(its, pages):
    """All blocks of a page in their order, with nothing that can be imported but what they bring."""
    for need in its:
        if importlib.util.find_spec(Requirement(need).name.replace("dm-haiku", "haiku")) is None:
            pytest.skip(f"needs {need}")
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    there = brought(*dependencies, *its)
    owners = metadata.packages_distributions().items()
    absent = {name for name, of in owners if not there & {canonicalize_name(each) for each in of}} - {"jaxrnn"}
    assert absent >= {"pytest", "sklearn"}
    program = f"ABSENT = {absent!r}\nPAGES = {pages!r}\n{WITHOUT}\n{RUN}"
    run = python("-W", "error", "-c", program)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
