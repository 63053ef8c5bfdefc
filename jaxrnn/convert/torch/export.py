"""Converts cells to state_dicts of PyTorch models."""

from __future__ import annotations

import numpy as np

from jaxrnn.cell import Cell
from jaxrnn.check import shapes_of_params
from jaxrnn.compose.pool import Pool
from jaxrnn.compose.stack import Stack
from jaxrnn.convert.activations import canonical
from jaxrnn.convert.cells import Placed, layers, placed
from jaxrnn.convert.torch.modules import Parts, module_parts, module_weights
from jaxrnn.convert.torch.tensors import is_instance, tensor
from jaxrnn.convert.torch.weights import Part, is_recurrent, repeated, write_part
from jaxrnn.layers import Apply, Dropout
from jaxrnn.typing import Foreign, Named, PyTree


def to_torch(cell: Cell, params: PyTree, *, module: Foreign = None) -> Named:
    """Converts a cell's params to the state_dict of a torch model that computes the same function.

    It is for `load_state_dict`.

    Names, without `module`: One recurrent cell is one torch module ("weight_ih_l0", "weight_ih_l1_reverse", ...). So is
    a `Stack` of equal recurrent cells, if `Dropout` of one rate is between all of them or none. The cells of any other
    `Stack` are numbered as in `nn.Sequential`, with Dropout and activations counted ("0.weight", "2.weight_ih_l0").

    Our biases are the sums of torch's two: they go to `bias_ih`, and zeros to `bias_hh`, whose last block in a GRU is
    b_hn. A cell without biases needs a module with `bias=False`. Options that have no array (the rate of Dropout, the
    nonlinearity of an RNN, the eps of a LayerNorm) must be set in the module.

    Args:
      cell: A cell of a kind that `from_torch` returns.
      params: Its params, as `cell.init` gives them.
      module: The torch module that is to load the result. It gives the names, and it must have the same cells and
        shapes, which is checked. Its `forward` is not run: a `Pool` counts as the cell in it, since the code of the
        module decides which output is read. Dropout is not compared.

    Returns:
      A mapping of names to CPU tensors in the dtype of the params.

    Raises:
      ValueError: If torch, or the module, has no counterpart for a part of the cell. The message names the place.
      TypeError: If the params are those of another cell.

    Examples:
      >>> import jax, jaxrnn
      >>> cell = jaxrnn.LSTM(3, 4)
      >>> state_dict = to_torch(cell, cell.init(jax.random.key(0)))  # doctest: +SKIP
      >>> torch.nn.LSTM(3, 4).load_state_dict(state_dict)  # doctest: +SKIP
      <All keys matched successfully>
    """
    model = placed(cell, params)
    arrays = _numbered(model, "") if module is None else _in_module(model, module)
    return {name: tensor(array) for name, array in arrays.items()}


def _numbered(model: Placed, name: str) -> dict[str, np.ndarray]:
    """The arrays of the module `name`, in which the children have numbers as names."""
    cell = model.cell
    if type(cell) is not Stack:
        return write_part(name, True, [model])
    model.only("cells", why="torch has no skip connections")
    parts = [
        Placed(each, params, f"{model.place}.cells[{k}]")
        for k, (each, params) in enumerate(zip(cell.cells, model.params, strict=True))
    ]
    if _is_one_module(cell):
        return write_part(name, True, [part for part in parts if not isinstance(part.cell, Dropout)])
    arrays = {}
    for k, part in enumerate(parts):
        arrays |= _numbered(part, f"{name}{k}.")
    return arrays


def _is_one_module(cell: Stack) -> bool:
    recurrent = [each for each in cell.cells if is_recurrent(each)]
    dropouts = [each for each in cell.cells if isinstance(each, Dropout) and each == Dropout(each.rate)]
    if len(recurrent) < 2:
        return False
    return cell == repeated(recurrent[0], len(recurrent), dropouts[0] if dropouts else None)


def _in_module(model: Placed, module: Foreign) -> dict[str, np.ndarray]:
    """The arrays, under the names of a module that computes the same function as the cells."""
    if not is_instance(module, "nn", "Module"):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    shapes = {name: tuple(weight.shape) for name, weight in module_weights(module).items()}
    rest, arrays = _flat(model), {}
    for part in _flat_parts(module_parts(module)):
        cells = [each.cell for each in _flat(Placed(part.cell, shapes_of_params(part.cell)))]
        where = f"the module's {part.name.removesuffix('.') or type(module).__name__}"
        if len(rest) < len(cells):
            raise ValueError(f"{model.place}: {model.cell!r}: nothing is left for {where}, {part.cell!r}")
        for mine, cell in zip(rest, cells, strict=False):
            if _comparable(mine.cell) != _comparable(cell):
                mine.refuse(f"{where} is {cell!r}")
        if cells:
            arrays |= write_part(part.name, part.layered, rest[: len(cells)])
        rest = rest[len(cells) :]
    if rest:
        rest[0].refuse("the module has nothing more")
    return _fitted(arrays, shapes)


def _flat(model: Placed) -> list[Placed]:
    """The cells that run one after another, without those that have no weights and are not compared."""
    cells = []
    for each in layers(model):
        if isinstance(each.cell, Pool):
            cells += _flat(each.part("cell", each.params))
        elif not isinstance(each.cell, Dropout) and each.cell != Apply("identity"):
            cells.append(each)
    return cells


def _flat_parts(parts: Parts) -> list[Part]:
    return [parts] if isinstance(parts, Part) else [each for part in parts for each in _flat_parts(part)]


def _comparable(cell: Cell) -> Cell:
    return Apply(canonical(cell.fn)) if isinstance(cell, Apply) else cell


def _fitted(arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The arrays under the names of a module. It may lack arrays that change nothing; its other biases become 0."""
    dtype = next(iter(arrays.values())).dtype if arrays else np.dtype("float32")
    for name, array in arrays.items():
        neutral = 0 if _is_bias(name) else 1
        if name not in shapes and (array.ndim != 1 or (array != neutral).any()):
            raise ValueError(f"module: it has no {name}, which is not {neutral} everywhere")
    fitted = {name: np.zeros(shape, dtype) for name, shape in shapes.items() if _is_bias(name)}
    fitted |= {name: array for name, array in arrays.items() if name in shapes}
    for name, shape in shapes.items():
        if name not in fitted or fitted[name].shape != shape:
            got = fitted[name].shape if name in fitted else "nothing"
            raise ValueError(f"module: {name}: expected shape {shape}, got {got}")
    return {name: fitted[name] for name in shapes}


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2].startswith("bias")
