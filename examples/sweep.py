"""A sweep: 32 models, of four seeds and eight learning rates, trained by one compiled program.

Data: scikit-learn's 1,797 handwritten digits, row by row; 900 are for training, the rest are held out.

Shown here: `make_step` is a pure function of a state and a batch. A loop over it is `lax.scan`. Many models at once are
`jax.vmap` of it, over states with different seeds and learning rates. (`fit` does the same for such a state.)

Comparison: a loop over the models that runs one compiled training again and again. Both train on the same batches in
the same order. The losses of their first 40 steps must be equal; later, rounding errors may have grown, as they do at
high rates. Compile times are printed separately. Each run time is the least of a few, taken in turn.

Exit status: 0 if the sweep is at least `--margin` times as fast as the loop, 1 if not; with `--quick` always 0.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

from jaxrnn import LSTM, Linear, Pool, Stack
from jaxrnn.training import Batch, cross_entropy, make_loss, make_step, train_state

SIZE, ROWS = 8, 8  # hidden units, and digits in a batch: small, as where many models pay
EQUAL_STEPS, TOLERANCE = 40, 1e-3


class Times(NamedTuple):
    """Seconds to compile, and to train all models."""

    compile: float
    run: float


class Result(NamedTuple):
    """The learning rates, (R,); the loss on held-out digits after training, (R, seeds); and the times."""

    rates: np.ndarray
    held_out: np.ndarray
    loop: Times
    sweep: Times

    def ratio(self) -> float:
        return self.loop.run / self.sweep.run


def load(steps: int, seed: int) -> tuple[Batch, Batch]:
    """Batches to train on, leaves (steps, ROWS, ...), and the digits held out."""
    images, labels = load_digits(return_X_y=True)
    digits = Batch(images.reshape(-1, 8, 8).astype(np.float32) / 16, labels.astype(np.int32))
    rows = np.random.default_rng(seed).integers(0, 900, (steps, ROWS))
    batches, held_out = (jax.tree.map(lambda leaf: leaf[at], digits) for at in (rows, slice(900, None)))  # noqa: B023
    return batches, held_out


def compiled(function: Callable, *args: Any) -> tuple[Callable, float]:
    """The function as a program for arguments like these, and the seconds that it took to make it."""
    begun = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    return program, time.perf_counter() - begun


def seconds(function: Callable) -> float:
    """Until what the function returns is there."""
    begun = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begun


def run(args: argparse.Namespace) -> Result:
    count, seeds, steps, repeats = (4, 2, 60, 1) if args.quick else (8, 4, 1500, 3)
    batches, held_out = load(steps, args.seed)
    model = Stack((Pool(LSTM(8, SIZE)), Linear(SIZE, 10)))
    loss = make_loss(model, cross_entropy)
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)
    step = make_step(loss, optimizer)

    def member(rate, key):
        init, noise = jax.random.split(key)
        state = train_state(model.init(init), optimizer, noise)
        return state._replace(opt_state=optax.tree_utils.tree_set(state.opt_state, learning_rate=rate))

    def train(state, batches):
        def body(state, batch):
            state, metrics = step(state, batch)
            return state, metrics["loss"].value

        state, losses = lax.scan(body, state, batches)
        return loss(state.params, held_out, None)[0], losses

    rates = np.geomspace(1e-3, 1e-1, count).astype(np.float32)
    keys = jax.random.split(jax.random.key(args.seed), seeds)
    states = jax.jit(jax.vmap(member))(jnp.repeat(rates, seeds), jnp.tile(keys, count))
    alone = [jax.tree.map(lambda leaf: leaf[k], states) for k in range(count * seeds)]  # noqa: B023

    one, compile_one = compiled(train, alone[0], batches)
    every, compile_every = compiled(jax.vmap(train, in_axes=(0, None)), states, batches)
    final, together = every(states, batches)
    separate = np.stack([one(state, batches)[1] for state in track(alone, "the loop", transient=True)])
    np.testing.assert_allclose(together[:, :EQUAL_STEPS], separate[:, :EQUAL_STEPS], rtol=0, atol=TOLERANCE)

    times = [
        (seconds(lambda: [one(state, batches) for state in alone]), seconds(lambda: every(states, batches)))
        for _ in track(range(repeats), "both, timed", transient=True)
    ]
    seconds_loop, seconds_sweep = map(min, zip(*times, strict=True))
    loop, sweep = Times(compile_one, seconds_loop), Times(compile_every, seconds_sweep)
    return Result(rates, np.asarray(final).reshape(count, seeds), loop, sweep)


def picture(result: Result) -> Figure:
    """The losses over the learning rate, a dot for each seed; and the times."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    axes.plot(result.rates, np.median(result.held_out, axis=1), color="tab:blue", alpha=0.5, label="median")
    for k, losses in enumerate(result.held_out.T):
        axes.plot(result.rates, losses, "o", color="tab:blue", label=None if k else "a model")
    axes.axhline(math.log(10), color="0.5", ls="--", label="chance")
    axes.set(xscale="log", xlabel="learning rate", ylabel="cross-entropy, held-out digits", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()

    names = "a loop", "one program"
    for key, bottom, color in (("compile", [0, 0], "0.7"), ("run", [result.loop[0], result.sweep[0]], "tab:blue")):
        heights = [getattr(times, key) for times in (result.loop, result.sweep)]
        bars.bar(names, heights, bottom=bottom, color=color, label=f"to {key}")
    bars.set(ylabel="seconds", title=f"{result.held_out.size} models, {result.ratio():.1f} x as fast")
    bars.legend()
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 models and few steps, for a first look")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=1.5, help="wanted ratio of run times (default: %(default)s)")
    parser.add_argument("--out", default="sweep.png", metavar="PATH", help="the picture (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    result = run(args)
    table = Table("learning rate", *(f"seed {k}" for k in range(result.held_out.shape[1])), title="held-out loss")
    for rate, losses in zip(result.rates, result.held_out, strict=True):
        table.add_row(f"{rate:.4f}", *(f"{loss:.3f}" for loss in losses))
    Console().print(table)
    table = Table(f"{result.held_out.size} models, seconds", "to compile", "to run")
    table.add_row("a loop over one compiled training", *(f"{value:.2f}" for value in result.loop))
    table.add_row("the sweep, one program", *(f"{value:.2f}" for value in result.sweep))
    Console().print(table)
    picture(result).savefig(args.out, dpi=130)
    if args.quick:
        print(f"too small to win, and not judged; picture in {args.out}")
        return 0
    print(
        f"the losses are equal; the sweep is {result.ratio():.2f} times as fast, wanted at least {args.margin}; "
        f"picture in {args.out}"
    )
    return 0 if result.ratio() >= args.margin else 1


if __name__ == "__main__":
    sys.exit(main())
