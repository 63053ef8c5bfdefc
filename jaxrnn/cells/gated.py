"""What the cells with one recurrent product and elementwise gates share."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import check
from jaxrnn.cell import Cell
from jaxrnn.engines.gated.engine import GatedWeights, Kernel, gated_products, gated_scan, gated_scan_both, gated_step


class GatedCell(Cell):
    """A cell of the form that `engines.gated` runs. Its noise is a mask on what the recurrent product reads.

    A subclass has a field `hidden_size`, names its carry `h` and its recurrent weights `w_h`, and defines `weights` and
    `gate`, and `mid` where a step has a second product.
    """

    recurrent_state = "h"
    recurrent_weights = ("w_h",)

    @abstractmethod
    def weights(self, params: Any) -> GatedWeights:
        """The arrays of one step; `theta` is what `gate` and `mid` read."""

    @abstractmethod
    def gate(self, theta: Any, carry: Any, u: Array, v: Array, w: Array | None) -> tuple[Any, Array]:
        """(carry', y) from the input product u, the recurrent product v and the second product w, if any."""

    def kernel(self, weights: GatedWeights) -> Kernel | str:
        """The compiled kernel of this cell, or why there is none."""
        return f"no kernel computes a {type(self).__name__}"

    def mid(self, theta: Any, carry: Any, s: Array, u: Array, v: Array) -> Array:
        """What the second product reads; s is the recurrent part of the carry under its mask."""
        raise TypeError(f"{type(self).__name__} has no second product")

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return gated_step(self, self.weights(params), carry, x, _mask(noise))

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        check.params(self, params)
        return gated_scan(self, self.weights(params), carry, xs, fresh=fresh, mask=_mask(noise), walk=walk)

    def scan_both(self, params, carry, xs, *, fresh, noise, walk):
        if type(self).scan is not GatedCell.scan:  # a subclass walks in a way of its own
            return super().scan_both(params, carry, xs, fresh=fresh, noise=noise, walk=walk)
        for each in params:
            check.params(self, each)
        weights, masks = [self.weights(each) for each in params], [_mask(each) for each in noise]
        return gated_scan_both(self, weights, carry, xs, fresh=fresh, mask=masks, walk=walk)

    def zeros(self, params: Any, batch_shape: tuple[int, ...], size: int) -> Array:
        """A part of the initial carry, (*batch_shape, size), in the params' dtype."""
        check.params(self, params)
        return jnp.zeros((*batch_shape, size), params.w_x.dtype)

    def products(self, params: Any, carry: Any, x: Array, noise: Any = None):
        """What `gate` reads at one step: (θ, carry, u, v, w)."""
        check.params(self, params)
        return gated_products(self, self.weights(params), carry, x, _mask(noise))


def options(cell: Cell) -> str:
    """The fields of a cell, but its sizes, that are not as by default: for why no kernel computes it."""
    return ", ".join(
        f"{field.name}={getattr(cell, field.name)!r}"
        for field in dataclasses.fields(cell)
        if field.default is not dataclasses.MISSING and getattr(cell, field.name) != field.default
    )


def _mask(noise):
    return None if noise is None else noise[0]


def normalize(x: Array, epsilon: float = 1e-5) -> Array:
    """(x − mean) / √(variance + ε) over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


def clip(x: Array, bound: float | None) -> Array:
    """`x` within ±bound, or as it is."""
    return x if bound is None else jnp.clip(x, -bound, bound)
