"""Vanishing gradients, seen: Elman, LSTM and GRU on the adding problem, and how gradients flow back through each.

Data: generated sequences of 50 steps, each a number in [0, 1) and a flag. Two steps are flagged, one in either half.
The target, at the end, is the sum of their numbers. Every sequence is trained on once.

Shown here: the gradient of the prediction with respect to the state at each step, by `jaxrnn.analysis`, before and
after training. Where it vanishes, the early steps cannot be learnt. Where training works, it has made the gradient
flow. (`jaxrnn.analysis.plot_gradient_flow` draws a single such panel.)

Comparison: the mean squared error on new sequences, with the same sizes, steps, batches and learning rate for all. The
baseline is chance: always to predict the mean, 1, with an error of 1/6. LSTM and GRU have to beat it. Elman need not,
and its error usually stays at chance.

Exit status: 0 if LSTM and GRU are both below chance by at least `--margin`, 1 if not; with `--quick` always 0.

Reference: Hochreiter & Schmidhuber 1997, Long short-term memory; the sums in this form: Arjovsky et al. 2016.

What it needs beside the package: pip install -e ".[plot]"
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

import jax
import numpy as np
import optax
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from jaxrnn import GRU, LSTM, Elman, Linear, Pool, Stack
from jaxrnn.analysis import STYLE, gradient_flow
from jaxrnn.training import Batch, fit, make_loss, predict, squared_error, train_state

CELLS = {"Elman": Elman, "LSTM": LSTM, "GRU": GRU}


class Run(NamedTuple):
    """One cell: its error on new sequences, the loss of each step, and gradient norms (T, rows) before and after."""

    error: float
    losses: np.ndarray
    before: np.ndarray
    after: np.ndarray


class Result(NamedTuple):
    """The error of always predicting 1, and the run of each cell."""

    chance: float
    runs: dict[str, Run]


def adding(rng: np.random.Generator, count: int, length: int) -> Batch:
    """`count` sequences, xs (count, length, 2), targets (count,)."""
    rows, numbers = np.arange(count), rng.uniform(size=(count, length)).astype(np.float32)
    flags = np.zeros_like(numbers)
    for low, high in (0, length // 2), (length // 2, length):
        flags[rows, rng.integers(low, high, count)] = 1
    return Batch(np.stack([numbers, flags], axis=-1), (numbers * flags).sum(1))


def learn(name: str, training: Batch, test: Batch, args: argparse.Namespace) -> Run:
    size = 16 if args.quick else 32
    model = Stack((Pool(CELLS[name](2, size)), Linear(size, 1)))
    init, noise, order = jax.random.split(jax.random.key(args.seed), 3)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))

    @jax.jit
    def flow(params):
        seen = gradient_flow(model, params, None, test.xs[:100], lambda _, ys: ys.sum(), time_axis=1)
        return seen.total

    params = model.init(init)
    Console().print(f"{name}:")
    state, history = fit(
        make_loss(model, squared_error),
        train_state(params, optimizer, noise),
        training,
        optimizer=optimizer,
        epochs=1,
        batch_size=32,
        key=order,
    )
    error = np.mean((predict(model, state.params, test.xs)[:, 0] - test.targets) ** 2)
    return Run(float(error), history.train["loss"], *(np.asarray(flow(each)) for each in (params, state.params)))


def run(args: argparse.Namespace) -> Result:
    length, steps = (10, 250) if args.quick else (50, 1000)
    rng = np.random.default_rng(args.seed)
    training, test = adding(rng, 32 * steps, length), adding(rng, 1024, length)
    chance = float(np.mean((test.targets - 1) ** 2))
    return Result(chance, {name: learn(name, training, test, args) for name in CELLS})


def picture(result: Result) -> Figure:
    """The gradient flow before and after training, and the losses."""
    figure = Figure(figsize=(7, 2.6))
    before, after, losses = figure.subplots(1, 3)
    after.sharey(before)
    for name, each in result.runs.items():
        for axes, norms in (before, each.before), (after, each.after):
            low, middle, high = np.quantile(norms, (0.1, 0.5, 0.9), axis=1)
            (line,) = axes.plot(np.arange(len(norms)), middle, label=name)
            axes.fill_between(np.arange(len(norms)), low, high, color=line.get_color(), alpha=0.2, lw=0)
        smooth = np.convolve(each.losses, np.ones(25) / 25, "valid")
        losses.plot(np.arange(len(smooth)) + 25, smooth, label=name)
    losses.axhline(result.chance, color="0.5", ls="--", lw=0.8, label="chance")
    for axes, title in (before, "before training"), (after, "after training"):
        axes.set(xlabel="time step $t$", yscale="log", title=f"gradient flow {title}")
    before.set(ylabel=r"$\|\partial y_T/\partial c_t\|$")
    losses.set(xlabel="step of training", ylabel="mean squared error", yscale="log", title="learning to add")
    figure.legend(*losses.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 steps in place of 50, for a first look")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and sequences (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.1, help="wanted gain over chance (default: %(default)s)")
    parser.add_argument("--out", default="vanishing.png", metavar="PATH", help="the picture (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    result = run(args)
    table = Table("on new sequences", "squared error", "gradient, first step : last", "trained")
    table.add_row("chance", f"{result.chance:.4f}", "", "")
    for name, each in result.runs.items():
        ratios = (float(np.median(norms[0] / norms[-1])) for norms in (each.before, each.after))
        table.add_row(name, f"{each.error:.4f}", *(f"{ratio:.1e}" for ratio in ratios))
    Console().print(table)
    with rc_context(STYLE):
        picture(result).savefig(args.out)
    gain = result.chance - np.max([result.runs[name].error for name in ("LSTM", "GRU")])
    if args.quick:
        print(f"too small to win, and not judged; picture in {args.out}")
        return 0
    print(f"gain of the worse of LSTM and GRU {gain:.4f}, wanted at least {args.margin}; picture in {args.out}")
    return 0 if gain >= args.margin else 1


if __name__ == "__main__":
    sys.exit(main())
