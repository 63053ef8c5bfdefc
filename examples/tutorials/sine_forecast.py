"""Forecasting a sine wave from series of variable length.

In Keras:

    model = Sequential([Input((None, 1)), Masking(), LSTM(32), Dense(1)])
    model.compile("adam", "mse")
    model.fit(pad_sequences(waves, padding="post", dtype="float32"), targets, epochs=30, batch_size=32)
"""

import numpy as np
import optax

from jaxrnn import LSTM, Linear, Pool, Stack
from jaxrnn.training import Batch, pad, squared_error, train


def data(count: int, seed: int) -> Batch:
    """Waves of 10 to 40 steps, each with a frequency and a phase of its own, and the value that follows each."""
    rng = np.random.default_rng(seed)
    lengths, frequency, phase = rng.integers(10, 41, count), rng.uniform(0.2, 0.6, count), rng.uniform(0, 6.3, count)
    waves = [np.sin(w * np.arange(n + 1) + p)[:, None] for n, w, p in zip(lengths, frequency, phase, strict=True)]
    xs, lengths = pad([wave[:-1].astype(np.float32) for wave in waves])
    return Batch(xs, np.array([wave[-1, 0] for wave in waves], np.float32), lengths=lengths)


def main(epochs: int = 30) -> float:
    train_data, test = data(1000, 0), data(300, 1)
    model = Stack(Pool(LSTM(1, 32)), Linear(32, 1))
    trained = train(model, train_data, squared_error, optimizer=optax.adam(1e-2), epochs=epochs)
    error = trained.evaluate(test)["loss"]
    last = test.xs[np.arange(len(test.lengths)), test.lengths - 1, 0]
    print(f"squared error {error:.4f}; of the last value as a forecast {np.square(last - test.targets).mean():.4f}")
    return error


if __name__ == "__main__":
    main()
