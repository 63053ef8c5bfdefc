"""The blocks that language models build around matrix recurrences, as compositions: each function returns a cell."""

from __future__ import annotations

from jaxrnn.cell import Cell
from jaxrnn.cells.causal_conv import CausalConv
from jaxrnn.cells.gated_delta_net import GatedDeltaNet
from jaxrnn.compose.blocks import gated
from jaxrnn.compose.parallel import Parallel
from jaxrnn.compose.stack import Stack
from jaxrnn.layers import Apply, Linear, RMSNorm


def gated_delta_block(
    size: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    key_heads: int | None = None,
    window: int = 4,
    negative_eigenvalues: bool = False,
    products: int = 1,
    epsilon: float = 1e-6,
) -> Cell:
    """The recurrent layer of Qwen3-Next and Qwen3.5: q, k and v convolved, the gated delta rule, normalised head by
    head, times a gate that sees only x.

        q, k, v = silu(conv(x w_qkv));  β, Δ = x w_gates
        y = (norm_heads(GatedDeltaNet(q, k, v, β, Δ)) · silu(x w_z)) w_out

    No product and no convolution has a bias, and all heads have the same scale of the normalisation. It is the layer
    alone, without a residual connection.

    Args:
      size: The size D of x and y.
      heads: As in `GatedDeltaNet`, as are the next three.
      key_size: The size of the keys of a head.
      value_size: The size of the values of a head.
      key_heads: The number of heads of q and k; None for `heads`.
      window: The window of the convolution.
      negative_eigenvalues: As in `GatedDeltaNet`, as in Olmo-Hybrid.
      products: As in `GatedDeltaNet`.
      epsilon: As in `RMSNorm`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.gated_delta_block(8, heads=4, key_size=3, value_size=2, key_heads=2)
      >>> jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))[1].shape
      (7, 8)

    References:
      Yang et al. 2024, Gated delta networks, arXiv 2412.06464, section 3.4.
    """
    keys = (heads if key_heads is None else key_heads) * key_size
    read, gates = keys + products * (keys + heads * value_size), (products + 1) * heads
    features = Parallel((_convolved(size, read, window), Linear(size, gates, bias=False)))
    options = {"negative_eigenvalues": negative_eigenvalues, "products": products, "key_heads": key_heads}
    rule = GatedDeltaNet(read + gates, heads, key_size, value_size, **options, project=False)
    norm = RMSNorm(heads * value_size, epsilon, heads, shared=True)
    return gated(Stack((features, rule, norm)), size, size, "silu", bias=False)


def _convolved(size: int, output: int, window: int, *, bias: bool = False) -> Cell:
    """silu(conv(x w))."""
    return Stack((Linear(size, output, bias=False), CausalConv(output, window, bias), Apply("silu")))
