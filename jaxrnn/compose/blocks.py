"""The blocks that papers build around recurrences, as compositions: each function returns a cell."""

from __future__ import annotations

from jaxrnn.cell import Cell, output_size
from jaxrnn.cells.activations import Activation
from jaxrnn.cells.causal_conv import CausalConv
from jaxrnn.cells.rg_lru import RGLRU
from jaxrnn.cells.s6 import S6
from jaxrnn.cells.slstm import SLSTM
from jaxrnn.compose.parallel import Parallel
from jaxrnn.compose.stack import Stack
from jaxrnn.compose.wrap import Residual
from jaxrnn.layers import Apply, LayerNorm, Linear


def gated(cell: Cell, size: int, output: int, activation: Activation, *, bias: bool = True) -> Cell:
    """Returns a cell with y = (cell(x) · φ(x w)) w_out: the output of a branch, times a gate that sees only x."""
    inner = output_size(cell, size)
    gate = Stack((Linear(size, inner, bias), Apply(activation)))
    return Stack((Parallel((cell, gate), "mul"), Linear(inner, output, bias)))


def glu(size: int, hidden_size: int, activation: Activation = "gelu") -> Cell:
    """The feed-forward layer with a gated linear unit: y = ((x w_1) · φ(x w_2)) w_3.

    Args:
      size: The size D of x and y.
      hidden_size: The size of the inner layer.
      activation: The activation φ: "gelu" for GeGLU, "silu" for SwiGLU, "sigmoid" for GLU.

    Examples:
      >>> import jaxrnn
      >>> jaxrnn.glu(8, 16).output_size
      8

    References:
      Shazeer 2020, GLU variants improve transformer, arXiv 2002.05202.
    """
    return gated(Linear(size, hidden_size), size, size, activation)


def residual_block(cell: Cell, hidden_size: int | None = None, activation: Activation = "gelu") -> Cell:
    """A cell, then a gated feed-forward layer, each after a layer normalisation and inside a residual connection.

        x ← x + cell(norm(x))
        y = x + glu(norm(x))

    Args:
      cell: A cell with the same input and output size, D.
      hidden_size: The size of the feed-forward layer; None for 3 D, which has as many parameters as an ordinary one of
        size 4.5 D.
      activation: The activation of `glu`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.residual_block(jaxrnn.LRU(8, 16))
      >>> jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 8)))[1].shape
      (7, 8)

    References:
      De et al. 2024, Griffin, arXiv 2402.19427, section 2.1 (with layer normalisation for its RMSNorm).
    """
    size = output_size(cell)
    if not isinstance(size, int):
        raise ValueError(f"cell: expected one whose output is a vector of a size that it tells, got {cell!r}")
    hidden_size = 3 * size if hidden_size is None else hidden_size
    return Stack(
        (
            Residual(Stack((LayerNorm(size), cell))),
            Residual(Stack((LayerNorm(size), glu(size, hidden_size, activation)))),
        )
    )


def griffin_block(size: int, hidden_size: int | None = None, *, blocks: int = 1, window: int = 4) -> Cell:
    """The recurrent block of Griffin: a causal convolution and an RG-LRU, times a gate that sees only x.

        y = (RGLRU(conv(x w_1)) · gelu(x w_2)) w_3

    Args:
      size: The size D of x and y.
      hidden_size: The size of the recurrence; None for D.
      blocks: The number of blocks of the gates of `RGLRU`.
      window: The window of the convolution.

    Examples:
      >>> import jaxrnn
      >>> cell = jaxrnn.residual_block(jaxrnn.griffin_block(8, 12, blocks=3))
      >>> jaxrnn.summary(cell).count
      1176

    References:
      De et al. 2024, Griffin, arXiv 2402.19427, section 2.2.
    """
    inner = size if hidden_size is None else hidden_size
    branch = Stack((Linear(size, inner), CausalConv(inner, window), RGLRU(inner, blocks)))
    return gated(branch, size, size, "gelu")


def mamba_block(
    size: int, hidden_size: int | None = None, *, states: int = 16, rank: int | None = None, window: int = 4
) -> Cell:
    """The block of Mamba: a causal convolution and a selective state space layer, times a gate that sees only x.

        y = (S6(silu(conv(x w_1))) · silu(x w_2)) w_3

    Args:
      size: The size D of x and y.
      hidden_size: The size of the recurrence; None for 2 D.
      states: As in `S6`.
      rank: As in `S6`; None for D/16, rounded up.
      window: The window of the convolution.

    Examples:
      >>> import jaxrnn
      >>> cell = jaxrnn.mamba_block(8, states=4)
      >>> jaxrnn.summary(cell).count
      760

    References:
      Gu & Dao 2023, Mamba, arXiv 2312.00752, section 3.4.
    """
    inner = 2 * size if hidden_size is None else hidden_size
    branch = Stack(
        (
            Linear(size, inner),
            CausalConv(inner, window),
            Apply("silu"),
            S6(inner, states, -(-size // 16) if rank is None else rank),
        )
    )
    return gated(branch, size, size, "silu")


def slstm_block(size: int, *, heads: int = 4, window: int | None = 4) -> Cell:
    """The block of xLSTM with post up-projection: an sLSTM, normalised head by head, then a gated feed-forward layer.

        x ← x + norm_heads(sLSTM(silu(conv(norm(x)))))
        y = x + glu(norm(x)), of 4/3 D

    Here the convolution feeds all gates; in the paper it feeds those of input and forgetting.

    Args:
      size: The size D of x and y.
      heads: The number of heads of `SLSTM`.
      window: The window of the convolution; None for no convolution.

    Examples:
      >>> import jaxrnn
      >>> cell = jaxrnn.slstm_block(8, heads=2)
      >>> jaxrnn.summary(cell).count
      798

    References:
      Beck et al. 2024, xLSTM, arXiv 2405.04517, figure 10.
    """
    before = () if window is None else (CausalConv(size, window), Apply("silu"))
    recurrence = Stack((*before, SLSTM(size, size, heads=heads), LayerNorm(size, groups=heads)))
    return residual_block(recurrence, -(-4 * size // 3))
