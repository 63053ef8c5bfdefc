"""jaxrnn: recurrent networks for JAX, as pure functions over pytrees."""

from jaxrnn.cell import Cell
from jaxrnn.cells.activations import activation
from jaxrnn.cells.chrono import chrono_init
from jaxrnn.cells.conv_lstm import ConvLSTM, ConvLSTMCarry, ConvLSTMParams, conv_lstm_init, conv_lstm_step
from jaxrnn.cells.elman import Elman, ElmanCarry, ElmanGates, ElmanParams, elman_init, elman_step, irnn_init
from jaxrnn.cells.gated import GatedCell
from jaxrnn.cells.gru import GRU, GRUCarry, GRUGates, GRUNorm, GRUParams, gru_init, gru_step
from jaxrnn.cells.hgrn import HGRN, HGRNCarry, HGRNGates, HGRNParams, hgrn_init, hgrn_step
from jaxrnn.cells.indrnn import IndRNN, IndRNNCarry, IndRNNGates, IndRNNParams, indrnn_init, indrnn_step
from jaxrnn.cells.linear import LinearCell
from jaxrnn.cells.lru import LRU, LRUCarry, LRUParams, lru_init, lru_step
from jaxrnn.cells.lstm import LSTM, LSTMCarry, LSTMGates, LSTMNorm, LSTMParams, lstm_init, lstm_step
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
from jaxrnn.cells.rg_lru import RGLRU, RGLRUCarry, RGLRUGates, RGLRUParams, rg_lru_init, rg_lru_step
from jaxrnn.cells.s5 import S5, S5Carry, S5Params, s5_init, s5_step
from jaxrnn.cells.slstm import SLSTM, SLSTMCarry, SLSTMGates, SLSTMParams, slstm_init, slstm_step
from jaxrnn.compose import Bidirectional, BidirectionalPair, Stack
from jaxrnn.engines.gated import GatedWeights
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
)
from jaxrnn.linear import linear_scan
from jaxrnn.pool import Pool, PoolCarry
from jaxrnn.regularize import RecurrentDropout, WeightDrop, Zoneout
from jaxrnn.sequence import Explanation, explain, last, rollout, scan, step
from jaxrnn.summary import Summary, SummaryRow, summary
from jaxrnn.wrap import Backward, EmitCarry, Emitted, LearnedCarry, LearnedCarryParams, Residual

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "HGRN",
    "LRU",
    "LSTM",
    "MGU",
    "RGLRU",
    "S5",
    "SLSTM",
    "Apply",
    "Backward",
    "Bidirectional",
    "BidirectionalPair",
    "Cell",
    "ConvLSTM",
    "ConvLSTMCarry",
    "ConvLSTMParams",
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
    "GRUCarry",
    "GRUGates",
    "GRUNorm",
    "GRUParams",
    "GatedCell",
    "GatedWeights",
    "HGRNCarry",
    "HGRNGates",
    "HGRNParams",
    "IndRNN",
    "IndRNNCarry",
    "IndRNNGates",
    "IndRNNParams",
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
    "LinearCell",
    "LinearParams",
    "MGUCarry",
    "MGUGates",
    "MGUParams",
    "MinGRU",
    "MinGRUCarry",
    "MinGRUGates",
    "MinGRUParams",
    "MinLSTM",
    "MinLSTMCarry",
    "MinLSTMGates",
    "MinLSTMParams",
    "Pool",
    "PoolCarry",
    "RGLRUCarry",
    "RGLRUGates",
    "RGLRUParams",
    "RecurrentDropout",
    "Residual",
    "S5Carry",
    "S5Params",
    "SLSTMCarry",
    "SLSTMGates",
    "SLSTMParams",
    "Stack",
    "Summary",
    "SummaryRow",
    "WeightDrop",
    "Zoneout",
    "activation",
    "chrono_init",
    "conv_lstm_init",
    "conv_lstm_step",
    "elman_init",
    "elman_step",
    "explain",
    "gru_init",
    "gru_step",
    "hgrn_init",
    "hgrn_step",
    "indrnn_init",
    "indrnn_step",
    "irnn_init",
    "last",
    "linear_scan",
    "lru_init",
    "lru_step",
    "lstm_init",
    "lstm_step",
    "mgu_init",
    "mgu_step",
    "min_gru_init",
    "min_gru_step",
    "min_lstm_init",
    "min_lstm_step",
    "rg_lru_init",
    "rg_lru_step",
    "rollout",
    "s5_init",
    "s5_step",
    "scan",
    "slstm_init",
    "slstm_step",
    "step",
    "summary",
]
