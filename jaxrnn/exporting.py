"""What `jax.export` needs of this package, to write programs to files and to run them in another process.

`import jaxrnn` names the types of params and carries for it, and registers the compiled kernels, so that a process that
has imported the package can read and run what another one has written. JAX knows nothing of the kernels, and refuses to
export a program that calls one. `KERNEL_CHECKS` lists the checks to disable.

Examples:
  >>> import jax, jax.export, jax.numpy as jnp, jaxrnn
  >>> cell = jaxrnn.GRU(3, 4)
  >>> params, xs = cell.init(jax.random.key(0)), jnp.ones((7, 2, 3))
  >>> run = jax.jit(lambda params, xs: jaxrnn.scan(cell, params, None, xs))
  >>> exported = jax.export.export(run, disabled_checks=jaxrnn.exporting.KERNEL_CHECKS)(params, xs)
  >>> carry, ys = exported.call(params, xs)
  >>> ys.shape
  (7, 2, 4)
"""

from __future__ import annotations

from collections.abc import Iterable

import jax.export

from jaxrnn.engines.cpu import library
from jaxrnn.typing import PyTree

__all__ = ["KERNEL_CHECKS"]

# For the argument `disabled_checks` of `jax.export.export`: one for every compiled kernel, whether this installation
# has it or not.
KERNEL_CHECKS = tuple(map(jax.export.DisabledSafetyCheck.custom_call, library.targets()))


def name_types(values: Iterable[PyTree]) -> None:
    """Names every type of named tuples among `values`, so that programs with such arguments can be written."""
    for each in values:
        if isinstance(each, type) and issubclass(each, tuple) and hasattr(each, "_fields"):
            jax.export.register_namedtuple_serialization(each, serialized_name=f"jaxrnn.{each.__name__}")


def prepare(values: Iterable[PyTree]) -> None:
    """Names the types among `values`, and registers the kernels, so that programs can be read and run."""
    name_types(values)
    library.absent()
