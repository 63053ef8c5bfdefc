"""Targets that no error can be taken of: refused before the first step, wherever their values are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrnn import GRU, Apply, Linear, Pool, Stack
from jaxrnn.training import (
    Batch,
    Buckets,
    Streams,
    accuracy,
    binary_accuracy,
    binary_cross_entropy,
    cross_entropy,
    evaluate,
    fit,
    make_loss,
    make_truncated_loss,
    perplexity,
    squared_error,
    train_state,
)

KEY = jax.random.key(0)
SGD = optax.sgd(0.1)
XS = np.ones((4, 3, 2), np.float32)
HEAD = Stack((Pool(GRU(2, 2)), Linear(2, 3)))
TAGGER = Stack((GRU(2, 2), Linear(2, 3)))
NAN, INF = np.nan, np.inf


def rows(*values):
    return np.array(values, np.float32)


def never(*arguments):
    raise AssertionError("a step was taken")


def check(cell, error, targets, **rest):
    """Through `fit`, in which no step comes about."""
    loss = dataclasses.replace(make_loss(cell, error), function=never)
    state = train_state(cell.init(KEY), SGD, KEY)
    fit(loss, state, Batch(XS, targets, **rest), optimizer=SGD, epochs=1, batch_size=2, key=KEY)


CLASSES = "targets: expected classes 0 to 2, got "
CHANCES = "targets: expected 0, 1 or a probability between, got "
SUMS = "targets: expected probabilities of sum 1 over the last axis, got "


@pytest.mark.parametrize(
    ("error", "targets", "message"),
    [
        (cross_entropy, np.array([0, 1, 3, 1]), CLASSES + r"3 at \[2\]"),
        (cross_entropy, np.array([0, 1, 2, -1]), CLASSES + r"-1 at \[3\]"),
        (perplexity, np.array([0, 9, 2, 0], np.uint8), CLASSES + r"9 at \[1\]"),
        (accuracy, np.array([0, 3, 2, 0]), CLASSES + r"3 at \[1\]"),
        (cross_entropy, rows(*[[1, 0, 0]] * 3, [0, 0, 0]), SUMS + r"0.0 at \[3\]"),
        (cross_entropy, rows(*[[0.5, 0.25, 0.25]] * 3, [1, 1, 0]), SUMS + r"2.0 at \[3\]"),
        (accuracy, rows(*[[1.5, -0.5, 0]] * 4), r"targets: expected probabilities, .*, got -0.5 at \[0, 1\]"),
        (cross_entropy, rows(*[[NAN, 0, 1]] * 4), r"targets: expected probabilities, .*, got nan at \[0, 0\]"),
        (binary_cross_entropy, np.array([[-1, 1, 1]] * 4), CHANCES + r"-1 at \[0, 0\]"),
        (binary_cross_entropy, np.array([[0, 1, 255]] * 4, np.uint8), CHANCES + r"255 at \[0, 2\]"),
        (binary_cross_entropy, rows(*[[0, 1, NAN]] * 4), CHANCES + r"nan at \[0, 2\]"),
        (binary_accuracy, rows(*[[0, 1.5, 1]] * 4), CHANCES + r"1.5 at \[0, 1\]"),
        (squared_error, rows(*[[0, NAN, 1]] * 4), r"targets: expected finite numbers, got nan at \[0, 1\]"),
        (squared_error, rows(*[[0, 1, -INF]] * 4), r"targets: expected finite numbers, got -inf at \[0, 2\]"),
    ],
)
def test_what_no_error_can_be_taken_of_is_refused_before_the_first_step(error, targets, message):
    with pytest.raises(ValueError, match=message):
        check(HEAD, error, targets)


@pytest.mark.parametrize(
    ("error", "targets"),
    [
        (cross_entropy, np.array([0, 1, 2, 1], np.int8)),
        (cross_entropy, rows(*[[0.9, 0.05, 0.05]] * 2, *[[0.33, 0.33, 0.33]] * 2)),  # smoothed labels, rounded ones
        (cross_entropy, jax.nn.softmax(jnp.arange(12, dtype=jnp.bfloat16).reshape(4, 3))),
        (binary_cross_entropy, np.array([[True, False, True]] * 4)),
        (binary_cross_entropy, np.array([[0.1, 0.9, 1]] * 4)),
        (squared_error, np.array([[0, -7, 300]] * 4)),
        (squared_error, jnp.ones((4, 3), jnp.bfloat16)),
    ],
)
def test_what_an_error_can_be_taken_of_is_taken(error, targets):
    with pytest.raises(AssertionError, match="a step was taken"):
        check(HEAD, error, targets)


def test_padding_is_not_looked_at():
    mask = np.array([[False, True, True], [True, True, True], [False] * 3, [True, False, True]])
    classes = np.where(mask, 2, -100)
    with pytest.raises(AssertionError, match="a step was taken"):
        check(TAGGER, cross_entropy, classes, mask=mask)
    with pytest.raises(AssertionError, match="a step was taken"):
        check(TAGGER, squared_error, np.where(mask[..., None], rows(1, 2, 3), NAN), mask=mask)
    lengths = np.array([3, 1, 0, 2])
    classes = np.where(np.arange(3) < lengths[:, None], 2, 9)
    with pytest.raises(AssertionError, match="a step was taken"):
        check(TAGGER, cross_entropy, classes, lengths=lengths)
    classes[3, 1] = 7
    with pytest.raises(ValueError, match=CLASSES + r"7 at \[3, 1\]"):
        check(TAGGER, cross_entropy, classes, lengths=lengths)
    # A row without a step still has an output where time ends, and so a target.
    with pytest.raises(ValueError, match=CLASSES + r"-1 at \[2\]"):
        check(HEAD, cross_entropy, np.array([0, 1, -1, 1]), lengths=lengths)


def test_metrics_check_their_targets_too_and_errors_of_the_user_none():
    def own(ys, targets, mask):
        return cross_entropy(ys, jnp.maximum(targets, 0), mask)

    loss = make_loss(HEAD, own)
    targets = np.array([0, 1, -1, 2])
    assert np.isfinite(evaluate(loss, HEAD.init(KEY), (XS, targets), batch_size=4)["loss"])
    with pytest.raises(ValueError, match=CLASSES + "-1"):
        evaluate(make_loss(HEAD, own, metrics={"accuracy": accuracy}), HEAD.init(KEY), (XS, targets), batch_size=4)


@pytest.mark.parametrize("kind", ["arrays", "list", "iterable", "source", "validation", "evaluate"])
def test_every_kind_of_data_is_checked(kind):
    good, bad = np.array([0, 1, 2, 1]), np.array([0, 1, 2, 3])
    loss, params = make_loss(HEAD, cross_entropy), HEAD.init(KEY)
    data = {
        "arrays": (XS, bad),
        "list": [(XS, good), (XS, bad)],
        "iterable": iter([(XS, good), (XS, bad)]),
        "source": Buckets(list(XS), bad, 4, key=KEY),
    }.get(kind, (XS, good))
    words = f"{'validation.' if kind == 'validation' else ''}targets: expected classes 0 to 2, got 3"

    def run():
        if kind == "evaluate":
            return evaluate(loss, params, (XS, bad), batch_size=2)
        validation = (XS, bad) if kind == "validation" else None
        state = train_state(params, SGD, KEY)
        return fit(loss, state, data, optimizer=SGD, epochs=1, batch_size=4, key=KEY, validation=validation)

    with pytest.raises(ValueError, match=f"^{words}"):
        run()


def test_streams_of_tokens_that_are_no_class():
    model = Stack((Linear(2, 3),))
    source = Streams(XS[0], np.array([0, 1, 5]), streams=1, window=2)
    state = train_state(model.init(KEY), SGD, KEY, carry=model.initial_carry(model.init(KEY), (1,)))
    with pytest.raises(ValueError, match=CLASSES + "5"):
        fit(make_truncated_loss(model, cross_entropy), state, source, optimizer=SGD, epochs=1)


def test_a_model_that_does_not_say_its_size_still_refuses_negative_classes():
    model = Stack((HEAD, Apply(lambda x: x[..., :2])))
    assert model.output_size is None
    with pytest.raises(ValueError, match=r"expected classes 0 to C − 1, got -1"):
        check(model, cross_entropy, np.array([0, 1, -1, 1]))


def test_all_classes_of_a_small_integer_count():
    """The number 256 does not exist in uint8, in which bytes come."""
    logits = jax.random.normal(KEY, (5, 256))
    targets = np.array([0, 1, 127, 128, 255])
    want = cross_entropy(logits, targets)
    assert np.isfinite(want.value)
    assert cross_entropy(logits, targets.astype(np.uint8)) == want
    low = np.minimum(targets, 127)
    assert cross_entropy(logits, low.astype(np.int8)) == cross_entropy(logits, low)
    assert cross_entropy(logits, targets > 0) == cross_entropy(logits, (targets > 0).astype(int))
    assert accuracy(logits, logits.argmax(-1).astype(np.uint8)).value == 1


def test_what_is_no_target_gives_nan_where_values_are_not_known():
    """In a step that is jitted by hand; and it is no NaN of a right computation, which `jax_debug_nans` looks for."""
    logits = rows(0, 1, 2, 3)
    for targets in (np.array([-1, 1, 1, -1]), np.array([0, 1, 255, 0], np.uint8), rows(0, 1, 1.5, 1)):
        assert np.isnan(jax.jit(binary_cross_entropy)(logits, targets).value)
        masked = binary_cross_entropy(logits, targets, (targets == 0) | (targets == 1))
        assert np.isfinite(masked.value)
    with jax.debug_nans(True):
        for dtype in (bool, np.uint8, jnp.bfloat16):
            assert np.isfinite(binary_cross_entropy(logits, jnp.array([0, 1, 0, 1], dtype)).value)
        assert np.isfinite(cross_entropy(np.eye(4, dtype=np.float32), np.arange(4)).value)
    rounded = rows(1 + 1e-6, -1e-7, 1, 0)
    assert np.isfinite(binary_cross_entropy(logits, rounded).value)
    model = Stack((HEAD, Linear(3, 1)))
    assert np.isfinite(
        evaluate(make_loss(model, binary_cross_entropy), model.init(KEY), (XS, rounded), batch_size=4)["loss"]
    )


def test_trees_of_targets_are_for_errors_of_the_users_own():
    y, w = np.ones((4, 3), np.float32), rows(1, 0, 2, 1)
    loss = make_loss(HEAD, squared_error)
    with pytest.raises(TypeError, match="targets: expected one array, got tuple"):
        evaluate(loss, HEAD.init(KEY), Batch(XS, (y, w)), batch_size=4)
    with pytest.raises(TypeError, match="predictions: expected one array, got list"):
        squared_error([y, y], y)

    def weighted(ys, targets, mask):
        y, w = targets
        error = ((ys - y) ** 2).mean(-1) * w
        return squared_error(ys, y, mask)._replace(total=error.sum(), weight=w.sum())

    params = HEAD.init(KEY)
    given = evaluate(make_loss(HEAD, weighted), params, Batch(XS, (y, w)), batch_size=3)["loss"]
    assert given == pytest.approx(evaluate(loss, params, (XS[:1], y[:1]), batch_size=1)["loss"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cross_entropy(np.zeros((2, 3)), rows(0, 1)), TypeError, "targets: expected classes as integers, or"),
        (lambda: accuracy(np.zeros((2, 3)), rows(0, 1)), TypeError, "targets: expected classes as integers, or"),
        (lambda: cross_entropy(np.zeros((2, 3)), np.eye(2, 3, dtype=int)), ValueError, r"got int.* of shape \(2, 3\)"),
    ],
)
def test_classes_are_integers_and_probabilities_floating(call, error, message):
    with pytest.raises(error, match=message):
        call()
