"""What the tests of `jaxrnn.convert` share: peers, random weights, and one comparison of values and gradients."""

import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn


def peer(module):
    """Another framework's module, or a skipped test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"parity needs {module}: {error}")


def redraw(seed, tree, scale=0.5):
    """Random normal numbers in place of every array, in its shape and dtype."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(leaf.dtype), tree)


def factors_like(seed, tree):
    """One random factor for every number: the weights of a sum that sees all of them."""
    return redraw(seed, jax.tree.map(np.asarray, tree), 1.0)


def run(cell, params, carry, xs, factors, keep=None, **options):
    """(carry, ys) of `jaxrnn.scan`, and the gradients of their sum weighted by `factors`: (params, carry, xs).

    `keep` is a factor on ys, 0 where they are not to be seen.
    """

    def loss(params, carry, xs):
        result = jaxrnn.scan(cell, params, carry, xs, **options)
        seen = result if keep is None else (result[0], result[1] * keep)
        terms = jax.tree.map(lambda w, leaf: jnp.vdot(w, leaf), tuple(factors), seen)
        return sum(jax.tree.leaves(terms)), result

    tokens = not jnp.issubdtype(jnp.asarray(xs).dtype, jnp.floating)
    given = (0, 1) if tokens else (0, 1, 2)
    if carry is None:
        given = tuple(k for k in given if k != 1)
    gradients, result = jax.jit(jax.grad(loss, argnums=given, has_aux=True))(params, carry, xs)
    found = dict(zip(given, gradients, strict=True))
    return result, tuple(found.get(k) for k in range(3))


def assert_close(ours, theirs, what=""):
    """Equal to the rounding of their dtype, relative to the greatest number."""
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        tolerance = 1e-9 if a.dtype == b.dtype == np.float64 else 1e-5
        name = f"{what}{jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(a, b, tolerance, tolerance * max(abs(b).max(initial=0), 1e-3), err_msg=name)


def assert_weight_gradients(convert, weights, ours, theirs):
    """`ours`, the gradient of the params of `convert(weights)`, is `theirs`, that of each of the weights, a dict.

    `convert(weights) -> params` is affine. So a change of one weight by v changes the loss by ⟨theirs, v⟩, and by the
    product of `ours` with the change of the params: one random v for each weight.
    """
    base = convert(weights)
    for seed, (name, weight) in enumerate(weights.items()):
        v = redraw(seed, weight, 1.0)
        change = jax.tree.map(np.subtract, convert(weights | {name: weight + v}), base)
        terms = jax.tree.map(lambda g, d: np.vdot(np.asarray(g, np.float64), np.asarray(d, np.float64)), ours, change)
        expected = np.vdot(np.asarray(theirs[name], np.float64), v)
        tolerance = 1e-9 if np.asarray(weight).dtype == np.float64 else 1e-4
        scale = np.linalg.norm(theirs[name]) * np.linalg.norm(v)
        assert scale > 0, name
        np.testing.assert_allclose(sum(jax.tree.leaves(terms)), expected, 0, tolerance * scale, err_msg=name)
