"""What the cells of the delta rule share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.matrix import MatrixInputs, advance, by_head, kernel_step, pieces, side_by_side, unit
from jaxrnn.engines.arrays import lifted
from jaxrnn.engines.step import Step
from jaxrnn.typing import PyTree


class Rule(NamedTuple):
    """How the features of a step are cut, and the bounds of what they become."""

    heads: int
    key_size: int
    value_size: int
    key_heads: int
    products: int = 1
    negative_eigenvalues: bool = False
    bound: float | None = None

    @property
    def columns(self) -> tuple[int, int, int, int]:
        """The features of q, of k, of v and of β."""
        keys, values = self.key_heads * self.key_size, self.heads * self.value_size
        return keys, self.products * keys, self.products * values, self.products * self.heads


def check_products(cell: Any) -> None:
    """Checks the fields of several products, and of heads that share keys."""
    check.sizes(cell, "products", "key_heads")
    if cell.heads % (cell.key_heads or cell.heads):
        name = type(cell).__name__
        raise ValueError(f"{name}.key_heads: expected a divisor of heads, {cell.heads}, got {cell.key_heads}")


def strength(beta: Array, negative_eigenvalues: bool) -> Array:
    """β of its features."""
    return jax.nn.sigmoid(beta) * (2 if negative_eigenvalues else 1)


def log_decay(rule: Rule, gate: Array, bias: Array, log_rate: Array) -> Array:
    """The logarithm of what is kept, of a head or of each of its rows.

    −exp(log_rate) softplus(gate + bias), or with a bound c  c σ(exp(log_rate) (gate + bias)).
    """
    gate, rate = gate + lifted(bias.astype(gate.dtype), gate), jnp.exp(log_rate.astype(gate.dtype))
    if gate.shape[-1] != rule.heads:
        gate, rate = by_head(gate, rule.heads), rate[:, None]
    rate = lifted(rate, gate)
    return -rate * jax.nn.softplus(gate) if rule.bound is None else rule.bound * jax.nn.sigmoid(rate * gate)


def delta_inputs(
    rule: Rule, arrays: tuple[Array, Array | None], weights: tuple[Array | None, Array | None]
) -> MatrixInputs:
    """What the recurrence reads, of a step's features.

    Args:
      rule: How they are cut.
      arrays: The features, and the gate of the decay (..., heads) or (..., heads K); None where it is the last of them.
      weights: Its bias, and the logarithm of the rate (heads,); None where nothing decays.
    """
    (features, gate), (bias, log_rate) = arrays, weights
    rest = features.shape[-1] - sum(rule.columns) if gate is not None else 0 if bias is None else bias.shape[0]
    q, k, v, beta, left = pieces(features, *rule.columns, rest)
    # Both at once, so that a single step is fewer operations.
    heads = (1 + rule.products) * rule.key_heads
    q, k = jnp.split(unit(by_head(jnp.concatenate([q, k], axis=-1), heads)), [rule.key_heads], axis=-2)
    v, beta = by_head(v, rule.products * rule.heads), strength(beta, rule.negative_eigenvalues)
    if rule.products > 1:  # an axis of them before that of the heads
        before, n = features.shape[:-1], rule.products
        k, v, beta = (
            each.reshape(*before, n, each.shape[len(before)] // n, *each.shape[len(before) + 1 :])
            for each in (k, v, beta)
        )
    decay = None
    if bias is not None and log_rate is not None:
        decay = log_decay(rule, left if gate is None else gate, bias, log_rate)
    return MatrixInputs(q * rule.key_size**-0.5, k, v, decay, beta)


def _program(arrays, weights, s, *, products, key_heads, strength, bound):
    heads, key_size, value_size = s.shape[-3:]
    rule = Rule(heads, key_size, value_size, key_heads, products, strength == 2, bound or None)
    features, gate = arrays
    given = delta_inputs(rule, (features[None], None if gate is None else gate[None]), weights)
    s, ys = advance(s, given, products)
    return s, side_by_side(None, ys, given)[0]


_kernel = Step("delta", _program)


def delta_step(rule: Rule, params: PyTree, carry: PyTree, x: Array, parts: Any) -> tuple[PyTree, Array]:
    """One step of a cell whose arrays and weights, as in `delta_inputs`, are `parts(params, x)`."""
    options = {"products": rule.products, "key_heads": rule.key_heads}
    bounds = {"strength": 2.0 if rule.negative_eigenvalues else 1.0, "bound": rule.bound or 0.0}
    return kernel_step(params, carry, x, _kernel, parts, **options, **bounds)
