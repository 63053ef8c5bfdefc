"""Cells as modules of Flax NNX; see `jaxrnn.flax.nnx`."""

from jaxrnn.flax.nnx import RNN, FlaxCarry, NNXCell, from_nnx, from_params, to_params

__all__ = ["RNN", "FlaxCarry", "NNXCell", "from_nnx", "from_params", "to_params"]
