"""The blocks that language models build around matrix recurrences, as compositions: each function returns a cell."""

from __future__ import annotations

from jaxrnn.cell import Cell
from jaxrnn.cells.causal_conv import CausalConv
from jaxrnn.cells.gated_delta_net import GatedDeltaNet
from jaxrnn.cells.kda import KDA
from jaxrnn.cells.mamba2 import Mamba2
from jaxrnn.cells.mlstm import MLSTM
from jaxrnn.cells.rwkv7 import RWKV7
from jaxrnn.cells.token_shift import TokenShift
from jaxrnn.compose.blocks import gated
from jaxrnn.compose.parallel import Parallel
from jaxrnn.compose.stack import Stack
from jaxrnn.compose.wrap import Residual
from jaxrnn.layers import Apply, LayerNorm, Linear, RMSNorm


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


def kda_block(
    size: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    rank: int | None = None,
    window: int = 4,
    bound: float | None = None,
    negative_eigenvalues: bool = False,
    epsilon: float = 1e-5,
) -> Cell:
    """The recurrent layer of Kimi Linear: q, k and v convolved, Kimi Delta Attention, normalised head by head, times a
    gate that sees only x.

        q, k, v = silu(conv(x w_qkv));  β = x w_β;  z = x w_1 w_2
        y = (norm_heads(KDA(q, k, v, β, z)) · σ(x w_3 w_4)) w_out

    No product and no convolution has a bias, and all heads have the same scale of the normalisation. It is the layer
    alone, without a residual connection.

    Args:
      size: The size D of x and y.
      heads: As in `KDA`, as are the next two.
      key_size: The size of the keys of a head.
      value_size: The size of the values of a head.
      rank: The rank of the two maps to gates, w_1 w_2 and w_3 w_4; None for `value_size`.
      window: The window of the convolution.
      bound: As in `KDA`.
      negative_eigenvalues: As in `KDA`.
      epsilon: As in `RMSNorm`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.kda_block(8, heads=2, key_size=3, value_size=4)
      >>> jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))[1].shape
      (7, 8)

    References:
      Kimi Team 2025, Kimi Linear, arXiv 2510.26692, section 4.
    """
    rank = value_size if rank is None else rank
    keys, values = heads * key_size, heads * value_size
    read = 2 * keys + values
    decay = Stack((Linear(size, rank, bias=False), Linear(rank, keys, bias=False)))
    features = Parallel((_convolved(size, read, window), Linear(size, heads, bias=False), decay))
    options = {"bound": bound, "negative_eigenvalues": negative_eigenvalues}
    rule = KDA(read + heads + keys, heads, key_size, value_size, **options, project=False)
    branch = Stack((features, rule, RMSNorm(values, epsilon, heads, shared=True)))
    gate = Stack((Linear(size, rank, bias=False), Linear(rank, values, bias=False), Apply("sigmoid")))
    return Stack((Parallel((branch, gate), "mul"), Linear(values, size, bias=False)))


def mamba2_block(
    size: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    key_heads: int = 1,
    window: int = 4,
    epsilon: float = 1e-5,
) -> Cell:
    """The block of Mamba-2: C, B and v convolved, its state space layer, times a gate that sees only x, and then a
    normalisation.

        C, B, v = silu(conv(x w_CBv));  Δ = x w_Δ
        y = norm(Mamba2(C, B, v, Δ) · silu(x w_z)) w_out

    The normalisation acts on the heads that share B and C together; only the convolution has a bias. It is the layer
    alone, without a residual connection.

    Args:
      size: The size D of x and y.
      heads: As in `Mamba2`, as are the next two; in the paper there are 2 D / `value_size`.
      key_size: The number of states of each feature of a head.
      value_size: The number of features of a head.
      key_heads: The number of heads of B and C, and of groups that are normalised separately.
      window: The window of the convolution.
      epsilon: As in `RMSNorm`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.mamba2_block(8, heads=4, key_size=3, value_size=4, key_heads=2)
      >>> jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))[1].shape
      (7, 8)

    References:
      Dao & Gu 2024, Transformers are SSMs, arXiv 2405.21060, section 7.1.
    """
    values = heads * value_size
    read = 2 * key_heads * key_size + values
    features = Parallel((_convolved(size, read, window, bias=True), Linear(size, heads, bias=False)))
    layer = Mamba2(read + heads, heads, key_size, value_size, key_heads, project=False)
    gate = Stack((Linear(size, values, bias=False), Apply("silu")))
    product = Parallel((Stack((features, layer)), gate), "mul")
    return Stack((product, RMSNorm(values, epsilon, key_heads), Linear(values, size, bias=False)))


def mlstm_block(
    size: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    input_gate: str = "exponential",
    soft_cap: float | None = 15.0,
    epsilon: float = 1e-6,
) -> Cell:
    """The recurrent layer of xLSTM-7B: an mLSTM, normalised head by head, times a gate that sees only x.

        y = (norm_heads(mLSTM(x)) · σ(x w_o)) w_out

    It is the layer alone, without the normalisation before it and the residual connection.

    Args:
      size: The size D of x and y.
      heads: As in `MLSTM`, as are the next two.
      key_size: The size of the keys of a head; in the model half of `value_size`.
      value_size: The size of the values of a head; in the model D / `heads`.
      input_gate: As in `MLSTM`.
      soft_cap: As in `MLSTM`.
      epsilon: As in `LayerNorm`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.residual_block(jaxrnn.mlstm_block(8, heads=2, key_size=2, value_size=4))
      >>> jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))[1].shape
      (7, 8)

    References:
      Beck et al. 2025, xLSTM 7B, arXiv 2503.13427, section 3.
    """
    rule = MLSTM(size, heads, key_size, value_size, input_gate, soft_cap)
    norm = LayerNorm(heads * value_size, epsilon, heads)
    return gated(Stack((rule, norm)), size, size, "sigmoid", bias=False)


def rwkv7_block(
    size: int, heads: int, key_size: int, hidden_size: int | None = None, *, rank: int = 64, gate_rank: int = 128
) -> Cell:
    """A whole block of RWKV-7, time mixing and channel mixing, each after a layer normalisation and inside a residual
    connection.

        x ← x + time(norm(x)),  time(x) = (RWKV7(r, k, v, z, α) · g) w_out
        y = x + channel(norm(x)),  channel(x) = relu(shift(x) w_1)² w_2

    Where r, k, v, z, α and g each see a shift of tokens of their own: r, k, v = shift(x) w;
    z = tanh(shift(x) w_3) w_4;  α = shift(x) w_5 w_6;  g = σ(shift(x) w_7) w_8. No product has a bias. The values of a
    head have the size of its keys.

    In the model, each block but the first mixes the values of the first block into its own; here none does.

    Args:
      size: The size D of x and y.
      heads: The number of heads of `RWKV7`.
      key_size: The size of the keys and of the values of a head; in the model D / `heads`, 64.
      hidden_size: The size of the inner layer of channel mixing; None for 4 D.
      rank: The rank of the maps from x to z and α.
      gate_rank: The rank of the map from x to g.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.rwkv7_block(8, heads=2, key_size=4, rank=3, gate_rank=5)
      >>> jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))[1].shape
      (7, 8)

    References:
      Peng et al. 2025, RWKV-7 "Goose", arXiv 2503.14456, section 4 and figure 1.
    """
    keys, hidden_size = heads * key_size, 4 * size if hidden_size is None else hidden_size

    def seen(power: float, *layers: Cell) -> Cell:
        return Stack((TokenShift(size, power), *layers))

    def low_rank(power: float, rank: int, *between: Cell) -> Cell:
        return seen(power, Linear(size, rank, bias=False), *between, Linear(rank, keys, bias=False))

    read, written, value = (seen(power, Linear(size, keys, bias=False)) for power in (0.2, 0.7, 0.7))
    features = Parallel((read, written, value, low_rank(0.9, rank, Apply("tanh")), low_rank(0.9, rank)))
    rule = Stack((features, RWKV7(5 * keys, heads, key_size, key_size, project=False)))
    mixed = Parallel((rule, low_rank(0.2, gate_rank, Apply("sigmoid"))), "mul")
    squared = Parallel((Apply("relu"), Apply("relu")), "mul")
    channel = seen(1.0, Linear(size, hidden_size, bias=False), squared, Linear(hidden_size, size, bias=False))
    return Stack(
        (
            Residual(Stack((LayerNorm(size), mixed, Linear(keys, size, bias=False)))),
            Residual(Stack((LayerNorm(size), channel))),
        )
    )


def _convolved(size: int, output: int, window: int, *, bias: bool = False) -> Cell:
    """silu(conv(x w))."""
    return Stack((Linear(size, output, bias=False), CausalConv(output, window, bias), Apply("silu")))
