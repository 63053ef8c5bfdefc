"""The cells whose state is a matrix, against NumPy oracles in float64 written from the papers, head by head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import sigmoid

import jaxrnn
from jaxrnn import GLA, DeltaNet, GatedDeltaNet

X64 = True
T, B, D, HEADS, K, V = 5, 3, 4, 2, 3, 6


def split(row, *sizes):
    return np.split(row, np.cumsum(sizes)[:-1])


def unit(x):
    return x / np.sqrt(np.sum(x**2) + 1e-6)


def softplus(x):
    return np.logaddexp(0, x)


def delta_net(params, s, x, negative_eigenvalues=False):
    """Yang et al. 2024, equation 1, of one row."""
    q, k, v, b = split(x @ params.w_x, HEADS * K, HEADS * K, HEADS * V, HEADS)
    new, ys = [], []
    for h in range(HEADS):
        key, query = unit(k[h * K : (h + 1) * K]), unit(q[h * K : (h + 1) * K]) / np.sqrt(K)
        beta = sigmoid(b[h]) * (1 + negative_eigenvalues)
        state = (np.eye(K) - beta * np.outer(key, key)) @ s[h] + beta * np.outer(key, v[h * V : (h + 1) * V])
        new.append(state)
        ys.append(state.T @ query)
    return np.array(new), np.concatenate(ys), {"beta": sigmoid(b) * (1 + negative_eigenvalues)}


def gated_delta_net(params, s, x, negative_eigenvalues=False):
    """Yang et al. 2024, gated, equation 10."""
    q, k, v, b, step = split(x @ params.w_x, HEADS * K, HEADS * K, HEADS * V, HEADS, HEADS)
    beta = sigmoid(b) * (1 + negative_eigenvalues)
    a = np.exp(-np.exp(params.log_decay) * softplus(step + params.b_step))
    new, ys = [], []
    for h in range(HEADS):
        key, query = unit(k[h * K : (h + 1) * K]), unit(q[h * K : (h + 1) * K]) / np.sqrt(K)
        transition = a[h] * (np.eye(K) - beta[h] * np.outer(key, key))
        state = transition @ s[h] + beta[h] * np.outer(key, v[h * V : (h + 1) * V])
        new.append(state)
        ys.append(state.T @ query)
    return np.array(new), np.concatenate(ys), {"beta": beta, "a": a}


def gla(params, s, x):
    """Yang et al. 2023, equation 3, and the gate of section 4.4."""
    rank = params.w_gate.shape[0]
    q, k, v, low = split(x @ params.w_x, HEADS * K, HEADS * K, HEADS * V, rank)
    a = (sigmoid(low @ params.w_gate + params.b_gate) ** (1 / 16)).reshape(HEADS, K)
    new, ys = [], []
    for h in range(HEADS):
        state = np.diag(a[h]) @ s[h] + np.outer(k[h * K : (h + 1) * K], v[h * V : (h + 1) * V])
        new.append(state)
        ys.append(state.T @ q[h * K : (h + 1) * K] / np.sqrt(K))
    return np.array(new), np.concatenate(ys), {"a": a}


SIZES = {"heads": HEADS, "key_size": K, "value_size": V}
CASES = {
    "DeltaNet": (DeltaNet(D, **SIZES), delta_net, jaxrnn.delta_net_step),
    "DeltaNet negative": (DeltaNet(D, **SIZES, negative_eigenvalues=True), delta_net, jaxrnn.delta_net_step),
    "GatedDeltaNet": (GatedDeltaNet(D, **SIZES), gated_delta_net, jaxrnn.gated_delta_net_step),
    "GatedDeltaNet negative": (
        GatedDeltaNet(D, **SIZES, negative_eigenvalues=True),
        gated_delta_net,
        jaxrnn.gated_delta_net_step,
    ),
    "GLA": (GLA(D, **SIZES, rank=2), gla, jaxrnn.gla_step),
}
every_case = pytest.mark.parametrize(("cell", "oracle", "free"), CASES.values(), ids=CASES)


def options(cell):
    return {"negative_eigenvalues": True} if getattr(cell, "negative_eigenvalues", False) else {}


def problem(cell, seed=0):
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), jax.eval_shape(cell.init, jax.random.key(0)))
    return params, rng.normal(size=(B, HEADS, K, V)), rng.normal(size=(T, B, D))


def unroll(cell, oracle, params, s, xs):
    """(the last state, ys) row by row."""
    s, ys = np.array(s), np.zeros((*xs.shape[:2], HEADS * V))
    for t, b in np.ndindex(*xs.shape[:2]):
        s[b], ys[t, b], _ = oracle(params, s[b], xs[t, b], **options(cell))
    return s, ys


def carry_of(cell, s):
    return type(cell.initial_carry(cell.init(jax.random.key(0))))(jnp.asarray(s))


close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)


@every_case
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_scan_is_the_oracle(cell, oracle, free, implementation):
    params, s, xs = problem(cell)
    carry, ys = jaxrnn.scan(cell, params, carry_of(cell, s), jnp.asarray(xs), implementation=implementation)
    last, expected = unroll(cell, oracle, params, s, xs)
    close(carry.s, last)
    close(ys, expected)


@every_case
def test_a_step_its_gates_and_the_free_function_are_the_oracle(cell, oracle, free):
    params, s, xs = problem(cell)
    found = [oracle(params, s[b], xs[0, b], **options(cell)) for b in range(B)]
    params = jax.tree.map(jnp.asarray, params)
    for step in (functools.partial(free, **options(cell)), cell.step, functools.partial(jaxrnn.step, cell)):
        carry, y = step(params, carry_of(cell, s), jnp.asarray(xs[0]))
        close(carry.s, [each[0] for each in found])
        close(y, [each[1] for each in found])
    for name, values in cell.gates(params, carry_of(cell, s), jnp.asarray(xs[0]))._asdict().items():
        close(values, [each[2][name] for each in found])


@every_case
def test_gradients_are_finite_differences_of_the_oracle(cell, oracle, free):
    params, s, xs = problem(cell)
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(B, HEADS, K, V)), rng.normal(size=(T, B, HEADS * V))

    def loss(params, s, xs):
        carry, ys = jaxrnn.scan(cell, params, carry_of(cell, s), xs)
        return (weights[0] * carry.s).sum() + (weights[1] * ys).sum()

    def expected(params, s, xs):
        return sum((w * each).sum() for w, each in zip(weights, unroll(cell, oracle, params, s, xs), strict=True))

    gradient = jax.grad(loss, argnums=(0, 1, 2))(*jax.tree.map(jnp.asarray, (params, s, xs)))
    for _ in range(4):
        along = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), (params, s, xs))
        low, high = (
            expected(*jax.tree.map(lambda x, d, e=e: x + e * d, (params, s, xs), along)) for e in (-1e-6, 1e-6)
        )
        found = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, along)), strict=True))
        np.testing.assert_allclose(found, (high - low) / 2e-6, rtol=1e-6)


@every_case
def test_ten_thousand_steps(cell, oracle, free):
    """Step by step as the whole: 1e-4 of the largest y in float32, 1e-9 in float64."""
    for dtype, bound in ((jnp.float32, 1e-4), (jnp.float64, 1e-9)):
        params = cell.init(jax.random.key(0), dtype)
        xs = jax.random.normal(jax.random.key(1), (10_000, D), dtype)
        carry = cell.initial_carry(params)
        last, whole = jaxrnn.scan(cell, params, carry, xs)

        def body(carry, x, params=params):
            return cell.step(params, carry, x)

        carry, ys = jax.jit(lambda carry, xs: jax.lax.scan(body, carry, xs))(carry, xs)
        largest = np.abs(ys).max()
        np.testing.assert_allclose(whole, ys, rtol=0, atol=bound * largest)
        np.testing.assert_allclose(last.s, carry.s, rtol=0, atol=bound * np.abs(carry.s).max())


def test_initial_weights():
    params = jaxrnn.gated_delta_net_init(jax.random.key(0), 8, 4000, 1, 1, step_min=1e-2, step_max=0.5)
    step = softplus(np.asarray(params.b_step))
    low, high = np.log(1e-2), np.log(0.5)
    np.testing.assert_allclose(np.quantile(np.log(step), [0, 0.5, 1]), [low, (low + high) / 2, high], atol=0.15)
    np.testing.assert_allclose(np.quantile(np.exp(params.log_decay), [0, 0.5, 1]), [0.01, 8, 16], atol=0.5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GatedDeltaNet(0, **SIZES), "GatedDeltaNet.input_size: expected at least 1, got 0"),
        (lambda: DeltaNet(D, 2, 0, 4), "DeltaNet.key_size: expected at least 1, got 0"),
        (lambda: GLA(D, **SIZES, rank=0), "GLA.rank: expected at least 1, got 0"),
        (lambda: GatedDeltaNet(D, **SIZES, step_min=0.2), "GatedDeltaNet.step_min: expected at most step_max, 0.1"),
        (
            lambda: jaxrnn.gla_step(
                GLA(D, **SIZES).init(jax.random.key(0)), jaxrnn.GLACarry(jnp.zeros((3, K, V))), jnp.ones(D)
            ),
            "params.w_x: gla_init.* expects shape",
        ),
    ],
)
def test_what_does_not_fit_raises(make, words):
    with pytest.raises(ValueError, match=words):
        make()
