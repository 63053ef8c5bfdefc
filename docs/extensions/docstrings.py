"""Docstrings for autodoc: their Markdown becomes reStructuredText, before napoleon divides it into sections."""

import re

import jaxrnn

NAME = re.compile(r"[A-Za-z_][\w.]*(\(\))?")
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Examples|References):")
ENTRY = re.compile(r"(\s+\*{0,2}\w+: )(.*)")


def escaped(text):
    """A line of text, with code between backticks and bold words, in reStructuredText."""
    parts = re.split(r"(`[^`]+`|\*\*[^*\s][^*]*\*\*)", text)
    parts[1::2] = [part if part[:2] == "**" else _code(part) for part in parts[1::2]]
    parts[::2] = [_plain(part) for part in parts[::2]]
    return "".join(
        ("\\ " if re.match(r"\w", part) and before[-1:] in ("`", "*") else "") + part
        for before, part in zip(["", *parts[:-1]], parts, strict=True)
    )


def _code(part):
    name = part.strip("`")
    if name in jaxrnn.__all__:
        return f":py:obj:`{name} <jaxrnn.{name}>`"
    return part if NAME.fullmatch(name) else f"``{name}``"


def _plain(part):
    return re.sub(r"([*|]|(?<=\w)_(?!\w)|\\)", r"\\\1", part)


def joined(lines):
    """The lines, where code between backticks that goes on in the next line begins there."""
    found, rest = [], ""
    for line in lines:
        text = line.lstrip()
        if rest:
            line, rest = line[: len(line) - len(text)] + f"{rest} {text}", ""
        if line.count("`") % 2 and ">>>" not in line:
            line, _, rest = line.rpartition("`")
            rest = "`" + rest
        if line.strip() or not rest:
            found.append(line.rstrip())
    return [*found, rest] if rest else found


def converted(lines):
    """Indented blocks after an empty line become literal, in sections only after a colon; all else is escaped."""
    found, block, depth, doctest, before, section = [], None, 0, False, "", False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            doctest = False
            found.append("")
            continue
        doctest = doctest or line.lstrip().startswith(">>>")
        if block is not None and indent < block:
            block = None
        section = section or bool(SECTION.fullmatch(line))
        begins = bool(found) and not found[-1] and indent > depth and (before.endswith(":") or not section)
        if block is None and not doctest and before and begins:
            block = indent
            found += [" " * depth + ".. code-block:: text", ""]
        if block is not None:
            found.append(line)
            continue
        before, depth = line, indent
        if doctest:
            found.append(line)
        elif entry := ENTRY.fullmatch(line):
            found.append(entry[1] + escaped(entry[2]))
        else:
            found.append(escaped(line))
    return found


def process(app, what, name, thing, options, lines):
    lines[:] = converted(joined(lines))


def signature(app, what, name, thing, options, arguments, returned):
    """Aliases of types by their names, also in unions."""
    return tuple(each and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", each) for each in (arguments, returned))


def skip(app, what, name, thing, skipped, options):
    """The fields of a named tuple, which its docstring tells of."""
    return True if (getattr(thing, "__doc__", None) or "").startswith("Alias for field") else None


def setup(app):
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True}
