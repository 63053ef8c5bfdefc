"""Many to one: real handwritten digits, read row by row, and named after any number of rows.

Data: scikit-learn's `load_digits`, 1,797 scanned digits of 8 x 8 pixels, in the order in which people wrote them. The
first 900 are for training, the next 300 for validation, the last 597 for the test. So most of the test digits are by
people whose handwriting was never seen.

Model: one recurrent network, two layers of GRUs in both directions below `Pool`. Its sequences are the rows of a digit
from the top, cut after 1, 2, ..., 8 of them. So it has to name a digit of which it sees only some rows. Lengths say how
many.

Comparison: accuracy on the test part, averaged over the eight lengths. The baseline is logistic regression on the
pixels of the same rows. It is not one model but eight, each for one number of rows and with a C of its own. The
validation part chooses each C and the network's epoch; the test part is not used before the end.

Exit status: 0 if the network is better than the baseline by at least `--margin`, 1 if not; with `--quick` always 0.

What it needs beside the package: pip install -e ".[examples]"
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from jaxrnn import GRU, Bidirectional, Dropout, Linear, Pool, Stack
from jaxrnn.analysis import STYLE
from jaxrnn.training import Batch, Validation, accuracy, cross_entropy, fit, make_loss, predict, train_state

ROWS = 8
BATCH = 120  # divides training and validation part, so that one program runs every step


class Digits(NamedTuple):
    """Images (N, 8, 8) in [0, 1], and what they show, (N,)."""

    images: np.ndarray
    labels: np.ndarray


class Result(NamedTuple):
    """Accuracies on the test part after 1, ..., 8 rows, and what the network takes its digits for, (8, N)."""

    network: np.ndarray
    baseline: np.ndarray
    predicted: np.ndarray

    @property
    def gain(self) -> float:
        return float(self.network.mean() - self.baseline.mean())


def load() -> tuple[Digits, Digits, Digits]:
    """The parts for training, validation and test."""
    images, labels = load_digits(return_X_y=True)
    images, labels = images.reshape(-1, ROWS, ROWS).astype(np.float32) / 16, np.asarray(labels, np.int32)
    training, validation, test = slice(900), slice(900, 1200), slice(1200, None)
    first, second, third = (Digits(images[part], labels[part]) for part in (training, validation, test))
    return first, second, third


def every_length(digits: Digits) -> Batch:
    """Every digit eight times, once for each number of rows to be read."""
    count = len(digits.labels)
    return Batch(
        np.tile(digits.images, (ROWS, 1, 1)), np.tile(digits.labels, ROWS), np.repeat(np.arange(1, ROWS + 1), count)
    )


def train(digits: Digits, validation: Digits, args: argparse.Namespace) -> tuple[Stack, Any]:
    """The model, and its params after the epoch of the best validation."""
    size, epochs = (12, 4) if args.quick else (48, 20)
    dropout = Dropout(0.1 if args.quick else 0.5, per_sequence=True)
    below = Bidirectional(GRU(ROWS, size), GRU(ROWS, size))
    above = Bidirectional(GRU(2 * size, size), GRU(2 * size, size))
    model = Stack((below, dropout, Pool(above), dropout, Linear(2 * size, 10)))
    init, noise, order = jax.random.split(jax.random.key(args.seed), 3)
    batches = ROWS * len(digits.labels) // BATCH
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, epochs * batches))
    state, _ = fit(
        make_loss(model, cross_entropy, metrics={"accuracy": accuracy}),
        train_state(model.init(init), optimizer, noise),
        every_length(digits),
        optimizer=optimizer,
        epochs=epochs,
        batch_size=BATCH,
        key=order,
        validation=Validation(every_length(validation), "accuracy", maximize=True),
    )
    assert state.best is not None
    return model, state.best.params


@threadpool_limits.wrap(limits=1)  # the products are small: threads would wait for each other
def logistic_regression(parts: tuple[Digits, ...], rows: int, strengths: tuple[float, ...]) -> float:
    """Accuracy on the last part, from the pixels of the first `rows` rows; the C that is best on the second part."""
    pixels = [part.images[:, :rows].reshape(-1, rows * ROWS) for part in parts]
    models = [LogisticRegression(C=c, max_iter=1000).fit(pixels[0], parts[0].labels) for c in strengths]
    best = max(models, key=lambda model: model.score(pixels[1], parts[1].labels))
    return float(best.score(pixels[2], parts[2].labels))


def run(args: argparse.Namespace) -> Result:
    parts = training, validation, test = load()
    model, params = train(training, validation, args)
    batch = every_length(test)
    logits = predict(model, params, batch.xs, lengths=batch.lengths, batch_size=len(test.labels))
    predicted = logits.argmax(1).reshape(ROWS, -1)
    strengths = (1.0,) if args.quick else (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    baseline = np.array([logistic_regression(parts, rows, strengths) for rows in range(1, ROWS + 1)])
    return Result((predicted == test.labels).mean(1), baseline, predicted)


def picture(result: Result, test: Digits) -> Figure:
    """Above, accuracy against rows read; below, digits and what the network takes them for after each row."""
    figure = Figure(figsize=(7, 6.2))
    grid = figure.add_gridspec(2, 1, height_ratios=(3, 4))
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    axes, rows = above.subplots(), np.arange(1, ROWS + 1)
    axes.plot(rows, result.network, "o-", label="one recurrent network for any number of rows")
    axes.plot(rows, result.baseline, "s--", color="0.5", label="logistic regression, one for each number of rows")
    axes.set(xlabel="rows read, from the top", ylabel="accuracy on the test part", ylim=(0.3, 1))
    axes.legend(loc="lower right")

    surprising = np.argsort(
        -(np.diff(result.predicted, axis=0) != 0).sum(0), kind="stable"
    )  # changed its mind most often
    below.suptitle(
        "digits of the test part; beside each row, what the network takes them for when it has read that row:\n"
        "green where that is right, orange where it is wrong"
    )
    for digit, axes in enumerate(below.subplots(2, 5).flat):
        index = next(k for k in surprising if test.labels[k] == digit)
        axes.imshow(test.images[index], cmap="Greys", extent=(0, ROWS, ROWS, 0))
        for row, guess in enumerate(result.predicted[:, index]):
            axes.text(8.5, row + 0.5, guess, color="C2" if guess == digit else "C1", va="center")
        axes.set(xticks=[], yticks=[], title=f"{digit}")
        axes.spines[:].set_visible(True)
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network and few epochs, for a first look")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, dropout and order (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.01, help="wanted gain in accuracy (default: %(default)s)")
    parser.add_argument("--out", default="digits.png", metavar="PATH", help="the picture (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    result = run(args)
    table = Table("rows read", "network", "logistic regression", title="accuracy on the test part")
    for rows, both in enumerate(zip(result.network, result.baseline, strict=True), 1):
        table.add_row(str(rows), *(f"{value:.3f}" for value in both))
    table.add_row("mean", f"{result.network.mean():.3f}", f"{result.baseline.mean():.3f}")
    Console().print(table)
    with rc_context(STYLE):
        picture(result, load()[2]).savefig(args.out)
    if args.quick:
        print(f"too small to win, and not judged; picture in {args.out}")
        return 0
    print(f"gain {result.gain:.3f}, wanted at least {args.margin}; picture in {args.out}")
    return 0 if result.gain >= args.margin else 1


if __name__ == "__main__":
    sys.exit(main())
