"""A step that reads some leaves of its x where they are: at an index of the whole arrays, which a loop does not slice.

A loop wants what it slices with time first. For arrays with time elsewhere that is a copy of the whole, and under vmap
also for others. It is not done for arrays that are differentiated: the cotangent of such an array would be added to as
a whole in each step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax._trace.along import Along
from bptt_jax._trace.call import Arrays, FlatStep, Mask, ScanCall, replace, select


@dataclasses.dataclass(frozen=True)
class ByIndex:
    """(operands, carry, x) -> (carry, y), of which x is the place of the step, and the leaves that a loop slices.

    Attributes:
      step: the step.
      mask: which leaves of its x are read at an index.
      arrays: these, over time.
      alongs: where time is in them.
      lengths: of sequences, None without any.
      is_cpu: whether it runs on a CPU.
    """

    step: FlatStep
    mask: Mask
    arrays: Arrays
    alongs: Sequence[Along]
    lengths: Any
    is_cpu: bool

    @property
    def x(self) -> Arrays:
        """Types of the leaves of x."""
        sliced = [leaf for leaf, is_read in zip(self.step.x, self.mask, strict=True) if not is_read]
        return [jax.typeof(jnp.int32(0)), *sliced]

    @property
    def y(self) -> Arrays:
        """Types of the leaves of y."""
        return self.step.y

    def __call__(self, operands: Arrays, carry: Arrays, x: Arrays) -> tuple[Arrays, Arrays]:
        place, *sliced = x
        read = [
            along.read(array, place, 1, self.lengths, along.is_sliced(self.is_cpu))[0]
            for array, along in zip(self.arrays, self.alongs, strict=True)
        ]
        whole: Arrays = [None] * len(self.mask)
        x = replace(whole, self.mask, read)
        return self.step(operands, carry, replace(x, [not is_read for is_read in self.mask], sliced))


def steps_of(call: ScanCall, inputs: Arrays, mask: Mask) -> tuple[FlatStep | ByIndex, Arrays]:
    """A step and what a loop slices for it, time first.

    Args:
      call: the scan.
      inputs: of the scan.
      mask: which leaves of xs to read at an index.
    """
    xs, lengths = call.step.split(inputs)[2], call.lengths_of(inputs)
    if call.length == 0:  # there is nothing to read, but a loop over no steps is traced
        mask = (False,) * len(mask)
    sliced = [not is_read for is_read in mask]
    over = [
        along.whole(leaf, lengths) for leaf, along in zip(select(xs, sliced), select(call.x_along, sliced), strict=True)
    ]
    if not any(mask):
        return call.step, over
    is_cpu = call.options.machine.is_cpu
    step = ByIndex(call.step, mask, select(xs, mask), select(call.x_along, mask), lengths, is_cpu)
    return step, [jnp.arange(call.length, dtype=jnp.int32), *over]
