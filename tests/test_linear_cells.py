"""Cells with a linear recurrence over long sequences: one step at a time and in parallel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn.engines.cpu import library as native

D, H, T = 4, 8, 10_000
CELLS = {
    "min_gru": jaxrnn.MinGRU(D, H),
    "min_lstm": jaxrnn.MinLSTM(D, H),
    "min_gru_log": jaxrnn.MinGRU(D, H, log_space=True),
    "min_lstm_log": jaxrnn.MinLSTM(D, H, log_space=True),
    "hgrn": jaxrnn.HGRN(D, H, lower_bound=0.99),
    "lru": jaxrnn.LRU(D, H, r_min=0.9, r_max=0.999),
    "s5": jaxrnn.S5(D, H),
    "rg_lru": jaxrnn.RGLRU(D, blocks=2),
    "s4d": jaxrnn.S4D(D, H, "hippo"),
    "s6": jaxrnn.S6(D, H),
    "sru": jaxrnn.SRU(D, H),
    "qrnn": jaxrnn.QRNN(D, H, window=4),
}
NATIVE = ["native"] if native.absent() is None else []


@pytest.mark.parametrize(
    "implementation", [*NATIVE, *(pytest.param(each, marks=pytest.mark.full) for each in ("chunked", "associative"))]
)
@pytest.mark.parametrize("name", CELLS)
def test_steps_are_the_whole_over_many_steps(name, implementation):
    """Within 1e-5 of the largest number, in float32."""
    cell = CELLS[name]
    params = cell.init(jax.random.key(0))
    carry = cell.initial_carry(params)
    if implementation == "native" and (jnp.iscomplexobj(carry.h) or name.endswith("log")):
        pytest.skip("the kernel is real")
    xs = jax.random.normal(jax.random.key(1), (T, D))
    stepped = jax.jit(lambda xs: jax.lax.scan(lambda carry, x: cell.step(params, carry, x), carry, xs))(xs)
    whole = jax.jit(lambda xs: jaxrnn.scan(cell, params, None, xs, implementation=implementation))(xs)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(stepped), strict=True):
        np.testing.assert_allclose(one, other, 0, 1e-5 * float(np.abs(other).max()))


@pytest.mark.parametrize("cell", [jaxrnn.MinGRU, pytest.param(jaxrnn.MinLSTM, marks=pytest.mark.full)])
def test_log_space_over_many_steps_in_float64(cell):
    with jax.enable_x64(True):
        params = cell(D, H).init(jax.random.key(0), jnp.float64)
        xs = jax.random.normal(jax.random.key(1), (T, D), jnp.float64)
        expected = jaxrnn.scan(cell(D, H), params, None, xs)[1]
        for implementation in ("xla", "associative", "chunked"):
            own = cell(D, H, log_space=True)
            ys = jax.jit(
                lambda xs, own=own, how=implementation: jaxrnn.scan(own, params, None, xs, implementation=how)[1]
            )(xs)
            np.testing.assert_allclose(ys, expected, 0, 1e-9 * float(np.abs(expected).max()))
