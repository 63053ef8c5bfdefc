"""Flax NNX: every cell as a module, and any NNX cell as a cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from jaxrnn import check
from jaxrnn.cell import Cell
from jaxrnn.engines.arrays import cast
from jaxrnn.engines.walk import Implementation
from jaxrnn.flax import bridge
from jaxrnn.flax.bridge import FlaxCarry, FlaxCell, from_params, to_params
from jaxrnn.sequence import step
from jaxrnn.typing import Bools, DTypeLike, Integers, PyTree

__all__ = ["RNN", "FlaxCarry", "NNXCell", "from_nnx", "from_params", "to_params"]


class RNN(nnx.Module):
    """A cell, or a model made of cells, as an NNX module that maps xs to ys, batch-major.

    Every array is an `nnx.Param` of its own, with a path like `("layer_0", "w_x")`; see `from_params`. Their initial
    values are drawn by `cell.init` with one key of `rngs.params`.

    Differences from `flax.nnx.RNN`: at padding, ys is 0 and the carry stays the same; a length of 0 returns the initial
    carry; with `reverse`, ys stay aligned with xs; `scan` returns the carry, and no flag changes what `__call__`
    returns.

    Args:
      cell: Any `jaxrnn.Cell`.
      rngs: The streams from which the params are drawn; if the cell draws noise (dropout, zoneout), one is forked for
        it.
      params: The params of the cell, instead of drawing them.
      time_major: Whether xs and ys are (T, *batch, ...) instead of (*batch, T, ...).
      reverse: As in `jaxrnn.scan`.
      remat_every: As in `jaxrnn.scan`.
      implementation: As in `jaxrnn.scan`.
      deterministic: True for no noise; `model.eval()` and `model.train()` set it.
      param_dtype: The dtype of the params that are drawn. Computation is in the dtype of xs.
      rng_collection: The stream from which noise is drawn.

    Raises:
      TypeError: If neither `rngs` nor `params` is given.
      ValueError: If `params` are not those of the cell.

    Examples:
      >>> import jax.numpy as jnp, jaxrnn
      >>> from flax import nnx
      >>> from jaxrnn.nnx import RNN
      >>> rngs = nnx.Rngs(0)
      >>> cell = jaxrnn.Stack((jaxrnn.GRU(3, 8), jaxrnn.Dropout(0.1), jaxrnn.LSTM(8, 4)))
      >>> model = nnx.Sequential(RNN(cell, rngs=rngs), nnx.Linear(4, 1, rngs=rngs))
      >>> model(jnp.ones((5, 7, 3))).shape  # batch, time, features
      (5, 7, 1)
      >>> sorted(model.layers[0].layer_2)
      ['b', 'w_h', 'w_x']
    """

    def __init__(
        self,
        cell: Cell,
        *,
        rngs: nnx.Rngs | None = None,
        params: PyTree = None,
        time_major: bool = False,
        reverse: bool = False,
        remat_every: int | None = None,
        implementation: Implementation = None,
        deterministic: bool | None = False,
        param_dtype: DTypeLike = jnp.float32,
        rng_collection: str = "dropout",
    ):
        bridge.check_cell(cell)
        if rngs is not None and not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs: expected flax.nnx.Rngs, got {type(rngs).__name__}")
        if params is None:
            if rngs is None:
                raise TypeError("rngs: expected flax.nnx.Rngs to draw the params from, or params; got neither")
            params = cell.init(rngs.params(), param_dtype)
        self.cell = cell
        self.time_major = time_major
        self.reverse = reverse
        self.remat_every = remat_every
        self.implementation = FrozenDict(implementation) if isinstance(implementation, Mapping) else implementation
        self.deterministic = deterministic
        self.rng_collection = rng_collection
        self.rngs = rngs[rng_collection].fork() if rngs is not None and bridge.draws(cell) else nnx.data(None)
        for name, tree in from_params(cell, params).items():
            setattr(self, name, nnx.data(jax.tree.map(lambda leaf: nnx.Param(jnp.asarray(leaf)), tree)))

    def __call__(
        self,
        xs: PyTree,
        *,
        seq_lengths: Integers | None = None,
        mask: Bools | None = None,
        reset: Bools | None = None,
        initial_carry: Any = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
    ) -> PyTree:
        """Returns the outputs of a sequence: `scan` without the carry."""
        return self.scan(
            xs,
            seq_lengths=seq_lengths,
            mask=mask,
            reset=reset,
            initial_carry=initial_carry,
            deterministic=deterministic,
            rngs=rngs,
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
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        """Runs `jaxrnn.scan` and returns the final carry and the outputs of a sequence.

        Args:
          xs: The inputs, (*batch, T, ...), or (T, *batch, ...) with `time_major`.
          seq_lengths: Integers (*batch): the number of valid steps.
          mask: bool, with time and batch axes as in xs: the valid steps.
          reset: bool, with time and batch axes as in xs: True where a new sequence begins.
          initial_carry: The carry to start from, with leaves (*batch, ...), or None to start fresh.
          deterministic: True for no noise; None to use the attribute.
          rngs: The source of noise, instead of the stream that was forked at construction.

        Raises:
          ValueError: If shapes, dtypes or values do not fit, or if the cell draws noise and there is nothing to draw it
            from.
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
            key=self._key(deterministic, rngs),
            remat_every=self.remat_every,
            implementation=self.implementation,
        )

    def step(self, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        """Runs one step without noise and returns the new carry and y. A carry of None starts fresh.

        Examples:
          >>> import jax.numpy as jnp, jaxrnn
          >>> from flax import nnx
          >>> from jaxrnn.nnx import RNN
          >>> model = RNN(jaxrnn.GRU(3, 4), rngs=nnx.Rngs(0))
          >>> carry, y = model.step(None, jnp.ones((5, 3)))
          >>> y.shape
          (5, 4)
        """
        return step(self.cell, self.params(), carry, x, implementation=self.implementation)

    def params(self) -> PyTree:
        """Returns the params as the cell and the functions of jaxrnn take them; `RNN(cell, params=...)` is the way
        back.
        """
        tree = {name: getattr(self, name) for name in bridge.top_names(self.cell)}
        return to_params(self.cell, jax.tree.map(lambda p: p[...], tree, is_leaf=lambda p: isinstance(p, nnx.Param)))

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the attribute that `nnx.view` sets."""
        if deterministic is not None:
            self.deterministic = deterministic

    def _key(self, deterministic: bool | None, rngs: nnx.Rngs | nnx.RngStream | Array | None) -> Array | None:
        if not bridge.draws(self.cell):
            return None
        bridge.check_deterministic(self.cell, self.deterministic, deterministic)
        if self.deterministic if deterministic is None else deterministic:
            return None
        match self.rngs if rngs is None else rngs:
            case None:
                raise ValueError(
                    f"rngs: {self.cell!r} draws noise; give rngs to RNN or to the call, or deterministic=True"
                )
            case nnx.Rngs() as streams:
                return streams[self.rng_collection]()
            case nnx.RngStream() as stream:
                return stream()
            case key:
                return key


class NNXCell(FlaxCell):
    """An NNX cell as a cell, made by `from_nnx`: with lengths, resets, both directions, gradient checkpointing, in
    compositions.

    Its params are nested dicts of the module's `nnx.Param`s. Its carry gets names: (c, h) of Flax becomes
    `LSTMCarry(h, c)`, and one array becomes `FlaxCarry(h)`; see `jaxrnn.flax.bridge.FlaxCell`. It computes as the
    module does, and its output has the dtype of x. It may neither print as an expression nor pickle.

    Args:
      graphdef: The graph definition that `nnx.split` gives.
      input_size: The number of input features, D, or the sizes of all axes of one x.
      shapes: The path, shape and dtype of every param.
      create: A function: `create(rngs)` builds such a module, with which `init` draws params; or None.
    """

    graphdef: nnx.GraphDef
    input_size: int | tuple[int, ...]
    shapes: tuple[tuple[tuple[PyTree, ...], tuple[int, ...], str], ...]
    create: Callable[[nnx.Rngs], nnx.Module] | None = None

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> dict[PyTree, PyTree]:
        """Returns the params of a module that `create` builds, in `dtype`.

        Raises:
          TypeError: If the cell was made without `create`, since a module does not show how its params were drawn.
        """
        if self.create is not None:
            graphdef, params = _split(self.create(nnx.Rngs(key)))
            if graphdef != self.graphdef:
                raise ValueError("create: expected a module like the one that was given to from_nnx, got another")
            return cast(params, dtype)
        refusal = TypeError(
            f"init: {self!r} was made of a module, which does not say how its params were drawn; give from_nnx "
            "`create`, a function from nnx.Rngs to such a module"
        )
        if check.concrete(key):
            raise refusal

        def refuse(key):
            raise refusal

        # Shapes are known, and may be asked for; numbers are not.
        shapes = {path: jax.ShapeDtypeStruct(shape, jnp.dtype(own)) for path, shape, own in self.shapes}
        shapes = jax.eval_shape(lambda tree: cast(tree, dtype), unflatten_dict(shapes))
        return jax.pure_callback(refuse, shapes, jax.random.key_data(key))

    def begin(self, params, key, shape):
        return self._module(params).initialize_carry(shape, nnx.Rngs(key))

    def run(self, params, carry, x):
        # Flax's cells promote their inputs to one dtype.
        with jax.numpy_dtype_promotion("standard"):
            return self._module(params)(carry, x)

    def _module(self, params: PyTree) -> PyTree:
        return nnx.merge(self.graphdef, nnx.State(params))

    def __repr__(self):
        module = self.graphdef.nodes[0].type  # type: ignore[union-attr]
        return f"NNXCell({module.__name__}, input_size={self.input_size!r})"


def from_nnx(
    module: nnx.RNNCellBase,
    input_size: int | tuple[int, ...] | None = None,
    *,
    create: Callable[[nnx.Rngs], nnx.Module] | None = None,
) -> tuple[NNXCell, dict[PyTree, PyTree]]:
    """Converts an NNX cell to a cell and its params, which are the module's graph definition and its state.

    Random streams that the module holds are left out: a step that draws from one raises Flax's own error.

    Args:
      module: A `flax.nnx.RNNCellBase` with no state except `nnx.Param`s, which begins with a constant carry.
      input_size: The number of input features, D, or the sizes of all axes of one x; None for `module.in_features`.
      create: A function: `create(rngs)` builds such a module. Only with it can the cell draw other params, by `init`.

    Raises:
      TypeError: If the module is of another kind, has other state (batch statistics), or does not state its size.
      ValueError: If the module draws its initial carry at random, or if `create` builds another module.

    Examples:
      >>> import jax.numpy as jnp, jaxrnn
      >>> from flax import nnx
      >>> from jaxrnn.nnx import from_nnx
      >>> cell, params = from_nnx(nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0)))
      >>> carry, ys = jaxrnn.scan(cell, params, None, jnp.ones((7, 2, 3)), lengths=jnp.array([7, 0]))
      >>> ys.shape, carry.c.shape
      ((7, 2, 4), (2, 4))
    """
    if not isinstance(module, nnx.RNNCellBase):
        raise TypeError(f"module: expected a flax.nnx.RNNCellBase, got {type(module).__name__}")
    size = getattr(module, "in_features", None) if input_size is None else input_size
    if size is None:
        raise TypeError(f"input_size: expected the size of one x, since {type(module).__name__} has no in_features")
    graphdef, params = _split(module)
    leaves: dict[tuple[PyTree, ...], PyTree] = flatten_dict(params)
    shapes = tuple((path, leaf.shape, leaf.dtype.name) for path, leaf in leaves.items())
    return NNXCell(graphdef, size, shapes, create), params


def _split(module: nnx.Module) -> tuple[nnx.GraphDef, dict[PyTree, PyTree]]:
    """Returns the graph definition without random streams, and the params as nested dicts."""
    module = nnx.clone(module)
    for _, part in nnx.iter_modules(module):
        for name, value in list(vars(part).items()):
            if isinstance(value, (nnx.Rngs, nnx.RngStream)):
                setattr(part, name, None)
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    if rest:
        found = ", ".join(f"{type(leaf).__name__} {path}" for path, leaf in nnx.to_flat_state(rest))
        raise TypeError(f"module: expected no state but nnx.Param in {type(module).__name__}, got {found}")
    return graphdef, nnx.to_pure_dict(params)
