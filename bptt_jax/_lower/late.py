"""Zeros that XLA cannot make before some values exist, so that they take no memory before.

XLA makes one array of plain zeros for all scans of a program, and a copy for each scan before it runs the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from bptt_jax._jaxprs.arrays import is_float, varying_axes, zeros_like
from bptt_jax._jaxprs.types import Leaf


def late_zero(*groups: Sequence[Any]) -> Any:
    """A scalar zero that needs the first value of each group; None if there are no values.

    Args:
      groups: arrays; None, empty ones and those that are not floating do not count.
    """
    values = [next((a for a in group if a is not None and is_float(a) and a.size), None) for group in groups]
    largest = [jnp.max(jnp.real(lax.stop_gradient(a))) for a in values if a is not None]
    # Nothing is greater than infinity, NaN included.
    return sum((value > jnp.inf).astype(jnp.float32) for value in largest) if largest else None


def late_zeros(leaf: Leaf, zero: Any) -> Any:
    """Zeros of the type of `leaf`, that need `zero`."""
    zeros = zeros_like(leaf)
    # A zero varying over more axes of a mesh would change the type of the zeros.
    if zero is None or varying_axes(zero) - varying_axes(zeros):
        return zeros
    return zeros + zero.astype(zeros.dtype)
