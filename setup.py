"""Builds the compiled kernels. Where that fails the package works without them."""

from pathlib import Path

import jaxlib
from setuptools import Extension, setup

SOURCES = (
    "binding.cc",
    "linear_binding.cc",
    "matrix_binding.cc",
    "diagonal_binding.cc",
    "elementwise_binding.cc",
    "staged_binding.cc",
    "kernels.cc",
    "staged.cc",
)
folder = Path("jaxrnn/engines/cpu")
kernels = Extension(
    "jaxrnn.engines.cpu._kernels",
    sources=[str(folder / name) for name in SOURCES],
    depends=[str(path) for path in folder.glob("*.h")],
    include_dirs=[str(Path(jaxlib.__file__).parent / "include")],
    define_macros=[("JAXRNN_JAXLIB", f'"{jaxlib.__version__}"')],
    extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-g0"],
    language="c++",
    optional=True,
)
setup(ext_modules=[kernels])
