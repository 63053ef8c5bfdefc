"""Sentiment of short reviews: words, padding, one logit.

In Keras:

    model = Sequential([Input((None,)), Embedding(len(WORDS), 16, mask_zero=True), LSTM(16), Dense(1)])
    model.compile("adam", BinaryCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(pad_sequences(reviews, padding="post"), labels, epochs=10, batch_size=32)
"""

import numpy as np
import optax

from jaxrnn import LSTM, Embed, Linear, Pool, Stack
from jaxrnn.training import Batch, binary_accuracy, binary_cross_entropy, pad, train

GOOD, BAD = ["great", "good", "fine", "lovely", "brilliant"], ["awful", "bad", "dull", "boring", "terrible"]
WORDS = [*GOOD, *BAD, *["not", "never", "the", "film", "was", "is", "plot", "acting", "and", "really"]]


def data(count: int, seed: int) -> Batch:
    """Reviews of one to three sentences; "not" turns the word behind it round."""
    rng = np.random.default_rng(seed)
    reviews, labels = [], []
    for _ in range(count):
        like, words = rng.random() < 0.5, []
        for _ in range(rng.integers(1, 4)):
            turned = rng.random() < 0.4
            opinion = rng.choice(GOOD if like != turned else BAD)
            words += ["the", rng.choice(["film", "plot", "acting"]), rng.choice(["was", "is"])]
            words += [rng.choice(["not", "never"])] * turned + [opinion]
        reviews.append(np.array([WORDS.index(word) for word in words]))
        labels.append(like)
    tokens, lengths = pad(reviews)
    return Batch(tokens, np.array(labels, np.float32), lengths=lengths)


def main(epochs: int = 10) -> float:
    model = Stack(Embed(len(WORDS), 16), Pool(LSTM(16, 16)), Linear(16, 1))
    optimizer = optax.adam(1e-2)
    trained = train(
        model, data(1000, 0), binary_cross_entropy, metrics=[binary_accuracy], optimizer=optimizer, epochs=epochs
    )
    right = trained.evaluate(data(500, 1))["binary_accuracy"]
    for review in ("the film was not bad", "the plot is never good"):
        logit = trained.predict([np.array([WORDS.index(word) for word in review.split()])]).item()
        print(f"{review!r}: {1 / (1 + np.exp(-logit)):.2f} that it is positive")
    print(f"accuracy on new reviews: {right:.3f}")
    return right


if __name__ == "__main__":
    main()
