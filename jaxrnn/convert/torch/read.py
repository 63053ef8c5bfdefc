"""PyTorch's models as cells: from modules, state_dicts and files."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from jaxrnn.convert.arrays import Arrays
from jaxrnn.convert.torch.forward import check_forwards
from jaxrnn.convert.torch.modules import read_module, read_parts
from jaxrnn.convert.torch.names import named_parts
from jaxrnn.convert.torch.tensors import is_instance, named_arrays, state_dict
from jaxrnn.engines.arrays import on_device
from jaxrnn.typing import Foreign, WithParams


def from_torch(
    source: Foreign,
    *,
    parts: Mapping[str, str | None] | None = None,
    activation: str | None = None,
    epsilon: float | None = None,
) -> WithParams:
    """The cell that computes what a torch model does, and its params, in the model's dtype.

    Args:
      source: One of

        A module: RNN, LSTM, GRU and their cells, Embedding, Linear, LayerNorm, Dropout, an activation; or one whose
        children are such modules and run in the order in which they are defined, like `nn.Sequential`. A `forward` of
        your own may do no more than that: it is run on random numbers, in a copy of the module, and refused where none
        of its outputs is that of the cell. The module is only read.

        A state_dict: names to torch's tensors or NumPy arrays, of one such module or of several in order, those with
        numbers for names in the order of these. Dropout and activations have no arrays, so they are not in the result,
        nor is whatever else a `forward` does; so this is the way to read a module whose `forward` is refused.

        The path of a .safetensors file, which holds a state_dict. It needs `safetensors`, and no torch.
      parts: Of a state_dict, the name of each part ("" for one without a prefix) in the order in which they run, with
        its torch class, or None where the shapes tell it. Needed for a lone `weight`, which may be of an Embedding, of
        a Linear, or of a norm, and where names that are no numbers are not in torch's order, as in a file.
      activation: Of a state_dict, "tanh" or "relu", the nonlinearity of every RNN in it.
      epsilon: Of a state_dict, the eps of every LayerNorm in it.

    Returns:
      (cell, params). Layers of one module are a `Stack`, two directions a `Bidirectional`, dropout between layers
      `Dropout`, and modules in a module a `Stack` again, with one cell for each. Time comes first in `jaxrnn.scan`, and
      second with `time_axis=1`, whatever `batch_first` says; `carry_from_torch` makes its carry of initial states.

      Every cell puts out a whole sequence. For the last output, `Pool` around the recurrent cell keeps the params:

        embed, lstm, head = cell.cells
        cell = jaxrnn.Stack((embed, jaxrnn.Pool(lstm), head))

      Training differs in two things. Of an Embedding, the row `padding_idx` is trained like the others. And where torch
      has two biases that act as their sum, `b` is the sum: all of it in an RNN and an LSTM, the blocks of r and z in a
      GRU. An optimizer moves each of the two as far as it moves `b`, so that their sum moves twice as far. Doubling the
      updates of `b` after the optimizer, as in the example, is the same training without weight decay; doubling its
      gradient is so with SGD only, since Adam's steps do not depend on its size.

    Raises:
      ValueError: Naming the module or array that has no counterpart, does not fit, or is damaged. Modules used twice,
        tied, parametrized or with hooks raise as well, and those whose `forward` computes something else.
      TypeError: Naming the module or array that has no counterpart, does not fit, or is damaged. Modules used twice,
        tied, parametrized or with hooks raise as well, and those whose `forward` computes something else.

    Examples:
      >>> import numpy as np
      >>> rng = np.random.default_rng(0)
      >>> state_dict = {
      ...     "lstm.weight_ih_l0": rng.normal(size=(16, 3)).astype("float32"),
      ...     "lstm.weight_hh_l0": rng.normal(size=(16, 4)).astype("float32"),
      ...     "head.weight": rng.normal(size=(2, 4)).astype("float32"),
      ...     "head.bias": np.zeros(2, "float32"),
      ... }
      >>> cell, params = from_torch(state_dict)
      >>> cell.cells
      (LSTM(input_size=3, hidden_size=4), Linear(input_size=4, output_size=2))

      >>> import jax, optax
      >>> lstm, head = jax.tree.map(lambda _: False, params)
      >>> doubled = optax.masked(optax.scale(2.0), (lstm._replace(b=True), head))
      >>> optimizer = optax.chain(optax.adam(1e-3), doubled)  # b moves as fast as torch's two
    """
    if is_instance(source, "nn", "Module"):
        told = {"parts": parts, "activation": activation, "epsilon": epsilon}
        if given := [name for name, value in told.items() if value is not None]:
            raise ValueError(f"{', '.join(given)}: only for a state_dict, since a module tells it itself")
        cell, params = read_module(source)
        check_forwards(source)
    else:
        name, given, ordered = state_dict(source)
        named = named_arrays(name, given)
        arrays = Arrays(name, named)
        found = named_parts(arrays, list(named), ordered=ordered, parts=parts, activation=activation, epsilon=epsilon)
        cell, params = read_parts(found[0] if len(found) == 1 else found, arrays, named)
    return cell, jax.tree.map(on_device, params)
