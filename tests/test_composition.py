"""Compositions: what they compute, beside what the contract asks of all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import draw_carry, draw_params, draw_x, floats, weighted_sum

import jaxrnn
from jaxrnn import (
    GRU,
    LSTM,
    Apply,
    Bidirectional,
    Cell,
    Elman,
    Embed,
    GRUParams,
    Linear,
    Parallel,
    Pool,
    Residual,
    Stack,
)

X64 = True


def close(actual, expected, tolerance=1e-10):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, tolerance, tolerance), actual, expected)


def test_a_stack_is_its_layers_one_after_another():
    cells = (LSTM(2, 3), GRU(3, 4), Linear(4, 5))
    params, xs = draw_params(Stack(cells)), draw_x(cells[0], 0, 6, 3)
    ys = xs
    for cell, p in zip(cells, params, strict=True):
        _, ys = jaxrnn.scan(cell, p, None, ys)
    close(jaxrnn.scan(Stack(cells), params, None, xs)[1], ys)


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        ("concat", lambda *ys: np.concatenate(ys, -1)),
        ("sum", lambda a, b, c: a + b + c),
        ("mul", lambda a, b, c: a * b * c),
        ("average", lambda a, b, c: (a + b + c) / 3),
        ("tuple", lambda *ys: ys),
        (lambda a, b, c: a - b * c, lambda a, b, c: a - b * c),
    ],
    ids=["concat", "sum", "mul", "average", "tuple", "callable"],
)
def test_parallel_cells_are_merged(merge, expected):
    """Of three cells of the same input; padding stays 0."""
    cell = Parallel((GRU(2, 3), Linear(2, 3), LSTM(2, 3)), merge)
    params, xs = draw_params(cell), draw_x(cell, 0, 6, 3)
    lengths = np.array([6, 0, 4])
    carry, ys = jaxrnn.scan(cell, params, None, xs, lengths=lengths)
    alone = [jaxrnn.scan(own, p, None, xs, lengths=lengths) for own, p in zip(cell.cells, params, strict=True)]
    valid = np.arange(6)[:, None, None] < lengths[:, None]
    close(ys, jax.tree.map(lambda y: np.where(valid, y, 0), expected(*(y for _, y in alone))))
    close(carry, tuple(last for last, _ in alone))
    assert cell.output_size == (None if callable(merge) or merge == "tuple" else 9 if merge == "concat" else 3)


@pytest.mark.full
def test_the_blocks_are_their_formulas():
    """Griffin's, Mamba's and xLSTM's, from their parts."""

    def run(cell, params, xs):
        return np.asarray(jaxrnn.scan(cell, params, None, xs)[1])

    xs = draw_x(Linear(4, 4), 0, 7, 3)
    for block, act in ((jaxrnn.griffin_block(4, 6, blocks=3), jax.nn.gelu), (jaxrnn.mamba_block(4, 6), jax.nn.silu)):
        params = draw_params(block)
        (branch, gate), out = params
        (recurrent, other), last = block.cells[0].cells, block.cells[1]
        u = xs
        for cell, p in zip(recurrent.cells, branch, strict=True):
            u = run(cell, p, u)
        kinds = [type(cell).__name__ for cell in recurrent.cells if type(cell) is not Apply]
        assert kinds in (["Linear", "CausalConv", "RGLRU"], ["Linear", "CausalConv", "S6"])
        v = run(other.cells[0], gate[0], xs)
        v = np.asarray(act(v, approximate=False) if act is jax.nn.gelu else act(v))
        close(run(block, params, xs), run(last, out, u * v))

    block = jaxrnn.slstm_block(4, heads=2)
    params = draw_params(block)
    first, second = (part.cell for part in block.cells)
    middle = xs + run(first, params[0], xs)
    close(run(block, params, xs), middle + run(second, params[1], middle))
    norm, conv, silu, recurrence, heads = first.cells[0], *first.cells[1].cells
    own = params[0][1]
    u = run(conv, own[0], run(norm, params[0][0], xs))
    u = run(recurrence, own[2], u / (1 + np.exp(-u)))
    parts = u.reshape(*u.shape[:-1], 2, 2)
    parts = (parts - parts.mean(-1, keepdims=True)) / np.sqrt(parts.var(-1, keepdims=True) + heads.epsilon)
    close(run(first, params[0], xs), parts.reshape(u.shape) * own[3].scale + own[3].b)
    assert silu == Apply("silu")


def test_skip_connections():
    """Every layer sees the input, the output sees every layer."""
    cell = Stack((GRU(2, 3), Elman(5, 4), LSTM(6, 2)), skip=True)
    params, xs = draw_params(cell), draw_x(cell, 0, 6, 3)
    ys = [jaxrnn.scan(cell.cells[0], params[0], None, xs)[1]]
    for k in (1, 2):
        ys.append(jaxrnn.scan(cell.cells[k], params[k], None, np.concatenate([xs, ys[-1]], -1))[1])
    close(jaxrnn.scan(cell, params, None, xs)[1], np.concatenate(ys, -1))
    assert cell.output_size == 9


@pytest.mark.parametrize("merge", ["concat", "sum", "mul", "average", "tuple", jnp.maximum])
def test_bidirectional_merges(merge):
    cell = Bidirectional(GRU(2, 3), LSTM(2, 3), merge)
    params, xs = draw_params(cell), draw_x(cell, 0, 6, 3)
    a = np.asarray(jaxrnn.scan(cell.forward, params.forward, None, xs)[1])
    b = np.asarray(jaxrnn.scan(cell.backward, params.backward, None, xs[::-1])[1])[::-1]
    names = {"concat": np.concatenate([a, b], -1), "sum": a + b, "mul": a * b, "average": (a + b) / 2, "tuple": (a, b)}
    expected = np.maximum(a, b) if callable(merge) else names[merge]
    close(jaxrnn.scan(cell, params, None, xs)[1], expected)


def test_backward_is_the_other_direction():
    cell = jaxrnn.Backward(GRU(2, 3))
    params, xs = draw_params(cell), draw_x(cell, 0, 6, 3)
    carry, ys = jaxrnn.scan(cell, params, None, xs)
    end, reversed_ys = jaxrnn.scan(cell.cell, params, None, xs[::-1])
    close((carry, ys[::-1]), (end, reversed_ys))
    close(jaxrnn.scan(jaxrnn.Backward(cell), params, None, xs[::-1])[1], reversed_ys)


def test_layer_norm():
    cell = jaxrnn.LayerNorm(3, epsilon=0.5)
    params, xs = draw_params(cell), draw_x(cell, 0, 6)
    expected = (xs - xs.mean(-1, keepdims=True)) / np.sqrt(xs.var(-1, keepdims=True) + 0.5) * params.scale + params.b
    close(jaxrnn.scan(cell, params, None, xs)[1], expected)
    assert eval(repr(cell), vars(jaxrnn)) == cell


@pytest.mark.parametrize(("groups", "shared"), [(1, False), (3, False), (3, True)])
def test_rms_norm(groups, shared):
    cell = jaxrnn.RMSNorm(6, 0.5, groups, shared)
    params, xs = draw_params(cell), draw_x(cell, 0, 7)
    parts = xs.reshape(7, groups, -1)
    scale = params.scale if shared else params.scale.reshape(groups, -1)
    expected = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 0.5) * scale
    close(jaxrnn.scan(cell, params, None, xs)[1], expected.reshape(7, 6))
    assert eval(repr(cell), vars(jaxrnn)) == cell


def test_layers_without_bias():
    for cell in (Linear(2, 3, bias=False), jaxrnn.CausalConv(2, 3, bias=False)):
        params = cell.init(jax.random.key(0))
        assert params.b is None
        jaxrnn.scan(cell, params, None, jnp.ones((4, 2)))
        with pytest.raises(ValueError, match=r"params.b: .* has no such parameter"):
            jaxrnn.scan(cell, params._replace(b=jnp.zeros(3)), None, jnp.ones((4, 2)))


def test_residual_adds():
    cell = Residual(GRU(3, 3))
    params, xs = draw_params(cell), draw_x(cell, 0, 4, 2)
    close(jaxrnn.scan(cell, params, None, xs)[1], xs + jaxrnn.scan(cell.cell, params, None, xs)[1])


def test_layers_keep_spatial_axes():
    """A Linear above a ConvLSTM is a convolution of size one."""
    cell = Stack((jaxrnn.ConvLSTM((4, 5), 2, 3), Linear(3, 6), jaxrnn.LayerNorm(6)))
    assert cell.output_size == (4, 5, 6)
    params, xs = draw_params(cell), draw_x(cell, 0, 3, 2)
    assert jaxrnn.scan(cell, params, None, xs)[1].shape == (3, 2, 4, 5, 6)


def test_a_complete_model_trains_and_streams():
    """Embed, Pool, Linear, Apply: learns a sum over a sequence with no other framework, then runs step by step."""
    model = Stack((Embed(3, 4), Pool(GRU(4, 8)), Linear(8, 1), Apply("sigmoid")))
    rng = np.random.default_rng(0)
    xs = rng.integers(0, 3, (7, 64))
    lengths = rng.integers(1, 8, 64)
    target = (xs * (np.arange(7)[:, None] < lengths)).sum(0)[:, None] > 6

    def loss(params):
        _, y = jaxrnn.scan(model, params, None, xs, lengths=lengths)
        return -jnp.mean(jnp.log(jnp.where(target, y, 1 - y)))

    @jax.jit
    def train(params):
        def update(params, _):
            value, gradient = jax.value_and_grad(loss)(params)
            return jax.tree.map(lambda p, g: p - 1.0 * g, params, gradient), value

        return jax.lax.scan(update, params, length=150)

    params, losses = train(model.init(jax.random.key(0), jnp.float64))
    assert losses[-1] < 0.5 * losses[0]
    carry, row = None, np.argmax(lengths == 7)
    for x in xs[:, row]:
        carry, y = jaxrnn.step(model, params, carry, x)
    close(y, jaxrnn.scan(model, params, None, xs, lengths=lengths)[1][row])


class AttentionParams(NamedTuple):
    """The decoder's own params, and what is constant over a sequence: the encoder's states (S, E)."""

    gru: GRUParams
    query: jax.Array
    memory: jax.Array


class Attention(Cell):
    """A decoder that attends to encoder states: a user's own cell in a dozen lines."""

    input_size: int
    hidden_size: int
    memory_size: int

    @property
    def gru(self):
        return GRU(self.input_size + self.memory_size, self.hidden_size)

    def init(self, key, dtype=jnp.float32):
        query = jax.random.normal(key, (self.hidden_size, self.memory_size), dtype)
        return AttentionParams(self.gru.init(key, dtype), query, jnp.zeros((1, self.memory_size), dtype))

    def initial_carry(self, params, batch_shape=()):
        return self.gru.initial_carry(params.gru, batch_shape)

    def step(self, params, carry, x, noise=None):
        scores = jnp.einsum("...h,he,...se->...s", carry.h, params.query, params.memory)
        context = jnp.einsum("...s,...se->...e", jax.nn.softmax(scores), params.memory)
        return self.gru.step(params.gru, carry, jnp.concatenate([x, context], -1), noise)


@pytest.mark.full
def test_attention_over_encoder_states_in_the_params():
    encoder, decoder = GRU(2, 3), Attention(2, 4, 3)
    encoder_params, own = draw_params(encoder), draw_params(decoder)
    sources, xs = draw_x(encoder, 1, 6, 5), draw_x(decoder, 2, 4, 5)
    lengths = np.array([6, 3, 1, 5, 2])

    def run(encoder_params, own, sources, xs, lengths):
        """(T, *batch) as everywhere; the memory has the batch axes first."""
        _, states = jaxrnn.scan(encoder, encoder_params, None, sources, lengths=lengths)
        params = own._replace(memory=jnp.moveaxis(states, 0, -2))
        return jaxrnn.scan(decoder, params, None, xs, remat_every=2)[1]

    batch = jax.jit(run)(encoder_params, own, sources, xs, lengths)
    rows = jax.jit(jax.vmap(run, (None, None, 1, 1, 0), 1))(encoder_params, own, sources, xs, lengths)
    close(batch, rows)

    def loss(encoder_params):
        return weighted_sum(run(encoder_params, own, sources, xs, lengths))

    gradient = jax.jit(jax.grad(loss))(encoder_params)
    small, direction = 1e-6, draw_params(encoder, 7)
    moved = [jax.tree.map(lambda p, d, s=s: p + s * d, encoder_params, direction) for s in (small, -small)]
    slope = (loss(moved[0]) - loss(moved[1])) / (2 * small)
    inner = sum(np.vdot(g, d) for g, d in zip(floats(gradient), floats(direction), strict=True))
    np.testing.assert_allclose(inner, slope, 1e-6)

    _, states = jaxrnn.scan(encoder, encoder_params, None, sources, lengths=lengths)
    params = own._replace(memory=jnp.moveaxis(states, 0, -2))
    feedback = lambda y, key: (y[..., :2], y)
    carry, kept = jaxrnn.rollout(decoder, params, None, xs[0], 3, feedback=feedback)
    state, x = None, xs[0]
    for t in range(3):
        state, y = jaxrnn.step(decoder, params, state, x)
        x = y[..., :2]
        close(kept[t], y)
    close(carry, state)


def test_one_to_many_many_to_one_many_to_many():
    """The four shapes of task that tutorials teach."""
    cell = Stack((GRU(3, 4), Linear(4, 3)))
    params, x, xs = draw_params(cell), draw_x(cell, 0, 5), draw_x(cell, 1, 6, 5)
    assert jaxrnn.step(cell, params, None, x)[1].shape == (5, 3)
    assert jaxrnn.rollout(cell, params, None, x, 7, feedback=lambda y, key: (y, y))[1].shape == (7, 5, 3)
    assert jaxrnn.scan(Stack((Pool(GRU(3, 4)), Linear(4, 3))), params, None, xs)[1].shape == (5, 3)
    assert jaxrnn.scan(cell, params, None, xs)[1].shape == (6, 5, 3)
    final, _ = jaxrnn.scan(cell, params, None, xs)
    assert jaxrnn.rollout(cell, params, final, x, 4, feedback=lambda y, key: (y, y))[1].shape == (4, 5, 3)


def test_chunks_of_a_pool():
    """What is pooled lies in the carry, so a sequence may come in pieces and steps."""
    for how in ("last", "end", ("mean", "max")):
        cell = Pool(GRU(2, 3), how)
        params, xs = draw_params(cell), draw_x(cell, 0, 5, 2)
        carry, _ = jaxrnn.scan(cell, params, draw_carry(cell, params, 2), xs[:2])
        for x in xs[2:]:
            carry, y = jaxrnn.step(cell, params, carry, x)
        close((carry, y), jaxrnn.scan(cell, params, draw_carry(cell, params, 2), xs))


@pytest.mark.full
def test_an_ensemble_is_initialised_and_run_by_vmap():
    """Params by vmap over keys are those one by one, also compiled, where several factorisations run at once."""
    cell = Stack((LSTM(3, 20), GRU(20, 33), Linear(33, 2)))
    keys, xs = jax.random.split(jax.random.key(0), 3), draw_x(cell, 0, 4, 5)
    params = jax.jit(jax.vmap(lambda key: cell.init(key, jnp.float64)))(keys)
    ys = jax.jit(jax.vmap(lambda params: jaxrnn.scan(cell, params, None, xs)[1]))(params)
    for k, key in enumerate(keys):
        close(ys[k], jaxrnn.scan(cell, cell.init(key, jnp.float64), None, xs)[1], 1e-8)


def test_a_decoder_goes_on_from_the_carry_of_a_pool():
    """As it comes, in both directions and within a composition too; one step as well."""
    xs, ys = draw_x(GRU(2, 3), 0, 5, 4), draw_x(GRU(2, 3), 1, 3, 4)
    for encoder, decoder in (
        (Pool(LSTM(2, 3)), LSTM(2, 3)),
        (Pool(Bidirectional(GRU(2, 3), GRU(2, 4))), Bidirectional(GRU(2, 3), GRU(2, 4))),
    ):
        params = draw_params(encoder), draw_params(decoder)
        carry, _ = jaxrnn.scan(encoder, params[0], None, xs)
        inside, _ = jaxrnn.scan(encoder.cell, params[0], None, xs)
        close(jaxrnn.scan(decoder, params[1], carry, ys), jaxrnn.scan(decoder, params[1], inside, ys))
        if decoder.causal:
            close(jaxrnn.step(decoder, params[1], carry, ys[0]), jaxrnn.step(decoder, params[1], inside, ys[0]))
