"""Flax linen: every cell as a module, and any linen cell as a cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict, unfreeze
from jax import Array

from jaxrnn.cell import Cell
from jaxrnn.engines.arrays import cast
from jaxrnn.engines.walk import Implementation
from jaxrnn.flax import bridge
from jaxrnn.flax.bridge import FlaxCarry, FlaxCell, from_params, to_params
from jaxrnn.sequence import step
from jaxrnn.typing import Bools, DTypeLike, Integers, Named, PyTree

__all__ = ["RNN", "FlaxCarry", "LinenCell", "from_params", "to_params"]


class RNN(nn.Module):
    """A cell, or a model made of cells, as a linen module that maps xs to ys, batch-major.

    Every array is a param of its own: `{"params": {"layer_0": {"w_x": ..., "w_h": ..., "b": ...}}}`; see `from_params`.
    Their initial values are drawn by `cell.init` with one key of the "params" stream.

    Differences from `flax.linen.RNN`: at padding, ys is 0 and the carry stays the same; a length of 0 returns the
    initial carry; with `reverse`, ys stay aligned with xs; `scan` returns the carry, and no flag changes what
    `__call__` returns.

    Attributes:
      cell: Any `jaxrnn.Cell`.
      time_major: Whether xs and ys are (T, *batch, ...) instead of (*batch, T, ...).
      reverse: As in `jaxrnn.scan`.
      remat_every: As in `jaxrnn.scan`.
      implementation: As in `jaxrnn.scan`.
      deterministic: True for no noise (dropout, zoneout). It must be given here or in the call if the cell draws noise.
      param_dtype: The dtype of the params. Computation is in the dtype of xs.
      rng_collection: The stream from which noise is drawn.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxrnn
      >>> from jaxrnn.linen import RNN
      >>> cell = jaxrnn.Stack((jaxrnn.GRU(3, 8), jaxrnn.Dropout(0.1), jaxrnn.LSTM(8, 4)))
      >>> model = nn.Sequential([RNN(cell, deterministic=True), nn.Dense(1)])
      >>> xs = jnp.ones((5, 7, 3))  # batch, time, features
      >>> variables = model.init(jax.random.key(0), xs)
      >>> model.apply(variables, xs).shape
      (5, 7, 1)
      >>> sorted(variables["params"]["layers_0"]["layer_2"])
      ['b', 'w_h', 'w_x']
    """

    cell: Cell
    time_major: bool = False
    reverse: bool = False
    remat_every: int | None = None
    implementation: Implementation = None
    deterministic: bool | None = None
    param_dtype: DTypeLike = jnp.float32
    rng_collection: str = "dropout"

    def __post_init__(self):
        if isinstance(self.implementation, Mapping):
            self.implementation = FrozenDict(self.implementation)  # which hashes
        bridge.check_cell(self.cell)
        nn.Module.__post_init__(self)

    def setup(self):
        names = bridge.top_names(self.cell)
        if not names or any(self.has_variable("params", name) for name in names):
            return
        drawn = {}
        # Where nothing may be drawn, `param` raises Flax's own error.
        if self.is_mutable_collection("params"):
            drawn = from_params(self.cell, self.cell.init(self.make_rng("params"), self.param_dtype))
        for name in names:
            self.param(name, lambda _, name: drawn[name], name)

    def __call__(
        self,
        xs: PyTree,
        *,
        seq_lengths: Integers | None = None,
        mask: Bools | None = None,
        reset: Bools | None = None,
        initial_carry: Any = None,
        deterministic: bool | None = None,
    ) -> PyTree:
        """Returns the outputs of a sequence: `scan` without the carry."""
        return self.scan(
            xs,
            seq_lengths=seq_lengths,
            mask=mask,
            reset=reset,
            initial_carry=initial_carry,
            deterministic=deterministic,
        )[1]

    def scan(
        self,
        xs: PyTree,
        *,
        seq_lengths: Integers | None = None,
        mask: Bools | None = None,
        reset: Bools | None = None,
        initial_carry: Any = None,
        deterministic: bool | None = None,
    ) -> tuple[PyTree, PyTree]:
        """Runs `jaxrnn.scan` and returns the final carry and the outputs of a sequence.

        Args:
          xs: The inputs, (*batch, T, ...), or (T, *batch, ...) with `time_major`.
          seq_lengths: Integers (*batch): the number of valid steps.
          mask: bool, with time and batch axes as in xs: the valid steps.
          reset: bool, with time and batch axes as in xs: True where a new sequence begins.
          initial_carry: The carry to start from, with leaves (*batch, ...), or None to start fresh.
          deterministic: True for no noise.

        Raises:
          ValueError: If shapes, dtypes or values do not fit, or if the cell draws noise and nobody said whether to.
          TypeError: If types or dtypes do not fit.
        """
        return bridge.run(
            self.cell,
            self.params(),
            xs,
            initial_carry=initial_carry,
            seq_lengths=seq_lengths,
            time_major=self.time_major,
            mask=mask,
            reset=reset,
            reverse=self.reverse,
            key=self._key(deterministic),
            remat_every=self.remat_every,
            implementation=self.implementation,
        )

    def step(self, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        """Runs one step without noise and returns the new carry and y. A carry of None starts fresh.

        Examples:
          >>> import jax, jax.numpy as jnp, jaxrnn
          >>> from jaxrnn.linen import RNN
          >>> model = RNN(jaxrnn.GRU(3, 4))
          >>> variables = model.init(jax.random.key(0), jnp.ones((5, 7, 3)))
          >>> carry, y = model.apply(variables, None, jnp.ones((5, 3)), method="step")
          >>> y.shape
          (5, 4)
        """
        return step(self.cell, self.params(), carry, x, implementation=self.implementation)

    def params(self) -> PyTree:
        """Returns the params in the form that the cell and the functions of jaxrnn take."""
        names = [name for name in bridge.top_names(self.cell) if self.has_variable("params", name)]
        return to_params(self.cell, {name: nn.meta.unbox(self.get_variable("params", name)) for name in names})

    def _key(self, deterministic: bool | None) -> Array | None:
        if not bridge.draws(self.cell):
            return None
        bridge.check_deterministic(self.cell, self.deterministic, deterministic)
        merged = nn.merge_param("deterministic", self.deterministic, deterministic)
        return None if merged else self.make_rng(self.rng_collection)


class LinenCell(FlaxCell):
    """A linen cell as a cell: with lengths, resets, both directions, gradient checkpointing, and in every composition.

    Its params are the module's own nested dicts. Its carry gets names: (c, h) of Flax becomes `LSTMCarry(h, c)`, and
    one array becomes `FlaxCarry(h)`; see `jaxrnn.flax.bridge.FlaxCell`. It computes as the module does, and its output
    has the dtype of x. It hashes and compares as the module does; it may neither print as an expression nor pickle.

    Args:
      module: A `flax.linen.RNNCellBase` that holds only params and begins with a constant carry.
      input_size: The number of input features, D, or the sizes of all axes of one x.

    Raises:
      TypeError: If `module` is of another kind, and on `init` if it has other state (batch statistics).
      ValueError: If the module draws its initial carry at random.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxrnn
      >>> from jaxrnn.linen import LinenCell
      >>> cell = jaxrnn.Bidirectional(LinenCell(nn.OptimizedLSTMCell(4), 3), jaxrnn.GRU(3, 4))
      >>> params = cell.init(jax.random.key(0))
      >>> carry, ys = jaxrnn.scan(cell, params, None, jnp.ones((7, 2, 3)), lengths=jnp.array([7, 0]))
      >>> ys.shape, carry.forward.c.shape
      ((7, 2, 8), (2, 4))
    """

    module: nn.RNNCellBase
    input_size: int | tuple[int, ...]

    def __post_init__(self):
        if not isinstance(self.module, nn.RNNCellBase):
            raise TypeError(f"LinenCell.module: expected a flax.linen.RNNCellBase, got {self.module!r}")
        # One that was built inside another module belongs to it and has its scope.
        object.__setattr__(self, "module", self.module.clone(parent=None, name=None))
        FlaxCell.__post_init__(self)

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> Named:
        """Draws the module's own params as the module draws them, in `dtype`."""

        def once(module, x):
            return module(module.initialize_carry(jax.random.key(0), x.shape), x)

        with jax.numpy_dtype_promotion("standard"):
            variables = unfreeze(nn.init(once, self.module)(key, jnp.zeros(self.x_shape())))
        params = variables.pop("params", {})
        if variables:
            raise TypeError(f"LinenCell: a cell holds params alone, and {self!r} also has {sorted(variables)}")
        return cast(nn.meta.unbox(params), dtype)

    def begin(self, params, key, shape):
        return self.module.apply({"params": params}, key, shape, method="initialize_carry")

    def run(self, params, carry, x):
        # Flax's cells promote their inputs to one dtype.
        with jax.numpy_dtype_promotion("standard"):
            return self.module.apply({"params": params}, carry, x)

    def __repr__(self):
        fields = [field for field in dataclasses.fields(self.module) if field.name not in ("parent", "name")]
        values = [(field.name, getattr(self.module, field.name), field.default) for field in fields]
        given = ", ".join(f"{name}={value!r}" for name, value, default in values if value is not default)
        return f"LinenCell({type(self.module).__name__}({given}), input_size={self.input_size!r})"
