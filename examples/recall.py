"""What a matrix as state buys: recall of many pairs, and a state that turns.

Recall: eight pairs of a key and a value, then every key once more, at random places; the model names its value. A
matrix stores the value at its key, k vᵀ, and a query reads it: `GatedDeltaNet`, `DeltaNet` and `MLSTM` answer. With as
many parameters, `MinGRU`, `HGRN` and `LRU`, whose state is a vector that each step scales elementwise, do not.

Parity: after every bit, whether the number of ones so far is odd, trained on 20 bits and tested on 100. A step of the
delta rule has the eigenvalue 1 − β: with β below 1 the state cannot change its sign, so `DeltaNet` guesses; with
`negative_eigenvalues=True`, β reaches 2, and it answers.

Permutations: after every permutation of three things, what they all make together, trained on 32 and tested on 128.
Then one step is at best one reflection, and a rotation is two of them: `products=2` answers. With one product the model
is right in a third, as if it knew the sign of the permutation alone.

Every model is one layer of a cell in the same network. It is trained from several seeds in one program, on sequences
that are drawn anew at every step. The share of right answers is that on new sequences, of parity and permutations at
the last step.

Exit status: 0 if the median of the seeds of every model that should answer is at least `--wanted`, and every seed of
the others at most `--others`, 1 if not; with `--quick` always 0.

Reference: recall: Arora et al. 2023, Zoology, arXiv 2312.04927, smaller; parity: Grazzi et al. 2024, arXiv 2411.12537;
permutations: Siems et al. 2025, DeltaProduct, arXiv 2502.10297.

What it needs beside the package: pip install -e ".[plot]"
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import jaxrnn
from jaxrnn import (
    HGRN,
    LRU,
    MLSTM,
    CausalConv,
    Cell,
    DeltaNet,
    Embed,
    GatedDeltaNet,
    LayerNorm,
    Linear,
    MinGRU,
    Residual,
    Stack,
)
from jaxrnn.analysis import STYLE
from jaxrnn.cell import output_size
from jaxrnn.typing import PyTree

SIZE, HEADS = 32, 2
KEYS, PAIRS, ROWS = 16, 8, 32
BLANK = 2 * KEYS


class Task(NamedTuple):
    """What is drawn, how long, and where the answers count."""

    sample: Callable[[Array, int], tuple[Array, Array]]  # (key, length) -> (tokens, targets), (T, B), −1 where none
    vocabulary: int
    answers: int
    trained: int
    tested: int
    last: bool  # whether the last answer alone counts in the test
    window: int  # of a convolution before the cell, which puts a key beside its value; 1 for none
    steps: int  # of training
    rate: float  # of learning, at its greatest


class Model(NamedTuple):
    """A cell, and whether it should be able to answer."""

    cell: Cell
    answers: bool


class Run(NamedTuple):
    """The share of right answers of every seed, the losses (seeds, steps), the number of parameters, and seconds."""

    shares: np.ndarray
    losses: np.ndarray
    parameters: int
    seconds: float


Found = dict[str, dict[str, Run]]


def recall(key: Array, length: int) -> tuple[Array, Array]:
    """Keys, then `KEYS` values, then a blank are the tokens; no key comes twice among the pairs of a row."""

    def row(key: Array) -> tuple[Array, Array]:
        k_keys, k_values, k_places = jax.random.split(key, 3)
        keys = jax.random.permutation(k_keys, KEYS)[:PAIRS]
        values = jax.random.randint(k_values, (PAIRS,), KEYS, 2 * KEYS)
        pairs = jnp.stack([keys, values], axis=1).ravel()
        places = 2 * PAIRS + jax.random.permutation(k_places, length - 2 * PAIRS)[:PAIRS]
        tokens = jnp.full(length, BLANK).at[: 2 * PAIRS].set(pairs).at[places].set(keys)
        return tokens, jnp.full(length, -1).at[places].set(values - KEYS)

    return jax.vmap(row, out_axes=1)(jax.random.split(key, ROWS))


def parity(key: Array, length: int) -> tuple[Array, Array]:
    bits = jax.random.bernoulli(key, 0.5, (length, ROWS)).astype(jnp.int32)
    return bits, jnp.cumsum(bits, axis=0) % 2


ORDERS = list(itertools.permutations(range(3)))
THEN = np.array([[ORDERS.index((b[i], b[j], b[k])) for b in ORDERS] for i, j, k in ORDERS])  # [a, b]: a, then b


def permutations(key: Array, length: int) -> tuple[Array, Array]:
    """The numbers of permutations in `ORDERS`, and those of their products so far."""
    drawn = jax.random.randint(key, (length, ROWS), 0, len(ORDERS))
    return drawn, lax.associative_scan(lambda a, b: jnp.asarray(THEN)[a, b], drawn)


TASKS = {
    "recall": Task(recall, 2 * KEYS + 1, KEYS, 32, 32, last=False, window=3, steps=800, rate=1e-2),
    "parity": Task(parity, 2, 2, 20, 100, last=True, window=1, steps=600, rate=3e-3),
    "permutations": Task(permutations, 6, 6, 32, 128, last=True, window=1, steps=1000, rate=5e-3),
}


def network(task: Task, cell: Cell) -> Cell:
    convolution = (CausalConv(SIZE, task.window),) if task.window > 1 else ()
    layer = Stack(LayerNorm(SIZE), *convolution, cell, Linear(output_size(cell), SIZE))
    return Stack(Embed(task.vocabulary, SIZE), Residual(layer), LayerNorm(SIZE), Linear(SIZE, task.answers))


def as_large(task: Task, cell: Callable[[int], Cell], other: Cell) -> Cell:
    """The cell, of so many units that its network has as many parameters as that of `other`; they grow linearly."""
    wanted, one, two = (jaxrnn.summary(network(task, each)).count for each in (other, cell(1), cell(2)))
    return cell(1 + round((wanted - one) / (two - one)))


def models(name: str) -> dict[str, Model]:
    task, sizes = TASKS[name], (SIZE, HEADS, SIZE // HEADS, SIZE // HEADS)
    turning = DeltaNet(*sizes, negative_eigenvalues=True)
    if name == "parity":
        return {"DeltaNet, β < 2": Model(turning, True), "DeltaNet, β < 1": Model(DeltaNet(*sizes), False)}
    if name == "permutations":
        twice = DeltaNet(*sizes, products=2, negative_eigenvalues=True)
        return {"DeltaNet, 2 products": Model(twice, True), "DeltaNet, 1 product": Model(turning, False)}
    gated = GatedDeltaNet(
        *sizes, step_min=1e-4, step_max=1e-2
    )  # forgets slowly at first; else, one seed of three fails
    matrices = {"GatedDeltaNet": gated, "DeltaNet": DeltaNet(*sizes), "MLSTM": MLSTM(*sizes)}
    vectors = {"MinGRU": MinGRU, "HGRN": HGRN, "LRU": LRU}
    return {kind: Model(cell, True) for kind, cell in matrices.items()} | {
        kind: Model(as_large(task, lambda n, cell=cell: cell(SIZE, n), gated), False) for kind, cell in vectors.items()
    }


def learn(task: Task, cell: Cell, *, seeds: int, seed: int) -> Run:
    model = network(task, cell)
    schedule = optax.warmup_cosine_decay_schedule(0.0, task.rate, task.steps // 20, task.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def error(params: PyTree, tokens: Array, targets: Array) -> Array:
        logits = jaxrnn.scan(model, params, None, tokens)[1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        return jnp.mean(losses, where=targets >= 0)

    def train(key: Array) -> tuple[Array, Array]:
        k_init, k_train, k_test = jax.random.split(key, 3)
        params = model.init(k_init)

        def step(state: PyTree, key: Array) -> tuple[PyTree, Array]:
            params, moments = state
            loss, gradient = jax.value_and_grad(error)(params, *task.sample(key, task.trained))
            updates, moments = optimizer.update(gradient, moments, params)
            return (optax.apply_updates(params, updates), moments), loss

        (params, _), losses = lax.scan(step, (params, optimizer.init(params)), jax.random.split(k_train, task.steps))

        def right(key: Array) -> Array:
            tokens, targets = task.sample(key, task.tested)
            found = jaxrnn.scan(model, params, None, tokens)[1].argmax(-1)
            if task.last:
                found, targets = found[-1:], targets[-1:]
            return jnp.mean(found == targets, where=targets >= 0)

        return lax.map(right, jax.random.split(k_test, 32)).mean(), losses

    # One after the other: on the CPU, products with other weights for each seed, as in `jax.vmap`, take twice as long.
    train_all = jax.jit(lambda keys: lax.map(train, keys))
    begun = time.perf_counter()
    shares, losses = map(np.asarray, train_all(jax.random.split(jax.random.key(seed), seeds)))
    return Run(shares, losses, jaxrnn.summary(model).count, time.perf_counter() - begun)


def run(args: argparse.Namespace) -> Found:
    """The run of every task and model."""
    found: Found = {}
    for name in args.tasks:
        task = TASKS[name]
        task = task._replace(steps=args.steps or (60 if args.quick else task.steps))
        for kind, model in models(name).items():
            each = found.setdefault(name, {})[kind] = learn(task, model.cell, seeds=args.seeds, seed=args.seed)
            shares = ", ".join(f"{share:.3f}" for share in each.shares)
            Console().print(f"{name}: {kind}: {shares} in {each.seconds:.0f} s", highlight=False)
    return found


def chance(task: Task) -> float:
    return 1 / task.answers


def picture(found: Found) -> Figure:
    """The losses in training, and right answers on new sequences; a row for each task."""
    heights = [0.9 + 0.28 * len(kinds) for kinds in found.values()]
    figure = Figure(figsize=(7, sum(heights) + 0.6))
    rows = figure.subplots(len(found), 2, squeeze=False, height_ratios=heights)
    for (axes, right), (name, kinds) in zip(rows, found.items(), strict=True):
        task = TASKS[name]
        for k, each in enumerate(kinds.values()):
            for losses in each.losses:
                smooth = np.convolve(losses, np.ones(20) / 20, "valid")
                axes.plot(np.arange(len(smooth)) + 20, smooth, f"C{k}", alpha=0.7)
            right.plot(each.shares, [k] * len(each.shares), "o", color=f"C{k}", alpha=0.7, markersize=5, clip_on=False)
        right.axvline(chance(task), color="0.5", ls="--", lw=0.8, label="chance")
        right.set_yticks(range(len(kinds)), list(kinds))
        for k, label in enumerate(right.get_yticklabels()):
            label.set_color(f"C{k}")
        right.margins(y=0.2)
        right.invert_yaxis()
        right.set(xlim=(0, 1), title=f"tested on {task.tested} steps")
        axes.set(yscale="log", ylabel="cross-entropy", title=f"{name}, trained on {task.trained} steps")
    rows[0, 1].legend(loc="lower right")
    rows[-1, 0].set_xlabel("step of training")
    rows[-1, 1].set_xlabel("share of right answers, a dot for each seed")
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, for a first look")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="tasks (default: all)")
    parser.add_argument("--steps", type=int, help="steps of training (default: 600 to 1000, by the task)")
    parser.add_argument("--seeds", type=int, default=3, help="number of models of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all of them (default: %(default)s)")
    parser.add_argument(
        "--wanted",
        type=float,
        default=0.95,
        help="share to reach by the median (default: %(default)s)",
    )
    parser.add_argument(
        "--others", type=float, default=0.6, help="share that no seed of the others may exceed (default: %(default)s)"
    )
    parser.add_argument("--out", default="recall.png", metavar="PATH", help="picture (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    found, as_expected = run(args), True
    table = Table("model", "parameters", "can it?", "right answers of each seed", "median", "best")
    for name, kinds in found.items():
        table.add_section()
        table.add_row(f"[bold]{name}[/], chance {chance(TASKS[name]):.2f}")
        for kind, each in kinds.items():
            answers, median, best = models(name)[kind].answers, np.median(each.shares), np.max(each.shares)
            as_expected &= bool(median >= args.wanted if answers else best <= args.others)
            shares = ", ".join(f"{share:.3f}" for share in each.shares)
            can = "yes" if answers else "no"
            table.add_row(kind, f"{each.parameters:,}", can, shares, f"{median:.3f}", f"{best:.3f}")
    Console().print(table)
    with rc_context(STYLE):
        picture(found).savefig(args.out)
    if args.quick:
        print(f"too small to win, and not judged; picture in {args.out}")
        return 0
    print(
        f"{'as' if as_expected else 'not as'} theory says: at least {args.wanted} right answers by the median, "
        f"at most {args.others} for every seed of the others; picture in {args.out}"
    )
    return 0 if as_expected else 1


if __name__ == "__main__":
    sys.exit(main())
