"""Devices that programs can be compiled for, also accelerators that are not here.

A TPU needs `libtpu`; a GPU `jax-cuda12-plugin`, `jax-cuda12-pjrt` and `nvidia-cuda-nvcc-cu12`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What XLA asks an H100 of, by NVIDIA's data sheet and CUDA's device query.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
    """The platform, its topology, how many of its devices a program takes, and options of the compiler."""

    platform: str
    topology: str
    devices: int
    options: dict[str, Any]


BACKENDS = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}  # as JAX names them
# Without measuring, which needs a device.
_GPU = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
TARGETS = {
    "cpu": Target("cpu", "", 1, {}),  # that of this machine
    "h100": Target("cuda", "1x1x1", 1, _GPU),
    "4 h100": Target("cuda", "1x1x4", 4, _GPU),
    "v5e": Target("tpu", "v5e:2x2", 1, {}),
    "4 v5e": Target("tpu", "v5e:2x2", 4, {}),
}


def absent(name: str) -> str | None:
    """The packages that are needed to compile for a target and are not here, or None."""
    needed = {"cpu": [], "tpu": ["libtpu"], "cuda": ["jax_cuda12_plugin", "nvidia.cuda_nvcc"]}[TARGETS[name].platform]

    def missing(module):
        try:
            return importlib.util.find_spec(module) is None
        except ModuleNotFoundError:
            return True

    lacking = [module for module in needed if missing(module)]
    return f"{name} needs {' and '.join(lacking)}" if lacking else None


@functools.cache
def devices(name: str) -> list[Any]:
    """The devices of a target; nothing can run on those that are not here."""
    target = TARGETS[name]
    if target.platform == "cpu":
        return jax.devices("cpu")[: target.devices]
    if target.platform == "tpu":
        # So that it does not look for the machine of a TPU.
        for variable, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}.items():
            os.environ.setdefault(variable, value)
        return topologies.get_topology_desc(target.topology, platform="tpu").devices[: target.devices]
    import nvidia.cuda_nvcc

    tools = str(Path(next(iter(nvidia.cuda_nvcc.__path__))) / "bin")
    if tools not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([tools, os.environ["PATH"]])  # of ptxas
    described = topologies.get_topology_desc(platform="cuda", target_config=H100, topology=target.topology)
    return described.devices[: target.devices]


def compiled(
    name: str, function: Callable[..., Any], params: Any, *rows: tuple[Any, int | None], columns: bool = False
) -> Any:
    """`function(params, *arrays)` compiled for a target, and traced as where its platform is the default. Params are
    whole on every device, or with `columns` their last axis is divided; each of `rows` is a tree of shapes and its axis
    of rows, which is divided, or None.
    """
    mesh = Mesh(np.array(devices(name)), ("devices",))

    def placed(tree, axis):
        def place(leaf):
            place = axis if axis is None else axis % leaf.ndim
            spec = PartitionSpec() if place is None else PartitionSpec(*[None] * place, "devices")
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(place, tree)

    divided = (placed(*each) for each in rows)
    target = TARGETS[name]
    with mock.patch.object(jax, "default_backend", return_value=BACKENDS[target.platform]):
        traced = jax.jit(function).trace(placed(params, -1 if columns else None), *divided)
    return traced.lower(lowering_platforms=(target.platform,)).compile(compiler_options=target.options)
