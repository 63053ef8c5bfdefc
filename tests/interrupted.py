"""A training run in a process of its own, to be killed: `python interrupted.py DIRECTORY RESULT`.

It says "ready" when training is about to begin, and writes all that training made to RESULT when it is over.
"""

import os
import sys

import jax
import numpy as np
import optax

from jaxrnn import GRU, Dropout, Linear, Stack
from jaxrnn.training import Batch, fit, make_loss, make_truncated_loss, squared_error, train_state
from jaxrnn.training.checkpoint import Checkpoints
from jaxrnn.training.streams import Streams

MODEL = Stack((GRU(2, 3), Dropout(0.2), Linear(3, 2)))
ADAM = optax.adam(0.01)
WHOLE, TRUNCATED = make_loss(MODEL, squared_error), make_truncated_loss(MODEL, squared_error)


def run(directory, *, truncated, epochs=12, every=2):
    rng = np.random.default_rng(0)
    params = MODEL.init(jax.random.key(0))
    xs = rng.normal(size=(14, 5, 2)).astype(np.float32)
    data, validation, carry = Batch(xs, -xs), Batch(xs[:4], -xs[:4]), None
    if truncated:
        carry = MODEL.initial_carry(params, (2,))
        data, validation = (Streams(list(rows), list(-rows), streams=2, window=8) for rows in (xs, xs[:4]))
    state = train_state(params, ADAM, jax.random.key(1), carry=carry)
    return fit(
        TRUNCATED if truncated else WHOLE,
        state,
        data,
        optimizer=ADAM,
        epochs=epochs,
        batch_size=4,
        key=jax.random.key(2),
        validation=validation,
        steps_per_call=2,
        checkpoints=Checkpoints(directory, every=every, keep=2),
    )


def flat(result):
    """Everything that a run gives, as arrays by name."""
    leaves = jax.tree_util.tree_leaves_with_path(result)
    arrays = {}
    for path, leaf in leaves:
        is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        arrays[jax.tree_util.keystr(path)] = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    return arrays


if __name__ == "__main__":
    where, result, truncated = sys.argv[1:]
    print("ready", flush=True)
    arrays = flat(run(where, truncated=truncated == "truncated"))
    np.savez(f"{result}.draft.npz", **arrays)
    os.replace(f"{result}.draft.npz", result)
