"""Many to many, aligned: what does each character of a line of Python belong to?

Data: single lines of the standard library's modules. Python's own `tokenize`, which reads whole files, gives every
character its tag: keyword, name, called name (one before a parenthesis), number, operator, string, comment or space.
The models see one line alone, so they also have to tell code from the inside of a docstring. The modules are divided:
60 % for training, 20 % for validation, 20 % for the test. Each line occurs once.

Model: a stack of two bidirectional LSTMs that puts out one tag per step, on padded sequences with lengths.

Comparison: accuracy over the characters of the test part that are not white space. The baseline is logistic regression
on the characters and pairs of characters in a window around the one to be tagged. The validation part chooses the
window's width and the network's epoch. The same stack with LSTMs of one direction and as many units is trained too, to
show what the rest of the line is worth.

Exit status: 0 if the bidirectional stack beats both others by at least `--margin`, 1 if not; with `--quick` always 0.

What it needs beside the package: pip install -e ".[examples]"
"""

from __future__ import annotations

import argparse
import io
import itertools
import keyword
import sys
import sysconfig
import tokenize
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from jaxrnn import LSTM, Bidirectional, Cell, Dropout, Embed, Linear, Stack
from jaxrnn.analysis import STYLE
from jaxrnn.training import Batch, Validation, accuracy, cross_entropy, fit, make_loss, predict, train_state
from jaxrnn.training.ragged import pad

LENGTH = 80
VOCABULARY = 128  # ASCII; code 0 stands for any other character
TAGS = ["space", "keyword", "name", "called name", "number", "operator", "string", "comment"]
COLORS = ["white", "#8250df", "#24292f", "#0969da", "#bc4c00", "#8c959f", "#1a7f37", "#bf8700"]
MISTAKE = "#cf222e"


class Result(NamedTuple):
    """The test part, and of each model the tags (N, T)."""

    test: Batch
    predicted: dict[str, np.ndarray]

    @property
    def counted(self) -> np.ndarray:
        """The characters that are no white space, (N, T)."""
        return (np.arange(LENGTH) < self.test.lengths[:, None]) & (self.test.xs != ord(" "))

    def accuracy(self, model: str) -> float:
        return float((self.predicted[model] == self.test.targets)[self.counted].mean())

    @property
    def gain(self) -> float:
        return self.accuracy("bidirectional") - max(self.accuracy("forward only"), self.accuracy("window regression"))


def tag(code: str) -> list[tuple[str, list[int]]]:
    """The lines of a module, and the tag of every character."""
    lines = code.splitlines(keepends=True)
    tags = [[0] * len(line) for line in lines]
    tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    kinds = {tokenize.STRING: "string", tokenize.COMMENT: "comment", tokenize.NUMBER: "number", tokenize.OP: "operator"}
    for token, following in itertools.pairwise(tokens):
        kind = kinds.get(token.type)
        if token.type == tokenize.NAME:
            named = "called name" if following.string == "(" else "name"
            kind = "keyword" if keyword.iskeyword(token.string) else named
        (row, begin), (last, end) = token.start, token.end
        while kind and row <= last:
            stop = end if row == last else len(lines[row - 1])
            tags[row - 1][begin:stop] = [TAGS.index(kind)] * (stop - begin)
            row, begin = row + 1, 0
    return [(line.rstrip(), row[: len(line.rstrip())]) for line, row in zip(lines, tags, strict=True)]


def load(args: argparse.Namespace) -> list[Batch]:
    """The parts for training, validation and test."""
    rng, seen, parts = np.random.default_rng(args.seed), set(), []
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    paths = [paths[k] for k in rng.permutation(len(paths))[: 25 if args.quick else None]]
    sizes = (400, 100, 100) if args.quick else (3000, 600, 600)
    for modules, size in zip(np.split(paths, [len(paths) * 6 // 10, len(paths) * 8 // 10]), sizes, strict=True):
        lines = {}
        for path in modules:
            lines |= {line: tags for line, tags in tag(path.read_text(encoding="utf-8")) if 0 < len(line) <= LENGTH}
        chosen = rng.permutation(sorted(lines.keys() - seen))[:size].tolist()
        seen |= lines.keys()
        xs, lengths = pad([[ord(c) * (ord(c) < VOCABULARY) for c in line] for line in chosen], length=LENGTH)
        tags, _ = pad([lines[line] for line in chosen], length=LENGTH)
        parts.append(Batch(xs.astype(np.int32), tags.astype(np.int32), lengths))
    return parts


def network(name: str, parts: list[Batch], args: argparse.Namespace) -> np.ndarray:
    """The tags of the last part, with the params after the epoch that does best on the second part."""
    size, depth, epochs = (16, 1, 8) if args.quick else (48, 2, 8)
    layers: list[Cell] = [Embed(VOCABULARY, 2 * size)]
    for _ in range(depth):
        both = Bidirectional(LSTM(2 * size, size), LSTM(2 * size, size))
        layers += [both if name == "bidirectional" else LSTM(2 * size, 2 * size), Dropout(0.1, per_sequence=True)]
    model = Stack((*layers, Linear(2 * size, len(TAGS))))
    init, noise, order = jax.random.split(jax.random.key(args.seed), 3)
    rate = optax.cosine_decay_schedule(0.01, epochs * len(parts[0].xs) // 50)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    state, _ = fit(
        make_loss(model, cross_entropy, metrics={"accuracy": accuracy}),
        train_state(model.init(init), optimizer, noise),
        parts[0],
        optimizer=optimizer,
        epochs=epochs,
        batch_size=50,
        key=order,
        validation=Validation(parts[1], "accuracy", maximize=True),
    )
    assert state.best is not None
    return predict(model, state.best.params, parts[2].xs, lengths=parts[2].lengths, batch_size=100).argmax(-1)


def windows(part: Batch, radius: int) -> tuple[csr_matrix, np.ndarray]:
    """Of every character: those up to `radius` away and their pairs (hashed), one-hot by place; and its tag."""
    valid = np.arange(LENGTH) < part.lengths[:, None]
    padded = np.pad(np.where(valid, part.xs + 1, 0), ((0, 0), (radius, radius + 1)))
    view = np.lib.stride_tricks.sliding_window_view(padded, 2 * radius + 2, axis=1)[valid]
    pairs = VOCABULARY + 1 + (view[:, :-1] * 131 + view[:, 1:]) % 1024
    width = VOCABULARY + 1 + 1024
    columns = np.concatenate([view[:, :-1], pairs], 1) + width * np.tile(np.arange(2 * radius + 1), 2)
    starts, ones = np.arange(0, columns.size + 1, columns.shape[1]), np.ones(columns.size, np.float32)
    return csr_matrix((ones, columns.ravel(), starts), (len(columns), width * (2 * radius + 1))), part.targets[valid]


@threadpool_limits.wrap(limits=1)  # the products are small: threads would wait for each other
def window_regression(parts: list[Batch], args: argparse.Namespace) -> np.ndarray:
    """The tags of the last part, by the radius that does best on the second part."""
    best, predicted = -1.0, np.zeros(0)
    for radius in (3,) if args.quick else (6, 12, 18):
        first, second, third = (windows(part, radius) for part in parts)
        model = LogisticRegression(C=0.1, max_iter=300, tol=1e-3).fit(*first)
        if (score := model.score(*second)) > best:
            best, predicted = score, model.predict(third[0])
    tags = np.zeros_like(parts[2].xs)
    tags[np.arange(LENGTH) < parts[2].lengths[:, None]] = predicted
    return tags


def run(args: argparse.Namespace) -> Result:
    parts = load(args)
    predicted = {name: network(name, parts, args) for name in ("bidirectional", "forward only")}
    return Result(parts[2], predicted | {"window regression": window_regression(parts, args)})


def picture(result: Result) -> Figure:
    """Lines in the colours of the true tags and of those predicted, with a legend; mistakes are underlined."""
    mistakes = {name: (tags != result.test.targets) & result.counted for name, tags in result.predicted.items()}
    count = {name: each.sum(1) for name, each in mistakes.items()}
    kinds = np.array([len(set(row.tolist())) for row in result.test.targets])
    order = np.argsort(np.where(count["bidirectional"] < 3, -count["forward only"], 0), kind="stable")
    shown = [k for k in order if kinds[k] >= 6 and result.test.lengths[k] < 68][:4]
    rows = {"true": result.test.targets} | result.predicted
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.set(xlim=(-14, 64), ylim=(len(shown) * (len(rows) + 1), -2))
    axes.set_axis_off()
    for k in range(1, len(TAGS)):
        axes.text(9.5 * k - 23.5, -1, TAGS[k], color=COLORS[k], weight="bold", fontsize=7)
    axes.text(52.5, -1, "mistake", color=MISTAKE, fontsize=7)
    axes.plot([52.5, 59.5], [-0.5, -0.5], color=MISTAKE, lw=1.5)
    for (block, line), (row, (name, tags)) in itertools.product(enumerate(shown), enumerate(rows.items())):
        y = block * (len(rows) + 1) + row + 0.5
        axes.text(-14, y, name, fontsize=7, color="0.5", va="center")
        places = np.flatnonzero(result.counted[line])
        for place in places:
            x, color = place - places[0], COLORS[tags[line, place]]
            character = chr(result.test.xs[line, place] or ord("?"))
            axes.text(
                x, y, character, color=color, family="monospace", fontsize=7, ha="center", va="center", parse_math=False
            )
            if name in mistakes and mistakes[name][line, place]:
                axes.plot([x - 0.5, x + 0.5], [y + 0.45] * 2, color=MISTAKE, lw=1.5)
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few lines, small networks and few epochs")
    parser.add_argument("--seed", type=int, default=0, help="seed of split, weights and order (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.03, help="wanted gain in accuracy (default: %(default)s)")
    parser.add_argument("--out", default="tag.png", metavar="PATH", help="the picture (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    result = run(args)
    table = Table("model", "accuracy", title=f"on the test part, {result.counted.sum():,} characters")
    for name in result.predicted:
        table.add_row(name, f"{result.accuracy(name):.3f}")
    Console().print(table)
    with rc_context(STYLE):
        picture(result).savefig(args.out)
    if args.quick:
        print(f"too small to win, and not judged; picture in {args.out}")
        return 0
    print(f"gain {result.gain:.3f} over the better of the others, wanted at least {args.margin}; picture in {args.out}")
    return 0 if result.gain >= args.margin else 1


if __name__ == "__main__":
    sys.exit(main())
