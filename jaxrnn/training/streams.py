"""Long sequences in windows for truncated backpropagation through time: each batch continues the one before."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from jaxrnn import check
from jaxrnn.training.batches import Batch, Epochs, as_array, host
from jaxrnn.training.ragged import concatenate
from jaxrnn.typing import Named, PyTree


class Streams(Epochs):
    """Stateful batches of one long sequence, or of documents one after another.

    The pairs of an input and its target are cut into `streams` rows of equal length (to within one pair), and the rows
    into windows. Row r of batch k + 1 continues where row r of batch k ended, so the carry after one batch is the carry
    to start the next from. Every pair comes exactly once per epoch, always in this order.

    `Batch.reset` is set at the first step of every document, and at the first step of every row in the first batch of
    an epoch, so that a carry from the epoch before does not leak into the next. `Batch.mask` is False where the last
    window is filled up. It is always there, so that all batches have one shape, (streams, window, ...).

    Args:
      xs: One sequence with leaves (L, ...); or a list of documents, which are arrays (L_i, ...) or pytrees of such.
      targets: Targets of the form of `xs`, one per step. None for language modelling: the target is the next element of
        the document, and the last element of a document is only a target.
      streams: B, the number of rows of a batch.
      window: T, the number of steps that a gradient reaches back.
      starts: bool (L,), True where a document begins in one sequence. Leave it None for a list of documents, which
        shows where they begin.

    Examples:
      >>> import numpy as np
      >>> from jaxrnn.training.streams import Streams
      >>> source = Streams([np.arange(5), np.arange(10, 16)], streams=2, window=3)
      >>> for batch in source:
      ...     print(batch.xs.tolist(), batch.targets.tolist())
      [[0, 1, 2], [10, 11, 12]] [[1, 2, 3], [11, 12, 13]]
      [[3, 0, 0], [13, 14, 0]] [[4, 0, 0], [14, 15, 0]]
      >>> batch.mask.tolist()
      [[True, False, False], [True, True, False]]

    References:
      Williams & Peng 1990, An efficient gradient-based algorithm for on-line training of recurrent networks,
      https://doi.org/10.1162/neco.1990.2.4.490.
    """

    def __init__(self, xs: PyTree, targets: PyTree = None, *, streams: int, window: int, starts: PyTree = None) -> None:
        self.streams, self.window = check.integer("streams", streams), check.integer("window", window)
        self.xs, lengths = _joined(xs, "xs")
        self.starts = _starts(starts, lengths, isinstance(xs, list))
        size = int(lengths.sum())
        self.at = None
        """The element that is the input of each pair, if some are the input of none."""
        if targets is None:
            self.targets, self.shift = self.xs, 1
            if self.starts is None:
                size = max(size - 1, 0)
            else:
                self.at = np.flatnonzero(~np.append(self.starts[1:], True))
                size = len(self.at)
        else:
            self.targets, given = _joined(targets, "targets")
            self.shift = 0
            if isinstance(targets, list) != isinstance(xs, list) or given.tolist() != lengths.tolist():
                raise ValueError(
                    f"targets: expected one per step, as xs: {_kind(xs, lengths)}, got {_kind(targets, given)}"
                )
        if size < self.streams:
            raise ValueError(
                f"streams: expected at most the number of pairs of input and target, {size}, got {streams}"
            )
        self.rows = np.arange(self.streams + 1) * size // self.streams
        """Row r holds the pairs from rows[r] to rows[r + 1]."""

    def __len__(self) -> int:
        return -(-int(np.diff(self.rows).max()) // self.window)

    def plan(self, epoch: int) -> Sequence[int]:
        return range(len(self))

    def batch(self, entry: int) -> Batch:
        pairs = self.rows[:-1, None] + entry * self.window + np.arange(self.window)
        mask = pairs < self.rows[1:, None]
        pairs = np.where(mask, pairs, 0)
        at = pairs if self.at is None else self.at[pairs]
        reset = np.zeros(mask.shape, bool) if self.starts is None else self.starts[at] & mask
        if entry == 0:
            reset[:, 0] = True

        def read(leaf, at):
            values = leaf[at]
            values[~mask] = 0
            return values

        xs = jax.tree.map(lambda leaf: read(leaf, at), self.xs)
        targets = jax.tree.map(lambda leaf: read(leaf, at + self.shift), self.targets)
        return Batch(xs, targets, mask=mask, reset=reset)

    def identity(self) -> Named:
        return {"size": int(self.rows[-1]), "streams": self.streams, "window": self.window}


def _joined(tree: PyTree, name: str) -> tuple[PyTree, np.ndarray]:
    """Returns one sequence, or documents joined to one, and the lengths."""
    if isinstance(tree, list):
        return concatenate(tree, name)
    tree, size = host(tree, name)
    return tree, np.array([size])


def _starts(starts: PyTree, lengths: np.ndarray, documents: bool) -> np.ndarray | None:
    """The places where documents begin, bool (L,), or None if there is a single document."""
    size = lengths.sum()
    if starts is None:
        if not documents:
            return None
        starts = np.zeros(size, bool)
        starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        return starts
    if documents:
        raise ValueError("starts: expected None, since a list of documents says where they begin")
    starts = as_array(starts, "starts").copy()
    if starts.dtype != bool or starts.shape != (size,):
        raise ValueError(f"starts: expected bool of shape ({size},), got {starts.dtype} of shape {starts.shape}")
    starts[:1] = True
    return starts


def _kind(tree: PyTree, lengths: np.ndarray) -> str:
    return f"{len(lengths)} documents of {lengths.sum()} steps" if isinstance(tree, list) else f"{lengths[0]} steps"
