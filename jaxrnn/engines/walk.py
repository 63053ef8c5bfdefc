"""The way a sequence is processed: one value, the same for every layer of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn.engines.arrays import zero_where_not
from jaxrnn.engines.cpu import library
from jaxrnn.typing import PyTree

ENGINES = ("scan", "gated_scan", "linear_scan", "matrix_scan")
IMPLEMENTATIONS = ("native", "xla", "associative", "chunked")  # the fastest that can run first
NAMED = "pallas"  # runs where it is named: nobody has measured it

Implementation = str | Mapping[str, str] | None


class EngineCall(NamedTuple):
    """One call of an engine: the implementation that runs it, and the reasons why the others do not."""

    engine: str
    cell: str
    implementation: str
    refused: dict[str, str]

    def __str__(self):
        lines = [f"{self.engine}: {self.implementation}  for {self.cell}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.refused.items()])


class Question:
    """Asks what would run on a platform, and holds the calls of engines that answer; questions are compared by
    identity.
    """

    def __init__(self, platform: str):
        self.platform = platform
        self.calls: list[EngineCall] = []


class Flags(NamedTuple):
    """valid (T, *batch): whether each step is valid, None for all; start (T, *batch): whether it starts fresh, None for
    none.
    """

    valid: Array | None
    start: Array | None

    @property
    def follows(self) -> Array | None:
        """Whether each step follows the one before: it is valid, and does not start fresh; None for all."""
        if self.start is None:
            return self.valid
        return ~self.start if self.valid is None else self.valid & ~self.start


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walk:
    """The way a sequence is processed. It is a pytree of its arrays, so that `jit` takes it and traces again for
    another way.

    Args:
      valid: bool (T, *batch) or None. An invalid step keeps the carry and puts out 0.
      reset: bool (T, *batch) or None. A new sequence begins before step t.
      reverse: Whether to run from the last step to the first.
      remat_every: Gradient checkpointing: the number of steps between two stored carries; None to store all that the
        backward pass needs of every step.
      implementation: A name, or pairs of an engine and a name; None for the fastest.
      batch_major: Whether the caller's arrays have time after the batch. Engines may read and write them in this order.
      question: The question that `explain` asks, or None.
      axis_name: The axis of the mesh that time is divided over: the steps are those of one device; None for all steps.
    """

    valid: Array | None = None
    reset: Array | None = None
    reverse: bool = dataclasses.field(default=False, metadata={"static": True})
    remat_every: int | None = dataclasses.field(default=None, metadata={"static": True})
    implementation: str | tuple[tuple[str, str], ...] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    batch_major: bool = dataclasses.field(default=False, metadata={"static": True})
    question: Question | None = dataclasses.field(default=None, metadata={"static": True})
    axis_name: str | None = dataclasses.field(default=None, metadata={"static": True})

    def replace(self, **changes: Any) -> Walk:
        """Returns this walk with other values in some fields."""
        return dataclasses.replace(self, **changes)

    @property
    def platform(self) -> str | None:
        """The platform that the question is about, or None for the one that will be compiled for."""
        return None if self.question is None else self.question.platform

    @property
    def opposite(self) -> Walk:
        """The same steps in the other direction."""
        return self.replace(reverse=not self.reverse)

    @property
    def one_step(self) -> Walk:
        """The same engines over a sequence of one step."""
        return Walk(remat_every=self.remat_every, implementation=self.implementation, question=self.question)

    @property
    def flags(self) -> Flags:
        """The flags of every step."""
        return Flags(self.valid, starts(self.reset, self.valid, self.reverse))

    def without_padding(self, ys: PyTree) -> PyTree:
        """Returns `ys` with zeros at invalid steps."""
        return zero_where_not(self.valid, ys)

    def last(self, tree: PyTree) -> PyTree:
        """The leaves (T, *batch, ...) at the valid step that is processed last; T ≥ 1."""
        return final(tree, self.valid, self.reverse)

    def named(self, engine: str) -> str | None:
        """Returns the implementation that was named for `engine`, or None."""
        of = self.implementation
        return dict(of).get(engine) if isinstance(of, tuple) else of

    def choose(
        self,
        engine: str,
        refusals: Mapping[str, str],
        *,
        cell: object,
        elsewhere: str | None = None,
        without_kernel: str | None = None,
        no_pallas: str | None = "no Pallas kernel computes it",
    ) -> tuple[str, Mapping[str, str]]:
        """Returns the implementation of `engine` that runs (the named one, else the fastest), and why the others do
        not.

        Args:
          engine: The engine's name.
          refusals: For each implementation that cannot run this call, the reason.
          cell: The cell whose recurrence it is, for messages.
          elsewhere: The fastest implementation where there is no CPU, if that is not the first.
          without_kernel: The fastest one on a CPU where the kernel cannot run, if that is not the first.
          no_pallas: The reason why no Pallas kernel runs this call, or None.

        Raises:
          ValueError: If the named implementation cannot run this call; the message says why, and which ones can.
        """
        on_cpu = self.platform in (None, "cpu")
        if not on_cpu:
            refusals = {"native": "the kernels are compiled for the CPU"} | dict(refusals)
        name = self.named(engine)
        supported = [each for each in IMPLEMENTATIONS if each not in refusals]
        refusal = no_pallas if name == NAMED else None if name is None else refusals.get(name)
        if refusal is not None:
            raise ValueError(
                f"implementation: {engine} cannot run {cell!r} as {name!r}: {refusal}; supported here: {supported}"
            )
        fastest = elsewhere if not on_cpu else without_kernel if "native" in refusals else None
        return name or (fastest if fastest in supported else supported[0]), refusals

    def form(self, engine: str, chosen: str, refusals: Mapping[str, str]) -> str | None:
        """Returns `chosen` where it is known or no other can run, or None where each platform takes its own."""
        only = set(IMPLEMENTATIONS) - set(refusals) == {chosen}
        return None if self.platform is None and self.named(engine) is None and not only else chosen

    def record(
        self,
        engine: str,
        implementation: str,
        refusals: Mapping[str, str],
        *,
        cell: object,
    ) -> None:
        """Records a call for `explain`."""
        if self.question is not None:
            self.question.calls.append(EngineCall(engine, repr(cell), implementation, dict(refusals)))


def checked(implementation: Any) -> str | tuple[tuple[str, str], ...] | None:
    """Returns `implementation` as a hashable value; raises an error if it names an unknown engine or implementation."""
    if isinstance(implementation, Mapping):
        for engine in implementation:
            if engine not in ENGINES:
                raise ValueError(f"implementation: expected engines among {ENGINES}, got {engine!r}")
        names = tuple(implementation.values())
        implementation = tuple(implementation.items())
    else:
        names = () if implementation is None else (implementation,)
    for name in names:
        if name not in (*IMPLEMENTATIONS, NAMED):
            raise ValueError(f"implementation: expected one of {(*IMPLEMENTATIONS, NAMED)} or None, got {name!r}")
    return implementation


HALF = (jnp.bfloat16, jnp.float16)


def kernel_dtype(walk: Walk, *dtypes: Any) -> Any:
    """The dtype in which a kernel computes arrays of `dtypes`: float32, in which it takes half precision on the CPU,
    too, where XLA takes longer, or float64; None where it takes no such arrays, or not together.
    """
    on_cpu = walk.platform == "cpu" or (walk.platform is None and jax.default_backend() == "cpu")
    computed = [jnp.dtype(jnp.float32 if on_cpu and dtype in HALF else dtype) for dtype in dtypes]
    return computed[0] if library.takes(*computed) else None


def no_kernel_for(*dtypes: Any) -> str:
    """Says why `kernel_dtype` is None."""
    names = " and ".join(sorted({jnp.dtype(dtype).name for dtype in dtypes}))
    return f"the kernels compute in float32 or in float64, not in {names}"


def no_pallas_for(shape: Sequence[Any], *dtypes: Any) -> str | None:
    """Says why no Pallas kernel takes sequences (T, ...) of this shape and arrays of `dtypes`, or None."""
    wide = sorted({jnp.dtype(dtype).name for dtype in dtypes} - {"bfloat16", "float16", "float32"})
    reason = f"the Pallas kernels compute in float32, not in {' and '.join(wide)}" if wide else None
    return refusals_of_sizes(shape).get("native", reason)


def refusals_of_sizes(shape: Sequence[Any]) -> dict[str, str]:
    """The implementations that cannot run a sequence (T, ...) of this shape because `jax.export` was given symbols for
    sizes, and why.
    """
    refusals = {}
    if not all(isinstance(size, int) for size in shape):
        refusals["native"] = f"the kernels take shapes of numbers, not {tuple(shape)}"
    if not isinstance(shape[0], int):
        refusals |= dict.fromkeys(("associative", "chunked"), f"it takes a number of steps, not {shape[0]}")
    return refusals


def by_platform(
    platform: str | None, *operands: Any, default: Callable[..., PyTree], **each: Callable[..., PyTree]
) -> PyTree:
    """Runs `lax.platform_dependent`, or only the branch for `platform` where it is known."""
    if platform is None:
        return lax.platform_dependent(*operands, default=default, **each)
    return each.get(platform, default)(*operands)


def starts(reset: Array | None, valid: Array | None, reverse: bool) -> Array | None:
    """Returns which steps start from the fresh carry, (T, *batch), or None.

    `reset[t]` is a boundary before the valid step t. Forward, t itself starts fresh; in reverse, the valid step before
    the boundary does, because it is the first that is processed on its side.
    """
    if reset is None:
        return None
    if valid is not None:
        reset = reset & valid
    if not reverse or reset.shape[0] == 0:
        return reset
    length = reset.shape[0]
    time = jnp.arange(length).reshape((length,) + (1,) * (reset.ndim - 1))
    index = jnp.broadcast_to(time, reset.shape)
    if valid is not None:
        index = jnp.where(valid, index, length)
    following = jnp.concatenate([lax.cummin(index, axis=0, reverse=True)[1:], jnp.full_like(index[:1], length)])
    start = jnp.take_along_axis(reset, jnp.minimum(following, length - 1), axis=0) & (following < length)
    return start if valid is None else start & valid


def final_index(valid: Array, reverse: bool) -> Array:
    """Returns the index of the valid step that is processed last, (*batch,); 0 where there is none."""
    if valid.shape[0] == 0:
        return jnp.zeros(valid.shape[1:], int)
    if reverse:
        return jnp.argmax(valid, axis=0)
    index = valid.shape[0] - 1 - jnp.argmax(valid[::-1], axis=0)
    return jnp.where(valid.any(0), index, 0)


def final(tree: PyTree, valid: Array | None, reverse: bool) -> PyTree:
    """The leaves (T, *batch, ...) at the valid step that is processed last; T ≥ 1."""
    if valid is None:
        return jax.tree.map(lambda leaf: leaf[0 if reverse else -1], tree)
    index = final_index(valid, reverse)

    def pick(leaf, index):
        return leaf[index]

    for _ in range(index.ndim):
        pick = jax.vmap(pick, in_axes=(1, 0))
    return jax.tree.map(lambda leaf: pick(leaf, index), tree)
