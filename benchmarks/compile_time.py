"""How long does it take before the first step: to import the package, to trace a training step and to compile it?

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --cells lstm --shape 32,128,64,128 --repeats 9

The step is one layer, the sum of the squares of its outputs, the gradient of all weights, and their update by gradient
descent. Every repeat traces and compiles a new function, after `jax.clear_caches()`; a first one that is not counted
imports what a framework imports late, and its loss must be that of the others. Imports are measured in processes of
their own, of `jax` and of `jaxrnn`, which imports jax too.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import contest, peers
from helpers.contest import Table

IMPORT = "import time; begin = time.perf_counter(); import {}; print(time.perf_counter() - begin)"


def import_time(package: str) -> float:
    """Seconds."""
    command = [sys.executable, "-c", IMPORT.format(package)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def compile_step(network: peers.Network, xs: Any) -> tuple[float, float, Any]:
    """Seconds to trace and lower, seconds to compile, and what compiled."""

    def step(weights, xs):
        loss, gradient = jax.value_and_grad(lambda w: jnp.square(network.outputs(w, xs)).sum())(weights)
        return loss, jax.tree.map(lambda w, g: w - 1e-3 * g, weights, gradient)

    jax.clear_caches()
    begin = time.perf_counter()
    lowered = jax.jit(step).lower(network.weights, xs)
    between = time.perf_counter()
    compiled = lowered.compile()
    return between - begin, time.perf_counter() - between, compiled


def measure(name: str, shape: peers.Shape, args: Any) -> dict[str, np.ndarray]:
    """Seconds of each contestant in each repeat, (repeats, 2): to trace and lower, to compile."""
    task = peers.task(name, shape)
    networks = contest.enter(peers.NETWORKS, args.contestants, task.cell, task.params)
    given = {who: network.lay(task.xs) for who, network in networks.items()}
    losses = []
    for who, network in networks.items():
        compiled = compile_step(network, given[who])[2]
        losses.append(float(compiled(network.weights, given[who])[0]))
        np.testing.assert_allclose(losses[-1], losses[0], 1e-3, err_msg=f"{who} against {next(iter(networks))}")
    found: dict[str, list] = {who: [] for who in networks}
    for _ in range(args.repeats):
        for who, network in networks.items():
            found[who].append(compile_step(network, given[who])[:2])
    return {who: np.array(each) for who, each in found.items()}


def main(argv: list[str] | None = None) -> int:
    parser = contest.parser(__file__, __doc__, peers.NETWORKS)
    parser.add_argument("--cells", nargs="+", choices=["lstm", "gru"], default=["lstm", "gru"])
    shape = peers.Shape.read("32,128,64,128")
    parser.add_argument("--shape", type=peers.Shape.read, default=shape, metavar="B,T,D,H")
    args = contest.parse(parser, argv)
    names, rows = args.contestants, []
    table = Table("cell", "who", "trace and lower, ms", "compile, ms", "together, ms", f"times {names[0]}")
    for name in args.cells:
        rounds = measure(name, args.shape, args)
        totals = {who: statistics.median(each.sum(1)) for who, each in rounds.items()}
        for who, each in rounds.items():
            trace, build = 1e3 * np.median(each, 0)
            rows.append({"cell": name, "who": who, "trace_ms": trace, "compile_ms": build, "rounds": each.tolist()})
            rows[-1]["together_ms"] = 1e3 * totals[who]
            table.add(name, who, trace, build, 1e3 * totals[who], totals[who] / totals[next(iter(rounds))])

    found = [[import_time(package) for package in ("jax", "jaxrnn")] for _ in range(args.repeats)]
    seconds = dict(zip(("jax", "jaxrnn"), np.median(found, 0).tolist(), strict=True))
    imports = Table("import", "seconds")
    for package, value in seconds.items():
        imports.add(package, value)

    def draw(figure):
        axes, below = figure.subplots(), np.zeros(len(rows))
        for part, label in (("trace_ms", "trace and lower"), ("compile_ms", "compile")):
            heights = np.array([row[part] for row in rows])
            axes.bar(range(len(rows)), heights, bottom=below, label=label)
            below += heights
        axes.set_xticks(range(len(rows)), [f"{row['who']}\n{row['cell']}" for row in rows], fontsize=8)
        axes.set(ylabel="ms", title=f"a training step of one layer, B,T,D,H = {args.shape}")
        axes.legend()

    contest.write(args, [table, imports], {"shape": args.shape, "rows": rows, "import_seconds": seconds}, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
