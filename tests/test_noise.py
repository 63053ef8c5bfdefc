"""Noise: what is drawn has the distribution and the place that it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import draw_params, draw_x

import jaxrnn
from jaxrnn import (
    GRU,
    LSTM,
    MGU,
    ConvLSTM,
    Dropout,
    Elman,
    IndRNN,
    LSTMCarry,
    RecurrentDropout,
    Stack,
    WeightDrop,
    Zoneout,
)
from jaxrnn.compose.noise import ZoneoutNoise
from jaxrnn.engines.walk import Walk

X64 = True
KEY = jax.random.key(0)
RATE = 0.3


def near(frequency, probability, draws):
    """Within five standard deviations."""
    frequency = float(frequency)
    assert abs(frequency - probability) < 5 * np.sqrt(probability * (1 - probability) / draws)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_dropout_frequency_scale_and_independence(per_sequence):
    shape = (40, 30, 20)
    ys = np.asarray(jaxrnn.scan(Dropout(RATE, per_sequence), (), None, np.ones(shape), key=KEY)[1])
    np.testing.assert_allclose(np.unique(ys), [0, 1 / (1 - RATE)], 1e-12)
    kept = ys > 0
    near(kept.mean(), 1 - RATE, kept.size // (40 if per_sequence else 1))
    if per_sequence:
        assert (kept == kept[0]).all()
        kept = kept[:1]
    else:
        near((kept[1:] & kept[:-1]).mean(), (1 - RATE) ** 2, kept.size / 4)
    near((kept[:, 1:] & kept[:, :-1]).mean(), (1 - RATE) ** 2, kept.size / 4)
    near((kept[:, :, 1:] & kept[:, :, :-1]).mean(), (1 - RATE) ** 2, kept.size / 4)


def test_recurrent_dropout_mask():
    mask, steps = RecurrentDropout(LSTM(2, 50), RATE).noise(KEY, 7, (40,))
    assert steps is None
    assert mask.shape == (40, 50)
    np.testing.assert_allclose(np.unique(mask), [0, 1 / (1 - RATE)], 1e-12)
    near(np.mean(np.asarray(mask) > 0), 1 - RATE, mask.size)


@pytest.mark.parametrize(
    "cell",
    [
        Elman(2, 3),
        LSTM(2, 3),
        LSTM(2, 3, projection_size=4),
        GRU(2, 3),
        GRU(2, 3, reset_after=False),
        MGU(2, 3),
        IndRNN(2, 3),
    ],
    ids=repr,
)
def test_recurrent_dropout_masks_the_product_and_not_the_carry(cell):
    """A step under the mask is a step whose recurrent weights have their rows masked: the carry itself is whole."""
    params, x = draw_params(cell), draw_x(cell, 1)
    carry = jax.tree.map(lambda leaf: leaf + 0.5, cell.initial_carry(params))
    mask, _ = RecurrentDropout(cell, 0.5).noise(jax.random.key(3), 1, ())
    assert 0 < (mask > 0).sum() < mask.size
    got = RecurrentDropout(cell, 0.5).step(params, carry, x, (mask, None))
    rows = mask if params.w_h.ndim == 1 else mask[:, None]
    expected = cell.step(params._replace(w_h=rows * params.w_h), carry, x)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-12), got, expected)


def test_weight_drop_frequency_and_one_mask_per_call():
    cell = WeightDrop(GRU(2, 40), RATE)
    (keep,), inner = cell.noise(KEY, 7, (5,))[0]
    assert keep.shape == (40, 120)
    assert inner is None
    near(np.mean(keep), 1 - RATE, keep.size)
    params, xs = draw_params(cell), draw_x(cell, 1, 4, 5)
    got = jaxrnn.scan(cell, params, None, xs, key=KEY)
    dropped = params._replace(w_h=np.where(keep, params.w_h / (1 - RATE), 0))
    expected = jaxrnn.scan(GRU(2, 40), dropped, None, xs)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-10), got, expected)


def test_zoneout_frequency_on_h_and_c_and_the_expectation():
    rates = (0.2, 0.6)
    cell = Zoneout(LSTM(2, 40), rates)
    params, x = draw_params(cell), draw_x(cell, 1, 30)
    carry = LSTMCarry(np.full((30, 40), 0.3), np.full((30, 40), -0.4))
    sequence, steps = cell.noise(KEY, 1, (30,))
    drawn = sequence, jax.tree.map(lambda leaf: leaf[0], steps)
    plain, _ = cell.cell.step(params, carry, x)
    zoned, y = cell.step(params, carry, x, drawn)
    for old, new, got, rate in zip(carry, plain, zoned, rates, strict=True):
        stayed = np.asarray(got) == old
        near(stayed.mean(), rate, stayed.size)
        np.testing.assert_array_equal(got, np.where(stayed, old, new))
    np.testing.assert_array_equal(y, zoned.h)
    expected, y = cell.step(params, carry, x)
    for old, new, got, rate in zip(carry, plain, expected, rates, strict=True):
        np.testing.assert_allclose(got, rate * old + (1 - rate) * np.asarray(new), 1e-12)
    np.testing.assert_array_equal(y, expected.h)


def test_zoneout_steps_are_independent():
    _, steps = Zoneout(GRU(2, 30), 0.5).noise(KEY, 50, (20,))
    (stay,) = steps.stay
    assert stay.shape == (50, 20, 30)
    for axis in range(3):
        first, second = np.split(np.moveaxis(np.asarray(stay), axis, 0), 2)
        near((first & second).mean(), 0.25, first.size)


def test_a_reset_does_not_redraw_the_noise_of_a_sequence():
    cell = RecurrentDropout(GRU(2, 20), 0.5)
    params, x = draw_params(cell), draw_x(cell, 1)
    xs = np.stack([x] * 6)
    reset = np.arange(6) == 3
    _, ys = jaxrnn.scan(cell, params, None, xs, reset=reset, key=KEY)
    np.testing.assert_array_equal(ys[:3], ys[3:])


def test_layers_of_a_stack_draw_their_own_noise():
    cell = Stack((Dropout(0.5), Dropout(0.5)))
    ys = np.asarray(jaxrnn.scan(cell, ((), ()), None, np.ones((50, 40)), key=KEY)[1])
    near((ys > 0).mean(), 0.25, ys.size)


def test_rate_zero_is_the_cell():
    plain = GRU(2, 3)
    params, xs = draw_params(plain), draw_x(plain, 1, 4, 5)
    expected = jaxrnn.scan(plain, params, None, xs)
    for cell in (
        RecurrentDropout(plain, 0.0),
        WeightDrop(plain, 0.0),
        Zoneout(plain, 0.0),
        Stack((plain, Dropout(0.0))),
    ):
        p = (params, ()) if isinstance(cell, Stack) else params
        got = jaxrnn.scan(cell, p, None, xs, key=KEY)
        np.testing.assert_allclose(got[1], expected[1], 1e-12)


def test_legacy_keys_and_new_keys_draw_the_same():
    cell = Stack((Dropout(0.5), GRU(2, 3)))
    params, xs = draw_params(cell), draw_x(cell, 1, 4, 5)
    old = jaxrnn.scan(cell, params, None, xs, key=jax.random.PRNGKey(3))
    new = jaxrnn.scan(cell, params, None, xs, key=jax.random.key(3))
    np.testing.assert_array_equal(old[1], new[1])


def test_conv_lstm_mask_has_the_shape_of_the_state():
    cell = RecurrentDropout(ConvLSTM((4, 5), 2, 3, strides=2), 0.5)
    mask, _ = cell.noise(KEY, 3, (6,))
    assert mask.shape == (6, 2, 3, 3)


def test_noise_keeps_the_dtype_of_half_precision():
    cell = Stack((Dropout(0.5), Zoneout(RecurrentDropout(LSTM(2, 3), 0.5), 0.5)))
    params = draw_params(cell, dtype=jnp.bfloat16)
    _, ys = jaxrnn.scan(cell, params, None, draw_x(cell, 0, 4, 2, dtype=jnp.bfloat16), key=KEY)
    assert ys.dtype == jnp.bfloat16


def test_noise_of_ones_own_may_lack_an_axis():
    """One mask for all rows, and one draw for all units."""
    layer = Zoneout(RecurrentDropout(LSTM(3, 4), 0.5), 0.3)
    params, xs = layer.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (5, 2, 3), jnp.float32)
    mask, stay = jnp.array([0.0, 2.0, 2.0, 0.0]), jax.random.bernoulli(jax.random.key(2), 0.3, (5, 2, 1))
    carry = layer.initial_carry(params, (2,))

    def run(name, noise):
        walk = Walk(implementation=name)
        return layer.scan(params, carry, xs, fresh=carry, noise=noise, walk=walk)

    short = mask[None], ZoneoutNoise([stay, stay], None)
    long = jnp.broadcast_to(mask, (2, 4)), ZoneoutNoise([jnp.broadcast_to(stay, (5, 2, 4))] * 2, None)
    found = [run(name, noise) for name in (None, "xla") for noise in (short, long)]
    for each in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), each, found[0])
