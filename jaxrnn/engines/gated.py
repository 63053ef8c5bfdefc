"""The engine of gated recurrences: one product that reads the carry, then elementwise gates.

u = x w_x + b
v = (m s) w_h             s the recurrent part of the carry, m a noise mask
w = mid(θ, carry, m s, u, v) w_2      where a step has a second product
carry', y = gate(θ, carry, u, v, w)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

from jaxrnn.engines import gated_native, native
from jaxrnn.engines.arrays import accumulator, cast, cast_like, compute_dtype, dot
from jaxrnn.engines.choose import Implementation, choose, record
from jaxrnn.engines.loop import time_loop

REFUSALS = {
    "associative": "the recurrence is not linear",
    "chunked": "the recurrence is not linear",
    "pallas": "no kernel is written",
}


class GatedWeights(NamedTuple):
    """The arrays of one step, G columns for all gates that the products feed.

    w_x: (D, G). b: (G,) or None. w_h: dense (S, G), block-diagonal (N, S/N, G/N) or diagonal (S,).
    w_2: (S2, G2), or None without a second product. theta: the learned vectors that `gate` and `mid` read.
    """

    w_x: Array
    b: Array | None
    w_h: Array
    w_2: Array | None = None
    theta: Any = ()


class Kernel(NamedTuple):
    """The compiled kernel that computes a cell, and the arrays that it takes: w_h (H, G), b_hn (H,) or None."""

    kind: str
    w_h: Array
    b_hn: Array | None = None


class GatedRecurrence(Protocol):
    """What the engine asks of a cell; its own name says `recurrent_state`, the carry's field that the product reads.

    `kernel` says which compiled kernel computes the same, or why none does.
    """

    recurrent_state: str

    def kernel(self, weights: GatedWeights) -> Kernel | str: ...

    def gate(self, theta: Any, carry: Any, u: Array, v: Array, w: Array | None) -> tuple[Any, Array]: ...

    def mid(self, theta: Any, carry: Any, s: Array, u: Array, v: Array) -> Array: ...


def recurrent_product(s: Array, w_h: Array) -> Array:
    """s w_h, for a dense, block-diagonal or diagonal w_h."""
    if w_h.ndim == 1:
        return (s * w_h).astype(accumulator(s.dtype))
    if w_h.ndim == 2:
        return dot(s, w_h)
    blocks, rows, columns = w_h.shape
    s = s.reshape(*s.shape[:-1], blocks, rows)
    v = jnp.einsum("...ni,nij->...nj", s, w_h, preferred_element_type=accumulator(s.dtype))
    return v.reshape(*v.shape[:-2], blocks * columns)


def _input_product(weights: GatedWeights, x, dtype, wide):
    """u in the wide dtype, for one step or many."""
    u = dot(x.astype(dtype), weights.w_x).astype(wide)
    return u if weights.b is None else u + weights.b.astype(wide)


def _products(cell, weights: GatedWeights, carry, u, mask, dtype, wide):
    """(carry, u, v, w) in the wide dtype, from products of operands in `dtype`; `weights` are already in `dtype`."""

    def narrow(array):
        return array.astype(dtype)

    carry = cast(carry, wide)
    theta = cast(weights.theta, wide)
    s = getattr(carry, cell.recurrent_state)
    if mask is not None:
        s = s * mask.astype(wide)
    v = recurrent_product(narrow(s), weights.w_h).astype(wide)
    w = None
    if weights.w_2 is not None:
        w = dot(narrow(cell.mid(theta, carry, s, u, v)), weights.w_2).astype(wide)
    return theta, carry, u, v, w


def _dtypes(weights, carry, x):
    dtype = compute_dtype(x, weights)
    return dtype, accumulator(dtype, *(leaf.dtype for leaf in carry))


def gated_products(cell: GatedRecurrence, weights: GatedWeights, carry: Any, x: Array, mask: Array | None = None):
    """What `gate` takes at one step: (θ, carry, u, v, w), in the dtype that gates compute in."""
    dtype, wide = _dtypes(weights, carry, x)
    weights = cast(weights, dtype)
    return _products(cell, weights, carry, _input_product(weights, x, dtype, wide), mask, dtype, wide)


_stepping: ContextVar[tuple[Implementation] | None] = ContextVar("stepping", default=None)


@contextmanager
def stepping(implementation: Implementation) -> Iterator[None]:
    """Inside, `gated_step` runs as `implementation`; outside it is XLA's form."""
    token = _stepping.set((implementation,))
    try:
        yield
    finally:
        _stepping.reset(token)


def gated_step(
    cell: GatedRecurrence, weights: GatedWeights, carry: Any, x: Array, mask: Array | None = None
) -> tuple[Any, Array]:
    """One step of the recurrence: (carry', y), the carry in its own dtypes and y in the dtype of the computation."""
    dtype, wide = _dtypes(weights, carry, x)
    weights = cast(weights, dtype)
    asked = _stepping.get()
    if asked is not None:
        run = _kernel(cell, [weights], [carry], dtype, [mask], *asked)
        if run is not None:
            ((new, ys),) = run([carry], x[None], fresh=[carry], valid=None, reset=None, directions=[False], every=None)
            return new, ys[0]
    return _step(cell, weights, carry, _input_product(weights, x, dtype, wide), mask, dtype, wide)


def _step(cell, weights, carry, u, mask, dtype, wide):
    new, y = cell.gate(*_products(cell, weights, carry, u, mask, dtype, wide))
    return cast_like(new, carry, owner=type(cell).__name__), y.astype(dtype)


def gated_scan(
    cell: GatedRecurrence,
    weights: GatedWeights,
    carry: Any,
    xs: Array,
    *,
    fresh: Any,
    valid: Array | None,
    reset: Array | None,
    reverse: bool,
    mask: Array | None,
    remat_every: int | None,
    implementation: Implementation,
) -> tuple[Any, Array]:
    """The recurrence over the first axis of `xs`: (final carry, ys).

    Args:
      cell: the recurrence: `gate`, `mid`, and the name of the carry's recurrent part.
      weights: its arrays.
      carry: the carry before the first step, leaves (*batch, ...).
      xs: (T, *batch, D), zero at invalid steps.
      fresh: the carry that a reset starts from.
      valid: bool (T, *batch) or None; an invalid step keeps the carry and puts out 0.
      reset: bool (T, *batch) or None; a boundary before step t.
      reverse: from the last step to the first.
      mask: factor on the recurrent part of the carry where the product reads it, (*batch, S), or None.
      remat_every: store one carry every so many steps for the backward pass, or None for all.
      implementation: see `choose`.
    """
    dtype, wide = _dtypes(weights, carry, xs)
    weights = cast(weights, dtype)
    run = _kernel(cell, [weights], [carry], dtype, [mask], implementation)
    if run is not None:
        (result,) = run([carry], xs, fresh=[fresh], valid=valid, reset=reset, directions=[reverse], every=remat_every)
        return result

    return time_loop(
        lambda carry, u: _step(cell, weights, carry, u, mask, dtype, wide),
        carry,
        xs,
        fresh=fresh,
        valid=valid,
        reset=reset,
        reverse=reverse,
        remat_every=remat_every,
        prepare=lambda x: _input_product(weights, x, dtype, wide),
    )


def gated_scan_both(
    cell: GatedRecurrence, weights, carry, xs, *, fresh, valid, reset, reverse, mask, remat_every, implementation
) -> list[tuple[Any, Array]]:
    """`gated_scan` of pairs, in one direction and in the other, at once where a kernel can."""
    directions = reverse, not reverse
    if remat_every is None:
        dtype, _ = _dtypes(weights, carry[0], xs)
        cast_weights = [cast(each, dtype) for each in weights]
        run = _kernel(cell, cast_weights, carry, dtype, mask, implementation)
        if run is not None:
            return run(carry, xs, fresh=fresh, valid=valid, reset=reset, directions=directions, every=None)
    return [
        gated_scan(
            cell,
            weights[k],
            carry[k],
            xs,
            fresh=fresh[k],
            valid=valid,
            reset=reset,
            reverse=directions[k],
            mask=mask[k],
            remat_every=remat_every,
            implementation=implementation,
        )
        for k in range(2)
    ]


def _kernel(cell, weights, carries, dtype, masks, implementation):
    """What runs recurrences of one cell by a compiled kernel, or None if none is chosen."""
    kernels = [cell.kernel(each) for each in weights]
    refusal = _refusal(kernels[0], (dtype, *(leaf.dtype for carry in carries for leaf in carry)), masks)
    refusals = REFUSALS if refusal is None else REFUSALS | {"native": refusal}
    chosen, refusals = choose("gated_scan", implementation, refusals, cell=cell)
    if chosen == "native" or len(weights) == 1:  # else each of the two says so itself
        for _ in weights:
            record("gated_scan", chosen, refusals, cell=cell)
    if chosen != "native":
        return None

    def run(carry, xs, *, fresh, valid, reset, directions, every):
        layers = [
            gated_native.Layer((each.w_x, each.b, kernel.w_h, kernel.b_hn), *rest)
            for each, kernel, *rest in zip(weights, kernels, carry, fresh, directions, strict=True)
        ]
        results = gated_native.scan(
            kernels[0].kind, layers, xs, valid=valid, reset=reset, every=every, named=implementation is not None
        )
        return [(type(old)(*new), ys) for old, (new, ys) in zip(carry, results, strict=True)]

    return run


def _refusal(kernel: Kernel | str, dtypes, masks) -> str | None:
    """Why the compiled kernels do not run this call, or None."""
    if isinstance(kernel, str):
        return kernel
    if any(dtype != jnp.float32 for dtype in dtypes):
        return f"the kernels compute in float32, not in {', '.join(sorted({jnp.dtype(d).name for d in dtypes}))}"
    if any(mask is not None for mask in masks):
        return "no kernel draws recurrent dropout"
    return native.absent()
