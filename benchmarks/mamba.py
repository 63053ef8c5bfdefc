"""How fast is a whole block of Mamba, beside that of transformers?

    python benchmarks/mamba.py
    python benchmarks/mamba.py --shapes 1,512,768 --repeats 9

`jaxrnn.mamba_block(D)` by the kernel and by JAX's own loop, and transformers' `MambaMixer` with the same weights:
forward, and with the gradients of a weighted sum of the outputs for all weights and for x. A shape is B,T,D.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import contest
from helpers.contest import Contestant, Table

import jaxrnn

OURS = ("native", "xla")


class Task(NamedTuple):
    """weights: those of a `MambaMixer`, by their names there. xs, and the factors of the outputs: (T, B, D)."""

    weights: Mapping[str, np.ndarray]
    xs: np.ndarray
    factors: np.ndarray
    backward: bool
    threads: int


def draw(shape: str, backward: bool, threads: int) -> Task:
    rows, steps, size = map(int, shape.split(","))
    rng, inner, states, rank = np.random.default_rng(0), 2 * size, 16, -(-size // 16)

    def normal(*shape):
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    weights = {
        "in_proj.weight": normal(2 * inner, size),
        "conv1d.weight": normal(inner, 1, 4),
        "conv1d.bias": normal(inner),
        "x_proj.weight": normal(rank + 2 * states, inner),
        "dt_proj.weight": normal(inner, rank),
        "dt_proj.bias": normal(inner) - np.float32(3),
        "A_log": np.log(np.tile(np.arange(1, states + 1, dtype=np.float32), (inner, 1))),
        "D": np.ones(inner, np.float32),
        "out_proj.weight": normal(size, inner),
    }
    xs, factors = rng.normal(size=(2, steps, rows, size)).astype(np.float32)
    return Task(weights, xs, factors, backward, threads)


def ours(name: str, task: Task) -> Contestant:
    weights = {name: jnp.asarray(weight) for name, weight in task.weights.items()}
    into_x, into_gate = (jaxrnn.LinearParams(w.T, None) for w in jnp.split(weights["in_proj.weight"], 2))
    convolution = jaxrnn.CausalConvParams(weights["conv1d.weight"][:, 0].T, weights["conv1d.bias"])
    layers = ("x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D")
    s6 = jaxrnn.S6Params(*(weights[each].T if "weight" in each else weights[each] for each in layers))
    out = jaxrnn.LinearParams(weights["out_proj.weight"].T, None)
    params = ((into_x, convolution, (), s6), (into_gate, ())), out
    cell = jaxrnn.mamba_block(task.xs.shape[-1])
    xs, factors = jnp.asarray(task.xs), jnp.asarray(task.factors)

    def outputs(params, xs):
        return jaxrnn.scan(cell, params, None, xs, implementation=None if name == "native" else name)[1]

    if not task.backward:
        forward = jax.jit(outputs)
        return Contestant(lambda: jax.block_until_ready(forward(params, xs)), lambda ys: ys)
    both = jax.jit(jax.value_and_grad(lambda params, xs: jnp.vdot(outputs(params, xs), factors), (0, 1)))
    return Contestant(lambda: jax.block_until_ready(both(params, xs)), lambda found: (found[0], found[1][1]))


def transformers(task: Task) -> Contestant:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.set_num_threads(task.threads)
    mixer = MambaMixer(MambaConfig(hidden_size=task.xs.shape[-1]), 0)
    mixer.load_state_dict({name: torch.from_numpy(np.array(weight)) for name, weight in task.weights.items()})
    xs, factors = (torch.from_numpy(each.swapaxes(0, 1).copy()) for each in (task.xs, task.factors))
    xs.requires_grad_(task.backward)

    def forward():
        with torch.no_grad():
            return mixer(xs)

    def both():
        xs.grad = None
        mixer.zero_grad()
        loss = (mixer(xs) * factors).sum()
        loss.backward()
        return loss

    if not task.backward:
        return Contestant(forward, lambda ys: ys.numpy().swapaxes(0, 1))
    return Contestant(both, lambda loss: (loss.item(), xs.grad.numpy().swapaxes(0, 1)))


def main(argv: list[str] | None = None) -> int:
    builders: dict[str, Callable[[Task], Contestant]] = {name: functools.partial(ours, name) for name in OURS}
    builders["transformers"] = transformers
    parser = contest.parser(__file__, __doc__, builders)
    parser.add_argument("--shapes", nargs="+", default=["1,512,768"], metavar="B,T,D")
    args = contest.parse(parser, argv)
    names, rows = args.contestants, []
    table = Table("B,T,D", "pass", *(f"{name}, ms" for name in names), *(f"{name} / {names[0]}" for name in names[1:]))
    for shape in args.shapes:
        for backward in (False, True):
            contestants = contest.enter(builders, names, draw(shape, backward, args.threads))
            contest.agree(contestants)
            times = contest.medians(contest.interleaved({name: c.run for name, c in contestants.items()}, args.repeats))
            ms = {name: 1e3 * value for name, value in times.items()}
            label = "with gradients" if backward else "forward"
            rows.append({"shape": shape, "pass": label, "ms": ms})
            table.add(shape, label, *ms.values(), *(ms[name] / ms[names[0]] for name in names[1:]))

    def picture(figure: Any) -> None:
        labels = [f"{row['shape']}\n{row['pass']}" for row in rows]
        heights = {name: [row["ms"][name] for row in rows] for name in names}
        contest.bars(figure.subplots(), labels, heights, ylabel="ms", yscale="log", title="mamba_block")

    contest.write(args, [table], {"rows": rows}, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
