"""Batches from other hands: PyTorch's loaders, lists, frames; and what cannot be a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrnn import GRU, Linear, Pool, Stack
from jaxrnn.training import Batch, cross_entropy, evaluate, fit, make_loss, train_state
from jaxrnn.training.feeding import as_batch

MODEL = Stack((Pool(GRU(2, 2)), Linear(2, 3)))
LOSS = make_loss(MODEL, cross_entropy)
SGD = optax.sgd(0.1)
XS = np.random.default_rng(0).normal(size=(6, 3, 2)).astype(np.float32)
CLASSES = np.array([0, 1, 2, 0, 1, 2])


def train(data, **keywords):
    state = train_state(MODEL.init(jax.random.key(0)), SGD, jax.random.key(1))
    return fit(LOSS, state, data, optimizer=SGD, epochs=2, **keywords)


def test_a_loader_of_pytorch_is_data():
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.from_numpy(XS), torch.from_numpy(CLASSES))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    assert isinstance(next(iter(loader)), list)
    state, history = train(loader, validation=loader)
    want, wanted = train((XS, CLASSES), batch_size=4, shuffle=False, validation=(XS, CLASSES))
    jax.tree.map(np.testing.assert_array_equal, state.params, want.params)
    np.testing.assert_array_equal(history.validation["loss"], wanted.validation["loss"])
    assert evaluate(LOSS, state.params, loader) == evaluate(LOSS, want.params, (XS, CLASSES), batch_size=4)


def test_lists_in_batches():
    """A list of arrays was a tuple, and a list of numbers is an array."""
    x, y = np.ones((2, 3)), np.zeros(2)
    xs, targets = as_batch([[x, x], [0, 1]])
    assert [type(xs), len(xs), type(targets)] == [tuple, 2, np.ndarray]
    batch = as_batch(Batch({"a": [[1, 2], [3, 4]]}, [y, y], lengths=[1, 2]))
    assert batch.xs["a"].shape == (2, 2)
    assert isinstance(batch.targets, tuple)
    assert batch.lengths.tolist() == [1, 2]


def test_lists_of_numbers_are_arrays():
    want, _ = train((XS, CLASSES), batch_size=4, shuffle=False)
    got, _ = train((XS.tolist(), CLASSES.tolist()), batch_size=4, shuffle=False)
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


def test_whatever_gives_an_array_is_one():
    class Frame:
        def __array__(self, dtype=None, copy=None):
            return np.ones((6, 3, 2), np.float32)

    def error(params, batch, key):
        return (params[1].w.sum() * batch).mean(), {}

    state = train_state(MODEL.init(jax.random.key(0)), SGD, jax.random.key(1))
    _, history = fit(error, state, Frame(), optimizer=SGD, epochs=1, batch_size=4, shuffle=False)
    assert len(history.step) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([XS, CLASSES], r"data: a list is one of batches, .* as a tuple, \(xs, targets\)"),
        ([(XS, CLASSES, CLASSES)], "batch: expected a Batch or a pair .*, got tuple of 3"),
        ({"x": XS, "y": CLASSES}, "batch: expected a Batch or a pair .*, got dict"),
        ([(XS, None)], "targets: expected an array, got None"),
        ([(["a", "b"], CLASSES)], r"batch\[0\]: expected an array of numbers, got list"),
        (([XS[0, :2], *XS[1:]], CLASSES), r"(?s)data\[0\]: .*got a list of 6; sequences of different lengths are"),
    ],
)
def test_what_is_no_batch_is_refused(data, message):
    with pytest.raises(TypeError, match=message):
        train(data, batch_size=4, shuffle=False)


def test_arrays_on_the_device_are_fetched():
    assert isinstance(as_batch((jnp.ones(3), jnp.ones(3)))[0], np.ndarray)
