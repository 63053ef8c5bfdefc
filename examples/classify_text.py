"""Many to one on text: which mark comes next in this line of Python?

Data: lines of the standard library's modules. Each is cut at random at one of its marks `( ) [ ] , : . =`: the part
before the mark is the text, the mark is the label. Each text occurs once. Modules, not lines, are divided: 60 % for
training, 20 % for validation, 20 % for the test. `--data FILE` reads your own texts from a CSV file with the columns
`text` and `label`, divided by row.

Model: a network that reads characters, `Stack((Embed, Pool(Bidirectional(GRU, GRU)), Dropout, Linear))`, on padded
sequences with lengths. The order of the characters shows what was begun, which bracket is open, and which word is the
last.

Comparison: accuracy on the test part. The baseline is logistic regression on a bag of words with TF-IDF weights. The
validation part chooses between words alone and words with punctuation marks, and it chooses C and the network's epoch.
The same regression on character n-grams, which see some of the order, is shown beside it.

Exit status: 0 if the network beats the bag of words by at least `--margin`, 1 if not, 2 for a file that is unusable.
With `--quick` never 1.

What it needs beside the package: pip install -e ".[examples]"
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from jaxrnn import GRU, Bidirectional, Dropout, Embed, Linear, Pool, Stack
from jaxrnn.analysis import STYLE
from jaxrnn.training import Arrays, Batch, Validation, accuracy, cross_entropy, fit, make_loss, predict, train_state
from jaxrnn.training.ragged import pad

LENGTH = 48  # longer texts are cut, for all models
BAGS = {
    "bag of words": [{"token_pattern": r"\w+"}, {"token_pattern": r"\w+|[^\w\s]"}],
    "bag of character n-grams": [{"analyzer": "char", "ngram_range": (1, 3)}],
}


class DataError(Exception):
    """What is wrong with a file, in one line."""


class Part(NamedTuple):
    """Texts and their classes."""

    texts: list[str]
    classes: np.ndarray


class Result(NamedTuple):
    """The test part, the names of the classes, and what each model predicts."""

    test: Part
    names: list[str]
    predicted: dict[str, np.ndarray]

    def accuracy(self, model: str) -> float:
        return float((self.predicted[model] == self.test.classes).mean())

    @property
    def gain(self) -> float:
        return self.accuracy("network") - self.accuracy("bag of words")


def read_csv(path: Path) -> dict[str, tuple[str, int]]:
    """Of every text its label, and the number of its row."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            if not {"text", "label"} <= set(rows.fieldnames or ()):
                raise DataError(f"expected the columns text and label, got {rows.fieldnames}")
            found = {(row["text"] or "").strip()[:LENGTH]: (row["label"], k) for k, row in enumerate(rows, 1)}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(str(error)) from None
    for text, (label, row) in found.items():
        if not text or not label:
            raise DataError(f"row {row} lacks a text or a label")
    return found


def read_lines() -> dict[str, tuple[str, int]]:
    """Of the beginning of every line the mark that follows it, and the number of its module."""
    found, rng = {}, np.random.default_rng(0)
    for k, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        for line in path.read_text(encoding="utf-8").splitlines():
            line = line.strip()[:LENGTH]
            marks = [at for at, character in enumerate(line) if at >= 4 and character in "()[],:.="]
            if marks and line[0] != "#":
                at = rng.choice(marks)
                found[line[:at].rstrip()] = line[at], k
    return found


def divide(found: dict[str, tuple[str, int]], args: argparse.Namespace) -> tuple[list[Part], list[str]]:
    """Training, validation and test part, each source in one of them, and the names of the classes."""
    rng, names = np.random.default_rng(args.seed), sorted({label for label, _ in found.values()})
    sources = rng.permutation(sorted({source for _, source in found.values()}))
    parts, sizes = [], (1000, 300, 300) if args.quick else (16000, 2000, 2000)
    for size, among in zip(sizes, np.split(sources, [len(sources) * 6 // 10, len(sources) * 8 // 10]), strict=True):
        texts = [text for text, (_, source) in found.items() if source in set(among.tolist())]
        texts = rng.permutation(texts)[:size].tolist()
        parts.append(Part(texts, np.array([names.index(found[text][0]) for text in texts], np.int32)))
    if min(len(part.texts) for part in parts) < 10 or len(set(parts[0].classes)) < 2:
        wanted = "at least 50 different texts of at least two labels"
        raise DataError(f"expected {wanted}, got {len(found)} of {len(names)}")
    return parts, names


def network(parts: list[Part], names: list[str], args: argparse.Namespace) -> np.ndarray:
    """The classes of the last part, with the params after the epoch that does best on the second part."""
    alphabet = {character: k for k, character in enumerate(sorted(set("".join(parts[0].texts))), 1)}  # 0: any other

    def encode(part):
        xs, lengths = pad([[alphabet.get(character, 0) for character in text] for text in part.texts], length=LENGTH)
        return Batch(xs.astype(np.int32), part.classes, lengths)

    training, validation, test = map(encode, parts)
    size, epochs = (24, 4) if args.quick else (64, 6)
    reader = Pool(Bidirectional(GRU(32, size), GRU(32, size)))
    model = Stack((Embed(len(alphabet) + 1, 32), reader, Dropout(0.2), Linear(2 * size, len(names))))
    init, noise, order = jax.random.split(jax.random.key(args.seed), 3)
    source = Arrays(training, min(50, len(training.targets)), key=order, drop_last=True)
    schedule = optax.cosine_decay_schedule(0.02 if args.quick else 0.01, epochs * len(source))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    state, _ = fit(
        make_loss(model, cross_entropy, metrics={"accuracy": accuracy}),
        train_state(model.init(init), optimizer, noise),
        source,
        optimizer=optimizer,
        epochs=epochs,
        validation=Validation(Arrays(validation, 250, shuffle=False), "accuracy", maximize=True),
    )
    assert state.best is not None
    return predict(model, state.best.params, test.xs, lengths=test.lengths, batch_size=250).argmax(-1)


@threadpool_limits.wrap(limits=1)  # the products are small: threads would wait for each other
def bag(parts: list[Part], kinds: list[dict]) -> np.ndarray:
    """The classes of the last part, by the kind of bag and the C that do best on the second part."""
    best, predicted = -1.0, np.zeros(0)
    for kind, c in itertools.product(kinds, (1, 10)):
        words = TfidfVectorizer(lowercase=False, sublinear_tf=True, **kind).fit(parts[0].texts)
        first, second, third = (words.transform(part.texts) for part in parts)
        model = LogisticRegression(C=c, max_iter=1000).fit(first, parts[0].classes)
        if (score := model.score(second, parts[1].classes)) > best:
            best, predicted = score, model.predict(third)
    return predicted


def run(args: argparse.Namespace) -> Result:
    parts, names = divide(read_csv(args.data) if args.data else read_lines(), args)
    predicted = {"network": network(parts, names, args)} | {name: bag(parts, kinds) for name, kinds in BAGS.items()}
    return Result(parts[2], names, predicted)


def picture(result: Result) -> Figure:
    """What two models take each class for, and texts that only the network gets right."""
    figure = Figure(figsize=(7, 5.6))
    grid = figure.add_gridspec(2, 1)
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    for axes, model in zip(above.subplots(1, 2), ("bag of words", "network"), strict=True):
        shares = np.zeros((len(result.names), len(result.names)))
        np.add.at(shares, (result.test.classes, result.predicted[model]), 1)
        shares /= np.maximum(shares.sum(1, keepdims=True), 1)
        axes.imshow(shares, vmin=0, vmax=1)
        for (row, column), share in np.ndenumerate(shares) if len(result.names) <= 8 else ():
            number = f"{100 * share:.0f}" if share >= 0.005 else ""
            axes.text(column, row, number, ha="center", va="center", color="w" if share > 0.5 else "k")
        axes.set(
            xticks=range(len(shares)), yticks=range(len(shares)), xlabel="predicted", ylabel="true (% of each row)"
        )
        axes.set(
            xticklabels=result.names, yticklabels=result.names, title=f"{model}: {result.accuracy(model):.1%} right"
        )
    axes = below.subplots()
    axes.set_axis_off()
    axes.text(0, 1, "texts that only the network gets right", fontsize=9)
    wrong = result.predicted["bag of words"]
    only = np.flatnonzero((result.predicted["network"] == result.test.classes) & (wrong != result.test.classes))
    rows = [(result.names[result.test.classes[k]], result.names[wrong[k]], result.test.texts[k]) for k in only[:12]]
    for row, entries in enumerate([("true", "bag of words", "text"), *rows], 1):
        for x, entry, color in zip((0.03, 0.11, 0.25), entries, ("C2", "C1", "k"), strict=True):
            axes.text(x, 1 - row / 14, entry, family="monospace", fontsize=8, color=color, parse_math=False)
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="CSV", help="your own texts (default: lines of Python's library)")
    parser.add_argument("--quick", action="store_true", help="fewer texts, a small network and few epochs")
    parser.add_argument("--seed", type=int, default=0, help="seed of split, weights and order (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.03, help="wanted gain in accuracy (default: %(default)s)")
    parser.add_argument("--out", default="text.png", metavar="PATH", help="the picture (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    try:
        result = run(args)
    except DataError as error:
        print(f"classify_text.py: error: {args.data}: {error}", file=sys.stderr)
        return 2
    table = Table("model", "accuracy", title=f"on the test part, {len(result.test.texts):,} texts")
    for model in result.predicted:
        table.add_row(model, f"{result.accuracy(model):.3f}")
    Console().print(table)
    with rc_context(STYLE):
        picture(result).savefig(args.out)
    if args.quick:
        print(f"too small to win, and not judged; picture in {args.out}")
        return 0
    print(f"gain {result.gain:.3f} over the bag of words, wanted at least {args.margin}; picture in {args.out}")
    return 0 if result.gain >= args.margin else 1


if __name__ == "__main__":
    sys.exit(main())
