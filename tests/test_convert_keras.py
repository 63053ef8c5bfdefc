"""Keras 3 models and back: outputs, final states, gradients of weights, inputs and initial states; and refusals."""

import copy
import functools
import json
import os
import subprocess
import sys
import time

import conversion
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion import assert_close, assert_weight_gradients, redraw
from tiers import mostly_in_full

import jaxrnn
from jaxrnn import GRU, LSTM, Apply, Backward, Bidirectional, Dropout, Elman, Embed, Linear, Pool, Stack
from jaxrnn.convert.keras import KerasMask, KerasModel, from_keras, to_keras

os.environ["KERAS_BACKEND"] = "jax"

PROMOTION = "standard"

# Keras' variables as arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

B, T, D = 3, 5, 2
VOCABULARY = 7
HOLES = np.array([[0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [0, 1, 1, 1, 0]], bool)


@pytest.fixture(scope="module")
def keras():
    module = conversion.peer("keras")
    if module.backend.backend() != "jax":
        pytest.skip(f"parity needs keras on JAX, not on {module.backend.backend()}")
    return module


# Random configurations


class Draw:
    """Random layers."""

    def __init__(self, keras, seed):
        self.rng, self.layers = np.random.default_rng(seed), keras.layers

    def one(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def layer(self, kind, *args, **options):
        return getattr(self.layers, kind)(*args, **options)

    def options(self, kind):
        """Of a cell of this kind."""
        rate = self.one(0.0, 0.3)
        found = {"use_bias": bool(self.rng.random() < 0.7), "dropout": rate, "recurrent_dropout": self.one(0.0, 0.2)}
        found["activation"] = self.one("tanh", "relu", "softsign", "elu", None, "silu", "leaky_relu")
        # All weights are drawn anew, and orthogonal ones take long to compile.
        found |= {"kernel_initializer": "zeros", "recurrent_initializer": "zeros"}
        if "SimpleRNN" not in kind:
            found["recurrent_activation"] = self.one("sigmoid", "hard_sigmoid", "tanh")
        if "GRU" in kind:
            found["reset_after"] = bool(self.rng.random() < 0.5)
        return found

    def recurrent(self, kind, **options):
        h = int(self.rng.integers(3, 6))
        match kind:
            case "SimpleRNN" | "LSTM" | "GRU":
                return self.layer(kind, h, **self.options(kind), **options)
            case "RNN":
                kinds = [self.one("SimpleRNNCell", "LSTMCell", "GRUCell") for _ in range(2)]
                return self.layer(
                    kind, [self.layer(k, h + n, **self.options(k)) for n, k in enumerate(kinds)], **options
                )
            case "ConvLSTM1D" | "ConvLSTM2D" | "ConvLSTM3D":
                n = int(kind[-2])
                shape = {"kernel_size": [3, 2, 1][:n], "padding": self.one("same", "valid")}
                shape |= self.one({"strides": [2, 1, 1][:n]}, {"dilation_rate": [1, 2, 1][:n]})
                return self.layer(kind, h, **shape, **self.options(kind), **options)
        turned = options.pop("go_backwards", False)
        inner = self.one("LSTM", "GRU")
        first = self.layer(inner, h, **self.options(inner), go_backwards=turned, **options)
        if turned or self.rng.random() < 0.5:
            second = self.layer(inner, h, **self.options(inner), go_backwards=not turned, **options)
        else:
            second = None
        merge = self.one("concat", "sum", "mul", "ave")
        return self.layer("Bidirectional", first, merge_mode=merge, backward_layer=second)

    def pointwise(self, timed):
        match self.rng.integers(9 if timed else 7):
            case 0:
                return self.layer(
                    "Dense", 4, activation=self.one(None, "softmax", "gelu"), use_bias=self.one(True, False)
                )
            case 1:
                return self.layer(
                    "LayerNormalization", epsilon=0.02, center=self.one(True, False), scale=self.one(True, False)
                )
            case 2:
                return self.layer("Dropout", 0.4)
            case 3:
                return self.layer(
                    "Activation", self.one("softmax", "mish", "relu6", "selu", "exponential", "log_softmax")
                )
            case 4:
                return self.layer("ReLU", negative_slope=0.1)
            case 5:
                return self.layer("LeakyReLU")
            case 6:
                return self.layer("ELU", alpha=0.6)
            case 7:
                return self.layer("TimeDistributed", self.layer("Dense", 3, activation="hard_sigmoid"))
        return self.layer("SpatialDropout1D", 0.4)


SINGLE = [
    "LSTM",
    "ConvLSTM1D",
    "GRU",
    "Bidirectional",
    "SimpleRNN",
    "RNN",
    "ConvLSTM2D",
    "GRU",
    "Bidirectional",
    "ConvLSTM3D",
]


def single(keras, seed):
    """(layer, xs, mask): a layer with all its states, and holes in every other one."""
    draw, kind = Draw(keras, seed), SINGLE[seed // 2 % 10]
    conv = kind.startswith("Conv")
    options = {"return_sequences": draw.one(True, True, False), "return_state": True}
    layer = draw.recurrent(kind, go_backwards=draw.one(True, False), **options)
    shape = (B, T, *(4, 3, 2)[: int(kind[-2])], D) if conv else (B, T, D)
    if not conv and kind != "Bidirectional":
        layer.zero_output_for_mask = draw.one(True, False)
    layer.build(shape)
    return layer, redraw(seed, np.empty(shape, np.float32), 1.0), None if conv or seed // 2 % 2 else HOLES


def model(keras, seed):
    """(Sequential or functional model, xs)."""
    draw = Draw(keras, seed)
    start = draw.one("Embedding", "Masking", "plain")
    kinds = ["GRU", "LSTM", "Bidirectional", "SimpleRNN", "RNN"]
    xs = redraw(seed, np.empty((B, T, D), np.float32), 1.0)
    layers = [keras.layers.InputLayer(shape=(None, D))]
    masked = start == "Masking" or (start == "Embedding" and draw.one(True, False))
    if start == "Embedding":
        layers = [keras.layers.InputLayer(shape=(None,), dtype="int32")]
        layers.append(draw.layer("Embedding", VOCABULARY, 3, mask_zero=masked))
        xs = draw.rng.integers(1, VOCABULARY, (B, T)) * HOLES
    if start == "Masking":
        layers.append(draw.layer("Masking", 0.5))
        xs = np.where(HOLES[..., None], xs, np.float32(0.5))
    end = draw.one("sequence", "last", "GlobalAveragePooling1D", "last" if masked else "GlobalMaxPooling1D")
    count = 1 if seed < 8 else int(draw.rng.integers(1, 4))
    for k in range(count):
        last = end == "last" and k == count - 1
        turned = (not masked or last) and draw.one(True, False)
        layers.append(draw.recurrent(draw.one(*kinds), go_backwards=turned, return_sequences=not last))
        layers += [draw.pointwise(not last)] if draw.rng.random() < 0.7 else []
    if end.startswith("Global"):
        layers += [draw.layer("Dense", 4), draw.layer(end)]
    layers += [draw.pointwise(False)] if end != "sequence" else []
    if draw.one(True, False):
        return keras.Sequential(layers), xs
    ys = inputs = layers[0].output
    for layer in layers[1:]:
        ys = layer(ys)
    return keras.Model(inputs, ys), xs


def turned(config):
    """Whether Keras' outputs are in the opposite order of time."""
    layers = config["config"].get("layers", [config])
    found = [
        layer["config"].get("layer", layer)["config"] for layer in layers if layer["class_name"] != "TimeDistributed"
    ]
    return sum(layer.get("go_backwards", False) for layer in found) % 2 == 1


# Comparisons


def theirs(layer, weights, states, xs, factors, keep, flip, mask):
    """The outcome of a Keras layer, and the gradients of (weights, states, xs)."""
    fixed = [each.value for each in layer.non_trainable_variables]
    options = {} if mask is None else {"mask": jnp.asarray(mask)}

    def loss(weights, states, xs):
        given = options if states is None else options | {"initial_state": states}
        result, _ = layer.stateless_call(weights, fixed, xs, **given)
        ys, *final = result if isinstance(result, (list, tuple)) else [result]
        ys = jnp.flip(ys, 1) if flip else ys
        terms = [jnp.vdot(w, y) for w, y in zip(factors[0], jax.tree.leaves(final), strict=True)]
        return sum(terms) + jnp.vdot(factors[1], ys * keep), (jax.tree.leaves(final), ys)

    floating = jnp.issubdtype(xs.dtype, jnp.floating)
    argnums = (0,) + (1,) * (states is not None) + (2,) * floating
    gradients, result = jax.jit(jax.grad(loss, argnums, has_aux=True))(weights, states, xs)
    found = dict(zip(argnums, gradients, strict=True))
    return result, tuple(found.get(k) for k in range(3))


def states_of(carry):
    """The states in a carry, without what is pooled, in Keras' order."""
    pooled = lambda node: isinstance(node, jaxrnn.PoolCarry)
    return jax.tree.leaves([node.cell if pooled(node) else node for node in jax.tree.leaves(carry, is_leaf=pooled)])


def assert_parity(keras, layer, xs, mask=None, states=False):
    """`from_keras(layer)` is the layer: outputs, final states where it puts them out, and gradients."""
    weights = [np.asarray(w) for w in redraw(3, layer.get_weights())]
    layer.set_weights(weights)
    converted = from_keras(layer)
    config = keras.saving.serialize_keras_object(layer)
    if mask is None and converted.mask is not None:
        np.testing.assert_array_equal(converted.mask(xs), HOLES)
        given = {"mask": converted.mask(xs), "time_axis": 1}
    else:
        given = {"mask": mask, "time_axis": 1}
    cell, params, _ = converted
    many = not cell.ends_time
    carry = None
    if states and many:
        carry = redraw(4, cell.initial_carry(params, (B,)))
    shapes = jax.eval_shape(lambda: jaxrnn.scan(cell, params, carry, xs, **given))
    factors = redraw(5, shapes, 1.0)
    valid = given["mask"] if many else None
    keep = (
        1.0 if valid is None else np.asarray(valid).reshape(B, T, *[1] * (factors[1].ndim - 2)).astype(factors[1].dtype)
    )
    if not states:
        factors = (jax.tree.map(np.zeros_like, factors[0]), factors[1])
    elif not many:  # what is pooled is no state of Keras'
        kept = states_of(factors[0])
        factors = (
            jax.tree.map(lambda leaf: leaf if any(leaf is k for k in kept) else np.zeros_like(leaf), factors[0]),
            factors[1],
        )
    (carry_out, ys), (d_params, d_carry, d_xs) = conversion.run(
        cell, params, carry, xs, factors, None if valid is None else keep, **given
    )
    initial = None
    if carry is not None:
        inner = [layer.forward_layer, layer.backward_layer] if hasattr(layer, "forward_layer") else [layer]
        shape = [state for each in inner for state in each.get_initial_state(B)]
        initial = jax.tree.unflatten(jax.tree.structure(shape), states_of(carry))
    flip = many and turned(config)
    factors_ = (states_of(factors[0]) if states else [], factors[1])
    (final, expected), (d_weights, d_initial, d_inputs) = theirs(
        layer, weights, initial, xs, factors_, keep, flip, mask
    )
    assert_close(ys * keep, expected * keep, "ys")
    assert (abs(np.asarray(ys) * (1 - keep)) == 0).all()
    if states:
        assert_close(states_of(carry_out), final, "final")
    if initial is not None:
        assert_close(states_of(d_carry), jax.tree.leaves(d_initial), "initial states")
    if d_inputs is not None:
        assert_close(d_xs, d_inputs, "xs")
    names = [str(k) for k in range(len(weights))]
    # What softmax or a norm cancels has no gradient but rounding.
    seen = [n for n, g in zip(names, d_weights, strict=True) if np.linalg.norm(g) > 1e-4]
    assert len(seen) > len(names) / 2
    fixed = dict(zip(names, weights, strict=True))

    def convert(some):
        return from_keras(config, list((fixed | some).values())).params

    assert_weight_gradients(convert, {n: fixed[n] for n in seen}, d_params, dict(zip(names, d_weights, strict=True)))
    return converted, ys if carry is None else None


@functools.partial(jax.jit, static_argnames="model")
def scan(model, params, xs, mask):
    return jaxrnn.scan(model, params, None, xs, mask=mask, time_axis=1)[1]


def run(model, params, xs, mask=None):
    """The output of a converted model from a fresh start, with its own mask if it has one."""
    return scan(model.cell, params, xs, mask if model.mask is None else model.mask(xs))


def assert_round_trip(keras, layer, xs, mask, converted, ys):
    """What `to_keras` of it makes computes the same `ys` in Keras, and what `from_keras` makes of that."""
    cell, params, own = converted
    config, weights = to_keras(cell, params, mask_value=None if own is None else own.value)
    assert json.loads(json.dumps(config)) == config
    model = keras.Sequential.from_config(config)
    model.set_weights(weights)

    @jax.jit
    def call(xs):
        if own is not None or mask is None:
            return model(xs)
        for each in model.layers:  # which a mask that is given does not reach through the model
            xs = each(xs, **({"mask": jnp.asarray(mask)} if each._call_has_mask_arg else {}))
        return xs

    expected = call(xs)
    if not cell.ends_time:
        expected = expected[:, ::-1] if turned({"config": config}) else expected
    assert_close(ys, jnp.where(ys == 0, 0, expected), "to_keras")
    back = from_keras(config, weights)
    assert_close(run(back, back.params, xs, mask), ys, "there and back")


def check(keras, seed):
    layer, xs, *mask = single(keras, seed) if seed % 2 == 0 else model(keras, seed)
    mask = mask[0] if mask else None
    converted, ys = assert_parity(keras, layer, xs, mask, states=seed % 2 == 0)
    if ys is None:
        ys = run(converted, converted.params, xs, mask)
    assert_round_trip(keras, layer, xs, mask, converted, ys)


@pytest.mark.parametrize("seed", range(2))
def test_parity(keras, seed):
    check(keras, seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2, 48))
def test_parity_of_more(keras, seed):
    check(keras, seed)


# One rule each, so that each is seen in the fast tier

SEQ = {"return_sequences": True}
RULES = {
    "GRU after": lambda L: [L.GRU(3)],
    "GRU before": lambda L: [L.GRU(3, reset_after=False, activation="relu")],
    "LSTM": lambda L: [L.LSTM(3, activation="softsign", recurrent_activation="hard_sigmoid")],
    "turned twice": lambda L: [L.LSTM(3, go_backwards=True, **SEQ), L.GRU(4, go_backwards=True, **SEQ)],
    "turned before both": lambda L: [
        L.SimpleRNN(3, go_backwards=True, **SEQ),
        L.Bidirectional(L.GRU(4), "ave", backward_layer=L.GRU(4, activation="relu", go_backwards=True)),
    ],
    "defaults": lambda L: [L.LSTM(3, **SEQ), L.LayerNormalization(), L.LeakyReLU(), L.Dense(2, "leaky_relu")],
    "masked, the last": lambda L: [L.Masking(0.5), L.LSTM(3, zero_output_for_mask=True), L.Dense(2)],
    "masked, the first": lambda L: [L.Masking(0.5), L.GRU(3, go_backwards=True, zero_output_for_mask=True)],
    "masked, cells": lambda L: [L.Masking(0.5), L.RNN([L.GRUCell(3), L.LSTMCell(2)], zero_output_for_mask=True)],
    "masked, unrolled": lambda L: [L.Masking(0.5), L.GRU(3, unroll=True, zero_output_for_mask=True)],
    "masked, both ways": lambda L: [L.Masking(0.5), L.Bidirectional(L.LSTM(3, zero_output_for_mask=True))],
    "tokens": lambda L: [L.Embedding(VOCABULARY, 3, mask_zero=True), L.GRU(4, **SEQ), L.GlobalAveragePooling1D()],
}


@pytest.mark.parametrize("name", mostly_in_full(RULES, "turned twice", "masked, the first", "masked, cells", "tokens"))
def test_rules(keras, name):
    layers = RULES[name](keras.layers)
    rng = np.random.default_rng(0)
    xs = rng.normal(size=(B, T, D)).astype(np.float32)
    if name.startswith("masked"):
        xs = np.where(HOLES[..., None], xs, np.float32(0.5))
    if name == "tokens":
        xs = (rng.integers(1, VOCABULARY, (B, T)) * HOLES).astype(np.int32)
    model = keras.Sequential([keras.Input(xs.shape[1:], dtype=xs.dtype), *layers])
    model.set_weights(redraw(0, model.get_weights()))
    converted = from_keras(model)
    assert_close(run(converted, converted.params, xs), jax.jit(model)(xs))


@pytest.mark.full
@pytest.mark.parametrize("backwards", [False, True])
def test_the_end_of_a_given_mask(keras, backwards):
    """zero_output_for_mask=True: the only output is 0 where the last step is masked, and so is its gradient."""
    layer = keras.layers.LSTM(3, go_backwards=backwards, zero_output_for_mask=True)
    layer.build((None, None, D))
    cell, params, _ = from_keras(layer)
    xs = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    ys = scan(cell, params, xs, HOLES)
    assert_close(ys, layer(xs, mask=jnp.asarray(HOLES)))
    zero = ~HOLES[:, 0 if backwards else -1]
    assert zero.any()
    np.testing.assert_array_equal((ys == 0).all(-1), zero)
    if not backwards:  # the carry is that of the valid steps, so that a sequence may be cut
        carry, _ = jaxrnn.scan(cell, params, None, xs[:, :4], mask=HOLES[:, :4], time_axis=1)
        assert_close(jaxrnn.scan(cell, params, carry, xs[:, 4:], mask=HOLES[:, 4:], time_axis=1)[1], ys)


# Several outputs, several poolings, encoders and decoders


@pytest.mark.parametrize("sequences", [False, True])
def test_two_outputs(keras, sequences):
    """merge_mode=None gives a tuple, of a layer and of a model."""
    options = {"return_sequences": sequences}
    both = keras.layers.Bidirectional(keras.layers.LSTM(3, **options), merge_mode=None)
    inputs = keras.Input((T, D))
    model = keras.Model(inputs, both(inputs))
    model.set_weights(redraw(0, model.get_weights()))
    xs = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    for source in (both, model):
        cell, params, _ = from_keras(source)
        ys = scan(cell, params, xs, None)
        assert isinstance(ys, tuple)
        assert_close(ys, tuple(both(xs)))
    if sequences:
        ys, expected = scan(cell, params, xs, HOLES), both(xs, mask=jnp.asarray(HOLES))
        assert_close(ys, tuple(y * HOLES[..., None] for y in expected))
        config, weights = to_keras(cell, params)
        again = keras.Sequential.from_config(config)
        again.set_weights(weights)
        assert_close(tuple(again(xs)), tuple(both(xs)))
    inner = one("Bidirectional", merge_mode=None, layer=one("LSTM", units=4, **options))
    with pytest.raises(ValueError, match=r"layers\[1\]: Dense: the layer before it has two outputs"):
        from_keras(several(inner, one("Dense", units=2)), weights_of([*LSTM_SHAPES * 2, (4, 2), (2,)]))


def test_several_poolings(keras):
    """Concatenate of poolings of one sequence."""
    layers = keras.layers
    inputs = keras.Input((T, D))
    ys = layers.GRU(3, return_sequences=True)(inputs)
    ways = [layers.GlobalMaxPooling1D()(ys), layers.GlobalAveragePooling1D()(ys)]
    model = keras.Model(inputs, layers.Dense(2)(layers.Concatenate()(ways)))
    model.set_weights(redraw(0, model.get_weights()))
    xs = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    converted = from_keras(model)
    assert converted.cell == Stack((Pool(GRU(D, 3), ("max", "mean")), Linear(6, 2)))
    assert_close(run(converted, converted.params, xs), model(xs))
    with pytest.raises(ValueError, match="pools in one way only"):
        to_keras(converted.cell, converted.params)
    others = [
        layers.Concatenate()([ways[0], layers.Dense(2)(ways[1])]),
        layers.Concatenate()([ways[0], layers.GlobalMaxPooling1D()(inputs)]),
        layers.Add()(ways),
    ]
    for outputs in others:
        with pytest.raises(ValueError, match="expected one input tensor in one chain of layers"):
            from_keras(keras.Model(inputs, outputs))
    with pytest.raises(ValueError, match="axis: expected -1"):
        from_keras(keras.Model(inputs, layers.Concatenate(axis=0)(ways)))


def test_encoder_and_decoder(keras):
    """The encoder's final states are the decoder's carry; the model as a whole is no chain, and says so."""
    layers = keras.layers
    inputs, targets = keras.Input((None, D)), keras.Input((None, 3))
    encoder = layers.LSTM(4, return_state=True)
    decoder, top = layers.LSTM(4, return_sequences=True, return_state=True), layers.Dense(3, activation="softmax")
    _, *states = encoder(inputs)
    ys, _, _ = decoder(targets, initial_state=states)
    model = keras.Model([inputs, targets], top(ys))
    model.set_weights(redraw(0, model.get_weights()))
    rng = np.random.default_rng(0)
    xs, zs = (rng.normal(size=(B, T, size)).astype(np.float32) for size in (D, 3))
    for source in (encoder, keras.Model(inputs, states)):
        cell, params, _ = from_keras(source)
        carry, _ = jaxrnn.scan(cell, params, None, xs, time_axis=1)
        assert_close(tuple(carry.cell), tuple(encoder(xs)[1:]))
    (cell, params, _), head = from_keras(decoder), from_keras(top)
    _, ys = jaxrnn.scan(cell, params, carry.cell, zs, time_axis=1)
    assert_close(jaxrnn.scan(head.cell, head.params, None, ys, time_axis=1)[1], model([xs, zs]))
    with pytest.raises(
        ValueError, match="a decoder's layer is converted by itself, and its initial_state is the carry"
    ):
        from_keras(keras.Model([inputs, targets], decoder(targets, initial_state=states)[0]))


DECODERS = {
    "sequence": lambda layers: [layers.GRU(3, return_sequences=True), layers.Dense(2)],
    "stacked": lambda layers: [
        layers.Bidirectional(layers.LSTM(3, return_sequences=True)),
        layers.Dropout(0.2),
        layers.SimpleRNN(4, return_sequences=True),
        layers.TimeDistributed(layers.Dense(2)),
        layers.Activation("softmax"),
    ],
    "pooled": lambda layers: [layers.LSTM(3), layers.Dense(2)],
    "alone": lambda layers: [],
    "twice": lambda layers: [layers.LSTM(3), layers.RepeatVector(4), layers.GRU(2, return_sequences=True)],
}


@pytest.mark.parametrize("decoder", mostly_in_full(DECODERS, "alone", "twice"))
def test_repeat_vector(keras, decoder):
    """An autoencoder of sequences, there and back; a mask ends with the encoder."""
    layers = keras.layers
    below = [keras.Input((T, D)), layers.Masking(), layers.LSTM(4)]
    model = keras.Sequential([*below, layers.RepeatVector(6), *DECODERS[decoder](layers)])
    xs = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    xs[1, 2:] = 0
    converted = from_keras(model)
    mask = converted.mask(xs)
    assert_close(run(converted, converted.params, xs, mask), model(xs))
    config, weights = to_keras(*converted[:2], mask_value=0.0)
    again = keras.Sequential.from_config(config)
    again.set_weights(weights)
    assert_close(again(xs), model(xs))
    assert from_keras(again)[:1] == converted[:1]


def test_repeat_vector_of_a_sequence(keras):
    layers = keras.layers
    model = keras.Sequential([keras.Input((D,)), layers.RepeatVector(6), layers.LSTM(4)])
    with pytest.raises(ValueError, match=r"RepeatVector.*input: expected one vector for each sequence"):
        from_keras(model)
    cell = Stack((jaxrnn.Pool(LSTM(2, 3)), jaxrnn.Repeat(jaxrnn.Backward(LSTM(3, 4)), 5)))
    with pytest.raises(ValueError, match="in the opposite order"):
        to_keras(*init(cell))
    with pytest.raises(ValueError, match="takes one vector for each sequence"):
        to_keras(*init(jaxrnn.Repeat(LSTM(2, 3), 5)))


@pytest.mark.parametrize("side", ["pre", "post"])
def test_padding(keras, side):
    """The model's mask function is handed to `scan`, whichever side the rows are padded on."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((T,), dtype="int32"),
            layers.Embedding(VOCABULARY, 3, mask_zero=True),
            layers.Bidirectional(layers.LSTM(3)),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    tokens = keras.utils.pad_sequences([[1, 2, 3], [4, 5, 6, 1, 2], [3]], T, padding=side)
    cell, params, mask = from_keras(model)
    _, ys = jaxrnn.scan(cell, params, None, tokens, mask=mask(tokens), time_axis=1)
    assert_close(ys, model(tokens))
    logits = Stack(cell.cells[:-1])  # to train on, with a loss of logits
    _, found = jaxrnn.scan(logits, params[:-1], None, tokens, mask=mask(tokens), time_axis=1)
    assert_close(jax.nn.sigmoid(found), ys)


# From cells

ALPHA = ("leaky_relu", 0.3)
OUT = {
    "directions": (
        Stack(
            (
                Backward(Stack((GRU(D, 3), Dropout(0.2, per_sequence=True), LSTM(3, 4)))),
                Elman(4, 3),
                Pool(Backward(GRU(3, 2))),
            )
        ),
        None,
    ),
    "stacks in two directions": (
        Pool(Bidirectional(Stack((Dropout(0.1, per_sequence=True), GRU(D, 3), Elman(3, 4))), LSTM(D, 4), "average")),
        0.5,
    ),
    "mean of two": (
        Stack(
            (
                Linear(D, 3),
                jaxrnn.LayerNorm(3),
                Pool(Stack((GRU(3, 4, activation=ALPHA), Apply(("thresholded_relu", 0.1)))), "mean"),
                Linear(4, 2),
            )
        ),
        0.5,
    ),
    "tokens": (
        Stack(
            (
                Embed(VOCABULARY, 3),
                Apply(("elu", 0.5)),
                Backward(Pool(LSTM(3, 4, gate_activation=("elu", 0.7)))),
                Dropout(0.2),
            )
        ),
        0,
    ),
    "greatest": (
        Stack(
            (
                Backward(Bidirectional(LSTM(D, 3), LSTM(D, 3))),
                Dropout(0.3),
                Pool(Elman(6, 4, activation=("thresholded_relu", 0.1)), "max"),
            )
        ),
        None,
    ),
    "turned": (Stack((Backward(Bidirectional(GRU(D, 3), GRU(D, 3), "mul")), Apply(ALPHA))), None),
    "images": (
        Stack((jaxrnn.ConvLSTM((4, 3), D, 3, 2, dilation=2), Dropout(0.1, per_sequence=True), Linear(3, 2))),
        None,
    ),
}


@pytest.mark.parametrize("name", OUT)
def test_to_keras(keras, name):
    (cell, params), value, rng = init(OUT[name][0]), OUT[name][1], np.random.default_rng(len(name))
    xs = rng.integers(1, VOCABULARY, (B, T)) * HOLES
    if cell.input_ndim:
        xs = rng.normal(size=(B, T, *((4, 3) if name == "images" else ()), D)).astype(np.float32)
        if value is not None:
            xs = np.where(HOLES[..., None], xs, np.float32(value))
    mask = None if value is None else KerasMask(value, cell.input_ndim == 0)
    ys = run(KerasModel(cell, params, mask), params, xs)
    assert np.isfinite(ys).all()
    assert_round_trip(keras, None, xs, None, (cell, params, mask), ys)


def test_rectifiers():
    """Those of its layer ReLU."""
    keras, xs = conversion.peer("keras"), np.linspace(-7, 7, 57, dtype=np.float32).reshape(1, 3, 19)
    for config in ({"threshold": 1.0}, {"negative_slope": 0.5}, {"max_value": 6}, {}):
        layer = keras.layers.ReLU(**config)
        cell = from_keras(keras.saving.serialize_keras_object(layer), []).cell
        assert_close(jaxrnn.scan(cell, (), None, xs)[1], layer(xs), str(config))


# Double precision: on JAX, Keras computes in float32 whatever it is asked for; on torch LSTM and GRU do not.

TORCH = """
import json, sys, numpy as np, keras, torch
keras.config.set_floatx("float64")
L = keras.layers
models = [
    [L.LSTM(4, return_sequences=True, activation="softsign"), L.GRU(3, return_sequences=True)],
    [L.Bidirectional(L.LSTM(3, return_sequences=True), "ave"), L.GRU(4)],
    [L.LSTM(4, return_sequences=True, recurrent_activation="tanh")],
    [L.LSTM(3, go_backwards=True, return_sequences=True), L.LSTM(4, return_sequences=True, go_backwards=True)],
]
rng, found = np.random.default_rng(0), {}
for k, layers in enumerate(models):
    model = keras.Sequential([L.InputLayer(shape=(5, 2)), *layers])
    model.set_weights([0.5 * rng.normal(size=w.shape) for w in model.get_weights()])
    xs = rng.normal(size=(3, 5, 2))
    xs[0, 1:3] = 0.5
    x = torch.tensor(xs, requires_grad=True)
    ys = model(x)
    ys.sum().backward()
    found |= {f"config{k}": json.dumps(keras.saving.serialize_keras_object(model)), f"xs{k}": xs}
    found |= {f"ys{k}": ys.detach().numpy(), f"dxs{k}": x.grad.numpy()}
    found |= {f"w{k}_{n}": w for n, w in enumerate(model.get_weights())}
np.savez(sys.argv[1], **found)
"""


@pytest.mark.full
def test_double_precision(keras, tmp_path):
    conversion.peer("torch")
    path = tmp_path / "found.npz"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TORCH, path], env=os.environ | {"KERAS_BACKEND": "torch"}, check=True
    )
    found = np.load(path)
    with jax.enable_x64(True):
        for k in range(4):
            weights = [found[f"w{k}_{n}"] for n in range(sum(name.startswith(f"w{k}_") for name in found.files))]
            cell, params, mask = from_keras(json.loads(str(found[f"config{k}"])), weights)
            xs = jnp.asarray(found[f"xs{k}"])
            given = {"mask": None if mask is None else mask(xs), "time_axis": 1}
            ys, pull = jax.vjp(lambda xs: jaxrnn.scan(cell, params, None, xs, **given)[1], xs)
            assert ys.dtype == np.float64
            assert_close((ys, *pull(jnp.ones_like(ys))), (found[f"ys{k}"], found[f"dxs{k}"]), f"model {k}")


# Without Keras

CONFIG = {
    "class_name": "Sequential",
    "module": "keras",
    "config": {
        "name": "tagger",
        "layers": [
            {"class_name": "InputLayer", "config": {"batch_shape": [None, None], "dtype": "int64", "name": "tokens"}},
            {"class_name": "Embedding", "config": {"input_dim": VOCABULARY, "output_dim": 3, "mask_zero": True}},
            {
                "class_name": "Bidirectional",
                "module": "keras.layers",
                "config": {
                    "name": "both",
                    "merge_mode": "concat",
                    "layer": {
                        "class_name": "GRU",
                        "config": {"units": 4, "return_sequences": True, "dropout": 0.1, "activation": "softsign"},
                    },
                    "dtype": {"class_name": "DTypePolicy", "config": {"name": "float32"}},
                },
                "registered_name": None,
                "build_config": {"input_shape": [None, None, 3]},
            },
            {"class_name": "LayerNormalization", "config": {"axis": [2], "epsilon": 1e-3, "name": "norm"}},
            {
                "class_name": "RNN",
                "config": {"cell": {"class_name": "LSTMCell", "config": {"units": 5, "use_bias": False}}},
            },
            {"class_name": "Dense", "config": {"units": 2, "activation": "softmax", "kernel_initializer": {"a": 1}}},
        ],
    },
}
SHAPES = [(VOCABULARY, 3), *[(3, 12), (4, 12), (2, 12)] * 2, (8,), (8,), (8, 20), (5, 20), (5, 2), (2,)]


def init(cell, dtype=None):
    """The cell, and random params, without a compilation."""
    shapes = jaxrnn.check.shapes_of_params(cell)
    return cell, redraw(0, jax.tree.map(lambda leaf: np.empty(leaf.shape, dtype or leaf.dtype), shapes))


def weights_of(shapes=SHAPES, dtype=np.float32):
    return redraw(0, [np.empty(shape, dtype) for shape in shapes])


def test_without_keras():
    """A config and weights need no Keras; nor does `to_keras`."""
    script = f"""
import sys
sys.modules["keras"] = None
import jax, numpy as np, jaxrnn
from jaxrnn.convert.keras import from_keras, to_keras
weights = [np.full(shape, 0.1, "float32") for shape in {SHAPES}]
cell, params, mask = from_keras({CONFIG}, weights)
tokens = np.array([[3, 1, 0], [0, 2, 2]])
run = lambda tokens: jaxrnn.scan(cell, params, None, tokens, mask=mask(tokens), time_axis=1)[1]
print(jax.eval_shape(run, tokens).shape)
config, back = to_keras(cell, params, mask_value=mask.value)
print(all((a == b).all() for a, b in zip(weights[:1] + weights[7:], back[:1] + back[7:])))
print([name for name in sys.modules if name.split(".")[0] in ("keras", "torch", "tensorflow")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["(2, 2)", "True", "['keras']"]


def test_dtypes():
    """The params have the dtype of the weights."""
    for dtype in (jnp.bfloat16, np.float32):
        assert {leaf.dtype for leaf in jax.tree.leaves(from_keras(CONFIG, weights_of(dtype=dtype)).params)} == {
            np.dtype(dtype)
        }
    with pytest.raises(ValueError, match=r"weights: \[0\] is float64: convert under jax.enable_x64"):
        from_keras(CONFIG, weights_of(dtype=np.float64))
    config, weights = to_keras(*init(GRU(2, 3), jnp.bfloat16))
    assert config["layers"][1]["config"]["dtype"] == "bfloat16" == weights[0].dtype
    with pytest.raises(ValueError, match=r"w_h is float16, and .*w_x is float32"):
        to_keras(GRU(2, 3), init(GRU(2, 3))[1]._replace(w_h=np.zeros((3, 9), np.float16)))


# Refusals


def one(kind, module=None, **config):
    found = {"class_name": kind, "config": config}
    return found | ({"module": module} if module else {})


def several(*layers):
    return one("Sequential", layers=list(layers))


LSTM_SHAPES = [(3, 16), (4, 16), (16,)]
MASK, SEQUENCE = one("Masking"), {"return_sequences": True}
REFUSED = {
    "no units": (one("LSTM"), LSTM_SHAPES, "LSTM: units is missing"),
    "units": (one("LSTM", units=0, name="a"), LSTM_SHAPES, "source: LSTM 'a': units: expected an integer"),
    "kernel": (one("LSTM", units=5), LSTM_SHAPES, r"kernel: weights: \[0\]: expected shape \(any, 20\), got \(3, 16\)"),
    "too few": (one("LSTM", units=4), LSTM_SHAPES[:2], "LSTM: bias is missing: there are only 2 weights"),
    "too many": (one("LSTM", units=4, use_bias=False), LSTM_SHAPES, r"unexpected arrays: '\[2\]'"),
    "no class": ({"units": 4}, [], "class_name: expected a string"),
    "no config": ({"class_name": "LSTM"}, [], "config: expected a dict"),
    "own class": (one("LSTM", "mine", units=4), LSTM_SHAPES, "module: expected 'keras.layers'"),
    "attention": (
        several(one("LSTM", units=4, **SEQUENCE), one("Attention", name="attention"), one("Dense", units=2)),
        LSTM_SHAPES,
        r"layers\[1\]: Attention 'attention': a layer of this class cannot be converted",
    ),
    "flag": (one("LSTM", units=4, use_bias=1), LSTM_SHAPES, "use_bias: expected True or False"),
    "activation": (one("LSTM", units=4, activation="sparsemax"), LSTM_SHAPES, "activation: expected one of"),
    "softmax within": (one("LSTM", units=4, activation="softmax"), LSTM_SHAPES, "activation: expected one of"),
    "rate": (one("Dropout", rate=1.0), [], r"rate: expected a rate in \[0, 1\)"),
    "unknown field": (one("LSTM", units=4, time_major=True), LSTM_SHAPES, "'time_major'=True has no counterpart"),
    "lora": (one("Dense", units=4, lora_rank=2), [(3, 4), (4,)], "'lora_rank'=2 has no counterpart"),
    "quantized": (one("Dense", units=4, dtype="int8_from_float32"), [(3, 4), (4,)], "dtype: expected one of"),
    "same way": (
        one("Bidirectional", layer=one("LSTM", units=4), backward_layer=one("LSTM", units=4)),
        LSTM_SHAPES * 2,
        "expected its layers to differ in go_backwards",
    ),
    "dense in two directions": (one("Bidirectional", layer=one("Dense", units=4)), [], "Dense: expected one of"),
    "channels": (
        one("ConvLSTM1D", filters=2, kernel_size=3, data_format="channels_first"),
        [],
        "data_format: expected one of",
    ),
    "no spatial shape": (
        one("ConvLSTM1D", filters=2, kernel_size=3),
        [(3, 2, 8), (3, 2, 8), (8,)],
        "its spatial shape must be known",
    ),
    "strides": (
        one("ConvLSTM1D", filters=2, kernel_size=3, strides=0) | {"build_config": {"input_shape": [None, None, 5, 2]}},
        [(3, 2, 8), (3, 2, 8), (8,)],
        "strides: expected 1 integers of at least 1",
    ),
    "axis": (one("LayerNormalization", axis=1), [(3,), (3,)], "axis: expected -1, the last axis"),
    "rms": (one("LayerNormalization", rms_scaling=True), [(3,), (3,)], "'rms_scaling'=True"),
    "no size": (one("LayerNormalization", scale=False, center=False), [], "its size must be known"),
    "noise": (one("Dropout", rate=0.1, noise_shape=[3, None]), [], "noise_shape: expected None"),
    "cell": (one("RNN", cell=one("MyCell", units=4)), [], "MyCell: expected one of"),
    "cells": (one("RNN", cell=[]), [], "cell: expected at least one cell"),
    "over time": (one("TimeDistributed", layer=one("LSTM", units=4)), [], "LSTM: expected one of"),
    "masked later": (several(one("ReLU"), MASK), [], r"layers\[1\]: Masking: expected to be the first layer"),
    "masked twice": (several(MASK, MASK), [], "expected to be the first layer"),
    "greatest of masked": (
        several(MASK, one("LSTM", units=4, **SEQUENCE), one("GlobalMaxPooling1D")),
        LSTM_SHAPES,
        r"layers\[2\]: GlobalMaxPooling1D: a mask reaches it",
    ),
    "greatest of masked tokens": (
        several(one("Embedding", input_dim=4, output_dim=2, mask_zero=True), one("GlobalMaxPooling1D")),
        [(4, 2)],
        r"layers\[1\]: GlobalMaxPooling1D: a mask reaches it",
    ),
    "masked images": (
        several(
            MASK, one("ConvLSTM1D", filters=2, kernel_size=3) | {"build_config": {"input_shape": [None, None, 5, 2]}}
        ),
        [(3, 2, 8), (3, 2, 8), (8,)],
        "ConvLSTM1D: a mask reaches it, which Keras cannot apply to images",
    ),
    "mask not turned": (
        several(MASK, one("LSTM", units=4, go_backwards=True, **SEQUENCE), one("GRU", units=2)),
        [*LSTM_SHAPES, (4, 6), (2, 6), (2, 6)],
        r"layers\[2\]: GRU: a layer before it has turned the sequence round, and not the mask",
    ),
    "mask not turned for the mean": (
        several(MASK, one("LSTM", units=4, go_backwards=True, **SEQUENCE), one("GlobalAveragePooling1D")),
        LSTM_SHAPES,
        "a layer before it has turned the sequence round, and not the mask",
    ),
    "no time": (
        several(one("LSTM", units=4), one("GRU", units=2)),
        [*LSTM_SHAPES, (4, 6), (2, 6), (2, 6)],
        r"layers\[1\]: GRU: input: expected 3 axes, batch and time first, got 'none any more'",
    ),
    "keepdims": (
        several(one("LSTM", units=4, **SEQUENCE), one("GlobalAveragePooling1D", keepdims=True)),
        LSTM_SHAPES,
        "'keepdims'=True",
    ),
    "pooled inputs": (one("GlobalAveragePooling1D"), [], "expected a layer before it whose output size is known"),
    "input": (
        several(one("InputLayer", batch_shape=[None, None, 2]), one("LSTM", units=4)),
        LSTM_SHAPES,
        r"input: expected \(..., 3\), got \(None, None, 2\)",
    ),
    "rank": (
        several(one("InputLayer", batch_shape=[None, 3]), one("LSTM", units=4)),
        LSTM_SHAPES,
        r"input: expected 3 axes, batch and time first, got \(None, 3\)",
    ),
    "late tokens": (
        several(one("ReLU"), one("Embedding", input_dim=3, output_dim=2)),
        [(3, 2)],
        "Embedding: expected to be the first layer",
    ),
    "mask value": (one("Masking", mask_value=float("nan")), [], "mask_value: expected a finite number"),
    "nothing": (several(one("InputLayer")), [], "expected at least one layer that computes something"),
    "empty": (several(), [], "layers: expected a list of at least one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    config, shapes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        from_keras(config, weights_of(shapes))


DEFAULTS = {
    "LSTM": ({"units": 4}, (None, None, 3)),
    "GRU": ({"units": 4}, (None, None, 3)),
    "SimpleRNN": ({"units": 4}, (None, None, 3)),
    "ConvLSTM1D": ({"filters": 4, "kernel_size": 2}, (None, None, 5, 3)),
    "Dense": ({"units": 4}, (None, None, 3)),
    "LayerNormalization": ({}, (None, None, 3)),
    "Dropout": ({"rate": 0.5}, (None, None, 3)),
    "LeakyReLU": ({}, (None, None, 3)),
    "ReLU": ({}, (None, None, 3)),
    "ELU": ({}, (None, None, 3)),
    "Embedding": ({"input_dim": 3, "output_dim": 4}, (None, None)),
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_defaults(keras, kind):
    """What a config does not say is what Keras takes."""
    given, shape = DEFAULTS[kind]
    layer = getattr(keras.layers, kind)(**given)
    layer.build(shape)
    built = {"build_config": {"input_shape": shape}}
    converted = from_keras(layer)
    again = from_keras(one(kind, **given) | built, layer.get_weights())
    assert (again.cell, again.mask) == (converted.cell, converted.mask)
    assert_close(again.params, converted.params)


def test_what_is_no_model():
    with pytest.raises(TypeError, match="source: expected a Keras layer or model, or its config as a dict, got int"):
        from_keras(3)
    with pytest.raises(TypeError, match=r"weights: expected the list of arrays of get_weights\(\), got NoneType"):
        from_keras(CONFIG)
    with pytest.raises(ValueError, match=r"weights: \[1\]: expected finite numbers"):
        from_keras(CONFIG, [w if k != 1 else w * np.nan for k, w in enumerate(weights_of())])
    with pytest.raises(ValueError, match=r"weights: \[1\] is float16, and \[0\] is float32"):
        from_keras(CONFIG, [w if k != 1 else w.astype(np.float16) for k, w in enumerate(weights_of())])
    with pytest.raises(TypeError, match=r"weights: \[2\]: expected floating numbers, got int32"):
        from_keras(CONFIG, [w if k != 2 else w.astype(np.int32) for k, w in enumerate(weights_of())])
    deep = one("LSTM", units=4)
    for _ in range(5000):
        deep = several(deep)
    with pytest.raises(ValueError, match="expected at most 32 models within models"):
        from_keras(deep, weights_of(LSTM_SHAPES))


def test_refused_layers(keras):
    layers = keras.layers
    with pytest.raises(ValueError, match="LSTM is not built, so it has no weights"):
        from_keras(layers.LSTM(3))
    with pytest.raises(TypeError, match="weights: a Keras layer has its own"):
        from_keras(layers.ReLU(), [])

    class LSTM(layers.LSTM):
        pass

    layer = LSTM(3)
    layer.build((None, None, 2))
    with pytest.raises(ValueError, match=r"module: expected 'keras.layers'"):
        from_keras(layer)

    class Model(keras.Model):
        def call(self, x):
            return x

    model = Model()
    model(np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"module: expected 'keras\.layers'"):
        from_keras(model)
    inputs = keras.Input((None, 4))
    below = layers.Dense(4, name="below")
    hidden = below(inputs)
    attended = layers.MultiHeadAttention(1, 4, name="attend")(hidden, hidden)
    mask = keras.ops.any(keras.ops.not_equal(inputs, 3.0), axis=-1)
    cases = {
        "'attend' .'MultiHeadAttention'.: expected one input tensor": keras.Model(inputs, layers.GRU(2)(attended)),
        "expected one input tensor": keras.Model(inputs, layers.Add()([hidden, inputs])),
        "expected one input tensor in one chain .*'below', 1, 0": keras.Model(inputs, layers.ReLU()(below(hidden))),
        "output_layers: expected one tensor": keras.Model(inputs, [hidden, layers.ReLU()(hidden)]),
        "mask: expected that of a Masking or Embedding": keras.Model(inputs, layers.GRU(2)(hidden, mask=mask)),
        "initial_state": keras.Model(inputs, layers.GRU(4)(hidden, initial_state=hidden[:, 0])),
    }
    for message, model in cases.items():
        with pytest.raises(ValueError, match=message):
            from_keras(model)


class Own(Linear):
    """Another function of the same fields."""

    def apply(self, params, x, noise=None):
        return -x


GRU_23 = GRU(2, 3)
LACKING = {
    "cell: .*peephole=True: Keras has no counterpart": init(LSTM(2, 3, peephole=True)),
    "coupled=True: Keras has no counterpart": init(LSTM(2, 3, coupled=True)),
    "projection_size=2": init(LSTM(2, 3, projection_size=2)),
    "layer_norm=True: Keras": init(LSTM(2, 3, layer_norm=True)),
    "cell_clip=1.0: Keras": init(LSTM(2, 3, cell_clip=1.0)),
    r"cell.cells\[1\].cell: LSTM\(.*gate_clip=1.0: Keras": init(Stack((GRU_23, Pool(LSTM(3, 3, gate_clip=1.0))))),
    "Elman.*gate_clip=1.0: Keras": init(Elman(2, 3, gate_clip=1.0)),
    "one activation for both": init(LSTM(2, 3, activation="relu")),
    "GRU.*layer_norm=True: Keras": init(GRU(2, 3, layer_norm=True)),
    "MGU.*Keras has no counterpart": init(jaxrnn.MGU(2, 3)),
    "IndRNN.*Keras has no counterpart": init(jaxrnn.IndRNN(2, 3)),
    "Zoneout.*Keras has no counterpart": init(jaxrnn.Zoneout(GRU_23, 0.1)),
    "WeightDrop.*Keras has no counterpart": init(jaxrnn.WeightDrop(GRU_23, 0.1)),
    "LearnedCarry.*Keras has no counterpart": init(jaxrnn.LearnedCarry(GRU_23)),
    "EmitCarry.*Keras has no counterpart": init(jaxrnn.EmitCarry(GRU_23)),
    "Residual.*Keras has no counterpart": init(jaxrnn.Residual(GRU(2, 2))),
    "skip connections": init(Stack((GRU_23, GRU(5, 2)), skip=True)),
    "Keras merges by concat": init(Bidirectional(GRU_23, GRU_23, lambda a, b: a)),
    "output sizes of both directions": init(Bidirectional(GRU_23, GRU(2, 4))),
    r"cell.backward.cells\[0\]: Linear": init(Bidirectional(GRU_23, Stack((Linear(2, 4), GRU(4, 3))))),
    r"params\.w_h: GRU.* expects shape \(\d+, \d+\), got None": (GRU_23, init(GRU_23)[1]._replace(w_h=None)),
    r"params\.scale: LayerNorm.* got None": (
        jaxrnn.LayerNorm(2),
        jaxrnn.LayerNormParams(None, np.zeros(2, np.float32)),
    ),
    "Own.*Keras has no counterpart": init(Own(2, 3)),
    "Keras has both b and b_hn or neither": (GRU_23, init(GRU_23)[1]._replace(b=None)),
    "Keras has no activation .*hard_sigmoid": init(LSTM(2, 3, gate_activation="hard_sigmoid")),
    "Keras has no activation .'affine', 2.0": init(Stack((GRU_23, Apply(("affine", 2.0))))),
    "Keras has no activation <": init(Elman(2, 3, activation=jax.nn.softmax)),
    "put Pool around that cell": init(Pool(Stack((GRU_23, Linear(3, 2))))),
    "the size of its input must be known": init(Dropout(0.5)),
    "strides or dilation, not both": init(jaxrnn.ConvLSTM((4,), 2, 3, strides=2, dilation=2)),
    "Embedding must be the first layer": init(Stack((Linear(2, 3), Embed(4, 3)))),
    "no cell of ConvLSTM": init(
        Bidirectional(*[Stack((jaxrnn.ConvLSTM((4,), 2, 3), jaxrnn.ConvLSTM((4,), 3, 3)))] * 2)
    ),
    "pools sequences of vectors only": init(Pool(jaxrnn.ConvLSTM((4,), 2, 3), "mean")),
    "each with its dropout below it": init(Bidirectional(Stack((GRU_23, Dropout(0.1, per_sequence=True))), GRU_23)),
}


@pytest.mark.parametrize("message", LACKING)
def test_what_keras_lacks(message):
    with pytest.raises(ValueError, match=message):
        to_keras(*LACKING[message])


def test_masks_that_keras_lacks():
    for cell, value, message in [
        (Pool(GRU_23, "max"), 0, "GlobalMaxPooling1D sees masked steps"),
        (Stack((Backward(GRU_23), GRU(3, 2))), 0, "turns Keras' sequence round, and not its mask"),
        (Embed(3, 2), 1, "masks token 0 only"),
        (jaxrnn.ConvLSTM((4,), 2, 3), 0, "sequences of vectors and tokens only"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_keras(*init(cell), mask_value=value)
    with pytest.raises(TypeError, match="mask_value: expected a finite number"):
        to_keras(*init(GRU_23), mask_value=float("inf"))
    with pytest.raises(TypeError, match=r"cell: expected a jaxrnn\.Cell"):
        to_keras("LSTM", None)
    with pytest.raises(TypeError, match=r"params: .* takes GRUParams"):
        to_keras(GRU_23, ())


# Mutations

ODD = [
    None,
    True,
    -1,
    0,
    2,
    3.5,
    float("nan"),
    1e300,
    2**70,
    "",
    "LSTM",
    "relu",
    [],
    {},
    [None],
    [[[]]],
    {"class_name": "GRU"},
]


def mutated(rng, config, weights):
    """Something in one of them is missing, of another type, moved, or nested without end."""
    config, weights = copy.deepcopy(config), list(weights)
    if rng.random() < 0.25:
        k = rng.integers(len(weights))
        w = weights[k]
        weights[k : k + 1] = [
            [], [w, w], [w.T], [w[:-1]], [w * np.nan], [w.astype(np.int8)], [w.astype(np.float16)], [w.tolist()],
            [None], ["w"], [w.astype(object)], [w[..., None]], [np.float32(1)], [w.astype(complex)],
        ][rng.integers(14)]  # fmt: skip
        return config, weights
    places = []

    def walk(node):
        for key in range(len(node)) if isinstance(node, list) else list(node):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(config)
    node, key = places[rng.integers(len(places))]
    other, there = places[rng.integers(len(places))]
    match rng.integers(5):
        case 0:
            del node[key]
        case 1:
            node[key] = copy.deepcopy(other[there])
        case 2:
            deep = node[key]
            lists = rng.random() < 0.5
            for _ in range(1500):
                deep = [deep] if lists else {"class_name": "Sequential", "config": {"layers": [deep]}}
            node[key] = deep
        case _:
            node[key] = ODD[rng.integers(len(ODD))]
    return config, weights


def functional():
    """The config of a functional model with a mask, and its weights."""

    def tensor(name):
        return {"class_name": "__keras_tensor__", "config": {"shape": [None, None], "keras_history": [name, 0, 0]}}

    def layer(kind, name, *args, mask=None, **config):
        node = [
            {"args": [tensor(a) if isinstance(a, str) else a for a in args], "kwargs": {"mask": mask and tensor(mask)}}
        ]
        return {
            "class_name": kind,
            "name": name,
            "config": config | {"name": name},
            "inbound_nodes": node if args else [],
        }

    layers = [
        layer("InputLayer", "x", batch_shape=[None, None, 3]),
        layer("NotEqual", "not_equal", "x", 0.5),
        layer("Masking", "masking", "x", mask_value=0.5),
        layer("Any", "any", "not_equal"),
        layer("LSTM", "lstm", "masking", mask="any", units=4, return_sequences=True),
        layer("GlobalAveragePooling1D", "mean", "lstm", mask="any"),
    ]
    ends = {"input_layers": [["x", 0, 0]], "output_layers": ["mean", 0, 0]}
    return {"class_name": "Functional", "config": {"layers": layers, **ends}}, weights_of(LSTM_SHAPES)


@pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.full)])
def test_mutations(count):
    rng, fine = np.random.default_rng(count), {}
    sources = [(CONFIG, weights_of()), functional()]
    for config, weights in sources:
        from_keras(config, weights)
    refused = 0
    for k in range(count):
        config, weights = mutated(rng, *sources[k % 2])
        start = time.process_time()
        try:
            found = from_keras(config, weights)
        except (ValueError, TypeError):
            refused += 1
        else:
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.params))
            fine[found.cell] = found
        assert time.process_time() - start < 1
    assert count / 2 < refused < count
    for cell, found in fine.items():
        xs = (
            jax.ShapeDtypeStruct((2, 3), np.int32)
            if found.cell.input_ndim == 0
            else jax.ShapeDtypeStruct((2, 3, 3), np.float32)
        )
        jax.eval_shape(lambda params, xs: jaxrnn.scan(cell, params, None, xs, time_axis=1), found.params, xs)
