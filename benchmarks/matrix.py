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
"""

from __future__ import annotations

import functools
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import contest, recurrences
from helpers.contest import Contestant, Table

import jaxrnn

SHAPES = ("1,2048,8,64,64", "1,2048,8,128,128", "8,512,4,64,64", "4,1024,4,32,32")
KINDS = {
    "gated delta": ("head", True),
    "row delta": ("row", True),
    "delta": (None, True),
    "decay": ("head", False),
    "row decay": ("row", False),
}
OURS = ("native", "xla", "chunked")


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


def build(name: str, given: dict[str, jax.Array], backward: bool) -> Contestant:
    run = functools.partial(jaxrnn.matrix_scan, implementation=name)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=given["v"].shape), jnp.float32)

    @jax.jit
    def forward(given):
        return run(**given)[1]

    gradient = jax.jit(jax.value_and_grad(lambda given: jnp.vdot(run(**given)[1], weights)))
    function = gradient if backward else forward
    return Contestant(lambda: jax.block_until_ready(function(given)), jax.tree.leaves)


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
                contestants = {name: build(name, given, backward) for name in names if name in OURS}
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

    contest.write(args, [table], {"rows": rows}, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
