"""jaxrnn: recurrent networks for JAX, as pure functions over pytrees."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from jaxrnn.attributes import of_package as _of_package
from jaxrnn.cell import Cell
from jaxrnn.cells.activations import activation
from jaxrnn.cells.causal_conv import (
    CausalConv,
    CausalConvCarry,
    CausalConvParams,
    causal_conv_init,
    causal_conv_step,
)
from jaxrnn.cells.chrono import chrono_init
from jaxrnn.cells.conv_lstm import ConvLSTM, ConvLSTMCarry, ConvLSTMParams, conv_lstm_init, conv_lstm_step
from jaxrnn.cells.delta_net import (
    DeltaNet,
    DeltaNetCarry,
    DeltaNetGates,
    DeltaNetParams,
    delta_net_init,
    delta_net_step,
)
from jaxrnn.cells.elman import Elman, ElmanCarry, ElmanGates, ElmanParams, elman_init, elman_step, irnn_init
from jaxrnn.cells.gated import GatedCell
from jaxrnn.cells.gated_delta_net import (
    GatedDeltaNet,
    GatedDeltaNetCarry,
    GatedDeltaNetGates,
    GatedDeltaNetParams,
    gated_delta_net_init,
    gated_delta_net_step,
)
from jaxrnn.cells.gla import GLA, GLACarry, GLAGates, GLAParams, gla_init, gla_step
from jaxrnn.cells.gru import GRU, GRUCarry, GRUGates, GRUNorm, GRUParams, gru_init, gru_step
from jaxrnn.cells.hgrn import HGRN, HGRNCarry, HGRNGates, HGRNParams, hgrn_init, hgrn_step
from jaxrnn.cells.hgrn2 import HGRN2, HGRN2Carry, HGRN2Gates, HGRN2Params, hgrn2_init, hgrn2_step
from jaxrnn.cells.indrnn import IndRNN, IndRNNCarry, IndRNNGates, IndRNNParams, indrnn_init, indrnn_step
from jaxrnn.cells.kda import KDA, KDACarry, KDAGates, KDAParams, kda_init, kda_step
from jaxrnn.cells.linear import LinearCell
from jaxrnn.cells.linear_attention import (
    LinearAttention,
    LinearAttentionCarry,
    LinearAttentionParams,
    linear_attention_init,
    linear_attention_step,
)
from jaxrnn.cells.lru import LRU, LRUCarry, LRUParams, lru_init, lru_step
from jaxrnn.cells.lstm import LSTM, LSTMCarry, LSTMGates, LSTMNorm, LSTMParams, lstm_init, lstm_step
from jaxrnn.cells.mamba2 import Mamba2, Mamba2Carry, Mamba2Gates, Mamba2Params, mamba2_init, mamba2_step
from jaxrnn.cells.matrix import MatrixCell, MatrixInputs
from jaxrnn.cells.mgu import MGU, MGUCarry, MGUGates, MGUParams, mgu_init, mgu_step
from jaxrnn.cells.min_gru import MinGRU, MinGRUCarry, MinGRUGates, MinGRUParams, min_gru_init, min_gru_step
from jaxrnn.cells.min_lstm import (
    MinLSTM,
    MinLSTMCarry,
    MinLSTMGates,
    MinLSTMParams,
    min_lstm_init,
    min_lstm_step,
)
from jaxrnn.cells.mlstm import MLSTM, MLSTMCarry, MLSTMGates, MLSTMParams, mlstm_init, mlstm_step
from jaxrnn.cells.qrnn import QRNN, QRNNCarry, QRNNParams, qrnn_init, qrnn_step
from jaxrnn.cells.ret_net import RetNet, RetNetCarry, RetNetParams, ret_net_init, ret_net_step
from jaxrnn.cells.rg_lru import RGLRU, RGLRUCarry, RGLRUGates, RGLRUParams, rg_lru_init, rg_lru_step
from jaxrnn.cells.rwkv7 import RWKV7, RWKV7Carry, RWKV7Gates, RWKV7Params, rwkv7_init, rwkv7_step
from jaxrnn.cells.s4d import S4D, S4DCarry, S4DParams, s4d_init, s4d_step
from jaxrnn.cells.s5 import S5, S5Carry, S5Params, s5_init, s5_step
from jaxrnn.cells.s6 import S6, S6Carry, S6Params, s6_init, s6_step
from jaxrnn.cells.slstm import SLSTM, SLSTMCarry, SLSTMGates, SLSTMParams, slstm_init, slstm_step
from jaxrnn.cells.sru import SRU, SRUCarry, SRUGates, SRUParams, sru_init, sru_step
from jaxrnn.cells.token_shift import (
    TokenShift,
    TokenShiftCarry,
    TokenShiftParams,
    token_shift_init,
    token_shift_step,
)
from jaxrnn.compose.blocks import glu, griffin_block, mamba_block, residual_block, slstm_block
from jaxrnn.compose.matrix_blocks import gated_delta_block, kda_block, mamba2_block, mlstm_block, rwkv7_block
from jaxrnn.compose.noise import RecurrentDropout, WeightDrop, Zoneout
from jaxrnn.compose.parallel import Bidirectional, BidirectionalPair, Parallel
from jaxrnn.compose.pool import Pool, PoolCarry
from jaxrnn.compose.repeat import Repeat
from jaxrnn.compose.stack import Stack
from jaxrnn.compose.wrap import Backward, EmitCarry, Emitted, LearnedCarry, LearnedCarryParams, Residual
from jaxrnn.engines.gated.recurrence import GatedWeights
from jaxrnn.engines.linear.engine import linear_scan
from jaxrnn.engines.matrix.engine import matrix_scan
from jaxrnn.exporting import prepare as _prepare
from jaxrnn.layers import (
    Apply,
    Dropout,
    Embed,
    EmbedParams,
    Layer,
    LayerNorm,
    LayerNormParams,
    Linear,
    LinearParams,
    RMSNorm,
    RMSNormParams,
)
from jaxrnn.sequence import Explanation, explain, last, rollout, scan, step
from jaxrnn.table import Summary, SummaryRow, summary

__version__ = "0.1.0"

__all__ = [
    "GLA",
    "GRU",
    "HGRN",
    "HGRN2",
    "KDA",
    "LRU",
    "LSTM",
    "MGU",
    "MLSTM",
    "QRNN",
    "RGLRU",
    "RWKV7",
    "S4D",
    "S5",
    "S6",
    "SLSTM",
    "SRU",
    "Apply",
    "Backward",
    "Bidirectional",
    "BidirectionalPair",
    "CausalConv",
    "CausalConvCarry",
    "CausalConvParams",
    "Cell",
    "ConvLSTM",
    "ConvLSTMCarry",
    "ConvLSTMParams",
    "DeltaNet",
    "DeltaNetCarry",
    "DeltaNetGates",
    "DeltaNetParams",
    "Dropout",
    "Elman",
    "ElmanCarry",
    "ElmanGates",
    "ElmanParams",
    "Embed",
    "EmbedParams",
    "EmitCarry",
    "Emitted",
    "Explanation",
    "GLACarry",
    "GLAGates",
    "GLAParams",
    "GRUCarry",
    "GRUGates",
    "GRUNorm",
    "GRUParams",
    "GatedCell",
    "GatedDeltaNet",
    "GatedDeltaNetCarry",
    "GatedDeltaNetGates",
    "GatedDeltaNetParams",
    "GatedWeights",
    "HGRN2Carry",
    "HGRN2Gates",
    "HGRN2Params",
    "HGRNCarry",
    "HGRNGates",
    "HGRNParams",
    "IndRNN",
    "IndRNNCarry",
    "IndRNNGates",
    "IndRNNParams",
    "KDACarry",
    "KDAGates",
    "KDAParams",
    "LRUCarry",
    "LRUParams",
    "LSTMCarry",
    "LSTMGates",
    "LSTMNorm",
    "LSTMParams",
    "Layer",
    "LayerNorm",
    "LayerNormParams",
    "LearnedCarry",
    "LearnedCarryParams",
    "Linear",
    "LinearAttention",
    "LinearAttentionCarry",
    "LinearAttentionParams",
    "LinearCell",
    "LinearParams",
    "MGUCarry",
    "MGUGates",
    "MGUParams",
    "MLSTMCarry",
    "MLSTMGates",
    "MLSTMParams",
    "Mamba2",
    "Mamba2Carry",
    "Mamba2Gates",
    "Mamba2Params",
    "MatrixCell",
    "MatrixInputs",
    "MinGRU",
    "MinGRUCarry",
    "MinGRUGates",
    "MinGRUParams",
    "MinLSTM",
    "MinLSTMCarry",
    "MinLSTMGates",
    "MinLSTMParams",
    "Parallel",
    "Pool",
    "PoolCarry",
    "QRNNCarry",
    "QRNNParams",
    "RGLRUCarry",
    "RGLRUGates",
    "RGLRUParams",
    "RMSNorm",
    "RMSNormParams",
    "RWKV7Carry",
    "RWKV7Gates",
    "RWKV7Params",
    "RecurrentDropout",
    "Repeat",
    "Residual",
    "RetNet",
    "RetNetCarry",
    "RetNetParams",
    "S4DCarry",
    "S4DParams",
    "S5Carry",
    "S5Params",
    "S6Carry",
    "S6Params",
    "SLSTMCarry",
    "SLSTMGates",
    "SLSTMParams",
    "SRUCarry",
    "SRUGates",
    "SRUParams",
    "Stack",
    "Summary",
    "SummaryRow",
    "TokenShift",
    "TokenShiftCarry",
    "TokenShiftParams",
    "WeightDrop",
    "Zoneout",
    "activation",
    "causal_conv_init",
    "causal_conv_step",
    "chrono_init",
    "conv_lstm_init",
    "conv_lstm_step",
    "delta_net_init",
    "delta_net_step",
    "elman_init",
    "elman_step",
    "explain",
    "gated_delta_block",
    "gated_delta_net_init",
    "gated_delta_net_step",
    "gla_init",
    "gla_step",
    "glu",
    "griffin_block",
    "gru_init",
    "gru_step",
    "hgrn2_init",
    "hgrn2_step",
    "hgrn_init",
    "hgrn_step",
    "indrnn_init",
    "indrnn_step",
    "irnn_init",
    "kda_block",
    "kda_init",
    "kda_step",
    "last",
    "linear_attention_init",
    "linear_attention_step",
    "linear_scan",
    "lru_init",
    "lru_step",
    "lstm_init",
    "lstm_step",
    "mamba2_block",
    "mamba2_init",
    "mamba2_step",
    "mamba_block",
    "matrix_scan",
    "mgu_init",
    "mgu_step",
    "min_gru_init",
    "min_gru_step",
    "min_lstm_init",
    "min_lstm_step",
    "mlstm_block",
    "mlstm_init",
    "mlstm_step",
    "qrnn_init",
    "qrnn_step",
    "residual_block",
    "ret_net_init",
    "ret_net_step",
    "rg_lru_init",
    "rg_lru_step",
    "rollout",
    "rwkv7_block",
    "rwkv7_init",
    "rwkv7_step",
    "s4d_init",
    "s4d_step",
    "s5_init",
    "s5_step",
    "s6_init",
    "s6_step",
    "scan",
    "slstm_block",
    "slstm_init",
    "slstm_step",
    "sru_init",
    "sru_step",
    "step",
    "summary",
    "token_shift_init",
    "token_shift_step",
]

_prepare(list(vars().values()))
if _TYPE_CHECKING:
    from jaxrnn import analysis as analysis
    from jaxrnn import convert as convert
    from jaxrnn import exporting as exporting
    from jaxrnn import linen as linen
    from jaxrnn import nnx as nnx
    from jaxrnn import training as training
    from jaxrnn import typing as typing
else:  # else a type checker would take any name for one
    __getattr__, __dir__ = _of_package(__all__)
