"""One to many: a word in handwriting, drawn point by point from one vector that says what it is and how it looks.

    python examples/generate.py                         # learns by drawing on its own
    python examples/generate.py --forcing teacher       # learns with the right stroke before each, and drifts later

The vector holds the letters of a word, one-hot, and five numbers for its style: slant, size, spacing, loops and pace.
The script makes the curves: each letter is a stroke up (or below the line) and back to it. When the word is over, the
pen rests. The network reads the vector and the last offset of the pen, and puts out the next offset. `jaxrnn.rollout`
runs it on its own output, in the test and, by default, in training.

Every word and style of the test is new. The error is the root mean square distance between the pen and its true
position, in heights of an "e". The baselines map the vector to the whole curve, linearly and by kernel ridge
regression. The validation part, which has other new words, chooses their settings and the network's epoch.

Exit status: 0 if the network's error is less than the better baseline's by --margin (a share of it), 1 if not, 2 for an
unusable flag. With `--quick` never 1.

What it needs beside the package: pip install -e ".[examples]"
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge

import jaxrnn
from jaxrnn import analysis
from jaxrnn.training import fit, mean, train_state

LETTERS = {"e": (1.0, 1.0), "l": (2.1, 1.3), "i": (1.0, 0.0), "t": (1.9, 0.0), "j": (-1.6, 1.2)}  # height, loop
STYLE = {"slant": (0.25, 0.5), "size": (1, 0.25), "spacing": (0.9, 0.2), "loops": (0.3, 0.1), "pace": (0.1, 0.015)}
POINTS = 16  # per letter


class Curves(NamedTuple):
    """Vectors (N, V), and offsets of the pen (N, T, 2)."""

    vectors: np.ndarray
    offsets: np.ndarray


def write(words: np.ndarray, rng: np.random.Generator) -> Curves:
    """Each word (N, letters) once, in a style drawn at random."""
    count, letters = words.shape
    style = rng.uniform(-1, 1, (count, len(STYLE)))
    centre, range_ = np.array(list(STYLE.values())).T
    slant, size, spacing, loops, pace = (centre + range_ * style).T[..., None]
    height, loop = np.array(list(LETTERS.values()))[words].transpose(2, 0, 1)
    duration = 0.6 + 0.4 * np.abs(height)
    end = duration.cumsum(1)
    t = np.minimum(pace * np.arange(1, POINTS * letters + 1), end[:, -1:])
    k = np.minimum((t[..., None] >= end[:, None]).sum(2), letters - 1)  # the letter that is written
    end, duration, height, loop = (np.take_along_axis(each, k, 1) for each in (end, duration, height, loop))
    phase = 1 - (end - t) / duration
    y = size * height * (1 - np.cos(2 * np.pi * phase)) / 2
    x = spacing * (k + phase) + loops * loop * np.sin(2 * np.pi * phase) + slant * y
    vectors = np.concatenate([np.eye(len(LETTERS))[words].reshape(count, -1), style], 1)
    offsets = np.diff(np.stack([x, y], 2), axis=1, prepend=0.0)
    return Curves(vectors.astype(np.float32), offsets.astype(np.float32))


def distance(offsets: np.ndarray, true: np.ndarray) -> float:
    return float(np.sqrt(((offsets - true).cumsum(1) ** 2).sum(2).mean()))


def baselines(training: Curves, validation: Curves, test: Curves) -> dict[str, float]:
    """The error of each on the test part, with the setting that is best on the validation part."""
    candidates = {
        "linear regression": [Ridge(alpha) for alpha in (0.01, 1.0, 100.0)],
        "kernel ridge regression": [KernelRidge(0.1, kernel="rbf", gamma=gamma) for gamma in (0.03, 0.1, 0.3)],  # type: ignore
    }

    def error(model, part):
        return distance(model.predict(part.vectors).reshape(part.offsets.shape), part.offsets)

    errors = {}
    for name, models in candidates.items():
        models = [model.fit(training.vectors, training.offsets.reshape(len(training.offsets), -1)) for model in models]
        errors[name] = error(min(models, key=lambda model: error(model, validation)), test)
    return errors


class Writer(NamedTuple):
    """A network that reads (vector, last offset) and puts out the next offset, offsets in units of `scale` (2,)."""

    network: jaxrnn.Stack
    scale: np.ndarray
    teacher: bool

    def draw(self, params: Any, curves: Curves) -> Array:
        """Free running: the offsets (N, T, 2) from the vectors alone."""

        def feedback(y, key):
            return jnp.concatenate([curves.vectors, y], -1), y

        first = jnp.pad(curves.vectors, ((0, 0), (0, 2)))
        _, ys = jaxrnn.rollout(self.network, params, None, first, curves.offsets.shape[1], feedback=feedback)
        return ys.swapaxes(0, 1) * self.scale

    def copy(self, params: Any, curves: Curves) -> Array:
        """Teacher forcing: each offset after the right ones."""
        before = jnp.pad(curves.offsets[:, :-1], ((0, 0), (1, 0), (0, 0))) / self.scale
        vectors = jnp.broadcast_to(curves.vectors[:, None], (*before.shape[:2], curves.vectors.shape[-1]))
        xs = jnp.concatenate([vectors, before], -1)
        return jaxrnn.scan(self.network, params, None, xs, time_axis=1)[1] * self.scale

    def loss(self, params: Any, curves: Curves, key: Any) -> tuple[Array, dict[str, Any]]:
        """Of the offsets, and a little of where they lead. Without a key, in the validation, always free running."""
        ys = self.copy(params, curves) if self.teacher and key is not None else self.draw(params, curves)
        error = (ys - curves.offsets) / self.scale
        loss = mean(error**2 + 0.1 * error.cumsum(1) ** 2)
        return loss.value, {"loss": loss}


class Result(NamedTuple):
    """Errors on the test part by name, the network's first; its curves and the true ones."""

    errors: dict[str, float]
    drawn: np.ndarray
    true: np.ndarray

    @property
    def gain(self) -> float:
        network, *others = self.errors.values()
        return 1 - network / min(others)


def run(args: argparse.Namespace) -> Result:
    rng = np.random.default_rng(args.seed)
    letters, held, times, size, epochs, rows = (3, 10, 6, 24, 14, 16) if args.quick else (5, 200, 2, 64, 16, 32)
    words = np.array(list(itertools.product(range(len(LETTERS)), repeat=letters)))
    parts = np.split(rng.permutation(words), [2 * held, 3 * held])
    test, validation, training = (write(np.tile(part, (times, 1)), rng) for part in parts)

    steps = len(training.vectors) // rows
    network = jaxrnn.Stack((jaxrnn.GRU(test.vectors.shape[1] + 2, size), jaxrnn.Linear(size, 2)))
    writer = Writer(network, training.offsets.std((0, 1)), args.forcing == "teacher")
    keys = jax.random.split(jax.random.key(args.seed), 3)
    schedule = optax.cosine_decay_schedule(1.5e-2, epochs * steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    whole = jax.tree.map(lambda leaf: leaf[: steps * rows], training)  # whole batches: one program runs all of them
    check = [validation]  # as one batch
    start = train_state(jax.jit(network.init)(keys[0]), optimizer, keys[1])
    state, _ = fit(
        writer.loss, start, whole, optimizer=optimizer, epochs=epochs, batch_size=rows, key=keys[2], validation=check
    )
    assert state.best is not None
    drawn = np.asarray(writer.draw(state.best.params, test))
    errors = {"the network": distance(drawn, test.offsets)} | baselines(training, validation, test)
    return Result(errors, drawn.cumsum(1), test.offsets.cumsum(1))


def picture(result: Result) -> Figure:
    """Words of the test: drawn beside true."""
    figure = Figure(figsize=(7, 3.6))
    grid = figure.subplots(3, 4).ravel()
    for axes, drawn, true in zip(grid, result.drawn, result.true, strict=False):
        axes.plot(*true.T, color="0.75", linewidth=4, solid_capstyle="round", label="as it should be")
        axes.plot(*drawn.T, color="C0", label="drawn by the network from the vector alone")
        axes.set_aspect("equal")
        axes.set_axis_off()
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--forcing", choices=("own", "teacher"), default="own", help="offsets read in training (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="words of three letters and a small network")
    parser.add_argument("--seed", type=int, default=0, help="seed of words, weights and order (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.3, help="wanted gain, as a share (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("words.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.out.parent.is_dir():
        parser.error(f"--out: there is no folder {args.out.parent}")
    return args


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    result = run(args)
    console, table = Console(highlight=False), Table(f"{len(result.true)} words never seen", "error")
    for name, error in result.errors.items():
        table.add_row(name, f"{error:.3f}")
    console.print(table)
    with rc_context(analysis.STYLE):
        picture(result).savefig(args.out)
    if args.quick:
        console.print(f"too small to win, and not judged; picture in {args.out}")
        return 0
    console.print(f"gain {result.gain:.1%}, wanted at least {args.margin:.1%}; picture in {args.out}")
    return 0 if result.gain >= args.margin else 1


if __name__ == "__main__":
    sys.exit(main())
