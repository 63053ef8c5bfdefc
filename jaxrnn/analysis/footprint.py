"""The memory of a training step: estimated, and measured from the compiled program."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from jaxrnn import check
from jaxrnn.cell import Cell
from jaxrnn.engines.walk import Question
from jaxrnn.sequence import scan_asked
from jaxrnn.typing import PyTree


class TrainingMemory(NamedTuple):
    """The memory of one training step, in bytes.

    activations: the final carry and ys.
    residuals: the arrays that the forward pass keeps for the backward pass.
    recomputed: the residuals of one chunk, which exist while the backward pass is in it; 0 without `remat_every`.
    estimated: residuals + recomputed.
    measured: the memory that the compiled step allocates besides its arguments and results; None where the platform
    does not say.
    """

    activations: int
    residuals: int
    recomputed: int
    estimated: int
    measured: int | None


def training_memory(
    cell: Cell,
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    loss: Callable[[PyTree, PyTree], Array],
    *,
    remat_every: int | None = None,
    **keywords: Any,
) -> TrainingMemory:
    """The memory of one training step (the loss and its gradient with respect to the params); nothing is run.

        M    = T r            residuals without remat_every, r bytes a step
        M(k) ≈ (T/k) c + k r  with remat_every = k, c bytes a carry: least at k = √(T c / r)

    The residuals are counted in JAX's own program, before XLA: they are the distinct arrays that the forward pass hands
    to the backward pass, not counting params, carry and xs. They include the arrays that the loss and the layers
    without memory keep. In a `Stack`, one layer after the other is recomputed, so `recomputed` is an upper bound.
    `measured` comes from XLA: it includes the buffers of the backward pass besides the residuals, and XLA fuses some of
    the residuals away.

    For example, an `Elman` with φ = identity keeps h_{t−1} of each step, for w_h, and y_t if the loss is Σ y²: r = 2 H
    numbers.

    Args:
      cell: Any cell or composition.
      params: As in `jaxrnn.scan`. Here and in carry and xs, a `jax.ShapeDtypeStruct` can replace an array and takes no
        memory.
      carry: As in `jaxrnn.scan`.
      xs: As in `jaxrnn.scan`.
      loss: A function `(carry, ys) -> scalar` of the results of `jaxrnn.scan`.
      remat_every: As in `jaxrnn.scan`.
      keywords: As in `jaxrnn.scan`.

    Returns:
      A `TrainingMemory`. For several k, use `{k: training_memory(..., remat_every=k) for k in (None, 8, 32)}`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> from jaxrnn.analysis import training_memory
      >>> cell = jaxrnn.Elman(2, 8)
      >>> params = cell.init(jax.random.key(0))
      >>> xs = jax.ShapeDtypeStruct((100, 2), jnp.float32)
      >>> memory = training_memory(cell, params, None, xs, lambda carry, ys: jnp.sum(ys**2))
      >>> memory.residuals == 2 * 100 * 8 * 4
      True

    References:
      Chen et al. 2016, Training deep nets with sublinear memory cost, arXiv 1604.06174; Gruslys et al. 2016,
      Memory-efficient backpropagation through time, arXiv 1606.03401.
    """
    check.a_cell("cell", cell)
    if not callable(loss):
        raise TypeError(f"loss: expected a function of (carry, ys), got {loss!r}")
    arguments = (params, carry, xs)

    def run(every, params, carry, xs, question=None):
        return scan_asked(question, cell, params, carry, xs, remat_every=every, **keywords)

    def kept(every):
        here = Question(jax.default_backend())  # of which alone the residuals are counted

        def backward(params, carry, xs):
            return jax.vjp(lambda params: loss(*run(every, params, carry, xs, here)), params)[1]

        return _distinct_bytes(jax.make_jaxpr(backward)(*arguments).jaxpr)

    def step(params, carry, xs):
        return jax.value_and_grad(lambda params: loss(*run(remat_every, params, carry, xs)))(params)

    final, ys = jax.eval_shape(lambda *arguments: run(remat_every, *arguments), *arguments)
    length = jax.tree.leaves(xs)[0].shape[keywords.get("time_axis", 0)]
    residuals = kept(remat_every)
    recomputed = 0 if remat_every is None else math.ceil(kept(None) * min(remat_every, length) / max(length, 1))
    analysis = jax.jit(step).lower(*arguments).compile().memory_analysis()
    return TrainingMemory(
        activations=sum(map(_bytes, jax.tree.leaves((final, ys)))),
        residuals=residuals,
        recomputed=recomputed,
        estimated=residuals + recomputed,
        measured=None if analysis is None else analysis.temp_size_in_bytes,
    )


def _bytes(array: PyTree) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def _distinct_bytes(jaxpr: Any) -> int:
    """The bytes of the arrays that a program returns, each counted once.

    Constants and the arguments of the program, also in another shape, are not counted.
    """
    given = {id(variable) for variable in jaxpr.invars}
    for equation in jaxpr.eqns:
        name, source = equation.primitive.name, equation.invars[:1]
        constant = name == "broadcast_in_dim" and hasattr(source[0], "val")
        shaped = name in ("reshape", "broadcast_in_dim") and id(source[0]) in given
        if constant or (shaped and source[0].aval.size == equation.outvars[0].aval.size):
            given.add(id(equation.outvars[0]))
    returned = {id(variable): variable.aval for variable in jaxpr.outvars}
    return sum(_bytes(aval) for name, aval in returned.items() if name not in given)
