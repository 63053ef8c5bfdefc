"""What does one step cost that is called from Python, as a stream needs it?

    python benchmarks/streaming.py
    python benchmarks/streaming.py --synchronous                # JAX without its asynchronous dispatch
    python benchmarks/streaming.py --cells lstm --units 64 --repeats 9

A batch of 1 and 32 inputs; every call takes the state that the last one gave, and has finished before the next begins.
`native` and `xla` are a jitted `jaxrnn.step`. `empty` is a jitted function of the same arguments that gives the state
back as it is: what JAX itself takes for a call. torch runs its LSTMCell, GRUCell and RNNCell under `no_grad`,
onnxruntime a model of one step. After eight steps the outputs of all must be equal.

Printed are microseconds, how many times as long as an empty call ours takes, and how many times as long as ours the
fastest peer takes.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import contest, peers
from helpers.contest import Contestant, Table

import jaxrnn

INPUTS = 32


def in_jax(make_step):
    """`make_step(cell)` gives a function (params, carry, x) -> (carry, y)."""

    def build(cell: Any, params: Any, x: np.ndarray, threads: int) -> Contestant:
        params, x = jax.tree.map(jnp.asarray, (params, x))
        step, carry = jax.jit(make_step(cell), keep_unused=True), cell.initial_carry(params, (1,))

        def run():
            nonlocal carry
            carry, y = step(params, carry, x)
            return y.block_until_ready()

        return Contestant(run, None if make_step is nothing else np.asarray)

    return build


def nothing(cell: Any):
    return lambda params, carry, x: (carry, carry[0])


def ours(implementation: str):
    def make_step(cell):
        return lambda params, carry, x: jaxrnn.step(cell, params, carry, x, implementation=implementation)

    return make_step


def torch(cell: Any, params: Any, x: np.ndarray, threads: int) -> Contestant:
    import torch

    torch.set_num_threads(threads)
    kinds = {jaxrnn.LSTM: torch.nn.LSTMCell, jaxrnn.GRU: torch.nn.GRUCell, jaxrnn.Elman: torch.nn.RNNCell}
    module = kinds[type(cell)](cell.input_size, cell.hidden_size)
    module.load_state_dict(jaxrnn.convert.to_torch(cell, params, module=module))
    tensor, state = torch.from_numpy(x), None

    def run():
        nonlocal state
        with torch.no_grad():
            state = module(tensor, state)
        return state[0] if isinstance(state, tuple) else state

    return Contestant(run, np.asarray)


def onnxruntime(cell: Any, params: Any, x: np.ndarray, threads: int) -> Contestant:
    session = peers.onnx_session(cell, params, threads, initial_states=True)
    inputs = [each.name for each in session.get_inputs() if each.name != "X"]
    outputs = ["Y", *(name.replace("initial", "final") for name in inputs)]
    fed = {"X": x[None]} | {name: np.zeros((1, 1, cell.hidden_size), np.float32) for name in inputs}

    def run():
        y, *state = session.run(outputs, fed)
        fed.update(zip(inputs, state, strict=True))
        return y

    return Contestant(run, lambda y: y[0])


CONTESTANTS = {
    "native": in_jax(ours("native")),
    "xla": in_jax(ours("xla")),
    "empty": in_jax(nothing),
    "torch": torch,
    "onnxruntime": onnxruntime,
}


def main(argv: list[str] | None = None) -> int:
    parser = contest.parser(__file__, __doc__, CONTESTANTS)
    parser.add_argument("--cells", nargs="+", choices=peers.CELLS, default=list(peers.CELLS))
    parser.add_argument("--units", nargs="+", type=int, default=[64, 256, 512], metavar="H")
    parser.add_argument("--synchronous", action="store_true", help="JAX computes in the thread that calls")
    args = contest.parse(parser, argv)
    if args.synchronous:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    names, rows = args.contestants, []
    table = Table("cell, µs", "H", *names, f"{names[0]} / empty", f"fastest peer / {names[0]}")
    for name in args.cells:
        for units in args.units:
            cell = peers.CELLS[name](INPUTS, units)
            x = np.random.default_rng(0).normal(size=(1, INPUTS)).astype(np.float32)
            contestants = contest.enter(CONTESTANTS, names, cell, peers.draw(cell, units), x, args.threads)
            contest.agree(contestants, calls=8)
            rounds = contest.interleaved({name: each.run for name, each in contestants.items()}, args.repeats)
            times = contest.medians(rounds)
            row = {"cell": name, "units": units, "us": {name: 1e6 * value for name, value in times.items()}}
            row |= {"lead": contest.lead(times, names[0]), "rounds": rounds}
            rows.append(row)
            calls = times[names[0]] / times["empty"] if "empty" in times else None
            table.add(name, units, *row["us"].values(), calls, row["lead"])

    def draw(figure):
        heights = {name: [row["us"][name] for row in rows] for name in names}
        labels = [f"{row['cell']}\n{row['units']}" for row in rows]
        mode = "synchronous dispatch" if args.synchronous else "asynchronous dispatch, the default"
        contest.bars(figure.subplots(), labels, heights, ylabel="µs of a step", title=f"JAX with {mode}")

    contest.write(args, [table], {"synchronous": args.synchronous, "rows": rows}, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
