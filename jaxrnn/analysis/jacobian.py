"""The Jacobian of a step along a trajectory: how much it stretches in one step and in the long run."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import check
from jaxrnn.analysis.observation import Observation, as_real, from_real, observe_whole
from jaxrnn.cell import Cell
from jaxrnn.engines.arrays import cast_like, select
from jaxrnn.typing import Bools, Integers, PyTree


class JacobianSpectrum(NamedTuple):
    """The singular values of J_t, descending, (T, *batch, N), 0 at invalid steps; and the valid steps, (T, *batch)."""

    singular_values: Array
    valid: Array


class LyapunovSpectrum(NamedTuple):
    """The exponents in nats per step, (*batch, K), and the number of steps that they are a mean over, (*batch)."""

    exponents: Array
    steps: Array


def singular_values(
    cell: Cell,
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    *,
    lengths: Integers | None = None,
    mask: Bools | None = None,
    reset: Bools | None = None,
    reverse: bool = False,
    time_axis: int = 0,
) -> JacobianSpectrum:
    """The singular values of the step's Jacobian, along the trajectory that `xs` drives.

        J_t = ∂c_{t+1}/∂c_t,    c_{t+1}, y_t = step(c_t, x_t)
        σ_1 ≥ … ≥ σ_N of J_t

    c is the whole carry, flattened to N numbers; a complex entry counts as two real ones. Gradients explode only if
    σ_1 > 1 somewhere, and vanish if σ_1 ≤ γ < 1 everywhere. At a reset, c_t is the fresh carry. A `Stack` is one
    recurrence, whose J_t holds all layers. Analyse the directions of a `Bidirectional` one by one. For h' = h A + x
    they are the singular values of A.

    The cost is one decomposition of an N × N matrix for each step and row.

    Args:
      cell: As in `jaxrnn.scan`; a cell that runs step by step.
      params: As in `jaxrnn.scan`.
      carry: As in `jaxrnn.scan`.
      xs: As in `jaxrnn.scan`.
      lengths: As in `jaxrnn.scan`.
      mask: As in `jaxrnn.scan`.
      reset: As in `jaxrnn.scan`.
      reverse: As in `jaxrnn.scan`.
      time_axis: As in `jaxrnn.scan`.

    Returns:
      A `JacobianSpectrum`, with time first whatever `time_axis` is.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxrnn import IndRNN, IndRNNParams
      >>> from jaxrnn.analysis import singular_values
      >>> params = IndRNNParams(w_x=jnp.ones((1, 2)), w_h=jnp.array([0.5, 2.0]), b=None)
      >>> singular_values(IndRNN(1, 2), params, None, jnp.ones((3, 1))).singular_values[0]
      Array([2. , 0.5], dtype=float32)

    References:
      Pascanu et al. 2013, On the difficulty of training recurrent neural networks, arXiv 1211.5063; Pennington et al.
      2017, Resurrecting the sigmoid in deep learning through dynamical isometry, arXiv 1711.04735.
    """
    seen = observe_whole(
        cell, params, carry, xs, lengths=lengths, mask=mask, reset=reset, reverse=reverse, time_axis=time_axis
    )

    def spectrum(carry, x):
        return jnp.linalg.svd(jax.jacfwd(_flat_step(seen, carry, x))(as_real(carry)), compute_uv=False)

    values = lax.map(lambda reads: _rows(seen, spectrum)(*reads), seen.reads)
    return JacobianSpectrum(select(seen.valid, values, jnp.zeros_like(values)), seen.valid)


def lyapunov_exponents(
    cell: Cell,
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    *,
    count: int | None = None,
    warmup: int = 0,
    lengths: Integers | None = None,
    mask: Bools | None = None,
    reset: Bools | None = None,
    reverse: bool = False,
    time_axis: int = 0,
) -> LyapunovSpectrum:
    """The Lyapunov exponents of the recurrence along the trajectory that `xs` drives, by Benettin's method.

        Q_{t+1} R_{t+1} = J_t Q_t,    J_t = ∂c_{t+1}/∂c_t,  Q_0 random, orthonormal, N × K
        λ_k = mean over t of log (R_{t+1})_kk

    They are the rates at which a perturbation of the carry grows or shrinks: λ_1 > 0 means chaos, where gradients
    explode, and λ_1 < 0 a memory of about −1/λ_1 steps. They belong to a finite trajectory; `warmup` leaves out the
    steps in which Q_t still turns into place. An invalid step does nothing. After a reset, Q_t continues from the fresh
    carry. No N × N matrix is made. For h' = h A + x they are the logarithms of the absolute values of the eigenvalues
    of A.

    Args:
      cell: As in `jaxrnn.scan`; a cell that runs step by step.
      params: As in `jaxrnn.scan`.
      carry: As in `jaxrnn.scan`.
      xs: As in `jaxrnn.scan`.
      count: K, the number of exponents, the greatest ones; None for all N.
      warmup: The number of valid steps before the mean.
      lengths: As in `jaxrnn.scan`.
      mask: As in `jaxrnn.scan`.
      reset: As in `jaxrnn.scan`.
      reverse: As in `jaxrnn.scan`.
      time_axis: As in `jaxrnn.scan`.

    Returns:
      A `LyapunovSpectrum`, with the exponents in approximately descending order.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxrnn import IndRNN, IndRNNParams
      >>> from jaxrnn.analysis import lyapunov_exponents
      >>> params = IndRNNParams(w_x=jnp.ones((1, 2)), w_h=jnp.array([0.5, 1.0]), b=None)
      >>> spectrum = lyapunov_exponents(IndRNN(1, 2), params, None, jnp.ones((40, 1)), warmup=20)
      >>> spectrum.exponents.round(4) + 0
      Array([ 0.    , -0.6931], dtype=float32)

    References:
      Benettin et al. 1980, https://doi.org/10.1007/BF02128236; for recurrent networks: Engelken et al. 2023, Lyapunov
      spectra of chaotic recurrent neural networks, arXiv 2006.02427; Vogt et al. 2022, On Lyapunov exponents for RNNs,
      arXiv 2006.14123.
    """
    warmup = check.integer("warmup", warmup, least=0)
    seen = observe_whole(
        cell, params, carry, xs, lengths=lengths, mask=mask, reset=reset, reverse=reverse, time_axis=time_axis
    )
    flat = jax.eval_shape(lambda carry: as_real(carry, seen.valid.ndim), seen.reads.carry)
    *rows, size = flat.shape[1:]
    count = check.integer("count", size if count is None else count, least=1)
    if count > size:
        raise ValueError(f"count: expected at most {size}, the size of the carry, got {count}")

    def stretch(q, carry, x):
        step, point = _flat_step(seen, carry, x), as_real(carry)
        return _orthonormal(jax.vmap(lambda v: jax.jvp(step, (point,), (v,))[1])(q))

    def body(state, inputs):
        q, total, done = state
        reads, valid = inputs
        turned, grown = _rows(seen, stretch)(q, *reads)
        counted = valid & (done >= warmup)
        return (select(valid, turned, q), select(counted, total + grown, total), done + valid.astype(done.dtype)), None

    q, _ = _orthonormal(jax.random.normal(jax.random.key(0), (count, size), flat.dtype))
    start = jnp.broadcast_to(q, (*rows, *q.shape)), jnp.zeros((*rows, count), flat.dtype), jnp.zeros(rows, jnp.int32)
    (_, total, done), _ = lax.scan(body, start, (seen.reads, seen.valid), reverse=reverse)
    steps = jnp.maximum(done - warmup, 0)
    return LyapunovSpectrum(total / jnp.maximum(steps, 1)[..., None].astype(flat.dtype), steps)


def _rows(seen: Observation, function):
    """Applies `function`, which takes one row, to all rows."""
    for _ in range(seen.valid.ndim - 1):
        function = jax.vmap(function)
    return function


def _flat_step(seen: Observation, carry, x):
    """The map c ↦ c' of one row, with both as vectors of real numbers."""

    def step(vector):
        new, _ = seen.cell.step(seen.params, from_real(vector, carry), x)
        return as_real(cast_like(new, carry, owner=type(seen.cell).__name__))

    return step


def _orthonormal(vectors: Array) -> tuple[Array, Array]:
    """Makes the rows orthonormal, one after the other; also returns the logarithm of the remaining length of each.

    It uses Gram–Schmidt twice and not LAPACK's QR: jaxlib's CPU backend can hang if several calls of QR run at once.
    """

    def row(k, state):
        q, logs = state
        v = vectors[k]
        for _ in range(2):
            v = v - jnp.matmul(jnp.matmul(q, v, precision="highest"), q, precision="highest")
        length = jnp.linalg.norm(v)
        return q.at[k].set(v / jnp.maximum(length, jnp.finfo(v.dtype).tiny)), logs.at[k].set(jnp.log(length))

    return lax.fori_loop(0, len(vectors), row, (jnp.zeros_like(vectors), jnp.zeros_like(vectors[:, 0])))
