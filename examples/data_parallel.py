"""Data parallel training: the devices of a mesh divide the rows of every batch, and train the same as one device.

Data: scikit-learn's 1,797 handwritten digits, row by row; 900 are for training, the rest are held out.

Shown here: `fit(..., mesh=mesh)` divides the rows of every batch among the devices, and sums their gradients once a
step. `sharding=` divides the params, and with them the state of the optimizer: a device then keeps its part alone, and
has the whole params only during a step. Without an accelerator, a process can take parts of its processor for devices.

Comparison: the same training on one device. The loss of every step must be equal, to rounding, also in the last batch
of an epoch, which the devices cannot divide evenly and each of them has whole. How fast devices are that share one
processor says nothing, so no time is taken.

On many hosts, the same program is started on each of them, with the address of the first one:

    python examples/data_parallel.py --coordinator 10.0.0.1:1234 --processes 2 --process 0  # on the first
    python examples/data_parallel.py --coordinator 10.0.0.1:1234 --processes 2 --process 1  # on the second

Each process then gives its own rows of every batch. Both lines run on one machine too, with 127.0.0.1 for the address.

Exit status: 0 if no loss of a step differs by more than `--margin`, relative to that of one device, 1 if one does.

What it needs beside the package: pip install -e ".[examples]"
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from jaxrnn import GRU, Linear, Pool, Stack
from jaxrnn.analysis import STYLE
from jaxrnn.training import Batch, accuracy, cross_entropy, evaluate, fit, make_loss, train_state

ROWS = 96  # in a batch; the last of an epoch has 36
ONE = "one device"
SHARDING = {"w_": PartitionSpec(None, "devices"), r"\.w$": PartitionSpec("devices")}  # all matrices; biases stay whole


class Training(NamedTuple):
    """The loss of every step; the accuracy on held-out digits; the bytes of params and optimizer on each device."""

    losses: np.ndarray
    held_out: float
    size: int


class Result(NamedTuple):
    """Trainings by name; that of one device comes first."""

    trainings: dict[str, Training]

    def differences(self) -> dict[str, np.ndarray]:
        """By how much the loss of each step differs from that of one device, relative to it."""
        expected = self.trainings[ONE].losses
        others = {name: each.losses for name, each in self.trainings.items() if name != ONE}
        return {name: abs(losses - expected) / expected for name, losses in others.items()}

    def greatest(self) -> float:
        return float(np.max(list(self.differences().values())))


def load(seed: int) -> tuple[list[Batch], Batch]:
    """The batches of an epoch, and the digits held out."""
    images, labels = load_digits(return_X_y=True)
    digits = Batch(images.reshape(-1, 8, 8).astype(np.float32) / 16, labels.astype(np.int32))
    order = np.random.default_rng(seed).permutation(900)
    batches = [rows_of(digits, order[at : at + ROWS]) for at in range(0, 900, ROWS)]
    return batches, rows_of(digits, slice(900, 1796))


def rows_of(batch: Batch, rows: Any) -> Batch:
    return jax.tree.map(lambda leaf: leaf[rows], batch)


def own_part(batch: Batch) -> Batch:
    """The rows that this process gives of a batch."""
    rows, count, k = len(batch.targets), jax.process_count(), jax.process_index()
    return rows_of(batch, slice(k * rows // count, (k + 1) * rows // count))


def bytes_on_one_device(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def run(args: argparse.Namespace) -> Result:
    size, epochs = (32, 2) if args.quick else (128, 12)
    batches, held_out = load(args.seed)
    devices = len(jax.devices())
    mesh = jax.make_mesh((devices,), ("devices",))
    model = Stack(Pool(GRU(8, size)), Linear(size, 10))
    loss, optimizer = make_loss(model, cross_entropy, metrics=[accuracy]), optax.adam(3e-3)
    init, noise = jax.random.split(jax.random.key(args.seed))
    console = Console(quiet=jax.process_index() > 0)

    def train(name: str, data: list[Batch], unseen: Batch, **options: Any) -> Training:
        console.print(f"[bold]{name}")
        state = train_state(model.init(init), optimizer, noise)
        state, history = fit(loss, state, data, optimizer=optimizer, epochs=epochs, progress=console, **options)
        found = evaluate(loss, state.params, unseen, mesh=options.get("mesh"))
        return Training(history.train["loss"], found["accuracy"], bytes_on_one_device((state.params, state.opt_state)))

    parts = [own_part(batch) for batch in batches], own_part(held_out)
    trainings = {
        ONE: train(ONE, batches, held_out),
        f"{devices} devices": train(f"{devices} devices", *parts, mesh=mesh),
        "divided params": train("divided params", *parts, mesh=mesh, sharding=SHARDING),
    }
    return Result(trainings)


def picture(result: Result, margin: float) -> Figure:
    """The losses of the steps, and by how much they differ."""
    figure = Figure(figsize=(7, 2.6))
    axes, below = figure.subplots(1, 2)
    for k, (name, training) in enumerate(result.trainings.items()):
        style = {"color": "0.8", "lw": 5} if name == ONE else {"color": f"C{k - 1}", "ls": ("-", "--")[k - 1], "lw": 1}
        axes.plot(np.arange(1, len(training.losses) + 1), training.losses, label=name, **style)
    axes.set(xlabel="step", ylabel="cross-entropy", ylim=(0, None))
    axes.legend()
    for k, difference in enumerate(result.differences().values()):
        marks = {"marker": "o."[k], "ms": (5, 3)[k], "mfc": ("none", None)[k], "color": f"C{k}"}
        below.plot(np.arange(1, len(difference) + 1), np.maximum(difference, 1e-9), ls="", **marks)
    below.axhline(margin, color="0.5", ls="--", lw=0.8)
    below.set(xlabel="step", ylabel="relative difference, or 1e-9", yscale="log", title="from one device")
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few epochs, for a first look")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=1e-4, help="greatest difference (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=4, help="of each process, on a CPU (default: %(default)s)")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process, if there are several")
    parser.add_argument("--processes", type=int, default=1, help="how many there are (default: %(default)s)")
    parser.add_argument("--process", type=int, default=0, help="which of them this is (default: %(default)s)")
    parser.add_argument("--out", default="data_parallel.png", metavar="PATH", help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.devices < 1 or not 0 <= args.process < args.processes:
        parser.error("--devices: at least 1; --process: from 0, below --processes")
    if (args.coordinator is None) != (args.processes == 1):
        parser.error("--coordinator: its address, if and only if there are several processes")
    return args


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    jax.config.update("jax_num_cpu_devices", args.devices)
    if args.coordinator is not None:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    result = run(args)
    good = result.greatest() <= args.margin
    if jax.process_index() == 0:
        table = Table("training", "held-out accuracy", "bytes on each device", title="params and optimizer")
        for name, training in result.trainings.items():
            table.add_row(name, f"{training.held_out:.4f}", f"{training.size:,}")
        Console().print(table)
        with rc_context(STYLE):
            picture(result, args.margin).savefig(args.out)
        print(
            f"the losses of all steps differ by at most {result.greatest():.1e} from those of one device, "
            f"allowed are {args.margin:g}; picture in {args.out}"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
