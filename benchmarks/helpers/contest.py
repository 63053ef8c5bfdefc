"""What the benchmarks share: their arguments, the machine that they name, interleaved timing, what `--out` writes.

Peers that are not installed, and our kernels where there are none, are left out and named as absent. Linux only, and on
a machine that does nothing else: torch's threads wait for each other by spinning, and one that is held up holds up all.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn.analysis import STYLE
from jaxrnn.engines.cpu import library as native

PEERS = {name: [name] for name in ("torch", "onnxruntime", "keras", "flax", "haiku", "equinox")}  # what each imports
PEERS["onnxruntime"] += ["onnx"]
PEERS |= {name: [name, "torch"] for name in ("transformers", "mlstm_kernels")}
PACKAGES = ("jax", "jaxlib", "torch", "onnxruntime", "keras", "flax", "dm-haiku", "equinox", "optax", "numpy")
PACKAGES += ("transformers", "mlstm_kernels")
REST = 0.1  # seconds before a turn, in which the threads of the last one stop spinning (onnxruntime's after 0.04)
BLOCK = 0.03  # seconds that a timed block lasts at least
CALLS = 3  # that it has at least
PRODUCT = 2048  # rows and columns of the matrices whose product is the yardstick


# The arguments.


def parser(file: str, doc: str | None, contestants: Iterable[str]) -> argparse.ArgumentParser:
    """With the arguments that every benchmark has; `doc` is what --help says."""
    made = argparse.ArgumentParser(
        prog=Path(file).name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(contestants)
    known = ", ".join(names)
    made.add_argument(
        "--contestants", nargs="+", choices=names, default=names, metavar="NAME", help=f"ours first, of: {known}"
    )
    made.add_argument("--repeats", type=int, default=5, metavar="N", help="of which the median counts (default: 5)")
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="(default: all)")
    made.add_argument("--out", metavar="PATH", help="writes PATH.md, PATH.json and PATH.png")
    return made


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, platform: str | None = "cpu") -> argparse.Namespace:
    """The arguments, after the machine's line was printed; `contestants` are those that are here, `absent` the others.
    JAX runs on the platform, or where that is None, on the one that it finds.

    On the command line, fewer threads than CPUs start the process anew on as many CPUs, since JAX takes all it may use.
    """
    args = parser.parse_args(argv)
    cpus = sorted(os.sched_getaffinity(0))
    if args.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {args.repeats}")
    if not 1 <= args.threads <= len(cpus):
        parser.error(f"--threads: expected 1 to {len(cpus)}, the CPUs of this process, got {args.threads}")
    if args.threads < len(cpus) and argv is not None:
        parser.error("--threads: only a process of its own can run on fewer CPUs")
    if args.threads < len(cpus):
        os.sched_setaffinity(0, cpus[: args.threads])
        os.execv(sys.executable, sys.orig_argv)
    if argv is None and platform is not None:
        jax.config.update("jax_platforms", platform)
    reasons = {name: absent(name) for name in args.contestants}
    args.absent = {name: reason for name, reason in reasons.items() if reason}
    args.contestants = [name for name in args.contestants if name not in args.absent]
    if not args.contestants:
        parser.error(f"--contestants: none is here; {missing(args)}")
    args.command = shlex.join(["python", f"benchmarks/{parser.prog}", *(sys.argv[1:] if argv is None else argv)])
    args.machine = machine(args.threads)
    print(header(args), flush=True)
    return args


def absent(name: str) -> str | None:
    """Why a contestant, known by the first word of its name, is not here; None where it is."""
    first = name.split("-")[0]
    if first == "native":
        return native.absent()
    found = [importlib.util.find_spec(module) for module in PEERS.get(first, [])]
    return None if all(found) else "not installed"


def missing(args: argparse.Namespace) -> str:
    return "absent: " + "; ".join(f"{name} ({reason})" for name, reason in args.absent.items())


def machine(threads: int) -> str:
    """Date, processor, threads and versions."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    return ", ".join([day, model, f"{threads} threads", f"Python {platform.python_version()}", *versions])


def header(args: argparse.Namespace) -> str:
    return "\n\n".join([f"    {args.command}", args.machine, *([missing(args)] if args.absent else [])])


# The contest.


class Contestant(NamedTuple):
    """Somebody to be timed.

    run: does the work once, and has finished when it returns.
    read: takes what `run` returned and gives arrays, the same for all contestants; None if there is nothing to compare.
    """

    run: Callable[[], Any]
    read: Callable[[Any], Any] | None


def enter(builders: Mapping[str, Callable[..., Contestant | None]], names: list[str], *task: Any):
    """The contestants for a task; a builder gives None for what its framework does not have."""
    found = {name: builders[name](*task) for name in names}
    return {name: contestant for name, contestant in found.items() if contestant is not None}


def agree(contestants: Mapping[str, Contestant], *, calls: int = 1, tolerance: float = 1e-3) -> None:
    """Raises unless all have the same results after so many calls, within `tolerance` of the largest number."""
    results: dict[str, Any] = {}
    for name, (run, read) in contestants.items():
        for _ in range(calls - 1):
            run()
        if read is not None:
            results[name] = [np.asarray(leaf) for leaf in jax.tree.leaves(read(run()))]
    first = next(iter(results), None)
    for name, arrays in results.items():
        for array, wanted in zip(arrays, results[first], strict=True):
            np.testing.assert_allclose(
                array, wanted, tolerance, tolerance * np.abs(wanted).max(), err_msg=f"{name} against {first}"
            )


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds per call of every contestant in each of `repeats` rounds, in which they take turns.

    A turn begins with a rest, and with a call that is not timed: then the threads of others sleep, the contestant's own
    are awake, and the caches hold its arrays.
    """
    for run in runs.values():
        run()
    calls = {name: max(CALLS, math.ceil(BLOCK / seconds(run, 1))) for name, run in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            time.sleep(REST)
            run()
            found[name].append(seconds(run, calls[name]))
    return found


def seconds(run: Callable[[], Any], calls: int) -> float:
    """Per call."""
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def medians(found: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in found.items()}


def lead(times: Mapping[str, float], ours: str) -> float | None:
    """How many times as long as ours the fastest peer takes; None without any."""
    peers = [times[name] for name in times if name in PEERS]
    return min(peers) / times[ours] if peers else None


def products(threads: int) -> dict[str, Callable[[], Any]]:
    """A product of two matrices, of JAX and of torch; its rate is that of the faster one."""
    a = np.random.default_rng(0).normal(size=(PRODUCT, PRODUCT)).astype(np.float32)
    b, dot = jnp.asarray(a), jax.jit(jnp.dot)
    runs: dict[str, Callable[[], Any]] = {"product by jax": lambda: jax.block_until_ready(dot(b, b))}
    if absent("torch") is None:
        import torch

        torch.set_num_threads(threads)
        tensor = torch.from_numpy(a)
        runs["product by torch"] = lambda: torch.mm(tensor, tensor)
    return runs


# What is shown.


class Table:
    """Rows of words and numbers, printed as they come; its text is Markdown."""

    def __init__(self, *head: str):
        self.lines: list[str] = []
        print()
        self.add(*head)
        self._add("---" for _ in head)

    def add(self, *row: Any) -> None:
        """A float is shown with three digits, None as nothing."""
        self._add(show(each) for each in row)

    def _add(self, words: Iterable[str]) -> None:
        self.lines.append(f"| {' | '.join(words)} |")
        print(self.lines[-1], flush=True)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def show(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write(args: argparse.Namespace, parts: Iterable[Any], data: Any, draw: Callable[[Any], None]) -> None:
    """What --out asks for: the parts as Markdown, the data as JSON, and a figure of Matplotlib, which `draw` fills."""
    if not args.out:
        return
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([header(args), *map(str, parts)])
    Path(f"{args.out}.md").write_text(f"{text}\n", encoding="utf-8")
    origin = {"command": args.command, "machine": args.machine, "absent": args.absent}
    Path(f"{args.out}.json").write_text(json.dumps(origin | data, indent=1) + "\n", encoding="utf-8")

    from matplotlib import colormaps, rc_context
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    ten = [to_hex(color) for color in colormaps["tab10"].colors]  # contestants are more than the colours of STYLE
    with rc_context(STYLE | {"axes.prop_cycle": f"cycler('color', {ten})"}):
        figure = Figure(figsize=(12, 6))
        draw(figure)
        half = args.machine.find(", Python")
        figure.supxlabel(f"{args.command}\n{args.machine[:half]}\n{args.machine[half + 2 :]}", fontsize=7)
        figure.savefig(f"{args.out}.png")


def bars(axes: Any, labels: list[str], heights: Mapping[str, list[float]], **settings: Any) -> None:
    """A group of bars for each label, in it one of each name, in the colour that the name has in every plot."""
    shown = [(k, name, values) for k, (name, values) in enumerate(heights.items()) if np.isfinite(values).any()]
    width = 0.8 / len(shown)
    for place, (k, name, values) in enumerate(shown):
        axes.bar(np.arange(len(labels)) + place * width, values, width, label=name, color=f"C{k}")
    crowded = len(labels) * max(len(line) for label in labels for line in label.split("\n")) > 110
    turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(np.arange(len(labels)) + 0.4 - width / 2, labels, fontsize=7, **turned)
    axes.set(**settings)
    plain_ticks(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)


def plain_ticks(axes: Any) -> None:
    """1, 2, 5, 10, 20 up a logarithmic axis, and no powers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:g}")
