"""The values that a step saves, packed for the loop that stacks them: one write at each step instead of seven.

On a GPU each write is a kernel. Values of one type become one array with a new first axis, which no mesh divides. XLA
makes one kernel of the stacking and the write. Values read for a whole block at once stay apart, because a product
reads contiguous arrays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax._jaxprs.equations import variables
from bptt_jax._step.vjp import StepVjp
from bptt_jax._trace.call import Arrays


class Packing:
    """How the values saved by a step are handed from one loop to another.

    Args:
      vjp: the step with its backward.
    """

    def __init__(self, vjp: StepVjp):
        features = vjp.invars[3]
        # Features are stacked before the loop.
        self.from_loop: list[Any] = [v for v in vjp.saved if v not in features]
        self._saved, self._features = vjp.saved, [v for v in vjp.saved if v in features]
        self._groups = _groups(self.from_loop, vjp) if vjp.parts.machine.packs else [[v] for v in self.from_loop]

    @property
    def n_arrays(self) -> int:
        """The number of arrays kept for a block."""
        return len(self._features) + len(self._groups)

    def pack(self, values: Arrays) -> Arrays:
        """The arrays to stack for a step, from the values of `from_loop`."""
        value_of = dict(zip(self.from_loop, values, strict=True))
        return [
            value_of[group[0]] if len(group) == 1 else jnp.stack([value_of[v] for v in group]) for group in self._groups
        ]

    def kept(self, features: dict[Any, Any], stacks: Arrays) -> Arrays:
        """The arrays kept for a block: saved features, and the stacks of `pack`."""
        return [*(features[v] for v in self._features), *stacks]

    def unpack(self, kept: Arrays, of_block: bool = False) -> Arrays:
        """The values of `StepVjp.saved` from the arrays of a step; with `of_block`, of all steps of a block.

        Packed values are handed out for single steps only: for a block they would be copies, so they are None.
        """
        n = len(self._features)
        found = dict(zip(self._features, kept[:n], strict=True))
        for group, array in zip(self._groups, kept[n:], strict=True):
            parts = [array] if len(group) == 1 else [None] * len(group) if of_block else list(array)
            found |= zip(group, parts, strict=True)
        return [found[v] for v in self._saved]


def _groups(from_loop: Sequence[Any], vjp: StepVjp) -> list[list[Any]]:
    apart = set(variables(v for v in vjp.lefts if v is not None))
    groups = defaultdict(list)
    for v in from_loop:
        is_apart = v in apart or jnp.issubdtype(v.aval.dtype, jax.dtypes.extended)
        groups[v if is_apart else str(v.aval)].append(v)  # a type's text has its sharding and varying axes
    return list(groups.values())
