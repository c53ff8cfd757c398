"""The values handed to blocks of steps: weights, sums of gradients, and arrays to write ys into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from bptt_jax._trace.call import Arrays

Gradients = dict[int, Any]  # by position among the hoisted values of a block, or among its constants


@dataclasses.dataclass(frozen=True)
class Weights:
    """The values shared by all steps.

    Attributes:
      hoisted: the values of `SplitStep.hoisted`, typed as reduced where their gradients wait (see `partial_sums`).
      constants: the constants of a step.
      typed: the constants once more, made of `hoisted` with its types.
    """

    hoisted: Arrays
    constants: Arrays
    typed: Arrays


@dataclasses.dataclass(frozen=True)
class Into:
    """Arrays into which ys are written step by step.

    Attributes:
      arrays: over all steps.
      write: (arrays, y, i) -> arrays, with the y of the i-th step of a block in the order of xs.
    """

    arrays: Arrays
    write: Callable[[Arrays, Arrays, Any], Arrays]
