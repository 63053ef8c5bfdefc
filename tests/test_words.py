"""Words that help: names of other frameworks, and mistakes, raise errors that say what to do."""

import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxrnn
from jaxrnn import GRU, LSTM, Apply, Dropout, Embed, Linear, Pool, Stack
from jaxrnn.analysis import plot_history
from jaxrnn.training import (
    Batch,
    Scaler,
    absolute_error,
    accuracy,
    best_params,
    binary_cross_entropy,
    cross_entropy,
    evaluate,
    fit,
    make_loss,
    pad,
    perplexity,
    predict,
    save,
    squared_error,
    train,
    train_state,
)

PROMOTION = "standard"  # Adam of Optax mixes dtypes

KEY = jax.random.key(0)
XS = np.random.default_rng(0).normal(size=(6, 5, 3)).astype(np.float32)
KINDS = np.array([0, 1, 0, 1, 0, 1])
MODEL = Stack(Pool(GRU(3, 4)), Linear(4, 2))
ONE = Stack(Pool(GRU(3, 4)), Linear(4, 1))


def fitted(model, data, error, **options):
    return train(model, data, error, epochs=1, batch_size=3, progress=False, **options)


# Names of other frameworks.


@pytest.mark.parametrize(
    ("use", "error", "words"),
    [
        (lambda: jaxrnn.SimpleRNN, AttributeError, "here: Elman"),
        (lambda: jaxrnn.Dense, AttributeError, "here: Linear"),
        (lambda: jaxrnn.Embedding, AttributeError, "here: Embed"),
        (lambda: jaxrnn.Sequential, AttributeError, "here: Stack"),
        (lambda: jaxrnn.Masking, AttributeError, "the argument mask of jaxrnn.scan"),
        (lambda: jaxrnn.TimeDistributed, AttributeError, "act on every step"),
        (lambda: jaxrnn.LSTMCell, AttributeError, "here: LSTM"),
        (lambda: jaxrnn.nonsense, AttributeError, "module 'jaxrnn' has no attribute 'nonsense'$"),
        (lambda: MODEL.fit, AttributeError, r"here: jaxrnn.training.train\(cell, data, error\)"),
        (lambda: MODEL.predict, AttributeError, "here: jaxrnn.training.predict"),
        (lambda: MODEL(XS), TypeError, r"is no function: jaxrnn.scan\(cell, params, None, xs\)"),
        (lambda: LSTM(3, 4, return_sequences=True), TypeError, r"no argument 'return_sequences'; .* Pool\(cell\)"),
        (lambda: LSTM(3, 4, num_layers=2), TypeError, r"no argument 'num_layers'; here: Stack\(cell, cell"),
        (lambda: LSTM(3, 4, batch_first=True), TypeError, "no argument 'batch_first'; .* time_axis=1"),
        (lambda: LSTM(3, units=4), TypeError, "no argument 'units'; here: hidden_size"),
        (lambda: jaxrnn.fit, AttributeError, "it is jaxrnn.training.fit"),
        (lambda: jaxrnn.plot_history, AttributeError, "it is jaxrnn.analysis.plot_history"),
        (lambda: jaxrnn.training.mse, AttributeError, "here: jaxrnn.training.squared_error"),
        (lambda: jaxrnn.training.plot_history, AttributeError, "it is jaxrnn.analysis.plot_history"),
        (lambda: jaxrnn.training.nonsense, AttributeError, "has no attribute 'nonsense'$"),
        (lambda: MODEL.forward, AttributeError, "here: jaxrnn.scan"),
        (lambda: Linear(3, units=2), TypeError, "no argument 'units'; here: output_size"),
        (lambda: Embed(input_dim=5, output_dim=2), TypeError, "no argument 'input_dim'; here: vocabulary"),
        (lambda: Dropout(p=0.5), TypeError, "no argument 'p'; here: rate"),
        (lambda: LSTM(3, 4, recurrent_activation="relu"), TypeError, "here: gate_activation"),
        (lambda: LSTM(3, 4, 2), TypeError, "LSTM.peephole: expected True or False, got 2"),
        (lambda: GRU(3, 4, "relu"), TypeError, "GRU.reset_after: expected True or False, got 'relu'"),
        (
            lambda: fitted(MODEL, (XS, KINDS), cross_entropy, verbose=0),
            TypeError,
            "train: no argument 'verbose'; here: pro",
        ),
        (lambda: fitted(MODEL, (XS, KINDS), cross_entropy, key=KEY), TypeError, "no argument 'key'; here: seed="),
        (lambda: fitted(MODEL, (XS, KINDS), cross_entropy, nonsense=1), TypeError, "'nonsense'; here: the options are"),
        (lambda: nn.RNN(GRU(3, 4)).init(KEY, XS), AttributeError, r"jaxrnn.linen.RNN\(cell\)"),
    ],
)
def test_names_of_other_frameworks(use, error, words):
    with pytest.raises(error, match=words):
        use()


# Words that help: a row for every mistake.

PER_STEP = Stack(GRU(3, 4), Linear(4, 2))
TOKENS = Stack(Embed(10, 3), Pool(GRU(3, 4)), Linear(4, 2))
NAN = np.where(np.arange(5)[None, :, None] == 2, np.nan, XS).astype(np.float32)
LOSS, PARAMS = make_loss(MODEL, cross_entropy), MODEL.init(KEY)
STATE = train_state(PARAMS, optax.sgd(0.1), KEY)
TRAINED = jaxrnn.training.Trained(MODEL, LOSS, STATE, None)


@pytest.mark.parametrize(
    ("use", "error", "words"),
    [
        (lambda: fitted(MODEL, (XS, KINDS + 1), cross_entropy), ValueError, "targets: expected classes 0 to 1, got 2"),
        (
            lambda: fitted(TOKENS, (np.full((6, 5), 10), KINDS), cross_entropy),
            ValueError,
            r"xs: expected tokens 0 to 9, those of Embed\(.*\), got 10 at \[0, 0\]",
        ),
        (lambda: fitted(MODEL, (NAN, KINDS), cross_entropy), ValueError, "xs: expected finite numbers; .* got nan"),
        (
            lambda: fitted(Stack(Pool(GRU(3, 4)), Linear(4, 1)), (XS, KINDS * 0), cross_entropy),
            ValueError,
            "at least two classes.* puts out 1; use binary_cross_entropy",
        ),
        (
            lambda: fitted(PER_STEP, (XS, KINDS), cross_entropy),
            ValueError,
            r"one output for each step: wrap it in Pool",
        ),
        (
            lambda: fitted(Stack(GRU(3, 4), Linear(4, 1)), (XS, XS[:, 0, 0]), squared_error),
            ValueError,
            r"one output for each step: wrap it in Pool",
        ),
        (lambda: fitted(MODEL, [XS, KINDS], cross_entropy), TypeError, r"data: .* as a tuple, \(xs, targets\)"),
        (lambda: make_loss(MODEL, "mse"), TypeError, "error: .* got 'mse'; pass the function .*squared_error"),
        (
            lambda: make_loss(MODEL, cross_entropy, metrics=["accuracy"]),
            TypeError,
            "metrics: .* got 'accuracy'; pass the function jaxrnn.training.accuracy",
        ),
        (
            lambda: make_loss(MODEL, cross_entropy, metrics=[accuracy, functools.partial(accuracy, ignore=1)]),
            ValueError,
            "metrics: expected functions of different names, .* name them",
        ),
        (lambda: make_loss(cross_entropy, MODEL), TypeError, "cell: expected a jaxrnn.Cell"),
        (lambda: make_loss(MODEL, MODEL), TypeError, "error: expected a function"),
        (lambda: train_state(PARAMS, "adam", KEY), TypeError, r"optimizer: .* such as optax.adam\(1e-3\), got 'adam'"),
        (lambda: train_state(optax.sgd(0.1), PARAMS, KEY), TypeError, "optimizer: expected one of Optax"),
        (lambda: train_state(MODEL, optax.sgd(0.1), KEY), TypeError, "params: .* got the cell"),
        (lambda: predict(LOSS, PARAMS, XS), TypeError, "cell: expected a jaxrnn.Cell"),
        (lambda: predict(MODEL, STATE, XS), TypeError, r"got a TrainState; pass best_params\(state\)"),
        (lambda: evaluate(MODEL, PARAMS, (XS, KINDS)), TypeError, r"loss: .* such as make_loss\(cell, error\) returns"),
        (lambda: evaluate(LOSS, STATE, (XS, KINDS)), TypeError, r"got a TrainState; pass best_params\(state\)"),
        (
            lambda: fitted(MODEL, (XS, KINDS.astype(np.float32)), cross_entropy),
            TypeError,
            "targets: expected classes as integers",
        ),
        (
            lambda: fitted(MODEL, (XS, KINDS[:, None]), cross_entropy),
            ValueError,
            r"targets: .* leave out the last axis of the targets",
        ),
        (
            lambda: squared_error(jnp.ones(6), jnp.ones((6, 1))),
            ValueError,
            r"targets: .* leave out the last axis of the targets",
        ),
        (
            lambda: Scaler.fit(XS).inverse(XS[..., 0]),
            ValueError,
            r"series: expected \(\.\.\., 3\), all features .* Scaler\(scaler.mean\[k\]",
        ),
        (lambda: jaxrnn.linen.RNN(nn.GRUCell(4)), TypeError, "got Flax's GRUCell; jaxrnn.GRU is the cell"),
        (
            lambda: jaxrnn.nnx.RNN(nnx.nn.recurrent.GRUCell(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)),
            TypeError,
            "got Flax's GRUCell; jaxrnn.GRU is the cell",
        ),
        (
            lambda: jaxrnn.scan(GRU(3, 4), GRU(3, 4).init(KEY), None, XS, lengths=np.full(6, 2)),
            ValueError,
            "if the batch comes first in xs, pass time_axis=1",
        ),
        # Shapes of targets.
        (
            lambda: fitted(MODEL, (XS, KINDS), binary_cross_entropy),
            ValueError,
            r"puts out 2 numbers where there is one target: let it end in one, as Linear\(\.\.\., 1\)",
        ),
        (
            lambda: fitted(PER_STEP, (XS, XS[..., 0]), squared_error),
            ValueError,
            "puts out 2 numbers where there is one",
        ),
        (
            lambda: fitted(PER_STEP, (XS, XS[..., :1]), squared_error),
            ValueError,
            "puts out 2 numbers where there is one",
        ),
        (lambda: fitted(PER_STEP, (XS, XS[:, 0, :2]), squared_error), ValueError, "wrap it in Pool"),
        (
            lambda: fitted(MODEL, (XS, np.eye(2, dtype=int)[KINDS]), cross_entropy),
            ValueError,
            r"classes of one-hot rows are targets.argmax\(-1\)",
        ),
        (
            lambda: fitted(ONE, (XS, KINDS), binary_cross_entropy, metrics=[accuracy]),
            ValueError,
            "accuracy expects logits of at least two classes.*use binary_accuracy",
        ),
        # Data.
        (
            lambda: fitted(MODEL, Batch(XS, KINDS, lengths=np.full(6, 6)), cross_entropy),
            ValueError,
            "lengths: expected 0 to 5, got 6 to 6",
        ),
        (
            lambda: evaluate(LOSS, PARAMS, Batch(XS, KINDS, lengths=np.full(6, -1))),
            ValueError,
            "lengths: expected 0 to 5, got -1",
        ),
        (
            lambda: fitted(MODEL, ([XS[0], XS[1, :3]], KINDS[:2]), cross_entropy),
            TypeError,
            r"data\[0\]: .* got a list of 2; .* pad\(sequences\), or Buckets",
        ),
        (
            lambda: fitted(MODEL, (XS, KINDS), cross_entropy, validation=[XS, KINDS]),
            TypeError,
            r"validation: a list is one of batches.* \(xs, targets\)",
        ),
        (
            lambda: fitted(MODEL, (XS, KINDS), cross_entropy, validation=(NAN, KINDS)),
            ValueError,
            "validation.xs: expected finite numbers",
        ),
        (
            lambda: fitted(MODEL, (XS, KINDS), cross_entropy, validation=0.2),
            TypeError,
            r"validation: expected a pair of arrays \(xs, targets\).* got 0.2",
        ),
        # Errors of one's own.
        (
            lambda: fitted(ONE, (XS, XS[:, 0, 0]), lambda ys, targets, mask: jnp.mean((ys[..., 0] - targets) ** 2)),
            TypeError,
            r"error: expected a function that returns a Mean, as jaxrnn.training.mean\(values, mask\)",
        ),
        (
            lambda: make_loss(MODEL, optax.softmax_cross_entropy_with_integer_labels),
            TypeError,
            r"error: .* got Optax's .*lambda ys, targets, mask: jaxrnn.training.mean",
        ),
        (lambda: make_loss(MODEL, lambda a, b: a), TypeError, r"outputs, targets and a mask.* got one of \(a, b\)"),
        (lambda: make_loss(MODEL, LOSS), TypeError, "error: expected a function such as"),
        (lambda: evaluate(cross_entropy, PARAMS, (XS, KINDS)), TypeError, r"pass make_loss\(cell, cross_entropy\)"),
        (
            lambda: fit(cross_entropy, STATE, (XS, KINDS), optimizer=optax.sgd(0.1), epochs=1, batch_size=2, key=KEY),
            TypeError,
            r"pass make_loss\(cell, cross_entropy\)",
        ),
        (lambda: make_loss(MODEL, "MSELoss"), TypeError, "pass the function jaxrnn.training.squared_error"),
        (lambda: make_loss(MODEL, "bce"), TypeError, "pass the function jaxrnn.training.binary_cross_entropy"),
        (
            lambda: make_loss(MODEL, cross_entropy, metrics="accuracy"),
            TypeError,
            r"pass a list, \[jaxrnn.training.accuracy\]",
        ),
        (
            lambda: fitted(
                MODEL,
                (XS, KINDS * -100),
                functools.partial(cross_entropy, ignore=-100),
                metrics=[accuracy],
            ),
            ValueError,
            r"the metric needs functools.partial\(accuracy, ignore=-100\), too",
        ),
        (
            lambda: cross_entropy(jnp.zeros((6, 2)), jnp.asarray(KINDS), class_weights={0: 1.0, 1: 2.0}),
            TypeError,
            "class_weights: .* got a dict",
        ),
        (
            lambda: binary_cross_entropy(jnp.zeros(6), jnp.asarray(KINDS), class_weights=(1.0, 2.0, 3.0)),
            ValueError,
            r"class_weights: expected \(2,\)",
        ),
        (
            lambda: cross_entropy(jnp.zeros((6, 2)), jnp.asarray(KINDS), ignore=[0]),
            TypeError,
            "ignore: expected a number",
        ),
        (
            lambda: make_loss(Stack(MODEL, Apply("softmax"), Dropout(0.1)), cross_entropy),
            ValueError,
            "it ends in Apply",
        ),
        # Arguments in another's place.
        (
            lambda: fit(LOSS, STATE, (XS, KINDS), optimizer="adam", epochs=1, batch_size=2, key=KEY),
            TypeError,
            "optimizer: expected one of Optax",
        ),
        (lambda: train_state(PARAMS, optax.sgd(0.1), 0), TypeError, r"key: .* got 0; jax.random.key\(0\) makes one"),
        (lambda: best_params(PARAMS), TypeError, "state: expected a TrainState"),
        (lambda: predict(LOSS, PARAMS, XS), TypeError, "cell: .* got CellLoss.*; pass its .cell"),
        (lambda: predict(MODEL, TRAINED, XS), TypeError, "got a Trained; pass its .params"),
        (lambda: plot_history(TRAINED), TypeError, "got Trained; pass its .history"),
        (lambda: fitted(MODEL, (XS, KINDS), cross_entropy, params=KEY), TypeError, "params: .* takes tuple"),
        (lambda: jaxrnn.summary(MODEL, PARAMS), TypeError, "dtype: expected that of the parameters, got tuple"),
        (lambda: save(MODEL, PARAMS, "model"), TypeError, "path: .* it comes first"),
        (lambda: Stack(LSTM(3, 4), jnp.tanh), TypeError, r"the layer Apply\(function\)"),
        (lambda: jaxrnn.scan(GRU(3, 4), GRU(3, 4).init(KEY), XS, None), TypeError, "xs: expected an array, got None"),
        (
            lambda: jaxrnn.scan(GRU(3, 4), GRU(3, 4).init(KEY), None, XS[0, 0]),
            ValueError,
            "xs: expected an axis of time",
        ),
        (lambda: jaxrnn.scan(GRU(3, 4), GRU(3, 4).init(KEY), None, XS.tolist()), TypeError, "got a list; jnp.asarray"),
        (
            lambda: jaxrnn.scan(GRU(3, 4), GRU(3, 4).init(KEY), None, XS, mask=np.ones((5, 6), bool)),
            ValueError,
            "mask: .* pass time_axis=1",
        ),
        (
            lambda: jaxrnn.scan(GRU(3, 4), GRU(3, 4).init(KEY), jaxrnn.GRUCarry(jnp.zeros((6, 4))), XS),
            ValueError,
            "carry.h: .* pass time_axis=1",
        ),
    ],
)
def test_words_that_help(use, error, words):
    with pytest.raises(error, match=words):
        use()


@pytest.mark.parametrize("module", ["jaxrnn", "jaxrnn.training"])
def test_an_import_of_a_name_that_is_not_there_says_what_it_is_called(module):
    code = f"from {module} import CrossEntropyLoss"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr.endswith("has no name 'CrossEntropyLoss'; here: jaxrnn.training.cross_entropy\n")
    assert not hasattr(sys.modules[module], "CrossEntropyLoss")


@pytest.mark.parametrize("error", [squared_error, absolute_error])
def test_targets_that_were_not_measured(error):
    targets = jnp.array([1.0, jnp.nan, 3.0])
    predictions = jnp.array([[2.0], [5.0], [3.5]])
    value, gradient = jax.value_and_grad(lambda ys: error(ys, targets, ignore=np.nan).value)(predictions)
    np.testing.assert_allclose(value, (1 + 0.25) / 2 if error is squared_error else (1 + 0.5) / 2, rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert gradient[1, 0] == 0
    np.testing.assert_allclose(error(predictions, jnp.array([2.0, -1.0, 3.5]), ignore=-1.0).value, 0)


def test_class_weights_of_metrics():
    logits, targets = jnp.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), jnp.array([1, 1, 0])
    np.testing.assert_allclose(accuracy(logits, targets, class_weights=(1.0, 3.0)).value, 3 / 7, rtol=1e-6)
    nll = np.log1p(np.exp([-1.0, 1.0, 1.0]))
    expected = np.exp((3 * nll[0] + 3 * nll[1] + nll[2]) / 7)
    np.testing.assert_allclose(perplexity(logits, targets, class_weights=(1.0, 3.0)).value, expected, rtol=1e-6)


def test_sequences_of_different_lengths_train_as_the_message_says():
    xs, lengths = pad([XS[0], XS[1, :3], XS[2, :1]])
    assert np.isfinite(fitted(MODEL, Batch(xs, KINDS[:3], lengths), cross_entropy).history.train["loss"]).all()
