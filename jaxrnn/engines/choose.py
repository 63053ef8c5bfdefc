"""Which implementation of an engine runs, and why."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jax import lax

ENGINES = ("scan", "gated_scan", "linear_scan")
IMPLEMENTATIONS = ("native", "xla", "associative", "chunked", "pallas")  # the fastest that can run first

Implementation = str | Mapping[str, str] | None


class EngineCall(NamedTuple):
    """One call of an engine: what runs it, and why the other implementations do not."""

    engine: str
    cell: str
    implementation: str
    refused: dict[str, str]

    def __str__(self):
        lines = [f"{self.engine}: {self.implementation}  for {self.cell}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.refused.items()])


_recorded: contextvars.ContextVar[tuple[str, list[EngineCall]] | None] = contextvars.ContextVar(
    "recorded", default=None
)


@contextlib.contextmanager
def recording(platform: str) -> Iterator[list[EngineCall]]:
    """Collects the engine calls that are traced inside, as they would run on a platform."""
    calls: list[EngineCall] = []
    token = _recorded.set((platform, calls))
    try:
        yield calls
    finally:
        _recorded.reset(token)


def by_platform(*operands: Any, cpu: Callable[..., Any], default: Callable[..., Any]) -> Any:
    """`lax.platform_dependent`; inside `recording`, what that platform takes, alone."""
    recorded = _recorded.get()
    if recorded is None:
        return lax.platform_dependent(*operands, cpu=cpu, default=default)
    return (cpu if recorded[0] == "cpu" else default)(*operands)


def check(implementation: Implementation) -> None:
    """Raises if `implementation` names no engine or no implementation at all."""
    if isinstance(implementation, Mapping):
        for engine in implementation:
            if engine not in ENGINES:
                raise ValueError(f"implementation: expected engines among {ENGINES}, got {engine!r}")
        names = tuple(implementation.values())
    else:
        names = () if implementation is None else (implementation,)
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"implementation: expected one of {IMPLEMENTATIONS} or None, got {name!r}")


def _named(engine: str, implementation: Implementation) -> str | None:
    return implementation.get(engine) if isinstance(implementation, Mapping) else implementation


def is_free(engine: str, implementation: Implementation) -> bool:
    """Whether no implementation of `engine` is named, so that each platform may take its own."""
    return _named(engine, implementation) is None


def choose(
    engine: str,
    implementation: Implementation,
    refusals: Mapping[str, str],
    *,
    cell: object,
    elsewhere: str | None = None,
) -> tuple[str, Mapping[str, str]]:
    """The implementation of `engine` that runs, the one that was named, else the fastest; and why others do not.

    Args:
      engine: the engine's name.
      implementation: None, a name, or a mapping from engine to name.
      refusals: for each implementation that cannot run this call, the reason.
      cell: whose recurrence it is, for messages.
      elsewhere: the fastest where there is no CPU, if that is not the first.

    Raises:
      ValueError: if the named implementation cannot run this call, saying why and which can.
    """
    check(implementation)
    recorded = _recorded.get()
    on_cpu = recorded is None or recorded[0] == "cpu"
    if not on_cpu:
        refusals = {"native": "the kernels are compiled for the CPU"} | dict(refusals)
    name = _named(engine, implementation)
    supported = [each for each in IMPLEMENTATIONS if each not in refusals]
    if name is not None and name in refusals:
        raise ValueError(
            f"implementation: {engine} cannot run {cell!r} as {name!r}: {refusals[name]}; supported here: {supported}"
        )
    return name or (None if on_cpu else elsewhere) or supported[0], refusals


def record(engine: str, implementation: str, refusals: Mapping[str, str], *, cell: object) -> None:
    """Tells `recording` of a call."""
    recorded = _recorded.get()
    if recorded is not None:
        recorded[1].append(EngineCall(engine, repr(cell), implementation, dict(refusals)))
