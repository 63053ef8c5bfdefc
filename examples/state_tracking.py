"""Two tasks that some recurrences can learn and others cannot: parity, and selective copying.

Parity: after every bit, the model says whether the number of ones so far is odd. It is trained on 20 bits and tested on
100. A state has to change its sign with every bit that is one, for ever. Recurrences whose state decays by positive
factors cannot do that, however long they are trained: at best they learn the lengths that they see. Recurrences that
are nonlinear in their state can.

Selective copying: a few marked tokens lie among noise in 256 steps, and the model has to name them at the end, in
order. The input must decide what is kept; a recurrence that is the same at every step keeps the noise too. This task
takes about forty minutes, so it runs only if `--tasks` asks for it. From three seeds, three layers of MinGRU name 99.1,
99.4 and 99.9% of the tokens, and three layers of LRU 12.5, 19.7 and 20.0%, where chance is 12.5.

Every model is trained from several seeds at once, in one program (`jax.vmap`), on sequences that are drawn anew at
every step. For each seed, the script prints the share of right answers on new sequences: at the last bit for parity,
where chance is one half, and over all tokens for copying.

Exit status: 0 if the best seed of every model that should learn its task exceeds `--wanted`, and every seed of the
others stays below it, 1 if not; with `--quick` always 0.

Reference: parity and eigenvalues: Grazzi et al. 2024, arXiv 2411.12537; selective copying: Gu & Dao 2023, Mamba, arXiv
2312.00752; Feng et al. 2024, arXiv 2410.01201.

What it needs beside the package: pip install -e ".[plot]"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

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
from jaxrnn import GRU, LRU, LSTM, S6, SLSTM, Cell, Elman, Embed, LayerNorm, Linear, MinGRU, Stack, residual_block
from jaxrnn.analysis import STYLE
from jaxrnn.training import labels

Sample = Callable[[Array, int], tuple[Array, Array]]  # (key, length) -> (tokens, targets), (T, B), −1 where none


class Task(NamedTuple):
    """What is drawn, how long, and where the answers count."""

    sample: Sample
    vocabulary: int
    answers: int
    trained: int
    tested: int
    last: bool  # whether the last answer alone counts in the test
    steps: int  # of training
    rate: float  # of learning, at its greatest


class Model(NamedTuple):
    """Cells above an embedding, and whether theory says that they can learn the task."""

    cells: Callable[[], tuple[Cell, ...]]
    learns: bool
    frozen: bool = False  # whether eigenvalues stay as they begin


def parity(key: Array, length: int, rows: int = 64) -> tuple[Array, Array]:
    bits = jax.random.bernoulli(key, 0.5, (length, rows)).astype(jnp.int32)
    return bits, jnp.cumsum(bits, axis=0) % 2


MARKED, NOISE, ASK = 8, 8, 9  # as many tokens to tell, and the two tokens beside those


def copying(key: Array, length: int, rows: int = 16) -> tuple[Array, Array]:
    """`length` steps with `MARKED` tokens among noise, in any places; then as many that ask for them."""
    k_tokens, k_places = jax.random.split(key)
    tokens = jax.random.randint(k_tokens, (MARKED, rows), 0, NOISE)
    order = jax.vmap(lambda key: jax.random.permutation(key, length))(jax.random.split(k_places, rows))
    places = jnp.sort(order[:, :MARKED], axis=1).T
    body = jnp.full((length, rows), NOISE).at[places, jnp.arange(rows)].set(tokens)
    none = jnp.full((length, rows), -1)
    return jnp.concatenate([body, jnp.full((MARKED, rows), ASK)]), jnp.concatenate([none, tokens])


TASKS = {
    "parity": Task(parity, 2, 2, 20, 100, last=True, steps=2000, rate=3e-3),
    "selective copying": Task(copying, 10, 8, 256, 256, last=False, steps=4000, rate=5e-3),
}
SIZE = 64


def blocks(cell: Callable[[], Cell], count: int) -> Callable[[], tuple[Cell, ...]]:
    return lambda: (*(residual_block(cell(), SIZE) for _ in range(count)), LayerNorm(SIZE))


def positive_lru() -> Cell:
    """With real eigenvalues between 0 and 1."""
    return LRU(SIZE, SIZE, max_phase=1e-6)


MODELS = {
    "parity": {
        "Elman": Model(lambda: (Elman(SIZE, SIZE),), True),
        "LSTM": Model(lambda: (LSTM(SIZE, SIZE),), True),
        "GRU": Model(lambda: (GRU(SIZE, SIZE),), True),
        "sLSTM": Model(lambda: (SLSTM(SIZE, SIZE),), True),
        "MinGRU": Model(blocks(lambda: MinGRU(SIZE, SIZE), 2), False),
        "LRU, positive real": Model(blocks(positive_lru, 2), False, frozen=True),
        "S6": Model(blocks(lambda: S6(SIZE, 8), 2), False),
    },
    "selective copying": {
        "MinGRU, 3 layers": Model(blocks(lambda: MinGRU(SIZE, SIZE), 3), True),
        "LRU, 3 layers": Model(blocks(lambda: LRU(SIZE, SIZE, r_min=0.9), 3), False),
    },
}


def learn(task: Task, model: Model, *, seeds: int, seed: int) -> tuple[Array, Array]:
    """(the share of right answers of every seed, the losses (seeds, steps))."""
    cell = Stack((Embed(task.vocabulary, SIZE), *model.cells(), Linear(SIZE, task.answers)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, task.rate, task.steps // 20, task.steps)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    eigenvalues = optax.set_to_zero() if model.frozen else adam
    kinds = labels(cell, jax.eval_shape(cell.init, jax.random.key(0)))
    optimizer = optax.multi_transform({"regular": adam, "slow": eigenvalues}, kinds)

    def error(params: Any, tokens: Array, targets: Array) -> Array:
        logits = jaxrnn.scan(cell, params, None, tokens)[1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        return jnp.mean(losses, where=targets >= 0)

    def train(key: Array) -> tuple[Array, Array]:
        k_init, k_train, k_test = jax.random.split(key, 3)
        params = cell.init(k_init)

        def step(state: Any, key: Array) -> tuple[Any, Array]:
            params, moments = state
            loss, gradient = jax.value_and_grad(error)(params, *task.sample(key, task.trained))
            updates, moments = optimizer.update(gradient, moments, params)
            return (optax.apply_updates(params, updates), moments), loss

        (params, _), losses = lax.scan(step, (params, optimizer.init(params)), jax.random.split(k_train, task.steps))

        def right(key: Array) -> Array:
            tokens, targets = task.sample(key, task.tested)
            found = jaxrnn.scan(cell, params, None, tokens)[1].argmax(-1)
            if task.last:
                found, targets = found[-1:], targets[-1:]
            return jnp.mean(found == targets, where=targets >= 0)

        return lax.map(right, jax.random.split(k_test, 16)).mean(), losses

    return jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(seed), seeds))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, for a first look")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["parity"], help="tasks (default: parity)")
    parser.add_argument("--steps", type=int, help="steps of training (default: 2000 for parity, 4000 for copying)")
    parser.add_argument("--seeds", type=int, default=3, help="number of models of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first model (default: %(default)s)")
    parser.add_argument("--wanted", type=float, default=0.99, help="share of right answers (default: %(default)s)")
    parser.add_argument("--out", default="state_tracking.png", metavar="PATH", help="picture (default: %(default)s)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """For every task and model, what `learn` finds."""
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name in args.tasks:
        task = TASKS[name]
        task = task._replace(steps=100 if args.quick else args.steps or task.steps)
        for kind, model in MODELS[name].items():
            result = learn(task, model, seeds=args.seeds, seed=args.seed)
            shares, losses = map(np.asarray, result)
            found.setdefault(name, {})[kind] = shares, losses
            Console().print(f"{name}: {kind}: {', '.join(f'{share:.3f}' for share in shares)}")
    return found


def picture(found: Any) -> Figure:
    """The losses in training, and right answers on new, longer sequences; a row for each task."""
    figure = Figure(figsize=(7, 2.6 * len(found)))
    rows = figure.subplots(len(found), 2, squeeze=False)
    for (axes, right), (name, kinds) in zip(rows, found.items(), strict=True):
        task = TASKS[name]
        for k, (shares, losses) in enumerate(kinds.values()):
            for each in losses:
                smooth = np.convolve(each, np.ones(20) / 20, "valid")
                axes.plot(np.arange(len(smooth)) + 20, smooth, f"C{k}", alpha=0.7)
            right.plot(shares, [k] * len(shares), "o", color=f"C{k}", alpha=0.7, markersize=5, clip_on=False)
        right.axvline(1 / task.answers, color="0.5", ls="--", lw=0.8, label="chance")
        right.set_yticks(range(len(kinds)), list(kinds))
        for k, label in enumerate(right.get_yticklabels()):
            label.set_color(f"C{k}")
        right.invert_yaxis()
        right.legend(loc="lower right")
        right.set(
            xlim=(0, 1), xlabel="share of right answers, a dot for each seed", title=f"tested on {task.tested} steps"
        )
        axes.set(
            yscale="log",
            xlabel="step of training",
            ylabel="cross-entropy",
            title=f"{name}, trained on {task.trained} steps",
        )
    return figure


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    found, as_expected = run(args), True
    table = Table("task", "model", "can it?", "right answers, best seed", "worst seed")
    for name, kinds in found.items():
        for kind, (shares, _) in kinds.items():
            learns = MODELS[name][kind].learns
            as_expected &= bool(shares.max() >= args.wanted) == learns
            table.add_row(name, kind, "yes" if learns else "no", f"{shares.max():.3f}", f"{shares.min():.3f}")
    Console().print(table)
    with rc_context(STYLE):
        picture(found).savefig(args.out)
    if args.quick:
        print(f"too small to win, and not judged; picture in {args.out}")
        return 0
    print(f"{'as' if as_expected else 'not as'} theory says, at {args.wanted} right answers; picture in {args.out}")
    return 0 if as_expected else 1


if __name__ == "__main__":
    sys.exit(main())
