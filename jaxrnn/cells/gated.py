"""The base class of the cells with one recurrent product and elementwise gates, and functions that they share."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import check
from jaxrnn.cell import Carry, Cell, Params
from jaxrnn.cells.activations import ACTIVATIONS, Activation, elementwise
from jaxrnn.engines.gated.engine import Kernel, gated_scan, gated_scan_both
from jaxrnn.engines.gated.engine import Noise as Acting
from jaxrnn.engines.gated.recurrence import GatedWeights, gated_products, gated_step
from jaxrnn.engines.gated.staged.rule import Gate, Given, Rule
from jaxrnn.engines.loop import compiled_once
from jaxrnn.typing import Noise, PyTree


class GatedCell(Cell[Params, Carry]):
    """A cell with one product that reads the carry, followed by elementwise gates. Noise is a mask on the input of that
    product.

        u, v = x w_x + b, h w_h
        h', y = update(carry, u, v)

    A subclass has a field `hidden_size`, names the state in its carry `h` and its recurrent weights `w_h`, and defines
    `weights` and `update`. If a step has a second product, it also defines `second_input`. The gradients of the weights
    are summed in at least float32, over all steps at once.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> class Leaky(jaxrnn.GatedCell):
      ...     input_size: int
      ...     hidden_size: int
      ...     def init(self, key, dtype=jnp.float32):
      ...         return jaxrnn.elman_init(key, self.input_size, self.hidden_size, dtype=dtype)
      ...     def initial_carry(self, params, batch_shape=()):
      ...         return jaxrnn.ElmanCarry(self.zeros(params, batch_shape, self.hidden_size))
      ...     def weights(self, params):
      ...         return jaxrnn.GatedWeights(params.w_x, params.b, params.w_h)
      ...     def update(self, theta, carry, u, v, w):
      ...         h = 0.9 * carry.h + 0.1 * jnp.tanh(u + v)
      ...         return jaxrnn.ElmanCarry(h), h
      >>> cell = Leaky(3, 16)
      >>> jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((7, 5, 3)))[1].shape
      (7, 5, 16)
    """

    recurrent_state = "h"
    recurrent_weights = ("w_h",)

    @abstractmethod
    def weights(self, params: PyTree) -> GatedWeights:
        """Returns the arrays of one step; `update` and `second_input` read its `theta`."""

    @abstractmethod
    def update(self, theta: PyTree, carry: PyTree, u: Array, v: Array, w: Array | None) -> tuple[PyTree, Array]:
        """Returns (carry', y) from the input product u, the recurrent product v and, if there is one, the second
        product w.
        """

    @property
    def gates_apart(self) -> bool:
        """Whether `update` and `second_input` also take u and v with gates on an axis of their own, (..., gates, H)."""
        return False

    def kernel(self, weights: GatedWeights) -> Kernel | None:
        """Returns the compiled kernel that is made for this cell, or None."""
        return None

    def rule(self) -> Rule | str:
        """Returns what the kernel with options does for this cell, or the reason why it does not compute it."""
        return f"no kernel computes a {type(self).__name__}"

    def arrange(self, weights: GatedWeights) -> Given:
        """Returns the arrays that this kernel takes."""
        return Given(weights.w_x, weights.w_h, weights.b)

    def second_input(self, theta: PyTree, carry: PyTree, s: Array, u: Array, v: Array) -> Array:
        """Returns the input of the second product; s is the recurrent part of the carry after its mask."""
        raise TypeError(f"{type(self).__name__} has no second product")

    def step(self, params, carry, x, noise=None):
        check.params(self, params)
        return gated_step(self, self.weights(params), carry, x, mask_of(noise), owner=type(self).__name__)

    @compiled_once
    def scan(self, params, carry, xs, *, fresh, noise, walk):
        return self.scan_acted_on(params, carry, xs, fresh=fresh, noise=Acting(mask_of(noise)), walk=walk)

    def scan_acted_on(self, params, carry, xs, *, fresh, noise: Acting, walk):
        """Runs `scan` where noise also acts on the carry."""
        check.params(self, params)
        return gated_scan(self, self.weights(params), carry, xs, fresh=fresh, noise=noise, walk=walk)

    @compiled_once
    def scan_both(self, params, carry, xs, *, fresh, noise, walk) -> list[tuple[Carry, PyTree]]:
        if type(self).scan is not GatedCell.scan:  # a subclass walks in a way of its own
            return super().scan_both(params, carry, xs, fresh=fresh, noise=noise, walk=walk)
        for each in params:
            check.params(self, each)
        weights, acting = [self.weights(each) for each in params], [Acting(mask_of(each)) for each in noise]
        return gated_scan_both(self, weights, carry, xs, fresh=fresh, noise=acting, walk=walk)

    def zeros(self, params: PyTree, batch_shape: tuple[int, ...], size: int) -> Array:
        """Returns zeros (*batch_shape, size) for a part of the initial carry, in the dtype of the params."""
        check.params(self, params)
        return jnp.zeros((*batch_shape, size), params.w_x.dtype)

    def products(self, params: PyTree, carry: PyTree, x: Array, noise: Noise = None):
        """Returns the arguments of `update` at one step: (θ, carry, u, v, w)."""
        check.params(self, params)
        return gated_products(self, self.weights(params), carry, x, mask_of(noise))


def plain(cell: Cell) -> bool:
    """Whether all fields of a cell, except its sizes, have their defaults."""
    fields = [field for field in dataclasses.fields(cell) if field.default is not dataclasses.MISSING]
    return all(getattr(cell, field.name) == field.default for field in fields)


def rule_of(family: str, **options) -> Rule | str:
    """Returns the rule of a family, with activations where `options` name its fields, or the reason why there is
    none.
    """
    for part in ("gate", "candidate", "output"):
        if part not in options:
            continue
        spec = options[part]
        if callable(spec):
            return f"no kernel has the activation {spec!r}"
        name, *given = spec if isinstance(spec, tuple) else (spec,)
        numbers = (*given, *ACTIVATIONS[name][1][len(given) :])
        options[part] = Gate(list(ACTIVATIONS).index(name), *map(float, numbers))
    return Rule(family, **options)


def stacked(size: int, *rows: Array | None) -> Array:
    """Returns vectors of `size` numbers below each other, from arrays that hold some of them."""
    return jnp.concatenate([row.reshape(-1, size) for row in rows if row is not None])


def centred(w: Array) -> Array:
    """Returns the weight whose products are those of w without their mean."""
    return w - w.mean(1, keepdims=True)


def mask_of(noise: Noise) -> Array | None:
    """Returns the mask that multiplies the recurrent part of the carry, or None."""
    return None if noise is None else noise[0]


def normalize(x: Array, epsilon: float = 1e-5) -> Array:
    """Computes (x − mean) / √(variance + ε) over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


def clip(x: Array, bound: float | None) -> Array:
    """Clips `x` to ±bound; None leaves it as it is."""
    return x if bound is None else jnp.clip(x, -bound, bound)


def clipped(spec: Activation, bound: float | None) -> Callable[[Array], Array]:
    """Returns the activation that `spec` names, with its input clipped to ±bound."""
    function = elementwise(spec)
    if bound is None:
        return function
    check.positive("gate_clip", bound)
    return lambda x: function(clip(x, bound))
