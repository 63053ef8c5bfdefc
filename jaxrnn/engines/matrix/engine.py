"""The engine of matrix recurrences: as a function of arrays, and for cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrnn.engines.arrays import accumulator, zero_where_not
from jaxrnn.engines.cpu import library
from jaxrnn.engines.matrix.primitives import run
from jaxrnn.engines.matrix.programs import Problem, chunked, loop
from jaxrnn.engines.sequence_parallel import check_axis_name, part, states
from jaxrnn.engines.walk import Flags, Implementation, Walk, checked, kernel_dtype, no_kernel_for, refusals_of_sizes
from jaxrnn.typing import Bools, Named

ELSEWHERE = "chunked"  # what None means where there is no kernel


def matrix_scan(
    q: Array,
    k: Array,
    v: Array,
    s0: Array | None = None,
    *,
    log_decay: Array | None = None,
    beta: Array | None = None,
    u: Array | None = None,
    w: Array | None = None,
    mask: Bools | None = None,
    reset: Bools | None = None,
    reverse: bool = False,
    time_axis: int = 0,
    axis_name: str | None = None,
    implementation: Implementation = None,
) -> tuple[Array, Array]:
    """Runs a recurrence whose state is a matrix, as linear attention has it: (S_T, ys).

        S_t = (diag(a_t) + u_t w_tᵀ) S_{t-1} + k_t v_tᵀ,    y_t = S_tᵀ q_t,    a_t = exp(log_decay_t)

    With `beta` it is the gated delta rule: the state forgets what it holds at the key before it stores the value,

        S_t = A_t + k_t (β_t (v_t − A_tᵀ k_t))ᵀ,    A_t = diag(a_t) S_{t-1},

    which is u_t = −β_t k_t, w_t = a_t ⊙ k_t, and β_t v_t in place of v_t. All numbers are real. In half precision, sums
    are in float32, and so is S_T. Forward mode and higher derivatives are exact.

    Args:
      q: What each step reads with, (T, *batch, K), or with time at `time_axis`. Heads are a batch axis; a batch axis
        of 1, here and in k, u, w, log_decay and beta, is shared. That of the last batch axis is shared without a copy.
      k: The keys, (T, *batch, K).
      v: The values, (T, *batch, V).
      s0: The state before the first step, (*batch, K, V); None for zeros.
      log_decay: The logarithms of a, at most 0: (T, *batch), or (T, *batch, K), one for each row of S; None for a = 1.
      beta: The strength of writing, (T, *batch), for instance in [0, 2]; None for no delta rule.
      u: (T, *batch, K); u and w come together, and not with beta.
      w: (T, *batch, K).
      mask: bool, with the first axes of v, time among them: the valid steps. An invalid step keeps the state, and its
        y is 0.
      reset: bool like `mask`: True where a new sequence begins, from zeros, as in `jaxrnn.linear_scan`.
      reverse: Whether to run from the last step to the first.
      time_axis: The axis of time.
      axis_name: Inside `jax.shard_map`, the axis of the mesh that time is divided over, as in `jaxrnn.linear_scan`.
      implementation: None for the fastest; "native" is a compiled kernel (float32 or float64, on the CPU), sequential
        in time, with a part of S in the cache of the processor; "xla" goes step by step; "chunked" computes 32 steps as
        products of matrices, and keeps one state of each 32 for the backward pass.

    Returns:
      The last state (*batch, K, V), and the outputs, with the shape of v.

    Raises:
      ValueError: If shapes or names do not fit, or a known log_decay is positive.
      TypeError: If dtypes do not fit.

    Examples:
      >>> import jax.numpy as jnp, jaxrnn
      >>> q = k = jnp.eye(2)[jnp.array([0, 1, 0])]
      >>> v = jnp.array([[1.0], [2.0], [4.0]])
      >>> jaxrnn.matrix_scan(q, k, v)[1][:, 0]
      Array([1., 2., 5.], dtype=float32)
      >>> jaxrnn.matrix_scan(q, k, v, beta=jnp.ones(3))[1][:, 0]
      Array([1., 2., 4.], dtype=float32)

    References:
      Katharopoulos et al. 2020, arXiv 2006.16236 (linear attention); Yang et al. 2024, arXiv 2406.06484 and 2412.06464
      (the delta rule in chunks, and gated).
    """
    arrays = {name: jnp.asarray(each) for name, each in (("q", q), ("k", k), ("v", v))}
    given = {"log_decay": log_decay, "beta": beta, "u": u, "w": w}
    arrays |= {name: jnp.asarray(each) for name, each in given.items() if each is not None}
    if (u is None) != (w is None):
        raise ValueError(f"{'u' if u is None else 'w'}: expected beside {'w' if u is None else 'u'}, got None")
    if u is not None and beta is not None:
        raise ValueError("beta: expected beta or u and w, got both")
    for name, each in arrays.items():
        if not jnp.issubdtype(each.dtype, jnp.floating):
            raise TypeError(f"{name}: expected floating numbers, got {each.dtype}")
    shape = arrays["v"].shape
    if not 0 <= time_axis <= len(shape) - 2:
        raise ValueError(f"time_axis: expected an axis before the last of v with shape {shape}, got {time_axis}")
    arrays = {name: jnp.moveaxis(each, time_axis, 0) for name, each in arrays.items()}
    length, *batch, _ = arrays["v"].shape
    _check_shapes(arrays, length, tuple(batch))
    decays = arrays.get("log_decay")
    if decays is not None and not isinstance(decays, jax.core.Tracer) and decays.is_fully_addressable and decays.size:
        greatest = np.max(np.asarray(decays))
        if greatest > 0:
            raise ValueError(f"log_decay: expected at most 0, got {greatest}")
    flags = {name: _flags(name, each, shape, time_axis) for name, each in (("mask", mask), ("reset", reset))}
    walk = Walk(flags["mask"], flags["reset"], bool(reverse), implementation=checked(implementation))
    state = (*batch, arrays["k"].shape[-1], shape[-1])
    dtype = accumulator(*(each.dtype for each in arrays.values()))
    if s0 is None:
        s = jnp.zeros(state, dtype)
    else:
        s = jnp.asarray(s0)
        if s.shape != state:
            raise ValueError(f"s0: expected shape {state}, got {s.shape}")
        s = s.astype(accumulator(s.dtype, dtype))
    form = matrix_form(walk, arrays["v"].shape, s.dtype, *(each.dtype for each in arrays.values()))
    whole = None
    if axis_name is not None:
        check_axis_name(axis_name)
        s, whole = matrix_states(arrays, s, walk.replace(axis_name=axis_name), walk.flags, form)
    last, ys = matrix_recurrence(arrays, s, fresh=None, flags=walk.flags, reverse=walk.reverse, form=form)
    return last if whole is None else whole, jnp.moveaxis(ys, 0, time_axis)


def matrix_states(
    arrays: Named, s: Array, walk: Walk, flags: Flags, form: str | None, fresh: Array | None = None
) -> tuple[Array, Array]:
    """The state before the steps of this device, and that after the steps of all.

    Columns of S do not meet: some begin at 0, and beside them those of the identity become the product of the steps.
    """
    v, size, keys = arrays["v"], s.shape[-1], s.shape[-2]

    def beside(array, columns):
        return jnp.concatenate([array, jnp.broadcast_to(columns, (*array.shape[:-1], keys)).astype(array.dtype)], -1)

    both, _ = matrix_recurrence(
        {**arrays, "v": beside(v, 0)},
        beside(jnp.zeros_like(s), jnp.eye(keys)),
        fresh=None if fresh is None else beside(fresh, 0),
        flags=flags,
        reverse=walk.reverse,
        form=form,
    )
    own = part(walk, both[..., size:], both[..., :size])
    return states(own, s, _after, walk, 0 if fresh is None else fresh)


def _after(total: Array, last: Array, state: Array) -> Array:
    return jnp.matmul(total, state, precision=lax.Precision.HIGHEST) + last


def _check_shapes(arrays: Named, length: int, batch: tuple[int, ...]) -> None:
    """Batch axes are those of v, or 1; k tells K."""
    key = arrays["k"].shape[-1:]
    for name, each in arrays.items():
        if name == "v":
            continue
        by_key = name in "qkuw" or (name == "log_decay" and each.ndim == len(batch) + 2)
        wanted = (length, *batch, *(key if by_key else ()))
        one = slice(1, 1 + len(batch))
        fits = each.ndim == len(wanted) and all(
            own == whole or (own == 1 and k in range(one.start, one.stop))
            for k, (own, whole) in enumerate(zip(each.shape, wanted, strict=True))
        )
        if not fits:
            also = f" or {(*wanted, *key)}" if name == "log_decay" and not by_key else ""
            raise ValueError(f"{name}: expected shape {wanted}{also} with time first, got {each.shape}")


def _flags(name: str, flag: Any, shape: tuple[int, ...], time_axis: int) -> Array | None:
    """Returns the flag with time first."""
    if flag is None:
        return None
    flag = jnp.asarray(flag)
    if flag.dtype != bool:
        raise TypeError(f"{name}: expected bool, got {flag.dtype}")
    if not time_axis < flag.ndim < len(shape) or flag.shape != shape[: flag.ndim]:
        raise ValueError(f"{name}: expected leading axes of v, {shape}, time among them, got {flag.shape}")
    return jnp.moveaxis(flag, time_axis, 0)


def kernel_in_single(walk: Walk, shape: Sequence[Any], dtypes: Iterable[Any]) -> bool:
    """Whether the kernel runs sequences of a shape (T, ...) of half precision, which it takes in float32."""
    asked = walk.named("matrix_scan") in (None, "native") and not refusals_of_sizes(shape) and shape[0] > 1
    return asked and library.absent() is None and kernel_dtype(walk, *dtypes) == jnp.float32


def matrix_form(walk: Walk, shape: Sequence[Any], *dtypes, owner: object = "matrix_scan") -> str | None:
    """Returns what runs the recurrence of `owner` on sequences of a shape (T, ...) and arrays of `dtypes`: a name, or
    None for each platform's own.
    """
    absent = library.absent()
    others = not library.takes(*dtypes)
    refusals = {"native": absent or no_kernel_for(*dtypes)} if absent is not None or others else {}
    refusals |= refusals_of_sizes(shape) | {"associative": "the products of steps would be matrices"}
    chosen, refusals = walk.choose("matrix_scan", refusals, cell=owner, elsewhere=ELSEWHERE, without_kernel=ELSEWHERE)
    if shape[0] == 1 and walk.named("matrix_scan") is None:
        chosen = "xla"  # which needs no second look at the state
    walk.record("matrix_scan", chosen, refusals, cell=owner)
    if shape[0] == 1:
        return chosen
    return ELSEWHERE if others and chosen == ELSEWHERE else walk.form("matrix_scan", chosen, refusals)


def matrix_recurrence(
    arrays: dict[str, Array], s: Array, *, fresh: Array | None, flags: Flags, reverse: bool, form: str | None
) -> tuple[Array, Array]:
    """Runs the recurrence over the first axis: (the last state, ys, 0 at invalid steps).

    Args:
      arrays: q, k, v, and what there is of log_decay, beta, u and w, as in `matrix_scan`, with time first.
      s: The state before the first step, (*batch, K, V), in a dtype for sums.
      fresh: The state before a step that starts fresh, like s; None for zeros.
      flags: The flags over leading axes of v.
      reverse: Whether to run from the last step to the first.
      form: The result of `matrix_form`.
    """
    valid, start = flags
    length, *batch, size = arrays["v"].shape
    if arrays["v"].size == 0 or s.size == 0:
        return s, jnp.zeros_like(arrays["v"])
    arrays = {name: zero_where_not(valid, each) for name, each in arrays.items()}
    # Flags are of rows; where they are of all batch axes, no axis is left for heads.
    of_heads = bool(batch) and (start is None or start.ndim <= len(batch))
    above, heads = (batch[:-1], batch[-1]) if of_heads else (batch, 1)
    rows = math.prod(above)

    def arranged(array: Array) -> Array:
        """(T, R, 1 or G, ...)."""
        own = array.shape[len(batch)] if of_heads else 1
        rest = array.shape[1 + len(batch) :]
        shared = [own] if of_heads else []
        return jnp.broadcast_to(array, (length, *above, *shared, *rest)).reshape(length, rows, own, *rest)

    def of_state(array: Array | None) -> Array | None:
        return None if array is None else array.astype(s.dtype).reshape(rows, heads, *s.shape[-2:])

    if start is not None:
        start = start.reshape(start.shape + (1,) * (1 + len(above) - start.ndim))
        start = jnp.broadcast_to(start, (length, *above)).reshape(length, rows)
    first = of_state(s)
    assert first is not None
    problem = Problem(
        **{name: arranged(each) for name, each in arrays.items()},
        s=first,
        start=start,
        fresh=None if start is None else of_state(fresh),
    )
    if form == "xla":
        ys, last, *_ = loop(problem, reverse=reverse)
    elif form == "chunked":
        ys, last, *_ = chunked(problem, reverse=reverse)
    else:
        ys, last = run(problem, reverse=reverse, named=form == "native")
    return last.reshape(s.shape), zero_where_not(valid, ys.reshape(length, *batch, size))
