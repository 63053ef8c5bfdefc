"""Long memory: a stack of linear recurrences and an LSTM learn to add two numbers, up to 1000 steps apart.

Data: generated sequences of 1000 steps, each a number in [0, 1) and a flag. Two steps are flagged, one in either half.
The target, at the end, is the sum of their numbers. Every sequence is trained on once.

Comparison: two layers of `MinGRU`, each with a gated feed-forward layer (`residual_block`), against two layers of an
LSTM with as many parameters. Batches, steps, optimizer and learning rate are the same, and the mean squared error on
new sequences is compared. The baseline is chance: always to predict the mean, 1, with an error of 1/6.

Exit status: 0 if the linear recurrences are below the LSTM, and below chance by at least `--margin`,
1 if not; with `--quick` always 0.

Reference: Feng et al. 2024, Were RNNs all we needed?; Hochreiter & Schmidhuber 1997, Long short-term memory; the sums
in this form: Arjovsky et al. 2016.

What it needs beside the package: pip install -e ".[plot]"
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
import optax
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import jaxrnn
from jaxrnn import LSTM, Cell, LayerNorm, Linear, MinGRU, Pool, Stack, residual_block
from jaxrnn.analysis import STYLE
from jaxrnn.training import Batch, fit, make_loss, predict, squared_error, train_state

ROWS = 32


class Run(NamedTuple):
    """One model: its error on new sequences, the loss of each step, its parameters, and seconds of training."""

    error: float
    losses: np.ndarray
    parameters: int
    seconds: float


class Result(NamedTuple):
    """The error of always predicting 1, and the run of each model."""

    chance: float
    runs: dict[str, Run]


def adding(rng: np.random.Generator, count: int, length: int) -> Batch:
    """`count` sequences, xs (count, length, 2), targets (count,)."""
    rows, numbers = np.arange(count), rng.uniform(size=(count, length)).astype(np.float32)
    flags = np.zeros_like(numbers)
    for low, high in (0, length // 2), (length // 2, length):
        flags[rows, rng.integers(low, high, count)] = 1
    return Batch(np.stack([numbers, flags], axis=-1), (numbers * flags).sum(1))


def models(size: int) -> dict[str, Cell]:
    """The two, of about as many parameters."""

    def block() -> Cell:
        return residual_block(MinGRU(size, size), 2 * size)

    linear = Stack((Linear(2, size), block(), Pool(Stack((block(), LayerNorm(size)))), Linear(size, 1)))
    wanted = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(linear.init, jax.random.key(0))))

    def parameters(n: int) -> int:
        return 4 * n * (2 + n + 1) + 4 * n * (n + n + 1) + n + 1

    n = min(range(1, 4 * size), key=lambda n: abs(parameters(n) - wanted))
    return {"MinGRU": linear, "LSTM": Stack((LSTM(2, n), Pool(LSTM(n, n)), Linear(n, 1)))}


def learn(name: str, model: Cell, training: Batch, test: Batch, args: argparse.Namespace) -> Run:
    steps = len(training.targets) // ROWS
    init, noise, order = jax.random.split(jax.random.key(args.seed), 3)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-3, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    Console().print(f"{name}: {jaxrnn.explain(model, model.init(init), None, test.xs[:1], time_axis=1).calls[0]}")
    begun = time.perf_counter()
    state, history = fit(
        make_loss(model, squared_error),
        train_state(model.init(init), optimizer, noise),
        training,
        optimizer=optimizer,
        epochs=1,
        batch_size=ROWS,
        key=order,
    )
    seconds = time.perf_counter() - begun
    error = np.mean((predict(model, state.params, test.xs)[:, 0] - test.targets) ** 2)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return Run(float(error), history.train["loss"], parameters, seconds)


def run(args: argparse.Namespace) -> Result:
    length, steps, size = (40, 300, 16) if args.quick else (args.length, args.steps, 32)
    rng = np.random.default_rng(args.seed)
    training, test = adding(rng, ROWS * steps, length), adding(rng, 512, length)
    chance = float(np.mean((test.targets - 1) ** 2))
    return Result(chance, {name: learn(name, model, training, test, args) for name, model in models(size).items()})


def picture(result: Result) -> Figure:
    """The losses in training, smoothed."""
    figure = Figure(figsize=(3.5, 2.6))
    axes = figure.subplots()
    for name, each in result.runs.items():
        smooth = np.convolve(each.losses, np.ones(25) / 25, "valid")
        axes.plot(np.arange(len(smooth)) + 25, smooth, label=f"{name}, {each.parameters:,} parameters")
    axes.axhline(result.chance, color="0.5", ls="--", lw=0.8, label="chance")
    axes.set(xlabel="step of training", ylabel="mean squared error", yscale="log", title="the adding problem")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.8))
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 steps in place of 1000, for a first look")
    parser.add_argument("--length", type=int, default=1000, help="length of the sequences (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="steps of training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and sequences (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.1, help="wanted gain over chance (default: %(default)s)")
    parser.add_argument("--out", default="long_memory.png", metavar="PATH", help="the picture (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    result = run(args)
    table = Table("on new sequences", "squared error", "parameters", "seconds of training")
    table.add_row("chance", f"{result.chance:.4f}", "", "")
    for name, each in result.runs.items():
        table.add_row(name, f"{each.error:.4f}", str(each.parameters), f"{each.seconds:.0f}")
    Console().print(table)
    with rc_context(STYLE):
        picture(result).savefig(args.out)
    error, other = (result.runs[name].error for name in ("MinGRU", "LSTM"))
    gain = result.chance - error
    if args.quick:
        print(f"too small to win, and not judged; picture in {args.out}")
        return 0
    print(f"gain over chance {gain:.4f}, wanted at least {args.margin}; picture in {args.out}")
    return 0 if gain >= args.margin and error < other else 1


if __name__ == "__main__":
    sys.exit(main())
