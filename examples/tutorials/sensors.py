"""Which activity a motion sensor saw: several channels, two layers in both directions, dropout, early stopping.

In Keras:

    model = Sequential([Input((50, 3)), Bidirectional(GRU(16, return_sequences=True)), Dropout(0.2),
                        Bidirectional(GRU(16)), Dense(3)])
    model.compile("adam", SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(xs, kinds, epochs=20, validation_data=held_out, callbacks=[EarlyStopping(patience=3)])
"""

import numpy as np
import optax

from jaxrnn import GRU, Bidirectional, Dropout, Linear, Pool, Stack
from jaxrnn.training import Validation, accuracy, cross_entropy, train

ACTIVITIES = "standing", "walking", "running"


def data(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three channels of acceleration over 50 steps, (N, 50, 3), and the activity of each."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 3, count)
    beat = np.array([0.0, 0.4, 0.9])[kinds] * rng.uniform(0.8, 1.2, count)
    phase = rng.uniform(0, 2 * np.pi, (count, 1, 3))
    xs = np.sin(beat[:, None, None] * np.arange(50)[None, :, None] + phase) + rng.normal(0, 0.8, (count, 50, 3))
    return xs.astype(np.float32), kinds


def main(epochs: int = 20) -> float:
    both = Bidirectional(GRU(3, 16), GRU(3, 16))
    above = Bidirectional(GRU(32, 16), GRU(32, 16))
    model = Stack(both, Dropout(0.2), Pool(above), Linear(32, 3))
    held_out = Validation(data(300, 1), "accuracy", maximize=True, patience=3)
    trained = train(
        model,
        data(900, 0),
        cross_entropy,
        metrics=[accuracy],
        optimizer=optax.adam(3e-3),
        validation=held_out,
        epochs=epochs,
    )
    xs, kinds = data(300, 2)
    guesses = trained.predict(xs).argmax(-1)
    for kind, name in enumerate(ACTIVITIES):
        print(f"{name}: {(guesses[kinds == kind] == kind).mean():.2f} of them seen")
    return float((guesses == kinds).mean())


if __name__ == "__main__":
    main()
