"""What the kernel with options does for a cell, and the arrays that it takes."""

from __future__ import annotations

from typing import NamedTuple

from jaxrnn.typing import PyTree

FAMILIES = ("elman", "indrnn", "lstm", "lstm coupled", "gru", "gru before", "mgu", "slstm")


class Gate(NamedTuple):
    """An activation that a kernel computes: its number, α and β."""

    code: int
    alpha: float = 0.0
    beta: float = 0.0


class Rule(NamedTuple):
    """What the gates of a kernel do.

    family: One of `FAMILIES`. gate, candidate, output: its activations φ, ψ and χ. gate_clip, cell_clip: bounds, 0 for
    none. input: whether the gate that coupled ones have is i. norm: whether products and cell state are normalised.
    projected: whether h is a product of what the gates give. heads: those of a block-diagonal product.
    """

    family: str
    gate: Gate = Gate(0)
    candidate: Gate = Gate(0)
    output: Gate = Gate(0)
    gate_clip: float = 0.0
    cell_clip: float = 0.0
    input: bool = False
    norm: bool = False
    projected: bool = False
    heads: int = 1


class Given(NamedTuple):
    """The weights that a kernel takes: w_x (D, G), w_h (S, F), and if a first product is not all that follows from it,
    w_2; b (G,), and the vectors theta (K, H) that the gates read. Those that a rule does not use are None.
    """

    w_x: PyTree
    w_h: PyTree
    b: PyTree = None
    w_2: PyTree = None
    theta: PyTree = None
