"""Losses and metrics: their values, their weights, and padding that reaches nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import mostly_in_full

from jaxrnn import GRU, Linear, Pool, Stack
from jaxrnn.training import (
    Batch,
    Mean,
    absolute_error,
    accuracy,
    binary_accuracy,
    binary_cross_entropy,
    cross_entropy,
    make_loss,
    make_truncated_loss,
    mean,
    perplexity,
    squared_error,
)

X64 = True
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(5, 4, 3))
CLASSES = RNG.integers(0, 3, (5, 4))
MASK = np.arange(4) < np.array([4, 0, 2, 3, 1])[:, None]


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_cross_entropy_of_classes_and_of_probabilities():
    each = -np.take_along_axis(log_softmax(LOGITS), CLASSES[..., None], -1)[..., 0]
    np.testing.assert_allclose(cross_entropy(LOGITS, CLASSES).value, each.mean())
    np.testing.assert_allclose(cross_entropy(LOGITS, np.eye(3)[CLASSES]).value, each.mean())
    masked = cross_entropy(LOGITS, CLASSES, MASK)
    np.testing.assert_allclose(masked.total, each[MASK].sum())
    assert masked.weight == 10
    np.testing.assert_allclose(perplexity(LOGITS, CLASSES, MASK).value, np.exp(each[MASK].mean()))


def test_regression_and_binary():
    ys, targets = LOGITS[..., 0], LOGITS[..., 1]
    for predictions in (ys, ys[..., None]):
        np.testing.assert_allclose(squared_error(predictions, targets, MASK).value, ((ys - targets)[MASK] ** 2).mean())
        np.testing.assert_allclose(absolute_error(predictions, targets).value, abs(ys - targets).mean())
    np.testing.assert_allclose(squared_error(LOGITS, LOGITS * 2, MASK).value, (LOGITS[MASK] ** 2).mean())
    p, t = 1 / (1 + np.exp(-ys)), CLASSES > 0
    want = -np.where(t, np.log(p), np.log(1 - p))
    np.testing.assert_allclose(binary_cross_entropy(ys, t, MASK).value, want[MASK].mean())
    np.testing.assert_allclose(binary_accuracy(ys, t, MASK).value, ((ys > 0) == t)[MASK].mean())


def test_accuracy():
    right = LOGITS.argmax(-1) == CLASSES
    np.testing.assert_allclose(accuracy(LOGITS, CLASSES, MASK).value, right[MASK].mean())
    np.testing.assert_allclose(accuracy(LOGITS, np.eye(3)[CLASSES]).value, right.mean())


def test_nothing_of_the_padding_reaches_value_or_gradient():
    spoiled = np.where(MASK[..., None], LOGITS, np.nan)
    classes = np.where(MASK, CLASSES, -7)
    for loss, targets in ((cross_entropy, classes), (squared_error, np.where(MASK[..., None], LOGITS + 1, np.inf))):
        value, gradient = jax.value_and_grad(lambda ys: loss(ys, targets, MASK).value)(spoiled)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        assert not np.any(gradient[~MASK])
        assert np.any(gradient[MASK])


def test_an_impossible_class_is_not_counted_as_another():
    assert np.isnan(cross_entropy(LOGITS, CLASSES + 3).value)


def test_a_mean_of_nothing_is_zero():
    nothing = mean(jnp.ones((3, 0)), jnp.ones((3, 0), bool))
    assert (nothing.value, jax.grad(lambda x: Mean(x, 0.0).value)(1.0)) == (0, 0)


def test_low_precision_is_summed_in_float32():
    many = jnp.ones(3000, jnp.bfloat16)
    assert float(mean(many).total) == 3000
    assert squared_error(many, jnp.zeros(3000)).value.dtype != jnp.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_entropy(LOGITS, CLASSES[:4]), r"targets: expected classes of shape \(5, 4\)"),
        (lambda: cross_entropy(LOGITS, LOGITS[..., :2]), r"targets: expected shape \(5, 4, 3\)"),
        (lambda: squared_error(LOGITS[:, 0, :1], LOGITS[0, :, 0]), r"targets: expected shape \(5, 1\)"),
        (lambda: squared_error(LOGITS, LOGITS, MASK.T), r"mask: expected shape \(5, 4\)"),
        (lambda: make_loss(GRU(2, 3), squared_error, metrics={"loss": accuracy}), "metrics: the name 'loss'"),
    ],
)
def test_what_does_not_fit_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types_raise():
    with pytest.raises(TypeError, match="mask: expected bool"):
        squared_error(LOGITS, LOGITS, MASK.astype(int))
    with pytest.raises(TypeError, match="cell: expected a"):
        make_loss(GRU, squared_error)
    with pytest.raises(TypeError, match="batch: expected a Batch"):
        make_loss(GRU(2, 3), squared_error)(None, np.zeros((2, 2, 2)), None)


@pytest.mark.parametrize("ends_time", [False, True])
@pytest.mark.parametrize("by", mostly_in_full(["lengths", "mask"], "lengths"))
def test_a_padded_batch_is_its_sequences_one_by_one(by, ends_time):
    """Loss and gradients of the padded batch are those of the sequences alone, weighted by what they hold."""
    cell = Stack((Pool(GRU(2, 3)), Linear(3, 4))) if ends_time else Stack((GRU(2, 3), Linear(3, 4)))
    params = cell.init(jax.random.key(0), jnp.float64)
    lengths = np.array([5, 1, 3])
    xs = RNG.normal(size=(3, 5, 2))
    targets = RNG.integers(0, 4, 3 if ends_time else (3, 5))
    loss = make_loss(cell, cross_entropy)
    valid = np.arange(5) < lengths[:, None]
    padded = np.where(valid[..., None], xs, np.nan)
    batch = Batch(padded, targets, **({"lengths": lengths} if by == "lengths" else {"mask": valid}))
    value, gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, None)

    def alone(params):
        parts = []
        for k, n in enumerate(lengths):
            one = Batch(xs[k : k + 1, :n], targets[k : k + 1] if ends_time else targets[k : k + 1, :n])
            parts.append(loss(params, one, None)[1]["loss"])
        return sum(part.total for part in parts) / sum(part.weight for part in parts)

    want, want_gradient = jax.jit(jax.value_and_grad(alone))(params)
    np.testing.assert_allclose(value[0], want, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), gradient, want_gradient)


def test_a_truncated_loss_over_windows_is_the_whole_loss():
    """Values go on exactly from window to window; and one window of everything has the gradient of everything."""
    cell = Stack((GRU(2, 3), Linear(3, 1)))
    params = cell.init(jax.random.key(0), jnp.float64)
    xs, targets = RNG.normal(size=(4, 6, 2)), RNG.normal(size=(4, 6))
    whole = make_loss(cell, squared_error)
    windowed = make_truncated_loss(cell, squared_error)
    fresh = cell.initial_carry(params, (4,))
    value, gradient = jax.jit(jax.value_and_grad(whole, has_aux=True))(params, (xs, targets), None)
    one, one_gradient = jax.jit(jax.value_and_grad(windowed, has_aux=True))(params, fresh, (xs, targets), None)
    assert value[0] == one[0]
    jax.tree.map(np.testing.assert_array_equal, gradient, one_gradient)

    carry, parts = fresh, []
    for at in (slice(0, 2), slice(2, 6)):
        _, (carry, metrics) = windowed(params, carry, (xs[:, at], targets[:, at]), None)
        parts.append(metrics["loss"])
    total = jax.tree.map(lambda a, b: a + b, *parts)
    np.testing.assert_allclose(total.value, value[0], rtol=1e-12)
