"""Cells as modules of Flax linen; see `jaxrnn.flax.linen`."""

from jaxrnn.flax.linen import RNN, FlaxCarry, LinenCell, from_params, to_params

__all__ = ["RNN", "FlaxCarry", "LinenCell", "from_params", "to_params"]
