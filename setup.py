"""Builds the compiled kernels. Where that fails the package works without them."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import jaxlib
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = (  # those that take longest first
    "kernels.cc",
    "staged.cc",
    "elementwise.cc",
    "bindings.cc",
    "cell_steps.cc",
)


NUMBERS = {"float32": [], "float64": [("JAXRNN_FLOAT64", None)]}  # which every source is compiled for


class Build(build_ext):
    """Compiles the sources beside each other, for each kind of numbers into a folder of its own."""

    def get_ext_filename(self, fullname):
        """The name of a plain library: XLA calls the kernels, no Python imports them."""
        return f"{fullname.replace('.', os.sep)}.so"

    def build_extensions(self):
        compile = self.compiler.compile

        def one(source, numbers, options):
            folder = os.path.join(options["output_dir"], numbers)
            macros = [*options["macros"], *NUMBERS[numbers]]
            return compile([source], **options | {"output_dir": folder, "macros": macros})

        def beside(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                tasks = [pool.submit(one, source, each, options) for source in sources for each in NUMBERS]
                return list(chain.from_iterable(task.result() for task in tasks))

        self.compiler.compile = beside
        super().build_extensions()


class Wheel(bdist_wheel):
    """One wheel for all Pythons of a platform, also where it holds no kernels."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


folder = Path("jaxrnn/engines/cpu")
kernels = Extension(
    "jaxrnn.engines.cpu._kernels",
    sources=[str(folder / name) for name in SOURCES],
    depends=[str(path) for path in folder.glob("*.h")],
    include_dirs=[str(Path(jaxlib.__file__).parent / "include")],
    define_macros=[("JAXRNN_JAXLIB", f'"{jaxlib.__version__}"')],
    # Loops over the few vectors of a tile are unrolled, so that its sums are in registers.
    extra_compile_args=["-std=c++17", "-O2", "-fpeel-loops", "-fvisibility=hidden", "-g0"],
    language="c++",
    optional=True,
)
on_windows = sys.platform == "win32"  # whose compiler has no vectors, and which has no pthreads
setup(ext_modules=[] if on_windows else [kernels], cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
