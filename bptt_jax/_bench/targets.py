"""The device for which kernel launches are counted: this machine's GPU, or an H100 that need not be here.

XLA compiles for devices that a machine does not have. Nothing runs on them, but the kernels and the bytes of their
programs are known. This takes JAX's CUDA plugins, without a GPU, its driver or the libraries beside the compiler.
"""

from __future__ import annotations

import importlib.util

import jax
from jax.experimental import topologies

from bptt_jax._caches import remember
from bptt_jax._jaxprs.types import Device

# The public figures of an H100 SXM, as XLA's GpuTargetConfigProto in text form.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_PLUGINS = ("jax_cuda13_plugin", "nvidia.cu13")


class TargetMissingError(RuntimeError):
    """The plugins that compile for a device are not installed, or JAX has not loaded them."""


def launches_device(asked: bool | None) -> Device:
    """The device for which launches are counted; None where they are not.

    Args:
      asked: whether to count; None counts on a GPU only, because elsewhere each program is compiled once more.

    Raises:
      TargetMissingError: if asked for where there are neither a GPU nor JAX's CUDA plugins.
    """
    on_gpu = jax.default_backend() == "gpu"
    if not (on_gpu if asked is None else asked):
        return None
    return jax.devices()[0] if on_gpu else h100()


@remember(1)
def h100() -> Device:
    """A compile-only H100: pass it to `jax.sharding.SingleDeviceSharding` and lower shapes with that.

    Raises:
      TargetMissingError: without JAX's CUDA plugins, installed and loaded.
    """
    if missing := missing_plugins():
        raise TargetMissingError(
            f"compiling for an H100 needs JAX's CUDA plugins, and {', '.join(missing)} cannot be imported; "
            f"install them with: python -m pip install 'jax[cuda13]=={jax.__version__}'"
        )
    options = {"topology_name": "h100", "topology": "1x1x1", "target_config": _H100}
    try:
        topology = topologies.get_topology_desc(platform="cuda", **options)
    except NotImplementedError as error:
        # Without a platform asked for, JAX loads them only beside a GPU's own libraries, and decides once in a process.
        raise TargetMissingError(
            "JAX has not loaded its CUDA plugins, which compile for an H100; set JAX_PLATFORMS=cpu in the environment"
        ) from error
    return topology.devices[0]


def missing_plugins() -> list[str]:
    """The modules that compiling for an H100 needs and that are not installed."""
    return [name for name in _PLUGINS if not is_installed(name)]


def is_installed(module: str) -> bool:
    """Whether a module can be found; it is not imported.

    >>> is_installed("jax.numpy"), is_installed("no_such_package.module")
    (True, False)
    """
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False
