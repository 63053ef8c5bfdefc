"""Converts nested dicts of arrays to paths with slashes, and back."""

from __future__ import annotations

from collections.abc import Mapping

from jaxrnn.typing import Named, PyTree

_DEEPEST = 64


def join(path: str, name: str) -> str:
    """The path of `name` below `path`."""
    return f"{path}/{name}" if path else name


def leaves(tree: PyTree) -> Named:
    """The leaves of nested dicts, by path.

    Raises:
      ValueError: If the dicts are nested more deeply than those of any model.

    Examples:
      >>> leaves({"cell": {"i": {"kernel": 1}, "h": 2}})
      {'cell/i/kernel': 1, 'cell/h': 2}
    """
    found, todo = {}, [("", 0, tree)]
    while todo:
        path, depth, node = todo.pop()
        if not isinstance(node, Mapping):
            found[path] = node
        elif depth > _DEEPEST:
            raise ValueError(f"params: {path[:80]}...: nested more than {_DEEPEST} levels deep")
        else:
            todo += [(join(path, str(name)), depth + 1, below) for name, below in reversed(list(node.items()))]
    return found


def nested(flat: Mapping[str, PyTree]) -> Named:
    """The nested dicts that hold these leaves.

    Examples:
      >>> nested({"cell/i/kernel": 1, "cell/h": 2})
      {'cell': {'i': {'kernel': 1}, 'h': 2}}
    """
    tree: Named = {}
    for path, leaf in flat.items():
        *above, last = path.split("/")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree
