"""What the cells of the delta rule share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.matrix import by_head, pieces, unit


class Sizes(NamedTuple):
    """The numbers that say how a step's features are cut."""

    heads: int
    key_size: int
    value_size: int
    key_heads: int
    products: int = 1

    @property
    def columns(self) -> tuple[int, int, int, int]:
        """The features of q, of k, of v and of β."""
        keys, values = self.key_heads * self.key_size, self.heads * self.value_size
        return keys, self.products * keys, self.products * values, self.products * self.heads


class Written(NamedTuple):
    """q, k, v and β of a step, and the rest of its features."""

    q: Array
    k: Array
    v: Array
    beta: Array
    rest: list[Array]


def check_products(cell: Any) -> None:
    """Checks the fields of several products, and of heads that share keys."""
    check.sizes(cell, "products", "key_heads")
    if cell.heads % (cell.key_heads or cell.heads):
        name = type(cell).__name__
        raise ValueError(f"{name}.key_heads: expected a divisor of heads, {cell.heads}, got {cell.key_heads}")


def strength(beta: Array, negative_eigenvalues: bool) -> Array:
    """β of its features."""
    return jax.nn.sigmoid(beta) * (2 if negative_eigenvalues else 1)


def written(features: Array, sizes: Sizes, negative_eigenvalues: bool, *rest: int) -> Written:
    """Cuts features into q, k, v, β, and what is left of sizes `rest`.

    With several products, k, v and β have an axis of them before that of the heads.
    """
    q, k, v, beta, *left = pieces(features, *sizes.columns, *rest)
    # Both at once, so that a single step is fewer operations.
    heads = (1 + sizes.products) * sizes.key_heads
    q, k = jnp.split(unit(by_head(jnp.concatenate([q, k], axis=-1), heads)), [sizes.key_heads], axis=-2)
    v, beta = by_head(v, sizes.products * sizes.heads), strength(beta, negative_eigenvalues)
    if sizes.products > 1:
        before, n = features.shape[:-1], sizes.products
        k, v, beta = (
            each.reshape(*before, n, each.shape[len(before)] // n, *each.shape[len(before) + 1 :])
            for each in (k, v, beta)
        )
    return Written(q * sizes.key_size**-0.5, k, v, beta, left)
