"""Noise on the recurrence: on the input of its product, on its weights, or on its carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry2x32_p

from jaxrnn import check
from jaxrnn.cell import Carry, Params, take_step
from jaxrnn.cells.gated import GatedCell
from jaxrnn.compose.wrap import Wrapper
from jaxrnn.engines.arrays import inexact
from jaxrnn.engines.gated.engine import Noise as Acting
from jaxrnn.engines.gated.recurrence import zoned
from jaxrnn.engines.loop import compiled_once
from jaxrnn.typing import Noise, PyTree


class RecurrentDropout(Wrapper[Params, Carry]):
    """Variational dropout on the recurrent product: (m h) w_h, with one mask m per sequence, whose entries are 0 or
    1/(1 − rate).

    The carry itself is not masked. Without a key, the wrapper acts as the cell alone.

    Args:
      cell: A cell that names its recurrent product, as all gated cells do.
      rate: The probability that an entry of m is 0, in [0, 1).

    Raises:
      TypeError: If `cell` is any other cell; other wrappers go around this one.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.RecurrentDropout(jaxrnn.GRU(3, 4), 0.25)
      >>> params = cell.init(jax.random.key(0))
      >>> jaxrnn.scan(cell, params, None, jnp.ones((7, 3)), key=jax.random.key(1))[1].shape
      (7, 4)

    References:
      Gal & Ghahramani 2016, A theoretically grounded application of dropout in recurrent neural networks, arXiv
      1512.05287.
    """

    rate: float

    def __post_init__(self):
        Wrapper.__post_init__(self)
        check.fields(self, rate=check.rate)
        if self.cell.recurrent_state is None or isinstance(self.cell, Wrapper):
            raise TypeError(
                "RecurrentDropout.cell: expected one that names its recurrent product, as all gated cells do, "
                f"got {self.cell!r}; other wrappers go around RecurrentDropout"
            )

    def noise(self, key, length, batch_shape):
        shape = getattr(check.shapes_of_carry(self.cell, batch_shape), str(self.cell.recurrent_state)).shape
        keep = jax.random.bernoulli(key, 1 - self.rate, shape)
        return jnp.where(keep, 1 / (1 - self.rate), 0.0), None

    def step(self, params, carry, x, noise=None):
        return take_step(self.cell, params, carry, x, noise)

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        return self.cell.scan(params, carry, xs, fresh=fresh, noise=noise, walk=walk)


class WeightDropNoise(NamedTuple):
    """keep: masks of the recurrent weights that are kept, one per weight; cell: the noise of the inner cell."""

    keep: tuple
    cell: Any


class WeightDrop(Wrapper[Params, Carry]):
    """DropConnect on the recurrent weights: w_h becomes k w_h / (1 − rate), where k is Bernoulli(1 − rate).

    Each call draws one k for all rows, so that the product stays a matrix product; use vmap over keys for one k per
    row. Without a key, the wrapper acts as the cell alone.

    Args:
      cell: A cell that names its recurrent weights, or `RecurrentDropout` around one.
      rate: The probability that a weight is dropped, in [0, 1).

    Raises:
      TypeError: If `cell` is any other cell.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.WeightDrop(jaxrnn.LSTM(3, 4), 0.5)
      >>> params = cell.init(jax.random.key(0))
      >>> jaxrnn.scan(cell, params, None, jnp.ones((7, 3)), key=jax.random.key(1))[1].shape
      (7, 4)

    References:
      Wan et al. 2013, https://proceedings.mlr.press/v28/wan13.html; on recurrent weights: Merity et al. 2018,
      Regularizing and optimizing LSTM language models, arXiv 1708.02182.
    """

    rate: float

    def __post_init__(self):
        Wrapper.__post_init__(self)
        check.fields(self, rate=check.rate)
        if not self.cell.recurrent_weights or isinstance(self.cell, WeightDrop):
            raise TypeError(
                "WeightDrop.cell: expected one that names its recurrent weights, as gated cells do, or "
                f"RecurrentDropout around one, got {self.cell!r}"
            )

    def noise(self, key, length, batch_shape):
        own, inner = jax.random.split(key)
        shapes = check.shapes_of_params(self.cell)
        keys = jax.random.split(own, len(self.recurrent_weights))
        keep = tuple(
            jax.random.bernoulli(each, 1 - self.rate, getattr(shapes, name).shape)
            for each, name in zip(keys, self.recurrent_weights, strict=True)
        )
        sequence, steps = self.cell.noise(inner, length, batch_shape)
        return WeightDropNoise(keep, sequence), steps

    def step(self, params, carry, x, noise=None):
        params, noise = self._drop(params, noise)
        return take_step(self.cell, params, carry, x, noise)

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        params, noise = self._drop(params, noise)
        return self.cell.scan(params, carry, xs, fresh=fresh, noise=noise, walk=walk)

    def _drop(self, params: PyTree, noise: Noise) -> tuple[PyTree, PyTree]:
        if noise is None:
            return params, None
        (keep, inner), steps = noise
        weights = [getattr(params, name) for name in self.recurrent_weights]
        dropped = [jnp.where(k, w / (1 - self.rate), jnp.zeros_like(w)) for k, w in zip(keep, weights, strict=True)]
        return params._replace(**dict(zip(self.recurrent_weights, dropped, strict=True))), (inner, steps)


class ZoneoutNoise(NamedTuple):
    """stay: masks of the entries of the carry that stay; cell: the noise of the inner cell."""

    stay: Any
    cell: Any


class Zoneout(Wrapper[Params, Carry]):
    """Entries of the carry keep their old value: carry' = z carry + (1 − z) step(carry), with z Bernoulli(rate) at each
    step.

    Without a key, z is its expectation, rate. If the output of the cell is a part of its carry (h of the gated cells),
    y is that part after zoneout; any other cell keeps its own y.

    Args:
      cell: Any cell that runs step by step.
      rate: The probability that an entry keeps its value, in [0, 1]; or a tuple with one probability for each floating
        leaf of the carry, in order: `(rate_h, rate_c)` for an LSTM. For `SLSTM` it is `(rate_h, 0, 0, 0)`, since c, n
        and m are defined up to a common factor and cannot be mixed one by one.

    Raises:
      ValueError: If the rates do not fit the carry.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> cell = jaxrnn.Zoneout(jaxrnn.LSTM(3, 4), (0.05, 0.5))
      >>> params = cell.init(jax.random.key(0))
      >>> jaxrnn.scan(cell, params, None, jnp.ones((7, 3)), key=jax.random.key(1))[1].shape
      (7, 4)

    References:
      Krueger et al. 2017, Zoneout: regularizing RNNs by randomly preserving hidden activations, arXiv 1606.01305.
    """

    rate: float | tuple[float, ...]

    def __post_init__(self):
        Wrapper.__post_init__(self)
        rates = self.rate if isinstance(self.rate, tuple) else (self.rate,)
        for rate in rates:
            check.rate("Zoneout.rate", rate, one_allowed=True)
        carry = check.shapes_of_carry(self.cell)
        leaves, rates, _ = self._rates(carry)
        count = sum(map(inexact, leaves))
        if isinstance(self.rate, tuple) and len(self.rate) != count:
            raise ValueError(
                f"Zoneout.rate: expected a number or {count}, one per floating leaf of the carry, got {self.rate!r}"
            )
        joint = _joint(carry)
        if any(rate for rate, together in zip(rates, joint, strict=True) if together):
            example = tuple(0.0 if together else 0.1 for together in joint)
            raise ValueError(
                f"Zoneout.rate: expected 0 for parts of the carry of {self.cell!r} that are defined up to a common "
                f"factor and cannot be mixed one by one, as in rate={example}; got {self.rate!r}"
            )

    def _rates(self, carry):
        """Returns a rate for each leaf of `carry`, or None for leaves that are not floating."""
        leaves, structure = jax.tree.flatten(carry)
        rates = iter(self.rate if isinstance(self.rate, tuple) else (self.rate,) * len(leaves))
        return leaves, [next(rates, None) if inexact(leaf) else None for leaf in leaves], structure

    def noise(self, key, length, batch_shape):
        own, inner = jax.random.split(key)
        leaves, rates, _ = self._rates(check.shapes_of_carry(self.cell, batch_shape))
        keys = jax.random.split(own, len(leaves))
        stay = [
            None if rate is None else _coins(each, rate, (length, *leaf.shape))
            for each, leaf, rate in zip(keys, leaves, rates, strict=True)
        ]
        sequence, steps = self.cell.noise(inner, length, batch_shape)
        return sequence, ZoneoutNoise(stay, steps)

    def step(self, params, carry, x, noise=None):
        inner = None if noise is None else (noise[0], noise[1].cell)
        new, y = take_step(self.cell, params, carry, x, inner)
        new = zoned(carry, new, self._rates(carry)[1], None if noise is None else noise[1].stay)
        return new, y if self.recurrent_state is None else getattr(new, self.recurrent_state).astype(y.dtype)

    @compiled_once
    def scan(self, params, carry, xs, *, fresh, noise, walk) -> tuple[Carry, PyTree]:
        inner = self.cell.cell if isinstance(self.cell, RecurrentDropout) else self.cell
        if not isinstance(inner, GatedCell) or type(inner).scan is not GatedCell.scan:
            return super().scan(params, carry, xs, fresh=fresh, noise=noise, walk=walk)
        rates = tuple(0.0 if rate is None else float(rate) for rate in self._rates(carry)[1])
        acting = Acting(rates=rates) if noise is None else Acting(noise[0], rates, noise[1].stay)
        return inner.scan_acted_on(params, carry, xs, fresh=fresh, noise=acting, walk=walk)


def _coins(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Draws what is true with probability `rate`, to 16 bits: drawing takes longer than all else that zoneout does."""
    words = _words(key, (*shape[:-1], -(-shape[-1] // 4)))
    parts = [half < round(rate * 2**16) for word in words for half in (word & 0xFFFF, word >> 16)]
    return jnp.concatenate(parts, axis=-1)[..., : shape[-1]]


def _words(key: jax.Array, shape: tuple[int, ...]) -> Sequence[jax.Array]:
    """Draws two arrays of 32 bits. Threefry makes both at once, of which `jax.random.bits` without x64 gives one."""
    if jax.random.key_impl(key) != "threefry2x32":
        return tuple(jax.random.bits(key, (2, *shape), jnp.uint32))
    one, two = jax.random.key_data(key)
    first, *others = (lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(len(shape)))
    within = jnp.zeros_like(first)
    for size, number in zip(shape[1:], others, strict=True):
        within = within * jnp.uint32(size) + number
    return threefry2x32_p.bind(one, two, first, within)


def _joint(carry: PyTree) -> list[bool]:
    """Returns, for every leaf, whether it has a meaning only together with others; a carry lists such fields as
    `joint`.
    """
    nodes = jax.tree.leaves(carry, is_leaf=lambda node: hasattr(node, "joint"))
    return [
        flag
        for node in nodes
        for flag in ([name in node.joint for name in node._fields] if hasattr(node, "joint") else [False])
    ]
