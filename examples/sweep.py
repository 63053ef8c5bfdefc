"""A sweep: 32 models, of four seeds and eight learning rates, trained by one compiled program.

Data: scikit-learn's 1,797 handwritten digits, row by row; 900 are for training, the rest are held out.

Shown here: `make_step` is a pure function of a state and a batch. A loop over it is `lax.scan`. Many models at once are
`jax.vmap` of it, over states with different seeds and learning rates. (`fit` does the same for such a state.)

Comparison: the loop in Python that calls one jitted step after the other, model after model. A step of a small model
takes less time than its call, and the sweep pays for one call instead of 48,000. Where models are large, there is
little to gain on a processor: beside a loop over one compiled training, which is shown too, only what its cores gain
together is left.

All train on the same batches in the same order. The losses of their first 40 steps must be equal; later, rounding
errors may have grown, as they do at high rates. Compile times are printed separately. Each run time is the least of a
few, taken in turn.

Exit status: 0 if the sweep is at least `--margin` times as fast as the loop in Python, 1 if not; with `--quick`
always 0.

What it needs beside the package: pip install -e ".[examples]"
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
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

from jaxrnn import LSTM, Linear, Pool, Stack
from jaxrnn.analysis import STYLE
from jaxrnn.training import Batch, cross_entropy, make_loss, make_step, train_state

SIZE, ROWS = 8, 8  # hidden units, and digits in a batch: small, as where many models pay
EQUAL_STEPS, TOLERANCE = 40, 1e-3
CALLS, TRAININGS, SWEEP = "a call for each step", "a call for each model", "the sweep, one call"


class Times(NamedTuple):
    """Seconds to compile, and to train all models."""

    compile: float
    run: float


class Result(NamedTuple):
    """The learning rates, (R,); the loss on held-out digits after training, (R, seeds); and the times of each way."""

    rates: np.ndarray
    held_out: np.ndarray
    times: dict[str, Times]

    def ratio(self) -> float:
        return self.times[CALLS].run / self.times[SWEEP].run


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
    model = Stack(Pool(LSTM(8, SIZE)), Linear(SIZE, 10))
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

    def call_each_step(state):
        losses = []
        for batch in by_step:
            state, metrics = one_step(state, batch)
            losses.append(metrics["loss"].value)
        return state, losses

    by_step = [jax.tree.map(lambda leaf: leaf[k], batches) for k in range(steps)]  # noqa: B023
    one_step, compile_step = compiled(step, alone[0], by_step[0])
    one, compile_one = compiled(train, alone[0], batches)
    every, compile_every = compiled(jax.vmap(train, in_axes=(0, None)), states, batches)
    final, together = every(states, batches)
    for train_one in (lambda state: one(state, batches)[1], lambda state: jnp.stack(call_each_step(state)[1])):
        separate = np.stack([train_one(state) for state in track(alone, "model by model", transient=True)])
        np.testing.assert_allclose(together[:, :EQUAL_STEPS], separate[:, :EQUAL_STEPS], rtol=0, atol=TOLERANCE)

    ways = {
        CALLS: lambda: [call_each_step(state)[0] for state in alone],
        TRAININGS: lambda: [one(state, batches) for state in alone],
        SWEEP: lambda: every(states, batches),
    }
    runs = [[seconds(way) for way in ways.values()] for _ in track(range(repeats), "timed in turn", transient=True)]
    compiling = (compile_step, compile_one, compile_every)
    times = {name: Times(*each) for name, *each in zip(ways, compiling, np.min(runs, axis=0), strict=True)}
    return Result(rates, np.asarray(final).reshape(count, seeds), times)


def picture(result: Result) -> Figure:
    """The losses over the learning rate, a dot for each seed; and the times."""
    figure = Figure(figsize=(7, 2.6))
    axes, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    axes.plot(result.rates, np.median(result.held_out, axis=1), alpha=0.5, label="median")
    for k, losses in enumerate(result.held_out.T):
        axes.plot(result.rates, losses, "o", color="C0", label=None if k else "a model")
    axes.axhline(math.log(10), color="0.5", ls="--", lw=0.8, label="chance")
    axes.set(xscale="log", xlabel="learning rate", ylabel="cross-entropy, held-out digits", ylim=(0, None))
    axes.legend()

    runs = [times.run for times in result.times.values()]
    drawn = bars.barh(list(result.times), runs, color=["0.7", "0.7", "C0"], height=0.6)
    bars.bar_label(drawn, [f"{run:.2g} s" for run in runs], padding=3)
    bars.invert_yaxis()
    bars.margins(x=0.2)
    bars.set(
        xlabel="seconds to train all models", title=f"{result.held_out.size} models: {result.ratio():.0f} x as fast"
    )
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 models and few steps, for a first look")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=3.0, help="wanted ratio of run times (default: %(default)s)")
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
    for name, times in result.times.items():
        table.add_row(name, *(f"{value:.2f}" for value in times))
    Console().print(table)
    with rc_context(STYLE):
        picture(result).savefig(args.out)
    if args.quick:
        print(f"too small to win, and not judged; picture in {args.out}")
        return 0
    print(
        f"the losses are equal; the sweep is {result.ratio():.1f} times as fast as a call for each step, "
        f"wanted at least {args.margin}; picture in {args.out}"
    )
    return 0 if result.ratio() >= args.margin else 1


if __name__ == "__main__":
    sys.exit(main())
