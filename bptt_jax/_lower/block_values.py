"""What blocks of steps are handed: weights, sums of gradients, and arrays to write into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from bptt_jax._trace.call import Arrays

Gradients = dict[int, Any]  # of the differentiable ones among what a block holds, or of its constants, by position


@dataclasses.dataclass(frozen=True)
class Weights:
    """The values of what does not change from step to step.

    Attributes:
      hoisted: the values of `SplitStep.hoisted`, of the types that their gradients are to have.
      constants: the constants of a step.
      typed: the constants, of the types of `hoisted` (see `partial_sums`).
    """

    hoisted: Arrays
    constants: Arrays
    typed: Arrays


@dataclasses.dataclass(frozen=True)
class Into:
    """Arrays that ys are written into step by step.

    Attributes:
      arrays: over all steps.
      write: (arrays, y, i) -> arrays, with the y of the i-th step of a block in the order of xs.
    """

    arrays: Arrays
    write: Callable[[Arrays, Arrays, Any], Arrays]
