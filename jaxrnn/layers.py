"""Layers without memory: cells with an empty carry, which act on each step separately."""

# What other cells are by a class variable, some here are by a property.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from jaxrnn import check
from jaxrnn.cell import Cell, Params
from jaxrnn.cells.activations import Activation, activation
from jaxrnn.cells.gated import normalize
from jaxrnn.cells.initializers import lecun_normal
from jaxrnn.engines.arrays import accumulator, compute_dtype, lifted, select
from jaxrnn.engines.product import dot
from jaxrnn.typing import DTypeLike, Noise, PyTree


class Layer(Cell[Params, tuple[()]]):
    """A cell that remembers nothing: y = apply(params, x).

    It accepts every implementation name.
    """

    time_divides = True

    @abstractmethod
    def apply(self, params: PyTree, x: Array, noise: Noise = None) -> Array:
        """Computes the output of one step."""

    def initial_carry(self, params: PyTree, batch_shape: tuple[int, ...] = ()) -> tuple[()]:
        return ()

    def step(self, params, carry, x, noise=None):
        return carry, self.apply(params, x, noise)

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        if noise is None:
            ys = jax.vmap(lambda x: self.apply(params, x))(xs)
        else:
            sequence, steps = noise
            ys = jax.vmap(lambda x, drawn: self.apply(params, x, (sequence, drawn)))(xs, steps)
        return carry, walk.without_padding(ys)


class LinearParams(NamedTuple):
    """The params of `Linear`: w (D, O), and b (O,) or None."""

    w: Array
    b: Array | None


class Linear(Layer[LinearParams]):
    """y = x w + b.

    Args:
      input_size: D, the size of x.
      output_size: O, the size of y.
      bias: Whether there is a b.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> layer = jaxrnn.Linear(3, 2)
      >>> jaxrnn.scan(layer, layer.init(jax.random.key(0)), None, jnp.ones((7, 5, 3)))[1].shape
      (7, 5, 2)
    """

    input_size: int
    output_size: int
    bias: bool = True

    def __post_init__(self):
        check.sizes(self, "input_size", "output_size")

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> LinearParams:
        """Draws w from the LeCun normal distribution; b is zero."""
        w = lecun_normal(key, self.input_size, self.output_size, 1, dtype)
        return LinearParams(w, jnp.zeros(self.output_size, dtype) if self.bias else None)

    def apply(self, params, x, noise=None):
        check.params(self, params)
        dtype = compute_dtype(x, params)
        y = dot(x.astype(dtype), params.w.astype(dtype))
        if params.b is not None:
            y = y + lifted(params.b.astype(dtype).astype(y.dtype), y)
        return y.astype(dtype)


class EmbedParams(NamedTuple):
    """The params of `Embed`: w (V, O)."""

    w: Array


class Embed(Layer[EmbedParams]):
    """y = w[x] for integers x: one row per token.

    A token outside [0, V) raises an error where its value is known, and gives NaN where it is traced.

    Args:
      vocabulary: V, the number of tokens.
      output_size: O, the size of y.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> layer = jaxrnn.Embed(10, 4)
      >>> jaxrnn.scan(layer, layer.init(jax.random.key(0)), None, jnp.array([[3, 1], [4, 1]]))[1].shape
      (2, 2, 4)
    """

    vocabulary: int
    output_size: int

    input_ndim = 0

    def __post_init__(self):
        check.sizes(self, "vocabulary", "output_size")

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> EmbedParams:
        """Draws w from a normal distribution of variance 1/O."""
        w = jax.random.normal(key, (self.vocabulary, self.output_size), accumulator(dtype))
        return EmbedParams((w / self.output_size**0.5).astype(dtype))

    def apply(self, params, x, noise=None):
        check.params(self, params)
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"x: Embed expects integers, got {x.dtype}")
        if check.concrete(x) and x.size:
            tokens = np.asarray(x)  # a NumPy array stays one inside `jit`
            low, high = tokens.min(), tokens.max()
            if low < 0 or high >= self.vocabulary:
                raise ValueError(f"x: expected tokens in [0, {self.vocabulary}), got {low} to {high}")
        known = (x >= 0) & (x < self.vocabulary)
        w = jnp.asarray(params.w)
        # From a wide table, so that the cotangents of a token are summed in at least float32.
        wide, tokens = w.astype(accumulator(w.dtype)), jnp.where(known, x, 0)
        sharding = jax.typeof(tokens).sharding
        if any(axis is not None for axis in sharding.spec):
            rows = wide.at[tokens].get(out_sharding=sharding.update(spec=PartitionSpec(*sharding.spec, None)))
        else:
            rows = wide[tokens]
        return jnp.where(known[..., None], rows.astype(w.dtype), jnp.nan)  # no array of NaN, which debuggers stop at

    def scan(self, params, carry, xs, *, fresh, noise, walk):
        return carry, walk.without_padding(self.apply(params, xs))


class LayerNormParams(NamedTuple):
    """The params of `LayerNorm`: scale (D,), and b (D,) or None."""

    scale: Array
    b: Array | None


class LayerNorm(Layer[LayerNormParams]):
    """y = (x − mean) / √(variance + ε) · scale + b over the last axis, or over each of its groups.

    Args:
      size: D, the size of the last axis.
      epsilon: The constant ε.
      groups: The number of parts of the last axis that are normalised separately; it divides D.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> layer = jaxrnn.LayerNorm(2)
      >>> jaxrnn.scan(layer, layer.init(jax.random.key(0)), None, jnp.array([[0.0, 2.0]]))[1].round(3)
      Array([[-1.,  1.]], dtype=float32)

    References:
      Ba, Kiros & Hinton 2016, Layer normalization, arXiv 1607.06450; Wu & He 2018, Group normalization, arXiv
      1803.08494.
    """

    size: int
    epsilon: float = 1e-5
    groups: int = 1

    keeps_size = True

    def __post_init__(self):
        _check_norm(self)

    @property
    def input_size(self) -> int:
        return self.size

    @property
    def output_size(self) -> int:
        return self.size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> LayerNormParams:
        """Sets scale to one and b to zero."""
        return LayerNormParams(jnp.ones(self.size, dtype), jnp.zeros(self.size, dtype))

    def apply(self, params, x, noise=None):
        check.params(self, params)
        dtype = compute_dtype(x, params)
        wide = accumulator(dtype)
        parts = _parts(self, x.astype(dtype).astype(wide))
        y = normalize(parts, self.epsilon).reshape(x.shape) * lifted(params.scale.astype(dtype).astype(wide), x)
        if params.b is not None:
            y = y + lifted(params.b.astype(dtype).astype(wide), y)
        return y.astype(dtype)


class RMSNormParams(NamedTuple):
    """The params of `RMSNorm`: scale (D,), or (D/groups,) if it is shared."""

    scale: Array


class RMSNorm(Layer[RMSNormParams]):
    """y = x / √(mean(x²) + ε) · scale over the last axis, or over each of its groups.

    Args:
      size: D, the size of the last axis.
      epsilon: The constant ε.
      groups: The number of parts of the last axis that are normalised separately; it divides D.
      shared: Whether all groups have the same scale, of size D/groups.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> layer = jaxrnn.RMSNorm(2)
      >>> jaxrnn.scan(layer, layer.init(jax.random.key(0)), None, jnp.array([[3.0, 3.0]]))[1].round(3)
      Array([[1., 1.]], dtype=float32)

    References:
      Zhang & Sennrich 2019, Root mean square layer normalization, arXiv 1910.07467.
    """

    size: int
    epsilon: float = 1e-6
    groups: int = 1
    shared: bool = False

    keeps_size = True

    def __post_init__(self):
        _check_norm(self)

    @property
    def input_size(self) -> int:
        return self.size

    @property
    def output_size(self) -> int:
        return self.size

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> RMSNormParams:
        """Sets scale to one."""
        return RMSNormParams(jnp.ones(self.size // self.groups if self.shared else self.size, dtype))

    def apply(self, params, x, noise=None):
        check.params(self, params)
        dtype = compute_dtype(x, params)
        parts = _parts(self, x.astype(dtype).astype(accumulator(dtype)))
        scale = params.scale.astype(dtype).astype(parts.dtype)
        scale = scale if self.shared else scale.reshape(self.groups, -1)
        y = parts * lax.rsqrt(jnp.mean(parts**2, axis=-1, keepdims=True) + self.epsilon) * lifted(scale, parts)
        return y.reshape(x.shape).astype(dtype)


def _check_norm(layer: Any) -> None:
    check.sizes(layer, "size", "groups")
    check.fields(layer, epsilon=check.positive)
    if layer.size % layer.groups:
        name = type(layer).__name__
        raise ValueError(f"{name}.groups: expected a divisor of size {layer.size}, got {layer.groups}")


def _parts(layer: LayerNorm | RMSNorm, x: Array) -> Array:
    """x (..., D) as (..., groups, D/groups)."""
    if x.shape[-1:] != (layer.size,):
        raise ValueError(f"x: expected (..., {layer.size}), got {x.shape}")
    return x.reshape(*x.shape[:-1], layer.groups, layer.size // layer.groups)


class Apply(Layer[tuple[()]]):
    """y = fn(x), where fn is an activation given by name, or a function of one step's x with any leading axes.

    Args:
      fn: A name or `(name, alpha, beta)`, see `jaxrnn.activation`, or a callable. A callable is compared by identity,
        and it may be impossible to print it as an expression or to pickle it.

    Examples:
      >>> import jax.numpy as jnp, jaxrnn
      >>> jaxrnn.scan(jaxrnn.Apply("relu"), (), None, jnp.array([[-1.0, 2.0]]))[1]
      Array([[0., 2.]], dtype=float32)
    """

    fn: Activation

    def __post_init__(self):
        activation(self.fn)

    @property
    def keeps_size(self) -> bool:
        return not callable(self.fn)

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> tuple[()]:
        return ()

    def apply(self, params, x, noise=None):
        return self.fn(x) if callable(self.fn) else activation(self.fn)(x.astype(compute_dtype(x, params)))


def row_keys(key: Array, shape: tuple[int, ...]) -> Array:
    """Makes a threefry key for each row; the draws of such keys do not depend on vmap."""
    key = jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")
    return jax.random.split(key, shape)


class Dropout(Layer[tuple[()]]):
    """y = m x / (1 − rate), with m drawn from Bernoulli(1 − rate), where a key is given; else y = x.

    Args:
      rate: The probability that an entry becomes 0, in [0, 1).
      per_sequence: Whether to draw one m per sequence (variational dropout) instead of one per step.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> ys = jaxrnn.scan(jaxrnn.Dropout(0.5), (), None, jnp.ones((1, 8)), key=jax.random.key(0))[1]
      >>> sorted(set(ys.ravel().tolist()))
      [0.0, 2.0]

    References:
      Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html; per sequence: Gal & Ghahramani 2016, arXiv
      1512.05287.
    """

    rate: float
    per_sequence: bool = False

    keeps_size = True

    def __post_init__(self):
        check.fields(self, rate=check.rate)

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> tuple[()]:
        return ()

    def noise(self, key, length, batch_shape):
        if self.rate == 0:
            return None, None
        # Keys, since the shape of a step's x is not known here.
        if self.per_sequence:
            return row_keys(key, batch_shape), None
        return None, row_keys(key, (length, *batch_shape))

    def apply(self, params, x, noise=None):
        x = x.astype(compute_dtype(x, params))
        if noise is None or self.rate == 0:
            return x
        keys = noise[0] if self.per_sequence else noise[1]

        def draw(key):
            return jax.random.bernoulli(key, 1 - self.rate, x.shape[keys.ndim :])

        for _ in range(keys.ndim):
            draw = jax.vmap(draw)
        return select(draw(keys), x / (1 - self.rate), jnp.zeros_like(x))
