"""TPUs and GPUs that a program can be compiled for without having them."""

import importlib.util
import os
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from experiments.mesh import AXIS


class Device(NamedTuple):
    """Published figures of one device; `SOURCES` says by whom."""

    package: str  # of its compiler
    memory: float  # GB
    bandwidth: float  # of that memory, GB/s


V5E = Device("libtpu", memory=16, bandwidth=819)
V5P = Device("libtpu", memory=95, bandwidth=2765)
H200 = Device("jax_cuda13_plugin", memory=141, bandwidth=4800)
SOURCES = """\
Memory and bandwidth of a device: v5e 16 GB, 819 GB/s and v5p 95 GB, 2,765 GB/s, from Google
  Cloud's pages "TPU v5e" and "TPU v5p"; H200 141 GB, 4,800 GB/s, from NVIDIA's data sheet."""
# What XLA wants to know of an H200: compute capability 9.0, 132 multiprocessors.
H200_CONFIG = """
platform_name: "CUDA"  device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }  core_count: 132  fpus_per_core: 128
  clock_rate_ghz: 1.98  memory_bandwidth: 4800000000000  device_memory_size: 141000000000
  l2_cache_size: 52428800  threads_per_warp: 32  threads_per_block_limit: 1024
  threads_per_core_limit: 2048  registers_per_core_limit: 65536
  registers_per_block_limit: 65536  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
}
"""


class Target(NamedTuple):
    device: Device
    topology: dict[str, Any]  # arguments of `topologies.get_topology_desc`


def _tpu(name: str, **more: Any) -> dict[str, Any]:
    return {"platform": "tpu", "topology_name": name, **more}


def _gpus(number: int) -> dict[str, Any]:
    return {
        "platform": "cuda",
        "target_config": H200_CONFIG,
        "topology": f"1x1x{number}",
    }


TARGETS = {
    "v5e": Target(V5E, _tpu("v5e:1x1", chips_per_host_bounds=[1, 1, 1])),
    "v5e-4x4": Target(V5E, _tpu("v5e:4x4")),
    "v5p-2x2x2": Target(V5P, _tpu("v5p:2x2x2")),
    "h200": Target(H200, _gpus(1)),
    "h200-8": Target(H200, _gpus(8)),
}


def missing(target: Target) -> str | None:
    """The package that the target's compiler needs, if it is not installed."""
    package = target.device.package
    return None if importlib.util.find_spec(package) else package


def mesh_of(target: Target) -> Mesh:
    """The devices of a target that need not exist, on one axis."""
    # Keeps libtpu from asking a cloud machine for its topology, and jax for a driver.
    described = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    os.environ.update({k: v for k, v in described.items() if k not in os.environ})
    devices = topologies.get_topology_desc(**target.topology).devices
    return Mesh(np.array(devices), (AXIS,))
