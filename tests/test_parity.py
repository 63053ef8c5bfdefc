"""The same numbers as other frameworks: outputs, final states, and the gradients of weights, inputs and initial states.

Everything is compared in the other framework's layout: what is differentiated converts the weights, then scans.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion import peer
from jax import lax
from tiers import mostly_in_full

from jaxrnn import (
    GRU,
    LSTM,
    Bidirectional,
    BidirectionalPair,
    ConvLSTM,
    ConvLSTMCarry,
    ConvLSTMParams,
    Elman,
    ElmanCarry,
    ElmanParams,
    GRUCarry,
    GRUParams,
    LSTMCarry,
    LSTMParams,
    Stack,
    scan,
)

os.environ["KERAS_BACKEND"] = "jax"

X64 = True
# Not all of them run under strict promotion.
PROMOTION = "standard"

T, B, D, H, P = 6, 3, 2, 5, 4
# No sequence is as long as the padding.
LENGTHS = np.array([4, 1, 5])
HOLES = np.array([[1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]], bool)


@pytest.fixture
def torch():
    module = peer("torch")
    module.set_num_threads(1)
    return module


@pytest.fixture
def keras():
    module = peer("keras")
    if module.backend.backend() != "jax":
        pytest.skip(f"parity needs keras on JAX, not on {module.backend.backend()}")
    # On JAX it computes in float32 whatever it is asked for, and under x64 some layers mix the two.
    with jax.enable_x64(False):
        yield module


@pytest.fixture
def linen():
    return peer("flax.linen")


@pytest.fixture
def nnx():
    return peer("flax.nnx")


@pytest.fixture
def haiku():
    return peer("haiku")


@pytest.fixture
def equinox():
    return peer("equinox")


def redraw(seed, tree):
    """Random normal numbers in place of every array, in its dtype."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.7 * rng.normal(size=leaf.shape)).astype(leaf.dtype), tree)


def loss_factors(run, arguments, keep):
    """One random factor for each number that `run` gives, zero for ys where `keep` is."""
    states, ys = redraw(1, jax.eval_shape(run, *arguments))
    return states, (ys * keep).astype(ys.dtype)


def differentiate(run, arguments, factors):
    """What `run` gives, and the gradients of its weighted sum."""

    def loss(*arguments):
        result = run(*arguments)
        terms = jax.tree.map(jnp.vdot, factors, result)
        return sum(jax.tree.leaves(terms)), result

    gradients, result = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)
    return result, gradients


def assert_equal(ours, theirs, keep):
    """Equal (result, gradients), ys being compared where `keep` is 1."""
    (states, ys), gradients = ours
    (their_states, their_ys), their_gradients = theirs
    kept = np.broadcast_to(keep, ys.shape) == 1
    ours = {"states": states, "ys": ys[kept], "gradients": gradients}
    theirs = {"states": their_states, "ys": their_ys[kept], "gradients": their_gradients}
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        assert np.linalg.norm(b) > 0, jax.tree_util.keystr(path)
        tolerance = {np.dtype(np.float64): 1e-9, np.dtype(np.float32): 1e-5}[a.dtype]
        np.testing.assert_allclose(a, b, tolerance, tolerance * abs(b).max(), err_msg=jax.tree_util.keystr(path))


def assert_parity(ours, theirs, arguments, keep=1.0):
    """Two functions `run(weights, states, xs) -> (states, ys)` are the same, at `arguments`."""
    factors = loss_factors(ours, arguments, keep)
    assert_equal(differentiate(ours, arguments, factors), differentiate(theirs, arguments, factors), keep)


def columns(array, order):
    """`array` with the gates of its last axis in another order."""
    gates = jnp.split(array, len(order), axis=-1)
    return jnp.concatenate([gates[k] for k in order], axis=-1)


# PyTorch


def torch_cell(module):
    """The cell that computes what a recurrent torch module does."""
    h = module.hidden_size

    def cell(size):
        return {
            "RNN_TANH": lambda: Elman(size, h),
            "RNN_RELU": lambda: Elman(size, h, activation="relu"),
            "LSTM": lambda: LSTM(size, h, projection_size=module.proj_size or None),
            "GRU": lambda: GRU(size, h),
        }[module.mode]()

    above = (module.proj_size or h) * (2 if module.bidirectional else 1)
    cells = [cell(module.input_size), *(cell(above) for _ in range(module.num_layers - 1))]
    layers = [Bidirectional(each, each) if module.bidirectional else each for each in cells]
    return Stack(tuple(layers)) if len(layers) > 1 else layers[0]


def nest(module, each):
    """One entry per layer and direction, as the composition holds them."""
    layers = each
    if module.bidirectional:
        layers = [BidirectionalPair(*pair) for pair in zip(each[::2], each[1::2], strict=True)]
    return tuple(layers) if len(layers) > 1 else layers[0]


def torch_params(module, weights):
    def params(suffix):
        w_x, w_h = weights[f"weight_ih{suffix}"].T, weights[f"weight_hh{suffix}"].T
        b_x, b_h = weights.get(f"bias_ih{suffix}"), weights.get(f"bias_hh{suffix}")
        if module.mode == "GRU":
            if b_x is None:
                return GRUParams(w_x, w_h, None)
            rz = 2 * module.hidden_size
            return GRUParams(w_x, w_h, jnp.concatenate([b_x[:rz] + b_h[:rz], b_x[rz:]]), b_h[rz:])
        b = None if b_x is None else b_x + b_h
        if module.mode == "LSTM":
            w_p = weights.get(f"weight_hr{suffix}")
            return LSTMParams(w_x, w_h, b, w_p=None if w_p is None else w_p.T)
        return ElmanParams(w_x, w_h, b)

    directions = ("", "_reverse") if module.bidirectional else ("",)
    return nest(module, [params(f"_l{k}{way}") for k in range(module.num_layers) for way in directions])


def torch_run(module, lengths):
    cell = torch_cell(module)
    carry_type = {"LSTM": LSTMCarry, "GRU": GRUCarry}.get(module.mode, ElmanCarry)

    def run(weights, states, xs):
        carry = nest(module, [carry_type(*parts) for parts in zip(*states, strict=True)])
        params = torch_params(module, weights)
        carry, ys = scan(cell, params, carry, xs, lengths=lengths, time_axis=int(module.batch_first))
        each = jax.tree.leaves(carry, is_leaf=lambda node: isinstance(node, carry_type))
        return tuple(jnp.stack(parts) for parts in zip(*each, strict=True)), ys

    return run


def torch_outcome(torch, module, lengths, arguments, factors):
    """What the torch module gives, and the gradients of its weighted sum."""
    weights, states, xs = jax.tree.map(lambda leaf: torch.tensor(leaf, requires_grad=True), arguments)
    packing = torch.nn.utils.rnn
    inputs = xs
    if lengths is not None:
        inputs = packing.pack_padded_sequence(
            xs, torch.tensor(lengths), batch_first=module.batch_first, enforce_sorted=False
        )
    given = states if module.mode == "LSTM" else states[0]
    ys, new = torch.func.functional_call(module, weights, (inputs, given))
    if lengths is not None:
        ys, _ = packing.pad_packed_sequence(ys, batch_first=module.batch_first, total_length=T)
    new = new if module.mode == "LSTM" else (new,)
    terms = jax.tree.map(lambda w, leaf: (torch.tensor(w) * leaf).sum(), factors, (new, ys))
    sum(jax.tree.leaves(terms)).backward()
    result = jax.tree.map(lambda leaf: leaf.detach().numpy(), (new, ys))
    return result, jax.tree.map(lambda leaf: leaf.grad.numpy(), (weights, states, xs))


TORCH = {
    "RNN": ("RNN", {}, None),
    "RNN relu without bias": ("RNN", {"nonlinearity": "relu", "bias": False}, None),
    "RNN 2 layers bidirectional packed": ("RNN", {"num_layers": 2, "bidirectional": True}, LENGTHS),
    "RNN relu bidirectional": ("RNN", {"nonlinearity": "relu", "bidirectional": True}, None),
    "LSTM": ("LSTM", {}, None),
    "LSTM without bias": ("LSTM", {"bias": False}, None),
    "LSTM 2 layers": ("LSTM", {"num_layers": 2, "batch_first": True}, None),
    "LSTM bidirectional packed": ("LSTM", {"bidirectional": True}, LENGTHS),
    "LSTM proj_size": ("LSTM", {"proj_size": P}, None),
    "LSTM proj_size 2 layers bidirectional packed batch_first": (
        "LSTM",
        {"proj_size": P, "num_layers": 2, "bidirectional": True, "batch_first": True},
        LENGTHS,
    ),
    "GRU": ("GRU", {}, None),
    "GRU without bias": ("GRU", {"bias": False}, None),
    "GRU packed batch_first": ("GRU", {"batch_first": True}, LENGTHS),
    "GRU 2 layers bidirectional packed": ("GRU", {"num_layers": 2, "bidirectional": True}, LENGTHS),
}


@pytest.mark.parametrize(
    "name",
    mostly_in_full(
        TORCH,
        *("RNN relu without bias", "LSTM bidirectional packed", "GRU", "GRU packed batch_first"),
        "LSTM proj_size 2 layers bidirectional packed batch_first",
    ),
)
def test_torch(torch, name):
    kind, options, lengths = TORCH[name]
    module = getattr(torch.nn, kind)(D, H, dtype=torch.float64, **options)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    states = [np.empty((rows, B, module.proj_size or H)), *([np.empty((rows, B, H))] if kind == "LSTM" else [])]
    weights = {name: np.empty(weight.shape) for name, weight in module.named_parameters()}
    xs = np.empty((B, T, D) if module.batch_first else (T, B, D))
    arguments = redraw(0, (weights, tuple(states), xs))

    run = torch_run(module, lengths)
    factors = loss_factors(run, arguments, 1.0)
    theirs = torch_outcome(torch, module, lengths, arguments, factors)
    assert_equal(differentiate(run, arguments, factors), theirs, 1.0)


# Keras

RZN = (1, 0, 2)


def keras_params(layer, weights):
    """Keras' kernels are (in, out); the LSTM's gates are i f c o, the GRU's z r h."""
    w_x, w_h, *bias = weights
    b = bias[0] if bias else None
    kind = type(layer).__name__
    if kind.startswith("ConvLSTM"):
        return ConvLSTMParams(w_x, w_h, b)
    if kind == "GRU":
        w_x, w_h = columns(w_x, RZN), columns(w_h, RZN)
        if b is None:
            return GRUParams(w_x, w_h, None)
        if not layer.reset_after:
            return GRUParams(w_x, w_h, columns(b, RZN))
        b_x, b_h = columns(b, RZN)
        rz = 2 * layer.units
        return GRUParams(w_x, w_h, jnp.concatenate([b_x[:rz] + b_h[:rz], b_x[rz:]]), b_h[rz:])
    return LSTMParams(w_x, w_h, b) if kind == "LSTM" else ElmanParams(w_x, w_h, b)


def keras_parity(layer, cell, carry_type, xs_shape, states, mask=None):
    layer.build(xs_shape)
    weights = [np.empty(each.shape, np.float32) for each in layer.trainable_variables]
    fixed = [each.value for each in layer.non_trainable_variables]
    two = isinstance(cell, Bidirectional)

    def theirs(weights, states, xs):
        mask_ = {} if mask is None else {"mask": jnp.asarray(mask)}
        (ys, *states), _ = layer.stateless_call(weights, fixed, xs, initial_state=list(states), **mask_)
        return states, ys

    def ours(weights, states, xs):
        if two:
            half, parts = len(weights) // 2, len(states) // 2
            params = BidirectionalPair(
                keras_params(layer.forward_layer, weights[:half]), keras_params(layer.backward_layer, weights[half:])
            )
            carry = BidirectionalPair(carry_type(*states[:parts]), carry_type(*states[parts:]))
        else:
            params, carry = keras_params(layer, weights), carry_type(*states)
        carry, ys = scan(cell, params, carry, xs, time_axis=1, mask=mask)
        return jax.tree.leaves(carry), ys

    keep = 1.0 if mask is None else np.asarray(mask, float)[..., None]
    assert_parity(ours, theirs, redraw(0, (weights, states, np.empty(xs_shape, np.float32))), keep)


KERAS = {
    "SimpleRNN": ("SimpleRNN", {}, Elman(D, H)),
    "LSTM": ("LSTM", {}, LSTM(D, H)),
    "LSTM hard_sigmoid": (
        "LSTM",
        {"recurrent_activation": "hard_sigmoid"},
        LSTM(D, H, gate_activation="keras_hard_sigmoid"),
    ),
    "GRU reset_after": ("GRU", {"reset_after": True}, GRU(D, H)),
    "GRU reset before": ("GRU", {"reset_after": False}, GRU(D, H, reset_after=False)),
}
CARRIES = {Elman: ElmanCarry, LSTM: LSTMCarry, GRU: GRUCarry}


def keras_layer(keras, kind, options):
    """A layer of zeros, since all weights are drawn anew."""
    zeros = {"kernel_initializer": "zeros", "recurrent_initializer": "zeros"}
    return getattr(keras.layers, kind)(H, return_sequences=True, return_state=True, **zeros, **options)


def keras_states(cell):
    return [np.empty((B, H), np.float32) for _ in CARRIES[type(cell)]._fields]


@pytest.mark.parametrize(("kind", "options", "cell"), list(KERAS.values()), ids=list(KERAS))
def test_keras(keras, kind, options, cell):
    layer = keras_layer(keras, kind, options)
    keras_parity(layer, cell, CARRIES[type(cell)], (B, T, D), keras_states(cell))


@pytest.mark.parametrize("name", ["LSTM", "GRU reset_after"])
def test_keras_masks_at_valid_steps(keras, name):
    kind, options, cell = KERAS[name]
    layer = keras_layer(keras, kind, options)
    keras_parity(layer, cell, CARRIES[type(cell)], (B, T, D), keras_states(cell), HOLES)


@pytest.mark.parametrize(("name", "mask"), [("LSTM", HOLES), ("GRU reset before", None)], ids=["masked", "whole"])
def test_keras_bidirectional(keras, name, mask):
    kind, options, cell = KERAS[name]
    layer = keras.layers.Bidirectional(keras_layer(keras, kind, options))
    both = Bidirectional(cell, cell)
    keras_parity(layer, both, CARRIES[type(cell)], (B, T, D), 2 * keras_states(cell), mask)


KERAS_CONVOLUTIONS = {
    "1D same strides": ((8,), {"kernel_size": 4, "strides": 2, "padding": "same"}),
    "2D valid strides": ((7, 6), {"kernel_size": (2, 3), "strides": (3, 2)}),
    "2D same dilation without bias": (
        (4, 6),
        {"kernel_size": (3, 2), "dilation_rate": (1, 3), "padding": "same", "use_bias": False},
    ),
}


@pytest.mark.parametrize(("spatial_shape", "options"), list(KERAS_CONVOLUTIONS.values()), ids=list(KERAS_CONVOLUTIONS))
def test_keras_convolution(keras, spatial_shape, options):
    layer = keras_layer(keras, f"ConvLSTM{len(spatial_shape)}D", options)
    cell = ConvLSTM(
        spatial_shape,
        D,
        H,
        kernel_size=options["kernel_size"],
        strides=options.get("strides", 1),
        dilation=options.get("dilation_rate", 1),
        padding=options.get("padding", "valid").upper(),
    )
    state = np.empty((B, *cell.output_size), np.float32)
    keras_parity(layer, cell, ConvLSTMCarry, (B, T, *spatial_shape, D), [state, state])


# Flax

IFGO = ("i", "f", "g", "o")


def linen_simple(weights):
    return ElmanParams(weights["i"]["kernel"], weights["h"]["kernel"], weights["i"]["bias"])


def linen_lstm(weights):
    return LSTMParams(
        jnp.concatenate([weights[f"i{gate}"]["kernel"] for gate in IFGO], -1),
        jnp.concatenate([weights[f"h{gate}"]["kernel"] for gate in IFGO], -1),
        jnp.concatenate([weights[f"h{gate}"]["bias"] for gate in IFGO]),
    )


def linen_gru(weights):
    return GRUParams(
        jnp.concatenate([weights[f"i{gate}"]["kernel"] for gate in "rzn"], -1),
        jnp.concatenate([weights[f"h{gate}"]["kernel"] for gate in "rzn"], -1),
        jnp.concatenate([weights[f"i{gate}"]["bias"] for gate in "rzn"]),
        weights["hn"]["bias"],
    )


def forget_bias_added(b, f):
    """Flax' and Haiku's cells add 1 to the forget gate's bias as they run; f is the gate's place."""
    size = b.shape[0] // 4
    return b.at[f * size : (f + 1) * size].add(1)


IGFO = (0, 2, 1, 3)


def linen_convolution(weights):
    b = forget_bias_added(weights["ih"]["bias"] + weights["hh"]["bias"], 2)
    return ConvLSTMParams(
        columns(weights["ih"]["kernel"], IGFO), columns(weights["hh"]["kernel"], IGFO), columns(b, IGFO)
    )


def flax_states(carry):
    """Flax' states are h, or (c, h)."""
    return (carry.c, carry.h) if hasattr(carry, "c") else carry.h


def flax_carry(carry_type, states):
    return carry_type(*reversed(states)) if isinstance(states, tuple) else carry_type(states)


LINEN = {
    "SimpleCell": ("SimpleCell", {"features": H}, Elman(D, H), ElmanCarry, linen_simple),
    "LSTMCell": ("LSTMCell", {"features": H}, LSTM(D, H), LSTMCarry, linen_lstm),
    "OptimizedLSTMCell": ("OptimizedLSTMCell", {"features": H}, LSTM(D, H), LSTMCarry, linen_lstm),
    "GRUCell": ("GRUCell", {"features": H}, GRU(D, H), GRUCarry, linen_gru),
    "ConvLSTMCell": (
        "ConvLSTMCell",
        {"features": H, "kernel_size": (2, 3)},
        ConvLSTM((4, 3), D, H, kernel_size=(2, 3)),
        ConvLSTMCarry,
        linen_convolution,
    ),
}


@pytest.mark.parametrize(
    ("name", "lengths"),
    [(name, LENGTHS if name == "LSTMCell" else None) for name in LINEN],
    ids=lambda value: "packed" if isinstance(value, np.ndarray) else value or "whole",
)
def test_linen(linen, name, lengths):
    kind, options, cell, carry_type, convert = LINEN[name]
    layer = linen.RNN(getattr(linen, kind)(param_dtype=jnp.float64, **options), return_carry=True)
    xs = np.empty((B, T, *np.atleast_1d(cell.input_size)))
    states = flax_states(carry_type(*[np.empty((B, *np.atleast_1d(cell.output_size)))] * len(carry_type._fields)))
    weights = jax.eval_shape(layer.init, jax.random.key(0), xs)["params"]["cell"]

    def theirs(weights, states, xs):
        return layer.apply({"params": {"cell": weights}}, xs, initial_carry=states, seq_lengths=lengths)

    def ours(weights, states, xs):
        carry = flax_carry(carry_type, states)
        carry, ys = scan(cell, convert(weights), carry, xs, time_axis=1, lengths=lengths)
        return flax_states(carry), ys

    keep = 1.0 if lengths is None else (np.arange(T) < lengths[:, None]).astype(float)[..., None]
    assert_parity(ours, theirs, redraw(0, (weights, states, xs)), keep)


def nnx_simple(weights):
    return ElmanParams(weights["dense_i"]["kernel"], weights["dense_h"]["kernel"], weights["dense_i"]["bias"])


def nnx_lstm(weights):
    return linen_lstm({name.removesuffix("_"): weight for name, weight in weights.items()})


def nnx_optimized_lstm(weights):
    return LSTMParams(weights["dense_i"]["kernel"], weights["dense_h"]["kernel"], weights["dense_h"]["bias"])


def nnx_gru(weights):
    """NNX' GRU has no bias inside the reset."""
    return GRUParams(weights["dense_i"]["kernel"], weights["dense_h"]["kernel"], weights["dense_i"]["bias"])


NNX = {
    "SimpleCell": (Elman(D, H), ElmanCarry, nnx_simple),
    "LSTMCell": (LSTM(D, H), LSTMCarry, nnx_lstm),
    "OptimizedLSTMCell": (LSTM(D, H), LSTMCarry, nnx_optimized_lstm),
    "GRUCell": (GRU(D, H), GRUCarry, nnx_gru),
}


@pytest.mark.parametrize("name", list(NNX))
def test_nnx(nnx, name):
    cell, carry_type, convert = NNX[name]
    make = functools.partial(getattr(nnx, name), D, H, dtype=jnp.float64, param_dtype=jnp.float64)
    structure, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    states = flax_states(carry_type(*[np.empty((B, H))] * len(carry_type._fields)))

    def theirs(weights, states, xs):
        return lax.scan(lambda carry, x: nnx.merge(structure, weights)(carry, x), states, xs)

    def ours(weights, states, xs):
        carry, ys = scan(cell, convert(nnx.to_pure_dict(weights)), flax_carry(carry_type, states), xs)
        return flax_states(carry), ys

    assert_parity(ours, theirs, redraw(0, (state, states, np.empty((T, B, D)))))


# Haiku


def haiku_vanilla(weights):
    linear, linear_1 = weights["vanilla_rnn/linear"], weights["vanilla_rnn/linear_1"]
    return ElmanParams(linear["w"], linear_1["w"], linear["b"] + linear_1["b"])


def haiku_lstm(weights):
    w, b = weights["lstm/linear"]["w"], weights["lstm/linear"]["b"]
    w = columns(w, IGFO)
    return LSTMParams(w[:D], w[D:], columns(forget_bias_added(b, 2), IGFO))


def haiku_gru(weights):
    """Haiku's gates are z r n, and its z is 1 − z."""

    def convert(array):
        z, r, n = jnp.split(array, 3, axis=-1)
        return jnp.concatenate([r, -z, n], axis=-1)

    return GRUParams(*(convert(weights["gru"][name]) for name in ("w_i", "w_h", "b")))


HAIKU = {
    "VanillaRNN": (Elman(D, H, activation="relu"), ElmanCarry, haiku_vanilla),
    "LSTM": (LSTM(D, H), LSTMCarry, haiku_lstm),
    "GRU": (GRU(D, H, reset_after=False), GRUCarry, haiku_gru),
}


@pytest.mark.parametrize("name", list(HAIKU))
def test_haiku(haiku, name):
    cell, carry_type, convert = HAIKU[name]
    model = haiku.without_apply_rng(
        haiku.transform(lambda states, xs: haiku.dynamic_unroll(getattr(haiku, name)(H), xs, states))
    )
    xs, states = np.empty((T, B, D)), [np.empty((B, H))] * len(carry_type._fields)

    def unroll(weights, states, xs):
        states = haiku.LSTMState(*states) if name == "LSTM" else states[0]
        ys, states = model.apply(weights, states, xs)
        return list(states) if name == "LSTM" else [states], ys

    def ours(weights, states, xs):
        carry, ys = scan(cell, convert(weights), carry_type(*states), xs)
        return list(carry), ys

    given = haiku.LSTMState(*states) if name == "LSTM" else states[0]
    weights = jax.eval_shape(model.init, jax.random.key(0), given, xs)
    assert_parity(ours, unroll, redraw(0, (weights, states, xs)))


# Equinox


def equinox_lstm(module):
    return LSTMParams(module.weight_ih.T, module.weight_hh.T, module.bias)


def equinox_gru(module):
    return GRUParams(module.weight_ih.T, module.weight_hh.T, module.bias, module.bias_n)


EQUINOX = {
    "LSTMCell": (LSTM(D, H), LSTMCarry, equinox_lstm),
    "GRUCell": (GRU(D, H), GRUCarry, equinox_gru),
}


@pytest.mark.parametrize("name", list(EQUINOX))
def test_equinox(equinox, name):
    cell, carry_type, convert = EQUINOX[name]
    make = functools.partial(getattr(equinox.nn, name), D, H, dtype=jnp.float64)
    module = equinox.filter_eval_shape(make, key=jax.random.key(0))

    def theirs(module, states, xs):
        def step(states, x):
            states = jax.vmap(module)(x, states if name == "LSTMCell" else states[0])
            states = states if name == "LSTMCell" else (states,)
            return states, states[0]

        return lax.scan(step, states, xs)

    def ours(module, states, xs):
        carry, ys = scan(cell, convert(module), carry_type(*states), xs)
        return tuple(carry), ys

    states = (np.empty((B, H)),) * len(carry_type._fields)
    assert_parity(ours, theirs, redraw(0, (module, states, np.empty((T, B, D)))))
