"""Converts PyTorch models to cells: from modules, state_dicts and files."""

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
    """Converts a torch model to a cell that computes the same function, and its params, in the model's dtype.

    Args:
      source: One of

        A module: RNN, LSTM, GRU and their cells, Embedding, Linear, LayerNorm, Dropout, an activation; or a module
        whose children are such modules and run in the order in which they are defined, like `nn.Sequential`. A
        `forward` of your own may do no more than run them in this order. It is run on random numbers, in a copy of the
        module, and the module is refused if none of its outputs equals that of the cell. The module itself is only
        read.

        A state_dict: a mapping of names to torch tensors or NumPy arrays, for one such module or for several in order.
        Modules with numbers for names are put in the order of the numbers. Dropout and activations have no arrays, so
        they are not in the result, and neither is anything else that a `forward` does. So this is the way to read a
        module whose `forward` is refused.

        The path of a .safetensors file, which holds a state_dict. Reading it needs `safetensors`, but not torch.
      parts: For a state_dict: the name of each part ("" for one without a prefix) in the order in which the parts run,
        with its torch class, or None if the shapes tell the class. It is needed for a lone `weight`, which may belong
        to an Embedding, a Linear or a norm. It is also needed if the names are not numbers and are not in torch's
        order, as in a file.
      activation: For a state_dict: "tanh" or "relu", the nonlinearity of every RNN in it.
      epsilon: For a state_dict: the eps of every LayerNorm in it.

    Returns:
      (cell, params). The layers of one module become a `Stack`, two directions a `Bidirectional`, and dropout between
      layers `Dropout`. Modules within a module become a `Stack` again, with one cell for each. In `jaxrnn.scan`, time
      is the first axis, or the second with `time_axis=1`, whatever `batch_first` says. `carry_from_torch` converts
      initial states to a carry.

      Every cell puts out a whole sequence. To get only the last output, put `Pool` around the recurrent cell; the
      params stay the same:

        embed, lstm, head = cell.cells
        cell = jaxrnn.Stack((embed, jaxrnn.Pool(lstm), head))

      Training differs in two ways. First, the row `padding_idx` of an Embedding is trained like the others. Second,
      where torch has two biases that act as their sum, `b` is that sum: all of the bias in an RNN and an LSTM, the
      blocks of r and z in a GRU. An optimizer moves each of torch's two biases as far as it moves `b`, so their sum
      moves twice as far. Doubling the updates of `b` after the optimizer, as in the example, gives the same training if
      there is no weight decay. Doubling the gradient of `b` does so with SGD only, since the size of Adam's steps does
      not depend on the size of the gradient.

    Raises:
      ValueError: If a module or array has no counterpart, does not fit, or is damaged; the message names it. Also if a
        module is used twice, tied, parametrized or has hooks, or if its `forward` computes something else.
      TypeError: If a module or array has no counterpart, does not fit, or is damaged; the message names it. Also if a
        module is used twice, tied, parametrized or has hooks, or if its `forward` computes something else.

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
