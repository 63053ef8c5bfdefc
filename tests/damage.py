"""Nested dicts of arrays with one thing wrong, for the tests of what reads them."""

import copy
import itertools

import numpy as np


def damaged(seed, tree):
    """A copy of `tree` with one random thing wrong; some of it may be harmless."""
    rng = np.random.default_rng(seed)
    tree = copy.deepcopy(tree)
    nodes = list(_nodes(tree))
    node = nodes[rng.integers(len(nodes))]
    name = list(node)[rng.integers(len(node))]
    match rng.integers(8):
        case 0:
            del node[name]
        case 1:
            node[f"{name}_{rng.integers(3)}"] = node[name]
        case 2:
            node[("bias", "kernel", 0, "", "lstm", "a/b", None)[rng.integers(7)]] = node.pop(name)
        case 3:
            node[name] = _nest(node[name], int(rng.integers(1, 3000)))
        case 4:
            other = nodes[rng.integers(len(nodes))]
            key = list(other)[rng.integers(len(other))]
            node[name], other[key] = other[key], node[name]
        case _:
            node[name] = broken_leaf(rng, node[name])
    return tree


def _nodes(tree):
    yield tree
    for below in tree.values():
        if isinstance(below, dict):
            yield from _nodes(below)


def _nest(value, depth):
    for _ in itertools.repeat(None, depth):
        value = {"params": value}
    return value


def broken_leaf(rng, value):
    array = value if isinstance(value, np.ndarray) else np.ones((2, 3))
    broken = array.copy()
    broken.flat[rng.integers(array.size)] = (np.nan, np.inf, -np.inf)[rng.integers(3)]
    choices = (
        broken,
        array[None],
        array[..., :-1],
        array[:0],
        array.ravel(),
        array.T,
        np.float64(3),
        array.astype(int),
        array.astype(np.float16),
        array.astype(np.float32),
        array.astype(complex),
        array.astype(str),
        np.array([array, None], dtype=object),
        array.tolist(),
        array > 0,
        None,
        "kernel",
        {},
        [],
        object(),
        {"kernel": array},
        lambda: array,
    )
    return choices[rng.integers(len(choices))]
