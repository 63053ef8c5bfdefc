"""The engine of gated recurrences: one product that reads the carry, then elementwise gates; see `recurrence`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn.engines.arrays import cast
from jaxrnn.engines.cpu import library
from jaxrnn.engines.gated import pallas, primitives
from jaxrnn.engines.gated.derivative import gated_recurrence
from jaxrnn.engines.gated.recurrence import GatedRecurrence, GatedWeights, How, Problem, dtypes
from jaxrnn.engines.gated.staged import primitives as staged
from jaxrnn.engines.gated.staged.rule import Given, Rule
from jaxrnn.engines.loop import in_chunks
from jaxrnn.engines.walk import HALF, NAMED, Walk, kernel_dtype, no_kernel_for, no_pallas_for, refusals_of_sizes
from jaxrnn.typing import PyTree

REFUSALS = {
    "associative": "the recurrence is not linear",
    "chunked": "the recurrence is not linear",
}

FEW_WEIGHTS = 1 << 17  # recurrent ones of which a kernel's thread takes those of one member: `each_member`


class Kernel(NamedTuple):
    """The compiled kernel that computes a cell without options, and the arrays that it takes: w_h (H, G), b_hn (H,) or
    None.
    """

    kind: str
    w_h: Array
    b_hn: Array | None = None


class GatedCell(GatedRecurrence, Protocol):
    """The interface that the engine needs of a cell.

    gates_apart: whether `update` and `second_input` also take u and v as (..., gates, H).

    `kernel` returns the compiled kernel that is made for this cell, or None. `rule` returns what the kernel with
    options does for it, or the reason why it does not compute it, and `arrange` the arrays that it takes, a linear
    function of the weights.
    """

    @property
    def gates_apart(self) -> bool: ...

    def kernel(self, weights: GatedWeights) -> Kernel | None: ...

    def rule(self) -> Rule | str: ...

    def arrange(self, weights: GatedWeights) -> Given: ...


class Noise(NamedTuple):
    """What acts on the carry of a sequence.

    mask: The mask (*batch, S) that multiplies the recurrent part of the carry where the product reads it, or None.
    rates: For every leaf of the carry the part of it that stays in expectation, or None. stay: For every leaf which
    entries stay at a step, bool (T, *batch, ...), or None where the expectation does.
    """

    mask: Array | None = None
    rates: tuple[float, ...] | None = None
    stay: PyTree = None

    @property
    def silent(self) -> bool:
        """Whether nothing acts."""
        return self.mask is None and self.rates is None


def gated_scan(
    cell: GatedCell,
    weights: GatedWeights,
    carry: PyTree,
    xs: Array,
    *,
    fresh: PyTree,
    noise: Noise,
    walk: Walk,
) -> tuple[PyTree, Array]:
    """Runs the recurrence over the first axis of `xs`: (final carry, ys).

    Args:
      cell: The recurrence: `update`, `second_input`, and the name of the carry's recurrent part.
      weights: The arrays of the recurrence.
      carry: The carry before the first step, with leaves (*batch, ...).
      xs: The inputs, (T, *batch, D), zero at invalid steps.
      fresh: The carry that a reset starts from.
      noise: What acts on the carry.
      walk: The way the sequence is processed.
    """
    dtype, wide = dtypes(weights, carry, xs)
    weights, xs = cast(weights, dtype), xs.astype(dtype)
    kernel = _kernel(cell, [weights], [carry], xs, [noise], walk)
    if kernel is not None:
        (result,) = kernel([carry], xs, [fresh], [walk.reverse])
        return result

    own = cell.gates_apart and _changed(type(cell)) is None
    how = How(cell, dtype, wide, walk.reverse, walk.platform, noise.rates, own)

    def scan(constant, carry, inputs):
        weights, fresh, mask = constant
        xs, stay, flags = inputs
        return gated_recurrence(how, Problem(xs, weights, carry, fresh, mask, stay, *flags))

    return in_chunks(scan, (weights, fresh, noise.mask), carry, (xs, noise.stay, walk.flags), walk)


def gated_scan_both(cell: GatedCell, weights, carry, xs, *, fresh, noise, walk: Walk) -> list[tuple[PyTree, Array]]:
    """Runs `gated_scan` for pairs, along the walk and along the opposite one, at once where a kernel can."""
    walks = walk, walk.opposite
    if walk.remat_every is None and not _fills_all_threads(weights[0], walk):
        dtype, _ = dtypes(weights, carry[0], xs)
        kernel = _kernel(cell, [cast(each, dtype) for each in weights], carry, xs.astype(dtype), noise, walk)
        if kernel is not None:
            return kernel(carry, xs.astype(dtype), fresh, [each.reverse for each in walks])
    return [gated_scan(cell, weights[k], carry[k], xs, fresh=fresh[k], noise=noise[k], walk=walks[k]) for k in range(2)]


def _kernel(cell: GatedCell, weights, carries, xs, noises, walk: Walk):
    """Returns a function that runs recurrences of one cell by a compiled kernel, or None if no kernel is chosen."""
    dtypes = [xs.dtype, *(leaf.dtype for leaf in jax.tree.leaves(carries))]
    found = jnp.float32 if walk.named("gated_scan") == NAMED else kernel_dtype(walk, *dtypes)
    weights = weights if found is None else cast(weights, found)
    kernels: list[Any] = [cell.kernel(each) for each in weights]
    plain = kernels[0] is not None and all(noise.silent for noise in noises)
    rule = None if plain else cell.rule()
    refusal = _changed(type(cell)) or (rule if isinstance(rule, str) else None)
    refusal = refusal or _refusal([xs, *jax.tree.leaves(carries)], plain, walk)
    unnamed = walk.named("gated_scan") is None and walk.platform in (None, "cpu")
    if refusal is None and unnamed and _short(rule if isinstance(rule, Rule) else None, xs):
        refusal = "the loop runs one step of it faster"
    refusals = REFUSALS if refusal is None else REFUSALS | {"native": refusal}
    no_pallas = _no_pallas(type(cell), kernels[0] if plain else None, xs.shape, dtypes, walk)
    chosen, refusals = walk.choose("gated_scan", refusals, cell=cell, no_pallas=no_pallas)
    if chosen != "xla" or len(weights) == 1:  # else each of the two says so itself
        for _ in weights:
            walk.record("gated_scan", chosen, refusals, cell=cell)
    if chosen == "xla":
        return None

    def run(carry, xs, fresh, directions):
        layers = [
            primitives.Layer((each.w_x, each.b, kernel.w_h, kernel.b_hn), *rest)
            for each, kernel, *rest in zip(weights, kernels, carry, fresh, directions, strict=True)
        ]
        results = primitives.scan(kernels[0].kind, layers, xs, walk)
        return [(type(old)(*new), ys) for old, (new, ys) in zip(carry, results, strict=True)]

    def run_staged(carry, xs, fresh, directions):
        def whole(mask, carry):
            h = getattr(carry, cell.recurrent_state)
            return None if mask is None else jnp.broadcast_to(mask.astype(h.dtype), h.shape)

        masks = [whole(noise.mask, each) for noise, each in zip(noises, carry, strict=True)]
        assert isinstance(rule, Rule)
        each = zip(weights, carry, fresh, masks, directions, strict=True)
        return staged.scan(cell, rule, list(map(staged.Layer._make, each)), xs, walk, *noises[0][1:])

    def run_in_one_dtype(carry, xs, fresh, directions):
        def like(new, old):
            return jax.tree.map(lambda new, old: new.astype(old.dtype), new, old)

        wide, wide_xs, wide_fresh = (cast(each, found) for each in (carry, xs, fresh))
        results = (run if plain else run_staged)(wide, wide_xs, wide_fresh, directions)
        return [(like(new, old), ys.astype(xs.dtype)) for (new, ys), old in zip(results, carry, strict=True)]

    return run_in_one_dtype


def _fills_all_threads(weights: GatedWeights, walk: Walk) -> bool:
    """Whether a kernel gives all threads to one recurrence. Then two at once only copy their weights into one array."""
    return weights.w_h.size > FEW_WEIGHTS and (walk.platform or jax.default_backend()) == "cpu"


def _short(rule: Rule | None, xs: Array) -> bool:
    """Whether the kernel would take longer to read the weights in its order and dtype than XLA to run the steps."""
    if xs.dtype in HALF:
        return xs.shape[0] == 1
    if rule is None:
        return False
    arranged = rule.norm or rule.family in ("gru before", "mgu", "slstm")
    return xs.shape[0] == 1 and (arranged or math.prod(xs.shape[1:-1]) < 4)


def _changed(kind: type) -> str | None:
    """Returns the reason why no kernel runs a class that does something else than the one that names the kernel."""

    def depth(name):
        return next(k for k, each in enumerate(kind.__mro__) if name in vars(each))

    changed = any(depth(name) < depth("rule") for name in ("update", "second_input", "weights"))
    return f"no kernel computes what {kind.__name__} does" if changed else None


def _no_pallas(kind: type, kernel: Kernel | None, shape, dtypes, walk: Walk) -> str | None:
    """Returns the reason why the Pallas kernel does not run a call, or None."""
    if walk.platform not in (None, "cpu", "tpu"):
        return f"it is compiled for a TPU, not for {walk.platform}"
    if kernel is None:
        return f"no Pallas kernel computes this {kind.__name__}, or its noise"
    return _changed(kind) or no_pallas_for(shape, *dtypes) or pallas.refusal(*kernel.w_h.shape)


def _refusal(arrays, plain: bool, walk: Walk) -> str | None:
    """Returns the reason why the compiled kernels do not run a call with these arrays, or None."""
    dtypes = [array.dtype for array in arrays]
    if kernel_dtype(walk, *dtypes) is None:
        return no_kernel_for(*dtypes)
    if refusal := refusals_of_sizes(arrays[0].shape).get("native"):
        return refusal
    if not plain and walk.platform is None and jax.default_backend() != "cpu":
        return "the kernels are compiled for the CPU"  # elsewhere the loop's own derivatives are faster
    return library.absent()
