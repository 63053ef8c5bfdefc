"""The record of a training run, as arrays."""

from __future__ import annotations

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
    bad: the steps that were not finite.
    ended: "epochs" if all epochs were trained, "stopped" if nothing was left to train (patience, or not finite), else
    "".
    """

    step: np.ndarray
    train: dict[str, np.ndarray]
    validation_step: np.ndarray
    validation: dict[str, np.ndarray]
    bad: tuple[BadStep, ...] = ()
    ended: str = ""

    def extend(
        self,
        *,
        step: np.ndarray | None = None,
        train: dict[str, np.ndarray] | None = None,
        validation_step: np.ndarray | None = None,
        validation: dict[str, np.ndarray] | None = None,
        bad: tuple[BadStep, ...] = (),
    ) -> History:
        """Returns this history with more rows at its end."""
        return History(
            _append(self.step, step),
            _append_each(self.train, train),
            _append(self.validation_step, validation_step),
            _append_each(self.validation, validation),
            self.bad + bad,
            self.ended,
        )


def empty_history() -> History:
    """The history before the first step."""
    return History(np.zeros(0, np.int64), {}, np.zeros(0, np.int64), {})


def _append(before: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    return before if rows is None else np.concatenate([before, rows])


def _append_each(before: dict[str, np.ndarray], rows: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    if rows is None:
        return before
    return {name: np.concatenate([before[name], new]) if name in before else new for name, new in rows.items()}
