"""Functions that draw weights. All compute in at least float32 and cast the result."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn.engines.arrays import accumulator


def lecun_normal(key: Array, rows: int, columns: int, gates: int, dtype) -> Array:
    """Draws weights (rows, gates · columns) from a truncated normal distribution with variance 1/rows."""
    draw = jax.nn.initializers.lecun_normal()
    return draw(key, (rows, gates * columns), accumulator(dtype)).astype(dtype)


def orthogonal(key: Array, rows: int, columns: int, gates: int, dtype) -> Array:
    """Draws weights (rows, gates · columns); each gate's block is orthogonal by itself, or semi-orthogonal if not
    square.
    """
    tall, thin = max(rows, columns), min(rows, columns)
    blocks = jax.vmap(_orthonormal)(jax.random.normal(key, (gates, tall, thin), accumulator(dtype)))
    blocks = blocks if rows >= columns else blocks.mT
    return jnp.moveaxis(blocks, 0, 1).reshape(rows, gates * columns).astype(dtype)


@jax.jit
def _orthonormal(a: Array) -> Array:
    """Makes the columns of `a` orthonormal by Gram–Schmidt, in blocks and twice, and refines them by a Newton step.

    For a normal matrix the result is uniformly distributed. It does not call LAPACK, since jaxlib's CPU backend can
    hang where several batched calls run at once, as in `jax.jit(jax.vmap(cell.init))`.
    """
    thin = a.shape[1]
    width = min(64, thin)
    a = jnp.pad(a, ((0, 0), (0, -thin % width)))
    dot = functools.partial(jnp.matmul, precision="highest")

    def project_out(q, v):
        for _ in range(2):
            v = v - dot(q, dot(q.T, v))
        return v

    def block(k, q):
        v = project_out(q, lax.dynamic_slice_in_dim(a, k * width, width, 1))

        def column(j, w):
            x = project_out(w, v[:, j])
            return w.at[:, j].set(x / jnp.maximum(jnp.linalg.norm(x), jnp.finfo(x.dtype).tiny))

        w = lax.fori_loop(0, width, column, jnp.zeros_like(v))
        return lax.dynamic_update_slice_in_dim(q, w, k * width, 1)

    q = lax.fori_loop(0, a.shape[1] // width, block, jnp.zeros_like(a))[:, :thin]
    return 1.5 * q - 0.5 * dot(q, dot(q.T, q))
