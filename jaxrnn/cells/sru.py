"""The simple recurrent unit."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import check
from jaxrnn.cells.activations import Activation, check_elementwise, elementwise
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.cells.linear import LinearCell, linear_step
from jaxrnn.engines.arrays import accumulator, lifted
from jaxrnn.engines.elementwise.engine import UnitWeights
from jaxrnn.engines.elementwise.programs import Unit
from jaxrnn.engines.product import dot
from jaxrnn.typing import DTypeLike, Noise


class SRUParams(NamedTuple):
    """w_x (D, 3H): input weights of the candidate n and the gates f and r; where D is not H, (D, 4H), also of the
    highway. b (2H,): bias of f and r, or None.
    """

    w_x: Array
    b: Array | None


class SRUCarry(NamedTuple):
    """h (..., H): the hidden state, called c in the paper."""

    h: Array


class SRUGates(NamedTuple):
    """The candidate n, and the activated forget gate f and reset gate r, each (..., H)."""

    n: Array
    f: Array
    r: Array


class SRU(LinearCell[SRUParams, SRUCarry]):
    """The simple recurrent unit: `sru_step` as a cell.

        n = x w_n;  f, r = σ(x w_f + b_f), σ(x w_r + b_r)
        h' = f h + (1 − f) n
        y = r φ(h') + (1 − r) x,  x w_s in place of x where D is not H

    Its gates see the input alone, as in the first form of the paper, so that a sequence trains in parallel over time.

    Args:
      input_size: The number of input features, D.
      hidden_size: The number of hidden units, H.
      activation: The activation φ; see `jaxrnn.activation`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.SRU(3, 16)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 3)))
      >>> ys.shape
      (7, 16)

    References:
      Lei et al. 2017, Simple recurrent units for highly parallelizable recurrence, arXiv 1709.02755.
    """

    input_size: int
    hidden_size: int
    activation: Activation = "identity"

    def __post_init__(self):
        check.sizes(self, "input_size", "hidden_size")
        check_elementwise(self.activation)

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> SRUParams:
        return sru_init(key, self.input_size, self.hidden_size, dtype=dtype)

    def initial_carry(self, params: SRUParams, batch_shape: tuple[int, ...] = ()) -> SRUCarry:
        return SRUCarry(self.zeros(params, batch_shape, self.hidden_size))

    def gates(self, params: SRUParams, carry: SRUCarry, x: Array, noise: Noise = None) -> SRUGates:
        """The candidate and the activated gates of one step."""
        check.params(self, params)
        return SRUGates(*_parts(self.hidden_size, params, x)[:3])

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return sru_step(params, carry, x, noise, activation=self.activation)

    @property
    def unit(self):
        skip = self.input_size != self.hidden_size
        return UNITS.get((self.activation, skip)) if isinstance(self.activation, str) else None

    def unit_weights(self, params):
        if params.b is None:
            return UnitWeights(params.w_x[None])
        size = self.hidden_size
        return UnitWeights(params.w_x[None], jnp.pad(params.b, (size, params.w_x.shape[1] - 3 * size)))

    def coefficients(self, params, x):
        return _coefficients(self.hidden_size, params, x)

    def output(self, params, h, x):
        return _output(elementwise(self.activation), params, h, x)


def sru_init(key: Array, input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32) -> SRUParams:
    """Draws the parameters of `sru_step`: w_x is LeCun normal, and b is zero.

    Examples:
      >>> import jax, jaxrnn
      >>> jaxrnn.sru_init(jax.random.key(0), 3, 16).w_x.shape, jaxrnn.sru_init(jax.random.key(0), 3, 3).w_x.shape
      ((3, 64), (3, 9))
    """
    parts = 3 if input_size == hidden_size else 4
    return SRUParams(lecun_normal(key, input_size, hidden_size, parts, dtype), jnp.zeros(2 * hidden_size, dtype))


def sru_step(
    params: SRUParams, carry: SRUCarry, x: Array, noise: Noise = None, *, activation: Activation = "identity"
) -> tuple[SRUCarry, Array]:
    """One step of a simple recurrent unit.

        n = x w_n;  f, r = σ(x w_f + b_f), σ(x w_r + b_r)
        h' = f h + (1 − f) n
        y = r φ(h') + (1 − r) x,  x w_s in place of x where D is not H

    Args:
      params: `SRUParams` with w_x (D, 3H) or (D, 4H), b (2H,) or None.
      carry: `SRUCarry(h)` with h (..., H).
      x: The input of one step, of shape (..., D).
      noise: Always None.
      activation: As in `SRU`.

    Returns:
      The new carry, and the output of shape (..., H).

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If the params belong to another cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> params = jaxrnn.sru_init(jax.random.key(0), 3, 16)
      >>> carry, y = jaxrnn.sru_step(params, jaxrnn.SRUCarry(jnp.zeros(16)), jnp.ones(3))
      >>> y.shape
      (16,)
    """
    check.kind(params, SRUParams)
    size = carry.h.shape[-1]
    check.drawn(params, sru_init, params.w_x.shape[0], size)
    output = functools.partial(_output, elementwise(activation))
    return linear_step(params, carry, x, functools.partial(_coefficients, size), output=output)


def _parts(size, params, x):
    """Computes (n, f, r, highway), in at least float32."""
    wide = accumulator(x.dtype)
    n, f, r, *skip = jnp.split(dot(x, params.w_x).astype(wide), params.w_x.shape[1] // size, axis=-1)
    if params.b is not None:
        b_f, b_r = jnp.split(lifted(params.b.astype(wide), f), 2, axis=-1)
        f, r = f + b_f, r + b_r
    return n, jax.nn.sigmoid(f), jax.nn.sigmoid(r), skip[0] if skip else x.astype(wide)


def _coefficients(size, params, x):
    n, f, *_ = _parts(size, params, x)
    return _mixed(n, f)


def _mixed(n, f):
    return f, (1 - f) * n


def _output(φ, params, h, x):
    _, _, r, skip = _parts(h.shape[-1], params, x)
    return _read(φ, r, h.astype(r.dtype), skip)


def _read(φ, r, h, skip):
    return r * φ(h) + (1 - r) * skip


def _unit(name, activation, skip):
    φ = elementwise(activation)

    def parts(u):
        return jnp.split(u, 4 if skip else 3, axis=-1)

    def gates(u, *_):
        n, f, *_ = parts(u)
        return _mixed(n, jax.nn.sigmoid(f))

    def read(u, x, h):
        _, _, r, *rest = parts(u)
        return _read(φ, jax.nn.sigmoid(r), h, rest[0] if skip else x)

    return Unit(name, gates, read)


UNITS = {
    ("identity", False): _unit("sru", "identity", False),
    ("identity", True): _unit("sru skip", "identity", True),
    ("tanh", False): _unit("sru tanh", "tanh", False),
    ("tanh", True): _unit("sru tanh skip", "tanh", True),
}  # by φ, and by whether x goes on by weights of its own
