"""What does a step of training cost in another dtype?

    python benchmarks/dtypes.py
    python benchmarks/dtypes.py --cells GRU Mamba2 --shape 32,128,64,128 --repeats 9

The gradients of params and xs of one layer in float32, bfloat16 and float64, by whatever runs it, and in float64 by
JAX's own loop. Cells with a matrix as state have 4 heads, and a quarter of the units as keys and as values of each.

Printed are milliseconds, and times as long as in float32; for the loop, as the other program of float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from helpers import contest
from helpers.contest import Table

import jaxrnn

MATRIX = ("GLA", "Mamba2", "GatedDeltaNet", "KDA", "RWKV7")
OWN_SIZE = {"RGLRU": 0, "S6": 1, "S4D": 1}  # and how many further sizes
UNITS = ("Elman", "LSTM", "GRU", "MGU", "IndRNN", "SLSTM", "MinGRU", "MinLSTM", "HGRN", "SRU", "QRNN", "LRU", "S5")
CELLS = *UNITS, *OWN_SIZE, *MATRIX
RUNS = {"float32": None, "bfloat16": None, "float64": None, "float64-xla": "xla"}


def make(name: str, inputs: int, units: int) -> Any:
    kind = getattr(jaxrnn, name)
    if name in MATRIX:
        return kind(inputs, 4, units // 4, units // 4)
    return kind(inputs, *[16] * OWN_SIZE[name]) if name in OWN_SIZE else kind(inputs, units)


def training(cell: Any, shape: tuple[int, int, int], run: str) -> Callable[[], Any]:
    """Compiled gradients of params and xs."""
    dtype, implementation = jnp.dtype(run.split("-")[0]), RUNS[run]
    params, xs = cell.init(jax.random.key(0), dtype), jax.random.normal(jax.random.key(1), shape, dtype)

    def loss(params, xs):
        ys = jaxrnn.scan(cell, params, None, xs, implementation=implementation)[1]
        return jnp.sum(ys.astype(jnp.promote_types(dtype, jnp.float32)) ** 2)

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    return lambda: jax.block_until_ready(gradient(params, xs))


def main(argv: list[str] | None = None) -> int:
    parser = contest.parser(__file__, __doc__, RUNS)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--shape", default="32,256,64,128", metavar="B,T,D,H")
    args = contest.parse(parser, argv)
    rows, steps, inputs, units = map(int, args.shape.split(","))
    pairs = [("bfloat16", "float32"), ("float64", "float32"), ("float64-xla", "float64")]
    pairs = [pair for pair in pairs if set(pair) <= set(args.contestants)]
    found, table = [], Table("cell, ms", *args.contestants, *(f"{one} / {other}" for one, other in pairs))
    with jax.enable_x64(True):
        for name in args.cells:
            cell = make(name, inputs, units)
            runs = {run: training(cell, (steps, rows, inputs), run) for run in args.contestants}
            times = contest.medians(contest.interleaved(runs, args.repeats))
            found.append({"cell": name, "ms": {run: 1e3 * value for run, value in times.items()}})
            ratios = [times[one] / times[other] for one, other in pairs]
            table.add(name, *found[-1]["ms"].values(), *ratios)

    def draw(figure):
        heights = {run: [row["ms"][run] for row in found] for run in args.contestants}
        labels = [row["cell"] for row in found]
        contest.bars(figure.subplots(), labels, heights, ylabel="ms", yscale="log", title=f"B,T,D,H = {args.shape}")

    contest.write(args, [table], {"shape": args.shape, "rows": found}, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
