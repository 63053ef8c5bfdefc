"""Classification with a simple recurrent network: does a series rise or fall more often?

In Keras:

    model = Sequential([Input((20, 1)), SimpleRNN(16), Dense(2)])
    model.compile("adam", SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(xs, kinds, epochs=20, batch_size=32)
"""

import numpy as np
import optax

from jaxrnn import Elman, Linear, Pool, Stack
from jaxrnn.training import accuracy, cross_entropy, train


def data(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random walks (N, 20, 1), and whether each has more steps up than down."""
    steps = np.random.default_rng(seed).choice([-1.0, 1.0], (count, 20))
    steps[:, 0] = np.where(steps.sum(1) == 0, 1.0, steps[:, 0])
    return np.cumsum(steps, 1, dtype=np.float32)[..., None], (steps.sum(1) > 0).astype(int)


def main(epochs: int = 20) -> float:
    model = Stack(Pool(Elman(1, 16)), Linear(16, 2))
    trained = train(model, data(1000, 0), cross_entropy, metrics=[accuracy], optimizer=optax.adam(3e-3), epochs=epochs)
    print(trained.summary())
    right = trained.evaluate(data(500, 1))["accuracy"]
    print(f"accuracy on new series: {right:.3f}")
    return right


if __name__ == "__main__":
    main()
