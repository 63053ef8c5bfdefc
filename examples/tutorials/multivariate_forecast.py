"""Forecasting several series at once: windows, scaling, a target of the same features.

In Keras:

    model = Sequential([Input((24, 3)), GRU(32), Dense(3)])
    model.compile("adam", "mse")
    model.fit(xs, targets, epochs=20, batch_size=32)
"""

import numpy as np
import optax

from jaxrnn import GRU, Linear, Pool, Stack
from jaxrnn.training import Scaler, squared_error, train, windows


def data(steps: int = 1500) -> np.ndarray:
    """Hours of temperature, load and wind (L, 3): a daily rhythm, and load that follows temperature two hours later."""
    rng = np.random.default_rng(0)
    day = 2 * np.pi * np.arange(steps) / 24
    temperature = 12 + 6 * np.sin(day) + rng.normal(0, 0.5, steps)
    load = 500 + 20 * np.roll(temperature, 2) + rng.normal(0, 5, steps)
    wind = 6 + 2 * np.cos(day / 2) + rng.normal(0, 0.5, steps)
    return np.stack([temperature, load, wind], 1).astype(np.float32)


def main(epochs: int = 20) -> float:
    series = data()
    scaler = Scaler.fit(series[:1200])
    xs, targets = windows(scaler.transform(series), 24, 1)
    model = Stack(Pool(GRU(3, 32)), Linear(32, 3))
    trained = train(model, (xs[:1170], targets[:1170, 0]), squared_error, optimizer=optax.adam(1e-2), epochs=epochs)
    forecast = scaler.inverse(trained.predict(xs[1200:]))
    truth, yesterday = scaler.inverse(targets[1200:, 0]), scaler.inverse(xs[1200:, 0])
    errors = [np.abs(each - truth).mean(0) for each in (forecast, yesterday)]
    for name, ours, naive in zip(("temperature", "load", "wind"), *errors, strict=True):
        print(f"{name}: mean absolute error {ours:.2f}; of the value 24 hours before {naive:.2f}")
    return float((errors[0] / errors[1]).mean())


if __name__ == "__main__":
    main()
