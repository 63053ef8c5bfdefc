"""Batches, and sources of batches that know their position in the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import check
from jaxrnn.typing import Foreign, Named, PyTree


class Batch(NamedTuple):
    """The data of one training step; every leaf has the batch axis first.

    xs: the inputs (B, T, ...), a pytree if the cell's x is one.
    targets: (B, T, ...), or (B, ...) for a cell that gives one output per sequence.
    lengths: None or integers (B,). mask, reset: None or bool (B, T). All are as in `jaxrnn.scan`, with `time_axis=1`.
    weights: None or (B,), or (B, T) for targets of every step: how much each one counts in the loss and in metrics.
    """

    xs: PyTree
    targets: PyTree = None
    lengths: PyTree = None
    mask: PyTree = None
    reset: PyTree = None
    weights: PyTree = None


class Source(Protocol):
    """A source of batches, epoch after epoch.

    Each iteration gives the remaining batches of the current epoch, and then the next epoch begins. A second `for` loop
    runs the second epoch; a loop that comes after a `break` runs the rest of the first. `restore(state())` in another
    process, on a source made with the same arguments, continues with exactly the batches that would have come. A source
    with a known number of batches per epoch also has `__len__`.
    """

    def __iter__(self) -> Iterator[PyTree]:
        """The remaining batches of the current epoch, as pytrees of NumPy arrays."""
        ...

    def state(self) -> Named:
        """The position after the last batch that was given, as a JSON value."""
        ...

    def restore(self, state: Named) -> None:
        """Goes to the position that `state()` returned."""
        ...


class Epochs(ABC):
    """A source whose batches are a pure function of the epoch and of their position in it.

    A subclass defines the number of batches of an epoch, the plan of an epoch (one entry per batch), the batch for an
    entry, and the settings that must be equal for a state to fit.
    """

    epoch: int = 0
    """The current epoch, counted from 0."""
    position: int = 0
    """The number of batches of the current epoch that have been given."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of batches in every epoch."""

    @abstractmethod
    def plan(self, epoch: int) -> Sequence[PyTree]:
        """The plan of an epoch: one entry per batch, in order."""

    @abstractmethod
    def batch(self, entry: Foreign) -> PyTree:
        """Makes the batch for one entry of a plan."""

    @abstractmethod
    def identity(self) -> Named:
        """The settings that the order of the batches depends on, as a JSON value."""

    def __iter__(self) -> Iterator[PyTree]:
        epoch = self.epoch
        plan = self.plan(epoch)
        while self.epoch == epoch and self.position < len(plan):
            batch = self.batch(plan[self.position])
            self.position += 1
            yield batch
        if self.epoch == epoch:
            self.epoch, self.position = epoch + 1, 0

    def state(self) -> Named:
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def restore(self, state: Named) -> None:
        identity = self._identity()
        if not isinstance(state, dict) or set(state) != {"epoch", "position", *identity}:
            raise ValueError(f"state: expected a state of {identity['source']}, got {state!r}")
        for name, value in identity.items():
            if state[name] != value:
                raise ValueError(f"state: {name} is {state[name]!r}, and that of this source is {value!r}")
        epoch, position = state["epoch"], state["position"]
        if type(epoch) is not int or type(position) is not int or epoch < 0 or not 0 <= position <= len(self):
            raise ValueError(f"state: no position in epochs of {len(self)} batches: epoch {epoch}, position {position}")
        self.epoch, self.position = epoch, position

    def _identity(self) -> Named:
        return {"source": type(self).__name__, **self.identity()}


class Arrays(Epochs):
    """Batches of a pytree of arrays with a common leading axis, in a new order each epoch.

    Args:
      data: A pytree with leaves (N, ...): a `Batch`, a tuple, a dict or an array. It is kept in NumPy, and batches are
        gathered on the host. A tuple is one pytree: `Arrays((xs, targets), 32)` gives tuples.
      batch_size: B. The last batch of an epoch holds the remaining rows, unless `drop_last`.
      key: A PRNG key. The order of an epoch is a pure function of the key and of the epoch.
      shuffle: False to keep the given order in every epoch; `key` is then not needed.
      drop_last: Whether to leave out the last batch of an epoch if it is smaller.

    Raises:
      ValueError: If the leaves have no common leading axis, if there is no data, if `drop_last` is set but no whole
        batch exists, or if `shuffle` is set without a key.

    Examples:
      >>> import jax, numpy as np
      >>> from jaxrnn.training.batches import Arrays, Batch
      >>> source = Arrays(Batch(np.zeros((5, 7, 3)), targets=np.arange(5)), 2, key=jax.random.key(0))
      >>> [batch.targets.tolist() for batch in source]
      [[3, 2], [1, 0], [4]]
      >>> [batch.targets.tolist() for batch in source]
      [[4, 3], [1, 0], [2]]
    """

    def __init__(
        self, data: PyTree, batch_size: int, *, key: Any = None, shuffle: bool = True, drop_last: bool = False
    ) -> None:
        self.data, self.size = host(data, "data")
        self.batch_size = check.integer("batch_size", batch_size)
        self.key = order_key(key, shuffle)
        self.drop_last = bool(drop_last)
        if self.size == 0:
            raise ValueError("data: expected at least one row, got leaves of leading axis 0")
        if len(self) == 0:
            raise ValueError(f"drop_last: no batch of {self.batch_size} in {self.size} rows")

    def __len__(self) -> int:
        return self.size // self.batch_size if self.drop_last else -(-self.size // self.batch_size)

    def plan(self, epoch: int) -> Sequence[np.ndarray]:
        order = permutation(self.size, self.key, epoch)
        return [order[k * self.batch_size : (k + 1) * self.batch_size] for k in range(len(self))]

    def batch(self, entry: np.ndarray) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[entry], self.data)

    def identity(self) -> Named:
        return {"size": self.size, "batch_size": self.batch_size, "drop_last": int(self.drop_last), "key": self.key}


def host(tree: PyTree, name: str) -> tuple[PyTree, int]:
    """The tree with NumPy leaves, and the length of their common leading axis; a list is treated as an array."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_list)
    if not leaves:
        raise ValueError(f"{name}: expected at least one array, got {tree!r}")
    arrays = [as_array(leaf, f"{name}{jax.tree_util.keystr(path)}") for path, leaf in leaves]
    for (path, _), array in zip(leaves, arrays, strict=True):
        if array.ndim == 0:
            raise ValueError(f"{name}{jax.tree_util.keystr(path)}: expected a leading axis, got a scalar")
        if len(array) != len(arrays[0]):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)}: expected a leading axis of {len(arrays[0])}, as "
                f"{name}{jax.tree_util.keystr(leaves[0][0])} has, got shape {array.shape}"
            )
    return jax.tree.unflatten(structure, arrays), len(arrays[0])


def as_array(value: Any, name: str) -> np.ndarray:
    """Returns `value` as a NumPy array of numbers or booleans."""
    try:
        array = np.asarray(value)
        numbers = array.dtype.kind in "biufc" or jnp.issubdtype(array.dtype, np.number)
    except (TypeError, ValueError):
        numbers, array = False, None
    if array is None or not numbers:
        several = is_list(value) or getattr(value, "dtype", None) == np.dtype(object)
        if several and len(value) and (is_list(value[0]) or hasattr(value[0], "shape")):
            raise TypeError(
                f"{name}: expected an array of numbers, got a {type(value).__name__} of {len(value)}; sequences of "
                "different lengths are Batch(xs, targets, lengths) with xs, lengths = pad(sequences), or Buckets(...)"
            )
        raise TypeError(f"{name}: expected an array of numbers, got {type(value).__name__}: {value!r:.80}")
    return array


def is_list(node: Foreign) -> bool:
    """Whether a node of a tree is a list."""
    return isinstance(node, list)


def check_valid(lengths: PyTree, mask: PyTree, rows: int, steps: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Checks lengths or a mask and returns them in NumPy: lengths as int32 (rows,), a mask as bool (rows, steps)."""
    if lengths is not None and mask is not None:
        raise ValueError("mask: expected lengths or mask, got both")
    if mask is not None:
        mask = as_array(mask, "mask")
        if mask.dtype != bool or mask.shape != (rows, steps):
            raise ValueError(f"mask: expected bool of shape ({rows}, {steps}), got {mask.dtype}{list(mask.shape)}")
    if lengths is not None:
        lengths = as_array(lengths, "lengths")
        if lengths.shape != (rows,) or lengths.dtype.kind not in "iu":
            raise ValueError(f"lengths: expected integers of shape ({rows},), got {lengths.dtype}{list(lengths.shape)}")
        if rows and not 0 <= lengths.min() <= lengths.max() <= steps:
            raise ValueError(f"lengths: expected 0 to {steps}, got {lengths.min()} to {lengths.max()}")
        lengths = lengths.astype(np.int32)
    return lengths, mask


def order_key(key: Any, shuffle: bool) -> list[int]:
    """The words of a single key, or an empty list if nothing is shuffled."""
    if not shuffle:
        return []
    if key is None:
        raise ValueError("key: shuffle=True needs a jax.random key; pass shuffle=False for the order given")
    try:
        words = np.asarray(jax.random.key_data(key))
    except TypeError as error:
        raise TypeError(f"key: expected a jax.random key, got {type(key).__name__}") from error
    if words.ndim != 1 or words.dtype != np.uint32:
        raise ValueError(f"key: expected a single jax.random key, got data {words.dtype}{list(words.shape)}")
    return words.tolist()


def permutation(size: int, key: list[int], *numbers: int) -> np.ndarray:
    """An order of 0, ..., size − 1: a pure function of the key and the numbers, and the identity without a key."""
    if not key:
        return np.arange(size)
    # The stream of a bit generator is the same in every version of NumPy; that of `Generator.permutation` need not be.
    words = np.random.PCG64(np.random.SeedSequence([*key, *numbers])).random_raw(size)
    return np.argsort(words, kind="stable")
