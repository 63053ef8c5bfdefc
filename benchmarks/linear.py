"""How fast is a linear recurrence, beside a loop, an associative scan, and the least that memory allows? And how fast
do the cells with one train, beside a GRU?

    python benchmarks/linear.py
    python benchmarks/linear.py --shapes 1024,2048 --dtypes float32 complex64 --repeats 9
    python benchmarks/linear.py --shapes --steps 1024 --cells GRU MinGRU LRU   # the second table alone
    python benchmarks/linear.py --shapes --rows 16 --size 512 --steps 1024     # of larger cells

`jaxrnn.linear_scan` in every implementation; `lax.scan` and `lax.associative_scan` as one would write them; and, as the
floor, `a * b + 1` for the forward pass and an elementwise function of three arrays to two for the backward pass, which
move as many numbers. A shape is T,R: steps and columns. The backward pass is measured by itself: the vector-Jacobian
product for a and b, of which the forward pass is not a part.

Printed are milliseconds, and how many times as long as the floor ours takes. Then, for every cell and number of steps
T, the milliseconds of the gradient of all its params, and how many times as long a GRU takes: 4 rows, 64 inputs, 64
units, or as many as asked for (S4D: 16 pairs of states for each input, S6: 16 states).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import contest
from helpers.contest import Contestant, Table
from jax import lax

import jaxrnn

SHAPES = ("1024,2048", "65536,32", "1024,16384", "16384,1024")


def ours(name: str):
    return functools.partial(jaxrnn.linear_scan, implementation=name)


def loop(a, b, h):
    def body(h, inputs):
        a, b = inputs
        h = a * h + b
        return h, h

    return lax.scan(body, h, (a, b))


def associative(a, b, h):
    def combine(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    hs = lax.associative_scan(combine, (a, b.at[0].add(a[0] * h)))[1]
    return hs[-1], hs


RUNS = {name: ours(name) for name in ("native", "xla", "associative", "chunked")}
RUNS |= {"lax.scan": loop, "lax.associative_scan": associative}
CONTESTANTS = (*RUNS, "floor")


def build(name: str, a: Any, b: Any, h: Any, backward: bool) -> Contestant | None:
    if name == "native" and a.dtype != jnp.float32:
        return None
    if name == "floor" and not backward:
        forward = jax.jit(lambda a, b: a * b + 1)
        return Contestant(lambda: jax.block_until_ready(forward(a, b)), None)
    if name == "floor":
        three = jax.jit(lambda a, b, c: (a * b + c, b * c - a))
        c = a + b
        return Contestant(lambda: jax.block_until_ready(three(a, b, c)), None)
    run = RUNS[name]
    if not backward:
        function = jax.jit(lambda a, b, h: run(a, b, h)[1])
        return Contestant(lambda: jax.block_until_ready(function(a, b, h)), np.asarray)
    _, pull = jax.vjp(lambda a, b: run(a, b, h)[1], a, b)
    pull = jax.jit(pull)
    return Contestant(lambda: jax.block_until_ready(pull(b)), lambda found: [np.asarray(each) for each in found])


CELLS: dict[str, Callable[[int], jaxrnn.Cell]] = {
    "GRU": lambda size: jaxrnn.GRU(size, size),
    "LSTM": lambda size: jaxrnn.LSTM(size, size),
    "MinGRU": lambda size: jaxrnn.MinGRU(size, size),
    "MinLSTM": lambda size: jaxrnn.MinLSTM(size, size),
    "MinGRU in logs": lambda size: jaxrnn.MinGRU(size, size, log_space=True),
    "MinLSTM in logs": lambda size: jaxrnn.MinLSTM(size, size, log_space=True),
    "SRU": lambda size: jaxrnn.SRU(size, size),
    "QRNN": lambda size: jaxrnn.QRNN(size, size),
    "HGRN": lambda size: jaxrnn.HGRN(size, size),
    "RGLRU": lambda size: jaxrnn.RGLRU(size),
    "LRU": lambda size: jaxrnn.LRU(size, size),
    "S5": lambda size: jaxrnn.S5(size, size),
    "S4D": lambda size: jaxrnn.S4D(size, 16),
    "S6": lambda size: jaxrnn.S6(size, 16),
}


def training(name: str, steps: int, rows: int, size: int, dtype: str = "float32"):
    """The gradient of all params, as a function to be timed."""
    cell = CELLS[name](size)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), cell.init(jax.random.key(0)))
    xs = jax.random.normal(jax.random.key(1), (steps, rows, size), dtype)

    @jax.jit
    def gradient(params, xs):
        def loss(params):
            return jnp.mean(jaxrnn.scan(cell, params, None, xs)[1].astype(jnp.float32) ** 2)

        return jax.grad(loss)(params)

    return lambda: jax.block_until_ready(gradient(params, xs))


class Panel(NamedTuple):
    """What was measured, as it is shown."""

    table: Table
    rows: list[dict[str, Any]]
    draw: Callable[[Any], None]  # into axes


def operations(args: Any) -> Panel:
    names, rows = args.contestants, []
    table = Table("T,R", "dtype", "pass", *names, f"{names[0]} / floor")
    for shape in args.shapes:
        steps, columns = map(int, shape.split(","))
        for dtype in args.dtypes:
            rng = np.random.default_rng(0)
            modulus = rng.uniform(0.5, 1, (steps, columns))
            phase = np.exp(1j * rng.uniform(0, 6, (steps, columns))) if dtype == "complex64" else 1
            a, b = (jnp.asarray(x.astype(dtype)) for x in (modulus * phase, rng.normal(size=(steps, columns))))
            h = jnp.zeros(columns, dtype)
            for backward in (False, True):
                found = {name: build(name, a, b, h, backward) for name in names}
                contestants = {name: each for name, each in found.items() if each is not None}
                contest.agree(contestants)
                rounds = contest.interleaved({name: each.run for name, each in contestants.items()}, args.repeats)
                times = contest.medians(rounds)
                kind = "backward" if backward else "forward"
                ratio = times[names[0]] / times["floor"] if {names[0], "floor"} <= times.keys() else None
                rows.append(
                    {"shape": shape, "dtype": dtype, "pass": kind, "ms": {k: 1e3 * v for k, v in times.items()}}
                )
                table.add(shape, dtype, kind, *(rows[-1]["ms"].get(name) for name in names), ratio)

    def draw(axes: Any) -> None:
        heights = {name: [row["ms"].get(name, 0) for row in rows] for name in names}
        labels = [f"{row['shape']}\n{row['dtype']}\n{row['pass']}" for row in rows]
        contest.bars(axes, labels, heights, ylabel="ms", yscale="log", title="linear_scan")

    return Panel(table, rows, draw)


def cells_beside_a_gru(args: Any) -> Panel:
    table, rows = Table("T", *args.cells), []
    for steps in args.steps:
        runs = {name: training(name, steps, args.rows, args.size, args.cell_dtype) for name in args.cells}
        times = contest.medians(contest.interleaved(runs, args.repeats))
        rows.append({"steps": steps, "ms": {name: 1e3 * value for name, value in times.items()}})
        table.add(steps, *rows[-1]["ms"].values())
        if "GRU" in times:
            table.add("GRU / cell", *(times["GRU"] / value for value in times.values()))

    def draw(axes: Any) -> None:
        for k, name in enumerate(args.cells):
            style = "o-" if k < 10 else "s--"  # colours begin again
            axes.plot(args.steps, [row["ms"][name] for row in rows], style, color=f"C{k}", label=name)
        axes.set(yscale="log", xlabel="T", ylabel="ms", title="gradient of all params of a cell")
        axes.set_xscale("log", base=2)
        contest.plain_ticks(axes)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)

    return Panel(table, rows, draw)


def main(argv: list[str] | None = None) -> int:
    parser = contest.parser(__file__, __doc__, CONTESTANTS)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), metavar="T,R", help="none: no operations")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "complex64"])
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=list(CELLS), help="none: no cells")
    parser.add_argument("--rows", type=int, default=4, help="of the cells")
    parser.add_argument("--cell-dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--size", type=int, default=64, help="inputs and units of the cells")
    parser.add_argument("--steps", nargs="*", type=int, default=[256, 1024, 4096, 16384], metavar="T")
    args = contest.parse(parser, argv)
    if not (args.shapes or args.cells):
        parser.error("neither --shapes nor --cells: nothing is left to measure")
    panels: dict[str, Panel] = {}
    if args.shapes:
        panels["rows"] = operations(args)
    if args.cells:
        panels["cells"] = cells_beside_a_gru(args)

    def draw(figure: Any) -> None:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.values(), strict=True):
            panel.draw(axes)

    data = {name: panel.rows for name, panel in panels.items()}
    contest.write(args, [panel.table for panel in panels.values()], data, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
