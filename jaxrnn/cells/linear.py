"""The base class of the cells with a linear recurrence, and functions that they share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import check
from jaxrnn.cell import Carry, Cell, Params
from jaxrnn.cells.window import step_window, window_states, windows, with_window
from jaxrnn.engines.arrays import accumulator, cast, compute_dtype, lifted, select, zero_where_not
from jaxrnn.engines.elementwise.engine import UnitWeights, elementwise_recurrence
from jaxrnn.engines.elementwise.programs import Unit
from jaxrnn.engines.linear.engine import kernel_serves, linear_form, linear_recurrence, linear_states
from jaxrnn.engines.linear.log_space import log_linear_form, log_linear_recurrence
from jaxrnn.engines.loop import compiled_once, in_chunks
from jaxrnn.engines.product import dot
from jaxrnn.engines.sequence_parallel import part, states
from jaxrnn.engines.walk import HALF, Flags, kernel_dtype
from jaxrnn.typing import PyTree


class LinearCell(Cell[Params, Carry]):
    """A cell whose recurrence is linear: h' = a h + b, elementwise, where a and b depend on the input alone.

    A subclass has a carry with the field h and defines `coefficients`; if y is not h, it also defines `output`. Both
    accept any leading axes, so that each is called once for a whole sequence. The recurrence itself runs by
    `linear_scan`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> from typing import NamedTuple
      >>> class Params(NamedTuple):
      ...     decay: jax.Array
      >>> class Carry(NamedTuple):
      ...     h: jax.Array
      >>> class Average(jaxrnn.LinearCell):
      ...     input_size: int
      ...     def init(self, key, dtype=jnp.float32):
      ...         return Params(jnp.full(self.input_size, 0.5, dtype))
      ...     def initial_carry(self, params, batch_shape=()):
      ...         return Carry(jnp.zeros((*batch_shape, self.input_size)))
      ...     def coefficients(self, params, x):
      ...         return params.decay, (1 - params.decay) * x
      >>> cell = Average(2)
      >>> jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((3, 2)))[1][:, 0]
      Array([0.5  , 0.75 , 0.875], dtype=float32)
    """

    # Whether a step sees the inputs before it: then the carry has a field `window`, (*batch, K−1, D), and the x of
    # `coefficients` and `output` is (..., K D), the oldest first.
    sees_window = False
    # Whether the first step of a sequence is another one than the rest: then the carry has a field `started`, bool
    # (*batch,), and `begin` says what (a, b) are there.
    begins_apart = False
    time_divides = True
    # Whether sequences run in log space, on `log_coefficients`.
    log_space = False

    @property
    def unit(self) -> Unit | None:
        """What a kernel on the CPU computes with `unit_weights`, in place of `coefficients` and, where h is real, of
        `output`; None without one.
        """
        return None

    def unit_weights(self, params: PyTree) -> UnitWeights:
        """Returns the weights of `unit`."""
        raise TypeError(f"{type(self).__name__}: unit needs unit_weights, which it does not define")

    @abstractmethod
    def coefficients(self, params: PyTree, x: Array) -> tuple[Array, Array]:
        """Returns (a, b), in at least float32; a may lack axes."""

    def with_skip(self, params: PyTree, y: Array, x: Array) -> Array:
        """Returns y, from that of `unit`."""
        return y

    def log_coefficients(self, params: PyTree, x: Array) -> tuple[Array, Array]:
        """Returns the logarithms of (a, b), which are both positive, for a cell with `log_space`."""
        raise TypeError(f"{type(self).__name__}: log_space needs log_coefficients, which it does not define")

    def output(self, params: PyTree, h: Array, x: Array) -> Array:
        """Computes y from the new state."""
        return h

    def begin(self, a: Array, b: Array, started: Array) -> tuple[Array, Array]:
        """Returns (a, b): as they are where a sequence has started, and changed where this is its first step."""
        return a, b

    def step(self, params, carry: PyTree, x, noise=None):
        check.params(self, params)
        begin, window = self.begin if self.begins_apart else None, self.sees_window
        return linear_step(params, carry, x, self.coefficients, output=self.output, begin=begin, sees_window=window)

    @compiled_once
    def scan(self, params, carry: PyTree, xs, *, fresh: PyTree, noise, walk):
        check.params(self, params)
        dtype = compute_dtype(xs, params)
        xs = xs.astype(dtype)
        if walk.axis_name is not None:
            return self.scan_in_parts(params, carry, xs, fresh=fresh, noise=noise, walk=walk)
        widths = carry.window.shape[-2] + 1 if self.sees_window else 1
        seen = jax.ShapeDtypeStruct((*xs.shape[:-1], widths * xs.shape[-1]), dtype)
        dtypes = [array.dtype for array in jax.eval_shape(self.coefficients, cast(params, dtype), seen)]
        computed = kernel_dtype(walk, dtype, carry.h.real.dtype)
        unit, form = self.unit, None
        # A single step of one row, in half precision or of complex states is as fast without.
        few = math.prod(xs.shape[1:-1]) == 1 or dtype in HALF or (unit is not None and unit.turns)
        pays = not (few and xs.shape[0] == 1)
        if unit is None or computed is None or not kernel_serves(walk, xs.shape, owner=self, pays=pays):
            unit, form = None, self._form(walk, xs.shape, dtypes, carry.h.dtype)

        def run(constant, carry, inputs):
            params, fresh = constant
            xs, flags = inputs
            valid, start = flags
            params, window, count = cast(params, dtype), None, 1
            steps = xs.shape[0]
            if self.sees_window and unit is not None and valid is None and start is None:
                xs, window = with_window(carry.window, xs, walk.reverse)
                count = xs.shape[0] - steps + 1
            elif self.sees_window:
                taps, window = windows(carry.window, fresh.window, xs, flags, walk.reverse)
                xs = jnp.concatenate(taps, axis=-1)
            begun = None
            if self.begins_apart:
                begun = _started(carry.started, fresh.started, flags, walk.reverse, steps)
            some = steps > 0 if valid is None else valid.any(0)
            started = carry.started | some if self.begins_apart else None
            if unit is not None:
                params, xs = cast((params, xs), computed)
                h, start_h = (parts_of(each.h) if unit.turns else each.h.astype(computed) for each in (carry, fresh))
                weights, options = self.unit_weights(params), {"taps": count, "flags": flags, "walk": walk}
                last, ys = elementwise_recurrence(unit, weights, xs, h, begun=begun, fresh=start_h, **options)
                if unit.turns:
                    last = lax.complex(*jnp.split(last, 2, axis=-1))
                    ys = zero_where_not(valid, self.with_skip(params, ys, xs))
                return _replaced(carry, last.astype(carry.h.dtype), started, window), ys.astype(dtype)
            h, options = carry.h, {"flags": flags, "reverse": walk.reverse, "form": form}
            wide = h.astype(accumulator(dtypes[1], h.dtype))
            if self.log_space:
                last, hs = log_linear_recurrence(*self.log_coefficients(params, xs), wide, fresh=fresh.h, **options)
            else:
                a, b = self.coefficients(params, xs)
                if begun is not None:
                    a, b = self.begin(a, b, begun)
                if start is not None:
                    b = select(start, b + lifted(a, b) * lifted(fresh.h.astype(b.dtype), b), b)
                last, hs = linear_recurrence(a, b, wide, **options)
            ys = zero_where_not(valid, self.output(params, hs, xs).astype(dtype))
            return _replaced(carry, last.astype(h.dtype), started, window), ys

        return in_chunks(run, (params, fresh), carry, (xs, walk.flags), walk)

    def scan_in_parts(self, params, carry: PyTree, xs, *, fresh: PyTree, noise, walk):
        """Runs the steps of this device from the carry that those of the others lead to."""
        valid, whole = walk.valid, walk.replace(axis_name=None)
        before, after, own, seen = carry, carry, cast(params, xs.dtype), xs
        if self.sees_window:
            window, last = window_states(carry.window, fresh.window, xs, walk)
            before, after = before._replace(window=window), after._replace(window=last)
            seen = jnp.concatenate(windows(window, fresh.window, xs, walk.flags, walk.reverse)[0], axis=-1)
        a, b = self.coefficients(own, seen)
        if self.begins_apart:
            some = jnp.full_like(carry.started, xs.shape[0] > 0) if valid is None else valid.any(0)
            own_part = part(walk, (), some)
            started, last = states(
                own_part, carry.started, lambda _, *either: either[0] | either[1], walk, fresh.started
            )
            before, after = before._replace(started=started), after._replace(started=last)
            a, b = self.begin(a, b, _started(started, fresh.started, walk.flags, walk.reverse, xs.shape[0]))
        start = walk.flags.start
        if start is not None:
            b = select(start, b + lifted(a, b) * lifted(fresh.h.astype(b.dtype), b), b)
        wide = carry.h.astype(accumulator(b.dtype, carry.h.dtype))
        form = linear_form(walk, b.shape, a.dtype, b.dtype, wide.dtype, owner=self)
        h, last = linear_states(a, b, wide, walk, form, fresh.h)
        before, after = (each._replace(h=state.astype(carry.h.dtype)) for each, state in ((before, h), (after, last)))
        return after, self.scan(params, before, xs, fresh=fresh, noise=noise, walk=whole)[1]

    def _form(self, walk, shape, dtypes, dtype):
        if self.log_space:
            return log_linear_form(walk, shape, self)
        return linear_form(walk, shape, *dtypes, accumulator(dtypes[1], dtype), owner=self)

    def zeros(self, params: PyTree, batch_shape: tuple[int, ...], size: int) -> Array:
        """Returns zeros (*batch_shape, size), in the dtype of the params."""
        check.params(self, params)
        return jnp.zeros((*batch_shape, size), params.w_x.dtype)


def _state(params, h, x):
    return h


def parts_of(h: Array) -> Array:
    """The real parts of complex numbers, then the imaginary parts."""
    return jnp.concatenate([h.real, h.imag], axis=-1)


def linear_step(
    params: PyTree,
    carry: PyTree,
    x: Array,
    coefficients: Callable[..., tuple[Array, Array]],
    *,
    output: Callable[..., Array] = _state,
    begin: Callable[..., tuple[Array, Array]] | None = None,
    sees_window: bool = False,
) -> tuple[PyTree, Array]:
    """One step of a linear recurrence: h' = a h + b, y = output(params, h', x), where (a, b) = coefficients(params, x).

    Args:
      params: The params of the cell.
      carry: A carry with the field h, with `started` if `begin` is given, and with `window` if the step sees one.
      x: The input of one step.
      coefficients: As in `LinearCell`.
      output: As in `LinearCell`; by default y is h'.
      begin: As in `LinearCell`, if the first step of a sequence differs from the others.
      sees_window: As in `LinearCell`.
    """
    dtype = compute_dtype(x, params)
    params, x, window = cast(params, dtype), x.astype(dtype), None
    if sees_window:
        taps, window = step_window(carry.window, x)
        x = jnp.concatenate(taps, axis=-1)
    a, b = coefficients(params, x)
    if begin is not None:
        a, b = begin(a, b, carry.started)
    wide = accumulator(b.dtype, carry.h.dtype)
    h = lifted(a, b).astype(wide) * carry.h.astype(wide) + b.astype(wide)
    y = output(params, h.astype(b.dtype), x).astype(dtype)
    started = None if begin is None else jnp.ones_like(carry.started)
    return _replaced(carry, h.astype(carry.h.dtype), started, window), y


def _replaced(carry: PyTree, h: Array, started: Array | None, window: Array | None) -> PyTree:
    new = {"h": h, "started": started, "window": window}
    return carry._replace(**{name: value for name, value in new.items() if value is not None})


def _started(given: Array, fresh: Array, flags: Flags, reverse: bool, length: int) -> Array:
    """Returns, for every step (T, *batch), whether a valid step came before it in its sequence."""
    valid, start = flags
    if valid is None:
        seen = (jnp.arange(length) != (length - 1 if reverse else 0)).reshape(length, *[1] * given.ndim)
    else:
        seen = lax.cummax(valid.astype(jnp.int32), axis=0, reverse=reverse).astype(bool)
        none = jnp.zeros_like(seen[:1])
        seen = jnp.concatenate([seen[1:], none] if reverse else [none, seen[:-1]])[:length]
    seen = seen | given[None]
    return seen if start is None else jnp.where(start, fresh[None], seen)


def affine(params: PyTree, x: Array) -> Array:
    """Computes x w_x + b, in at least float32."""
    u = dot(x, params.w_x)
    return u if params.b is None else u + lifted(params.b.astype(u.dtype), u)


def candidate(v: Array) -> Array:
    """A positive function that is nearly the identity: v + 1/2 for v ≥ 0, else σ(v)."""
    return jnp.where(v >= 0, v + 0.5, jax.nn.sigmoid(v))


def log_candidate(v: Array) -> Array:
    """The logarithm of `candidate`."""
    return jnp.where(v >= 0, jnp.log(jax.nn.relu(v) + 0.5), -jax.nn.softplus(-v))


def check_log_space(cell: Any) -> None:
    """Raises an error for `log_space` without `positive`: only positive numbers have a logarithm."""
    if cell.log_space and not cell.positive:
        raise ValueError(
            f"{type(cell).__name__}: log_space needs positive=True, since it takes logarithms of the state"
        )
