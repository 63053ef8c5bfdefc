"""Checks whether the `forward` of a user's class runs its modules one after another and does nothing else."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from jaxrnn.cell import input_size
from jaxrnn.convert.cells import Placed, layers
from jaxrnn.convert.torch.modules import children, read_module, where
from jaxrnn.convert.torch.tensors import is_instance
from jaxrnn.engines.arrays import on_device
from jaxrnn.layers import Embed
from jaxrnn.sequence import scan
from jaxrnn.typing import Foreign, PyTree

STEPS, ROWS = 7, 5  # they differ, so that the shape of an output tells its axes


def check_forwards(module: Foreign) -> None:
    """Compares every `forward` that is not torch's own with the cell that its module is read as.

    It runs in copies of the modules with random weights, since with the given weights a layer may happen to do nothing.
    The inputs are time-major, batch-major and single sequences; a `forward` may take only one of these.

    Raises:
      ValueError: If `forward` cannot be run on any of them, or if none of the tensors that it returns is an output of
        the cell.
    """
    for name, part in _with_own_forward(module, ""):
        if why := _difference(part):
            weighted = {key: each for key, each in module.named_modules() if list(each.parameters(recurse=False))}
            parts = {key: type(each).__name__ for key, each in weighted.items()}
            raise ValueError(
                f"{where(part, name)}: its forward {why}. Give from_torch the module's state_dict() with parts={parts} "
                "in the order in which they run, and add to the cell what forward does besides: jaxrnn.Pool around "
                "a cell for one output of a sequence, jaxrnn.Apply for an activation"
            )


def _with_own_forward(module: Foreign, name: str) -> Iterator[tuple[str, PyTree]]:
    """The outermost modules whose `forward` is not torch's own, with their names."""
    kind = type(module)
    if _is_own(kind, "forward") or _is_own(kind, "__call__"):
        yield name, module
        return
    for key, child in children(module):
        yield from _with_own_forward(child, f"{name}.{key}" if name else key)


def _is_own(kind: type, method: str) -> bool:
    owner = next(each for each in kind.__mro__ if method in vars(each))
    return not owner.__module__.startswith("torch.")


def _difference(module: Foreign) -> str | None:
    """Says what is wrong with the module's `forward`, or returns None."""
    torch, rng = sys.modules["torch"], np.random.default_rng(0)
    device = next((weight.device for weight in module.parameters()), torch.device("cpu"))
    accelerator = {} if device.type == "cpu" else {"device_type": device.type}
    failures = []
    with (
        torch.no_grad(),
        torch.random.fork_rng([device] if accelerator else [], **accelerator),
        warnings.catch_warnings(action="ignore"),
    ):
        try:
            drawn = _redrawn(copy.deepcopy(module), rng)
            xs, ys = _sequences(drawn, rng)
        except Exception as error:
            return _failed(error)
        for given in _layouts(xs):
            try:
                output = copy.deepcopy(drawn)(torch.tensor(given, device=device))
                arrays = [tensor.cpu().double().numpy() for tensor in _tensors(output)]
            except Exception as error:
                failures.append(error)
            else:
                if any(_equal(array, expected) for array in arrays for expected in _layouts(ys)):
                    return None
    if len(failures) == len(_layouts(xs)):
        return _failed(failures[0])
    return "computes something else than its modules one after another, in the order in which they are defined"


def _failed(error: Exception) -> str:
    return f"cannot be compared with its modules on an input of random numbers: {type(error).__name__}: {error}"


def _redrawn(module: Foreign, rng: np.random.Generator) -> PyTree:
    """The module in evaluation mode and at least float32, with random weights that keep the values near 1."""
    for part in module.eval().modules():
        for weight in part.parameters(recurse=False):
            scale = 0.5 if weight.ndim == 1 else 2 / weight.shape[-1] ** 0.5
            scale = 1.0 if is_instance(part, "nn", "Embedding") else scale
            numbers = rng.standard_normal(tuple(weight.shape), "float32")
            weight.copy_(scale * sys.modules["torch"].tensor(numbers))
    wide = any(weight.dtype.itemsize == 8 for weight in module.parameters())
    return module if wide else module.float()


def _sequences(module: Foreign, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A time-major input, and the output of the module's cell for it."""
    # Outside of any transformation that the conversion may be in.
    with jax.ensure_compile_time_eval():
        cell, params = read_module(module)
        xs = _input(Placed(cell, params), rng)
        return xs, np.asarray(scan(cell, jax.tree.map(on_device, params), None, xs)[1])


def _input(model: Placed, rng: np.random.Generator) -> np.ndarray:
    if model.cell.input_ndim == 0:
        vocabulary = next(each.cell.vocabulary for each in layers(model) if isinstance(each.cell, Embed))
        tokens = rng.integers(vocabulary, size=(STEPS, ROWS))
        tokens[0] = 0  # often that of padding, to which a forward may do more
        return tokens
    dtype = next((leaf.dtype for leaf in jax.tree.leaves(model.params)), np.dtype("float32"))
    return rng.normal(size=(STEPS, ROWS, input_size(model.cell) or ROWS)).astype(dtype)


def _layouts(sequences: np.ndarray) -> tuple[np.ndarray, ...]:
    """The sequences in time-major and in batch-major order, and one single sequence."""
    return sequences, np.swapaxes(sequences, 0, 1), sequences[:, 0]


def _tensors(output: PyTree) -> list[PyTree]:
    """The tensors that a `forward` returns: one, or several in tuples, lists and mappings."""
    if is_instance(output, "Tensor"):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _equal(theirs: np.ndarray, ours: np.ndarray) -> bool:
    """Whether both are equal up to the rounding of matrix products, which an accelerator computes with fewer digits."""
    tolerance = np.finfo(ours.dtype).eps ** (1 / 3)
    return theirs.shape == ours.shape and np.allclose(theirs, ours, 0, tolerance * abs(ours).max())
