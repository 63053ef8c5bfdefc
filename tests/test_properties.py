"""Random compositions, shapes, masks and resets, against the definition."""

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from members import draw_carry, draw_params, draw_x
from reference import reference

import jaxrnn
from jaxrnn import (
    GRU,
    LSTM,
    MGU,
    Apply,
    Bidirectional,
    Dropout,
    Elman,
    IndRNN,
    LayerNorm,
    LearnedCarry,
    Linear,
    Pool,
    RecurrentDropout,
    Residual,
    Stack,
    WeightDrop,
    Zoneout,
)

X64 = True
SIZES = st.integers(1, 4)


@st.composite
def lstms(draw, size):
    return LSTM(
        size,
        draw(SIZES),
        peephole=draw(st.booleans()),
        coupled=draw(st.booleans()),
        projection_size=draw(st.none() | SIZES),
        layer_norm=draw(st.booleans()),
        cell_clip=draw(st.none() | st.just(0.5)),
        gate_clip=draw(st.none() | st.just(0.7)),
        activation=draw(st.sampled_from(["tanh", "softsign", ("scaled_tanh", 1.5, 0.5)])),
    )


@st.composite
def grus(draw, size):
    return GRU(
        size,
        draw(SIZES),
        reset_after=draw(st.booleans()),
        layer_norm=draw(st.booleans()),
        gate_clip=draw(st.none() | st.just(0.7)),
    )


@st.composite
def recurrent(draw, size):
    """A cell with a recurrent product, and wrappers around it in the order that they allow."""
    others = st.sampled_from([Elman, MGU, IndRNN]).flatmap(lambda kind: st.builds(kind, st.just(size), SIZES))
    cell = draw(lstms(size) | grus(size) | others)
    if isinstance(cell, IndRNN):
        cell = IndRNN(size, cell.hidden_size, activation="tanh")
    if draw(st.booleans()):
        cell = RecurrentDropout(cell, 0.3)
    if draw(st.booleans()):
        cell = WeightDrop(cell, 0.2)
    if draw(st.booleans()):
        cell = Zoneout(cell, 0.25)
    return LearnedCarry(cell) if draw(st.booleans()) else cell


@st.composite
def stacks(draw, size):
    """Two or three cells that fit; now and then in two directions, residual, or pooled at the end."""
    cells = []
    kinds = ["recurrent", "recurrent", "both", "residual", "layer"]
    for k in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(kinds if k else kinds[:-1]))  # the first says its sizes
        match kind:
            case "recurrent":
                cell = draw(recurrent(size))
            case "both":
                cell = Bidirectional(draw(recurrent(size)), draw(recurrent(size)))
            case "residual":
                inner = draw(recurrent(size))
                cell = Residual(Stack((inner, Linear(inner.output_size, size))))
            case _:
                layers = [
                    Linear(size, 3),
                    LayerNorm(size),
                    Apply("softplus"),
                    Dropout(0.3),
                    Dropout(0.3, per_sequence=True),
                ]
                cell = draw(st.sampled_from(layers))
        cells.append(cell)
        size = Stack(tuple(cells)).output_size
    if getattr(cells[-1], "output_size", None) is not None and draw(st.booleans()):
        cells[-1] = Pool(cells[-1], draw(st.sampled_from(["last", "mean", "max"])))
        cells.append(Linear(size, 2))
    return Stack(tuple(cells))


def check(data):
    length, batch = data.draw(st.integers(0, 5), "length"), data.draw(st.integers(1, 3), "batch")
    size = data.draw(SIZES, "input size")
    cell = data.draw(stacks(size), "cell")
    flags = hnp.arrays(bool, (length, batch))
    valid, reset = data.draw(flags, "valid"), data.draw(flags, "reset")
    reverse, keyed = data.draw(st.booleans(), "reverse"), data.draw(st.booleans(), "keyed")
    every = data.draw(st.none() | st.integers(1, 6), "remat_every")
    time_axis = data.draw(st.integers(0, 1), "time axis")
    params = draw_params(cell)
    carry = draw_carry(cell, params, batch)
    xs = np.random.default_rng(0).normal(size=(length, batch, size))
    key = jax.random.key(1) if keyed else None
    noise = cell.noise(key, length, (batch,)) if keyed else None
    poison = np.where(valid[..., None], xs, np.nan)

    turn = lambda x: np.moveaxis(x, 0, time_axis)
    end, ys = jax.jit(
        lambda params, carry, xs: jaxrnn.scan(
            cell,
            params,
            carry,
            xs,
            mask=turn(valid),
            reset=turn(reset),
            reverse=reverse,
            time_axis=time_axis,
            key=key,
            remat_every=every,
        )
    )(params, carry, turn(poison))
    ys = ys if cell.ends_time else np.moveaxis(ys, time_axis, 0)
    expected = reference(cell, params, carry, xs, valid, reset, reverse, noise) if length else (carry, ys)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-8, 1e-8), (end, ys), expected)


COMMON = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=12, **COMMON)
@given(st.data())
def test_random_compositions(data):
    check(data)


@pytest.mark.full
@settings(max_examples=150, **COMMON)
@given(st.data())
def test_many_random_compositions(data):
    check(data)


@settings(max_examples=40, **COMMON)
@given(st.data())
def test_sizes_are_known_at_construction(data):
    """The output size that a composition names is the shape that it puts out."""
    size = data.draw(SIZES)
    cell = data.draw(stacks(size))
    y = jax.eval_shape(lambda: jaxrnn.scan(cell, draw_params(cell), None, np.zeros((2, 1, size)))[1])
    assert y.shape[-1] == cell.output_size
    assert jaxrnn.summary(cell).count == sum(leaf.size for leaf in jax.tree.leaves(draw_params(cell)))
    assert draw_x(cell, 0, 3).shape == (3, size)
