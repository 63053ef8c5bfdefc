"""The next word of a sentence: a target at every step, then sentences that the model writes itself.

In Keras:

    model = Sequential([Input((None,)), Embedding(len(WORDS), 16), LSTM(32, return_sequences=True), Dense(len(WORDS))])
    model.compile("adam", SparseCategoricalCrossentropy(from_logits=True))
    model.fit(sentences[:, :-1], sentences[:, 1:], epochs=20, batch_size=32)
"""

import jax
import numpy as np
import optax

import jaxrnn
from jaxrnn import LSTM, Embed, Linear, Stack
from jaxrnn.training import cross_entropy, perplexity, train

ANIMALS, ACTS = ["cat", "dog", "bird", "fox"], ["chases", "sees", "follows", "hears"]
FOOD = dict(zip(ANIMALS, ["milk", "bones", "seeds", "grapes"], strict=True))
WORDS = [".", "the", *ANIMALS, *ACTS, "and", "eats", *FOOD.values()]


def data(count: int, seed: int) -> np.ndarray:
    """Sentences such as "the cat sees the fox and eats milk ." The food is that of the first animal."""
    rng = np.random.default_rng(seed)
    sentences = []
    for _ in range(count):
        first, second = rng.choice(ANIMALS, 2)
        text = f". the {first} {rng.choice(ACTS)} the {second} and eats {FOOD[first]} ."
        sentences.append([WORDS.index(word) for word in text.split()])
    return np.array(sentences)


def main(epochs: int = 20) -> float:
    sentences, test = data(800, 0), data(200, 1)
    model = Stack(Embed(len(WORDS), 16), LSTM(16, 32), Linear(32, len(WORDS)))
    pairs = sentences[:, :-1], sentences[:, 1:]
    trained = train(model, pairs, cross_entropy, metrics=[perplexity], optimizer=optax.adam(1e-2), epochs=epochs)

    def sample(logits, key):
        word = jax.random.categorical(key, logits)
        return word, word

    start = np.zeros(5, np.int32)  # five sentences at once, each after a full stop
    _, words = jaxrnn.rollout(model, trained.params, None, start, 9, feedback=sample, key=jax.random.key(0))
    for sentence in np.asarray(words).T:
        print(" ".join(WORDS[word] for word in sentence))
    found = trained.evaluate((test[:, :-1], test[:, 1:]))["perplexity"]
    print(f"perplexity {found:.3f}; of the grammar itself {(4 * 4 * 4) ** (1 / 9):.3f}")
    return found


if __name__ == "__main__":
    main()
