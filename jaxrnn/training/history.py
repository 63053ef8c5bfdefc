"""The record of a training run, as arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class BadStep(NamedTuple):
    """A step whose loss, gradient or validation was not finite: its number, its member or None, and the leaf."""

    step: int
    member: int | None
    leaf: str

    def __str__(self):
        member = "" if self.member is None else f", member {self.member}"
        return f"step {self.step}{member}: {self.leaf} is not finite"


class History(NamedTuple):
    """The record of S steps and E validations; with M members every metric has a second axis (M,).

    step: the numbers of the steps, (S,).
    train: each metric of the batch of each step, (S,); NaN for a member that had stopped.
    validation_step: the steps after which validations were made, (E,).
    validation: each metric of each validation, (E,).
    epoch_step: the last step of every epoch, (E',).
    epoch: each metric over each epoch, where every batch counts by its weight, (E',); see `epochs`.
    bad: the steps that were not finite.
    ended: "epochs" if all epochs were trained, "stopped" if nothing was left to train (patience, or not finite), else
    "".
    """

    step: np.ndarray
    train: dict[str, np.ndarray]
    validation_step: np.ndarray
    validation: dict[str, np.ndarray]
    epoch_step: np.ndarray
    epoch: dict[str, np.ndarray]
    bad: tuple[BadStep, ...] = ()
    ended: str = ""

    def epochs(self) -> dict[str, np.ndarray]:
        """A table with a row for each epoch: its number, the metrics over the epoch, those of its validation.

        A metric over an epoch is over all its batches as they were trained, each with its weight; a validation's are
        those after the epoch, NaN where there was none.

        Examples:
          >>> import numpy as np, jaxrnn
          >>> from jaxrnn.training import squared_error, train
          >>> xs = np.ones((6, 3, 1), np.float32)
          >>> trained = train(jaxrnn.GRU(1, 1), (xs, xs), squared_error, epochs=2, progress=False)
          >>> list(trained.history.epochs())
          ['epoch', 'loss', 'gradient_norm']
        """
        table = {"epoch": np.arange(1, len(self.epoch_step) + 1)}
        table |= {name: self.epoch[name] for name in in_order(self.epoch)}
        at = np.searchsorted(self.epoch_step, self.validation_step)
        for name in in_order(self.validation):
            rows = self.validation[name]
            column = np.full((len(self.epoch_step), *rows.shape[1:]), np.nan)
            inside = at < len(column)
            column[at[inside]] = rows[inside]
            table[f"validation {name}"] = column
        return table

    def __str__(self):
        table = {name: [short(value) for value in column] for name, column in self.epochs().items()}
        widths = {name: max(map(len, (name, *column))) for name, column in table.items()}
        head = "  ".join(name.rjust(width) for name, width in widths.items())
        rows = zip(*table.values(), strict=True)
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths.values(), strict=True)) for row in rows]
        return "\n".join([head, "─" * len(head), *lines])

    def _repr_pretty_(self, printer, cycle):
        """As a table in a notebook."""
        printer.text(str(self))

    def extend(
        self,
        *,
        step: np.ndarray | None = None,
        train: dict[str, np.ndarray] | None = None,
        validation_step: np.ndarray | None = None,
        validation: dict[str, np.ndarray] | None = None,
        epoch_step: np.ndarray | None = None,
        epoch: dict[str, np.ndarray] | None = None,
        bad: tuple[BadStep, ...] = (),
    ) -> History:
        """Returns this history with more rows at its end."""
        return History(
            _append(self.step, step),
            _append_each(self.train, train),
            _append(self.validation_step, validation_step),
            _append_each(self.validation, validation),
            _append(self.epoch_step, epoch_step),
            _append_each(self.epoch, epoch),
            self.bad + bad,
            self.ended,
        )


def empty_history() -> History:
    """The history before the first step."""
    none = np.zeros(0, np.int64)
    return History(none, {}, none, {}, none, {})


def in_order(metrics: Iterable[str]) -> list[str]:
    """The names of metrics with the loss first and the norm of the gradient last."""
    return sorted(metrics, key=lambda name: (name != "loss", name == "gradient_norm"))


def short(value: np.ndarray) -> str:
    """A number, or the range over members."""
    if np.ndim(value) == 0:
        return f"{float(value):.4g}"
    if np.isnan(value).all():
        return "nan"
    return f"{np.nanmin(value):.4g}…{np.nanmax(value):.4g}"


def _append(before: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    return before if rows is None else np.concatenate([before, rows])


def _append_each(before: dict[str, np.ndarray], rows: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    if rows is None:
        return before
    return {name: np.concatenate([before[name], new]) if name in before else new for name, new in rows.items()}
