"""Files of Keras 1 and 2: their names, defaults and layouts, beside their equations in double precision."""

import numpy as np
import pytest
from conversion import assert_close, redraw

import jaxrnn
from jaxrnn.convert.keras import from_keras

B, T, D, H = 2, 5, 3, 4
XS = redraw(1, np.empty((B, T, D), np.float32), 1.0)


# The equations, over xs (B, T, D)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def hard_sigmoid(x):
    """That of Keras 1 and 2."""
    return np.clip(0.2 * x + 0.5, 0, 1)


def lstm(w_x, w_h, b, φ=hard_sigmoid):
    """Gates in the order i f c o."""
    h = c = np.zeros((B, H))
    for x in XS.astype(np.float64).swapaxes(0, 1):
        i, f, g, o = np.split(x @ w_x + h @ w_h + b, 4, axis=-1)
        c = φ(f) * c + φ(i) * np.tanh(g)
        h = φ(o) * np.tanh(c)
        yield h


def gru(w_x, w_h, b=0.0, b_h=None, φ=hard_sigmoid):
    """Gates in the order z r h; with b_h the reset gate acts after the product."""
    h = np.zeros((B, H))
    w_z, w_r, w_n = np.split(w_h, 3, axis=-1)
    for x in XS.astype(np.float64).swapaxes(0, 1):
        z, r, n = np.split(x @ w_x + b, 3, axis=-1)
        if b_h is None:
            z, r = φ(z + h @ w_z), φ(r + h @ w_r)
            n = np.tanh(n + (r * h) @ w_n)
        else:
            b_z, b_r, b_n = np.split(b_h, 3)
            z, r = φ(z + h @ w_z + b_z), φ(r + h @ w_r + b_r)
            n = np.tanh(n + r * (h @ w_n + b_n))
        h = z * h + (1 - z) * n
        yield h


def simple(w_x, w_h, b):
    h = np.zeros((B, H))
    for x in XS.astype(np.float64).swapaxes(0, 1):
        h = np.tanh(x @ w_x + h @ w_h + b)
        yield h


def cudnn(kernel, gates):
    """The columns of each gate hold, row after row, the matrix W of W x."""
    return np.hstack([k.ravel().reshape(H, -1).T for k in np.split(kernel, gates, axis=1)])


def by_gate(arrays, order, wanted):
    """Keras 1: W, U and b of one gate after those of another."""
    each = {gate: arrays[3 * k : 3 * k + 3] for k, gate in enumerate(order)}
    return [np.concatenate([each[gate][n] for gate in wanted], axis=-1) for n in range(3)]


def model(version, *layers, given=None):
    """A Sequential model's JSON; its config is a list, as it was at first."""
    first, *others = [{"class_name": kind, "config": {"name": kind, **config}} for kind, config in layers]
    first["config"]["batch_input_shape"] = [None, T, D] if given is None else given
    return {"class_name": "Sequential", "config": [first, *others], "keras_version": version, "backend": "tensorflow"}


NEW = {"units": H, "return_sequences": True, "dtype": "float32", "trainable": True, "unroll": False}
OLD = {"output_dim": H, "return_sequences": True, "input_dim": D, "input_length": None, "init": "glorot_uniform"}
OLD |= {"inner_init": "orthogonal", "W_regularizer": None, "dropout_W": 0.0, "dropout_U": 0.0, "consume_less": "cpu"}
HARD, SOFT = {"recurrent_activation": "hard_sigmoid"}, {"recurrent_activation": "sigmoid"}
LSTM, GRU = [(D, 4 * H), (H, 4 * H), (4 * H,)], [(D, 3 * H), (H, 3 * H), (3 * H,)]
GATE = [(D, H), (H, H), (H,)]
FILES = {
    "LSTM": (model("2.2.4", ("LSTM", NEW | HARD)), LSTM, lstm),
    "LSTM of Keras 2.1 by default": (model("2.1.6", ("LSTM", NEW)), LSTM, lstm),
    "LSTM of Keras 2.3 by default": (model("2.3.1", ("LSTM", NEW)), LSTM, lambda *w: lstm(*w, sigmoid)),
    "LSTM of TensorFlow by default": (model("2.2.4-tf", ("LSTM", NEW)), LSTM, lambda *w: lstm(*w, sigmoid)),
    "LSTM of TensorFlow": (model("2.15.0", ("LSTM", NEW | HARD | {"time_major": False})), LSTM, lstm),
    "GRU without reset_after": (model("2.0.8", ("GRU", NEW | {"use_bias": False})), GRU[:2], gru),
    "GRU": (
        model("2.4.0", ("GRU", NEW | SOFT | {"reset_after": True})),
        [*GRU[:2], (2, 3 * H)],
        lambda w_x, w_h, b: gru(w_x, w_h, *b, sigmoid),
    ),
    "CuDNNLSTM": (
        model("2.2.4", ("CuDNNLSTM", NEW)),
        [*LSTM[:2], (8 * H,)],
        lambda w_x, w_h, b: lstm(cudnn(w_x, 4), cudnn(w_h, 4), b[: 4 * H] + b[4 * H :], sigmoid),
    ),
    "CuDNNGRU": (
        model("2.2.4", ("CuDNNGRU", NEW)),
        [*GRU[:2], (6 * H,)],
        lambda w_x, w_h, b: gru(cudnn(w_x, 3), cudnn(w_h, 3), b[: 3 * H], b[3 * H :], sigmoid),
    ),
    "LSTM of Keras 1": (
        model("1.2.2", ("LSTM", OLD | {"inner_activation": "hard_sigmoid", "forget_bias_init": "one"})),
        GATE * 4,
        lambda *w: lstm(*by_gate(w, "icfo", "ifco")),
    ),
    "LSTM of Keras 1, one matrix": (model("1.1.0", ("LSTM", OLD | {"consume_less": "gpu"})), LSTM, lstm),
    "GRU of Keras 1": (
        model("1.2.2", ("GRU", OLD | {"inner_activation": "sigmoid"})),
        GATE * 3,
        lambda *w: gru(*by_gate(w, "zrh", "zrh"), φ=sigmoid),
    ),
    "SimpleRNN of Keras 1": (model("1.2.2", ("SimpleRNN", OLD)), GATE, simple),
}


@pytest.mark.parametrize("name", FILES)
def test_layers(name):
    source, shapes, equations = FILES[name]
    weights = redraw(2, [np.empty(shape, np.float32) for shape in shapes], 1.5)
    cell, params, _ = from_keras(source, weights)
    expected = np.stack(list(equations(*(w.astype(np.float64) for w in weights))), axis=1)
    assert_close(jaxrnn.scan(cell, params, None, XS, time_axis=1)[1], expected.astype(np.float32))


def cells(source, *shapes):
    return from_keras(source, [np.ones(shape, np.float32) for shape in shapes]).cell


def test_models_of_keras_1():
    """Names of fields, and layers that are no more."""
    layers = [
        ("Embedding", {"input_dim": 9, "output_dim": D, "init": "uniform", "dropout": 0.0, "mask_zero": True}),
        ("TimeDistributedDense", {"output_dim": 4, "bias": False, "input_dim": D, "activation": "hard_sigmoid"}),
        ("SpatialDropout1D", {"p": 0.2}),
        ("TimeDistributed", {"layer": {"class_name": "Dense", "config": {"output_dim": 2, "bias": True}}}),
        ("LeakyReLU", {"alpha": 0.1}),
        ("ThresholdedReLU", {"theta": 0.7}),
        ("Dropout", {"p": 0.3}),
    ]
    found = cells(model("1.2.2", *layers, given=[None, T]), (9, D), (D, 4), (4, 2), (2,))
    assert found == jaxrnn.Stack(
        (
            jaxrnn.Embed(9, D),
            jaxrnn.Linear(D, 4),
            jaxrnn.Apply("hard_sigmoid"),
            jaxrnn.Dropout(0.2, per_sequence=True),
            jaxrnn.Linear(4, 2),
            jaxrnn.Apply(("leaky_relu", 0.1)),
            jaxrnn.Apply(("thresholded_relu", 0.7)),
            jaxrnn.Dropout(0.3),
        )
    )


def test_functional_models():
    """Their calls were written as lists; the version holds for all layers within."""

    def layer(kind, name, source, **config):
        return {"class_name": kind, "name": name, "config": {"name": name, **config}, "inbound_nodes": source}

    inner = {"class_name": "GRU", "config": NEW | HARD | {"reset_after": False}}
    for rest in ([], [{}]):  # Keras 1 and 2
        layers = [
            layer("InputLayer", "x", [], batch_input_shape=[None, T, D], sparse=False, ragged=False),
            layer("Bidirectional", "both", [[["x", 0, 0, *rest]]], layer=inner, merge_mode="sum"),
            layer("Activation", "hard", [[["both", 0, 0, *rest]]], activation="hard_sigmoid"),
        ]
        ends = {"input_layers": [["x", 0, 0]], "output_layers": [["hard", 0, 0]]}
        source = {"class_name": "Model", "config": {"layers": layers, **ends}, "keras_version": "2.2.4"}
        gru = jaxrnn.GRU(D, H, reset_after=False, gate_activation="hard_sigmoid")
        expected = jaxrnn.Stack((jaxrnn.Bidirectional(gru, gru, "sum"), jaxrnn.Apply("hard_sigmoid")))
        assert cells(source, *GRU, *GRU) == expected
    layers = [
        layer("InputLayer", "x", [], batch_input_shape=[None, T, D]),
        layer("LSTM", "lstm", [[["x", 0, 0, {}]]], **NEW, **SOFT),
        layer("GlobalMaxPooling1D", "most", [[["lstm", 0, 0, {}]]]),
        layer("GlobalAveragePooling1D", "mean", [[["lstm", 0, 0, {}]]]),
        layer("Concatenate", "top", [[["most", 0, 0, {}], ["mean", 0, 0, {}]]], axis=-1),
    ]
    ends = {"input_layers": [["x", 0, 0]], "output_layers": [["top", 0, 0]]}
    source = {"class_name": "Model", "config": {"layers": layers, **ends}, "keras_version": "2.4.0"}
    assert cells(source, *LSTM) == jaxrnn.Pool(jaxrnn.LSTM(D, H), ("max", "mean"))
    nested = {"class_name": "Sequential", "config": {"layers": [{"class_name": "LSTM", "config": NEW | HARD}]}}
    found = cells({"class_name": "Sequential", "config": {"layers": [nested]}, "keras_version": "2.2.4"}, *LSTM)
    assert found.gate_activation == "hard_sigmoid"


def test_the_shape_of_images():
    """It is that of the first layer's input."""
    source = model("2.9.0", ("ConvLSTM2D", {"filters": 2, "kernel_size": [3, 3]}), given=[None, T, 6, 5, 1])
    cell = cells(source, (3, 3, 1, 8), (3, 3, 2, 8), (8,)).cell
    assert cell.spatial_shape == (6, 5)
    assert cell.gate_activation == "hard_sigmoid"


def test_files_without_a_version():
    """They are of Keras 3, whose hard sigmoid is steeper."""
    source = {"class_name": "LSTM", "config": NEW | HARD}
    assert cells(source, *LSTM).gate_activation == "keras_hard_sigmoid"
    assert cells(source | {"keras_version": "3.5.0"}, *LSTM).gate_activation == "keras_hard_sigmoid"
    assert cells({"class_name": "GRU", "config": NEW}, *GRU[:2], (2, 3 * H)).reset_after


REFUSED = {
    r"keras_version: expected one such as '2.2.4', got 2": model(2, ("LSTM", NEW)),
    r"keras_version: expected one such as '2.2.4', got 'new'": model("new", ("LSTM", NEW)),
    r"keras_version: expected one such as '2.2.4', got None": model(None, ("LSTM", NEW)),
    "a list of layers is of Keras 1 or 2 and needs a keras_version": model("3.1.0", ("LSTM", NEW)),
    "'dropout'=0.1 has no counterpart": model(
        "1.2.2", ("Embedding", {"input_dim": 9, "output_dim": 3, "dropout": 0.1}), given=[None, T]
    ),
    "filters is missing": model("1.2.2", ("ConvLSTM2D", {"nb_filter": 3, "nb_row": 3, "nb_col": 3})),
    "Highway.*cannot be converted": model("1.2.2", ("Highway", {})),
    r"W_g: weights: \[3\]: expected shape \(3, 4\), got \(2, 4\)": model("1.2.2", ("LSTM", OLD)),
    "'time_major'=True": model("2.4.0", ("LSTM", NEW | {"time_major": True})),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    shapes = [(9, 3)] if "dropout" in message else [*GATE, (2, H)] if "W_g" in message else LSTM
    weights = [np.ones(shape, np.float32) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        from_keras(REFUSED[message], weights)
