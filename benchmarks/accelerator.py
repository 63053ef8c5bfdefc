"""How fast is every cell on the GPU or TPU that is here, by each implementation that runs there? And is it right?

    python benchmarks/accelerator.py --out accelerator
    python benchmarks/accelerator.py --shapes 512,64,512,512 --dtypes bfloat16 --cells LSTM GRU
    JAX_PLATFORMS=cpu python benchmarks/accelerator.py --quick     # small, to try it where there is none

First the contract: outputs and gradients of all weights, with lengths and resets, by every implementation on the device
equal those of the loop on the CPU, with products in full float32. Then the times of the forward pass and of a training
step (the gradient of all weights) of one layer, of shape T,B,D,H: steps, rows, inputs, units. Matrix cells have
heads with 64 keys and values each, S6 and S4D 16 states for each input.

Printed are milliseconds; the implementation that `None` takes there, which should be the fastest; the rate of a large
product of matrices in the same dtype, and the share of it that the fastest reaches, counting products alone. PyTorch
joins with its layers by cuDNN, where it is installed and sees the device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import contest
from helpers.contest import Table

import jaxrnn

SHAPES, QUICK = ("128,32,128,128", "512,64,512,512", "2048,8,256,256"), "5,3,4,64"
GATED: dict[str, Callable[[int, int], jaxrnn.Cell]] = {
    "LSTM": lambda d, h: jaxrnn.LSTM(d, h),
    "LSTM peephole": lambda d, h: jaxrnn.LSTM(d, h, peephole=True),
    "GRU": lambda d, h: jaxrnn.GRU(d, h),
    "Elman": lambda d, h: jaxrnn.Elman(d, h),
    "MGU": lambda d, h: jaxrnn.MGU(d, h),
    "SLSTM": lambda d, h: jaxrnn.SLSTM(d, h, heads=4),
}
CELLS: dict[str, Callable[[int, int], jaxrnn.Cell]] = GATED | {
    "MinGRU": lambda d, h: jaxrnn.MinGRU(d, h),
    "LRU": lambda d, h: jaxrnn.LRU(d, h),
    "S6": lambda d, h: jaxrnn.S6(d, 16),
    "S4D": lambda d, h: jaxrnn.S4D(d, 16),
    "GLA": lambda d, h: jaxrnn.GLA(d, max(1, h // 64), 64, 64),
    "GatedDeltaNet": lambda d, h: jaxrnn.GatedDeltaNet(d, max(1, h // 64), 64, 64),
}
PEER = {"LSTM": "LSTM", "GRU": "GRU", "Elman": "RNN"}  # in torch.nn
CONTESTANTS = ("xla", "associative", "chunked", "pallas", "torch")


def programs(cell: jaxrnn.Cell, name: str | None, **options: Any) -> dict[str, Callable[..., Any]]:
    """The forward pass and a training step, functions of params and xs."""

    def outputs(params, xs):
        return jaxrnn.scan(cell, params, None, xs, implementation=name, **options)[1]

    def loss(params, xs):
        return jnp.mean(outputs(params, xs).astype(jnp.float32) ** 2)

    return {"forward": outputs, "training": jax.grad(loss)}


def supported(cell: jaxrnn.Cell, params: Any, xs: jax.Array, names: list[str]) -> list[str]:
    """The implementations that the cell has; in interpreters none is measured."""
    found = []
    for name in names:
        if name == "torch" or (name == "pallas" and jax.default_backend() == "cpu"):
            continue
        try:
            jax.eval_shape(programs(cell, name)["forward"], params, xs)
        except ValueError:
            continue
        found.append(name)
    return found


def check(name: str, names: list[str]) -> float:
    """The largest difference between the device's numbers and the loop's on the CPU, in parts of the largest number."""
    cell, rng = CELLS[name](8, 64), np.random.default_rng(0)
    host = jax.devices("cpu")[0]
    with jax.default_device(host):
        params, xs = cell.init(jax.random.key(0)), jnp.asarray(rng.normal(size=(70, 3, 8)), jnp.float32)
    flags = {"lengths": np.array([70, 31, 0]), "reset": rng.random((70, 3)) < 0.1}

    def results(device, implementation):
        run = programs(cell, implementation, **flags)
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            return [jax.jit(each)(*jax.device_put((params, xs), device)) for each in run.values()]

    expected, worst = results(host, "xla"), 0.0
    for implementation in supported(cell, params, xs, names):
        found = results(jax.devices()[0], implementation)
        for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            ours, theirs = np.asarray(ours), np.asarray(theirs)
            worst = max(worst, float(np.abs(ours - theirs).max() / max(1e-30, np.abs(theirs).max())))
    return worst


def by_torch(name: str, shape: tuple[int, ...], dtype: str) -> dict[str, Callable[[], Any]]:
    """The same two passes of PyTorch's layer, where it has it and sees a GPU."""
    if name not in PEER or contest.absent("torch") is not None:
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    steps, rows, inputs, units = shape
    layer = getattr(torch.nn, PEER[name])(inputs, units).to("cuda", getattr(torch, dtype))
    xs = torch.randn(steps, rows, inputs, device="cuda", dtype=getattr(torch, dtype))

    def forward():
        with torch.no_grad():
            layer(xs)
        torch.cuda.synchronize()

    def training():
        layer.zero_grad()
        layer(xs)[0].float().square().mean().backward()
        torch.cuda.synchronize()

    return {"forward": forward, "training": training}


def rate(dtype: str, size: int, repeats: int) -> float:
    """Operations a second of a product of two square matrices."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.dot)
    runs = {"product": lambda: jax.block_until_ready(product(a, a))}
    return 2 * size**3 / contest.medians(contest.interleaved(runs, repeats))["product"]


def main(argv: list[str] | None = None) -> int:
    parser = contest.parser(__file__, __doc__, CONTESTANTS)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="T,B,D,H")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--quick", action="store_true", help="one small shape, and a small product")
    args = contest.parse(parser, argv, platform=None)
    device = jax.devices()[0]
    print(f"\non {device.platform}: {device.device_kind}")
    names, shapes = args.contestants, [QUICK] if args.quick else args.shapes

    contract = Table("cell", "largest difference from the loop on the CPU")
    differences = {name: check(name, names) for name in args.cells}
    for name, difference in differences.items():
        contract.add(name, f"{difference:.1e}")
    wrong = {name for name, difference in differences.items() if not difference < 1e-3}

    columns = "None takes", "share of the product's rate"
    table, rows = Table("T,B,D,H", "dtype", "cell", "pass", *(f"{name}, ms" for name in names), *columns), []
    for dtype in args.dtypes:
        top = rate(dtype, 64 if args.quick else 8192, args.repeats)
        for text in shapes:
            steps, batch, inputs, units = shape = tuple(map(int, text.split(",")))
            for name in args.cells:
                cell = CELLS[name](inputs, units)
                params = cell.init(jax.random.key(0), jnp.dtype(dtype))
                xs = jax.random.normal(jax.random.key(1), (steps, batch, inputs), dtype)
                ours, torch = supported(cell, params, xs, names), by_torch(name, shape, dtype)
                chosen = jaxrnn.explain(cell, params, None, xs).calls[0].implementation
                weights = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim >= 2)
                for part, times_of_forward in (("forward", 1), ("training", 3)):

                    def run(implementation, cell=cell, part=part, arrays=(params, xs)):
                        compiled = jax.jit(programs(cell, implementation)[part])
                        return lambda: jax.block_until_ready(compiled(*arrays))

                    runs = {each: run(each) for each in ours}
                    runs |= {"torch": torch[part]} if "torch" in names and torch else {}
                    times = contest.medians(contest.interleaved(runs, args.repeats))
                    milliseconds = {each: 1e3 * value for each, value in times.items()}
                    best = min(times[each] for each in ours)
                    share = 2 * times_of_forward * steps * batch * weights / best / top
                    rows.append({"shape": text, "dtype": dtype, "cell": name, "pass": part, "ms": milliseconds})
                    shown = (milliseconds.get(each) for each in names)
                    table.add(text, dtype, name, part, *shown, chosen, f"{100 * share:.2g}%")

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        heights = {name: [row["ms"].get(name, np.nan) for row in rows] for name in names}
        labels = [f"{row['cell']}\n{row['dtype']}\n{row['pass']}" for row in rows]
        contest.bars(axes, labels, heights, ylabel="ms", yscale="log", title=device.device_kind)

    data = {"device": device.device_kind, "differences": differences, "rows": rows}
    contest.write(args, [f"On {device.platform}: {device.device_kind}", contract, table], data, draw)
    if wrong:
        print(f"\nnot the numbers of the loop: {', '.join(sorted(wrong))}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
