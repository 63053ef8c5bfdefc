"""Labels for the parameters that need a smaller learning rate."""

from __future__ import annotations

import jax

from jaxrnn.cell import Cell
from jaxrnn.typing import PyTree


def labels(cell: Cell, params: PyTree) -> PyTree:
    """Labels every parameter "slow" or "regular", for `optax.multi_transform`.

    The slow parameters are those that determine eigenvalues, decays and step lengths; the class of the cell names them
    in `slow_weights`. A small change of one changes the memory by many steps, so they are trained with a smaller
    learning rate and without weight decay.

    Examples:
      >>> import jax, jaxrnn, optax
      >>> from jaxrnn import training
      >>> cell = jaxrnn.Stack([jaxrnn.Linear(3, 8), jaxrnn.LRU(8, 16)])
      >>> params = cell.init(jax.random.key(0))
      >>> kinds = training.labels(cell, params)
      >>> kinds[1].nu, kinds[1].w_x
      ('slow', 'regular')
      >>> optimizer = optax.multi_transform({"slow": optax.adam(1e-4), "regular": optax.adamw(1e-3)}, kinds)
      >>> state = optimizer.init(params)
    """
    leaves, structure = jax.tree.flatten(params)
    numbers = structure.unflatten(range(len(leaves)))
    slow = set(_slow(cell, numbers))
    return jax.tree.map(lambda number: "slow" if number in slow else "regular", numbers)


def _slow(cell, numbers):
    for name in cell.slow_weights:
        yield from jax.tree.leaves(getattr(numbers, name))
    for part in cell.parts(numbers, None):
        yield from _slow(part.cell, part.params)
