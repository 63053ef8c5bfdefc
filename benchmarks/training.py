"""How fast does a model train: forward, backward and Adam, in one step as a user writes it?

    python benchmarks/training.py
    python benchmarks/training.py --tasks characters --cells gru --shapes 64,64,32,256

`regression` is one recurrent layer and a linear one on random numbers, with the squared error. `characters` is the
model of examples/char_lm.py without its dropout: an embedding of 97 characters, two recurrent layers, a linear one, and
the cross-entropy. JAX's contestants run optax.adam in one jitted step that takes over the memory of the old state,
torch its Adam in the fused form.

All start with the same weights and train on the same batch. Their first loss must be the same, and after seven steps
it must have fallen as far, within a tenth: torch and Keras hold two biases where one would do, and Adam moves both.
Printed are milliseconds of a step, and what each trains in a second: sequences, and steps of sequences.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import contest, peers
from helpers.contest import Contestant, Table

import jaxrnn

SYMBOLS = 97
SHAPES = ("32,128,64,128", "16,32,32,128")
RATE = 1e-3


class Task(NamedTuple):
    """A model, and what it is to make of xs; targets are numbers, or whole numbers for the cross-entropy."""

    cell: jaxrnn.Cell
    params: Any
    xs: np.ndarray
    targets: np.ndarray


def make_task(name: str, layer: str, shape: peers.Shape) -> Task:
    rows, steps, inputs, units = shape
    make, rng = peers.CELLS[layer], np.random.default_rng(0)
    if name == "regression":
        cell = jaxrnn.Stack((make(inputs, units), jaxrnn.Linear(units, 1)))
        xs = rng.normal(size=(steps, rows, inputs)).astype(np.float32)
        return Task(cell, peers.draw(cell, units), xs, rng.normal(size=(steps, rows, 1)).astype(np.float32))
    layers = jaxrnn.Embed(SYMBOLS, inputs), make(inputs, units), make(units, units), jaxrnn.Linear(units, SYMBOLS)
    cell = jaxrnn.Stack(layers)
    text = rng.integers(0, SYMBOLS, (steps + 1, rows)).astype(np.int32)
    return Task(cell, peers.draw(cell, units), text[:-1], text[1:])


def in_jax(name: str):
    def build(task: Task, threads: int) -> Contestant | None:
        network = peers.NETWORKS[name](task.cell, task.params)
        if network is None:
            return None
        xs, targets = network.lay(task.xs), network.lay(task.targets)
        optimizer = optax.adam(RATE)

        def loss(weights, xs, targets):
            ys = network.outputs(weights, xs)
            if targets.dtype == jnp.float32:
                return jnp.square(ys - targets).mean()
            return optax.softmax_cross_entropy_with_integer_labels(ys, targets).mean()

        @partial(jax.jit, donate_argnums=0)
        def step(state, xs, targets):
            weights, moments = state
            value, gradient = jax.value_and_grad(loss)(weights, xs, targets)
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(weights, updates), moments), value

        weights = jax.tree.map(jnp.copy, network.weights)
        state = weights, optimizer.init(weights)

        def run():
            nonlocal state
            state, value = jax.block_until_ready(step(state, xs, targets))
            return value

        return Contestant(run, None)

    return build


def torch(task: Task, threads: int) -> Contestant:
    import torch

    module, outputs = peers.torch_network(task.cell, task.params, threads)
    xs, targets = torch.from_numpy(task.xs), torch.from_numpy(task.targets)
    optimizer = torch.optim.Adam(module.parameters(), RATE, fused=True)
    regression = targets.dtype == torch.float32
    targets = targets if regression else targets.long().flatten()

    def run():
        optimizer.zero_grad()
        ys = outputs(xs)
        if regression:
            value = torch.nn.functional.mse_loss(ys, targets)
        else:
            value = torch.nn.functional.cross_entropy(ys.flatten(0, 1), targets)
        value.backward()
        optimizer.step()
        return value.detach()

    return Contestant(run, None)


CONTESTANTS = {name: in_jax(name) for name in ("native", "xla")} | {"torch": torch}
CONTESTANTS |= {name: in_jax(name) for name in ("keras", "flax")}


def compete(names: list[str], task: Task, args: Any) -> dict[str, list[float]]:
    """Seconds of a step in each round, after what all have learnt was compared."""
    contestants = contest.enter(CONTESTANTS, names, task, args.threads)
    losses = {name: [float(each.run()) for _ in range(8)] for name, each in contestants.items()}
    begun, ended = np.array([(each[0], each[-1]) for each in losses.values()]).T
    np.testing.assert_allclose(begun, begun[0], 1e-4, err_msg=f"the first loss of {list(losses)}")
    np.testing.assert_allclose(begun - ended, begun[0] - ended[0], 0.1, err_msg=f"what {list(losses)} have learnt")
    return contest.interleaved({name: each.run for name, each in contestants.items()}, args.repeats)


def main(argv: list[str] | None = None) -> int:
    parser = contest.parser(__file__, __doc__, CONTESTANTS)
    parser.add_argument(
        "--tasks", nargs="+", choices=["regression", "characters"], default=["regression", "characters"]
    )
    parser.add_argument("--cells", nargs="+", choices=["lstm", "gru"], default=["lstm", "gru"])
    shapes = list(map(peers.Shape.read, SHAPES))
    parser.add_argument("--shapes", nargs="+", type=peers.Shape.read, default=shapes, metavar="B,T,D,H")
    args = contest.parse(parser, argv)
    names, rows = args.contestants, []
    speeds = "sequences/s", "their steps/s"
    table = Table(
        "task, ms", "cell", "B,T,D,H", *names, f"fastest peer / {names[0]}", *(f"{names[0]}: {s}" for s in speeds)
    )
    for kind in args.tasks:
        for layer in args.cells:
            for shape in args.shapes:
                rounds = compete(names, make_task(kind, layer, shape), args)
                times = contest.medians(rounds)
                row = {"task": kind, "cell": layer, "shape": shape, "ms": {name: 1e3 * times[name] for name in names}}
                row["sequences_per_second"] = {name: shape.rows / times[name] for name in names}
                row |= {"lead": contest.lead(times, names[0]), "rounds": rounds}
                rows.append(row)
                speed = shape.rows / times[names[0]]
                table.add(kind, layer, shape, *row["ms"].values(), row["lead"], speed, speed * shape.steps)

    def draw(figure):
        labels = [f"{row['task']}\n{row['cell']} {row['shape']}" for row in rows]
        heights = {name: [row["sequences_per_second"][name] for row in rows] for name in names}
        contest.bars(figure.subplots(), labels, heights, ylabel="sequences per second", title="training with Adam")

    contest.write(args, [table], {"rows": rows}, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
