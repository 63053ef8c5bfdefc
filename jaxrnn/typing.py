"""The types that signatures share, and the letters of shapes.

The letters of shapes, the same in every docstring:

    T     steps of a sequence                 `*batch`, or `...`   batch axes, none included; B where there is one
    D     features of x                       H, P                 hidden units; units after a projection
    O     features of y                       G                    columns of a product that feeds several gates
    N     heads, blocks, or states            K                    steps in a window, or the size of a kernel
    S     spatial axes, or rows of w_h        V                    words of a vocabulary

`x` and `y` are of one step, `xs` and `ys` of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from jax.typing import ArrayLike, DTypeLike

if TYPE_CHECKING:
    from jaxrnn.cell import Cell

__all__ = ["Bools", "DTypeLike", "Foreign", "Integers", "Named", "Noise", "PyTree", "Size", "WithParams"]

# Arrays in containers of any structure: params, carries, inputs. Python has no type for it, and neither has JAX.
PyTree: TypeAlias = Any
# An object of another library, which need not be installed.
Foreign: TypeAlias = Any
# Values by name: options of a layer, attributes of a node.
Named: TypeAlias = dict[str, Any]
# Noise of one step or of a sequence: what is drawn once per sequence, and what is drawn per step.
Noise: TypeAlias = tuple[PyTree, PyTree] | None
# The size of one step's x or y: its features, or all its axes; None where it is not known.
Size: TypeAlias = int | tuple[int, ...] | None
# Lengths of sequences, and flags of steps, as users give them.
Integers: TypeAlias = ArrayLike | Sequence[int]
Bools: TypeAlias = ArrayLike | Sequence[Any]
# A cell and its params.
WithParams: TypeAlias = "tuple[Cell, PyTree]"
