"""JAX's settings that users turn on: under each, a sample of the contract's members runs as without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import D, H, Own, draw_params, draw_x, floats, streams, weighted_sum

import jaxrnn
from jaxrnn import (
    GRU,
    LSTM,
    RGLRU,
    S5,
    SLSTM,
    Bidirectional,
    Embed,
    Linear,
    MinGRU,
    Parallel,
    Pool,
    Stack,
    Zoneout,
)
from jaxrnn.training import Batch, binary_cross_entropy, cross_entropy, make_loss

SETTINGS = {
    "disable_jit": jax.disable_jit,
    "debug_nans": jax.debug_nans,
    "check_tracer_leaks": jax.checking_leaks,
    "strict dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion raises": lambda: jax.numpy_rank_promotion("raise"),
    "x64": lambda: jax.enable_x64(True),
}
SAMPLE = Stack(
    (
        Embed(7, D),
        Bidirectional(LSTM(D, H), GRU(D, H, reset_after=False), "sum"),
        SLSTM(H, 4, heads=2),
        Parallel((S5(4, 2), MinGRU(4, 4)), "sum"),
        Zoneout(GRU(4, D, layer_norm=True), 0.2),
        RGLRU(D),
        Pool(Stack((Own(H), Linear(H, 4)))),
    )
)


SMALL = Stack((Embed(7, D), GRU(D, D), Parallel((MinGRU(D, D), Own(D)), "sum")))
SLOW = "disable_jit", "check_tracer_leaks"  # each operation by itself, or a search after every trace


def run(cell, each, keyed):
    """Outputs, carry, gradients and a step, with lengths, resets and noise."""
    params = jax.tree.map(jnp.asarray, draw_params(cell, dtype=np.float32))
    xs = jax.tree.map(jnp.asarray, draw_x(cell, 3, 3, 2, dtype=np.float32))
    reset = np.array([[0, 0], [1, 0], [0, 1]], bool)
    key = jax.random.key(0) if keyed else None

    def loss(params):
        found = jaxrnn.scan(cell, params, None, xs, lengths=jnp.array([3, 2]), reset=reset, key=key, remat_every=2)
        return weighted_sum(found), found

    step = each(lambda params: jaxrnn.step(cell, params, None, jax.tree.map(lambda x: x[0], xs)))
    return each(jax.value_and_grad(loss, has_aux=True))(params), step(params) if streams(cell) else None


def samples():
    """A small sample under each, and a large one in the full tier."""
    for setting in SETTINGS:
        fast = setting in ("check_tracer_leaks", "debug_nans")  # other tests run under the rest
        yield pytest.param(SMALL, setting, id=f"{setting}-small", marks=[] if fast else [pytest.mark.full])
        if setting not in SLOW:
            yield pytest.param(SAMPLE, setting, id=f"{setting}-large", marks=pytest.mark.full)


@pytest.mark.parametrize(("cell", "setting"), list(samples()))
def test_a_setting_changes_nothing(cell, setting):
    keyed = setting != "x64"  # under which JAX draws other numbers
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = run(cell, jax.jit, keyed)
        with SETTINGS[setting]():
            found = run(cell, jax.jit if setting != "disable_jit" else lambda function: function, keyed)
    for a, b in zip(floats(found), floats(expected), strict=True):
        np.testing.assert_allclose(a, b, 2e-4, 2e-5)


@pytest.mark.parametrize(
    "setting", [pytest.param(s, marks=() if s == "debug_nans" else pytest.mark.full) for s in SETTINGS]
)
@pytest.mark.full
def test_losses_under_a_setting(setting):
    """What a loss masks may hold anything, and tokens that are not known give NaN without being asked for one."""
    tokens = jnp.array([[0, 4, 1], [2, 0, 0]])
    with jax.numpy_dtype_promotion("standard"), SETTINGS[setting]():
        for error, size in ((binary_cross_entropy, 1), (cross_entropy, 2)):
            model = jaxrnn.Stack(jaxrnn.Embed(5, 3), jaxrnn.Pool(jaxrnn.GRU(3, 4)), jaxrnn.Linear(4, size))
            params = model.init(jax.random.key(0))
            loss = make_loss(model, error)
            batch = Batch(tokens, jnp.array([0, 1]), lengths=jnp.array([3, 1]))
            (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch, None)
            assert np.isfinite(value)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
