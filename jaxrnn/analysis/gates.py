"""How often gates are nearly shut or nearly open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from jaxrnn.analysis.observation import Observation, arrange, observations, observe
from jaxrnn.cell import Cell
from jaxrnn.compose.noise import RecurrentDropout, WeightDrop, Zoneout
from jaxrnn.compose.wrap import EmitCarry
from jaxrnn.engines.arrays import select
from jaxrnn.typing import Bools, Integers, Named, PyTree

# What runs through tanh by default; everything else is taken for a gate in (0, 1).
CANDIDATES = {"g": (-1.0, 1.0), "n": (-1.0, 1.0), "h": (-1.0, 1.0)}


class Saturation(NamedTuple):
    """The fractions of valid steps at which each unit of each gate is low and at which it is high.

    Each is a named tuple like the gates of the cell, with leaves (H,).
    """

    low: Any
    high: Any


@runtime_checkable
class Gated(Protocol):
    """A cell whose gates can be read, as a named tuple of arrays (*batch, ...)."""

    def gates(self, params: PyTree, carry: PyTree, x: PyTree) -> PyTree: ...


def gate_saturation(
    cell: Cell,
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    *,
    margin: float = 0.1,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    lengths: Integers | None = None,
    mask: Bools | None = None,
    reset: Bools | None = None,
    reverse: bool = False,
    time_axis: int = 0,
) -> PyTree:
    """Measures how often each unit of each gate is saturated.

        low  = mean over valid (t, row) of [gate < a + margin (b − a)]
        high = mean over valid (t, row) of [gate > b − margin (b − a)],    (a, b) the gate's range

    Almost no gradient passes through a gate that is mostly low or high. A forget gate that is high remembers, and one
    that is always low makes the layer a feed-forward one. With input 0 and a large bias β, a sigmoid gate is σ(β): at
    the default margin it is high everywhere for β > log 9.

    Args:
      cell: As in `jaxrnn.scan`; a cell with `gates(params, carry, x)`, alone or in a composition.
      params: As in `jaxrnn.scan`.
      carry: As in `jaxrnn.scan`.
      xs: As in `jaxrnn.scan`.
      margin: The part of the range at either end that counts as saturated, in (0, 0.5).
      ranges: The range (a, b) of gates by name, where it is not (−1, 1) for g, n and h and (0, 1) for the rest.
      lengths: As in `jaxrnn.scan`.
      mask: As in `jaxrnn.scan`.
      reset: As in `jaxrnn.scan`.
      reverse: As in `jaxrnn.scan`.
      time_axis: As in `jaxrnn.scan`.

    Returns:
      A `Saturation`. For a composition, one for each cell in the structure of the carry, and None for a cell without
      gates.

    Raises:
      TypeError: If no cell has gates.
      ValueError: If the margin or a range is not valid.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> from jaxrnn.analysis import gate_saturation
      >>> cell = jaxrnn.LSTM(3, 2)
      >>> params = cell.init(jax.random.key(0))
      >>> params = params._replace(b=jnp.array([-9.0, 9, 9, 0, 0, 0, 0, 0]))
      >>> saturation = gate_saturation(cell, params, None, jnp.zeros((7, 3)))
      >>> saturation.low.i, saturation.high.i, saturation.high.f
      (Array([1., 0.], dtype=float32), Array([0., 1.], dtype=float32), Array([1., 0.], dtype=float32))

    References:
      Karpathy et al. 2015, Visualizing and understanding recurrent networks, arXiv 1506.02078, section 4.3.
    """
    if not isinstance(margin, (int, float)) or not 0 < margin < 0.5:
        raise ValueError(f"margin: expected a number between 0 and 0.5, got {margin!r}")
    bounds = CANDIDATES | dict(ranges or {})
    for name, (low, high) in bounds.items():
        if not low < high:
            raise ValueError(f"ranges: expected (a, b) with a < b for {name!r}, got {(low, high)}")
    keywords: Named = {"lengths": lengths, "mask": mask, "reset": reset, "reverse": reverse}
    final, _ = observe(cell, params, carry, xs, time_axis=time_axis, **keywords)
    results = [_saturation(one, margin, bounds) for one in observations(final)]
    if all(result is None for result in results):
        raise TypeError(f"cell: expected one with `gates(params, carry, x)`, alone or inside, got {cell!r}")
    return arrange(final, results)


def _saturation(seen: Observation, margin, bounds) -> Saturation | None:
    cell: Any = seen.cell
    while isinstance(cell, (RecurrentDropout, WeightDrop, Zoneout, EmitCarry)):  # their params are the cell's own
        cell = cell.cell
    if not isinstance(cell, Gated):
        return None
    gates = cell.gates(seen.params, *seen.reads)
    axes = tuple(range(seen.valid.ndim))
    number = jnp.maximum(seen.valid.sum(), 1)

    def fraction(flags):
        flags = select(seen.valid, flags, jnp.zeros_like(flags))
        return flags.sum(axes) / number

    low, high = {}, {}
    for name, gate in gates._asdict().items():
        a, b = bounds.get(name, (0.0, 1.0))
        low[name], high[name] = fraction(gate < a + margin * (b - a)), fraction(gate > b - margin * (b - a))
    return Saturation(type(gates)(**low), type(gates)(**high))
