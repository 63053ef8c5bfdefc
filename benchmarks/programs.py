"""What do the programs of accelerators do that are not here? Their compilers say.

    JAX_PLATFORMS=cpu python benchmarks/programs.py --targets h100 "4 h100" v5e
    JAX_PLATFORMS=cpu python benchmarks/programs.py --targets h100 --cells LSTM GRU --implementations None xla

The forward pass and a training step (the sum of squares of all outputs, and the gradient of all weights) of one layer,
compiled for an H100 (which needs jax-cuda12-plugin, jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12) or a TPU v5e (libtpu),
alone or for four of them that divide the rows, the columns of weights, or both. Counted are loops; the device's kernels
in the bodies of all loops, which it launches at every step; all kernels of all steps; collectives outside loops, and
inside; the bytes of temporary arrays, where the compiler names them; and the bytes that all kernels of all steps read
and write in a device's main memory, without arrays that a TPU's compiler keeps in a core's own. No time is measured.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
from helpers import contest
from helpers.compiled import collectives, inside_loops, kernels_in_loops, work
from helpers.contest import Table
from helpers.targets import TARGETS, absent, compiled

import jaxrnn

CELLS = {
    "LSTM": lambda d, h: jaxrnn.LSTM(d, h),
    "LSTM peephole": lambda d, h: jaxrnn.LSTM(d, h, peephole=True),
    "GRU": lambda d, h: jaxrnn.GRU(d, h),
    "GRU before": lambda d, h: jaxrnn.GRU(d, h, reset_after=False),
    "Elman": lambda d, h: jaxrnn.Elman(d, h),
    "MGU": lambda d, h: jaxrnn.MGU(d, h),
    "SLSTM": lambda d, h: jaxrnn.SLSTM(d, h, heads=4),
    "MinGRU": lambda d, h: jaxrnn.MinGRU(d, h),
    "MinLSTM": lambda d, h: jaxrnn.MinLSTM(d, h),
    "SRU": lambda d, h: jaxrnn.SRU(d, h),
    "QRNN": lambda d, h: jaxrnn.QRNN(d, h),
    "HGRN": lambda d, h: jaxrnn.HGRN(d, h),
    "RGLRU": lambda d, h: jaxrnn.RGLRU(d),
    "LRU": lambda d, h: jaxrnn.LRU(d, h),
    "S5": lambda d, h: jaxrnn.S5(d, h),
    "S6": lambda d, h: jaxrnn.S6(d, 16),
    "S4D": lambda d, h: jaxrnn.S4D(d, 16),
    "GatedDeltaNet": lambda d, h: jaxrnn.GatedDeltaNet(d, 2, h // 2, h // 2),
}
PASSES = ("forward", "training")


def program(cell: Any, part: str, implementation: str | None) -> Any:
    """A function of params and xs."""

    def outputs(params, xs):
        return jaxrnn.scan(cell, params, None, xs, implementation=implementation)[1]

    return outputs if part == "forward" else jax.grad(lambda params, xs: jnp.square(outputs(params, xs)).sum())


def figures(made: Any) -> dict[str, Any]:
    """What is counted of a compiled program."""
    text = made.as_text()
    inside = collectives(inside_loops(text))
    outside = {name: count - inside[name] for name, count in collectives(text).items()}
    loops = kernels_in_loops(text)
    memory = made.memory_analysis()
    instructions, moved = work(text)
    return {
        "loops": len(loops),
        "kernels": sum(loops),
        "outside": {name: count for name, count in outside.items() if count},
        "inside": {name: count for name, count in inside.items() if count},
        "temporary": getattr(memory, "temp_size_in_bytes", 0),
        "run": instructions,
        "moved": moved,
    }


def said(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def main(argv: list[str] | None = None) -> int:
    parser = contest.parser(__file__, __doc__, PASSES)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=["h100", "v5e"])
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--implementations", nargs="+", default=["None"], metavar="NAME", help="(default: None)")
    parser.add_argument("--shape", default="128,32,128,128", metavar="T,B,D,H", help="(default: 128,32,128,128)")
    parser.add_argument("--divided", choices=["rows", "columns", "both"], default="rows", help="(default: rows)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = contest.parse(parser, argv)
    steps, rows, inputs, units = map(int, args.shape.split(","))
    reasons = {name: absent(name) for name in args.targets}
    print(*filter(None, reasons.values()), sep="\n")
    targets = [name for name, why in reasons.items() if why is None]
    columns = (
        "loops",
        "kernels in loops",
        "kernels run",
        "collectives",
        "collectives in loops",
        "temporary, MB",
        "moved, MB",
    )
    table, found = Table("target", "cell", "implementation", "pass", *columns), []
    for target in targets:
        for name in args.cells:
            cell = CELLS[name](inputs, units)
            params = jax.eval_shape(lambda key, cell=cell: cell.init(key, jnp.dtype(args.dtype)), jax.random.key(0))
            xs = jax.ShapeDtypeStruct((steps, rows, inputs), args.dtype)
            for implementation in args.implementations:
                for part in args.contestants:
                    function = program(cell, part, None if implementation == "None" else implementation)
                    placed = xs, None if args.divided == "columns" else 1
                    each = figures(compiled(target, function, params, placed, columns=args.divided != "rows"))
                    found.append(
                        {"target": target, "cell": name, "implementation": implementation, "pass": part, **each}
                    )
                    table.add(
                        *(target, name, implementation, part, each["loops"], each["kernels"], each["run"]),
                        *(said(each["outside"]), said(each["inside"]), each["temporary"] / 1e6, each["moved"] / 1e6),
                    )

    def draw(figure):
        axes = figure.subplots()
        heights = {target: [row["kernels"] for row in found if row["target"] == target] for target in targets}
        labels = [f"{row['cell']} {row['pass']}" for row in found if row["target"] in targets[:1]]
        if found:
            contest.bars(axes, labels, heights, ylabel="kernels in loops")

    contest.write(args, [table], {"rows": found}, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
