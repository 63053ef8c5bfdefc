"""Inputs that are no floating numbers: integers and flags are cast to the dtype that a cell computes in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import CELLS, COMPOSITIONS, LAYERS, MEMBERS, draw_params, draw_x, floats, streams, weighted_sum

import jaxrnn

NAMES = [
    name
    for name, cell in (CELLS | LAYERS | COMPOSITIONS).items()
    if cell.input_ndim != 0 and not any(word in name for word in ("own", "two_inputs", "callable"))
]
FAST = ("lstm", "min_gru", "conv_lstm_1d")
DTYPES = [np.int32, np.uint8, np.bool]
LINEAR = ("min_gru", "min_lstm", "sru", "qrnn", "s4d", "s6", "lru", "s5", "rg_lru", "hgrn")


def near(found, expected):
    for a, b in zip(floats(found), floats(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, 1e-5, 1e-5)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.full) for n in NAMES])
def test_integers_and_flags_are_numbers(name):
    """Forward, gradient, step and rollout, in every implementation: what floating inputs of the same values give."""
    cell = MEMBERS[name]
    params = jax.tree.map(jnp.asarray, draw_params(cell, dtype=np.float32))
    xs = np.abs(draw_x(cell, 3, 4, 2, dtype=np.float32)) > 0.5
    forms = (None, "xla", "associative", "chunked") if name in LINEAR else (None, "xla")

    @jax.jit
    def run(params, xs):
        def loss(params, form):
            found = jaxrnn.scan(cell, params, None, xs, lengths=np.array([4, 2]), implementation=form)
            return weighted_sum(found), found

        found = [jax.value_and_grad(loss, has_aux=True)(params, form) for form in forms]
        if not streams(cell):
            return found
        x = xs[0]
        kept = jaxrnn.rollout(cell, params, None, x, 3, feedback=lambda y, key: (~x if x.dtype == bool else 1 - x, y))
        return found, jaxrnn.step(cell, params, None, x), kept

    expected = run(params, xs.astype(np.float32))
    for dtype in DTYPES:
        near(run(params, xs.astype(dtype)), expected)


@pytest.mark.parametrize("name", ["gru", "lru"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outside_of_jit(name, dtype):
    """As a user tries it first: NumPy's integers, and lists of them."""
    cell = MEMBERS[name]
    params = cell.init(jax.random.key(0))
    xs = np.arange(12).reshape(3, 2, 2) % 2
    expected = jaxrnn.scan(cell, params, None, xs.astype(np.float32))
    near(jaxrnn.scan(cell, params, None, xs.astype(dtype)), expected)
    near(jaxrnn.step(cell, params, None, xs[0].astype(dtype)), jaxrnn.step(cell, params, None, xs[0].astype(float)))
