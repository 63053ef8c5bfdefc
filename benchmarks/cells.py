"""How long does a layer take, beside its peers: forward, and forward and backward with the gradients of all weights?

    python benchmarks/cells.py                                  # every cell, shape and peer that is installed
    python benchmarks/cells.py --layers 2 --bidirectional       # the same, of two layers in both directions
    python benchmarks/cells.py --cells lstm gru --shapes 32,128,64,128 --repeats 9

Every contestant gets the same weights, by `jaxrnn.convert`, and the same xs, each in the layout that it likes best.
They run in this process with the same number of threads, one after another, again and again; the medians count. Before
that, outputs and the sorted magnitudes of the weights' gradients must agree.

Printed are milliseconds, how many times as long as ours the fastest peer takes, the rate of a large product of matrices
(2048³, the better of torch's and JAX's, which take part in the turns) and the share of it that ours reaches, counting
2 B T (D + H) G H operations forward and three times that with gradients. Then the geometric means over the shapes with
at least 16 rows, and the smallest lead.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import contest, peers
from helpers.contest import Contestant, Table

SHAPES = ("32,128,64,128", "64,128,128,256", "16,100,256,512", "1,1000,32,64", "256,64,64,64")


def magnitudes(gradient: Any) -> np.ndarray:
    """Those of all matrices in one sorted row; frameworks differ in their shapes and in how many biases they have."""
    named = jax.tree_util.tree_leaves_with_path(gradient)
    matrices = [g for path, g in named if np.ndim(g) >= 2 and "bias" not in jax.tree_util.keystr(path)]
    return np.sort(np.concatenate([np.abs(np.asarray(g)).ravel() for g in matrices]))


def in_jax(name: str):
    def build(task: peers.Task, backward: bool, threads: int) -> Contestant | None:
        network = peers.NETWORKS[name](task.cell, task.params)
        if network is None:
            return None
        xs, factors = network.lay(task.xs), network.lay(task.factors)

        def loss(weights, xs):
            ys = network.outputs(weights, xs)
            return jnp.vdot(ys, factors), ys

        function = jax.jit(jax.value_and_grad(loss, has_aux=True) if backward else network.outputs)

        def read(result):
            if not backward:
                return network.time_first(result)
            (_, ys), gradient = result
            return network.time_first(ys), magnitudes(gradient)

        return Contestant(lambda: jax.block_until_ready(function(network.weights, xs)), read)

    return build


def torch(task: peers.Task, backward: bool, threads: int) -> Contestant:
    import torch

    module, outputs = peers.torch_network(task.cell, task.params, threads)
    xs, factors = torch.from_numpy(task.xs), torch.from_numpy(task.factors)

    def forward():
        with torch.no_grad():
            return outputs(xs)

    def both():
        module.zero_grad(set_to_none=True)
        ys = outputs(xs)
        (ys * factors).sum().backward()
        return ys

    def read(ys):
        gradient = [p.grad.numpy() for p in module.parameters()] if backward else None
        return (ys.detach().numpy(), magnitudes(gradient)) if backward else ys.numpy()

    return Contestant(both if backward else forward, read)


def onnxruntime(task: peers.Task, backward: bool, threads: int) -> Contestant | None:
    if backward:
        return None
    session = peers.onnx_session(task.cell, task.params, threads)
    return Contestant(lambda: session.run(["Y"], {"X": task.xs})[0], lambda ys: ys)


CONTESTANTS = {name: in_jax(name) for name in ("native", "xla")}
CONTESTANTS |= {"torch": torch, "onnxruntime": onnxruntime}
CONTESTANTS |= {name: in_jax(name) for name in ("keras", "flax", "haiku", "equinox")}


def compete(args: argparse.Namespace, name: str, shape: peers.Shape, backward: bool) -> dict[str, list[float]]:
    """Seconds of each contestant, and of the product of matrices, in each round, after results were found equal."""
    task = peers.task(name, shape, args.layers, args.bidirectional)
    contestants = contest.enter(CONTESTANTS, args.contestants, task, backward, args.threads)
    contest.agree(contestants)
    runs = {name: each.run for name, each in contestants.items()}
    return contest.interleaved(runs | contest.products(args.threads), args.repeats)


def means(rows: list[dict], names: list[str]) -> Table:
    """Over the shapes with at least 16 rows, how many times as long as ours each contestant takes."""
    table = Table("geometric mean, B ≥ 16", "pass", *(f"{name} / {names[0]}" for name in names[1:]), "fastest peer")
    for key in dict.fromkeys((row["cell"], row["pass"]) for row in rows if row["shape"][0] >= 16):
        found = [row for row in rows if (row["cell"], row["pass"]) == key and row["shape"][0] >= 16]

        def mean(name, found=found):
            ratios = [row["ms"][name] / row["ms"][names[0]] for row in found if name in row["ms"]]
            return statistics.geometric_mean(ratios) if ratios else None

        leads = [row["lead"] for row in found if row["lead"] is not None]
        table.add(*key, *map(mean, names[1:]), statistics.geometric_mean(leads) if leads else None)
    return table


def smallest(rows: list[dict]) -> str:
    """The row where the fastest peer comes closest, of all and of those with a batch of 1."""
    lines = []
    for which, found in (("", rows), ("with B = 1, ", [row for row in rows if row["shape"][0] == 1])):
        least = min((row for row in found if row["lead"] is not None), key=lambda row: row["lead"], default=None)
        if least is not None:
            shape = peers.Shape(*least["shape"])
            lines.append(f"The smallest lead {which}{least['lead']:.2f}: {least['cell']} {shape} {least['pass']}.")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = contest.parser(__file__, __doc__, CONTESTANTS)
    parser.add_argument("--cells", nargs="+", choices=peers.CELLS, default=list(peers.CELLS))
    shapes = list(map(peers.Shape.read, SHAPES))
    parser.add_argument("--shapes", nargs="+", type=peers.Shape.read, default=shapes, metavar="B,T,D,H")
    parser.add_argument("--passes", nargs="+", choices=["forward", "backward"], default=["forward", "backward"])
    parser.add_argument("--layers", type=int, default=1, metavar="N", help="one above another (default: 1)")
    parser.add_argument("--bidirectional", action="store_true", help="every layer in both directions")
    args = contest.parse(parser, argv)
    names, rows = args.contestants, []
    yardsticks = "product, GFLOP/s", f"{names[0]}: share of product"
    table = Table("cell, ms", "B,T,D,H", "pass", *names, f"fastest peer / {names[0]}", *yardsticks)
    for name in args.cells:
        for shape in args.shapes:
            for way in args.passes:
                backward = way == "backward"
                rounds = compete(args, name, shape, backward)
                medians = contest.medians(rounds)
                times = {name: medians[name] for name in names if name in medians}
                if names[0] not in times:
                    continue
                rate = 2 * contest.PRODUCT**3 / min(value for name, value in medians.items() if name not in names)
                work = peers.operations(name, shape, args.layers, args.bidirectional) * (3 if backward else 1)
                row = {
                    "cell": name,
                    "shape": shape,
                    "layers": args.layers,
                    "bidirectional": args.bidirectional,
                    "pass": "forward + backward" if backward else "forward",
                    "ms": {name: 1e3 * value for name, value in times.items()},
                    "lead": contest.lead(times, names[0]),
                    "product": rate,
                    "share": work / times[names[0]] / rate,
                    "rounds": rounds,
                }
                rows.append(row)
                cells = [row["ms"].get(name) for name in names]
                table.add(name, shape, row["pass"], *cells, row["lead"], f"{rate / 1e9:.0f}", f"{row['share']:.0%}")
    summary = means(rows, names), smallest(rows)
    print(f"\n{summary[1]}")

    def draw(figure):
        ways = list(dict.fromkeys(row["pass"] for row in rows))
        for axes, way in zip(figure.subplots(len(ways), squeeze=False)[:, 0], ways, strict=True):
            shown = [row for row in rows if row["pass"] == way]
            labels = [f"{row['cell']}\n{row['shape']}" for row in shown]
            heights = {name: [row["ms"].get(name, np.nan) / row["ms"][names[0]] for row in shown] for name in names}
            contest.bars(axes, labels, heights, ylabel=f"time / {names[0]}", title=way, yscale="log")

    contest.write(args, [table, *summary], {"rows": rows}, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
