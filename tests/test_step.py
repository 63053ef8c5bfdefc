"""One training step: what it computes, in parts, in low precision, for windows of a stream."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrnn import GRU, LSTM, Dropout, Linear, Stack
from jaxrnn.training import (
    Batch,
    make_eval,
    make_loss,
    make_step,
    make_truncated_loss,
    squared_error,
    train_state,
)

X64 = True
PROMOTION = "standard"  # Adam of Optax mixes dtypes
RNG = np.random.default_rng(1)
MODEL = Stack((GRU(2, 3), Linear(3, 1)))
PARAMS = MODEL.init(jax.random.key(0))
XS, TARGETS = RNG.normal(size=(6, 5, 2)).astype(np.float32), RNG.normal(size=(6, 5)).astype(np.float32)
LENGTHS = np.array([5, 0, 3, 1, 2, 4])


def wide(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)


def close(a, b, rtol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), a, b)


def test_a_step_is_gradient_and_update():
    loss, optimizer = make_loss(MODEL, squared_error), optax.adam(0.1)
    state = train_state(PARAMS, optimizer, jax.random.key(1))
    new, metrics = jax.jit(make_step(loss, optimizer))(state, Batch(XS, TARGETS, LENGTHS))
    (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS, Batch(XS, TARGETS, LENGTHS), None)
    updates, _ = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
    close(new.params, optax.apply_updates(PARAMS, updates), 1e-6)
    np.testing.assert_allclose(metrics["loss"].value, value, rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"].value, optax.tree.norm(gradient), rtol=1e-6)
    assert (new.step, new.carry, new.data) == (1, None, None)


def test_noise_depends_on_key_and_step():
    model = Stack((Dropout(0.5), Linear(2, 1)))
    optimizer = optax.sgd(0.0)
    step = jax.jit(make_step(make_loss(model, squared_error), optimizer))
    state = train_state(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    after, first = step(state, (XS, TARGETS))
    again = step(state, (XS, TARGETS))[1]
    second = step(after, (XS, TARGETS))[1]
    other = step(state._replace(key=jax.random.key(2)), (XS, TARGETS))[1]
    values = [float(metrics["loss"].value) for metrics in (first, again, second, other)]
    assert values[0] == values[1]
    assert len(set(values)) == 3


@pytest.mark.parametrize("truncated", [False, True])
def test_accumulation_is_the_whole_batch(truncated):
    """Parts of unequal weight, one of them empty but for one step: the gradient is that of the whole."""
    params = wide(PARAMS)
    batch = Batch(XS.astype(float), TARGETS.astype(float), LENGTHS)
    optimizer = optax.sgd(1.0)
    loss = (make_truncated_loss if truncated else make_loss)(MODEL, squared_error)
    carry = wide(MODEL.initial_carry(params, (6,))) if truncated else None
    states, metrics = [], []
    for parts in (1, 3):
        state = train_state(params, optimizer, jax.random.key(1), carry=carry)
        new, measured = jax.jit(make_step(loss, optimizer, accumulate=parts))(state, batch)
        states.append((new.params, new.carry))
        metrics.append({name: metric.value for name, metric in measured.items()})
    close(*states, 1e-12)
    close(*metrics, 1e-12)


def test_parts_that_do_not_divide_raise():
    optimizer = optax.sgd(1.0)
    state = train_state(PARAMS, optimizer, jax.random.key(1))
    with pytest.raises(ValueError, match="accumulate: 4 parts do not divide"):
        make_step(make_loss(MODEL, squared_error), optimizer, accumulate=4)(state, Batch(XS, TARGETS))
    with pytest.raises(ValueError, match="accumulate: expected at least 1"):
        make_step(make_loss(MODEL, squared_error), optimizer, accumulate=0)


def test_bfloat16_computes_narrow_and_keeps_wide():
    model = Stack((LSTM(2, 3), Linear(3, 1)))
    params = model.init(jax.random.key(0))
    optimizer = optax.adam(0.1)
    seen = []

    def loss(params, carry, batch, key):
        seen.append([leaf.dtype for leaf in jax.tree.leaves((params, batch.xs))])
        seen.append([leaf.dtype for leaf in (*jax.tree.leaves(carry), batch.targets)])
        return make_truncated_loss(model, squared_error)(params, carry, batch, key)

    state = train_state(params, optimizer, jax.random.key(1), carry=model.initial_carry(params, (6,)))
    step = jax.jit(make_step(loss, optimizer, compute_dtype=jnp.bfloat16))
    new, metrics = step(state, Batch(XS, TARGETS, LENGTHS))
    assert set(seen[0]) == {jnp.dtype(jnp.bfloat16)}
    assert set(seen[1]) == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves((new.params, new.carry))} == {jnp.dtype(jnp.float32)}
    full = jax.jit(make_step(loss, optimizer))(state, Batch(XS, TARGETS, LENGTHS))[1]
    np.testing.assert_allclose(metrics["loss"].value, full["loss"].value, rtol=0.02)
    assert metrics["loss"].value != full["loss"].value


def test_windows_cut_gradients_and_hand_the_carry_on():
    """The second window's gradient is that of its loss with the carry as a constant."""
    params = wide(PARAMS)
    optimizer = optax.sgd(1.0)
    loss = make_truncated_loss(MODEL, squared_error)
    step = jax.jit(make_step(loss, optimizer))
    state = train_state(params, optimizer, jax.random.key(1), carry=wide(MODEL.initial_carry(params, (6,))))
    xs, targets = XS.astype(float), TARGETS.astype(float)
    state, _ = step(state, Batch(xs[:, :2], targets[:, :2]))
    before = state.params, state.carry
    state, _ = step(state, Batch(xs[:, 2:], targets[:, 2:]))
    gradient = jax.jit(jax.grad(lambda p: loss(p, before[1], Batch(xs[:, 2:], targets[:, 2:]), None)[0]))(before[0])
    close(state.params, jax.tree.map(lambda p, g: p - g, before[0], gradient), 1e-12)


def test_metrics_may_be_scalars_and_the_optimizer_may_want_the_value():
    def loss(params, batch, key):
        return (params["w"] * batch).sum(), {"count": 3}

    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
    state = train_state({"w": jnp.ones(2)}, optimizer, jax.random.key(0))
    state, metrics = make_step(loss, optimizer)(state, jnp.ones(2))
    assert metrics["count"].value == 3
    assert metrics["loss"].value == 2


def test_evaluation_is_without_noise():
    model = Stack((Dropout(0.5), Linear(2, 1)))
    params = model.init(jax.random.key(0))
    evaluate = make_eval(make_loss(model, squared_error))
    carry, metrics = evaluate(params, None, Batch(XS, TARGETS, LENGTHS))
    assert carry is None
    want = make_loss(model, squared_error)(params, Batch(XS, TARGETS, LENGTHS), None)[0]
    assert metrics["loss"].value == want
