"""The first hour: the short way, signatures and names, and errors that say what to do."""

import functools
import inspect
import io
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from rich.console import Console

import jaxrnn
from jaxrnn import GRU, LSTM, Apply, Bidirectional, Linear, Parallel, Pool, Stack
from jaxrnn.analysis import gradient_flow, plot_gradient_flow, plot_history
from jaxrnn.training import (
    Batch,
    Validation,
    absolute_error,
    accuracy,
    best_params,
    binary_accuracy,
    binary_cross_entropy,
    cross_entropy,
    evaluate,
    fit,
    make_loss,
    mean,
    perplexity,
    predict,
    squared_error,
    train,
    train_state,
)

PROMOTION = "standard"  # Adam of Optax mixes dtypes

KEY = jax.random.key(0)
XS = np.random.default_rng(0).normal(size=(6, 5, 3)).astype(np.float32)
KINDS = np.array([0, 1, 0, 1, 0, 1])
MODEL = Stack(Pool(GRU(3, 4)), Linear(4, 2))


def fitted(model, data, error, **options):
    return train(model, data, error, epochs=1, batch_size=3, progress=False, **options)


def test_train_is_the_public_pieces():
    options = {"metrics": {"accuracy": accuracy}, "validation": Validation((XS, KINDS), "accuracy", maximize=True)}
    trained = train(MODEL, (XS, KINDS), cross_entropy, epochs=2, batch_size=3, seed=7, progress=False, **options)
    loss = make_loss(MODEL, cross_entropy, metrics=options["metrics"])
    init, noise, order = jax.random.split(jax.random.key(7), 3)
    optimizer = optax.adam(1e-3)
    state = train_state(MODEL.init(init), optimizer, noise)
    state, history = fit(
        loss,
        state,
        (XS, KINDS),
        optimizer=optimizer,
        validation=options["validation"],
        epochs=2,
        batch_size=3,
        key=order,
        progress=False,
    )
    jax.tree.map(np.testing.assert_array_equal, trained.state.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, trained.params, best_params(state))
    np.testing.assert_array_equal(trained.history.train["loss"], history.train["loss"])
    np.testing.assert_array_equal(trained.predict(XS), predict(MODEL, trained.params, XS))
    assert trained.evaluate((XS, KINDS)) == evaluate(loss, trained.params, (XS, KINDS))
    assert trained.summary() == jaxrnn.summary(MODEL)
    assert best_params(state._replace(best=None)) is state.params


def test_train_goes_on_from_params_and_saves(tmp_path):
    first = fitted(MODEL, (XS, KINDS), cross_entropy, metrics=[accuracy])
    second = fitted(MODEL, (XS, KINDS), cross_entropy, params=first.params, optimizer=optax.set_to_zero())
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    first.save(tmp_path / "model")
    cell, params = jaxrnn.training.load(tmp_path / "model")
    assert cell == MODEL
    jax.tree.map(np.testing.assert_array_equal, params, first.params)
    assert set(first.history.train) == {"loss", "accuracy", "gradient_norm"}


def test_a_stack_takes_cells_one_by_one():
    a, b = GRU(3, 4), Linear(4, 2)
    assert Stack(a, b) == Stack((a, b)) == Stack([a, b]) == Stack(cells=(a, b)) == eval(repr(Stack(a, b)), vars(jaxrnn))
    assert Stack(a, LSTM(7, 2), skip=True) == Stack((a, LSTM(7, 2)), skip=True)
    with pytest.raises(TypeError, match="expected cells one by one or as `cells`, got both"):
        Stack(a, cells=(a,))
    with pytest.raises(TypeError, match=r"Stack.cells\[1\]: expected a jaxrnn.Cell, got 3"):
        Stack(a, 3)


@pytest.mark.parametrize("cell", [LSTM(3, 4), Stack(GRU(3, 4), jaxrnn.LearnedCarry(LSTM(4, 2)))])
def test_a_step_begins_where_reset_says(cell):
    params = cell.init(KEY)
    carry, _ = jaxrnn.scan(cell, params, None, XS.swapaxes(0, 1))
    x, reset = XS[:, 0], np.array([True, False] * 3)
    _, ys = jaxrnn.step(cell, params, carry, x, reset=reset)
    _, fresh = jaxrnn.step(cell, params, None, x)
    _, on = jaxrnn.step(cell, params, carry, x)
    np.testing.assert_array_equal(ys, np.where(reset[:, None], fresh, on))
    with pytest.raises(ValueError, match=r"reset: expected the batch shape \(6,\), got \(5,\)"):
        jaxrnn.step(cell, params, carry, x, reset=np.ones(5, bool))
    with pytest.raises(TypeError, match="reset: expected bool"):
        jaxrnn.step(cell, params, carry, x, reset=np.ones(6))


# What training shows.


def by_hand(loss, batches, params):
    total = None
    for batch in batches:
        _, metrics = loss(params, batch, None)
        total = metrics if total is None else jax.tree.map(jnp.add, total, metrics)
    return {name: float(metric.value) for name, metric in total.items()}


def test_an_epoch_is_the_mean_of_its_batches_by_weight(capsys):
    """Batches of 4 and of 2 rows, with padding; a perplexity is that of the whole epoch."""
    lengths = np.array([5, 1, 2, 0, 3, 4])
    model = Stack(GRU(3, 4), Linear(4, 2))
    data = Batch(XS, np.tile(KINDS[:, None], 5), lengths=lengths)
    options = {"metrics": [accuracy, perplexity], "batch_size": 4, "shuffle": False}
    trained = train(model, data, cross_entropy, optimizer=optax.set_to_zero(), validation=data, epochs=2, **options)
    halves = [jax.tree.map(lambda leaf, at=at: leaf[at], data) for at in (slice(4), slice(4, 6))]
    expected = by_hand(trained.loss, halves, trained.params)
    table = trained.history.epochs()
    np.testing.assert_array_equal(table["epoch"], [1, 2])
    for name, value in expected.items():
        np.testing.assert_allclose(table[name], [value, value], rtol=1e-5)
        np.testing.assert_allclose(table[f"validation {name}"], [value, value], rtol=1e-5)
    np.testing.assert_array_equal(trained.history.epoch_step, [2, 4])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    number = r"[0-9.]+"
    words = rf"epoch 2/2  loss {number}  accuracy {number}  perplexity {number}  val loss {number}  .*  {number} s"
    assert re.fullmatch(words, printed[1]), printed
    assert str(trained.history).splitlines()[0].split()[:3] == ["epoch", "loss", "accuracy"]


def test_progress_false_is_silent_and_a_console_is_drawn_on(capsys):
    fitted(MODEL, (XS, KINDS), cross_entropy)
    assert capsys.readouterr().out == ""
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True)
    train(MODEL, (XS, KINDS), cross_entropy, metrics=[accuracy], validation=(XS, KINDS), epochs=2, progress=console)
    assert capsys.readouterr().out == ""
    lines = [line for line in file.getvalue().splitlines() if "val accuracy" in line]
    assert len(lines) == 2


def test_an_interrupted_epoch_counts_whole(tmp_path, monkeypatch):
    """The same table, whether the run was interrupted within an epoch or not."""
    model, optimizer = GRU(3, 3), optax.sgd(0.1)
    loss, data = make_loss(model, squared_error), (XS, XS)
    options = {"optimizer": optimizer, "batch_size": 1, "key": KEY, "steps_per_call": 1, "progress": False}

    def start():
        return train_state(model.init(KEY), optimizer, jax.random.key(1))

    _, whole = fit(loss, start(), data, epochs=2, **options)

    class Interrupted(Exception):
        pass

    saver = jaxrnn.training.Checkpoints(tmp_path, every=2)
    calls = []

    original = jaxrnn.training.fitting._train

    def train_some(*arguments):
        calls.append(1)
        if len(calls) == 9:
            raise Interrupted
        return original(*arguments)

    monkeypatch.setattr(jaxrnn.training.fitting, "_train", train_some)
    with pytest.raises(Interrupted):
        fit(loss, start(), data, epochs=2, checkpoints=saver, **options)
    monkeypatch.undo()
    _, resumed = fit(loss, start(), data, epochs=2, checkpoints=saver, **options)
    jax.tree.map(np.testing.assert_array_equal, resumed.epochs(), whole.epochs())


def test_members_have_columns_of_their_own():
    model, optimizer = GRU(3, 3), optax.sgd(0.1)
    keys = jax.random.split(KEY, 3)
    state = jax.vmap(lambda key: train_state(model.init(key), optimizer, key))(keys)
    _, history = fit(
        make_loss(model, squared_error),
        state,
        (XS, XS),
        optimizer=optimizer,
        epochs=2,
        batch_size=2,
        key=KEY,
        validation=(XS, XS),
        progress=False,
    )
    table = history.epochs()
    assert table["loss"].shape == table["validation loss"].shape == (2, 3)
    np.testing.assert_allclose(table["loss"], history.train["loss"].reshape(2, 3, 3).mean(1), rtol=1e-5)
    assert "…" in str(history)
    assert len(plot_history(history).axes) == 1


def test_plots_draw_where_they_are_told():
    figure = Figure()
    axes = figure.subplots(1, 2)
    trained = fitted(MODEL, (XS, KINDS), cross_entropy, metrics=[accuracy])
    assert plot_history(trained.history, axes=axes) is figure
    assert [ax.get_ylabel() for ax in axes] == ["loss", "accuracy"]
    with pytest.raises(ValueError, match="axes: expected 2, one for each panel, got 1"):
        plot_history(trained.history, axes=axes[0])
    flow = gradient_flow(GRU(3, 4), GRU(3, 4).init(KEY), None, XS, lambda carry, ys: ys.sum())
    assert plot_gradient_flow(flow, axes=axes[0]) is figure


# Weights, classes, targets to ignore.


def test_weights_of_samples_and_of_classes():
    logits = jnp.array([[1.0, -1.0, 0.5], [0.2, 0.1, 0.0], [2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    targets, weights, of_class = np.array([0, 2, 1, 1]), np.array([1.0, 0.5, 2.0, 0.0]), np.array([1.0, 3.0, 0.25])
    each = -np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))[np.arange(4), targets]
    for w, given in (
        (weights, {"weights": weights}),
        (of_class[targets], {"class_weights": of_class}),
        (weights * of_class[targets], {"weights": weights, "class_weights": tuple(of_class)}),
    ):
        found = cross_entropy(logits, targets, **given)
        np.testing.assert_allclose(found.value, (w * each).sum() / w.sum(), rtol=1e-6)
        np.testing.assert_allclose(found.weight, w.sum(), rtol=1e-6)
    np.testing.assert_allclose(
        perplexity(logits, targets, weights=weights).value, np.exp((weights * each).sum() / weights.sum()), rtol=1e-6
    )
    hits = np.asarray(logits).argmax(-1) == targets
    np.testing.assert_allclose(accuracy(logits, targets, weights=weights).value, (weights * hits).sum() / 3.5)
    chance = np.array([1, 0, 1, 0])
    binary = -np.log(np.where(chance, 1 / (1 + np.exp(-logits[:, 0])), 1 / (1 + np.exp(logits[:, 0]))))
    w = weights * np.where(chance, 5.0, 1.0)
    found = binary_cross_entropy(logits[:, 0], chance, weights=weights, class_weights=(1.0, 5.0))
    np.testing.assert_allclose(found.value, (w * binary).sum() / w.sum(), rtol=1e-6)
    for error, power in ((squared_error, 2), (absolute_error, 1)):
        off = np.abs(np.asarray(logits) - 1.0) ** power
        found = error(logits, jnp.ones_like(logits), weights=weights)  # one weight for each row
        np.testing.assert_allclose(found.value, (weights[:, None] * off).sum() / (3 * weights.sum()), rtol=1e-6)


def test_ignored_targets_and_weights_reach_nothing():
    logits = jnp.ones((4, 3)).at[1].set(jnp.nan)
    targets = np.array([0, -100, 2, 1])
    gradient = jax.grad(lambda x: cross_entropy(x, targets, ignore=-100).value)(logits)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1], np.zeros(3))
    kept = np.array([True, False, True, True])
    np.testing.assert_allclose(
        cross_entropy(logits, targets, ignore=-100).value, cross_entropy(logits[kept], targets[kept]).value
    )
    both = cross_entropy(logits, targets, np.array([False, True, True, True]), ignore=-100)
    np.testing.assert_allclose(both.weight, 2)
    assert binary_accuracy(jnp.ones(3), np.array([1, -1, 0]), ignore=-1).value == 0.5
    with pytest.raises(ValueError, match=r"weights: expected shape \(4,\), axes of the values, got \(3,\)"):
        mean(jnp.ones(4), weights=jnp.ones(3))
    with pytest.raises(ValueError, match=r"class_weights: expected \(3,\), one for each class, got \(2,\)"):
        cross_entropy(jnp.ones((4, 3)), np.zeros(4, int), class_weights=(1, 2))


def test_weights_of_a_batch_train_and_padding_stays_out():
    """Two rows of weight 2 are four rows; steps that are ignored or padded do not count."""
    error = functools.partial(cross_entropy, ignore=-100)
    model = Stack(GRU(3, 4), Linear(4, 2))
    targets = np.where(np.arange(5) < 3, KINDS[:, None], -100)
    loss, params = make_loss(model, error, metrics=[error]), model.init(KEY)
    twice = Batch(np.concatenate([XS, XS[:2]]), np.concatenate([targets, targets[:2]]))
    weights = np.where(np.arange(6) < 2, 2.0, 1.0).astype(np.float32)
    expected, measured = loss(params, twice, None)
    found, _ = loss(params, Batch(XS, targets, weights=weights), None)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert set(measured) == {"loss", "cross_entropy"}
    cut, _ = loss(params, Batch(XS, KINDS[:, None] + 0 * targets, lengths=np.full(6, 3), weights=weights), None)
    np.testing.assert_allclose(cut, expected, rtol=1e-6)
    loss.check(Batch(XS, targets))
    with pytest.raises(ValueError, match="targets: expected classes 0 to 1, got -100"):
        make_loss(model, cross_entropy).check(Batch(XS, targets))
    trained = fitted(model, Batch(XS, targets, weights=weights), error)
    assert np.isfinite(trained.history.train["loss"]).all()


# Heads that do not fit.


@pytest.mark.parametrize(
    ("activation", "error", "right"),
    [
        ("sigmoid", binary_cross_entropy, False),
        (jax.nn.sigmoid, binary_cross_entropy, False),
        ("softmax", cross_entropy, False),
        ("softmax", functools.partial(cross_entropy, ignore=1), False),
        ("sigmoid", cross_entropy, False),
        (("hard_sigmoid", 0.25), binary_cross_entropy, False),
        ("log_softmax", cross_entropy, True),
        ("sigmoid", squared_error, True),
        ("softmax", accuracy, True),
        ("tanh", cross_entropy, True),
    ],
)
def test_a_head_that_the_error_has_itself(activation, error, right):
    for model in (
        Stack(Pool(GRU(3, 4)), Linear(4, 2), Apply(activation)),
        Stack(Pool(GRU(3, 4)), Stack(Linear(4, 2), Apply(activation))),
    ):
        if right:
            make_loss(model, error)
        else:
            with pytest.raises(ValueError, match=r"cell: it ends in Apply\(.*takes logits.*without this layer"):
                make_loss(model, error)


# Editors.


@pytest.mark.parametrize("name", [name for name in jaxrnn.__all__ if isinstance(getattr(jaxrnn, name), type)])
def test_cells_have_their_signature(name):
    kind = getattr(jaxrnn, name)
    if not issubclass(kind, jaxrnn.Cell):
        return
    assert list(inspect.signature(kind).parameters) == list(inspect.signature(kind.__init__).parameters)[1:]
    assert "args" not in inspect.signature(kind).parameters
    if inspect.isabstract(kind):
        return
    with pytest.raises(AttributeError, match=f"'{name}' object has no attribute 'nothing'$"):
        _ = object.__new__(kind).nothing


def test_modules_are_attributes_and_dir_is_short():
    """Nothing of them is imported before it is used."""
    code = (
        "import sys, jaxrnn; shown = dir(jaxrnn); assert not {'flax', 'optax'} & set(sys.modules); "
        "assert 50 <= len(shown) <= 90 and {'LSTM', 'Stack', 'training', 'linen'} <= set(shown), shown; "
        "jaxrnn.training.train, jaxrnn.convert.from_torch, jaxrnn.analysis.gradient_flow; "
        "jaxrnn.linen.RNN, jaxrnn.nnx.RNN"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# A step without noise.


class Plain(jaxrnn.Cell):
    """A cell whose step takes no noise."""

    size: int

    @property
    def output_size(self):
        return self.size

    def init(self, key, dtype=jnp.float32):
        return jnp.full(self.size, 0.5, dtype)

    def initial_carry(self, params, batch_shape=()):
        return jnp.zeros((*batch_shape, self.size), params.dtype)

    def step(self, params, carry, x):
        carry = params * carry + (1 - params) * x
        return carry, carry


@pytest.mark.parametrize(
    "cell",
    [
        Plain(3),
        Stack(jaxrnn.Dropout(0.5), Plain(3)),
        Bidirectional(Plain(3), Plain(3)),
        Pool(Plain(3)),
        jaxrnn.Zoneout(Plain(3), 0.5),
        jaxrnn.Residual(jaxrnn.LearnedCarry(Plain(3))),
        Parallel((Plain(3), jaxrnn.EmitCarry(Plain(3))), merge="tuple"),
    ],
    ids=lambda cell: type(cell).__name__,
)
@pytest.mark.parametrize("key", [None, KEY])
def test_a_step_need_not_take_noise(cell, key):
    with jax.numpy_rank_promotion("allow"):
        jax.block_until_ready(jaxrnn.scan(cell, cell.init(KEY), None, XS, time_axis=1, key=key))
        if cell.causal:
            jaxrnn.step(cell, cell.init(KEY), None, XS[:, 0])


def test_a_trained_model_prints_as_a_line_without_arrays():
    xs = np.ones((6, 3, 1), np.float32)
    model = Stack(Pool(GRU(1, 2)), Linear(2, 1))
    for epochs in (2, 0):
        trained = train(model, (xs, xs[:, 0]), squared_error, epochs=epochs, progress=False)
        line = repr(trained)
        assert line.startswith(f"Trained({model}, ")
        assert ("epoch=2, loss=" in line) == (epochs == 2)
        assert line.endswith("ended='epochs')")
        assert "\n" not in line
        assert "array" not in line.lower()
