"""The gates in other frameworks: one table of their orders, and how two biases are converted to one and back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxrnn.typing import PyTree

OURS = ("h", "rzn", "ifgo")  # of Elman, GRU and LSTM: n is a GRU's candidate, g an LSTM's


class Gates(NamedTuple):
    """The gates of a layer in another framework, one letter each, in the order of its columns.

    negated: The gates that stand for 1 minus our gate, so that their columns have the opposite sign.
    forget: The number that the framework adds to the forget gate each time the layer runs.
    """

    order: str
    negated: str = ""
    forget: float = 0.0

    @property
    def ours(self) -> str:
        """The same gates in our order."""
        return next(order for order in OURS if set(order) == set(self.order))

    def read(self, array: PyTree, *, bias: bool = False) -> PyTree:
        """Converts the weights or the bias of all gates, which lie on the last axis, to our form."""
        return self._forget_added(reorder(self._turned(array, self.order), self.order, self.ours), bias, 1)

    def write(self, array: PyTree, *, bias: bool = False) -> PyTree:
        """The inverse of `read`."""
        return self._turned(reorder(self._forget_added(array, bias, -1), self.ours, self.order), self.order)

    def _turned(self, array, order):
        return array * _each(array, order, self.negated, -1, 1) if self.negated else array

    def _forget_added(self, array, bias, sign):
        return array + _each(array, self.ours, "f", sign * self.forget, 0) if bias and self.forget else array


TORCH = {"RNN": Gates("h"), "GRU": Gates("rzn"), "LSTM": Gates("ifgo")}
KERAS = {"SimpleRNN": Gates("h"), "GRU": Gates("zrn"), "LSTM": Gates("ifgo")}
KERAS_1 = {"GRU": Gates("zrn"), "LSTM": Gates("igfo")}  # with arrays of each gate by itself
ONNX = {"RNN": Gates("h"), "GRU": Gates("zrn"), "LSTM": Gates("iofg")}
ONNX_PEEPHOLES, PEEPHOLES = "iof", "ifo"
HAIKU = {"GRU": Gates("zrn", negated="z"), "LSTM": Gates("igfo", forget=1.0)}  # the latter of its ConvLSTMs, too
FLAX = {"GRU": Gates("rzn"), "LSTM": Gates("ifgo"), "ConvLSTM": Gates("igfo", forget=1.0)}


def reorder(array: PyTree, given: str, wanted: str) -> PyTree:
    """Rearranges the gates on the last axis, one letter each, from one order into another, which may leave some out.

    Examples:
      >>> import numpy as np
      >>> reorder(np.arange(6), "zrn", "rzn")
      array([2, 3, 0, 1, 4, 5])
    """
    if not set(wanted) <= set(given) or array.shape[-1] % len(given):
        raise ValueError(f"gates: expected {len(wanted)} blocks {wanted!r} of one size, got {given!r} in {array.shape}")
    if given == wanted:
        return array
    blocks = dict(zip(given, np.split(array, len(given), axis=-1), strict=True))
    return np.concatenate([blocks[gate] for gate in wanted], axis=-1)


def _each(array, order, which, on, off):
    """One number for each entry of the last axis: `on` in the blocks of the gates `which`, `off` in the others."""
    numbers = np.array([on if gate in which else off for gate in order], array.dtype)
    return np.repeat(numbers, array.shape[-1] // len(order))


def one_bias(place: str, b_x: PyTree, b_h: PyTree) -> PyTree:
    """The sum of the biases of both matrix products. It raises if the sum overflows."""
    with np.errstate(over="ignore"):
        b = b_x + b_h
    if not np.isfinite(b).all():
        raise ValueError(f"{place}: its sum with the other bias overflows {b.dtype}")
    return b


def gru_biases(place: str, b_x: PyTree, b_h: PyTree) -> tuple[PyTree, PyTree]:
    """(b, b_hn) for a GRU that resets after the product, where only r and z read the sum of both biases."""
    candidate = _candidate(b_h)
    return one_bias(place, b_x, np.where(candidate, np.zeros_like(b_h), b_h)), b_h[candidate]


def recurrent_bias(b_hn: PyTree) -> PyTree:
    """The bias of the recurrent product, for params in which b holds all of it except b_hn."""
    return np.concatenate([np.zeros_like(b_hn), np.zeros_like(b_hn), b_hn])


def _candidate(b):
    return np.arange(len(b)) >= 2 * (len(b) // 3)
