"""What does an option cost? A training step of a cell with an option, beside that of the plain cell: forward and
backward with the gradients of all weights.

    python benchmarks/options.py                                     # every option and shape
    python benchmarks/options.py --options norm zoneout --repeats 15 --contestants native

All run in this process, one after another, again and again; the medians count. Before that, the kernel and XLA's loop
must agree. Printed are milliseconds, how many times as long as the plain cell, of the same implementation, the option
takes, and the geometric means of that over the shapes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import contest
from helpers.contest import Contestant, Table
from helpers.peers import Shape

import jaxrnn
from jaxrnn import GRU, LSTM, MGU, SLSTM, Elman, IndRNN, RecurrentDropout, Zoneout

SHAPES = ("32,128,64,128", "64,128,128,256", "16,100,256,512", "256,64,64,64")

# An option, the plain cell, and the cell with it, each of inputs D and units H.
OPTIONS: dict[str, tuple[str, Callable[[int, int], Any]]] = {
    "peephole": ("lstm", lambda d, h: LSTM(d, h, peephole=True)),
    "coupled": ("lstm", lambda d, h: LSTM(d, h, coupled=True)),
    "clips": ("lstm", lambda d, h: LSTM(d, h, cell_clip=3.0, gate_clip=3.0)),
    "activations": (
        "lstm",
        lambda d, h: LSTM(
            d, h, gate_activation=("scaled_tanh", 0.5, 0.5), activation="softsign", output_activation="gelu"
        ),
    ),
    "dropout": ("lstm", lambda d, h: RecurrentDropout(LSTM(d, h), 0.2)),
    "zoneout": ("lstm", lambda d, h: Zoneout(LSTM(d, h), 0.1)),
    "projection": ("lstm", lambda d, h: LSTM(d, h, projection_size=h // 2)),
    "layer_norm": ("lstm", lambda d, h: LSTM(d, h, layer_norm=True)),
    "SLSTM": ("lstm", lambda d, h: SLSTM(d, h, heads=4)),
    "GRU layer_norm": ("gru", lambda d, h: GRU(d, h, layer_norm=True)),
    "GRU activation": ("gru", lambda d, h: GRU(d, h, activation="softsign")),
    "GRU before, layer_norm": ("gru before", lambda d, h: GRU(d, h, reset_after=False, layer_norm=True)),
    "MGU": ("gru", MGU),
    "Elman elu": ("elman", lambda d, h: Elman(d, h, "elu")),
    "IndRNN": ("elman", IndRNN),
}
PLAIN = {"lstm": LSTM, "gru": GRU, "gru before": lambda d, h: GRU(d, h, reset_after=False), "elman": Elman}


def step(cell, shape: Shape, implementation: str) -> Contestant:
    """A training step, with the noise that the cell draws."""
    rng = np.random.default_rng(0)
    params = cell.init(jax.random.key(0))
    xs = jnp.asarray(rng.normal(size=(shape.steps, shape.rows, shape.inputs)), jnp.float32)
    factors = jnp.asarray(rng.normal(size=(*xs.shape[:2], cell.output_size)), jnp.float32)
    named = {"gated_scan": implementation}

    @jax.jit
    def run(params, xs, key):
        def loss(params):
            ys = jaxrnn.scan(cell, params, None, xs, key=key, implementation=named)[1]
            return jnp.vdot(ys, factors)

        return jax.value_and_grad(loss)(params)

    key = jax.random.key(1)
    return Contestant(lambda: jax.block_until_ready(run(params, xs, key)), lambda found: found)


def main(argv: list[str] | None = None) -> int:
    parser = contest.parser(__file__, __doc__, ["native", "xla"])
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    shapes = list(map(Shape.read, SHAPES))
    parser.add_argument("--shapes", nargs="+", type=Shape.read, default=shapes, metavar="B,T,D,H")
    args: argparse.Namespace = contest.parse(parser, argv)
    names, rows = args.contestants, []
    columns = [f"{name}{part}" for name in names for part in (", ms", " / plain")]
    table = Table("option", "B,T,D,H", *columns)
    for shape in args.shapes:
        size = shape.inputs, shape.units
        runs = {}
        for option in dict.fromkeys([*(OPTIONS[option][0] for option in args.options), *args.options]):
            cell = (PLAIN[option] if option in PLAIN else OPTIONS[option][1])(*size)
            contestants = {name: step(cell, shape, name) for name in names}
            contest.agree(contestants, tolerance=1e-2)  # a norm makes much of rounding over many steps
            runs |= {(option, name): each.run for name, each in contestants.items()}
        medians = contest.medians(contest.interleaved(runs, args.repeats))
        for option in args.options:
            times = {name: medians[option, name] for name in names}
            ratios = {name: times[name] / medians[OPTIONS[option][0], name] for name in names}
            rows.append(
                {"option": option, "shape": shape, "ms": {n: 1e3 * t for n, t in times.items()}, "ratios": ratios}
            )
            table.add(option, shape, *(value for n in names for value in (1e3 * times[n], ratios[n])))
    means = Table("geometric mean over the shapes", *(f"{name} / plain" for name in names))
    for option in args.options:
        found = [row["ratios"] for row in rows if row["option"] == option]
        means.add(option, *(statistics.geometric_mean(each[name] for each in found) for name in names))

    def draw(figure):
        axes = figure.subplots()
        heights = {
            name: [
                statistics.geometric_mean(r["ratios"][name] for r in rows if r["option"] == option)
                for option in args.options
            ]
            for name in names
        }
        contest.bars(axes, args.options, heights, ylabel="time / plain cell", title="a training step", yscale="log")

    contest.write(args, [table, means], {"rows": rows}, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
