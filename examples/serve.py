"""A streaming server: many sessions of one recurrent network, each with its own carry, answered in one batch.

A session is a connection: the client sends x of one step, D float32 numbers, and gets y of that step, O numbers, before
it sends the next. Sessions come and go as they like.

Server: one carry has a row, a slot, for each of as many sessions as there may be at once. A batch begins when every
session has sent its next step, or `--patience` milliseconds after the first one did. It is `jaxrnn.scan` over one step
of all slots: `mask` says which sessions have sent something, and the carries of the others stay as they are; `reset`
says which slots have a new session since their last step, and these start from a fresh carry, whatever the slot held
before. The carry is donated: it stays where it is in memory. When all slots are taken, a new session waits for one.

Comparison: the same server with a carry for each session and one call of `jaxrnn.step` for each request. The weights
are then read for every session anew, and in the batch once for all of them. Model and sequences are random; the model
is two layers of a GRU and a linear layer. Server and clients share a process, so that the times include both.

Every answer is compared with what `jaxrnn.scan` computes of the whole sequence. Latencies are those that the clients
see. Each way runs a few times, in turn, and the run with the highest throughput counts.

Exit status: 0 if the batch answers at least `--margin` times as many steps in a second, 1 if not or if an answer
differs; with `--quick` the speed is not judged.

Server and clients by themselves, here or on two machines:

    python examples/serve.py --serve 8765
    python examples/serve.py --connect localhost:8765

What it needs beside the package: pip install -e ".[plot]"
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import jax
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import jaxrnn
from jaxrnn import GRU, Cell, Linear, Stack
from jaxrnn.analysis import STYLE
from jaxrnn.training import predict
from jaxrnn.typing import PyTree

INPUTS, OUTPUTS = 16, 16  # numbers of a request and of an answer
NUMBER = np.dtype("<f4")  # as they are sent
BATCH, CALLS = "one batch of all sessions", "one call for each session"


class Sessions(Protocol):
    """The sessions of a server. `step` answers one request of the session that `enter` returned."""

    async def enter(self) -> int: ...

    async def step(self, session: int, x: np.ndarray) -> np.ndarray: ...

    def leave(self, session: int) -> None: ...

    async def work(self) -> None:
        """Runs as long as the server."""
        ...


class Request(NamedTuple):
    """The x of a step, and where its y is awaited."""

    x: np.ndarray
    answer: asyncio.Future


class Batched:
    """As many sessions as there are slots, each a row of one carry; requests are computed together."""

    def __init__(self, model: Cell, params: PyTree, slots: int, thread: ThreadPoolExecutor, patience: float):
        def advance(params, carry, xs, sent, new):
            carry, ys = jaxrnn.scan(model, params, carry, xs[None], mask=sent[None], reset=new[None])
            return carry, ys[0]

        self.thread, self.params, self.slots, self.patience = thread, params, slots, patience
        self.entered = self.batches = 0
        self.carry = model.initial_carry(params, (slots,))
        self.new = np.ones(slots, bool)
        self.free: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(slots):
            self.free.put_nowait(slot)
        self.waiting: dict[int, Request] = {}
        self.first, self.every = asyncio.Event(), asyncio.Event()  # set while one session, or every, has sent its step
        flags = np.zeros(slots, bool)
        xs = np.zeros((slots, INPUTS), np.float32)
        self.advance = jax.jit(advance, donate_argnums=1).lower(params, self.carry, xs, flags, flags).compile()

    async def enter(self) -> int:
        slot = await self.free.get()
        self.new[slot] = True
        self.entered += 1
        return slot

    async def step(self, session: int, x: np.ndarray) -> np.ndarray:
        answer = asyncio.get_running_loop().create_future()
        self.waiting[session] = Request(x, answer)
        self.tell()
        return await answer

    def leave(self, session: int) -> None:
        self.waiting.pop(session, None)
        self.entered -= 1
        self.free.put_nowait(session)
        self.tell()

    def tell(self) -> None:
        for event, wanted in (self.first, 1), (self.every, max(self.entered, 1)):
            (event.set if len(self.waiting) >= wanted else event.clear)()

    async def work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self.first.wait()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.every.wait(), self.patience)
            batch, self.waiting = self.waiting, {}
            self.tell()
            xs, sent = np.zeros((self.slots, INPUTS), np.float32), np.zeros(self.slots, bool)
            for slot, request in batch.items():
                xs[slot], sent[slot] = request.x, True
            new, self.new = self.new, self.new & ~sent
            computed = loop.run_in_executor(self.thread, self.compute, xs, sent, new)
            (ys,) = await asyncio.gather(computed, return_exceptions=True)
            for slot, (_, answer) in batch.items():
                if answer.done():
                    continue  # the session was cancelled
                if isinstance(ys, BaseException):
                    answer.set_exception(ys)
                else:
                    answer.set_result(ys[slot])

    def compute(self, xs: np.ndarray, sent: np.ndarray, new: np.ndarray) -> np.ndarray:
        """The y of every slot; one that has not sent is not reset either."""
        self.carry, ys = self.advance(self.params, self.carry, xs, sent, new)
        self.batches += 1
        return np.asarray(ys)


class Separate:
    """A carry for each session; each request is computed by itself."""

    def __init__(self, model: Cell, params: PyTree, thread: ThreadPoolExecutor):
        def advance(params, carry, x):
            return jaxrnn.step(model, params, carry, x)

        self.thread, self.params = thread, params
        self.fresh: Callable[[], PyTree] = lambda: model.initial_carry(params)
        self.carries: dict[int, PyTree] = {}
        self.entered = 0
        x = np.zeros(INPUTS, np.float32)
        self.advance = jax.jit(advance, donate_argnums=1).lower(params, self.fresh(), x).compile()

    async def enter(self) -> int:
        self.entered += 1
        self.carries[self.entered] = self.fresh()
        return self.entered

    async def step(self, session: int, x: np.ndarray) -> np.ndarray:
        return await asyncio.get_running_loop().run_in_executor(self.thread, self.compute, session, x)

    def leave(self, session: int) -> None:
        del self.carries[session]

    async def work(self) -> None:
        pass

    def compute(self, session: int, x: np.ndarray) -> np.ndarray:
        self.carries[session], y = self.advance(self.params, self.carries[session], x)
        return np.asarray(y)


async def read(reader: asyncio.StreamReader, size: int) -> np.ndarray | None:
    """So many numbers, or None where the other side has closed the connection."""
    try:
        return np.frombuffer(await reader.readexactly(size * NUMBER.itemsize), NUMBER)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


async def close(writer: asyncio.StreamWriter) -> None:
    """Ends a connection, also one that the other side has ended."""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(sessions: Sessions, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[int]:
    """Serves `sessions`; the value is the port."""

    handling: set[asyncio.Task] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handling.add(task)
        try:
            await answer(reader, writer)
        except Exception:  # which ends this session and no other
            logging.exception("a session ended with an error")
        finally:
            await close(writer)
            handling.discard(task)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = await sessions.enter()
        try:
            while (x := await read(reader, INPUTS)) is not None:
                writer.write((await sessions.step(session, x)).astype(NUMBER).tobytes())
                await writer.drain()
        except ConnectionError:
            pass  # the client left without waiting for its answer
        finally:
            sessions.leave(session)

    server, worker = await asyncio.start_server(handle, host, port), asyncio.create_task(sessions.work())
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        rest = [worker, *handling]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


class Answers(NamedTuple):
    """Of one session, ys (T, O), and the seconds that each was waited for, (T,)."""

    ys: np.ndarray
    seconds: np.ndarray


async def session(host: str, port: int, xs: np.ndarray) -> Answers:
    """A client: sends the steps of xs (T, D) one by one, each after the answer to the one before."""
    reader, writer = await asyncio.open_connection(host, port)
    ys, seconds = [], []
    try:
        for x in xs:
            begun = time.perf_counter()
            writer.write(x.astype(NUMBER).tobytes())
            y = await read(reader, OUTPUTS)
            if y is None:
                raise ConnectionError("the server has closed the connection")
            seconds.append(time.perf_counter() - begun)
            ys.append(y)
    finally:
        await close(writer)
    return Answers(np.stack(ys), np.array(seconds))


class Run(NamedTuple):
    """The latencies of all steps, in seconds, and the steps answered in a second."""

    latencies: np.ndarray
    throughput: float


async def crowd(host: str, port: int, sequences: list[np.ndarray], at_once: int, expected: list[np.ndarray]) -> Run:
    """One session for each sequence, so many at once: when one goes, the next comes."""
    answers: dict[int, Answers] = {}
    left = iter(range(len(sequences)))

    async def one_after_another():
        for k in left:
            answers[k] = await session(host, port, sequences[k])

    begun = time.perf_counter()
    await asyncio.gather(*(one_after_another() for _ in range(at_once)))
    seconds = time.perf_counter() - begun
    for k, ys in enumerate(expected):
        np.testing.assert_allclose(answers[k].ys, ys, rtol=0, atol=1e-4)
    latencies = np.concatenate([each.seconds for each in answers.values()])
    return Run(latencies, len(latencies) / seconds)


def network(args: argparse.Namespace) -> tuple[Cell, PyTree]:
    """The model, and params that server and clients draw alike."""
    size = 32 if args.quick else args.size
    model = Stack(GRU(INPUTS, size), GRU(size, size), Linear(size, OUTPUTS))
    return model, model.init(jax.random.key(args.seed))


def sequences(args: argparse.Namespace) -> list[np.ndarray]:
    """Of random lengths, (T, D)."""
    rng = np.random.default_rng(args.seed)
    least, most = (2, 6) if args.quick else (5, 30)
    count = 2 * args.sessions + 1
    return [rng.normal(size=(length, INPUTS)).astype(np.float32) for length in rng.integers(least, most, count)]


def run(args: argparse.Namespace) -> dict[str, Run]:
    """The best run of both ways, in this process."""
    (model, params), given = network(args), sequences(args)
    expected = predict(model, params, given)
    ways: dict[str, Callable[[ThreadPoolExecutor], Sessions]] = {
        BATCH: lambda thread: Batched(model, params, args.sessions, thread, args.patience / 1e3),
        CALLS: lambda thread: Separate(model, params, thread),
    }

    async def measured(way):
        with ThreadPoolExecutor(1) as thread:
            async with serving(way(thread)) as port:
                return await crowd("127.0.0.1", port, given, args.sessions, expected)

    runs = {name: [] for name in ways}
    for _ in range(1 if args.quick else 3):
        for name, way in ways.items():
            runs[name].append(asyncio.run(measured(way)))
    return {name: max(each, key=lambda run: run.throughput) for name, each in runs.items()}


def serve(args: argparse.Namespace) -> None:
    """The server alone, until it is interrupted."""
    model, params = network(args)

    async def until_interrupted():
        with ThreadPoolExecutor(1) as thread:
            sessions = Batched(model, params, args.sessions, thread, args.patience / 1e3)
            async with serving(sessions, "0.0.0.0", args.serve) as port:
                print(f"serving {args.sessions} sessions at once on port {port}", flush=True)
                await asyncio.Event().wait()

    asyncio.run(until_interrupted())


def connect(args: argparse.Namespace) -> Run:
    """The clients alone."""
    (model, params), given = network(args), sequences(args)
    host, _, port = args.connect.rpartition(":")
    return asyncio.run(crowd(host, int(port), given, args.sessions, predict(model, params, given)))


def table(runs: dict[str, Run]) -> Table:
    found = Table("", "latency, median ms", "99th percentile, ms", "steps per second")
    for name, (latencies, throughput) in runs.items():
        median, most = 1e3 * np.quantile(latencies, (0.5, 0.99))
        found.add_row(name, f"{median:.2f}", f"{most:.2f}", f"{throughput:,.0f}")
    return found


def picture(runs: dict[str, Run], sessions: int) -> Figure:
    """The part of the answers that came within a time, and the throughput."""
    figure = Figure(figsize=(7, 2.6))
    axes, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    colors = {BATCH: "C0", CALLS: "0.6"}
    for name, each in runs.items():
        axes.ecdf(1e3 * each.latencies, color=colors[name])
    axes.set(xscale="log", xlabel="latency, milliseconds", ylabel="part of the steps", title=f"{sessions} sessions")
    values = [runs[name].throughput for name in colors]
    drawn = bars.barh([textwrap.fill(name, 14) for name in colors], values, color=list(colors.values()), height=0.6)
    bars.bar_label(drawn, [f"{value:,.0f}" for value in values], padding=3)
    bars.invert_yaxis()
    bars.margins(x=0.2)
    bars.set(xlabel="steps per second")
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and short sequences, for a first look")
    parser.add_argument("--sessions", type=int, default=64, help="sessions at once (default: %(default)s)")
    parser.add_argument(
        "--patience", type=float, default=10.0, help="milliseconds for a full batch (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, default=1024, help="hidden units of a layer (default: %(default)s)")
    parser.add_argument("--serve", type=int, metavar="PORT", help="only serve, on this port; 0 for any")
    parser.add_argument("--connect", metavar="HOST:PORT", help="only connect to a server, of the same model and seed")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and sequences (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=2.0, help="wanted ratio of throughputs (default: %(default)s)")
    parser.add_argument("--out", default="serve.png", metavar="PATH", help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.sessions < 1:
        parser.error(f"argument --sessions: expected at least 1, got {args.sessions}")
    if args.connect is not None and not args.connect.rpartition(":")[2].isdecimal():
        parser.error(f"argument --connect: expected HOST:PORT, got {args.connect!r}")
    return args


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    if args.serve is not None:
        serve(args)
        return 0
    if args.connect is not None:
        Console().print(table({args.connect: connect(args)}))
        print("every answer is that of the whole sequence")
        return 0
    runs = run(args)
    Console().print(table(runs))
    with rc_context(STYLE):
        picture(runs, args.sessions).savefig(args.out)
    if args.quick:
        print(f"every answer is right; too small for its speed to be judged; picture in {args.out}")
        return 0
    ratio = runs[BATCH].throughput / runs[CALLS].throughput
    print(
        f"every answer is right; the batch answers {ratio:.1f} times as many steps in a second as calls for each "
        f"session, wanted at least {args.margin}; picture in {args.out}"
    )
    return 0 if ratio >= args.margin else 1


if __name__ == "__main__":
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # the calls have a thread of their own
    sys.exit(main())
