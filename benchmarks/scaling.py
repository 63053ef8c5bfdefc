"""How does the time of a layer grow with T, B and H, and where does it stop being linear?

    python benchmarks/scaling.py
    python benchmarks/scaling.py --cell gru --pass forward --axes T B --base 32,128,64,128

From the base, one number at a time is doubled, and the contestants of cells.py run under its rules. Beside each time
stands the exponent between it and the one before, log₂ of how many times as long twice as much takes: 1 is linear. The
last column is the exponent of the number of operations, which in H goes from 1 to 2.
"""

from __future__ import annotations

import math
import sys

import cells
from helpers import contest, peers
from helpers.contest import Table

VALUES = {"T": [2**k for k in range(6, 14)], "B": [2**k for k in range(9)], "H": [2**k for k in range(4, 11)]}
FIELDS = {"T": "steps", "B": "rows", "H": "units"}


def exponent(values: list[int], costs: list[float | None], k: int) -> float | None:
    """Of the cost between the values k − 1 and k."""
    before, after = (costs[k - 1], costs[k]) if k else (None, None)
    if before is None or after is None:
        return None
    return math.log(after / before) / math.log(values[k] / values[k - 1])


def main(argv: list[str] | None = None) -> int:
    parser = contest.parser(__file__, __doc__, cells.CONTESTANTS)
    parser.set_defaults(contestants=["native", "xla", "torch"])
    parser.add_argument("--cell", choices=peers.CELLS, default="lstm")
    parser.add_argument("--axes", nargs="+", choices=VALUES, default=list(VALUES))
    parser.add_argument("--base", type=peers.Shape.read, default=peers.Shape(16, 128, 64, 128), metavar="B,T,D,H")
    parser.add_argument("--pass", dest="way", choices=["forward", "backward"], default="backward")
    parser.add_argument("--points", type=int, metavar="N", help="only the first N of each number")
    parser.set_defaults(layers=1, bidirectional=False)
    args = contest.parse(parser, argv)
    names, tables, rows = args.contestants, [], []
    for axis in args.axes:
        heads = [word for name in names for word in (f"{name}, ms", "exponent")]
        tables.append(Table(axis, *heads, "operations"))
        values = VALUES[axis][: args.points]
        costs: dict[str, list[float | None]] = {name: [] for name in names}
        work: list[float | None] = []
        for k, value in enumerate(values):
            shape = args.base._replace(**{FIELDS[axis]: value})
            rounds = cells.compete(args, args.cell, shape, args.way == "backward")
            times = contest.medians(rounds)
            work.append(peers.operations(args.cell, shape))
            row = []
            for name in names:
                costs[name].append(times.get(name))
                ms = 1e3 * times[name] if name in times else None
                row += [ms, exponent(values, costs[name], k)]
            tables[-1].add(value, *row, exponent(values, work, k))
            rows.append({"axis": axis, "shape": shape, "seconds": times, "rounds": rounds})

    def draw(figure):
        for axes, axis in zip(figure.subplots(1, len(args.axes), squeeze=False)[0], args.axes, strict=True):
            shown = [row for row in rows if row["axis"] == axis]
            values = [getattr(row["shape"], FIELDS[axis]) for row in shown]
            for name in names:
                axes.plot(values, [1e3 * row["seconds"].get(name, math.nan) for row in shown], "o-", label=name)
            first = 1e3 * shown[0]["seconds"].get(names[0], math.nan)
            axes.plot(values, [first * value / values[0] for value in values], ":", color="gray", label="linear")
            axes.set(yscale="log", xlabel=axis, ylabel="ms")
            axes.set_xscale("log", base=2)
            contest.plain_ticks(axes)
            axes.legend()
        way = "forward + backward" if args.way == "backward" else "forward"
        figure.suptitle(f"{args.cell}, {way}; else B,T,D,H = {args.base}")

    contest.write(args, tables, {"cell": args.cell, "pass": args.way, "base": args.base, "rows": rows}, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
