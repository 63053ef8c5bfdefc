"""Time: what other libraries get wrong, one test for each."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import draw_carry, draw_params, draw_x, redraw, weighted_sum
from tiers import in_full

import jaxrnn
from jaxrnn import GRU, LSTM, Bidirectional, LearnedCarry, Linear, Pool, Stack

X64 = True
CELL = Stack((LSTM(2, 3), GRU(3, 4)))
BOTH = Stack((Bidirectional(LSTM(2, 3), GRU(2, 4)), Bidirectional(GRU(7, 3), LSTM(7, 2))))


def close(actual, expected, tolerance=1e-10):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, tolerance, tolerance), actual, expected)


def test_length_zero_keeps_the_initial_carry():
    params = draw_params(CELL)
    carry, xs = draw_carry(CELL, params, 4), draw_x(CELL, 0, 5, 4)

    def loss(params, carry):
        end, ys = jaxrnn.scan(CELL, params, carry, xs, lengths=jnp.array([0, 5, 0, 2]))
        return weighted_sum((end, ys)), (end, ys)

    gradient, (end, ys) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, carry)
    for row in (0, 2):
        close(
            jax.tree.map(lambda leaf, row=row: leaf[row], end), jax.tree.map(lambda leaf, row=row: leaf[row], carry), 0
        )
        assert not ys[:, row].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_fresh_row_of_length_zero_ends_at_the_fresh_carry():
    cell = LearnedCarry(GRU(2, 3))
    params = draw_params(cell)
    end, _ = jaxrnn.scan(cell, params, None, draw_x(cell, 0, 5, 2), lengths=np.array([0, 5]))
    close(end.h[0], params.carry.h, 0)


def test_two_batch_axes_with_lengths_and_final_carry():
    params, xs = draw_params(CELL), draw_x(CELL, 0, 5, 2, 3)
    lengths = np.array([[5, 0, 2], [1, 4, 3]])
    end, ys = jaxrnn.scan(CELL, params, None, xs, lengths=lengths)
    for i, j in np.ndindex(2, 3):
        alone, alone_ys = jaxrnn.scan(CELL, params, None, xs[: lengths[i, j], i, j])
        close(jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], end), alone)
        close(ys[: lengths[i, j], i, j], alone_ys)
        assert not ys[lengths[i, j] :, i, j].any()


def test_outputs_are_zero_at_padding():
    params = draw_params(layer := Linear(2, 3))
    assert params.b.all()
    _, ys = jaxrnn.scan(layer, params, None, draw_x(layer, 0, 4, 2), lengths=np.array([4, 1]))
    assert ys[:, 0].all()
    assert not ys[1:, 1].any()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", [BOTH, Pool(GRU(2, 3), "mean")], ids=["bidirectional", "pool"])
def test_flags_in_the_padding_do_nothing(cell, reverse):
    params, xs = draw_params(cell), draw_x(cell, 0, 6, 2)
    mask = np.array([[1, 0, 1, 0, 1, 0], [0, 1, 1, 1, 0, 0]], bool).T
    reset = np.array([[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]], bool).T
    run = jax.jit(lambda reset: jaxrnn.scan(cell, params, None, xs, mask=mask, reset=reset, reverse=reverse))
    close(run(reset | ~mask), run(reset), 0)


@pytest.mark.parametrize("reverse", [*in_full([False]), True])
@pytest.mark.parametrize("cell", [CELL, BOTH], ids=["stack", "bidirectional"])
def test_packed_with_resets_is_one_by_one(cell, reverse):
    """Several sequences in a row, a reset at the first step of each, in both directions."""
    params, xs = draw_params(cell), draw_x(cell, 0, 7)
    reset = np.array([1, 0, 1, 1, 0, 0, 0], bool)
    _, packed = jaxrnn.scan(cell, params, None, xs, reset=reset, reverse=reverse)
    alone = [jaxrnn.scan(cell, params, None, part, reverse=reverse)[1] for part in (xs[:2], xs[2:3], xs[3:])]
    close(packed, jnp.concatenate(alone))


def test_a_reset_acts_before_its_step():
    """reset[t] belongs to x[t]: y[t] is a fresh start with x[t], and y[t - 1] still knows what came before."""
    cell = GRU(2, 3)
    params, xs = draw_params(cell), draw_x(cell, 0, 4)
    reset = np.array([False, False, True, False])
    _, ys = jaxrnn.scan(cell, params, None, xs, reset=reset)
    _, plain = jaxrnn.scan(cell, params, None, xs)
    close(ys[:2], plain[:2])
    close(ys[2], jaxrnn.step(cell, params, None, xs[2])[1])


def test_stepping_an_environment_is_replaying_it():
    """Acting with `done` flags, and training on the stored sequence with `reset`: the same outputs and carries."""
    cell = LearnedCarry(LSTM(2, 3))
    params = draw_params(cell)
    environments, length = 3, 9
    rng = np.random.default_rng(0)
    carry = first = draw_carry(cell, params, environments)
    observation, start = rng.normal(size=(environments, 2)), np.zeros(environments, bool)
    stored = []
    for _ in range(length):
        fresh = cell.initial_carry(params, (environments,))
        carry = jax.tree.map(lambda new, old, start=start: jnp.where(start[:, None], new, old), fresh, carry)
        carry, action = jaxrnn.step(cell, params, carry, observation)
        stored.append((observation, start, action, carry))
        # The environment moves; where an episode is done it hands out the first observation of the next one.
        observation = np.asarray(action)[:, :2] + rng.normal(size=(environments, 2))
        start = rng.random(environments) < 0.3
    observations, resets, actions, carries = (
        jax.tree.map(lambda *leaves: np.stack(leaves), *each) for each in zip(*stored, strict=True)
    )
    assert resets.any()
    replayed, ys = jaxrnn.scan(jaxrnn.EmitCarry(cell), params, first, observations, reset=resets)
    close(ys.y, actions)
    close(ys.carry, carries)
    close(replayed, jax.tree.map(lambda leaf: leaf[-1], carries))


def test_reverse_is_aligned_and_starts_at_the_last_valid_step():
    cell = GRU(2, 3)
    params, xs = draw_params(cell), draw_x(cell, 0, 5)
    end, ys = jaxrnn.scan(cell, params, None, xs, lengths=np.array(3), reverse=True)
    expected_end, expected = jaxrnn.scan(cell, params, None, xs[2::-1])
    close((end, ys[:3]), (expected_end, expected[::-1]))


@pytest.mark.full
@pytest.mark.parametrize("reverse", [pytest.param(False, marks=pytest.mark.full), True])
def test_remat_every_number_of_steps(reverse):
    cell = Bidirectional(LSTM(2, 3), GRU(2, 3))
    params, xs = draw_params(cell), draw_x(cell, 0, 7, 2)
    mask, reset = np.arange(7)[:, None] < np.array([7, 4]), np.arange(7)[:, None] == np.array([3, 2])

    def loss(params, remat_every):
        return weighted_sum(
            jaxrnn.scan(cell, params, None, xs, mask=mask, reset=reset, reverse=reverse, remat_every=remat_every)
        )

    every = (None, 1, 3, 7, 100)
    plain, *others = jax.jit(lambda params: [jax.value_and_grad(loss)(params, each) for each in every])(params)
    for each in others:
        close(each, plain)


def residual_bytes(function, *arguments):
    """The bytes that the backward pass keeps from the forward pass."""
    _, pullback = jax.eval_shape(lambda *arguments: jax.vjp(function, *arguments), *arguments)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))


def test_remat_stores_one_carry_every_so_many_steps():
    """In every layer and both directions, the residuals shrink to the inputs and T / k carries."""
    cell = Stack((Bidirectional(LSTM(2, 30), LSTM(2, 30)), LSTM(60, 30)))
    params, xs = draw_params(cell), draw_x(cell, 0, 64, 4)

    def kept(every):
        return residual_bytes(lambda p: weighted_sum(jaxrnn.scan(cell, p, None, xs, remat_every=every)[0]), params)

    carries = 3 * 2 * 64 * 4 * 30 * 8
    inputs = (2 + 2 + 60) * 64 * 4 * 8
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert kept(None) > 3 * carries
    assert kept(16) < carries / 16 + 2 * inputs + 3 * weights + 2**14


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_half_precision_carry_is_kept_and_none_starts_in_float32(dtype, implementation):
    cell = Stack((LSTM(2, 3), jaxrnn.Elman(3, 4), GRU(4, 3), jaxrnn.MGU(3, 2)))
    params = draw_params(cell, dtype=dtype)
    xs = draw_x(cell, 0, 5, 2, dtype=dtype)
    run = jax.jit(lambda carry, xs: jaxrnn.scan(cell, params, carry, xs, implementation=implementation))
    end, ys = run(None, xs)
    assert ys.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(end)} == {jnp.dtype(jnp.float32)}
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), end)
    assert {leaf.dtype for leaf in jax.tree.leaves(run(half, xs)[0])} == {jnp.dtype(dtype)}
    assert run(None, xs.astype(np.float64))[1].dtype == np.float64


def test_mixed_precision_is_one_cast():
    """Half-precision params and xs, a float32 carry: the state does not lose what half precision cannot hold."""
    cell = jaxrnn.IndRNN(1, 1, activation="identity")
    params = jaxrnn.IndRNNParams(*(np.ones(shape, jnp.bfloat16) for shape in ((1, 1), (1,))), b=None)
    end, ys = jaxrnn.scan(cell, params, None, np.ones((1000, 1), jnp.bfloat16))
    assert ys.dtype == jnp.bfloat16
    assert end.h.dtype == np.float32
    end, _ = jaxrnn.scan(
        cell, params, jaxrnn.IndRNNCarry(np.full(1, 0.25, np.float32)), np.ones((100, 1), jnp.bfloat16)
    )
    np.testing.assert_allclose(end.h, 100.25, 0.01)


def test_half_precision_products_are_summed_in_float32():
    x, w = jnp.ones((1, 4096), jnp.bfloat16), jnp.ones((4096, 1), jnp.bfloat16)
    params = jaxrnn.ElmanParams(w, jnp.zeros((1, 1), jnp.bfloat16), None)
    cell = jaxrnn.Elman(4096, 1, activation=("affine", 1 / 4097))
    # XLA may otherwise leave out that a result is rounded, and on some processors does.
    step = jax.jit(lambda x: jaxrnn.step(cell, params, None, x), compiler_options={"xla_allow_excess_precision": False})
    carry, _ = step(x.at[0, 0].set(2))
    np.testing.assert_allclose(carry.h, 1, 1e-6)


def test_gradients_reach_a_learned_carry_through_every_reset():
    cell = LearnedCarry(GRU(2, 3))
    params, xs = draw_params(cell), draw_x(cell, 0, 6)
    reset = np.array([0, 0, 1, 0, 1, 0], bool)

    def loss(carry, first, reset):
        ys = jaxrnn.scan(cell, params._replace(carry=carry), first, xs, reset=reset)[1]
        return weighted_sum(ys)

    given = jax.grad(loss)(params.carry, draw_carry(cell, params), reset)
    parts = [
        jax.grad(lambda carry, t=t: loss(carry, draw_carry(cell, params), np.arange(6) == t))(params.carry)
        for t in (2, 4)
    ]
    assert all(np.abs(part.h).min() > 0 for part in parts)
    small = 1e-6
    direction = redraw(params.carry, 5)
    moved = [jax.tree.map(lambda p, d, s=s: p + s * d, params.carry, direction) for s in (small, -small)]
    slope = (loss(moved[0], draw_carry(cell, params), reset) - loss(moved[1], draw_carry(cell, params), reset)) / (
        2 * small
    )
    np.testing.assert_allclose(np.vdot(given.h, direction.h), slope, 1e-6)


def test_last():
    ys = np.arange(24.0).reshape(4, 3, 2)
    np.testing.assert_array_equal(jaxrnn.last(ys), ys[-1])
    np.testing.assert_array_equal(jaxrnn.last(ys, np.array([4, 0, 2])), [ys[3, 0], [0, 0], ys[1, 2]])
    mask = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], bool)
    expected = [ys[2, 0], [0, 0], ys[1, 2]]
    np.testing.assert_array_equal(jaxrnn.last(ys, mask=mask.T), expected)
    np.testing.assert_array_equal(jaxrnn.last(ys.swapaxes(0, 1), mask=mask, time_axis=1), expected)
    np.testing.assert_array_equal(jaxrnn.last({"a": ys}, np.array([1, 1, 1]))["a"], ys[0])
    assert jaxrnn.last(ys[:0]).shape == (3, 2)
    assert jaxrnn.last(ys[:0], np.zeros(3, int)).shape == (3, 2)
    gradient = jax.grad(lambda ys: jaxrnn.last(ys, np.array([4, 0, 2])).sum())(np.where(ys == 2, np.nan, ys))
    assert gradient.sum() == 4
    assert np.isfinite(gradient).all()


def test_pool_last_of_both_directions_is_each_ones_own_final_output():
    cell = Bidirectional(LSTM(2, 3), GRU(2, 4))
    params, xs = draw_params(cell), draw_x(cell, 0, 5, 3)
    lengths = np.array([5, 2, 0])
    _, pooled = jaxrnn.scan(Pool(cell), params, None, xs, lengths=lengths)
    end, _ = jaxrnn.scan(cell, params, None, xs, lengths=lengths)
    np.testing.assert_allclose(pooled[:2], np.concatenate([end.forward.h, end.backward.h], -1)[:2], 1e-12)
    assert not pooled[2].any()


@pytest.mark.parametrize("how", ["last", "mean", "max"])
def test_pool_over_the_valid_steps_since_the_last_reset(how):
    cell = GRU(2, 3)
    params, xs = draw_params(cell), draw_x(cell, 0, 6, 2)
    mask = np.array([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool).T
    reset = np.array([[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]], bool).T
    _, ys = jaxrnn.scan(cell, params, None, xs, mask=mask, reset=reset)
    _, pooled = jaxrnn.scan(Pool(cell, how), params, None, xs, mask=mask, reset=reset)
    rows = [ys[jnp.array([1, 3, 4]), 0], ys[4:, 1]]
    expected = [{"last": row[-1], "mean": row.mean(0), "max": row.max(0)}[how] for row in rows]
    close(list(pooled), expected)


def test_rollout_is_the_loop():
    cell = Stack((GRU(3, 4), Linear(4, 3)))
    params = draw_params(cell)
    carry, x = draw_carry(cell, params, 2), draw_x(cell, 0, 2)

    def feedback(y, key):
        noise = jax.random.normal(key, y.shape, y.dtype)
        return jnp.tanh(y + noise), {"y": y, "noise": noise}

    key = jax.random.key(3)
    end, kept = jax.jit(lambda: jaxrnn.rollout(cell, params, carry, x, 5, feedback=feedback, key=key))()
    for t, each in enumerate(jax.random.split(key, 5)):
        carry, y = jaxrnn.step(cell, params, carry, x)
        x, keep = feedback(y, each)
        close(jax.tree.map(lambda leaf, t=t: leaf[t], kept), keep)
    close(end, carry)
    assert jax.tree.leaves(jaxrnn.rollout(cell, params, None, x, 0, feedback=feedback, key=key)[1])[0].shape == (
        0,
        2,
        3,
    )
    gradient = jax.grad(lambda p: weighted_sum(jaxrnn.rollout(cell, p, None, x, 4, feedback=lambda y, _: (y, y))))(
        params
    )
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.full
def test_accelerators_take_the_input_product_of_all_steps_at_once(monkeypatch):
    xs = draw_x(GRU(2, 3), 0, 7, 5)
    params = draw_params(GRU(2, 3))
    run = jax.jit(lambda xs: jaxrnn.scan(GRU(2, 3), params, None, xs, implementation="xla")[1]).trace(xs)
    shapes = [
        re.findall(r"stablehlo.dot_general .*\(tensor<(\w+)xf64>", run.lower(lowering_platforms=(platform,)).as_text())
        for platform in ("cpu", "cuda")
    ]
    assert sorted(shapes[0]) == ["5x2", "5x3"]
    assert sorted(shapes[1]) == ["5x3", "7x5x2"]

    dropped = jaxrnn.RecurrentDropout(GRU(5, 4, layer_norm=True), 0.3)
    cell = Stack((Bidirectional(LSTM(2, 3), GRU(2, 2)), dropped, jaxrnn.SLSTM(4, 6, heads=2), jaxrnn.MGU(6, 3)))
    params, carry, xs = draw_params(cell), draw_carry(cell, draw_params(cell), 4), draw_x(cell, 1, 6, 4)
    reset = np.arange(24).reshape(6, 4) % 5 == 0

    def loss(params, carry, xs, remat_every):
        end, ys = jaxrnn.scan(
            cell,
            params,
            carry,
            xs,
            lengths=np.array([6, 0, 3, 5]),
            reset=reset,
            key=jax.random.key(0),
            remat_every=remat_every,
            implementation="xla",
        )
        return weighted_sum((end, ys)), (end, ys)

    def run(every):
        return jax.jit(jax.value_and_grad(lambda *each: loss(*each, every), (0, 1, 2), has_aux=True))(params, carry, xs)

    expected = run(None)
    for platform in ("cuda", "tpu"):  # whose branches run here, too
        taken = []

        def elsewhere(*operands, default, **branches):
            taken.append(branches.get(platform, default))
            return taken[-1](*operands)

        with monkeypatch.context() as patched:
            patched.setattr(jax.lax, "platform_dependent", elsewhere)
            close(run(None), expected)
            close(run(4), expected)
        assert taken
