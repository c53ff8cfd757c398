"""A scan as `jax.lax.scan` runs it: forwards, and with all that its gradient needs where that is asked for."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from bptt_jax._step import Arrays, ScanCall


def run(call: ScanCall, inputs: Arrays) -> list[Any]:
    """The last carry and ys of a call."""
    operands, init, xs = call.step.split(inputs)

    def body(carry: Any, x: Any) -> Any:
        return call.step(operands, carry, x)

    over = [jnp.moveaxis(leaf, axis, 0) for leaf, axis in zip(xs, call.x_axes, strict=True)]
    carry, ys = lax.scan(body, list(init), over, call.length, call.reverse, call.unroll)
    return [*carry, *(jnp.moveaxis(leaf, 0, axis) for leaf, axis in zip(ys, call.y_axes, strict=True))]
