"""Every cell and composition that the contract is tested on. A new cell joins by one line."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrnn import (
    GLA,
    GRU,
    HGRN,
    HGRN2,
    KDA,
    LRU,
    LSTM,
    MGU,
    MLSTM,
    QRNN,
    RGLRU,
    RWKV7,
    S4D,
    S5,
    S6,
    SLSTM,
    SRU,
    Apply,
    Backward,
    Bidirectional,
    CausalConv,
    Cell,
    ConvLSTM,
    DeltaNet,
    Dropout,
    Elman,
    Embed,
    EmitCarry,
    GatedDeltaNet,
    IndRNN,
    LayerNorm,
    LearnedCarry,
    Linear,
    LinearAttention,
    Mamba2,
    MinGRU,
    MinLSTM,
    Parallel,
    Pool,
    RecurrentDropout,
    Repeat,
    Residual,
    RetNet,
    RMSNorm,
    Stack,
    TokenShift,
    WeightDrop,
    Zoneout,
    gated_delta_block,
    griffin_block,
    kda_block,
    mamba2_block,
    mamba_block,
    mlstm_block,
    residual_block,
    rwkv7_block,
    slstm_block,
)

D, H = 2, 3
TIME, BATCH = 6, 5


class OwnParams(NamedTuple):
    w: jax.Array
    decay: jax.Array


class Own(Cell):
    """A user's own cell in three methods, whose fresh carry is not zero."""

    size: int

    def init(self, key, dtype=jnp.float32):
        return OwnParams(jax.random.normal(key, (D, self.size), dtype), jnp.ones(self.size, dtype))

    def initial_carry(self, params, batch_shape=()):
        return jnp.broadcast_to(jnp.tanh(params.decay), (*batch_shape, self.size))

    def step(self, params, carry, x, noise=None):
        w, decay = (a.astype(carry.dtype) for a in params)
        h = jnp.tanh(decay.reshape((1,) * (carry.ndim - 1) + decay.shape) * carry + x.astype(carry.dtype) @ w)
        return h, (2 * h).astype(x.dtype)


class Pair(NamedTuple):
    value: jax.Array
    token: jax.Array


class TwoInputs(Cell):
    """A user's own cell whose x is a tree of a vector and a token."""

    input_ndim = Pair(1, 0)

    def init(self, key, dtype=jnp.float32):
        return jax.random.normal(key, (4, D), dtype)

    def initial_carry(self, params, batch_shape=()):
        return {"h": jnp.zeros((*batch_shape, D), params.dtype)}

    def step(self, params, carry, x, noise=None):
        dtype = x.value.dtype
        h = jnp.tanh(carry["h"].astype(dtype) + x.value * params.astype(dtype)[x.token])
        return {"h": h}, {"sum": h.sum(-1), "h": h}


def _lstm(peephole, coupled, projection, norm, cell_clip, gate_clip, activations):
    return LSTM(
        D,
        H,
        peephole=peephole,
        coupled=coupled,
        projection_size=4 if projection else None,
        layer_norm=norm,
        cell_clip=0.7 if cell_clip else None,
        gate_clip=0.8 if gate_clip else None,
        **(
            {"gate_activation": ("hard_sigmoid", 0.3), "activation": "softsign", "output_activation": ("elu", 0.5)}
            if activations
            else {}
        ),
    )


def _gru(reset_after, norm, gate_clip, activations):
    return GRU(
        D,
        H,
        reset_after=reset_after,
        layer_norm=norm,
        gate_clip=0.8 if gate_clip else None,
        **({"gate_activation": "keras_hard_sigmoid", "activation": ("scaled_tanh", 1.2, 0.7)} if activations else {}),
    )


# Orthogonal arrays of strength 2: every pair of options is met in all four states.
_L8 = [(a, b, a ^ b, c, a ^ c, b ^ c, a ^ b ^ c) for a, b, c in itertools.product((0, 1), repeat=3)]
LSTMS = {f"lstm_{''.join(map(str, row))}": _lstm(*map(bool, row)) for row in _L8}
LSTMS["lstm_everything"] = _lstm(*[True] * 7)
GRUS = {f"gru_{''.join(map(str, row))}": _gru(*map(bool, row[:3]), bool(row[6])) for row in _L8}

LINEAR_OPTIONS = {
    "min_lstm_log": MinLSTM(D, H, log_space=True),
    "sru_square": SRU(D, D),
    "s4d_timed": S4D(D, 4, discretization="bilinear", timed=True),
    "s5_bilinear": S5(D, H, "bilinear"),
    "s5_timed": S5(D, H, timed=True),
    "rg_lru_blocks": RGLRU(4, blocks=2),
}
CELLS = {
    "elman": Elman(D, H),
    "lstm": LSTM(D, H),
    "lstm_projection_peephole": LSTM(D, H, projection_size=4, peephole=True),
    "gru": GRU(D, H),
    "gru_reset_before": GRU(D, H, reset_after=False),
    "mgu": MGU(D, H),
    "indrnn": IndRNN(D, H, activation="tanh"),
    "min_gru": MinGRU(D, H),
    "min_lstm": MinLSTM(D, H, positive=False),
    "min_gru_log": MinGRU(D, H, log_space=True),
    "sru": SRU(D, H, activation="tanh"),
    "qrnn": QRNN(D, H, window=3),
    "causal_conv": CausalConv(D, 4),
    "token_shift": TokenShift(D),
    "s4d": S4D(D, 4, "inverse"),
    "s6": S6(D, 4, 2),
    "lru": LRU(D, H),
    "s5": S5(D, H),
    "rg_lru": RGLRU(D),
    "hgrn": HGRN(D, H, lower_bound=0.3),
    "slstm": SLSTM(D, 4, heads=2),
    "delta_net": DeltaNet(D, heads=2, key_size=3, value_size=4, negative_eigenvalues=True),
    "gated_delta_net": GatedDeltaNet(D, heads=2, key_size=4, value_size=3),
    "gla": GLA(D, heads=2, key_size=3, value_size=4, rank=2),
    "delta_product": DeltaNet(D, heads=4, key_size=3, value_size=2, products=2, key_heads=2),
    "kda": KDA(D, heads=2, key_size=3, value_size=4, bound=-5.0),
    "hgrn2": HGRN2(D, heads=2, key_size=3, value_size=4, lower_bound=0.3),
    "linear_attention": LinearAttention(D, heads=2, key_size=3, value_size=4),
    "mamba2": Mamba2(D, heads=4, key_size=3, value_size=2, key_heads=2),
    "mlstm": MLSTM(D, heads=2, key_size=3, value_size=4),
    "ret_net": RetNet(D, heads=2, key_size=4, value_size=3),
    "rwkv7": RWKV7(D, heads=2, key_size=3, value_size=4, rank=2),
    "conv_lstm_1d": ConvLSTM((4,), D, H),
    "conv_lstm_2d": ConvLSTM((5, 4), D, H, kernel_size=(3, 2), strides=2, dilation=(1, 2), padding="VALID"),
    "own": Own(H),
    "two_inputs": TwoInputs(),
}
LAYERS = {
    "linear": Linear(D, H),
    "embed": Embed(7, H),
    "layer_norm": LayerNorm(D, epsilon=1e-3),
    "rms_norm": RMSNorm(4, groups=2, shared=True),
    "apply": Apply("softplus"),
    "dropout": Dropout(0.4),
    "dropout_sequence": Dropout(0.4, per_sequence=True),
    "repeat": Repeat(GRU(D, H), 2),
}
COMPOSITIONS = {
    "stack": Stack((Embed(7, D), LSTM(D, H), Dropout(0.3), GRU(H, 4), Linear(4, D), Apply("sigmoid"))),
    "stack_skip": Stack((GRU(D, H), Dropout(0.2), Elman(2 * D + H, 4)), skip=True),
    "bidirectional": Bidirectional(LSTM(D, H), GRU(D, 4)),
    "bidirectional_stack": Stack(
        (Bidirectional(Elman(D, H), Elman(D, H), "mul"), Bidirectional(GRU(H, H), GRU(H, H), "average"))
    ),
    "bidirectional_callable": Bidirectional(Elman(D, H), Own(H), merge=jnp.maximum),
    "backward": Backward(Residual(GRU(D, D))),
    "backward_stack": Stack((LSTM(D, H), Dropout(0.2), Backward(GRU(H, 4)), Elman(4, D))),
    "residual": Residual(GRU(D, D)),
    "linear_stack": Stack(
        (LRU(D, H), Dropout(0.3), Residual(MinGRU(D, D)), RGLRU(D), Bidirectional(MinLSTM(D, H), LRU(D, 4)))
    ),
    "learned_rg_lru": LearnedCarry(RGLRU(D)),
    "parallel": Parallel((LSTM(D, H), Stack((Linear(D, H), Dropout(0.3), Apply("sigmoid")))), "mul"),
    "blocks": Stack(
        (
            Linear(D, 4),
            residual_block(griffin_block(4, blocks=2, window=3), 5),
            mamba_block(4, H, states=2, window=2),
            slstm_block(4, heads=1, window=2),
        )
    ),
    "delta_blocks": Stack(
        (
            Linear(D, 4, bias=False),
            gated_delta_block(4, 4, 2, 3, key_heads=2, window=3, negative_eigenvalues=True, epsilon=0.1),
            kda_block(4, 2, 3, 2, rank=1, window=2, epsilon=0.1),
        )
    ),
    "matrix_blocks": Stack(
        (mamba2_block(4, 4, 2, 3, key_heads=2, window=2, epsilon=0.1), mlstm_block(4, 2, 3, 2, epsilon=0.1))
    ),
    "rwkv7_block": rwkv7_block(4, 2, 3, 5, rank=2, gate_rank=1),
    "learned_carry": LearnedCarry(LSTM(D, H)),
    "emit_carry": EmitCarry(LSTM(D, H)),
    "recurrent_dropout": RecurrentDropout(LSTM(D, H), 0.3),
    "weight_drop": WeightDrop(RecurrentDropout(GRU(D, H), 0.2), 0.3),
    "zoneout": Zoneout(LSTM(D, H), (0.2, 0.5)),
    "zoneout_own": Zoneout(Own(H), 0.3),
    "zoneout_stack": Zoneout(Stack((Elman(D, H), Dropout(0.3), GRU(H, 4))), 0.3),
    "pool_last": Pool(LSTM(D, H)),
    "pool_mean": Pool(GRU(D, H), "mean"),
    "pool_max": Pool(Elman(D, H), "max"),
    "pool_stack": Pool(Stack((GRU(D, H), Dropout(0.3)))),
    "pool_bidirectional": Pool(Stack((Elman(D, 4), Bidirectional(GRU(4, H), LSTM(4, D))))),
    "classifier": Stack((Embed(7, D), Pool(LSTM(D, H)), Dropout(0.3), Linear(H, 4), Apply("sigmoid"))),
    "pool_repeat": Stack(
        (Pool(LSTM(D, H)), Repeat(Stack((GRU(H, 4), Dropout(0.3), Backward(Elman(4, H)))), 3), Linear(H, D))
    ),
    "everything": LearnedCarry(
        Residual(
            Stack(
                (
                    Dropout(0.2, per_sequence=True),
                    WeightDrop(RecurrentDropout(LSTM(D, H), 0.2), 0.3),
                    LayerNorm(H),
                    Bidirectional(Zoneout(GRU(H, H), 0.2), RecurrentDropout(MGU(H, H), 0.2), "sum"),
                    Linear(H, D),
                )
            )
        )
    ),
}
OTHERS = {
    "elman_relu": Elman(D, H, activation="relu"),
    "elman_clip": Elman(D, H, activation="relu", gate_clip=0.8),
    "lstm_coupled_input": LSTM(D, H, coupled="input", peephole=True, gate_activation=("hard_sigmoid", 0.3, 0.4)),
    "conv_lstm_3d": ConvLSTM((3, 2, 4), D, H, kernel_size=2, strides=(1, 1, 2)),
    "layer_norm_groups": LayerNorm(6, groups=2),
    "rms_norm_plain": RMSNorm(D),
    "causal_conv_plain": CausalConv(D, 3, bias=False),
    "apply_callable": Apply(jnp.sin),
    "bidirectional_sum": Bidirectional(MGU(D, H), IndRNN(D, H, activation="tanh"), "sum"),
    "learned_qrnn": LearnedCarry(QRNN(D, H, window=3)),
    "recurrent_dropout_before": RecurrentDropout(GRU(D, H, reset_after=False), 0.3),
    "recurrent_dropout_conv": RecurrentDropout(ConvLSTM((4,), D, H), 0.3),
    "weight_drop_indrnn": WeightDrop(IndRNN(D, H, activation="tanh"), 0.3),
    "pool_backward": Pool(Stack((Elman(D, 4), Backward(LSTM(4, H))))),
    "pool_several": Pool(GRU(D, H), ("mean", "last", "max")),
    "pool_conv": Pool(ConvLSTM((4,), D, H), "mean"),
}
# Members that differ from others in options only: the fast tier runs part of the properties on them.
OPTIONS = {name: cell for name, cell in (LSTMS | GRUS | LINEAR_OPTIONS | OTHERS).items() if cell not in CELLS.values()}
MEMBERS = CELLS | LAYERS | COMPOSITIONS | OPTIONS
# Members whose way through the engines and compositions no other member of the fast tier has.
TYPICAL = (
    *("lstm", "qrnn", "s6", "conv_lstm_1d", "own", "two_inputs", "bidirectional", "zoneout", "pool_repeat"),
    "everything",
)


def _parametrize(marks):
    return pytest.mark.parametrize(
        "cell", [pytest.param(cell, id=name, marks=marks(name)) for name, cell in MEMBERS.items()]
    )


def every_member():
    """Parametrizes over all members; those that are not typical, in the full tier."""
    return some_members(*TYPICAL)


def every_member_and_option():
    """Parametrizes over all members, in both tiers."""
    return _parametrize(lambda name: [])


def some_members(*names):
    """Parametrizes over all members; those not named, in the full tier."""
    return _parametrize(lambda name: [] if name in names else [pytest.mark.full])


def has_direction(cell) -> bool:
    """Whether part of the cell runs in the opposite direction."""
    return not cell.causal


def streams(cell) -> bool:
    """Whether the cell runs step by step."""
    return not has_direction(cell)


def _rng(*seed):
    return np.random.default_rng(seed)


def draw_x(cell, seed, *leading, dtype=None):
    """A random x with these leading axes."""
    rng, dtype = _rng(seed, 1), dtype or jnp.result_type(float)
    if isinstance(cell, TwoInputs):
        return Pair(rng.normal(size=(*leading, D)).astype(dtype), rng.integers(0, 4, leading, np.int32))
    if cell.input_ndim == 0:
        return rng.integers(0, 7, leading, np.int32)
    size = getattr(cell, "input_size", None) or D
    size = size if isinstance(size, tuple) else (size,)
    return rng.normal(size=(*leading, *size)).astype(dtype)


def is_floating(leaf) -> bool:
    """Floating or complex."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def floats(tree) -> list:
    """The floating and complex leaves."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_floating(leaf)]


def redraw(tree, seed, scale=0.5):
    """Arrays like the tree's, every floating leaf drawn anew: biases, gains, carries and all; integers are 2."""
    rng = _rng(seed, 2)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            return (scale * (rng.normal(size=leaf.shape) + 1j * rng.normal(size=leaf.shape))).astype(leaf.dtype)
        if is_floating(leaf):
            return (scale * rng.normal(size=leaf.shape)).astype(leaf.dtype)
        return np.full(leaf.shape, 2, leaf.dtype)

    return jax.tree.map(draw, tree)


def draw_params(cell, seed=1, dtype=None):
    """Random params."""
    dtype = dtype or jnp.result_type(float)
    return redraw(jax.eval_shape(lambda key: cell.init(key, dtype), jax.random.key(0)), seed, 0.7)


def draw_carry(cell, params, *batch, seed=2):
    """A random carry; what a Pool has counted so far is 2."""
    return redraw(jax.eval_shape(lambda params: cell.initial_carry(params, batch), params), seed)


def weighted_sum(tree, seed=9):
    """A random weighting of every floating leaf: a loss that sees all of it."""
    rng, total = _rng(seed, 3), jnp.zeros((), jnp.result_type(float))
    for leaf in floats(tree):
        for part in (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,):
            total = total + jnp.sum(rng.normal(size=leaf.shape).astype(total.dtype) * part.astype(total.dtype))
    return total
