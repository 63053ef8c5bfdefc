"""The training loop: what it trains on, when it stops, what it records, many models at once."""

import importlib
import io
import pickle
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import jaxrnn
from jaxrnn import GRU, Dropout, LearnedCarry, Linear, Pool, Stack
from jaxrnn.training import (
    Arrays,
    Batch,
    NonFiniteError,
    Validation,
    accuracy,
    cross_entropy,
    evaluate,
    fit,
    make_loss,
    make_step,
    make_truncated_loss,
    predict,
    squared_error,
    train_state,
)
from jaxrnn.training.history import BadStep, empty_history
from jaxrnn.training.ragged import Buckets
from jaxrnn.training.streams import Streams

X64 = True
PROMOTION = "standard"  # Adam of Optax mixes dtypes
RNG = np.random.default_rng(2)
N, T = 22, 5
XS = RNG.normal(size=(N, T, 2)).astype(np.float32)
LENGTHS = RNG.integers(0, T + 1, N)
VALID = np.arange(T) < LENGTHS[:, None]
CLASSES = (np.where(VALID[..., None], XS, 0).sum((1, 2)) > 0).astype(int)
DATA = Batch(XS, CLASSES, LENGTHS)
MODEL = Stack((Pool(GRU(2, 4)), Dropout(0.1), Linear(4, 2)))
LOSS = make_loss(MODEL, cross_entropy, metrics={"accuracy": accuracy})
ADAM = optax.inject_hyperparams(optax.adam)(learning_rate=0.03)
KEY = jax.random.key(3)


def member(key, rate):
    init, noise = jax.random.split(key)
    state = train_state(MODEL.init(init), ADAM, noise)
    return state._replace(opt_state=optax.tree_utils.tree_set(state.opt_state, learning_rate=rate))


STATE = member(jax.random.key(0), jnp.float32(0.03))


def train(state=STATE, data=DATA, loss=LOSS, **keywords):
    keywords = {"optimizer": ADAM, "epochs": 2, "batch_size": 8, "key": KEY, "steps_per_call": 2} | keywords
    return fit(loss, state, data, **keywords)


def equal(a, b):
    def plain(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    jax.tree.map(lambda a, b: np.testing.assert_array_equal(plain(a), plain(b)), a, b)


def test_fit_is_the_loop_of_its_steps():
    """The same params, moments and metrics as the step in a Python loop, to rounding; every row once an epoch."""
    state, history = train()
    step = jax.jit(make_step(LOSS, ADAM))
    source, by_hand, losses = Arrays(DATA, 8, key=KEY), STATE, []
    for _ in range(2):
        for batch in source:
            by_hand, metrics = step(by_hand, batch)
            losses.append(metrics["loss"].value)
    assert len(losses) == 6
    close(state.params, by_hand.params, 2e-4)
    np.testing.assert_allclose(history.train["loss"], losses, rtol=1e-5)
    np.testing.assert_array_equal(history.step, np.arange(1, 7))
    assert (state.step, state.data, history.ended) == (6, None, "epochs")
    assert set(history.train) == {"loss", "accuracy", "gradient_norm"}
    assert np.isfinite(jax.tree.leaves(STATE.params)[0]).all()  # what was given is still there


def test_it_learns_validates_and_keeps_the_best():
    state, history = train(epochs=25, validation=DATA, steps_per_call=16)
    assert history.validation["loss"].shape == (25,)
    np.testing.assert_array_equal(history.validation_step, 3 * np.arange(1, 26))
    best = int(history.validation["loss"].argmin())
    assert state.best.value == history.validation["loss"][best]
    assert state.best.step == history.validation_step[best]
    measured = evaluate(LOSS, state.best.params, DATA, batch_size=9)
    np.testing.assert_allclose(measured["loss"], state.best.value, rtol=1e-5)
    logits = predict(MODEL, state.best.params, XS, lengths=LENGTHS, batch_size=8)
    np.testing.assert_allclose((logits.argmax(-1) == CLASSES).mean(), measured["accuracy"], rtol=1e-6)
    assert measured["accuracy"] > 0.9


def test_predict_restores_the_order_of_ragged_lists():
    cell = Stack((GRU(2, 3), Linear(3, 2)))
    params = cell.init(jax.random.key(0))
    sequences = [x[:n] for x, n in zip(XS, LENGTHS, strict=True)]
    rows = predict(cell, params, sequences, batch_size=4)
    whole = predict(cell, params, XS, lengths=LENGTHS)
    for row, sequence, full in zip(rows, sequences, whole, strict=True):
        assert len(row) == len(sequence)
        np.testing.assert_allclose(row, full[: len(row)], atol=1e-6)
    pooled = predict(MODEL, STATE.params, sequences, batch_size=4)
    np.testing.assert_allclose(pooled, predict(MODEL, STATE.params, XS, lengths=LENGTHS), atol=1e-6)


def test_early_stopping_waits_for_patience():
    """Where training makes it worse, it stops after `patience` validations and has the best at hand."""
    worse = Batch(XS, 1 - CLASSES, LENGTHS)
    state, history = train(epochs=30, validation=Validation(worse, patience=3))
    best = int(history.validation["loss"].argmin())
    assert len(history.validation["loss"]) == best + 1 + 3 < 30
    assert (bool(state.stopped), history.ended) == (True, "stopped")
    assert state.best.step == history.validation_step[best]
    more, _ = train(state, epochs=3, validation=worse)
    equal(more.params, state.params)


def test_more_can_be_the_better():
    state, history = train(epochs=4, validation=Validation(DATA, "accuracy", maximize=True))
    assert state.best.value == history.validation["accuracy"].max()


def close(a, b, rtol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 100), a, b)


def spoiled(batch):
    """The data as a list of batches, one of which gives an infinite loss."""
    batches = list(Arrays(DATA, 8, shuffle=False, drop_last=True))
    return [
        each._replace(weights=np.full(len(each.xs), np.inf if k == batch else 1, np.float32))
        for k, each in enumerate(batches * 2)
    ]


def test_what_is_not_finite_raises_with_step_and_leaf():
    with pytest.raises(NonFiniteError, match="step 2: the loss is not finite") as raised:
        train(data=spoiled(1))
    state, _ = train(data=spoiled(-1)[:1], epochs=1)
    close(raised.value.state.params, state.params, 1e-5)
    assert raised.value.history.step.tolist() == [1, 2]
    assert not raised.value.state.stopped

    def loss(params, batch, key):
        value, metrics = LOSS(params, batch, key)
        return value + jnp.sqrt(0 * params[2].w[0, 0]), metrics

    with pytest.raises(NonFiniteError, match=r"step 1: the gradient of params\[2\].w is not finite"):
        train(loss=loss)


def test_what_is_not_finite_is_skipped():
    state, history = train(data=spoiled(1), nonfinite="skip", epochs=1)
    assert np.isfinite(history.train["loss"]).tolist() == [True, False, True, True]
    assert [(bad.step, bad.member) for bad in history.bad] == [(2, None)]
    assert state.step == 4
    by_hand = STATE
    step = jax.jit(make_step(LOSS, ADAM))
    for k, batch in enumerate(spoiled(1)):
        new, _ = step(by_hand, batch)
        by_hand = by_hand._replace(step=by_hand.step + 1) if k == 1 else new
    close(state.params, by_hand.params, 2e-4)


def test_what_is_not_finite_stops_at_the_last_good_state():
    state, history = train(data=spoiled(2), nonfinite="stop")
    want, _ = train(data=spoiled(-1)[:2], epochs=1)
    equal(state.params, want.params)
    assert (history.ended, history.step.tolist(), int(state.step)) == ("stopped", [1, 2, 3], 2)


@pytest.mark.parametrize("members", [False, True])
def test_a_validation_that_is_not_a_number_is_no_worse_one(members):
    """NaN is no better for ever, and so would end the patience of a model that learns."""

    def loss(params, batch, key):
        return (params * batch).mean(), {}

    sgd = optax.sgd(0.1)
    state = train_state(jnp.ones(()), sgd, jax.random.key(1))
    if members:
        state = jax.tree.map(lambda leaf: leaf[None], state)
    rows = np.ones(6, np.float32)
    keywords = {"loss": loss, "data": rows, "optimizer": sgd, "batch_size": 2, "validation": np.nan * rows}
    with pytest.raises(NonFiniteError, match=r"step 3.*: the validation loss is not finite") as raised:
        train(state, **keywords)
    assert raised.value.bad == (3, 0 if members else None, "the validation loss")
    assert len(raised.value.history.validation_step) == 1
    for nonfinite, ended, steps in (("stop", "stopped", [3]), ("skip", "epochs", [3, 6])):
        after, history = train(state, nonfinite=nonfinite, **keywords)
        assert ([bad.step for bad in history.bad], history.ended) == (steps, ended)
        assert np.max(after.step) == steps[-1]
        assert np.all(np.isinf(after.best.value))


def wide(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, tree)


@pytest.mark.full
def test_every_member_is_its_own_run():
    """Over seeds and rates, 51 steps in float64; a member that stopped holds the params of its stopping step."""
    rates = jnp.array([0.001, 0.03, 0.3])
    states = jax.vmap(member)(jax.random.split(jax.random.key(7), 3), rates)
    states = wide(states)
    data = wide(DATA)
    keywords = {"epochs": 17, "validation": Validation(data, patience=2), "data": data}
    many, history = train(states, **keywords)
    assert history.train["loss"].shape == (len(history.step), 3)
    ended = []
    for k in range(3):
        one, own = train(jax.tree.map(lambda leaf: leaf[k], states), **keywords)
        mine = jax.tree.map(lambda leaf: leaf[k], many)
        for name in ("params", "opt_state", "best", "step", "stopped"):
            close(getattr(mine, name), getattr(one, name), 1e-8)
        steps = len(own.step)
        np.testing.assert_allclose(history.train["loss"][:steps, k], own.train["loss"], rtol=1e-8)
        assert np.isnan(history.train["loss"][steps:, k]).all()
        ended.append(steps)
    assert max(ended) == 51
    assert min(ended) < 51


def test_a_member_that_is_not_finite_does_not_stop_the_others():
    states = jax.vmap(member)(jax.random.split(jax.random.key(7), 2), jnp.array([0.03, 0.03], jnp.float32))
    states = states._replace(params=jax.tree.map(lambda leaf: leaf.at[0].multiply(jnp.nan), states.params))
    state, history = train(states, nonfinite="stop")
    assert state.stopped.tolist() == [True, False]
    assert state.step.tolist() == [0, 6]
    assert history.bad == ((1, 0, "the loss"),)
    with pytest.raises(NonFiniteError, match="step 1, member 0: the loss"):
        train(states)


def every_error():
    """The exceptions that the package defines."""
    for module in pkgutil.walk_packages(jaxrnn.__path__, "jaxrnn."):
        if not module.name.endswith("._kernels"):  # a library that Python does not import
            importlib.import_module(module.name)
    todo, found = [BaseException], set()
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        if kind.__module__.startswith("jaxrnn."):
            found.add(kind)
    return found


def test_every_error_survives_another_process():
    made = {NonFiniteError: (BadStep(3, None, "the loss"), STATE, empty_history())}
    for kind in every_error():
        error = kind(*made.get(kind, ("what happened",)))
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (kind, str(error))
        if kind is NonFiniteError:
            assert again.bad == error.bad
            jax.tree.map(np.testing.assert_array_equal, again.state.params, STATE.params)
            assert again.state.key == STATE.key
    assert made.keys() <= every_error()


def test_buckets_and_lists_and_iterables_are_data():
    sequences = [x[:n] for x, n in zip(XS, LENGTHS, strict=True)]
    source = Buckets(sequences, CLASSES, 8, key=KEY, buckets=2)
    _, history = train(data=source)
    assert len(history.step) == 2 * len(source)
    listed = list(Arrays(DATA, 8, shuffle=False))
    a, _ = train(data=listed, batch_size=None)
    b, _ = train(data=iter(listed), epochs=1)
    c, _ = train(data=DATA, shuffle=False, key=None)
    equal(a.params, c.params)
    assert b.step == 3


@pytest.mark.parametrize("window", [4, 8])
def test_streams_train_with_their_carry(window):
    """Two epochs over documents: the carry does not leak from one to the next, whatever it held."""
    cell = Stack((GRU(2, 3), Linear(3, 2)))
    loss = make_truncated_loss(cell, squared_error)
    documents = [RNG.normal(size=(n, 2)).astype(np.float32) for n in (9, 4, 12)]
    source = Streams(documents, documents, streams=2, window=window)
    params = cell.init(jax.random.key(0))
    finals = []
    for fill in (0.0, 7.0):
        carry = jax.tree.map(lambda leaf: leaf + fill, cell.initial_carry(params, (2,)))
        source.restore(source.state() | {"epoch": 0, "position": 0})
        state = train_state(params, ADAM, jax.random.key(1), carry=carry)
        held_out = Streams(documents, documents, streams=3, window=window)
        state, history = train(state, source, loss, validation=held_out, batch_size=None)
        finals.append((state.params, state.carry, history.train, history.validation))
    equal(*finals)
    assert np.any(jax.tree.leaves(finals[0][1])[0])


def test_a_learned_carry_is_trained_where_a_sequence_begins():
    """Under truncated backpropagation too: by resets, not by the carry that is given; and validation begins with it."""
    cell = Stack((LearnedCarry(GRU(2, 3)), Linear(3, 2)))
    loss = make_truncated_loss(cell, squared_error)
    documents = [RNG.normal(size=(n, 2)).astype(np.float32) for n in (9, 4)]
    source = Streams(documents, documents, streams=2, window=4)
    params = cell.init(jax.random.key(0))
    carry = cell.initial_carry(params, (2,))
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    batch = next(iter(source))
    assert jnp.all(gradient(params, carry, batch, None)[0][0].carry.h != 0)
    unset = batch._replace(reset=np.zeros_like(batch.reset))
    assert not gradient(params, carry, unset, None)[0][0].carry.h.any()

    source.restore(source.state() | {"epoch": 0, "position": 0})
    state = train_state(params, ADAM, jax.random.key(1), carry=carry)
    after, history = train(state, source, loss, validation=[unset], batch_size=None)
    learned = after.params[0].carry.h
    assert jnp.all(jnp.abs(learned - params[0].carry.h) > 0.01)
    begin = cell.initial_carry(after.params, (2,))
    np.testing.assert_array_equal(begin[0].h, np.stack([learned] * 2))
    want = evaluate(loss, after.params, [unset], carry=begin)["loss"]
    np.testing.assert_allclose(history.validation["loss"][-1], want, rtol=1e-6)
    nothing = jax.tree.map(jnp.zeros_like, begin)
    assert abs(want - evaluate(loss, after.params, [unset], carry=nothing)["loss"]) > 1e-4


def test_progress_is_a_line_an_epoch_and_a_bar_on_a_terminal(capsys):
    screen = io.StringIO()
    train(progress=Console(file=screen, force_terminal=True, width=80), validation=DATA)
    for part in ("epoch 2/2", "loss 0.", "accuracy", "val loss", "steps/s"):
        assert part in screen.getvalue(), part
    plain = io.StringIO()
    train(progress=Console(file=plain))
    assert [line.split("  ")[0] for line in plain.getvalue().splitlines()] == ["epoch 1/2", "epoch 2/2"]
    assert capsys.readouterr().out == ""
    train()
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    train(progress=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"epochs": -1}, "epochs: expected at least 0"),
        ({"steps_per_call": 0}, "steps_per_call: expected at least 1"),
        ({"nonfinite": "ignore"}, "nonfinite: expected 'raise', 'skip' or 'stop'"),
        ({"validation": Validation(DATA, patience=0)}, "validation.patience: expected at least 1"),
        (
            {"validation": Validation(DATA, "f1")},
            "validation.monitor: expected one of .*'accuracy', 'loss'.*, got 'f1'",
        ),
        ({"batch_size": None}, "batch_size: expected a number"),
        ({"key": None}, "key: shuffle=True needs"),
        ({"data": []}, "data: expected at least one batch"),
        ({"validation": []}, "validation: expected at least one batch"),
        ({"optimizer": optax.sgd(0.1, momentum=0.9)}, "optimizer: expected the one that the state was made with"),
        ({"data": DATA._replace(targets=CLASSES[:3])}, "data.targets: expected a leading axis of 22"),
    ],
)
def test_wrong_arguments_raise(keywords, message):
    with pytest.raises(ValueError, match=message):
        train(**keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"epochs": 1.5}, "epochs: expected an integer, got 1.5"),
        ({"accumulate": "2"}, "accumulate: expected an integer, got '2'"),
        ({"state": STATE.params}, "state: expected a TrainState, as train_state makes it, got tuple"),
        ({"loss": lambda params, batch, key: 0.0}, r"loss: expected it to return \(scalar, metrics\)"),
        ({"loss": lambda params, batch, key: (jnp.zeros(3), {})}, r"loss: expected a floating scalar, got .*\[3\]"),
        ({"loss": lambda params, batch, key: (jnp.zeros((), int), {})}, "loss: expected a floating scalar, got int"),
        ({"data": DATA._replace(targets=None)}, "targets: expected an array, got None"),
    ],
)
def test_arguments_of_wrong_types_raise(keywords, message):
    with pytest.raises(TypeError, match=message):
        train(**keywords)


def test_a_loss_without_a_carry_is_no_loss_for_a_state_with_one():
    carry = MODEL.initial_carry(STATE.params, (8,))
    with pytest.raises(TypeError, match=r"loss: expected it to return \(scalar, \(carry, metrics\)\)"):
        train(STATE._replace(carry=carry), loss=lambda params, carry, batch, key: (jnp.zeros(()), {}))


def test_predict_of_no_rows():
    cell = GRU(2, 3)
    assert predict(cell, cell.init(jax.random.key(0)), np.zeros((0, 5, 2), np.float32)).shape == (0, 5, 3)
    assert predict(MODEL, STATE.params, XS[:0], lengths=LENGTHS[:0]).shape == (0, 2)


def test_data_that_are_none_raise():
    with pytest.raises(TypeError, match="data: expected a pair of arrays"):
        train(data=3)
    with pytest.raises(TypeError, match="validation: expected data that can be gone through"):
        train(validation=iter([DATA]))
    with pytest.raises(ValueError, match="an iterator is used up after one epoch"):
        train(data=iter([jax.tree.map(lambda leaf: leaf[:8], DATA)]))
