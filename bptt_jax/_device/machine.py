"""A machine as a value: the bytes of arrays on it, and decisions on products, blocks and loops by their sizes.

Inside a loop, a weight is read from a cache at each step, and its gradient is summed there. This is cheap while the
weight is small against the bytes of a product outside the loop: these are written and read again for each step.
`bptt_jax/_figures.py` has the times with each decision forced both ways. On accelerators launches dominate, so fewer
are better in any case.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax._figures import (
    ACCELERATOR,
    BYTES_TO_ADD,
    CPU,
    HOST_BYTES,
    LARGE_STEP,
    MOST_EQUATIONS,
    MOST_TOGETHER,
    SHORTEST_BLOCK,
    DeviceFigures,
)
from bptt_jax._jaxprs.arrays import counted, explicit_sharding, is_float
from bptt_jax._jaxprs.types import Device, Leaf


@dataclasses.dataclass(frozen=True)
class Machine:
    """The device for which decisions are made; hashable, because it is part of the keys of caches.

    Attributes:
      platform: "cpu", "gpu", "tpu", ...
      device: the device to compile for, where it is not the default backend; else None.
    """

    platform: str
    device: Any = None

    @property
    def is_cpu(self) -> bool:
        return self.platform == "cpu"

    @property
    def _figures(self) -> DeviceFigures:
        return CPU if self.is_cpu else ACCELERATOR

    @property
    def packs(self) -> bool:
        """Whether the values that a step saves are written as one array: where each write is a kernel.

        A TPU runs a loop's body as one program, and a CPU has no launches.
        """
        return self.platform not in ("cpu", "tpu")

    def widens(self, leaf: Leaf) -> bool:
        """Whether XLA keeps an array as float32 in a program's loops: on CPU, those of bfloat16 or float8."""
        return self.is_cpu and (leaf.dtype == jnp.bfloat16 or (is_float(leaf) and leaf.dtype.itemsize == 1))

    def type_bytes(self, leaf: Leaf) -> int:
        """Bytes on one device of an array, a tracer, a type or a shape; a PRNG key counts as its data."""
        sharding = explicit_sharding(leaf)
        shape = counted(leaf.shape if sharding is None else sharding.shard_shape(leaf.shape))
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, leaf.dtype))
            return int(leaf.size * leaf.dtype.itemsize)
        if self.platform == "tpu":
            shape = _in_tiles(shape)
        return int(math.prod(shape) * (4 if self.widens(leaf) else leaf.dtype.itemsize))

    def nbytes(self, leaves: Iterable[Any]) -> int:
        """Bytes of all the leaves."""
        return sum(map(self.type_bytes, leaves))

    def bytes_of(self, atoms: Iterable[Any]) -> int:
        """Bytes of the values of a jaxpr's variables."""
        return self.nbytes(atom.aval for atom in atoms)

    def narrowing_bytes(self, leaves: Iterable[Any]) -> int:
        """Bytes for handing arrays from one loop to another: XLA rounds its widened ones back, one array at a time."""
        return max((self.type_bytes(leaf) // 2 for leaf in leaves if self.widens(leaf)), default=0)

    def deferring_pays(self, weight_bytes: int, stacked_bytes: int) -> bool:
        """Whether the gradient of a weight is better computed once for a block than summed at each step.

        Args:
          weight_bytes: bytes of the weight.
          stacked_bytes: the bytes written for each step and read again, beyond those stacked anyway.
        """
        here = self._figures
        # A sum reads and writes the gradient at each step, by one more kernel; stacked bytes are written and read.
        return 2 * weight_bytes + here.launch_bytes >= 2 * here.stacking * stacked_bytes

    def hoisting_pays(self, weight_bytes: int, stacked_bytes: int) -> bool:
        """Whether a product of x with a weight is better evaluated once for a block than at each step.

        On CPU it pays where a weight has several times the bytes of a product's result and operand. For example, the
        scan takes 0.6 to 0.9 of the time at batch 1, and a tenth more at batch 64 and width 64.
        """
        here = self._figures
        return 2 * weight_bytes + here.launch_bytes >= 2 * here.hoisting * stacked_bytes

    def merging_pays(self, flops: int, rows: int) -> bool:
        """Whether products of `flops` operations each, with an operand of `rows` rows in common, run better as one."""
        return flops <= self._figures.merged_flops or rows >= self._figures.merged_rows

    def steps_together(self, step_bytes: int, equations: int) -> int:
        """The most steps in an iteration of a loop: several on accelerators, where launches outlast small steps.

        On CPU a loop takes as long as its instructions, so there is one.

        Args:
          step_bytes: bytes moved by a step.
          equations: of a step.
        """
        if self.is_cpu or step_bytes > LARGE_STEP * self._figures.launch_bytes:
            return 1
        return max(1, min(MOST_TOGETHER, MOST_EQUATIONS // max(equations, 1)))

    def transfer(self, step_bytes: int) -> float:
        """The time to move a byte between the device and the host, in evaluations of a step that moves `step_bytes`."""
        return min(1.0, LARGE_STEP * self._figures.launch_bytes / max(step_bytes, 1)) / HOST_BYTES

    def block_steps(self, step_bytes: int, gradient_bytes: int) -> int:
        """The length of a block, in steps of `step_bytes` bytes each.

        A block should fit in the cache, unless it is little work beside adding its gradients of `gradient_bytes`.
        """
        here = self._figures
        fitting = max(here.cache_bytes, BYTES_TO_ADD * gradient_bytes) // max(step_bytes, 1)
        return max(SHORTEST_BLOCK, min(here.longest_block, fitting))


def _in_tiles(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an array in a TPU's memory: the last axis in lanes of 128, the axis before it in rows of 8.

    >>> _in_tiles((2, 12, 4)), _in_tiles((64,)), _in_tiles(())
    ((2, 16, 128), (8, 128), ())
    """
    if not shape:
        return ()
    rows, lanes = (1, *shape)[-2:]
    return (*shape[:-2], 8 * -(-rows // 8), 128 * -(-lanes // 128))


def machine_for(target: Device = None) -> Machine:
    """The machine of a device to compile for; with None, of the default backend.

    >>> machine_for(jax.devices("cpu")[0]).platform
    'cpu'
    """
    return Machine(jax.default_backend() if target is None else str(target.platform), target)
