"""Initial biases for a known time scale."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn.cells.gru import GRUParams
from jaxrnn.cells.lstm import LSTMParams
from jaxrnn.engines.arrays import accumulator

P = TypeVar("P", LSTMParams, GRUParams)


def chrono_init(key: Array, params: P, max_steps: int) -> P:
    """Returns LSTM or GRU params in which the gates that keep the state remember over 1 to `max_steps` steps.

        LSTM: b_f = log u, b_i = −b_f (none with i = 1 − f);  GRU: b_z = log u;  u ~ U(1, max_steps − 1) per unit

    Args:
      key: A PRNG key.
      params: `GRUParams`, or `LSTMParams` except those of `LSTM(coupled="input")`. They must have a bias, and only the
        bias changes.
      max_steps: The longest expected dependency, at least 3.

    Raises:
      TypeError: If the params belong to another cell.
      ValueError: If the params have no bias, or if `max_steps` is below 3.

    Examples:
      >>> import jax, jaxrnn
      >>> params = jaxrnn.LSTM(3, 4).init(jax.random.key(0))
      >>> params = jaxrnn.chrono_init(jax.random.key(1), params, max_steps=100)
      >>> bool((params.b[4:8] == -params.b[:4]).all())
      True

    References:
      Tallec & Ollivier 2018, Can recurrent neural networks warp time?, arXiv 1804.11188.
    """
    if not isinstance(params, (LSTMParams, GRUParams)):
        raise TypeError(f"params: expected LSTMParams or GRUParams, got {type(params).__name__}")
    if params.b is None:
        raise ValueError("params: expected a bias, got b=None")
    if max_steps < 3:
        raise ValueError(f"max_steps: expected at least 3, got {max_steps}")
    b = jnp.asarray(params.b)
    gru = isinstance(params, GRUParams)
    hidden_size = params.hidden_size
    u = jax.random.uniform(key, (hidden_size,), accumulator(b.dtype), 1.0, max_steps - 1.0)
    keep = jnp.log(u).astype(b.dtype)
    if gru or b.shape[0] == 3 * hidden_size:
        at = hidden_size if gru else 0
        return params._replace(b=b.at[at : at + hidden_size].set(keep))
    return params._replace(b=b.at[: 2 * hidden_size].set(jnp.concatenate([-keep, keep])))
