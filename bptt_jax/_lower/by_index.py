"""A step with some leaves of x read where they are, at an index of the whole arrays, instead of sliced by a loop.

A loop slices arrays along a leading axis of time. Arrays with time elsewhere are copied whole for it, and under vmap
other arrays are too. Differentiated arrays are not read at an index, because each step would then add to a cotangent
of the whole array.
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
    """(operands, carry, x) -> (carry, y), where x is the place of the step and the leaves sliced by a loop.

    Attributes:
      step: the step.
      mask: the leaves of its x to read at an index.
      arrays: these leaves, over time.
      alongs: the place of time in each of them.
      lengths: of sequences, None without any.
      is_cpu: whether it runs on a CPU (see `Along.is_sliced`).
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
    """A step and the arrays sliced for it by a loop, time first.

    Args:
      call: the scan.
      inputs: of the scan.
      mask: the leaves of xs to read at an index.
    """
    xs, lengths = call.step.split(inputs)[2], call.lengths_of(inputs)
    if call.length == 0:  # a loop over no steps is traced too, and has nothing to read
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
