"""Sequence to sequence: a sum such as "27+8" is read character by character, and the answer is written.

In Keras:

    model = Sequential([Input((5,)), Embedding(len(SIGNS), 16), GRU(64), RepeatVector(3),
                        GRU(64, return_sequences=True), Dense(len(SIGNS))])
    model.compile("adam", SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(questions, answers, epochs=30, batch_size=64)
"""

import numpy as np
import optax

from jaxrnn import GRU, Embed, Linear, Pool, Repeat, Stack
from jaxrnn.training import accuracy, cross_entropy, train

SIGNS = " +0123456789"


def encode(texts: list[str]) -> np.ndarray:
    return np.array([[SIGNS.index(sign) for sign in text] for text in texts])


def data() -> tuple[np.ndarray, np.ndarray]:
    """All sums of two numbers below 100, in random order: questions (N, 5) and answers (N, 3), with spaces before."""
    pairs = np.random.default_rng(0).permutation([(a, b) for a in range(100) for b in range(100)])
    return encode([f"{a}+{b}".rjust(5) for a, b in pairs]), encode([f"{a + b:3d}" for a, b in pairs])


def main(epochs: int = 30) -> float:
    questions, answers = data()
    encoder, decoder = Pool(GRU(16, 64)), Repeat(GRU(64, 64), 3)
    model = Stack(Embed(len(SIGNS), 16), encoder, decoder, Linear(64, len(SIGNS)))
    trained = train(
        model,
        (questions[:9000], answers[:9000]),
        cross_entropy,
        metrics=[accuracy],
        optimizer=optax.adam(5e-3),
        epochs=epochs,
        batch_size=64,
    )
    written = trained.predict(questions[9000:]).argmax(-1)
    for question, answer in zip(questions[9000:9005], written, strict=False):
        print("".join(SIGNS[sign] for sign in question), "=", "".join(SIGNS[sign] for sign in answer))
    right = float((written == answers[9000:]).all(-1).mean())
    print(f"new sums that are all right: {right:.3f}")
    return right


if __name__ == "__main__":
    main()
