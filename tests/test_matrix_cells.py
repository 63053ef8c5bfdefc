"""The cells whose state is a matrix, against NumPy oracles in float64 written from the papers, head by head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import sigmoid
from tiers import in_full, mostly_in_full

import jaxrnn
from jaxrnn import GLA, HGRN2, KDA, MLSTM, RWKV7, DeltaNet, GatedDeltaNet, LinearAttention, Mamba2, RetNet

X64 = True
T, B, D, HEADS, K, V = 5, 3, 4, 2, 3, 6


def split(row, *sizes):
    assert row.size == sum(sizes)
    return np.split(row, np.cumsum(sizes)[:-1])


def unit(x):
    return x / np.sqrt(np.sum(x**2) + 1e-6)


def softplus(x):
    return np.logaddexp(0, x)


def features(params, x):
    return x if params.w_x is None else x @ params.w_x


def by_head(cell, *parts):
    return [part.reshape(cell.heads, -1) for part in parts]


def attention(cell, params, x):
    keys = cell.heads * cell.key_size
    return by_head(cell, *split(x @ params.w_x, keys, keys, cell.heads * cell.value_size))


# One step of one row: (the carry, y, the gates).


def delta(cell, s, x, decay, extra):
    """Yang et al. 2024, equation 1; gated, equation 10; Siems et al. 2025, equation 4."""
    heads, n, key_heads = cell.heads, cell.products, cell.key_heads or cell.heads
    keys, values = key_heads * cell.key_size, heads * cell.value_size
    q, k, v, b, left = split(x, keys, n * keys, n * values, n * heads, extra)
    q = q.reshape(key_heads, -1)
    k, v, b = k.reshape(n, key_heads, -1), v.reshape(n, heads, -1), b.reshape(n, heads)
    beta = sigmoid(b) * (1 + cell.negative_eigenvalues)
    new, ys = [], []
    for h in range(heads):
        own = h * key_heads // heads
        state = np.diag(decay(left, h)) @ s[h]
        for j in range(n):
            key = unit(k[j, own])
            state = (np.eye(cell.key_size) - beta[j, h] * np.outer(key, key)) @ state
            state = state + beta[j, h] * np.outer(key, v[j, h])
        new.append(state)
        ys.append(state.T @ unit(q[own]) / np.sqrt(cell.key_size))
    return np.array(new), np.concatenate(ys), beta.ravel()


def delta_net(cell, params, carry, x):
    s, y, beta = delta(cell, carry.s, features(params, x), lambda left, h: np.ones(cell.key_size), 0)
    return carry._replace(s=s), y, {"beta": beta}


def gated_delta_net(cell, params, carry, x):
    x = features(params, x)
    a = np.exp(-np.exp(params.log_decay) * softplus(x[-cell.heads :] + params.b_step))
    s, y, beta = delta(cell, carry.s, x, lambda left, h: np.full(cell.key_size, a[h]), cell.heads)
    return carry._replace(s=s), y, {"beta": beta, "a": a}


def kda(cell, params, carry, x):
    """Kimi Team 2025, equation 1, and the gate of section 3.1."""
    x, rest = features(params, x), cell.heads * cell.key_size
    if params.w_gate is not None:
        rest = params.w_gate.shape[0]
        gate = x[-rest:] @ params.w_gate
    else:
        gate = x[-rest:]
    gate = (gate + params.b_gate).reshape(cell.heads, -1)
    rate = np.exp(params.log_decay)[:, None]
    a = np.exp(-rate * softplus(gate) if cell.bound is None else cell.bound * sigmoid(rate * gate))
    cell = DeltaNet(1, cell.heads, cell.key_size, cell.value_size, cell.negative_eigenvalues)
    s, y, beta = delta(cell, carry.s, x, lambda left, h: a[h], rest)
    return carry._replace(s=s), y, {"beta": beta, "a": a}


def gla(cell, params, carry, x):
    """Yang et al. 2023, equation 3, and the gate of section 4.4."""
    low = (x @ params.w_x)[-cell.rank :]
    a = (sigmoid(low @ params.w_gate + params.b_gate) ** (1 / 16)).reshape(cell.heads, -1)
    q, k, v = attention(cell, params._replace(w_x=params.w_x[:, : -cell.rank]), x)
    s = np.array([np.diag(a[h]) @ carry.s[h] + np.outer(k[h], v[h]) for h in range(cell.heads)])
    y = np.concatenate([s[h].T @ q[h] for h in range(cell.heads)]) / np.sqrt(cell.key_size)
    return carry._replace(s=s), y, {"a": a}


def hgrn2(cell, params, carry, x):
    """Qin et al. 2024, equation 8."""
    q, f, v = attention(cell, params, x)
    f = cell.lower_bound + (1 - cell.lower_bound) * sigmoid(f)
    s = np.array([np.diag(f[h]) @ carry.s[h] + np.outer(1 - f[h], v[h]) for h in range(cell.heads)])
    return carry._replace(s=s), np.concatenate([s[h].T @ (q * sigmoid(q))[h] for h in range(cell.heads)]), {"f": f}


MAPS = {
    "elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
    "relu": lambda x: np.maximum(x, 0),
    "exp": np.exp,
    "linear": lambda x: x,
}


def linear_attention(cell, params, carry, x):
    """Katharopoulos et al. 2020, equations 16 to 20."""
    q, k, v = attention(cell, params, x)
    q, k = MAPS[cell.feature_map](q) / np.sqrt(cell.key_size), MAPS[cell.feature_map](k)
    normalized = cell.feature_map != "linear" if cell.normalized is None else cell.normalized
    new, ys = [], []
    for h in range(cell.heads):
        s = carry.s[h][:, : cell.value_size] + np.outer(k[h], v[h])
        y = s.T @ q[h]
        if normalized:
            z = carry.s[h][:, -1] + k[h]
            s, y = np.column_stack([s, z]), y / (z @ q[h] + 1e-6)
        new.append(s)
        ys.append(y)
    return carry._replace(s=np.array(new)), np.concatenate(ys), {}


def ret_net(cell, params, carry, x):
    """Sun et al. 2023, equations 6 and 8; the rotation as a product of complex numbers."""
    q, k, v = attention(cell, params, x)

    def turned(each):
        half = cell.key_size // 2
        angle = carry.position * 10000.0 ** (-np.arange(half) / half)
        pairs = (each[:half] + 1j * each[half:]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag])

    new, ys = [], []
    for h in range(cell.heads):
        key, query = (turned(each[h]) if cell.rotary else each[h] for each in (k, q))
        new.append((1 - 2.0 ** (-5 - h)) * carry.s[h] + np.outer(key, v[h]))
        ys.append(new[-1].T @ query / np.sqrt(cell.key_size))
    position = carry.position + 1 if cell.rotary else None
    return carry._replace(s=np.array(new), position=position), np.concatenate(ys), {}


def mamba2(cell, params, carry, x):
    """Dao & Gu 2024, section 7: h' = exp(Δ A) h + Δ B xᵀ."""
    keys = cell.key_heads * cell.key_size
    c, b, v, step = split(features(params, x), keys, keys, cell.heads * cell.value_size, cell.heads)
    c, b, v = c.reshape(cell.key_heads, -1), b.reshape(cell.key_heads, -1), v.reshape(cell.heads, -1)
    step = softplus(step + params.b_step)
    a = np.exp(-np.exp(params.log_decay) * step)
    new, ys = [], []
    for h in range(cell.heads):
        own = h * cell.key_heads // cell.heads
        new.append(a[h] * carry.s[h] + np.outer(b[own], step[h] * v[h]))
        ys.append(new[-1].T @ c[own] + params.d[h] * v[h])
    return carry._replace(s=np.array(new)), np.concatenate(ys), {"step": step, "a": a}


def mlstm(cell, params, carry, x):
    """Beck et al. 2024, equations 19 to 27, with C and n themselves; the soft cap of Beck et al. 2025."""
    q, k, v = attention(cell, params, x)
    gates = x @ params.w_gates + params.b_gates
    if cell.soft_cap:
        gates = cell.soft_cap * np.tanh(gates / cell.soft_cap)
    log_i, log_f = gates[: cell.heads], -softplus(-gates[cell.heads :])
    exponential = cell.input_gate == "exponential"
    log_i = log_i if exponential else -softplus(-log_i)
    new, stabilizers, ys = [], [], []
    for h in range(cell.heads):
        values = np.append(v[h], 1) if exponential else v[h]
        before = carry.s[h] * (np.exp(carry.m[h]) if exponential else 1)
        state = np.exp(log_f[h]) * before + np.exp(log_i[h]) * np.outer(k[h], values)
        read = state.T @ q[h] / np.sqrt(cell.key_size)
        if exponential:
            m = max(log_f[h] + carry.m[h], log_i[h])
            stabilizers.append(m)
            state, read = state * np.exp(-m), read[:-1] / (max(abs(read[-1]), 1) + 1e-6 * np.exp(m))
        new.append(state)
        ys.append(read)
    m = np.array(stabilizers) if exponential else None
    return carry._replace(s=np.array(new), m=m), np.concatenate(ys), {"log_i": log_i, "log_f": log_f}


def rwkv7(cell, params, carry, x):
    """Peng et al. 2025, equations 4 to 17."""
    keys = cell.heads * cell.key_size
    rest = keys if params.w_decay is None else params.w_decay.shape[0]
    r, k, v, decay, rate = split(features(params, x), keys, keys, cell.heads * cell.value_size, rest, rest)
    if params.w_decay is not None:
        decay, rate = np.tanh(decay) @ params.w_decay, rate @ params.w_rate
    a = np.exp(-np.exp(-0.5) * sigmoid(decay + params.b_decay))
    rate = sigmoid(rate + params.b_rate)
    removed, written = params.removal * k, k * (1 + (rate - 1) * params.replacement)
    r, v, a, rate, removed, written, bonus, scale, offset = by_head(
        cell, r, v, a, rate, removed, written, params.bonus, params.scale, params.offset
    )
    new, ys = [], []
    for h in range(cell.heads):
        key = removed[h] / max(np.linalg.norm(removed[h]), 1e-12)
        transition = np.diag(a[h]) - np.outer(rate[h] * key, key)
        new.append(transition @ carry.s[h] + np.outer(written[h], v[h]))
        y = new[-1].T @ r[h]
        y = (y - y.mean()) / np.sqrt(y.var() + 1e-5 * cell.value_size) * scale[h] + offset[h]
        ys.append(y + (r[h] * written[h] * bonus[h]).sum() * v[h])
    return carry._replace(s=np.array(new)), np.concatenate(ys), {"a": a, "rate": rate}


SIZES = {"heads": HEADS, "key_size": K, "value_size": V}
SHARED = {"heads": 4, "key_size": K, "value_size": 5}  # heads of values
CASES = {
    "DeltaNet": (DeltaNet(D, **SIZES), delta_net),
    "DeltaNet negative": (DeltaNet(D, **SIZES, negative_eigenvalues=True), delta_net),
    "DeltaNet products": (DeltaNet(D, **SHARED, negative_eigenvalues=True, products=3, key_heads=2), delta_net),
    "DeltaNet given": (DeltaNet(20, **SIZES, products=1, project=False, key_heads=1), delta_net),
    "GatedDeltaNet": (GatedDeltaNet(D, **SIZES), gated_delta_net),
    "GatedDeltaNet negative": (GatedDeltaNet(D, **SIZES, negative_eigenvalues=True), gated_delta_net),
    "GatedDeltaNet shared": (GatedDeltaNet(D, **SHARED, key_heads=2), gated_delta_net),
    "GatedDeltaNet products": (GatedDeltaNet(D, **SIZES, products=2, key_heads=1), gated_delta_net),
    "GatedDeltaNet given": (GatedDeltaNet(28, **SIZES, project=False), gated_delta_net),
    "GLA": (GLA(D, **SIZES, rank=2), gla),
    "HGRN2": (HGRN2(D, **SIZES), hgrn2),
    "HGRN2 bounded": (HGRN2(D, **SIZES, lower_bound=0.7), hgrn2),
    "KDA": (KDA(D, **SIZES, rank=5), kda),
    "KDA bounded": (KDA(D, **SIZES, bound=-5.0, negative_eigenvalues=True), kda),
    "KDA given": (KDA(32, **SIZES, project=False), kda),
    "LinearAttention": (LinearAttention(D, **SIZES), linear_attention),
    "LinearAttention exp": (LinearAttention(D, **SIZES, feature_map="exp"), linear_attention),
    "LinearAttention relu": (LinearAttention(D, **SIZES, feature_map="relu", normalized=False), linear_attention),
    "LinearAttention linear": (LinearAttention(D, **SIZES, feature_map="linear"), linear_attention),
    "Mamba2": (Mamba2(D, **SIZES), mamba2),
    "Mamba2 shared": (Mamba2(D, **SHARED, key_heads=2), mamba2),
    "Mamba2 given": (Mamba2(20, **SIZES, project=False), mamba2),
    "MLSTM": (MLSTM(D, **SIZES), mlstm),
    "MLSTM sigmoid": (MLSTM(D, **SIZES, input_gate="sigmoid", soft_cap=None), mlstm),
    "RetNet": (RetNet(D, 2, 4, 5), ret_net),
    "RetNet still": (RetNet(D, **SIZES, rotary=False), ret_net),
    "RWKV7": (RWKV7(D, **SIZES, rank=5), rwkv7),
    "RWKV7 given": (RWKV7(36, **SIZES, project=False), rwkv7),
}
FAST = {
    "DeltaNet products",
    "GatedDeltaNet shared",
    "GLA",
    "KDA",
    "LinearAttention",
    "Mamba2",
    "MLSTM",
    "RetNet",
    "RWKV7",
}
every_case = pytest.mark.parametrize(("cell", "oracle"), CASES.values(), ids=CASES)
every_case_mostly_in_full = pytest.mark.parametrize("name", mostly_in_full(list(CASES), *FAST))
one_case_fast = pytest.mark.parametrize("name", mostly_in_full(list(CASES), "MLSTM"))


def problem(cell, seed=0):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return rng.normal(size=leaf.shape)

    shapes = jax.eval_shape(cell.init, jax.random.key(0))
    carry = jax.eval_shape(lambda: cell.initial_carry(cell.init(jax.random.key(0)), (B,)))
    params, carry = jax.tree.map(draw, (shapes, carry))
    if isinstance(cell, LinearAttention):  # whose normaliser is a sum of features, which are positive
        carry = carry._replace(s=np.abs(carry.s))
    return params, carry, rng.normal(size=(T, B, cell.input_size))


def unroll(cell, oracle, params, carry, xs):
    """(the last carry, ys) row by row."""
    ys = np.zeros((*xs.shape[:2], cell.output_size))
    rows = [jax.tree.map(lambda leaf, b=b: leaf[b], carry) for b in range(xs.shape[1])]
    for t, b in np.ndindex(*xs.shape[:2]):
        rows[b], ys[t, b], _ = oracle(cell, params, rows[b], xs[t, b])
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows), ys


def free_step(cell):
    """The function of a step, with the options of the cell."""
    wanted = f"{type(cell).__name__}step".lower()
    step = next(each for name, each in vars(jaxrnn).items() if name.replace("_", "") == wanted)
    taken = set(step.__kwdefaults__ or ())
    return functools.partial(step, **{option: getattr(cell, option) for option in taken})


close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)


def all_close(found, expected):
    jax.tree.map(close, found, expected)


@every_case_mostly_in_full
@pytest.mark.parametrize("implementation", [None, *in_full(["xla"])])
def test_scan_is_the_oracle(name, implementation):
    cell, oracle = CASES[name]
    params, carry, xs = problem(cell)
    found = jaxrnn.scan(cell, params, jax.tree.map(jnp.asarray, carry), jnp.asarray(xs), implementation=implementation)
    all_close(found, unroll(cell, oracle, params, carry, xs))


@every_case
def test_a_step_its_gates_and_the_free_function_are_the_oracle(cell, oracle):
    params, carry, xs = problem(cell)
    expected = [oracle(cell, params, jax.tree.map(lambda leaf, b=b: leaf[b], carry), xs[0, b]) for b in range(B)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *expected)
    params, carry, x = jax.tree.map(jnp.asarray, (params, carry, xs[0]))
    for step in (free_step(cell), cell.step, functools.partial(jaxrnn.step, cell)):
        all_close(step(params, carry, x), expected[:2])
    if expected[2]:
        all_close(cell.gates(params, carry, x)._asdict(), expected[2])


@one_case_fast
def test_gradients_are_finite_differences_of_the_oracle(name):
    cell, oracle = CASES[name]
    params, carry, xs = problem(cell)
    rng = np.random.default_rng(1)
    weights = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), (carry, np.zeros((T, B, cell.output_size))))

    def weighted(found):
        return sum((w * each).sum() for w, each in zip(*map(jax.tree.leaves, (weights, found)), strict=True))

    def loss(params, carry, xs):
        return weighted(jaxrnn.scan(cell, params, carry, xs))

    gradient = jax.grad(loss, argnums=(0, 1, 2))(*jax.tree.map(jnp.asarray, (params, carry, xs)))
    for _ in range(4):
        along = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), (params, carry, xs))
        low, high = (
            weighted(unroll(cell, oracle, *jax.tree.map(lambda x, d, e=e: x + e * d, (params, carry, xs), along)))
            for e in (-1e-6, 1e-6)
        )
        found = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, along)), strict=True))
        np.testing.assert_allclose(found, (high - low) / 2e-6, rtol=1e-5)


@every_case_mostly_in_full
@pytest.mark.parametrize("reverse", [*in_full([False]), True])
def test_masks_resets_and_directions_are_a_loop_of_steps(name, reverse):
    cell, _ = CASES[name]
    params, carry, xs = jax.tree.map(jnp.asarray, problem(cell))
    rng = np.random.default_rng(2)
    mask, reset = rng.random((T, B)) < 0.7, rng.random((T, B)) < 0.3
    found, ys = jaxrnn.scan(cell, params, carry, xs, mask=mask, reset=reset, reverse=reverse)
    fresh = cell.initial_carry(params, (B,))

    def where(flag, on, off):
        return jax.tree.map(lambda a, b: jnp.where(flag.reshape((B,) + (1,) * (a.ndim - 1)), a, b), on, off)

    due = np.zeros(B, bool)  # whether a boundary lies between the last valid step and the next
    for t in reversed(range(T)) if reverse else range(T):
        start = due if reverse else reset[t]
        new, y = cell.step(params, where(start, fresh, carry), xs[t])
        carry = where(mask[t], new, carry)
        due = np.where(mask[t], reset[t], due)
        close(ys[t], np.where(mask[t][:, None], y, 0))
    all_close(found, carry)


@pytest.mark.parametrize("name", mostly_in_full(list(CASES), "KDA"))
def test_a_learned_start_gets_its_gradient(name):
    """By the kernel, whose results lie in memory that was used before, as by the loop in float64."""
    cell, _ = CASES[name]
    params, carry, xs = problem(cell)
    layer = jaxrnn.LearnedCarry(cell)
    params = jaxrnn.LearnedCarryParams(params, jax.tree.map(lambda leaf: leaf[0], carry))
    reset = np.random.default_rng(2).random((T, B)) < 0.3

    @jax.jit
    def gradient(params, xs):
        return jax.grad(lambda params: (jaxrnn.scan(layer, params, None, xs, reset=reset)[1] ** 2).sum())(params)

    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, xs))
    for found, wanted in zip(*map(jax.tree.leaves, (gradient(*single), gradient(params, xs))), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("name", mostly_in_full(list(CASES), "RWKV7"))
def test_ten_thousand_steps(name):
    """Step by step as the whole: 1e-4 of the largest y in float32, 1e-9 in float64."""
    cell, _ = CASES[name]
    for dtype, bound in ((jnp.float32, 1e-4), (jnp.float64, 1e-9)):
        params = cell.init(jax.random.key(0), dtype)
        xs = jax.random.normal(jax.random.key(1), (10_000, cell.input_size), dtype)
        carry = cell.initial_carry(params)
        last, whole = jaxrnn.scan(cell, params, carry, xs)

        def body(carry, x, params=params):
            return cell.step(params, carry, x)

        carry, ys = jax.jit(lambda carry, xs: jax.lax.scan(body, carry, xs))(carry, xs)
        np.testing.assert_allclose(whole, ys, rtol=0, atol=bound * np.abs(ys).max())
        for found, each in zip(*map(jax.tree.leaves, (last, carry)), strict=True):
            np.testing.assert_allclose(found, each, rtol=0, atol=bound * np.abs(each).max())


def test_initial_weights():
    params = jaxrnn.gated_delta_net_init(jax.random.key(0), 8, 4000, 1, 1, step_min=1e-2, step_max=0.5)
    step = softplus(np.asarray(params.b_step))
    low, high = np.log(1e-2), np.log(0.5)
    np.testing.assert_allclose(np.quantile(np.log(step), [0, 0.5, 1]), [low, (low + high) / 2, high], atol=0.15)
    np.testing.assert_allclose(np.quantile(np.exp(params.log_decay), [0, 0.5, 1]), [0.01, 8, 16], atol=0.5)


KEY, X = jax.random.key(0), np.ones((2, 9))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GatedDeltaNet(0, **SIZES), "GatedDeltaNet.input_size: expected at least 1, got 0"),
        (lambda: DeltaNet(D, 2, 0, 4), "DeltaNet.key_size: expected at least 1, got 0"),
        (lambda: GLA(D, **SIZES, rank=0), "GLA.rank: expected at least 1, got 0"),
        (lambda: DeltaNet(D, 3, 2, 4, key_heads=2), "DeltaNet.key_heads: expected a divisor of heads, 3, got 2"),
        (lambda: GatedDeltaNet(D, **SIZES, products=0), "GatedDeltaNet.products: expected at least 1, got 0"),
        (lambda: Mamba2(D, 3, 2, 4, key_heads=2), "Mamba2.key_heads: expected a divisor of heads, 3, got 2"),
        (lambda: KDA(D, **SIZES, bound=5.0), "KDA.bound: expected a negative number, got 5.0"),
        (lambda: RetNet(D, **SIZES), "RetNet.key_size: expected an even number with rotary, got 3"),
        (lambda: MLSTM(D, **SIZES, input_gate="tanh"), "MLSTM.input_gate: expected one of .*, got 'tanh'"),
        (lambda: MLSTM(D, **SIZES, soft_cap=0.0), "MLSTM.soft_cap: expected a positive number, got 0.0"),
        (lambda: HGRN2(D, **SIZES, lower_bound=1.0), r"HGRN2.lower_bound: expected a number in \[0, 1\), got 1.0"),
        (lambda: LinearAttention(D, **SIZES, feature_map="cos"), "LinearAttention.feature_map: expected one of"),
        (
            lambda: LinearAttention(D, **SIZES, feature_map="linear", normalized=True),
            "LinearAttention.normalized: expected False with feature_map='linear', got True",
        ),
        (
            lambda: jaxrnn.scan(KDA(9, **SIZES, project=False), KDA(9, **SIZES, project=False).init(KEY), None, X),
            r"x: expected 32 features, 6 \+ 6 \+ 12 \+ 2 \+ 6, got shape \(2, 9\)",
        ),
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
