"""Sequences of different lengths: padding, and batches of few shapes with little padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrnn import check
from jaxrnn.training.batches import (
    Batch,
    Epochs,
    as_array,
    check_valid,
    host,
    is_list,
    order_key,
    permutation,
)
from jaxrnn.typing import Bools, Integers, Named, PyTree


def pad(sequences: Sequence[PyTree], *, length: int | None = None, value: float = 0) -> tuple[PyTree, np.ndarray]:
    """Pads sequences of different lengths to one array, and returns it with their lengths.

    Args:
      sequences: N arrays (T_i, ...) of one dtype that agree in all other axes; T_i may be 0. Or pytrees of such arrays,
        whose leaves agree in T_i. A list is treated as an array.
      length: T, the length to pad to; None for the longest length.
      value: The value of the padding.

    Returns:
      The padded sequences (N, T, ...), in NumPy, and the lengths, int32 (N,).

    Raises:
      ValueError: If an argument does not fit; the message names the sequence.
      TypeError: If an argument does not fit; the message names the sequence.

    Examples:
      >>> from jaxrnn.training.ragged import pad
      >>> pad([[3, 1, 4], [], [1, 5]])
      (array([[3, 1, 4],
             [0, 0, 0],
             [1, 5, 0]]), array([3, 0, 2], dtype=int32))
    """
    sequences, lengths = _sequences(sequences, "sequences")
    longest = int(lengths.max())
    if length is None:
        length = longest
    elif length < longest:
        raise ValueError(
            f"length: expected at least {longest}, the length of sequences[{lengths.argmax()}], got {length}"
        )
    return _pad(sequences, length, value), lengths


def unpad(padded: Any, lengths: Integers | None = None, *, mask: Bools | None = None) -> list:
    """Returns the sequences that `pad` put into one array: `[row[:length] for row, length in zip(padded, lengths)]`.

    Args:
      padded: An array (N, T, ...), or a pytree of such arrays, in NumPy or JAX.
      lengths: Integers (N,), the lengths of the sequences.
      mask: bool (N, T), in place of lengths: the steps to keep, in any pattern.

    Returns:
      N arrays (T_i, ...), or pytrees of such arrays, in NumPy. With lengths they are views if `padded` is in NumPy.

    Examples:
      >>> from jaxrnn.training.ragged import pad, unpad
      >>> [row.tolist() for row in unpad(*pad([[3, 1, 4], [], [1, 5]]))]
      [[3, 1, 4], [], [1, 5]]
    """
    padded, size = host(padded, "padded")
    leaves = jax.tree_util.tree_leaves_with_path(padded)
    for path, leaf in leaves:
        if leaf.ndim < 2 or leaf.shape[1] != leaves[0][1].shape[1]:
            name = f"padded{jax.tree_util.keystr(path)}"
            raise ValueError(f"{name}: expected (N, T, ...), the same T everywhere, got shape {leaf.shape}")
    lengths, mask = check_valid(lengths, mask, size, leaves[0][1].shape[1])
    if lengths is not None:
        kept = [slice(n) for n in lengths.tolist()]
    elif mask is not None:
        kept = list(mask)
    else:
        raise ValueError("lengths: expected integers, or a mask in their place, got None")
    return [jax.tree.map(lambda leaf: leaf[k, steps], padded) for k, steps in enumerate(kept)]  # noqa: B023


class Bucketed(NamedTuple):
    """Sequences padded to one length: their indices, (B,); the padded arrays, (B, T, ...); their lengths, (B,)."""

    indices: np.ndarray
    xs: PyTree
    lengths: np.ndarray


def bucket(sequences: Sequence[PyTree], batch_size: int, *, buckets: int | Sequence[int] = 4) -> list[Bucketed]:
    """Puts all sequences into padded batches of few shapes, the shortest first, each with its place in `sequences`.

    Args:
      sequences: As in `Buckets`.
      batch_size: As in `Buckets`.
      buckets: As in `Buckets`.

    Examples:
      Results go back to the order given by the indices:

      >>> import numpy as np
      >>> from jaxrnn.training.ragged import bucket
      >>> sequences = [np.ones(5), np.ones(2), np.ones(4), np.ones(1)]
      >>> total = np.zeros(4)
      >>> for indices, xs, lengths in bucket(sequences, 2, buckets=2):
      ...     total[indices] = xs.sum(1)
      >>> total
      array([5., 2., 4., 1.])
    """
    source = Buckets(sequences, None, batch_size, shuffle=False, buckets=buckets)
    batches = [(rows, source.batch((rows, length))) for rows, length in source.plan(0)]
    return [Bucketed(rows, batch.xs, batch.lengths) for rows, batch in batches]


class Buckets(Epochs):
    """Batches of sequences of similar lengths: every sequence once per epoch, with few shapes and little padding.

    A sequence goes to the first bucket that it fits into, and is padded to the length of the bucket. An epoch shuffles
    the sequences of every bucket and cuts them into batches. Sequences that do not fill a batch move on to the next
    bucket, so that only one batch of an epoch can be smaller than the others. Then the batches are shuffled.

    There is at most one shape per bucket, and one more for the smaller batch. `Batch.lengths` gives the valid steps.

    Args:
      sequences: A list of N arrays (T_i, ...), or of pytrees, as in `pad`.
      targets: A list of N arrays (T_i, ...), with one target per step, which are padded too; or an array (N, ...), or a
        pytree of such arrays, with one target per sequence; or None.
      batch_size: B.
      key: A PRNG key. The order of an epoch is a pure function of the key and of the epoch.
      shuffle: False to order by length in every epoch; `key` is then not needed.
      buckets: The number of lengths to pad to, or these lengths themselves, ascending. For a number, the lengths are
        chosen among the T_i so that Σ_i (length of the bucket of i − T_i) is least.

    Examples:
      >>> import jax, numpy as np
      >>> from jaxrnn.training.ragged import Buckets
      >>> sequences = [np.ones((length, 3)) for length in (2, 9, 3, 8, 3)]
      >>> source = Buckets(sequences, np.arange(5), 2, key=jax.random.key(0), buckets=2)
      >>> source.boundaries
      (3, 9)
      >>> [(batch.xs.shape, batch.targets.tolist()) for batch in source]
      [((1, 9, 3), [1]), ((2, 3, 3), [2, 0]), ((2, 9, 3), [4, 3])]
    """

    def __init__(
        self,
        sequences: Sequence[PyTree],
        targets: PyTree,
        batch_size: int,
        *,
        key: Any = None,
        shuffle: bool = True,
        buckets: int | Sequence[int] = 4,
    ) -> None:
        self.sequences, self.lengths = _sequences(sequences, "sequences")
        self.per_step = isinstance(targets, list)
        self.targets = _targets(targets, self.lengths)
        self.batch_size = check.integer("batch_size", batch_size)
        self.key = order_key(key, shuffle)
        self.boundaries = _boundaries(buckets, self.lengths)
        """The lengths that sequences are padded to."""
        self._bucket = np.searchsorted(self.boundaries, self.lengths)

    @property
    def padding(self) -> float:
        """The fraction of steps that are padding, in the current epoch."""
        steps = sum(len(rows) * length for rows, length in self.plan(self.epoch))
        return 1 - int(self.lengths.sum(dtype=np.int64)) / steps

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def plan(self, epoch: int) -> Sequence[tuple[np.ndarray, int]]:
        order = (
            permutation(len(self.lengths), self.key, epoch, 0) if self.key else np.argsort(self.lengths, stable=True)
        )
        batches, left = [], order[:0]
        for k, length in enumerate(self.boundaries):
            rows = np.concatenate([left, order[self._bucket[order] == k]])
            last = k == len(self.boundaries) - 1
            end = len(rows) if last else len(rows) - len(rows) % self.batch_size
            batches += [(rows[at : at + self.batch_size], length) for at in range(0, end, self.batch_size)]
            left = rows[end:]
        return [batches[k] for k in permutation(len(batches), self.key, epoch, 1)]

    def batch(self, entry: tuple[np.ndarray, int]) -> Batch:
        rows, length = entry
        xs = _pad([self.sequences[row] for row in rows], length, 0)
        if self.per_step:
            targets = _pad([self.targets[row] for row in rows], length, 0)
        else:
            targets = jax.tree.map(lambda leaf: leaf[rows], self.targets)
        return Batch(xs, targets, self.lengths[rows])

    def identity(self) -> Named:
        size, boundaries = len(self.lengths), list(self.boundaries)
        return {"size": size, "batch_size": self.batch_size, "boundaries": boundaries, "key": self.key}


def concatenate(sequences: Sequence[PyTree], name: str) -> tuple[PyTree, np.ndarray]:
    """Joins sequences one after another, (Σ T_i, ...), and returns their lengths too."""
    sequences, lengths = _sequences(sequences, name)
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *sequences), lengths


def _sequences(sequences: Sequence[PyTree], name: str) -> tuple[list[PyTree], np.ndarray]:
    """Checks that the sequences fit together; returns them as pytrees of NumPy arrays, and their lengths."""
    if not isinstance(sequences, (list, tuple)) or not sequences:
        raise ValueError(f"{name}: expected a list of at least one sequence, got {type(sequences).__name__}")
    structure = jax.tree.structure(sequences[0], is_leaf=is_list)
    rows, lengths = [], np.empty(len(sequences), np.int32)
    for k, sequence in enumerate(sequences):
        leaves = jax.tree_util.tree_leaves_with_path(sequence, is_leaf=is_list)
        if jax.tree.structure(sequence, is_leaf=is_list) != structure or not leaves:
            raise ValueError(
                f"{name}[{k}]: expected a sequence like {name}[0], {structure}, got {type(sequence).__name__}"
            )
        rows.append([as_array(leaf, f"{name}[{k}]{jax.tree_util.keystr(path)}") for path, leaf in leaves])
        for array, (path, _) in zip(rows[k], leaves, strict=True):
            if array.ndim == 0 or len(array) != len(rows[k][0]):
                at = f"{name}[{k}]{jax.tree_util.keystr(path)}"
                raise ValueError(f"{at}: expected one entry per step, (T, ...), got shape {array.shape}")
        lengths[k] = len(rows[k][0])
    for number, column in enumerate(zip(*rows, strict=True)):
        # What is empty and flat, as `[]` is, fits everywhere.
        like = next((k for k, array in enumerate(column) if array.shape != (0,)), 0)
        shape, dtype = column[like].shape[1:], column[like].dtype
        for k, array in enumerate(column):
            if array.shape == (0,):
                rows[k][number] = np.zeros((0, *shape), dtype)
            elif array.shape[1:] != shape or array.dtype != dtype:
                raise ValueError(
                    f"{name}[{k}]: expected {dtype} (T, {', '.join(map(str, shape))}) like {name}[{like}], "
                    f"got {array.dtype} of shape {array.shape}"
                )
    return [jax.tree.unflatten(structure, row) for row in rows], lengths


def _targets(targets: PyTree, lengths: np.ndarray) -> PyTree:
    if targets is None:
        return None
    if isinstance(targets, list):
        if targets and isinstance(targets[0], (int, float, np.generic)):
            raise ValueError("targets: a list holds an array per sequence; for a number each, pass np.asarray(targets)")
        targets, given = _sequences(targets, "targets")
        if len(given) != len(lengths):
            raise ValueError(f"targets: expected {len(lengths)}, one per sequence, got {len(given)}")
        if (given != lengths).any():
            k = int(np.argmax(given != lengths))
            raise ValueError(
                f"targets[{k}]: expected one per step, {lengths[k]}, got {given[k]}; for an array per sequence, "
                "pass np.stack(targets)"
            )
        return targets
    targets, size = host(targets, "targets")
    if size != len(lengths):
        raise ValueError(f"targets: expected {len(lengths)}, one per sequence, got {size}")
    return targets


def _pad(sequences: list[PyTree], length: int, value: float) -> PyTree:
    def padded(*arrays: np.ndarray) -> np.ndarray:
        dtype = arrays[0].dtype
        with np.errstate(invalid="ignore"):
            filler = np.asarray(value).astype(dtype)
        if dtype.kind in "biu" and filler != value:
            raise ValueError(f"value: expected one of {dtype}, got {value!r}")
        out = np.full((len(arrays), length, *arrays[0].shape[1:]), filler, dtype)
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = array
        return out

    return jax.tree.map(padded, *sequences)


def _boundaries(buckets: int | Sequence[int], lengths: np.ndarray) -> tuple[int, ...]:
    """The lengths of the buckets, all at least 1, and the last at least that of the longest sequence."""
    if not isinstance(buckets, Sequence):
        return _least_padding(np.maximum(lengths, 1), check.integer("buckets", buckets))
    boundaries = tuple(check.integer(f"buckets[{k}]", length) for k, length in enumerate(buckets))
    if not boundaries or any(a >= b for a, b in itertools.pairwise(boundaries)):
        raise ValueError(f"buckets: expected ascending lengths, got {buckets!r}")
    if boundaries[-1] < lengths.max():
        raise ValueError(
            f"buckets: expected a last length of at least {lengths.max()}, that of sequences[{lengths.argmax()}], "
            f"got {boundaries[-1]}"
        )
    return boundaries


def _least_padding(lengths: np.ndarray, buckets: int) -> tuple[int, ...]:
    """Chooses at most `buckets` of the lengths, with the least Σ_i (smallest boundary ≥ length_i − length_i).

    Let L_1 < ... < L_m be the distinct lengths, and C_j the number of sequences that are no longer than L_j. Then the
    steps that k buckets cost up to L_j are

        S_k(j) = min_{i < j} S_{k-1}(i) + L_j (C_j − C_i).
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    L, C = distinct.astype(np.int64), np.concatenate([[0], np.cumsum(counts)])
    S = L * C[1:]
    cut = [np.zeros(len(L), np.int64)]
    for _ in range(min(buckets, len(L)) - 1):
        before = np.concatenate([[0], S])
        best = np.array([np.argmin(before[: j + 1] - L[j] * C[: j + 1]) for j in range(len(L))])
        S = before[best] + L * (C[1:] - C[best])
        cut.append(best)
    boundaries, end = [], len(L)
    for best in reversed(cut):
        if end:
            boundaries.append(int(L[end - 1]))
            end = best[end - 1]
    return tuple(reversed(boundaries))
