"""The metrics of an epoch: the sums of those of its batches, as far as it has come."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrnn.typing import Named, PyTree


class Totals(NamedTuple):
    """Sums over the steps of an epoch so far.

    sums: of every metric, a NamedTuple of sums, in float64; of a run that goes on, the fields alone, as lists.
    steps: how many steps are in them; with members how many of each, (M,).
    """

    sums: dict[str, Any]
    steps: np.ndarray


def added(totals: Totals | None, sums: Named, live: np.ndarray) -> Totals:
    """The totals with a group of steps; `sums` are those of each step, (K, ...), zero where it was not `live`."""
    new = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64).sum(0), sums)
    steps = live.sum(0)
    if totals is None:
        return Totals(new, steps)

    def add(name, metric):
        return type(metric)(*(np.asarray(a) + b for a, b in zip(totals.sums[name], metric, strict=True)))

    return Totals({name: add(name, metric) for name, metric in new.items()}, totals.steps + steps)


def means(totals: Totals) -> dict[str, np.ndarray]:
    """The value of every metric; NaN of a member without a step."""
    values = {name: np.asarray(metric.value) for name, metric in totals.sums.items()}
    return {name: np.where(totals.steps > 0, value, np.nan) for name, value in values.items()}


def as_json(totals: Totals) -> PyTree:
    """As lists of numbers, which keep every bit."""
    sums = {name: [np.asarray(field).tolist() for field in metric] for name, metric in totals.sums.items()}
    return {"sums": sums, "steps": totals.steps.tolist()}


def from_json(value: Any) -> Totals | None:
    """The inverse of `as_json`, to which `added` adds."""
    return None if value is None else Totals(value["sums"], np.asarray(value["steps"]))
