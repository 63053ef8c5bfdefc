"""The gated delta rule."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.delta import Rule, check_products, delta_inputs, delta_step, log_decay, strength
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.matrix import MatrixCell, draw_step_bias, projected
from jaxrnn.engines.arrays import accumulator
from jaxrnn.typing import DTypeLike, Noise


class GatedDeltaNetParams(NamedTuple):
    """w_x (D, heads (K + n (K + V + 1) + 1)): input weights; columns of q, of k, of v, of β and of the step Δ, product
    by product and head by head; None where x holds these already. b_step (heads,): bias of Δ; log_decay (heads,): the
    logarithm of the rate at which a head forgets.
    """

    w_x: Array | None
    b_step: Array
    log_decay: Array


class GatedDeltaNetCarry(NamedTuple):
    """s (..., heads, K, V): the state, what each head has stored at its keys."""

    s: Array


class GatedDeltaNetGates(NamedTuple):
    """beta (..., n heads): the strength of writing, product by product; a (..., heads): the share that is kept."""

    beta: Array
    a: Array


class GatedDeltaNet(MatrixCell[GatedDeltaNetParams, GatedDeltaNetCarry]):
    """A linear memory that forgets, and replaces what it holds at a key: `gated_delta_net_step` as a cell.

        q = unit(x w_q) / √K,  k = unit(x w_k),  v = x w_v                           for each head
        β = σ(x w_β)
        a = exp(−exp(log_decay) Δ),  Δ = softplus(x w_step + b_step)
        S' = a (I − β k kᵀ) S + β k vᵀ
        y = S'ᵀ q,  all heads side by side

    It is the recurrence of Qwen3-Next and Qwen3.5, without the convolutions before it and the gate after it.

    Args:
      input_size: The number of input features, D.
      heads: The number of heads.
      key_size: The size of the keys of a head, K.
      value_size: The size of the values of a head, V; y has heads · V features.
      negative_eigenvalues: Whether β = 2 σ(x w_β), so that a step can turn the state round, which tasks of counting and
        of permutations need.
      products: The number n of keys, values and β of a step, which are written one after the other: a step is then a
        product of n reflections (Gated DeltaProduct).
      key_heads: The number of heads of q and k, a divisor of `heads`, each for several of v; None for one each.
      project: Whether x is multiplied by w_x. If not, x already holds q, k, v, β and Δ side by side, as in a
        block that convolves them before, and `input_size` is their number.
      step_min: The smallest Δ that is drawn; its logarithm is drawn uniformly.
      step_max: The largest Δ that is drawn.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.GatedDeltaNet(8, heads=2, key_size=4, value_size=6)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))
      >>> carry.s.shape, ys.shape
      ((2, 4, 6), (7, 12))

    References:
      Yang et al. 2024, Gated delta networks, arXiv 2412.06464; negative eigenvalues: Grazzi et al. 2024, arXiv
      2411.12537; products: Siems et al. 2025, arXiv 2502.10297.
    """

    slow_weights = ("log_decay", "b_step")
    step_by_kernel = True

    input_size: int
    heads: int
    key_size: int
    value_size: int
    negative_eigenvalues: bool = False
    products: int = 1
    key_heads: int | None = None
    project: bool = True
    step_min: float = 1e-3
    step_max: float = 1e-1

    def __post_init__(self):
        check.sizes(self, "input_size", "heads", "key_size", "value_size")
        check_products(self)
        check.steps(self)

    @property
    def _rule(self) -> Rule:
        sizes = self.heads, self.key_size, self.value_size, self.key_heads or self.heads
        return Rule(*sizes, self.products, self.negative_eigenvalues)

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> GatedDeltaNetParams:
        return gated_delta_net_init(
            key,
            self.input_size,
            self.heads,
            self.key_size,
            self.value_size,
            products=self.products,
            key_heads=self.key_heads,
            project=self.project,
            step_min=self.step_min,
            step_max=self.step_max,
            dtype=dtype,
        )

    def initial_carry(self, params: GatedDeltaNetParams, batch_shape: tuple[int, ...] = ()) -> GatedDeltaNetCarry:
        return GatedDeltaNetCarry(self.zeros(params, batch_shape))

    def gates(
        self, params: GatedDeltaNetParams, carry: GatedDeltaNetCarry, x: Array, noise: Noise = None
    ) -> GatedDeltaNetGates:
        """The strength of writing and the share that is kept of one step."""
        check.params(self, params)
        features, betas = projected(params, x), self.products * self.heads
        beta, step = features[..., -betas - self.heads : -self.heads], features[..., -self.heads :]
        decay = log_decay(self._rule, step, params.b_step, params.log_decay)
        return GatedDeltaNetGates(strength(beta, self.negative_eigenvalues), jnp.exp(decay))

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return gated_delta_net_step(
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


def gated_delta_net_init(
    key: Array,
    input_size: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    products: int = 1,
    key_heads: int | None = None,
    project: bool = True,
    step_min: float = 1e-3,
    step_max: float = 1e-1,
    dtype: DTypeLike = jnp.float32,
) -> GatedDeltaNetParams:
    """Draws the parameters of `gated_delta_net_step`: w_x is LeCun normal; b_step is such that Δ without input is
    log-uniform; exp(log_decay) is uniform up to 16.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.gated_delta_net_init(jax.random.key(0), 8, 2, 4, 6).w_x.shape
      (8, 32)
    """
    wide = accumulator(dtype)
    k_x, k_step, k_decay = jax.random.split(key, 3)
    columns = sum(Rule(heads, key_size, value_size, key_heads or heads, products).columns) + heads
    params = GatedDeltaNetParams(
        w_x=lecun_normal(k_x, input_size, columns, 1, wide) if project else None,
        b_step=draw_step_bias(k_step, heads, step_min, step_max, wide),
        log_decay=jnp.log(jax.random.uniform(k_decay, (heads,), wide, 0.01, 16.0)),
    )
    return jax.tree.map(lambda each: each.astype(dtype), params)


def gated_delta_net_step(
    params: GatedDeltaNetParams,
    carry: GatedDeltaNetCarry,
    x: Array,
    noise: Noise = None,
    *,
    negative_eigenvalues: bool = False,
    products: int = 1,
    key_heads: int | None = None,
) -> tuple[GatedDeltaNetCarry, Array]:
    """One step of the gated delta rule.

        S' = a (I − β k kᵀ) S + β k vᵀ,  y = S'ᵀ q

    Args:
      params: `GatedDeltaNetParams` with w_x (D, heads (K + n (K + V + 1) + 1)) or None, b_step and log_decay (heads,).
      carry: `GatedDeltaNetCarry(s)` with s (..., heads, K, V).
      x: The input of one step, of shape (..., D).
      noise: Always None.
      negative_eigenvalues: As in `GatedDeltaNet`.
      products: As in `GatedDeltaNet`.
      key_heads: As in `GatedDeltaNet`.

    Returns:
      The new carry, and the output of shape (..., heads · V).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.gated_delta_net_init(jax.random.key(0), 8, 2, 4, 6)
      >>> carry, y = jaxrnn.gated_delta_net_step(params, jaxrnn.GatedDeltaNetCarry(jnp.zeros((2, 4, 6))), jnp.ones(8))
      >>> y.shape
      (12,)
    """
    check.kind(params, GatedDeltaNetParams)
    size = x.shape[-1] if params.w_x is None else params.w_x.shape[0]
    options = {"products": products, "key_heads": key_heads, "project": params.w_x is not None}
    check.drawn(params, gated_delta_net_init, size, *carry.s.shape[-3:], **options)
    heads, key_size, value_size = carry.s.shape[-3:]
    rule = Rule(heads, key_size, value_size, key_heads or heads, products, negative_eigenvalues)
    return delta_step(rule, params, carry, x, _parts)


def _parts(params, x):
    return (projected(params, x), None), (params.b_step, params.log_decay)
