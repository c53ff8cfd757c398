"""Devices that the machine does not have, to compile for: XLA then tells the bytes and the kernels of the real program.

Nothing runs on them, and they have no time; the default platform stays the CPU. JAX's plugins for them are looked up
in the environment and not among the test dependencies, for they take 1.3 GB. In an environment of their own (the
versions are those that jax[cuda13] and jax[tpu] of JAX 0.10.2 ask for):

python -m pip install --no-deps jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 nvidia-cuda-nvcc nvidia-nvvm \\
    nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cupti nvidia-nvjitlink 'libtpu==0.0.42.*'
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from jax.experimental import topologies

from bptt_jax import _options
from bptt_jax._bench import targets
from bptt_jax._bench.targets import TargetMissingError, is_installed
from bptt_jax._device.machine import Machine


def or_skip(target: Callable[[], Any]) -> Any:
    """What `target` returns, or the end of the test, with the reason, where its plugins are not installed."""
    try:
        return target()
    except TargetMissingError as error:
        pytest.skip(str(error))


@contextlib.contextmanager
def planning_for(platform: str, device: Any = None) -> Iterator[None]:
    """Plans for a platform where no `target` can be given: layers have none, and a mesh is many devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_options, "machine_for", lambda target=None: Machine(platform, target or device))
        yield


@functools.cache
def h100() -> Any:
    """A compile-only H100: pass it to `jax.sharding.SingleDeviceSharding` and lower shapes with that.

    Raises:
      TargetMissingError: without JAX's CUDA plugins.
    """
    if not targets.missing_plugins():
        jax.config.update("jax_platforms", "cpu")
    return targets.h100()


@functools.cache
def v5e() -> Any:
    """A compile-only TPU v5e; see `h100`. The temporaries of its programs are those in its main memory (HBM).

    Raises:
      TargetMissingError: without libtpu.
    """
    return _v5e_devices("2x2")[0]


@functools.cache
def v5e_pod() -> list[Any]:
    """256 compile-only TPUs v5e, for the devices of a mesh; see `v5e`."""
    return _v5e_devices("16x16")


def _v5e_devices(shape: str) -> list[Any]:
    if not is_installed("libtpu"):
        raise TargetMissingError("compiling for a TPU needs libtpu; tests/support/targets.py says what to install.")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no server that knows this machine
    jax.config.update("jax_platforms", "cpu")
    return list(topologies.get_topology_desc(platform="tpu", topology_name=f"v5e:{shape}").devices)
