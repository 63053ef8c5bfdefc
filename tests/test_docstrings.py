"""Docstrings: what an editor shows, and what a reference is made of."""

import dataclasses
import importlib
import inspect
import re

import pytest

import jaxrnn

MODULES = ("jaxrnn", "jaxrnn.linen", "jaxrnn.nnx", "jaxrnn.training", "jaxrnn.convert", "jaxrnn.analysis")
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Examples", "References")


def public():
    """Every public name, once."""
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            yield pytest.param(getattr(module, name), id=f"{module.__name__}.{name}")


THINGS = list({id(each.values[0]): each for each in public() if callable(each.values[0])}.values())
CELLS = [
    each
    for each in THINGS
    if isinstance(each.values[0], type)
    and issubclass(each.values[0], jaxrnn.Cell)
    and each.values[0].__module__.startswith("jaxrnn.cells.")
    and not inspect.isabstract(each.values[0])
]


def sections(thing):
    """The sections of a docstring by name, and "" for what is before them, as napoleon and griffe divide it."""
    found, name = {"": []}, ""
    for line in inspect.cleandoc(thing.__doc__).splitlines():
        heading = re.fullmatch(r"(\w+):", line)
        if heading and heading[1] in SECTIONS:
            assert heading[1] not in found, f"{heading[1]} twice"
            found[name := heading[1]] = []
        else:
            assert not line or name == "" or line.startswith("  "), f"{name}: {line!r} is not indented"
            found[name].append(line)
    return {name: "\n".join(lines).strip("\n") for name, lines in found.items()}


def entries(section):
    """The names of a section's entries, one for each."""
    names = []
    for line in section.splitlines():
        if re.match(r"  \S", line):
            entry = re.match(r"  (\*{0,2}\w+): \S", line)
            assert entry, f"expected one name and its description, got {line!r}"
            names.append(entry[1].lstrip("*"))
    return names


def arguments(thing):
    """Those of a function, of a cell, the parameters of any other class."""
    if isinstance(thing, type) and issubclass(thing, jaxrnn.Cell):
        return list(inspect.signature(thing).parameters)
    if isinstance(thing, type) and dataclasses.is_dataclass(thing):
        return [field.name for field in dataclasses.fields(thing) if field.name not in ("parent", "name")]
    function = vars(thing).get("__init__", thing) if isinstance(thing, type) else thing
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("thing", THINGS)
def test_sections_and_arguments(thing):
    """Sections by name in one order; a list of arguments has all of them, in the order of the signature."""
    found = sections(thing)
    order = [name for name in found if name]
    assert order == sorted(order, key=SECTIONS.index)
    assert re.match(r"\S.*[.:]$", found[""].split("\n\n")[0].replace("\n", " ")), found[""]
    for name in ("Args", "Attributes"):
        if name in found:
            listed, expected = entries(found[name]), arguments(thing)
            assert listed == [each for each in expected if each in listed]
            if not hasattr(thing, "_fields"):
                assert set(listed) == set(expected), thing
    for error in entries(found.get("Raises", "")):
        assert error.endswith("Error")


@pytest.mark.parametrize("thing", THINGS)
def test_functions_have_examples(thing):
    if inspect.isfunction(thing):
        assert ">>>" in sections(thing).get("Examples", "")


@pytest.mark.parametrize("thing", THINGS)
def test_references_can_be_found(thing):
    references = sections(thing).get("References")
    if references is not None:
        assert re.search(r"arXiv \d{4}\.\d{4,5}|https://\S+", " ".join(references.split())), references


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_has_equations_an_example_and_a_reference(cell):
    found = sections(cell)
    assert re.search(r"^ +\S.* = ", found[""], re.M)
    assert ">>>" in found["Examples"]
    assert "Args" in found
    assert found["References"]
