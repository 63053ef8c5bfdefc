"""The base class of the cells whose state is a matrix, and functions that they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import check
from jaxrnn.cell import Carry, Cell, Params
from jaxrnn.engines.arrays import accumulator, cast, compute_dtype
from jaxrnn.engines.loop import in_chunks
from jaxrnn.engines.matrix import programs
from jaxrnn.engines.matrix.engine import matrix_form, matrix_recurrence
from jaxrnn.typing import PyTree


class MatrixInputs(NamedTuple):
    """What the recurrence of a step reads, for each head: q, k, u, w (..., heads, K), v (..., heads, V), log_decay
    (..., heads) or (..., heads, K), beta (..., heads); see `jaxrnn.matrix_scan`.

    Examples:
      >>> import jax.numpy as jnp, jaxrnn
      >>> one = jnp.ones((2, 3))
      >>> jaxrnn.MatrixInputs(one, one, one, beta=jnp.ones(2)).log_decay is None
      True
    """

    q: Array
    k: Array
    v: Array
    log_decay: Array | None = None
    beta: Array | None = None
    u: Array | None = None
    w: Array | None = None


class MatrixCell(Cell[Params, Carry]):
    """A cell whose state is a matrix for each head: S' = (diag(a) + u wᵀ) S + k vᵀ, read by y = S'ᵀ q.

    A subclass has a carry with the field s (..., heads, K, V) and the fields heads, key_size and value_size. It defines
    `inputs`, which depends on x alone; if y is not that of all heads side by side, it also defines `output`. Both
    accept any leading axes, so that each is called once for a whole sequence. The recurrence runs by `matrix_scan`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> from typing import NamedTuple
      >>> class Params(NamedTuple):
      ...     w_x: jax.Array
      >>> class Carry(NamedTuple):
      ...     s: jax.Array
      >>> class Memory(jaxrnn.MatrixCell):
      ...     input_size: int
      ...     heads = key_size = 1
      ...     value_size = 2
      ...     def init(self, key, dtype=jnp.float32):
      ...         return Params(jnp.ones((self.input_size, 2), dtype))
      ...     def initial_carry(self, params, batch_shape=()):
      ...         return Carry(jnp.zeros((*batch_shape, 1, 1, 2)))
      ...     def inputs(self, params, x):
      ...         one = jnp.ones((*x.shape[:-1], 1, 1))
      ...         return jaxrnn.MatrixInputs(one, one, (x @ params.w_x)[..., None, :])
      >>> cell = Memory(3)
      >>> jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((3, 3)))[1][:, 0]
      Array([3., 6., 9.], dtype=float32)
    """

    @property
    def output_size(self) -> int:
        cell: Any = self  # which has these fields
        return cell.heads * cell.value_size

    @abstractmethod
    def inputs(self, params: PyTree, x: Array) -> MatrixInputs:
        """What the recurrence reads, in at least float32."""

    def output(self, params: PyTree, ys: Array, x: Array) -> Array:
        """Computes y from what is read of all heads, (..., heads, V)."""
        return _side_by_side(params, ys, x)

    def step(self, params, carry: PyTree, x, noise=None):
        check.params(self, params)
        return matrix_step(params, carry, x, self.inputs, output=self.output)

    def scan(self, params, carry: PyTree, xs, *, fresh: PyTree, noise, walk):
        check.params(self, params)
        dtype = compute_dtype(xs, params)
        xs = xs.astype(dtype)
        found = jax.eval_shape(self.inputs, cast(params, dtype), jax.ShapeDtypeStruct(xs.shape, dtype))
        dtypes = [each.dtype for each in found if each is not None]
        form = matrix_form(walk, accumulator(*dtypes, carry.s.dtype), *dtypes, owner=self)

        def run(constant, carry, inputs):
            params, fresh = constant
            xs, flags = inputs
            params = cast(params, dtype)
            given = {name: each for name, each in self.inputs(params, xs)._asdict().items() if each is not None}
            last, ys = matrix_recurrence(
                given,
                carry.s.astype(accumulator(*dtypes, carry.s.dtype)),
                fresh=fresh.s,
                flags=flags,
                reverse=walk.reverse,
                form=form,
            )
            ys = walk.replace(valid=flags.valid).without_padding(self.output(params, ys, xs).astype(dtype))
            return carry._replace(s=last.astype(carry.s.dtype)), ys

        return in_chunks(run, (params, fresh), carry, (xs, walk.flags), walk)

    def zeros(self, params: PyTree, batch_shape: tuple[int, ...]) -> Array:
        """Returns a state of zeros, in the dtype of the params."""
        check.params(self, params)
        cell: Any = self
        return jnp.zeros((*batch_shape, cell.heads, cell.key_size, cell.value_size), params.w_x.dtype)


def _side_by_side(params, ys, x):
    return ys.reshape(*ys.shape[:-2], ys.shape[-2] * ys.shape[-1])


def matrix_step(
    params: PyTree,
    carry: PyTree,
    x: Array,
    inputs: Callable[..., MatrixInputs],
    *,
    output: Callable[..., Array] = _side_by_side,
) -> tuple[PyTree, Array]:
    """One step: the state after what `inputs(params, x)` says, and y = output(params, ys, x).

    Args:
      params: The params of the cell.
      carry: A carry with the field s.
      x: The input of one step.
      inputs: As in `MatrixCell`.
      output: As in `MatrixCell`; by default y is that of all heads side by side.
    """
    dtype = compute_dtype(x, params)
    params, x = cast(params, dtype), x.astype(dtype)
    given = inputs(params, x)
    wide = accumulator(*(each.dtype for each in given if each is not None), carry.s.dtype)
    s, ys = programs.step(carry.s.astype(wide), *(None if each is None else each.astype(wide) for each in given))  # type: ignore[arg-type]
    return carry._replace(s=s.astype(carry.s.dtype)), output(params, ys, x).astype(dtype)


def by_head(x: Array, heads: int) -> Array:
    """(..., heads · N) as (..., heads, N)."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def unit(x: Array) -> Array:
    """x / ‖x‖ over the last axis; near zero its length goes to zero, too."""
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
