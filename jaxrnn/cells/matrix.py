"""The base class of the cells whose state is a matrix, and functions that they share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import check
from jaxrnn.cell import Carry, Cell, Params
from jaxrnn.engines.arrays import accumulator, cast, compute_dtype, inexact
from jaxrnn.engines.loop import compiled_once, in_chunks
from jaxrnn.engines.matrix import programs
from jaxrnn.engines.matrix.engine import kernel_in_single, matrix_form, matrix_recurrence, matrix_states
from jaxrnn.engines.product import dot
from jaxrnn.engines.step import Arrays, Step, step_serves
from jaxrnn.engines.walk import Flags, Walk
from jaxrnn.typing import DTypeLike, PyTree


class MatrixInputs(NamedTuple):
    """What the recurrence of a step reads, for each head: q, k, u, w (..., heads, K), v (..., heads, V), log_decay
    (..., heads) or (..., heads, K), beta (..., heads); see `jaxrnn.matrix_scan`. `aside` is what `output` reads of x.

    q, k, u and w may have fewer heads, each for several of v that stand side by side.

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
    aside: PyTree = None

    @property
    def arrays(self) -> dict[str, Array]:
        """Those that the recurrence reads."""
        return {name: each for name, each in self._asdict().items() if each is not None and name != "aside"}


class MatrixCell(Cell[Params, Carry]):
    """A cell whose state is a matrix for each head: S' = (diag(a) + u wᵀ) S + k vᵀ, read by y = S'ᵀ q.

    A subclass has a carry with the field s (..., heads, K, V) and the fields heads, key_size and value_size. It defines
    `inputs`, which depends on x alone; if y is not that of all heads side by side, it also defines `output`; if its
    carry holds more than s, `follow`. All accept any leading axes, so that each is called once for a whole sequence.
    The recurrence runs by `matrix_scan`.

    With `products` n above 1, a step is n steps of the recurrence, of which the last one is read: k, v and beta have
    an axis of n before their heads, and the decay is that of the first.

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

    products = 1
    time_divides = True
    step_by_kernel = False  # whether `step` is one kernel

    @property
    def output_size(self) -> int:
        cell: Any = self  # which has these fields
        return cell.heads * cell.value_size

    @abstractmethod
    def inputs(self, params: PyTree, x: Array) -> MatrixInputs:
        """What the recurrence reads, in at least float32."""

    def output(self, params: PyTree, ys: Array, inputs: MatrixInputs) -> Array:
        """Computes y from what is read of all heads, (..., heads, V)."""
        return side_by_side(params, ys, inputs)

    def follow(
        self, inputs: MatrixInputs, carry: PyTree, fresh: PyTree, flags: Flags, reverse: bool
    ) -> tuple[MatrixInputs, PyTree]:
        """Follows what the carry holds beside s through the steps, the first axis: (what the recurrence reads then, the
        last carry).
        """
        return nothing_more(inputs, carry, fresh, flags, reverse)

    def follow_divided(self, inputs: MatrixInputs, carry: PyTree, fresh: PyTree, walk: Walk) -> tuple[PyTree, PyTree]:
        """Where time is divided: a carry whose fields beside s are those before the steps of this device, and one with
        those after the steps of all.
        """
        return carry, carry

    def step(self, params, carry: PyTree, x, noise=None):
        check.params(self, params)
        return matrix_step(
            params, carry, x, self.inputs, output=self.output, follow=self.follow, products=self.products
        )

    @compiled_once
    def scan(self, params, carry: PyTree, xs, *, fresh: PyTree, noise, walk):
        check.params(self, params)
        if step_serves(walk, xs.shape, "matrix_scan", owner=self, unlike=("step", "inputs", "output", "follow")):
            carry, y = self.step(params, carry, xs[0])
            return carry, y[None]
        dtype = compute_dtype(xs, params)
        xs = xs.astype(dtype)
        if walk.axis_name is not None:
            before, after = self._carries(cast(params, dtype), carry, fresh, xs, walk)
            walk = walk.replace(axis_name=None)
            return after, self.scan(params, before, xs, fresh=fresh, noise=noise, walk=walk)[1]
        found = jax.eval_shape(self.inputs, cast(params, dtype), jax.ShapeDtypeStruct(xs.shape, dtype))
        dtypes = [each.dtype for each in found.arrays.values()]
        single = kernel_in_single(walk, xs.shape, dtypes)
        dtypes = [jnp.dtype(jnp.float32)] * len(dtypes) if single else dtypes
        wide = accumulator(*dtypes, carry.s.dtype)
        form = matrix_form(walk, xs.shape, wide, *dtypes, owner=self)

        def run(constant, carry, inputs):
            params, fresh = constant
            xs, flags = inputs
            params = cast(params, dtype)
            given, carry = self.follow(self.inputs(params, xs), carry, fresh, flags, walk.reverse)
            heads = _Heads(given)
            arrays, each_flags = _micro_steps(given.arrays, flags, self.products, walk.reverse)
            last, ys = matrix_recurrence(
                heads.grouped(cast(arrays, jnp.float32) if single else arrays),
                heads.grouped_state(carry.s.astype(wide)),
                fresh=heads.grouped_state(fresh.s),
                flags=each_flags,
                reverse=walk.reverse,
                form=form,
            )
            ys = ys[0 if walk.reverse else self.products - 1 :: self.products].astype(given.arrays["v"].dtype)
            ys = self.output(params, ys.reshape(*xs.shape[:-1], heads.count, ys.shape[-1]), given)
            ys = walk.replace(valid=flags.valid).without_padding(ys.astype(dtype))
            return carry._replace(s=last.reshape(carry.s.shape).astype(carry.s.dtype)), ys

        return in_chunks(run, (params, fresh), carry, (xs, walk.flags), walk)

    def _carries(self, params, carry: PyTree, fresh: PyTree, xs: Array, walk: Walk) -> list[PyTree]:
        """The carry before the steps of this device, and that after those of all."""
        given, s = self.inputs(params, xs), carry.s
        carries = self.follow_divided(given, carry, fresh, walk)
        given, _ = self.follow(given, carries[0], fresh, walk.flags, walk.reverse)
        arrays, flags = _micro_steps(given.arrays, walk.flags, self.products, walk.reverse)
        dtypes = [each.dtype for each in arrays.values()]
        wide, heads = accumulator(*dtypes, s.dtype), _Heads(given)
        form = matrix_form(walk, xs.shape, wide, *dtypes, owner=self)
        first, begin = (heads.grouped_state(each.astype(wide)) for each in (s, fresh.s))
        found = matrix_states(heads.grouped(arrays), first, walk, flags, form, begin)
        return [
            each._replace(s=state.reshape(s.shape).astype(s.dtype)) for each, state in zip(carries, found, strict=True)
        ]

    def zeros(self, params: PyTree, batch_shape: tuple[int, ...], columns: int = 0) -> Array:
        """Returns a state of zeros, in the dtype of the params, with more columns than V if asked."""
        check.params(self, params)
        cell: Any = self
        shape = *batch_shape, cell.heads, cell.key_size, cell.value_size + columns
        return jnp.zeros(
            shape, next((leaf.dtype for leaf in jax.tree.leaves(params) if inexact(leaf)), jnp.result_type(float))
        )


def nothing_more(inputs, carry, fresh, flags, reverse):
    """`follow` of a carry that holds s alone."""
    return inputs, carry


def side_by_side(params: PyTree, ys: Array, inputs: MatrixInputs) -> Array:
    """(..., heads, V) as (..., heads · V)."""
    return ys.reshape(*ys.shape[:-2], ys.shape[-2] * ys.shape[-1])


def matrix_step(
    params: PyTree,
    carry: PyTree,
    x: Array,
    inputs: Callable[..., MatrixInputs],
    *,
    output: Callable[..., Array] = side_by_side,
    follow: Callable[..., tuple[MatrixInputs, PyTree]] = nothing_more,
    products: int = 1,
) -> tuple[PyTree, Array]:
    """One step: the state after what `inputs(params, x)` says, and y.

    Args:
      params: The params of the cell.
      carry: A carry with the field s.
      x: The input of one step.
      inputs: As in `MatrixCell`.
      output: As in `MatrixCell`; by default y is that of all heads side by side.
      follow: As in `MatrixCell`.
      products: As in `MatrixCell`.
    """
    dtype = compute_dtype(x, params)
    params, x = cast(params, dtype), x.astype(dtype)
    given, carry = follow(inputs(params, x[None]), carry, carry, Flags(None, None), False)
    s, ys = advance(carry.s, given, products)
    ys = output(params, ys, given)[0]
    return carry._replace(s=s.astype(carry.s.dtype)), ys.astype(dtype)


def advance(s: Array, given: MatrixInputs, products: int = 1) -> tuple[Array, Array]:
    """The state after one step, and what is read of it (1, ..., heads, V), of what one step (1, ...) reads."""
    arrays, _ = _micro_steps(given.arrays, Flags(None, None), products, False)
    wide = accumulator(*(each.dtype for each in arrays.values()), s.dtype)
    heads = _Heads(given)
    arrays = {name: each.astype(wide) for name, each in heads.grouped(arrays).items()}
    new, ys = programs.step(heads.grouped_state(s.astype(wide)), **{name: each[0] for name, each in arrays.items()})
    for n in range(1, products):
        new, ys = programs.step(new, **{name: each[n] for name, each in arrays.items()})
    return new.reshape(s.shape), ys.reshape(*s.shape[:-3], heads.count, ys.shape[-1])[None]


def kernel_step(
    params: PyTree, carry: PyTree, x: Array, kernel: Step, parts: Callable[..., tuple[Arrays, Arrays]], **options: Any
) -> tuple[PyTree, Array]:
    """One step by a kernel of the whole: the state after it, and y.

    Args:
      params: The params of the cell.
      carry: A carry that holds s alone.
      x: The input of one step.
      kernel: The step.
      parts: `parts(params, x)`, the arrays and the weights that it reads.
      **options: Those of the kernel.
    """
    dtype = compute_dtype(x, params)
    arrays, weights = parts(cast(params, dtype), x.astype(dtype))
    wide = accumulator(*(each.dtype for each in jax.tree.leaves(arrays)), carry.s.dtype)
    s, y = kernel(*cast((arrays, weights, carry.s), wide), **options)
    return carry._replace(s=s.astype(carry.s.dtype)), y.astype(dtype)


class _Heads:
    """Heads that share keys: (..., heads, ·) as (..., heads of keys, heads for each, ·), so that no key is copied."""

    def __init__(self, given: MatrixInputs):
        self.count, self.of_keys = given.v.shape[-2], given.k.shape[-2]
        self.alike = self.of_keys in (1, self.count)
        self.by_row = given.log_decay is not None and given.log_decay.ndim == given.q.ndim

    def grouped(self, arrays: dict[str, Array]) -> dict[str, Array]:
        def group(name, each):
            at = each.ndim - (1 if name == "beta" or (name == "log_decay" and not self.by_row) else 2)
            own = each.shape[at] // self.of_keys
            return each.reshape(*each.shape[:at], self.of_keys, own, *each.shape[at + 1 :])

        return arrays if self.alike else {name: group(name, each) for name, each in arrays.items()}

    def grouped_state(self, s: Array) -> Array:
        if self.alike:
            return s
        return s.reshape(*s.shape[:-3], self.of_keys, self.count // self.of_keys, *s.shape[-2:])


def _micro_steps(
    arrays: dict[str, Array], flags: Flags, products: int, reverse: bool
) -> tuple[dict[str, Array], Flags]:
    """Arrays (T, ...) and flags of T · products steps, in the order of processing within each of T."""
    if products == 1:
        return arrays, flags
    k = arrays["k"]
    before = k.ndim - 3  # the axes of time and batch

    def of_first(array, other):
        rest = jnp.full_like(array, other)
        return ordered(jnp.stack([array, *[rest] * (products - 1)], axis=1))

    def ordered(array):
        array = jnp.flip(array, 1) if reverse else array
        return array.reshape(array.shape[0] * products, *array.shape[2:])

    def spread(name, array):
        if name == "log_decay":
            return of_first(array, 0)
        if name == "q":
            return jnp.repeat(array, products, axis=0)
        return ordered(jnp.moveaxis(array, before, 1))

    valid, start = flags
    valid = None if valid is None else jnp.repeat(valid, products, axis=0)
    start = None if start is None else of_first(start, False)
    return {name: spread(name, each) for name, each in arrays.items()}, Flags(valid, start)


def projected(params: PyTree, x: Array) -> Array:
    """x w_x, or x itself where there is no w_x, in at least float32."""
    return x.astype(accumulator(x.dtype)) if params.w_x is None else dot(x, params.w_x)


def pieces(x: Array, *sizes: int) -> list[Array]:
    """Parts of x along its last axis, of these sizes."""
    if x.shape[-1] != sum(sizes):
        raise ValueError(f"x: expected {sum(sizes)} features, {' + '.join(map(str, sizes))}, got shape {x.shape}")
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes) - 1)]
    return jnp.split(x, ends, axis=-1)


def by_head(x: Array, heads: int) -> Array:
    """(..., heads · N) as (..., heads, N)."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def queries(features: Array, heads: int, key_size: int) -> tuple[Array, Array, Array]:
    """q, k (..., heads, K) and v (..., heads, V) of features that are these side by side."""
    keys = heads * key_size
    q, k, v = (by_head(each, heads) for each in pieces(features, keys, keys, features.shape[-1] - 2 * keys))
    return q, k, v


def unit(x: Array) -> Array:
    """x / ‖x‖ over the last axis; near zero its length goes to zero, too."""
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def draw_step_bias(key: Array, heads: int, least: float, most: float, dtype: DTypeLike) -> Array:
    """Draws biases whose softplus, a step Δ, is log-uniform."""
    step = jnp.exp(jax.random.uniform(key, (heads,), dtype, math.log(least), math.log(most)))
    return step + jnp.log(-jnp.expm1(-step))
