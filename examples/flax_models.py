"""Flax models around the cells of jaxrnn: the same network in linen and in NNX, trained with Optax.

Data: generated walks on a ring of four places, where each step is left, stay or right (cycle navigation). After each
step the network says where the walk is. It trains on walks of 5 to 25 steps and is tested on new ones of 40.

Shown here: `jaxrnn.linen.RNN` and `jaxrnn.nnx.RNN` between Embed and Dense (Linear) layers of Flax; lengths; `fit`,
which takes params of any kind; and weight decay on matrices alone. The matrices are chosen by the names in their paths,
which are the same for both.

Comparison: accuracy over all 40 steps. The baseline is the most frequent place after the same last k moves in the
training walks. k = 0, ..., 8 is chosen on validation walks of 40 steps. (Within the first k moves the place is known.)

Exit status: 0 if both are better than the baseline by at least `--margin` and within `SAME` of each other,
1 if not; with `--quick` always 0.

Reference for the task: Delétang et al. 2023, Neural networks and the Chomsky hierarchy.

What it needs beside the package: pip install -e ".[plot]"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from flax import nnx
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import jaxrnn.linen
import jaxrnn.nnx
from jaxrnn import GRU, Dropout, Stack
from jaxrnn.analysis import STYLE
from jaxrnn.training import Batch, History, accuracy, cross_entropy, evaluate, fit, train_state

PLACES, MOVES, SIZE, LONGEST = 4, 3, 16, 40
SAME = 0.03  # accuracies no further apart are the same
CELL = Stack((GRU(SIZE, 2 * SIZE), Dropout(0.1)))


class Result(NamedTuple):
    """Accuracies on the test part, by name, and the history of each network."""

    accuracies: dict[str, float]
    histories: dict[str, History]

    def gain(self) -> float:
        """By how much the worse network is better than the baseline."""
        return float(np.min([self.accuracies[name] for name in self.histories])) - self.accuracies["baseline"]

    def difference(self) -> float:
        linen, other = (self.accuracies[name] for name in self.histories)
        return abs(linen - other)


def walks(rng: np.random.Generator, count: int, shortest: int, longest: int) -> Batch:
    """`count` walks: moves and places, (count, longest), and lengths (count,)."""
    moves = rng.integers(0, MOVES, (count, longest), np.int32)
    lengths = rng.integers(shortest, longest + 1, count, np.int32)
    return Batch(moves, (moves - 1).cumsum(1, dtype=np.int32) % PLACES, lengths)


class LinenModel(nn.Module):
    """Moves (B, T) to logits (B, T, PLACES)."""

    @nn.compact
    def __call__(self, moves, lengths, *, deterministic):
        xs = nn.Embed(MOVES, SIZE)(moves)
        ys = jaxrnn.linen.RNN(CELL)(xs, seq_lengths=lengths, deterministic=deterministic)
        return nn.Dense(PLACES)(ys)


class NNXModel(nnx.Module):
    """The same."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(MOVES, SIZE, rngs=rngs)
        self.rnn = jaxrnn.nnx.RNN(CELL, rngs=rngs)
        self.dense = nnx.Linear(2 * SIZE, PLACES, rngs=rngs)

    def __call__(self, moves, lengths, *, deterministic, rngs=None):
        ys = self.rnn(self.embed(moves), seq_lengths=lengths, deterministic=deterministic, rngs=rngs)
        return self.dense(ys)


def linen_model(seed: int) -> tuple[Any, Callable]:
    """The params, and `logits(params, batch, key)`."""
    model = LinenModel()

    def logits(params, batch, key):
        rngs = None if key is None else {"dropout": key}
        return model.apply({"params": params}, batch.xs, batch.lengths, deterministic=key is None, rngs=rngs)

    params = model.init(jax.random.key(seed), np.zeros((1, 2), np.int32), None, deterministic=True)["params"]
    return params, logits


def nnx_model(seed: int) -> tuple[Any, Callable]:
    """The same."""
    graphdef, params, rest = nnx.split(NNXModel(nnx.Rngs(seed)), nnx.Param, ...)

    def logits(params, batch, key):
        model = nnx.merge(graphdef, params, rest)
        return model(batch.xs, batch.lengths, deterministic=key is None, rngs=key)

    return params, logits


def matrices(params: Any) -> Any:
    """True for the matrices of cells and dense layers, by the last name of their path: no bias, no embedding."""
    names = "kernel", "w_x", "w_h"

    def is_matrix(path, _):
        return any(f"'{name}'" in jax.tree_util.keystr(path) for name in names)

    return jax.tree.map_with_path(is_matrix, params)


def make_loss(logits: Callable) -> Callable:
    """`loss(params, batch, key) -> (scalar, metrics)`, padding left out."""

    def loss(params, batch, key):
        ys = logits(params, batch, key)
        valid = np.arange(batch.xs.shape[1]) < batch.lengths[:, None]
        error = cross_entropy(ys, batch.targets, valid)
        return error.value, {"loss": error, "accuracy": accuracy(ys, batch.targets, valid)}

    return loss


def baseline(training: Batch, validation: Batch, test: Batch) -> float:
    """Accuracy on the test part of the best table of last moves."""

    def contexts(batch, k):
        """A number for the last k moves before and at each step, and for the walk's start among them."""
        padded = np.pad(batch.xs + 1, ((0, 0), (k, 0)))
        return sum((MOVES + 1) ** j * padded[:, k - j : padded.shape[1] - j] for j in range(k)) + 0 * batch.xs

    def score(k, part):
        valid = np.arange(training.xs.shape[1]) < training.lengths[:, None]
        counts = np.zeros(((MOVES + 1) ** k, PLACES))
        np.add.at(counts, (contexts(training, k)[valid], training.targets[valid]), 1)
        return float((counts.argmax(1)[contexts(part, k)] == part.targets).mean())

    best = max(range(9), key=lambda k: score(k, validation))
    return score(best, test)


def run(args: argparse.Namespace) -> Result:
    steps, longest = (240, 12) if args.quick else (1500, 25)
    rng = np.random.default_rng(args.seed)
    training = walks(rng, 32 * steps, 5, longest)
    validation, test = (walks(rng, 512, LONGEST, LONGEST) for _ in range(2))
    schedule = optax.cosine_decay_schedule(1e-2, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-2, mask=matrices))
    accuracies, histories = {"baseline": baseline(training, validation, test)}, {}
    for name, make in ("linen", linen_model), ("NNX", nnx_model):
        params, logits = make(args.seed)
        loss = make_loss(logits)
        state = train_state(params, optimizer, jax.random.key(args.seed))
        order = jax.random.key(args.seed + 1)
        Console().print(f"{name}:")
        state, histories[name] = fit(loss, state, training, optimizer=optimizer, epochs=1, batch_size=32, key=order)
        accuracies[name] = evaluate(loss, state.params, test, batch_size=512)["accuracy"]
    return Result(accuracies, histories)


def picture(result: Result) -> Figure:
    """The learning curves, and the accuracies."""
    figure = Figure(figsize=(7, 2.6))
    curves, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    for name, history in result.histories.items():
        smooth = np.convolve(history.train["accuracy"], np.ones(20) / 20, "valid")
        curves.plot(np.arange(len(smooth)) + 20, smooth, label=name)
    curves.axhline(1 / PLACES, color="0.5", ls="--", lw=0.8, label="chance")
    curves.set(xscale="log", xlabel="step of training", ylabel="accuracy, training walks", ylim=(0, 1.02))
    curves.legend(loc="center right")
    names = list(result.accuracies)
    drawn = bars.bar(names, [result.accuracies[name] for name in names], width=0.6, color=["0.6", "C0", "C1"])
    bars.bar_label(drawn, fmt="{:.3f}")
    bars.set(ylabel="accuracy, new, longer walks", ylim=(0, 1.1))
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps on short walks, for a first look")
    parser.add_argument("--seed", type=int, default=0, help="seed of walks, weights and dropout (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.3, help="wanted gain in accuracy (default: %(default)s)")
    parser.add_argument("--out", default="flax.png", metavar="PATH", help="the picture (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    result = run(args)
    table = Table("on new walks of 40 steps", "accuracy")
    for name, value in result.accuracies.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    with rc_context(STYLE):
        picture(result).savefig(args.out)
    gain, difference = result.gain(), result.difference()
    if args.quick:
        print(f"too small to win, and not judged; picture in {args.out}")
        return 0
    print(f"gain of the worse {gain:.3f}, wanted at least {args.margin}; difference {difference:.4f}, at most {SAME}")
    print(f"picture in {args.out}")
    return 0 if gain >= args.margin and difference <= SAME else 1


if __name__ == "__main__":
    sys.exit(main())
