"""What all tests share: strict dtypes, x64 where a module asks for it, and memory that does not begin with zeros."""

import ctypes
import gc
import itertools
import os
import sys
from pathlib import Path

import jax
import jaxlib
import pytest

# Little optimisation takes a quarter of the time to compile; set XLA_FLAGS for another way. XLA reads them once, before
# anything of jaxrnn runs, and refuses to start on one that it does not know, so each version gets those that it does.
_FLAGS = {
    "0.10": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
    "0.11": "--xla_backend_optimization_level=0",
    "0.12": "--xla_backend_optimization_level=0",
}
_VERSION = ".".join(jaxlib.__version__.split(".")[:2])
if _VERSION in _FLAGS:
    os.environ.setdefault("XLA_FLAGS", _FLAGS[_VERSION])

jax.config.update("jax_num_cpu_devices", 4)  # of which programs take the first, but where a test divides them

from members import MEMBERS  # noqa: E402

_tests = itertools.count(1)
_MOST_MAPS = 30_000  # half of what Linux allows by itself
_M_PERTURB = -6  # glibc: what malloc gives is filled with bytes 0xfe, which are numbers of −1.7e38

collect_ignore = ["data", "typed.py"]  # which needs what makes the files, and which pyright reads


def pytest_configure(config):
    config.addinivalue_line("markers", "full: the big products, run by `pytest -m full`")
    config.addinivalue_line("markers", "accelerator: compiled for GPUs and TPUs, run by `pytest -m accelerator`")
    gc.set_threshold(200_000, 50, 100)  # what JAX keeps is never garbage, and looking through it takes long
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_PERTURB, 1)


def pytest_runtest_teardown():
    """Every compiled program maps memory, and Linux allows a process so many maps; at its end XLA crashes."""
    maps = Path("/proc/self/maps")
    if next(_tests) % 50 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One worker runs all tests of a member of the contract, of the same parameters of a file, or of an example: what
    they share is computed once."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            if "test_example_" in file:
                return file
            parameters = test.partition("[")[2].rstrip("]")
            if not parameters:
                return nodeid
            return next((name for name in parameters.split("-") if name in MEMBERS), f"{file}[{parameters}]")

    return Groups(config, log)


@pytest.fixture(autouse=True)
def _settings(request):
    """No promotion of dtypes or ranks, unless a module says `PROMOTION`; float64 where it says `X64 = True`."""
    module = request.module
    promotion = getattr(module, "PROMOTION", "strict")
    x64 = getattr(module, "X64", False)
    ranks = "raise" if promotion == "strict" else "allow"
    with jax.numpy_dtype_promotion(promotion), jax.numpy_rank_promotion(ranks), jax.enable_x64(x64):
        yield


def pytest_collection_modifyitems(config, items):
    """The full tier and that of accelerators run only when `-m` names them."""
    unasked = {tier for tier in ("full", "accelerator") if tier not in (config.option.markexpr or "")}

    def waits(item):
        return any(item.get_closest_marker(tier) for tier in unasked)

    config.hook.pytest_deselected(items=[item for item in items if waits(item)])
    items[:] = [item for item in items if not waits(item)]
