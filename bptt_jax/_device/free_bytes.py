"""What budget="auto" stands for: the bytes that are free where the program will run."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from bptt_jax._device.processes import least_of_processes
from bptt_jax._jaxprs.types import Device

# Of what is free, this share is left for what the estimate does not see: inputs and results of the scan that do not
# exist yet, other programs, fragmentation.
RESERVE = 0.25
_DIGITS = 3  # binary ones: a figure that wavers should not change the plan, nor compile anything anew


def free_bytes(device: Device = None) -> int:
    """Three quarters of the free bytes of a device, rounded down to three binary digits; the least of all processes.

    Args:
      device: None for the first of this process. Of one with memory of its own the figures of its allocator count, of
        a CPU what the system has available, within the limits of the container.

    Raises:
      ValueError: where the device does not tell.
    """
    device = jax.local_devices()[0] if device is None else device
    free = _available_to_cpu() if device.platform == "cpu" else _available_to(device)
    if free is None:
        raise ValueError(
            f'budget="auto" needs to know the free memory of {device}, which does not tell; pass bytes, or "5%".'
        )
    return _round_down(int(least_of_processes(free) * (1 - RESERVE)))


def _round_down(size: int) -> int:
    """
    >>> _round_down(1000), _round_down(7)
    (896, 7)
    """
    places = max(size.bit_length() - _DIGITS, 0)
    return size >> places << places


def _available_to(device: Device) -> int | None:
    """Of a device that is only compiled for, the figures are not known."""
    try:
        stats = device.memory_stats()
    except (NotImplementedError, RuntimeError):  # so compile-only devices refuse; JAX's own error is a RuntimeError
        return None
    if not stats or "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))


def _available_to_cpu() -> int | None:
    found = [size for size in (_available_to_system(), _available_to_container()) if size is not None]
    return min(found, default=None)


def _available_to_system() -> int | None:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _available_to_container(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the control group allows beyond what it uses; None without a limit."""
    try:
        limit, used = (group / "memory.max").read_text().strip(), (group / "memory.current").read_text().strip()
    except OSError:
        return None
    return None if limit == "max" else max(int(limit) - int(used), 0)
