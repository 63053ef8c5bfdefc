"""The base class of the state space cells whose channels do not see each other."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cell import Carry, Params
from jaxrnn.cells.linear import LinearCell
from jaxrnn.engines.arrays import cast, compute_dtype, lifted, zero_where_not
from jaxrnn.engines.diagonal.engine import diagonal_recurrence
from jaxrnn.engines.linear.engine import kernel_serves
from jaxrnn.engines.loop import compiled_once, in_chunks
from jaxrnn.engines.step import step_serves
from jaxrnn.engines.walk import kernel_dtype
from jaxrnn.typing import PyTree


class Diagonal(NamedTuple):
    """What a recurrence over N states of each of D channels reads beside x.

    a (D, N), b and c (..., N), step (..., D): h' = exp(Δ a) h + Δ x bᵀ, y = h' c, with Δ = softplus(step) and a at most
    0. Without `step`, a, b and c are complex (D, N): h' = a h + b x, y = 2 Re Σ_n c h'.
    """

    a: Array
    b: Array
    c: Array
    step: Array | None = None


class DiagonalCell(LinearCell[Params, Carry]):
    """A cell with N states for each of its D channels, read by y = Σ_n c h' + d x; its params have a field d (D,).

    Beside `coefficients` and `output` a subclass defines `diagonal`. From that, a kernel on the CPU runs a sequence: of
    64 steps, one has its states in memory, and from these the backward pass computes the others.
    """

    # Where no kernel runs: the number of steps whose states (steps, ..., D, N) are in memory at once, None for all.
    chunk = None
    step_by_kernel = False  # whether `step` is one kernel

    @abstractmethod
    def diagonal(self, params: PyTree, x: Array) -> Diagonal:
        """What the recurrence reads, for any leading axes of x."""

    @property
    def by_kernel(self) -> bool:
        """Whether there is a kernel for the recurrence."""
        return True

    @compiled_once
    def scan(self, params, carry: PyTree, xs, *, fresh: PyTree, noise, walk):
        check.params(self, params)
        if step_serves(
            walk, xs.shape, "linear_scan", owner=self, unlike=("step", "coefficients", "output", "diagonal")
        ):
            carry, y = self.step(params, carry, xs[0])
            return carry, y[None]
        if walk.axis_name is not None:
            return self.scan_in_parts(params, carry, xs, fresh=fresh, noise=noise, walk=walk)
        dtype = compute_dtype(xs, params)
        computed = kernel_dtype(walk, dtype, carry.h.real.dtype)
        if (
            computed is None
            or not self.by_kernel
            or not kernel_serves(walk, xs.shape, owner=self, pays=math.prod(xs.shape[:-1]) != 1)
        ):
            fits = self.chunk is None or (isinstance(xs.shape[0], int) and xs.shape[0] <= self.chunk)
            if walk.remat_every is None and not fits:
                walk = walk.replace(remat_every=self.chunk)
            return super().scan(params, carry, xs, fresh=fresh, noise=noise, walk=walk)

        def run(constant, carry, inputs):
            params, fresh = constant
            xs, flags = inputs
            params, xs = cast((cast(params, dtype), xs), computed)
            h, fresh_h = (each.h if jnp.iscomplexobj(each.h) else each.h.astype(computed) for each in (carry, fresh))
            last, ys = diagonal_recurrence(xs, *self.diagonal(params, xs), h, fresh=fresh_h, flags=flags, walk=walk)
            ys = (ys + lifted(params.d, xs) * xs).astype(dtype)
            return carry._replace(h=last.astype(carry.h.dtype)), zero_where_not(flags.valid, ys)

        return in_chunks(run, (params, fresh), carry, (xs.astype(dtype), walk.flags), walk)
