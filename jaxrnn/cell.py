"""`Cell`: the interface between a recurrence and everything that runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from abc import ABCMeta, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrnn.engines.arrays import cast_like
from jaxrnn.engines.loop import compiled_once, in_chunks, time_loop
from jaxrnn.engines.walk import IMPLEMENTATIONS, Walk
from jaxrnn.foreign_names import check_arguments, method_hint
from jaxrnn.typing import DTypeLike, Named, Noise, PyTree, WithParams

_XLA_ONLY = "the loop runs the cell's own step, which only XLA can"
REFUSALS: dict[str, str] = {name: _XLA_ONLY for name in IMPLEMENTATIONS if name != "xla"}


Params = TypeVar("Params")
Carry = TypeVar("Carry")


@dataclass_transform(frozen_default=True)
class CellType(ABCMeta):
    """Makes every subclass of `Cell` a frozen dataclass and a pytree without leaves, and checks its fields."""

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: Named, **kwargs: Any):
        super().__init__(name, bases, namespace, **kwargs)
        dataclasses.dataclass(frozen=True, repr=False)(cls)  # type: ignore[call-overload]
        jax.tree_util.register_static(cls)

    @property
    def __signature__(cls) -> inspect.Signature:
        """That of the fields, for `help` and editors."""
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:], return_annotation=cls)

    def __call__(cls, *args: Any, **kwargs: Any):
        check_arguments(cls.__name__, kwargs, [field.name for field in dataclasses.fields(cls)])  # type: ignore[arg-type]
        cell = super().__call__(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})
        for field in dataclasses.fields(cell):
            value = _plain(getattr(cell, field.name))
            _check_hashable(value, f"{cls.__name__}.{field.name}")
            if field.type in (bool, "bool") and not isinstance(value, bool):
                raise TypeError(f"{cls.__name__}.{field.name}: expected True or False, got {value!r}")
            object.__setattr__(cell, field.name, value)
        return cell


def _plain(value: Any) -> PyTree:
    """Converts lists to tuples, and NumPy scalars to Python scalars."""
    if type(value) in (list, tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _check_hashable(value: object, name: str) -> None:
    if type(value) is tuple:
        for each in value:
            _check_hashable(each, name)
        return
    if not isinstance(value, (np.ndarray, jax.Array)):
        with contextlib.suppress(TypeError):
            hash(value)
            return
    raise TypeError(
        f"{name}: expected a hashable value, got {type(value).__name__}: configuration is a value, "
        "and arrays to differentiate or vmap belong in the params"
    )


class Cell(Generic[Params, Carry], metaclass=CellType):
    """A recurrence as a frozen value: `step(params, carry, x) -> (carry, y)`, initial params and an initial carry.

    A subclass lists its configuration as annotated fields and defines `init`, `initial_carry` and `step`. It is then a
    frozen, hashable dataclass that `jit` takes as an ordinary argument. `jaxrnn.scan` adds lengths, masks, resets, both
    directions, gradient checkpointing, and every composition.

    A step keeps the structure and shapes of the carry. Numbers to differentiate or vmap belong in the params. Data that
    are constant over a sequence (an image vector, encoder states) can be passed in the params too.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxrnn
      >>> from typing import NamedTuple
      >>> class Params(NamedTuple):
      ...     decay: jax.Array
      >>> class Leaky(jaxrnn.Cell):
      ...     size: int
      ...     def init(self, key, dtype=jnp.float32):
      ...         return Params(jnp.full(self.size, 0.5, dtype))
      ...     def initial_carry(self, params, batch_shape=()):
      ...         return jnp.zeros((*batch_shape, self.size), params.decay.dtype)
      ...     def step(self, params, carry, x, noise=None):
      ...         carry = params.decay * carry + (1 - params.decay) * x
      ...         return carry, carry
      >>> cell = Leaky(2)
      >>> carry, ys = jaxrnn.scan(cell, cell.init(jax.random.key(0)), None, jnp.ones((3, 2)))
      >>> carry
      Array([0.875, 0.875], dtype=float32)
    """

    # Trailing axes of x that belong to one step; for a pytree x, a pytree of that structure.
    input_ndim: ClassVar[PyTree] = 1
    # The field of the carry that the recurrent product reads and that the step puts out, for cells that have one.
    recurrent_state: ClassVar[str | None] = None
    # The fields of the params that are weights of the recurrent product.
    recurrent_weights: ClassVar[tuple[str, ...]] = ()
    # The fields of the params that may be None, and then are absent.
    optional_params = ("b", "b_hn", "peephole")
    # Those that a small learning rate suits: of eigenvalues, decays, lengths of steps.
    slow_weights: ClassVar[tuple[str, ...]] = ()
    # Whether y has the size of x, whatever that is.
    keeps_size: ClassVar[bool] = False
    # Whether a sequence goes in and a single y comes out.
    ends_time: ClassVar[bool] = False
    # Whether it runs step by step, each y of the steps so far alone.
    causal: ClassVar[bool] = True
    # Whether devices can run parts of the steps at once, because the recurrence is linear.
    time_divides: ClassVar[bool] = False
    # Whether its carry holds those of its parts, whatever they are, and hands them on as they come.
    transparent: ClassVar[bool] = False

    @abstractmethod
    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
        """Draws random parameters, a pytree of arrays."""

    @abstractmethod
    def initial_carry(self, params: Params, batch_shape: tuple[int, ...] = ()) -> Carry:
        """The carry that a sequence starts from, with leaves (*batch_shape, ...)."""

    @abstractmethod
    def step(self, params: Params, carry: Carry, x: PyTree, noise: Noise = None) -> tuple[Carry, PyTree]:
        """Runs one step: (carry', y).

        `noise` is None (deterministic) or `(sequence, steps[t])`, drawn by `self.noise`.
        """

    def noise(self, key: Array, length: int, batch_shape: tuple[int, ...]) -> tuple[PyTree, PyTree]:
        """Draws the noise of one call: a part per sequence, and a part per step, which has a leading axis `length`."""
        return None, None

    @compiled_once
    def scan(
        self, params: Params, carry: Carry, xs: PyTree, *, fresh: Carry, noise: Noise, walk: Walk
    ) -> tuple[Carry, PyTree]:
        """Runs `step` over the first axis of `xs`: (final carry, ys).

        Call `jaxrnn.scan` instead, which prepares all these arguments. An override honours every argument: `carry` and
        `fresh` are given, `xs` is zero at invalid steps and `ys` must be zero there too, `noise` is None or
        `(sequence, steps)`, and `walk` holds everything else.
        """
        walk.record("scan", *walk.choose("scan", REFUSALS, cell=self), cell=self)
        sequence, steps = (None, None) if noise is None else noise

        def step(params, carry, inputs):
            x, drawn = inputs
            new, y = take_step(self, params, carry, x, None if noise is None else (sequence, drawn))
            return cast_like(new, carry, owner=type(self).__name__), y

        def run(constant, carry, inputs):
            params, fresh = constant
            xs, flags = inputs
            return time_loop(
                step, params, carry, xs, fresh=fresh, flags=flags, reverse=walk.reverse, platform=walk.platform
            )

        return in_chunks(run, (params, fresh), carry, ((xs, steps), walk.flags), walk)

    def scan_both(
        self,
        params: tuple[Params, Params],
        carry: tuple[Carry, Carry],
        xs: PyTree,
        *,
        fresh: tuple[Carry, Carry],
        noise: Sequence[Noise],
        walk: Walk,
    ) -> list[tuple[Carry, PyTree]]:
        """Runs `scan` along `walk` and along the opposite walk, with pairs of params, carries and noise.

        An override runs both at once where it can.
        """
        walks = walk, walk.opposite
        return [self.scan(params[k], carry[k], xs, fresh=fresh[k], noise=noise[k], walk=walks[k]) for k in range(2)]

    def parts(self, params: PyTree, given: Any = None) -> tuple[Part, ...]:
        """The cells that this one is made of; `params` are its own, and `given` is the size of x, if known."""
        return ()

    def with_parts(self, params: PyTree, parts: Sequence[Part]) -> WithParams:
        """Returns this composition made of other parts, and its params.

        For the parts `self.parts(params)` it returns itself and its own params.
        """
        return self, params

    if not TYPE_CHECKING:  # else a type checker would take any attribute for one

        def __getattr__(self, name):
            raise AttributeError(method_hint(type(self).__name__, name))

        def __call__(self, *args, **kwargs):
            raise TypeError(f"{self!r} is no function: jaxrnn.scan(cell, params, None, xs) runs it over a sequence")

    def __repr__(self):
        def default(field):
            value = getattr(self, field.name)
            return type(value) is type(field.default) and value == field.default

        fields = [f for f in dataclasses.fields(self) if f.repr and not default(f)]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields)})"


class Part(NamedTuple):
    """One cell of a composition: its name there, the cell, its params, and the size of its x, if known."""

    name: str
    cell: Cell
    params: PyTree
    given: Any


def take_step(cell: Cell, params: PyTree, carry: PyTree, x: PyTree, noise: Noise) -> tuple[PyTree, PyTree]:
    """`cell.step`, which need not take noise where there is none."""
    if not jax.tree.leaves(noise):
        return cell.step(params, carry, x)
    return cell.step(params, carry, x, noise)


def scan_one_step(
    cell: Cell, params: PyTree, carry: PyTree, x: PyTree, *, noise: Noise, walk: Walk
) -> tuple[PyTree, PyTree]:
    """Runs one step as a sequence of length one, by the engines of a sequence: (carry', y)."""

    def one(tree):
        return jax.tree.map(lambda leaf: leaf[None], tree)

    carry, ys = cell.scan(
        params,
        carry,
        one(x),
        fresh=carry,
        noise=None if noise is None else (noise[0], one(noise[1])),
        walk=walk.one_step,
    )
    return carry, ys if cell.ends_time else jax.tree.map(lambda y: y[0], ys)


def input_size(cell: Cell) -> PyTree:
    """The size of one step's input, or None where the cell does not say."""
    return getattr(cell, "input_size", None)


def output_size(cell: Cell, given: Any = None) -> PyTree:
    """The size of one step's output for an input of size `given`, or None where it is not known."""
    if cell.keeps_size:
        return given
    size = getattr(cell, "output_size", None)
    # A layer that acts on the last axis keeps the others.
    return (*given[:-1], size) if isinstance(given, tuple) and isinstance(size, int) else size
