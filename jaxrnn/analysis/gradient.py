"""How the gradient of a loss flows back through the carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn.analysis.observation import arrange, final_carry, norm, observations, observe
from jaxrnn.cell import Cell
from jaxrnn.engines.arrays import inexact
from jaxrnn.typing import Bools, Integers, Named, PyTree


class GradientFlow(NamedTuple):
    """The loss, the norm ‖∂L/∂c_t‖ for each leaf of the carry, and the norm for all leaves together.

    `norms` is a tree like the carry; each norm and `total` have shape (T, *batch). None stands for leaves that have no
    gradient (integers) and for leaves that a `Pool` adds.
    """

    loss: Array
    norms: Any
    total: Array


def gradient_flow(
    cell: Cell,
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    loss: Callable[[PyTree, PyTree], Array],
    *,
    lengths: Integers | None = None,
    mask: Bools | None = None,
    reset: Bools | None = None,
    reverse: bool = False,
    time_axis: int = 0,
    key: Array | None = None,
) -> GradientFlow:
    """The norm of the gradient of a loss with respect to the carry, at every step.

        norms[t] = ‖∂L/∂c_t‖,    c_t the carry that step t reads, c_{t+1} = step(c_t, x_t)
        ∂L/∂c_t  = (∂c_{t+1}/∂c_t)ᵀ ∂L/∂c_{t+1} + (∂y_t/∂c_t)ᵀ ∂L/∂y_t

    The norm vanishes or explodes backwards in time with the products of the step's Jacobians. All steps and all cells
    come from one backward pass: a zero is added to every carry, and the loss is differentiated with respect to it. For
    h' = a h + x and a loss of the final carry, the norm is |a|^(T − t).

    An invalid step reads nothing, and no gradient flows across a reset: there the norm is 0. In a `Bidirectional`, step
    t of the backward cell reads the carry that comes from step t + 1.

    Args:
      cell: As in `jaxrnn.scan`; any composition.
      params: As in `jaxrnn.scan`.
      carry: As in `jaxrnn.scan`.
      xs: As in `jaxrnn.scan`.
      loss: A function `(carry, ys) -> scalar` of the results of `jaxrnn.scan`. If it is a sum over rows, each row has
        its own gradient.
      lengths: As in `jaxrnn.scan`.
      mask: As in `jaxrnn.scan`.
      reset: As in `jaxrnn.scan`.
      reverse: As in `jaxrnn.scan`.
      time_axis: As in `jaxrnn.scan`.
      key: As in `jaxrnn.scan`.

    Returns:
      A `GradientFlow`, with time first whatever `time_axis` is.

    Raises:
      ValueError: As in `jaxrnn.scan`, and if the loss is not a real scalar.
      TypeError: As in `jaxrnn.scan`, and if the loss is not a real scalar.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxrnn import IndRNN, IndRNNParams
      >>> from jaxrnn.analysis import gradient_flow
      >>> halves = IndRNNParams(w_x=jnp.ones((1, 1)), w_h=jnp.array([0.5]), b=None)
      >>> xs = jnp.ones((4, 1))
      >>> gradient_flow(IndRNN(1, 1), halves, None, xs, lambda carry, ys: carry.h.sum()).total
      Array([0.0625, 0.125 , 0.25  , 0.5   ], dtype=float32)

    References:
      Pascanu et al. 2013, On the difficulty of training recurrent neural networks, arXiv 1211.5063; first: Hochreiter
      1991.
    """
    if not callable(loss):
        raise TypeError(f"loss: expected a function of (carry, ys), got {loss!r}")
    keywords: Named = {"lengths": lengths, "mask": mask, "reset": reset, "reverse": reverse}
    keywords |= {"time_axis": time_axis, "key": key}

    def shifted_loss(offsets):
        final, ys = observe(cell, params, carry, xs, offsets, **keywords)
        value = jnp.asarray(loss(final_carry(final), ys))
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"loss: expected a real scalar, got {value.dtype}{list(value.shape)}")
        return value

    shapes, _ = jax.eval_shape(lambda *arguments: observe(cell, *arguments, **keywords), params, carry, xs)
    seen = observations(shapes)
    if not seen:
        raise TypeError(f"cell: expected one with a carry, got {cell!r}")
    offsets = [[jnp.zeros_like(leaf) for leaf in filter(inexact, jax.tree.leaves(one.reads.carry))] for one in seen]
    value, gradients = jax.value_and_grad(shifted_loss)(offsets)
    ndim = seen[0].valid.ndim
    norms = [[norm(leaf, ndim) for leaf in leaves] for leaves in gradients]
    every = jnp.stack([each.astype(jnp.result_type(value)) for leaves in norms for each in leaves], axis=-1)
    trees = [_like(one.reads.carry, leaves) for one, leaves in zip(seen, norms, strict=True)]
    return GradientFlow(value, arrange(shapes, trees), norm(every, ndim))


def _like(carry, norms):
    leaves, structure = jax.tree.flatten(carry)
    each = iter(norms)
    return jax.tree.unflatten(structure, [next(each) if inexact(leaf) else None for leaf in leaves])
