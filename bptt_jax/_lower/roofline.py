"""What pays where: three decisions by sizes, for the backend that the process runs on.

A weight that is used at each step is read from a cache and its gradient summed there, which is cheap while the weight
is small against what a step would have to write and read again for a product outside the loop. Measured on two CPU
cores (`python -m bptt_jax bench`): with weights of 16 times a product's bytes the gradient of a scan takes 0.8 of
the time with products outside, with 2 times 1.2. On accelerators, launches dominate; fewer are better in any case.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rough figures of a kind of device.

    Attributes:
      launch_bytes: what a launch costs, in bytes moved meanwhile.
      stacking: cost of a byte that is written at one step and read for the block, relative to one of a weight.
      hoisting: the same for a byte that is written for the block and read at one step.
      merged_flops: operations of a product below which several are better run as one.
      cache_bytes: what the arrays of a block should fit in.
    """

    launch_bytes: int
    stacking: float
    hoisting: float
    merged_flops: int
    cache_bytes: int


_CPU = Machine(launch_bytes=1 << 14, stacking=5.0, hoisting=40.0, merged_flops=1 << 19, cache_bytes=6 << 20)
_ACCELERATOR = Machine(launch_bytes=1 << 22, stacking=1.0, hoisting=1.0, merged_flops=1 << 28, cache_bytes=32 << 20)
_SHORTEST, _LONGEST = 8, 48  # blocks; longer ones gained nothing at any size


@contextlib.contextmanager
def planning_for(name: str | None) -> Iterator[None]:
    """What is decided within is decided for a platform that may not be here; None changes nothing."""
    before = _planned_for.set(name or _planned_for.get())
    try:
        yield
    finally:
        _planned_for.reset(before)


_planned_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("planned_for", default=None)


def platform() -> str:
    """The platform that decisions are for."""
    return _planned_for.get() or jax.default_backend()


def machine() -> Machine:
    """The figures of this platform."""
    return _CPU if platform() == "cpu" else _ACCELERATOR


def deferring_pays(weight_bytes: int, stacked_bytes: int) -> bool:
    """Whether the gradient of a weight is better computed once for a block than summed at each step.

    Args:
      weight_bytes: of the weight.
      stacked_bytes: what that writes for each step and reads again, beyond what is stacked anyway.
    """
    here = machine()
    return 2 * weight_bytes + here.launch_bytes >= 2 * here.stacking * stacked_bytes


def hoisting_pays(weight_bytes: int, stacked_bytes: int) -> bool:
    """Whether a product of x with a weight is better evaluated once for a block than at each step.

    On CPU only where the step's product is little more than reading the weight: at batch 1 the scan takes half of the
    time, at batch 16 and width 256 a sixth more.
    """
    here = machine()
    return 2 * weight_bytes + here.launch_bytes >= 2 * here.hoisting * stacked_bytes


def merging_pays(flops: int) -> bool:
    """Whether products of so many operations, with one operand in common, are better run as one."""
    return flops <= machine().merged_flops


def block_steps(step_bytes: int) -> int:
    """The length of a block of steps of which each takes so many bytes."""
    return max(_SHORTEST, min(_LONGEST, machine().cache_bytes // max(step_bytes, 1)))
