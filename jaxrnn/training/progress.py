"""A progress line on the terminal during training, and nothing where there is no terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, dict[str, np.ndarray]], None]


@contextlib.contextmanager
def on_screen(total: int | None, show: bool | Console | None) -> Iterator[Report]:
    """Gives `report(text, steps done, metrics)`, which draws if `show` is true or a console, or None on a terminal."""
    console = show if isinstance(show, Console) else Console()
    visible = show if isinstance(show, bool) else console.is_terminal
    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        TextColumn("{task.completed} steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not visible) as bar:
        task = bar.add_task("compiling", total=total)
        begun: list[tuple[float, int]] = []

        def report(text, done, metrics):
            if not visible:
                return
            now = time.perf_counter()
            begun.append((now, done)) if not begun else None
            # The first call compiles, so the rate counts from its end.
            seconds, steps = now - begun[0][0], done - begun[0][1]
            rate = f"  {steps / seconds:,.0f} steps/s" if steps and seconds > 0 else ""
            shown = "  ".join(f"{name} {_short(value)}" for name, value in metrics.items())
            bar.update(task, completed=done, description=f"{text}  {shown}{rate}")

        yield report


def _short(value: np.ndarray) -> str:
    """The text of a number, or of the range over members."""
    if np.ndim(value) == 0:
        return f"{float(value):.4g}"
    if np.isnan(value).all():
        return "nan"
    return f"{np.nanmin(value):.4g}…{np.nanmax(value):.4g}"
