"""What the cells with a linear recurrence share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cell import Cell
from jaxrnn.engines.arrays import accumulator, cast, compute_dtype, select, zero_where_not
from jaxrnn.engines.linear import linear_form, linear_recurrence
from jaxrnn.engines.loop import in_chunks, starts


class LinearCell(Cell):
    """A cell of the form that `engines.linear` runs: h' = a h + b, elementwise, a and b of the input alone.

    A subclass has a carry with one field, h, and defines `coefficients`, and `output` where y is not h. Both take any
    leading axes, so that a whole sequence is one call of each.
    """

    @abstractmethod
    def coefficients(self, params: Any, x: Array) -> tuple[Array, Array]:
        """(a, b), in at least float32; a may lack axes."""

    def output(self, params: Any, h: Array, x: Array) -> Array:
        """y, of the new state."""
        return h

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        dtype = compute_dtype(x, params)
        params, x = cast(params, dtype), x.astype(dtype)
        a, b = self.coefficients(params, x)
        wide = accumulator(b.dtype, carry.h.dtype)
        h = a.astype(wide) * carry.h.astype(wide) + b.astype(wide)
        y = self.output(params, h.astype(b.dtype), x).astype(dtype)
        return type(carry)(h.astype(carry.h.dtype)), y

    def scan(self, params, carry, xs, *, fresh, valid, reset, reverse, noise, remat_every, implementation):
        check.params(self, params)
        dtype = compute_dtype(xs, params)
        params, xs = cast(params, dtype), xs.astype(dtype)
        dtypes = [array.dtype for array in jax.eval_shape(self.coefficients, params, xs)]
        form = linear_form(implementation, *dtypes, accumulator(dtypes[1], carry.h.dtype), owner=self)

        def run(h, inputs):
            xs, valid, start = inputs
            a, b = self.coefficients(params, xs)
            if start is not None:
                b = select(start, b + a * fresh.h.astype(b.dtype), b)
            wide = h.astype(accumulator(b.dtype, h.dtype))
            last, hs = linear_recurrence(a, b, wide, valid=valid, start=start, reverse=reverse, form=form)
            return last.astype(h.dtype), zero_where_not(valid, self.output(params, hs, xs).astype(dtype))

        h, ys = in_chunks(run, carry.h, (xs, valid, starts(reset, valid, reverse)), reverse, remat_every)
        return type(carry)(h), ys

    def zeros(self, params: Any, batch_shape: tuple[int, ...], size: int) -> Array:
        """(*batch_shape, size), in the params' dtype."""
        check.params(self, params)
        return jnp.zeros((*batch_shape, size), params.w_x.dtype)
