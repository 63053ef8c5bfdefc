"""How fast is a recurrence whose state is a matrix, by the kernel, step by step, and in chunks?

    python benchmarks/matrix.py
    python benchmarks/matrix.py --shapes 1,2048,8,64,64 --kinds "gated delta" --repeats 9

`jaxrnn.matrix_scan` in every implementation; and, for the kinds that they have, the chunked forms of transformers and
of mlstm_kernels, and the operator of onnxruntime, which has no gradients. A shape is B,T,heads,K,V. Kinds: "gated
delta" (one decay for a head, the delta rule, as in Qwen3-Next), "row delta" (a decay for each row of the state, as in
Kimi Linear), "delta" (no decay), "decay" (one decay for a head and no delta rule, as in Mamba-2 and RetNet), "row
decay" (as in GLA).

Printed are milliseconds, forward and with the gradients of all arrays; how many times as long the best of the others
takes; and the rate of the first contestant beside that of the product of two matrices (2048³), counting 6 B T heads K V
operations forward, 4 where there is no delta rule, and three times that with gradients.

Then, of the first kind and shape: the temporary memory of a compiled step of training at 8,192 and at 16,384 steps, as
XLA's `memory_analysis` says it; and the time of one step forward, T = 1, beside a call that returns v.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import contest, recurrences
from helpers.contest import Contestant, Table

import jaxrnn

SHAPES = ("1,2048,8,64,64", "8,512,4,64,64", "4,1024,4,64,64")
SHAPES += ("1,2048,8,128,128", "8,512,4,128,128", "4,1024,4,128,128")
KINDS = {
    "gated delta": ("head", True),
    "row delta": ("row", True),
    "delta": (None, True),
    "decay": ("head", False),
    "row decay": ("row", False),
}
OURS = ("native", "xla", "chunked")
LONG = 16_384  # steps of a sequence whose memory is shown
MIB = 2**20


def draw(shape: str, kind: str) -> dict[str, jax.Array]:
    """Unit queries and keys; decays from nearly 1 to exp(−4)."""
    rows, steps, heads, keys, values = map(int, shape.split(","))
    decay, delta = KINDS[kind]
    rng = np.random.default_rng(0)
    axes = steps, rows, heads

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    given = {"q": unit(rng.normal(size=(*axes, keys))), "k": unit(rng.normal(size=(*axes, keys)))}
    given["v"] = rng.normal(size=(*axes, values))
    if decay:
        given["log_decay"] = -np.exp(rng.uniform(-6, 1.4, (*axes, *((keys,) if decay == "row" else ()))))
    if delta:
        given["beta"] = rng.uniform(0, 1, axes)
    return {name: jnp.asarray(each, jnp.float32) for name, each in given.items()}


def program(name: str, backward: bool) -> Callable[..., Any]:
    """Of the arrays and weights like v: the outputs, or their sum by the weights and its gradient."""
    run = functools.partial(jaxrnn.matrix_scan, implementation=name)
    if not backward:
        return jax.jit(lambda given, weights: run(**given)[1])
    return jax.jit(jax.value_and_grad(lambda given, weights: jnp.vdot(run(**given)[1], weights)))


def build(name: str, given: dict[str, jax.Array], backward: bool) -> Contestant:
    function = program(name, backward)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=given["v"].shape), jnp.float32)
    return Contestant(lambda: jax.block_until_ready(function(given, weights)), jax.tree.leaves)


def ours(args: argparse.Namespace) -> list[str]:
    return [name for name in args.contestants if name in OURS]


def with_steps(shape: str, steps: int) -> str:
    rows, _, *rest = shape.split(",")
    return ",".join([rows, str(steps), *rest])


def memory(args: argparse.Namespace) -> tuple[Table, dict[str, list[float]]]:
    """MiB of a step of training, which grow with T and no faster."""
    kind, shape = args.kinds[0], args.shapes[0]
    table = Table("MiB of a step of training", "kind", "B,T,heads,K,V", f"T = {LONG // 2}", f"T = {LONG}")
    found = {}
    for name in ours(args):
        found[name] = []
        for steps in (LONG // 2, LONG):
            given = jax.eval_shape(lambda n=steps: draw(with_steps(shape, n), kind))
            compiled = program(name, True).lower(given, given["v"]).compile()
            found[name].append(compiled.memory_analysis().temp_size_in_bytes / MIB)
        table.add(name, kind, shape, *found[name])
    return table, found


def one_step(args: argparse.Namespace) -> tuple[Table, dict[str, float]]:
    """µs of a call of one step, and of one that does nothing with the same arrays."""
    kind, shape = args.kinds[0], with_steps(args.shapes[0], 1)
    given = draw(shape, kind)
    empty = jax.jit(lambda given: given["v"])
    runs = {name: build(name, given, False).run for name in ours(args)}
    runs["empty"] = lambda: jax.block_until_ready(empty(given))
    times = {name: 1e6 * each for name, each in contest.medians(contest.interleaved(runs, args.repeats)).items()}
    table = Table("µs of one step", "B,T,heads,K,V", *times)
    table.add(kind, shape, *times.values())
    return table, times


def main(argv: list[str] | None = None) -> int:
    parser = contest.parser(__file__, __doc__, (*OURS, *recurrences.CONTESTANTS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="B,T,H,K,V")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    args = contest.parse(parser, argv)
    names, rows = args.contestants, []
    peers = [name for name in names if name not in OURS]
    table = Table("kind", "B,T,heads,K,V", "pass", *names, f"best other / {names[0]}", "of a product's rate")
    for kind in args.kinds:
        for shape in args.shapes:
            given = draw(shape, kind)
            for backward in (False, True):
                arrays = {name: np.asarray(each) for name, each in given.items()}
                task = recurrences.Task(*KINDS[kind], arrays, backward, args.threads)
                contestants = {name: build(name, given, backward) for name in ours(args)}
                contestants |= contest.enter(recurrences.CONTESTANTS, peers, task)
                contest.agree(contestants)
                product = contest.products(args.threads)
                runs = {name: each.run for name, each in contestants.items()} | product
                times = contest.medians(contest.interleaved(runs, args.repeats))
                best = min(times.pop(name) for name in product)
                sizes = np.prod(list(map(float, shape.split(","))))
                work = sizes * (6 if KINDS[kind][1] else 4) * (3 if backward else 1)
                share = work / times[names[0]] / (2 * contest.PRODUCT**3 / best)
                others = [times[name] for name in times if name != names[0]]
                ratio = min(others) / times[names[0]] if others else None
                label = "with gradients" if backward else "forward"
                ms = {name: 1e3 * value for name, value in times.items()}
                rows.append({"kind": kind, "shape": shape, "pass": label, "ms": ms, "share": share, "ratio": ratio})
                table.add(kind, shape, label, *map(ms.get, names), ratio, f"{share:.0%}")
    for label in ("forward", "with gradients"):
        found = [row["ratio"] for row in rows if row["pass"] == label and row["ratio"]]
        if found:
            table.add("geometric mean", "", label, *[None] * len(names), statistics.geometric_mean(found), None)

    def picture(figure: Any) -> None:
        heights = {name: [row["ms"].get(name, np.nan) for row in rows] for name in names}
        labels = [f"{row['kind']}\n{row['shape']}\n{row['pass']}" for row in rows]
        contest.bars(figure.subplots(), labels, heights, ylabel="ms", yscale="log", title="matrix_scan")

    (memories, mib), (steps, us) = memory(args), one_step(args)
    data = {"rows": rows, "MiB of a step of training": mib, "µs of one step": us}
    contest.write(args, [table, memories, steps], data, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
