"""The delta rule."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.delta import Rule, check_products, delta_inputs, delta_step, strength
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.matrix import MatrixCell, projected
from jaxrnn.typing import DTypeLike, Noise


class DeltaNetParams(NamedTuple):
    """w_x (D, heads (K + n (K + V + 1))): input weights; columns of q, of k, of v and of β, product by product and head
    by head; None where x holds these already.
    """

    w_x: Array | None


class DeltaNetCarry(NamedTuple):
    """s (..., heads, K, V): the state, what each head has stored at its keys."""

    s: Array


class DeltaNetGates(NamedTuple):
    """beta (..., n heads): the strength of writing, product by product."""

    beta: Array


class DeltaNet(MatrixCell[DeltaNetParams, DeltaNetCarry]):
    """A linear memory that replaces what it holds at a key: `delta_net_step` as a cell.

        q = unit(x w_q) / √K,  k = unit(x w_k),  v = x w_v                           for each head
        β = σ(x w_β)
        S' = (I − β k kᵀ) S + β k vᵀ
        y = S'ᵀ q,  all heads side by side

    Args:
      input_size: The number of input features, D.
      heads: The number of heads.
      key_size: The size of the keys of a head, K.
      value_size: The size of the values of a head, V; y has heads · V features.
      negative_eigenvalues: Whether β = 2 σ(x w_β), so that a step can turn the state round, which tasks of counting and
        of permutations need.
      products: The number n of keys, values and β of a step, which are written one after the other: a step is then a
        product of n reflections, as a permutation is of swaps (DeltaProduct).
      key_heads: The number of heads of q and k, a divisor of `heads`, each for several of v; None for one each.
      project: Whether x is multiplied by w_x. If not, x already holds q, k, v and β side by side, as in a
        block that convolves them before, and `input_size` is their number.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.DeltaNet(8, heads=2, key_size=4, value_size=6)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))
      >>> carry.s.shape, ys.shape
      ((2, 4, 6), (7, 12))

    References:
      Schlag et al. 2021, Linear transformers are secretly fast weight programmers, arXiv 2102.11174; Yang et al. 2024,
      arXiv 2406.06484; negative eigenvalues: Grazzi et al. 2024, arXiv 2411.12537; products: Siems et al. 2025, arXiv
      2502.10297.
    """

    step_by_kernel = True

    input_size: int
    heads: int
    key_size: int
    value_size: int
    negative_eigenvalues: bool = False
    products: int = 1
    key_heads: int | None = None
    project: bool = True

    def __post_init__(self):
        check.sizes(self, "input_size", "heads", "key_size", "value_size")
        check_products(self)

    @property
    def _rule(self) -> Rule:
        sizes = self.heads, self.key_size, self.value_size, self.key_heads or self.heads
        return Rule(*sizes, self.products, self.negative_eigenvalues)

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> DeltaNetParams:
        return delta_net_init(
            key,
            self.input_size,
            self.heads,
            self.key_size,
            self.value_size,
            products=self.products,
            key_heads=self.key_heads,
            project=self.project,
            dtype=dtype,
        )

    def initial_carry(self, params: DeltaNetParams, batch_shape: tuple[int, ...] = ()) -> DeltaNetCarry:
        return DeltaNetCarry(self.zeros(params, batch_shape))

    def gates(self, params: DeltaNetParams, carry: DeltaNetCarry, x: Array, noise: Noise = None) -> DeltaNetGates:
        """The strength of writing of one step."""
        check.params(self, params)
        beta = projected(params, x)[..., -self.products * self.heads :]
        return DeltaNetGates(strength(beta, self.negative_eigenvalues))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return delta_net_step(
            params,
            carry,
            x,
            noise,
            negative_eigenvalues=self.negative_eigenvalues,
            products=self.products,
            key_heads=self.key_heads,
        )

    def inputs(self, params, x):
        return delta_inputs(self._rule, *_parts(params, x))


def delta_net_init(
    key: Array,
    input_size: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    products: int = 1,
    key_heads: int | None = None,
    project: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> DeltaNetParams:
    """Draws the parameters of `delta_net_step`: w_x is LeCun normal.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.delta_net_init(jax.random.key(0), 8, 2, 4, 6).w_x.shape
      (8, 30)
    """
    columns = sum(Rule(heads, key_size, value_size, key_heads or heads, products).columns)
    return DeltaNetParams(lecun_normal(key, input_size, columns, 1, dtype) if project else None)


def delta_net_step(
    params: DeltaNetParams,
    carry: DeltaNetCarry,
    x: Array,
    noise: Noise = None,
    *,
    negative_eigenvalues: bool = False,
    products: int = 1,
    key_heads: int | None = None,
) -> tuple[DeltaNetCarry, Array]:
    """One step of the delta rule.

        S' = (I − β k kᵀ) S + β k vᵀ,  y = S'ᵀ q

    Args:
      params: `DeltaNetParams` with w_x (D, heads (K + n (K + V + 1))), or None.
      carry: `DeltaNetCarry(s)` with s (..., heads, K, V).
      x: The input of one step, of shape (..., D).
      noise: Always None.
      negative_eigenvalues: As in `DeltaNet`.
      products: As in `DeltaNet`.
      key_heads: As in `DeltaNet`.

    Returns:
      The new carry, and the output of shape (..., heads · V).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.delta_net_init(jax.random.key(0), 8, 2, 4, 6)
      >>> carry, y = jaxrnn.delta_net_step(params, jaxrnn.DeltaNetCarry(jnp.zeros((2, 4, 6))), jnp.ones(8))
      >>> y.shape
      (12,)
    """
    check.kind(params, DeltaNetParams)
    size = x.shape[-1] if params.w_x is None else params.w_x.shape[0]
    options = {"products": products, "key_heads": key_heads, "project": params.w_x is not None}
    check.drawn(params, delta_net_init, size, *carry.s.shape[-3:], **options)
    heads, key_size, value_size = carry.s.shape[-3:]
    rule = Rule(heads, key_size, value_size, key_heads or heads, products, negative_eigenvalues)
    return delta_step(rule, params, carry, x, _parts)


def _parts(params, x):
    return (projected(params, x), None), (None, None)
