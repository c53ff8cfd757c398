"""The gradient of a scan as a value, with everything a plan depends on."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from bptt_jax._trace.active import Active, active
from bptt_jax._trace.call import Mask, ScanCall


@dataclasses.dataclass(frozen=True)
class Vmap:
    """One `jax.vmap` around a differentiated scan: every example has gradients of its own.

    Attributes:
      name: of the axis, for collectives.
      size: the number of examples.
      spmd_name: the axes of a mesh dividing the examples, as in `jax.vmap`.
      dims: the axis of the examples in each argument; None where they share it.
    """

    name: Any
    size: int
    spmd_name: Any
    dims: tuple[int | None, ...]

    def __call__(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run` for all examples, with these as the first axis of its results."""
        names = {"axis_name": self.name, "spmd_axis_name": self.spmd_name}
        return jax.vmap(run, in_axes=self.dims, axis_size=self.size, **names)

    def of_first(self, n: int) -> Vmap:
        """The same for the first n arguments only."""
        return dataclasses.replace(self, dims=self.dims[:n])


def mapped(vmaps: Sequence[Vmap], run: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one example, for all of them; the first vmap is the innermost."""
    for vmap in vmaps:
        run = vmap(run)
    return run


@dataclasses.dataclass(frozen=True)
class Gradient:
    """The gradient of a scan with respect to some of its inputs.

    Attributes:
      call: the scan.
      wrt: the mask of inputs to differentiate, over operands, carry and xs.
      types: of its inputs, for one example.
      vmaps: the vmaps around it, the innermost first.
      again: whether the forward pass runs once more, because it was mapped only after it was traced.
    """

    call: ScanCall
    wrt: Mask
    types: tuple[Any, ...]
    vmaps: tuple[Vmap, ...] = ()
    again: bool = False

    @functools.cached_property
    def active(self) -> Active:
        return active(self.call.step, self.wrt)

    @property
    def examples(self) -> int:
        """The number of examples worked on at a time."""
        return math.prod(vmap.size for vmap in self.vmaps)


def gradient_of(call: ScanCall, inputs: Sequence[Any], wrt: Mask | None = None) -> Gradient:
    """The gradient with respect to the inputs in `wrt` (None: all inputs), as far as they have one."""
    return gradient_of_types(call, tuple(map(jax.typeof, inputs)), wrt)


def gradient_of_types(call: ScanCall, types: tuple[Any, ...], wrt: Mask | None = None) -> Gradient:
    """`gradient_of` for inputs of these types."""
    asked = (True,) * len(types) if wrt is None else wrt
    found, of_carry = active(call.step, asked), call.step.split(asked)[1]
    # A leaf of the carry may be active because of other inputs, and not be differentiated itself.
    carry = (a and b for a, b in zip(found.carry, of_carry, strict=True))
    return Gradient(call, (*found.operands, *carry, *found.x), types)
