"""The bytes of budget="auto": the free memory of the device where the program will run."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from bptt_jax._device.processes import least_of_processes
from bptt_jax._jaxprs.types import Device

# Share of the free bytes left unused, because the estimate does not see everything: inputs and results of the scan not
# allocated yet, other programs, fragmentation.
RESERVE = 0.25
# The same for a whole program, whose inputs and results are counted: for fragmentation and the device's own needs.
RESERVE_OF_WHOLE = 0.1
_DIGITS_OF_WHOLE = 6  # binary digits; there is one such figure, and nothing is planned from it alone
_DIGITS = 3  # binary digits, because a small change of the figure should not change the plan, nor compile anew


def free_bytes(device: Device = None) -> int:
    """Three quarters of the free bytes of a device, rounded down to three binary digits; the least of all processes.

    Args:
      device: None for the first device of this process. For a CPU, free are the bytes available to the system, within
        the limit of the container; for any other device, the allocator's limit less its bytes in use.

    Raises:
      ValueError: if the device does not report its memory.
    """
    device = jax.local_devices()[0] if device is None else device
    free = _free(device)
    if free is None:
        raise ValueError(
            f'budget="auto" needs to know the free memory of {device}, which does not tell; pass bytes, or "5%".'
        )
    return _round_down(int(least_of_processes(free) * (1 - RESERVE)))


def room_bytes(held: int, device: Device) -> int:
    """Nine tenths of a device's bytes for one program, rounded down to six binary digits; the least of all processes.

    The bytes for it are the free ones and those that its arguments hold already. The CPU devices of a process share
    its memory in equal parts.

    Args:
      held: bytes of the program's arguments that are on the device.
      device: the device.

    Raises:
      ValueError: if the device does not report its memory.
    """
    free = _free(device)
    if free is None:
        raise ValueError(
            f'within="auto" needs to know the memory of {device}, which does not tell; pass bytes, or "14GiB".'
        )
    if device.platform == "cpu":
        free //= jax.local_device_count("cpu")
    return _round_down(int(least_of_processes(free + held) * (1 - RESERVE_OF_WHOLE)), _DIGITS_OF_WHOLE)


def _free(device: Device) -> int | None:
    """Free bytes of a device; None where it does not tell."""
    return _available_to_cpu() if device.platform == "cpu" else _available_to(device)


def _round_down(size: int, digits: int = _DIGITS) -> int:
    """A size rounded down to some binary digits.

    >>> _round_down(1000), _round_down(7)
    (896, 7)
    """
    places = max(size.bit_length() - digits, 0)
    return size >> places << places


def _available_to(device: Device) -> int | None:
    """Free bytes by the device's allocator; None where unknown, for example of a device only compiled for."""
    try:
        stats = device.memory_stats()
    except (NotImplementedError, RuntimeError):  # raised by compile-only devices; JAX's own error is a RuntimeError
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
    # Not Linux: free pages, where the system reports them.
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _available_to_container(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The limit of the control group less its bytes in use; None without a limit."""
    try:
        limit, used = (group / "memory.max").read_text().strip(), (group / "memory.current").read_text().strip()
    except OSError:
        return None
    return None if limit == "max" else max(int(limit) - int(used), 0)
