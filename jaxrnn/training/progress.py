"""A line for every epoch while training runs, and on a terminal a bar below them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jaxrnn.training.history import short

Metrics = Mapping[str, np.ndarray]


class Screen(NamedTuple):
    """What training shows.

    steps: `(text, steps done, metrics)`, of the epoch that runs, on a terminal.
    epoch: `(text, metrics)`, a line that stays.
    """

    steps: Callable[[str, int, Metrics], None]
    epoch: Callable[[str, Metrics], None]


@contextlib.contextmanager
def on_screen(total: int | None, show: bool | Console | None) -> Iterator[Screen]:
    """Shows training unless `show` is False: on the standard output, or on the console given."""
    console = show if isinstance(show, Console) else Console()
    live = show is not False and console.is_terminal and not console.is_jupyter
    columns = TextColumn("{task.description}"), BarColumn(12), TimeRemainingColumn(compact=True)
    with Progress(*columns, console=console, disable=not live, transient=True) as bar:
        task = bar.add_task("compiling", total=total)
        begun: list[tuple[float, int]] = []
        last = time.perf_counter()

        def steps(text, done, metrics):
            if not live:
                return
            now = time.perf_counter()
            begun.append((now, done)) if not begun else None
            # The first call compiles, so the rate counts from its end.
            seconds, count = now - begun[0][0], done - begun[0][1]
            rate = f"  {count / seconds:,.0f} steps/s" if count and seconds > 0 else ""
            bar.update(task, completed=done, description=f"{text}  {_line(metrics)}{rate}")

        def epoch(text, metrics):
            nonlocal last
            if show is False:
                return
            now = time.perf_counter()
            line = f"{text}  {_line(metrics)}  {now - last:.1f} s"
            last = now
            if live or isinstance(show, Console):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, flush=True)

        yield Screen(steps, epoch)


def _line(metrics: Metrics) -> str:
    return "  ".join(f"{name} {short(value)}" for name, value in metrics.items())
