"""Kernels of the linear recurrence for a TPU and for NVIDIA's GPUs from Hopper on, in Pallas: one pass over the steps,
the state never leaves the chip. They have run in interpreters and compilers only, so no platform takes them unless they
are named.

A row of steps is (R, D): all axes of b but time, the leading ones as one.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

ROWS, COLUMNS, STEPS = 8, 512, 64  # that a block holds on a TPU: two of each array are in its memory at once
LANES = 128  # columns of a block on a GPU, one for each thread


def _flat(array: Array, like: Array) -> Array:
    """An array that broadcasts to b (T, ...), as (T, R, D), where each axis may be 1."""
    *lead, _ = like.shape[1:] or (1,)
    rows = math.prod(lead)
    *own, last = array.shape[1:] or (1,)
    if all(size == 1 for size in own):
        return array.reshape(array.shape[0], 1, last)
    array = jnp.broadcast_to(array, (array.shape[0], *lead, last))
    return array.reshape(array.shape[0], rows, last)


def scan(a, b, h, *cut, reverse, shifted, kernel, **options):
    """A form of the recurrence, by one of the kernels below."""
    wide, inner = h.dtype, b.shape[1:]
    flat = [_flat(array.astype(wide), b) for array in (a, b)]
    flags = [_flat(each.astype(jnp.int32), b) for each in cut]
    state = h.reshape(1, *flat[1].shape[1:])
    hs = kernel(*flat, state, *flags, reverse=reverse, shifted=shifted, **options).reshape(b.shape[0], *inner)
    last = hs[0 if reverse else -1]
    if shifted:
        last = last * jnp.broadcast_to(a.astype(wide), hs.shape)[0 if reverse else -1]
        if cut:
            last = jnp.where(jnp.broadcast_to(cut[0], hs.shape)[0 if reverse else -1], 0, last)
    return hs.astype(b.dtype), last


def _step(coefficient, cut, b, c, shifted):
    """Returns (what comes out, what the next step reads)."""

    def before(h):
        product = coefficient * h
        return product if cut is None else jnp.where(cut != 0, jnp.zeros_like(product), product)

    new = (c if shifted else before(c)) + b
    return new, before(new) if shifted else new


def on_tpu(a, b, h, *cut, reverse: bool, shifted: bool, interpret: Any = False) -> Array:
    """All h, (T, R, D) float32. A core walks over the blocks of time with the state of its columns in its memory."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    length, rows, columns = b.shape
    block = min(STEPS, length), min(ROWS, rows), min(COLUMNS, columns)
    blocks = pl.cdiv(length, block[0])
    ragged = length - (blocks - 1) * block[0]  # steps of the last block; what is behind them is never read

    def kernel(a, b, h, *refs):
        *cut, out, carry = refs
        k = pl.program_id(2)

        @pl.when(k == 0)
        def _():
            carry[...] = h[...]

        def at(ref, t):
            return ref[0 if ref.shape[0] == 1 else t]

        steps = jnp.where(k == (0 if reverse else blocks - 1), ragged, block[0])

        def body(i, c):
            t = steps - 1 - i if reverse else i
            new, c = _step(at(a, t), at(cut[0], t) if cut else None, at(b, t), c, shifted)
            out[t] = new
            return c

        carry[0] = lax.fori_loop(0, steps, body, carry[0])

    def spec(array):
        """Axes of size 1 have one block."""
        sizes = [size if size < whole else own for size, own, whole in zip(array.shape, block, b.shape, strict=True)]

        def index(r, d, k):
            places = blocks - 1 - k if reverse else k, r, d
            return tuple(
                0 if size < whole else place for size, whole, place in zip(array.shape, b.shape, places, strict=True)
            )

        return pl.BlockSpec(tuple(sizes), index)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, block[1]), pl.cdiv(columns, block[2]), blocks),
        in_specs=[spec(a), spec(b), pl.BlockSpec((1, *block[1:]), lambda r, d, k: (0, r, d)), *map(spec, cut)],
        out_specs=spec(b),
        out_shape=jax.ShapeDtypeStruct(b.shape, b.dtype),
        scratch_shapes=[pltpu.VMEM((1, *block[1:]), b.dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(a, b, h, *cut)


def on_gpu(a, b, h, *cut, reverse: bool, shifted: bool, interpret: Any = None) -> Array:
    """All h, (T, R, D) float32. A block of threads walks over time, with the state of its columns in registers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    length, columns = b.shape[0], math.prod(b.shape[1:])
    size, missing = min(STEPS, length), -columns % LANES

    def padded(array):
        """(T, C), with the steps and the columns that a block lacks, whose results nobody reads."""
        steps = (-length % size, 0) if reverse else (0, -length % size)
        return jnp.pad(jnp.broadcast_to(array, b.shape).reshape(length, columns), (steps, (0, missing)))

    arrays = [padded(array) for array in (a, b, *cut)]
    h = jnp.pad(h.reshape(columns), (0, missing))
    found = plgpu.kernel(
        functools.partial(_walk, count=len(arrays), blocks=len(arrays[0]) // size, reverse=reverse, shifted=shifted),
        out_type=jax.ShapeDtypeStruct(arrays[1].shape, b.dtype),
        grid=((columns + missing) // LANES,),
        grid_names=("columns",),
        scratch_types=[
            *(plgpu.SMEM((size, LANES), array.dtype) for array in arrays),
            plgpu.SMEM((LANES,), b.dtype),
            plgpu.SMEM((size, LANES), b.dtype),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=len(arrays)),
        ],
        **({} if interpret is None else {"interpret": interpret}),
    )(*arrays, h)
    found = found[-length:] if reverse else found[:length]
    return found[:, :columns].reshape(b.shape)


def _walk(*refs, count: int, blocks: int, reverse: bool, shifted: bool) -> None:
    """What a block of threads does: `count` arrays (T, C), h (C,) and the result, then what it has on the chip."""
    from jax.experimental.pallas import ds
    from jax.experimental.pallas import mosaic_gpu as plgpu

    sources, (h, out), (*buffers, state, results, first, ready) = (
        refs[:count],
        refs[count : count + 2],
        refs[count + 2 :],
    )
    here, size = ds(lax.axis_index("columns") * LANES, LANES), results.shape[0]
    plgpu.copy_gmem_to_smem(h.at[here], state, first)
    plgpu.barrier_wait(first)

    def block(k, c):
        steps = ds((blocks - 1 - k if reverse else k) * size, size)
        for source, buffer in zip(sources, buffers, strict=True):
            plgpu.copy_gmem_to_smem(source.at[steps, here], buffer, ready)
        plgpu.barrier_wait(ready)

        def body(i, c):
            t = size - 1 - i if reverse else i
            a, b, *flag = (buffer[t] for buffer in buffers)
            results[t], c = _step(a, flag[0] if flag else None, b, c, shifted)
            return c

        c = lax.fori_loop(0, size, body, c)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(results, out.at[steps, here])
        plgpu.wait_smem_to_gmem(0)
        return c

    lax.fori_loop(0, blocks, block, state[...])
