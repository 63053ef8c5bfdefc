"""What does one step of each cell cost beyond a call of JAX?

    python benchmarks/step.py
    python benchmarks/step.py --cells GatedDeltaNet KDA --size 128 --synchronous

A step is a jitted `jaxrnn.step` of one sequence with 32 inputs: matrices of 4 heads with K = V = 64, other cells with
64 units; RGLRU has 64 inputs, S6 and S4D 64 channels of 16 states. Beside it stand jitted functions of the same arrays:
`empty` returns the input, `state` also multiplies the state by a number, `both` also returns an array as long as y, and
`read` also multiplies the input by every weight matrix, as a step must. With `--synchronous` JAX computes in the thread
that calls, which `jaxrnn.step` recommends for streams; otherwise it hands every program of more than 1000 operations to
another thread.

Printed are microseconds, and what a step takes beyond the last three.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from helpers import contest
from helpers.contest import Table

import jaxrnn

INPUTS, HEADS, STATES = 32, 4, 16
MATRIX = ("LinearAttention", "RetNet", "GLA", "HGRN2", "Mamba2", "MLSTM", "DeltaNet", "GatedDeltaNet", "KDA", "RWKV7")
CHANNELS = {"S6": (STATES,), "S4D": (STATES,), "RGLRU": ()}
UNITS = ("Elman", "GRU", "LSTM", "MinGRU", "MinLSTM", "HGRN", "SRU", "QRNN", "LRU", "S5")
CELLS = *MATRIX, *CHANNELS, *UNITS
CALLS = ("step", "empty", "state", "both", "read")


def make(name: str, size: int) -> Any:
    cell = getattr(jaxrnn, name)
    if name in MATRIX:
        return cell(INPUTS, HEADS, size, size)
    return cell(size, *CHANNELS[name]) if name in CHANNELS else cell(INPUTS, size)


def calls(cell: Any) -> dict[str, Callable[..., Any]]:
    """The functions of (params, carry, x) that are compared."""

    def state(params, carry, x):
        return jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else leaf * 1.5, carry)

    def both(params, carry, x):
        new = state(params, carry, x)
        return new, jnp.resize(jax.tree.leaves(carry)[0].real, cell.output_size) + x[0]

    def read(params, carry, x):
        weights = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
        products = [(x if len(w) == len(x) else jnp.full(len(w), x[0])) @ w for w in weights]
        return state(params, carry, x), products

    step, empty = (lambda *args: jaxrnn.step(cell, *args)), (lambda params, carry, x: x)
    return dict(zip(CALLS, (step, empty, state, both, read), strict=True))


def run(function: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
    compiled = jax.jit(function, keep_unused=True)
    return lambda: jax.block_until_ready(compiled(*arrays))


def main(argv: list[str] | None = None) -> int:
    parser = contest.parser(__file__, __doc__, CALLS)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--size", type=int, default=64, metavar="N", help="of keys and values, units or channels")
    parser.add_argument("--synchronous", action="store_true", help="JAX computes in the thread that calls")
    args = contest.parse(parser, argv)
    if args.synchronous:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    rows, table = [], Table("cell, µs", *args.contestants, "step − state", "step − both", "step − read")
    for name in args.cells:
        cell = make(name, args.size)
        params, x = cell.init(jax.random.key(0)), jnp.ones(cell.input_size)
        carry = jax.tree.map(jnp.array, cell.initial_carry(params, ()))
        runs = {each: run(calls(cell)[each], params, carry, x) for each in args.contestants}
        times = contest.medians(contest.interleaved(runs, args.repeats))
        us = {each: 1e6 * value for each, value in times.items()}
        beyond = [us["step"] - us[each] if {"step", each} <= us.keys() else None for each in ("state", "both", "read")]
        rows.append({"cell": name, "us": us})
        table.add(name, *us.values(), *beyond)

    def draw(figure):
        heights = {each: [row["us"][each] for row in rows] for each in args.contestants}
        mode = "synchronous dispatch" if args.synchronous else "asynchronous dispatch, the default"
        contest.bars(figure.subplots(), [row["cell"] for row in rows], heights, ylabel="µs of a step", title=mode)

    contest.write(args, [table], {"synchronous": args.synchronous, "rows": rows}, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
