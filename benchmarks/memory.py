"""How much memory does a training step take, by the number of steps of the sequence, with and without `remat_every`?

    python benchmarks/memory.py
    python benchmarks/memory.py --steps 1024 8192 --contestants native native-remat torch

One layer, the sum of the squares of its outputs, and the gradient of all weights; `-remat` is `remat_every` = √T. Every
measurement is a process of its own. There the step is compiled, a short sequence is run by torch, what the compiler has
freed is given back, and the kernel's record of the highest resident memory begins anew: shown is how far the step takes
it above what was resident before. The second table is what XLA's `memory_analysis` says of the compiled step: the bytes
of arguments, results and temporary arrays, without what custom calls take for themselves. The losses of all must be
equal. Memory does not vary as time does, so one repeat is the default.
"""

from __future__ import annotations

import ctypes
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import contest, peers
from helpers.contest import Table

MIB = 2**20


def resident(field: str) -> int:
    """Bytes: of this process now ("VmRSS"), or the most since `start_anew` ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def start_anew() -> int:
    """The bytes that are resident, after the heap gave back what is free; the highest is counted from here."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def in_jax(who: str, task: peers.Task) -> dict[str, Any]:
    """The loss, the bytes that the step added, and those that XLA names."""
    name, *remat = who.split("-")
    every = max(1, round(math.sqrt(len(task.xs)))) if remat else None
    build = peers.ours(name, every) if name in ("native", "xla") else peers.NETWORKS[name]
    network = build(task.cell, task.params)
    assert network is not None
    xs = network.lay(task.xs)
    step = jax.jit(jax.value_and_grad(lambda weights, xs: jnp.square(network.outputs(weights, xs)).sum()))
    compiled = step.lower(network.weights, xs).compile()
    sizes = compiled.memory_analysis()
    named = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    before = start_anew()
    loss, _ = jax.block_until_ready(compiled(network.weights, xs))
    return {"bytes": resident("VmHWM") - before, "loss": float(loss), "named": named}


def in_torch(task: peers.Task, threads: int) -> dict[str, Any]:
    import torch

    module, outputs = peers.torch_network(task.cell, task.params, threads)
    xs = torch.from_numpy(task.xs)

    def step(xs):
        module.zero_grad(set_to_none=True)
        loss = outputs(xs).square().sum()
        loss.backward()
        return loss.item()

    step(xs[:8])
    module.zero_grad(set_to_none=True)
    before = start_anew()
    loss = step(xs)
    return {"bytes": resident("VmHWM") - before, "loss": loss, "named": None}


def measure(who: str, shape: peers.Shape, args: Any) -> dict[str, Any]:
    """In a process of its own."""
    command = [sys.executable, __file__, "--measure", who, args.cell, str(shape), str(args.threads)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{who} at {shape}: {result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def measure_here(who: str, cell: str, shape: str, threads: str) -> int:
    jax.config.update("jax_platforms", "cpu")
    task = peers.task(cell, peers.Shape.read(shape))
    reason = contest.absent(who)
    assert reason is None, reason
    print(json.dumps(in_torch(task, int(threads)) if who == "torch" else in_jax(who, task)))
    return 0


CONTESTANTS = ("native", "native-remat", "xla", "xla-remat", "torch", "keras", "flax")


def main(argv: list[str] | None = None) -> int:
    parser = contest.parser(__file__, __doc__, CONTESTANTS)
    parser.set_defaults(repeats=1)
    parser.add_argument("--cell", choices=peers.CELLS, default="lstm")
    parser.add_argument("--steps", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096], metavar="T")
    for flag, letter, size in (("--rows", "B", 16), ("--inputs", "D", 64), ("--units", "H", 128)):
        parser.add_argument(flag, type=int, default=size, metavar=letter, help=f"(default: {size})")
    args = contest.parse(parser, argv)
    names, rows = args.contestants, []
    table = Table("T, MiB that the step takes", *names)
    for steps in args.steps:
        shape = peers.Shape(args.rows, steps, args.inputs, args.units)
        repeats = [{who: measure(who, shape, args) for who in names} for _ in range(args.repeats)]
        losses = np.array([[each[who]["loss"] for who in names] for each in repeats])
        np.testing.assert_allclose(losses, losses[0, 0], 1e-3, err_msg=f"the losses of {names} at {steps} steps")
        taken = {who: statistics.median(each[who]["bytes"] for each in repeats) for who in names}
        rows.append({"shape": shape, "bytes": taken, "named": {who: repeats[0][who]["named"] for who in names}})
        table.add(steps, *(value / MIB for value in taken.values()))
    in_xla = [who for who in names if who != "torch"]
    named = Table("T, MiB that XLA names", *in_xla)
    for row in rows:
        named.add(row["shape"].steps, *(row["named"][who] / MIB for who in in_xla))

    def draw(figure):
        axes = figure.subplots()
        for who in names:
            axes.plot(args.steps, [row["bytes"][who] / MIB for row in rows], "o-", label=who)
        title = f"memory of a training step, {args.cell}, B, D, H = {args.rows}, {args.inputs}, {args.units}"
        axes.set(xlabel="T", ylabel="MiB", title=title, yscale="log")
        axes.set_xscale("log", base=2)
        contest.plain_ticks(axes)
        axes.legend()

    contest.write(args, [table, named], {"cell": args.cell, "rows": rows}, draw)
    return 0


if __name__ == "__main__":
    sys.exit(measure_here(*sys.argv[2:]) if sys.argv[1:2] == ["--measure"] else main())
