"""One layer against its peers on the CPU: forward, and forward and backward with the gradients of all weights.

    python benchmarks/cells.py                                  # every cell, shape and peer that is installed
    python benchmarks/cells.py --cells lstm gru --shapes 32,128,64,128 --repeats 9

Every contestant gets the same weights, by `jaxrnn.convert`, and the same xs, each in the layout that it likes best. They
run in this process with the same number of threads, one after another, again and again; the medians count. Before that,
outputs and the norm of the weights' gradients must agree. Printed are milliseconds, how many times as long as ours the
peers take, and the share of the rate of a large product of matrices (2048³, the better of torch's and JAX's) that ours
reaches, counting 2 B T (D + H) G H operations forward and three times that with gradients.

`--out` writes the table (.md), the numbers (.json) and a picture (.png).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np

import jaxrnn
from jaxrnn import convert

SHAPES = ["32,128,64,128", "64,128,128,256", "16,100,256,512", "1,1000,32,64", "256,64,64,64"]
CELLS: dict[str, Callable[[int, int], jaxrnn.Cell]] = {"lstm": jaxrnn.LSTM, "gru": jaxrnn.GRU, "elman": jaxrnn.Elman}
GATES = {"lstm": 4, "gru": 3, "elman": 1}
PACKAGES = ["jax", "jaxlib", "torch", "onnxruntime", "keras", "flax", "dm-haiku", "equinox", "numpy"]

Run = Callable[[], Any]  # gives (ys as (B, T, H), the norm of the weights' gradients or None) when it has finished


class Task:
    """One cell and shape: the weights, xs (T, B, D), and the factor of every output in the loss."""

    def __init__(self, name: str, shape: str, threads: int):
        self.name, self.threads = name, threads
        self.rows, self.steps, self.inputs, self.units = map(int, shape.split(","))
        rng = np.random.default_rng(0)
        self.cell = CELLS[name](self.inputs, self.units)
        shapes = jax.eval_shape(self.cell.init, jax.random.key(0))
        self.params = jax.tree.map(lambda p: (rng.normal(size=p.shape) / self.units**0.5).astype(p.dtype), shapes)
        self.xs = rng.normal(size=(self.steps, self.rows, self.inputs)).astype(np.float32)
        self.factors = rng.normal(size=(self.steps, self.rows, self.units)).astype(np.float32)

    def operations(self, backward: bool) -> float:
        products = 2 * self.rows * self.steps * (self.inputs + self.units) * GATES[self.name] * self.units
        return products * (3 if backward else 1)


def in_jax(outputs: Callable[[Any, Any], Any], weights: Any, task: Task, backward: bool, batch_major: bool) -> Run:
    """A contestant whose `outputs(weights, xs)` is a function of JAX."""
    xs = jnp.asarray(task.xs.swapaxes(0, 1) if batch_major else task.xs)
    factors = jnp.asarray(task.factors.swapaxes(0, 1) if batch_major else task.factors)
    weights = jax.tree.map(jnp.asarray, weights)

    def loss(weights, xs):
        ys = outputs(weights, xs)
        return jnp.vdot(ys, factors), ys

    function = jax.jit(jax.value_and_grad(loss, has_aux=True) if backward else outputs)

    def run():
        result = jax.block_until_ready(function(weights, xs))
        ys, gradient = (result[0][1], result[1]) if backward else (result, None)
        return ys if batch_major else ys.swapaxes(0, 1), gradient

    def timed():
        jax.block_until_ready(function(weights, xs))

    timed.check = lambda: (np.asarray(run()[0]), norm(run()[1]))  # type: ignore[attr-defined]
    return timed


def norm(gradient: Any) -> float | None:
    """Of the matrices alone: frameworks differ in how many biases they have."""
    if gradient is None:
        return None
    return float(np.sqrt(sum((np.asarray(g, float) ** 2).sum() for g in jax.tree.leaves(gradient) if np.ndim(g) >= 2)))


def ours(implementation: str):
    def build(task: Task, backward: bool) -> Run:
        def outputs(params, xs):
            return jaxrnn.scan(task.cell, params, None, xs, implementation=implementation)[1]

        return in_jax(outputs, task.params, task, backward, False)

    return build


def torch(task: Task, backward: bool) -> Run:
    import torch

    torch.set_num_threads(task.threads)
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "elman": torch.nn.RNN}[task.name]
    module = kind(task.inputs, task.units)
    module.load_state_dict(convert.to_torch(task.cell, task.params, module=module))
    xs, factors = torch.from_numpy(task.xs), torch.from_numpy(task.factors)

    def timed():
        if not backward:
            with torch.no_grad():
                return module(xs)[0]
        module.zero_grad(set_to_none=True)
        ys = module(xs)[0]
        (ys * factors).sum().backward()
        return ys

    def check():
        ys = timed().detach().numpy().swapaxes(0, 1)
        return ys, norm([p.grad.numpy() for p in module.parameters()]) if backward else None

    timed.check = check  # type: ignore[attr-defined]
    return timed


def onnxruntime(task: Task, backward: bool) -> Run | None:
    import onnxruntime

    if backward:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    session = onnxruntime.InferenceSession(convert.to_onnx(task.cell, task.params), options, ["CPUExecutionProvider"])
    (xs,) = (each.name for each in session.get_inputs())

    def timed():
        return session.run(["Y"], {xs: task.xs})[0]

    timed.check = lambda: (timed().swapaxes(0, 1), None)  # type: ignore[attr-defined]
    return timed


def keras(task: Task, backward: bool) -> Run:
    import keras

    config, weights = convert.to_keras(task.cell, task.params)
    model = keras.Sequential.from_config(config)
    model.build((task.rows, task.steps, task.inputs))
    model.set_weights(weights)
    fixed = [each.value for each in model.non_trainable_variables]

    def outputs(weights, xs):
        return model.stateless_call(weights, fixed, xs)[0]

    return in_jax(outputs, [each.value for each in model.trainable_variables], task, backward, True)


def flax(task: Task, backward: bool) -> Run:
    module, variables = convert.to_flax(task.cell, task.params)
    return in_jax(module.apply, variables, task, backward, True)


def haiku(task: Task, backward: bool) -> Run | None:
    import haiku as hk

    if task.name != "lstm":  # its GRU resets before the product, and its simple RNN has relu
        return None

    def unroll(xs):
        core = hk.LSTM(task.units)
        return hk.dynamic_unroll(core, xs, core.initial_state(xs.shape[1]))[0]

    apply = hk.without_apply_rng(hk.transform(unroll)).apply
    return in_jax(apply, convert.to_haiku(task.cell, task.params), task, backward, False)


def equinox(task: Task, backward: bool) -> Run | None:
    import equinox as eqx

    if task.name == "elman":  # it has none
        return None
    arrays, static = eqx.partition(convert.to_equinox(task.cell, task.params), eqx.is_array)

    def outputs(arrays, xs):
        cell = eqx.combine(arrays, static)
        zeros = jnp.zeros((task.rows, task.units))
        state = (zeros, zeros) if task.name == "lstm" else zeros

        def step(state, x):
            state = jax.vmap(cell)(x, state)
            return state, state[0] if task.name == "lstm" else state

        return jax.lax.scan(step, state, xs)[1]

    return in_jax(outputs, arrays, task, backward, False)


CONTESTANTS = {
    "native": ours("native"),
    "xla": ours("xla"),
    "torch": torch,
    "onnxruntime": onnxruntime,
    "keras": keras,
    "flax": flax,
    "haiku": haiku,
    "equinox": equinox,
}


def interleaved(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, one after another in every round."""
    for run in runs.values():
        run()
    inner = {name: max(1, int(0.02 / max(seconds(run), 1e-6))) for name, run in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            for _ in range(inner[name]):
                run()
            found[name].append((time.perf_counter() - begin) / inner[name])
    return {name: 1e3 * statistics.median(each) for name, each in found.items()}


def seconds(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def product_rate(threads: int, repeats: int) -> float:
    """Operations per second of a product of matrices, 2048³."""
    a = np.random.default_rng(0).normal(size=(2048, 2048)).astype(np.float32)
    b, dot = jnp.asarray(a), jax.jit(jnp.dot)
    runs: dict[str, Run] = {"jax": lambda: jax.block_until_ready(dot(b, b))}
    try:
        import torch
    except ImportError:
        pass
    else:
        torch.set_num_threads(threads)
        tensor = torch.from_numpy(a)
        runs["torch"] = lambda: torch.mm(tensor, tensor)
    return 2 * 2048**3 / (1e-3 * min(interleaved(runs, repeats).values()))


def compete(task: Task, backward: bool, names: list[str], repeats: int) -> dict[str, float]:
    runs = {}
    for name in names:
        try:
            run = CONTESTANTS[name](task, backward)
        except ImportError:
            continue
        if run is not None:
            runs[name] = run
    results = {name: run.check() for name, run in runs.items()}  # type: ignore[attr-defined]
    first, *_ = results
    for name, (ys, gradient) in results.items():
        np.testing.assert_allclose(ys, results[first][0], 1e-3, 1e-3, err_msg=f"{name} against {first}")
        if gradient is not None:
            np.testing.assert_allclose(gradient, results[first][1], 1e-3, err_msg=f"{name} against {first}")
    return interleaved(runs, repeats)


def table(rows: list[dict], names: list[str]) -> str:
    lines = ["| cell | B,T,D,H | pass | " + " | ".join(names) + " | fastest peer / ours | share of product |"]
    lines.append("|---" * (len(names) + 5) + "|")
    for row in rows:
        times = [f"{row['ms'][name]:.2f}" if name in row["ms"] else "" for name in names]
        lines.append(
            f"| {row['cell']} | {row['shape']} | {row['pass']} | {' | '.join(times)} | {row['ratio']:.2f} | "
            f"{row['share']:.0%} |"
        )
    return "\n".join(lines)


def means(rows: list[dict], names: list[str]) -> str:
    """Geometric means over the shapes with at least 16 rows: how many times as long as ours each peer takes."""
    lines = ["| cell | pass | " + " | ".join(names[1:]) + " |", "|---" * (len(names) + 1) + "|"]
    for cell in dict.fromkeys(row["cell"] for row in rows):
        for way in dict.fromkeys(row["pass"] for row in rows):
            found = [
                row
                for row in rows
                if (row["cell"], row["pass"]) == (cell, way) and int(row["shape"].split(",")[0]) >= 16
            ]
            means = []
            for name in names[1:]:
                ratios = [row["ms"][name] / row["ms"][names[0]] for row in found if name in row["ms"]]
                means.append(f"{statistics.geometric_mean(ratios):.2f}" if ratios else "")
            if found:
                lines.append(f"| {cell} | {way} | {' | '.join(means)} |")
    return "\n".join(lines)


def machine(threads: int) -> str:
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "")
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return f"{day}, {model or platform.machine()}, {threads} threads, Python {platform.python_version()}, " + ", ".join(
        versions
    )


def picture(rows: list[dict], names: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, way in zip(figure.subplots(2, 1, sharex=True), ("forward", "forward + backward"), strict=True):
        shown = [row for row in rows if row["pass"] == way]
        width = 0.8 / len(names[1:])
        for k, name in enumerate(names[1:]):
            heights = [row["ms"].get(name, np.nan) / row["ms"][names[0]] for row in shown]
            axes.bar(np.arange(len(shown)) + k * width, heights, width, label=name)
        axes.axhline(1, color="k", lw=0.8)
        axes.set(ylabel=f"time / {names[0]}", title=way, yscale="log")
        axes.set_xticks(np.arange(len(shown)) + 0.4, [f"{row['cell']}\n{row['shape']}" for row in shown], fontsize=7)
    axes.legend(ncols=len(names))
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,T,D,H")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="ours first")
    parser.add_argument("--passes", nargs="+", choices=["forward", "backward"], default=["forward", "backward"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, metavar="PATH", help="without a suffix: PATH.md, PATH.json, PATH.png")
    args = parser.parse_args(argv)
    names, rows = args.contestants, []
    rate = product_rate(args.threads, args.repeats)
    print(machine(args.threads), f"; product of matrices {rate / 1e9:.0f} GFLOP/s", sep="")
    for cell in args.cells:
        for shape in args.shapes:
            for way in args.passes:
                task, backward = Task(cell, shape, args.threads), way == "backward"
                ms = compete(task, backward, names, args.repeats)
                own = ms[names[0]]
                peers = [value for name, value in ms.items() if name not in ("native", "xla")]
                share = task.operations(backward) / (1e-3 * own) / rate
                row = {"cell": cell, "shape": shape, "pass": "forward + backward" if backward else "forward", "ms": ms}
                rows.append(row | {"ratio": min(peers) / own if peers else float("nan"), "share": share})
                print(table(rows[-1:], names).splitlines()[-1], flush=True)
    text = f"{machine(args.threads)}; product of matrices {rate / 1e9:.0f} GFLOP/s\n\n{table(rows, names)}\n\n{means(rows, names)}\n"
    print(f"\n{means(rows, names)}")
    if args.out:
        args.out.with_suffix(".md").write_text(text)
        args.out.with_suffix(".json").write_text(json.dumps({"machine": machine(args.threads), "rows": rows}, indent=1))
        picture(rows, names, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
