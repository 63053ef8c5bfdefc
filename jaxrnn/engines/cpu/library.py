"""The compiled library of kernels, and whether it can run here."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jaxrnn.typing import DTypeLike, PyTree

NUMBERS = jnp.dtype(jnp.float32), jnp.dtype(jnp.float64)  # that kernels compute with

_lowerings: dict[Primitive, Callable[..., PyTree]] = {}


def register(primitive: Primitive, lowering: Callable[..., PyTree]) -> None:
    """Registers how `primitive` is lowered on the CPU where the kernel of its name can run."""
    _lowerings[primitive] = lowering


def takes(*dtypes: DTypeLike) -> bool:
    """Whether there are kernels for arrays of these dtypes together."""
    found = {jnp.dtype(dtype) for dtype in dtypes}
    return len(found) == 1 and found <= set(NUMBERS)


def target(name: str, dtype: DTypeLike) -> str:
    """The name of a kernel for arrays of float32 or float64."""
    return f"{name}_float64" if dtype == jnp.float64 else name


def targets() -> list[str]:
    """The names of all kernels."""
    return [target(primitive.name, dtype) for primitive in _lowerings for dtype in NUMBERS]


@functools.cache
def absent() -> str | None:
    """Returns the reason why the kernels cannot be called; or None, and then they are registered."""
    file = Path(__file__).with_name("_kernels.so")
    if not file.is_file():
        return "the package was installed without compiled kernels: it found no C++ compiler, or the build failed"
    try:
        library = ctypes.CDLL(str(file))
        library.jaxrnn_jaxlib.restype = ctypes.c_char_p
        refusal = newer(library.jaxrnn_jaxlib().decode())
        capsules = {name: jax.ffi.pycapsule(getattr(library, name)) for name in targets()}
    except (OSError, AttributeError) as error:
        return f"the compiled kernels could not be loaded: {error}"
    if refusal is not None:
        return refusal
    for name, capsule in capsules.items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    for primitive, lowering in _lowerings.items():
        mlir.register_lowering(primitive, lowering, platform="cpu")
    return None


def newer(version: str) -> str | None:
    """Returns why kernels compiled with the headers of this jaxlib cannot run here, or None: newer ones stop the whole
    CPU backend.
    """
    running = jaxlib.version.__version__
    compiled, own = (tuple(map(int, each.split(".")[:3])) for each in (version, running))
    if compiled <= own:
        return None
    return f"the kernels were compiled for jaxlib {version}, newer than the {running} that runs; build again"
