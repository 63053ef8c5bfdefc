"""Predictions: the same numbers however rows are padded, cut into calls or stacked as members, by few programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrnn import (
    GRU,
    LSTM,
    Backward,
    Bidirectional,
    CausalConv,
    Elman,
    Embed,
    Linear,
    MinGRU,
    Pool,
    Stack,
    scan,
)
from jaxrnn.training import cross_entropy, evaluate, make_loss, make_truncated_loss, pad, predict
from jaxrnn.training.prediction import _rounded

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SEQUENCES = [RNG.normal(size=(n, 2)).astype(np.float32) for n in (5, 2, 0, 5, 2, 2)]
HEAD = Stack((Pool(GRU(2, 3)), Linear(3, 2)))
CELLS = {
    "gru": Stack((GRU(2, 3), Linear(3, 2))),
    "both_directions": Bidirectional(LSTM(2, 3), GRU(2, 3)),
    "backward": Stack((CausalConv(2, 3), Backward(MinGRU(2, 4)))),
    "pool": HEAD,
    "pool_both": Stack((Pool(Bidirectional(GRU(2, 3), GRU(2, 3))), Linear(6, 2))),
    "pool_mean": Pool(MinGRU(2, 3), "mean"),
}


@pytest.mark.parametrize("name", CELLS)
def test_the_numbers_are_those_of_every_sequence_alone(name):
    """As a list, as arrays with lengths, padded in front with a mask; in one call and in several."""
    cell = CELLS[name]
    params = cell.init(KEY)
    rows = predict(cell, params, SEQUENCES)
    padded, lengths = pad(SEQUENCES, length=7)
    mask = np.arange(7) >= 7 - lengths[:, None]
    front = np.full_like(padded, np.nan)
    front[mask] = np.concatenate(SEQUENCES)
    behind = predict(cell, params, padded, lengths=lengths)
    in_front = predict(cell, params, front, mask=mask)
    pieces = predict(cell, params, SEQUENCES, batch_size=5), predict(cell, params, front, mask=mask, batch_size=5)
    run = jax.jit(scan)
    for k, sequence in enumerate(SEQUENCES):
        want, n = run(cell, params, None, sequence)[1], len(sequence)
        cut = (rows[k], behind[k], in_front[k], pieces[0][k], pieces[1][k])
        if not cell.ends_time:
            assert (len(in_front[k]), in_front[k][: 7 - n].any()) == (7, False)
            cut = (rows[k], behind[k, :n], in_front[k, 7 - n :], pieces[0][k], pieces[1][k, 7 - n :])
        for got in cut:
            np.testing.assert_allclose(got, want, atol=1e-6)


class Seen(Embed):
    """Tells the shapes of the programs that it is in."""

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        SHAPES.append(xs.shape)
        return super().scan(params, carry, xs, fresh=fresh, noise=noise, walk=walk)


SHAPES: list = []


def test_single_rows_of_any_length_run_by_few_programs():
    """Four numbers of steps for each power of two; requests of several rows likewise, whatever holds them."""
    cell = Seen(7, 2)
    params = cell.init(KEY)
    SHAPES.clear()
    for n in range(1, 41):
        (row,) = predict(cell, params, [np.arange(n) % 7])
        assert row.shape == (n, 2)
    assert len(SHAPES) == len(set(SHAPES)) == len({_rounded(n) for n in range(1, 41)}) == 17
    for n in range(9, 31):
        assert predict(cell, params, np.zeros((n, 5), int)).shape == (n, 5, 2)
    assert len(SHAPES) == len(set(SHAPES)) == 17 + 8


def test_rounding_adds_at_most_a_quarter():
    numbers = np.arange(1, 5000)
    rounded = np.array([_rounded(int(n)) for n in numbers])
    assert (rounded >= numbers).all()
    assert (rounded < 1.25 * numbers).all()
    assert len(set(rounded.tolist())) == 45
    assert [_rounded(n) for n in (0, 1, 7, 8, 9, 33)] == [0, 1, 7, 8, 10, 40]


def test_many_rows_and_steps_run_by_one_program():
    cell, tokens = Seen(6, 3), RNG.integers(0, 6, (9, 9))
    params = cell.init(KEY)
    SHAPES.clear()
    parts = predict(cell, params, tokens, batch_size=4)
    assert len(SHAPES) == 1
    np.testing.assert_allclose(parts, predict(cell, params, tokens), atol=1e-6)


MEMBERS = [HEAD.init(key) for key in jax.random.split(KEY, 3)]
STACKED = jax.tree.map(lambda *leaves: jnp.stack(leaves), *MEMBERS)


@pytest.mark.parametrize("batch_size", [4, 128])
@pytest.mark.parametrize("name", ["pool", "gru"])
def test_members_and_vmap_are_every_model_by_itself(name, batch_size):
    cell = CELLS[name]
    each = [cell.init(key) for key in jax.random.split(KEY, 3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    padded, lengths = pad(SEQUENCES)

    def run(params, **members):
        listed = predict(cell, params, SEQUENCES, batch_size=batch_size, **members)
        return listed, predict(cell, params, padded, lengths=lengths, batch_size=batch_size, **members)

    together = run(stacked, members=True)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(together))
    for k, params in enumerate(each):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[k], b, atol=1e-6), together, run(params))
    traced = jax.jit(jax.vmap(run))(stacked)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), traced, together)


def test_evaluate_of_members():
    padded, lengths = pad(SEQUENCES)
    data = padded[lengths > 0], np.arange(5) % 2
    loss = make_loss(HEAD, cross_entropy)
    each = [evaluate(loss, params, data, batch_size=2)["loss"] for params in MEMBERS]
    assert all(type(value) is float for value in each)
    np.testing.assert_allclose(evaluate(loss, STACKED, data, batch_size=2, members=True)["loss"], each, rtol=1e-6)
    traced = jax.vmap(lambda params: evaluate(loss, params, data, batch_size=2))(STACKED)
    np.testing.assert_allclose(traced["loss"], each, rtol=1e-6)

    windowed = make_truncated_loss(HEAD, cross_entropy)
    carry = jax.vmap(lambda params: HEAD.initial_carry(params, (5,)))(STACKED)
    given = evaluate(windowed, STACKED, data, batch_size=5, carry=carry, members=True)["loss"]
    np.testing.assert_allclose(given, each, rtol=1e-6)


@pytest.mark.parametrize(
    "cell", [Elman(1, 2), LSTM(1, 2), GRU(1, 2), MinGRU(1, 2)], ids=lambda cell: type(cell).__name__
)
def test_integers_are_numbers(cell):
    params = cell.init(KEY)
    (row,) = predict(cell, params, [[[1]]])
    np.testing.assert_array_equal(row, predict(cell, params, [[[1.0]]])[0])
    (row,) = predict(cell, params, [np.array([[True], [False]])])
    np.testing.assert_array_equal(row, predict(cell, params, [[[1.0], [0.0]]])[0])


XS = np.zeros((3, 5, 2), np.float32)


def test_params_of_one_model_are_no_members():
    with pytest.raises(
        ValueError, match=r"params\[0\].w_h: expected an axis of members first, as long .*, got .*\(3, 9\)"
    ):
        predict(HEAD, MEMBERS[0], XS, members=True)
    with pytest.raises(ValueError, match=r"params\[0\].w_h: expected an axis of members first"):
        evaluate(make_loss(HEAD, cross_entropy), MEMBERS[0], (XS, np.zeros(3, int)), batch_size=3, members=True)
    with pytest.raises(ValueError, match=r"params.w_x: .* expects shape \(2, 9\), got \(3, 2, 9\)"):
        predict(HEAD, STACKED, XS)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        (XS, {"lengths": [6, 1, 1]}, ValueError, "lengths: expected 0 to 5, got 1 to 6"),
        (XS, {"lengths": [1, 1]}, ValueError, r"lengths: expected integers of shape \(3,\)"),
        (XS, {"mask": np.ones((3, 4), bool)}, ValueError, r"mask: expected bool of shape \(3, 5\)"),
        (XS, {"mask": np.ones((3, 5))}, ValueError, r"mask: expected bool of shape \(3, 5\), got float64"),
        (
            XS,
            {"mask": np.ones((3, 5), bool), "lengths": [1, 1, 1]},
            ValueError,
            "mask: expected lengths or mask, got both",
        ),
        (SEQUENCES, {"mask": np.ones((3, 5), bool)}, ValueError, "mask: expected None for a list of sequences"),
        (SEQUENCES, {"lengths": [1] * 6}, ValueError, "lengths: expected None for a list of sequences"),
        (XS[0], {}, ValueError, "xs: expected batch, time and 1 more axes"),
        ([1.0, 2.0], {}, ValueError, r"sequences\[0\]: expected one entry per step"),
        ([[1.0, 2.0]], {}, ValueError, "xs: expected batch, time and 1 more axes"),
        (XS, {"batch_size": 0}, ValueError, "batch_size: expected at least 1"),
    ],
)
def test_what_does_not_fit_raises(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        predict(HEAD, MEMBERS[0], arguments, **keywords)


def test_traced_inputs_are_for_scan():
    with pytest.raises(TypeError, match=r"xs: expected arrays .* use jaxrnn.scan"):
        jax.vmap(lambda xs: predict(HEAD, MEMBERS[0], xs))(XS[None])
