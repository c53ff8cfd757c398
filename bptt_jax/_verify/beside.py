"""From a budget for a whole program to the bytes of the checked one, which has the gradient of a scan alone."""

from __future__ import annotations

import math

from bptt_jax._figures import ACCELERATOR_SPARE, COUNTER_BYTES, LINE_BYTES
from bptt_jax._trace.call import select
from bptt_jax._trace.gradient import Gradient


def left_for_check(gradient: Gradient, asked: int) -> int:
    """The bytes left for the checked program, out of those asked for a whole program."""
    return int((asked - _beside_bytes(gradient)) / (1 + _spare(gradient)))


def asked_for(gradient: Gradient, taken: float) -> int:
    """The least budget for a program of `taken` bytes in its check: the inverse of `left_for_check`."""
    spare = _spare(gradient)
    # With a spare, `left_for_check` divides and rounds down: one byte more makes up for it.
    return math.ceil(taken * (1 + spare)) + (spare > 0) + _beside_bytes(gradient)


def beside_bytes(gradient: Gradient, taken: int | None) -> int:
    """The bytes counted beside a program that takes so many in its check."""
    return 0 if taken is None or gradient.call.options.budget is None else asked_for(gradient, taken) - taken


def _spare(gradient: Gradient) -> float:
    return 0.0 if gradient.call.options.machine.is_cpu else ACCELERATOR_SPARE


def _beside_bytes(gradient: Gradient) -> int:
    """Bytes held by a whole program, with a loss in it, beside the checked one.

    The last carry and its cotangent are no temporaries in the check, because there they are a result and an argument.
    The counters are of the loops of a forward pass run once more.
    """
    step, machine = gradient.call.step, gradient.call.options.machine
    carry = select(step.split(step.jaxpr.in_avals)[1], gradient.active.carry)
    of_example = sum(max(machine.type_bytes(leaf), LINE_BYTES) for leaf in carry)
    return 2 * (gradient.examples * of_example + COUNTER_BYTES * gradient.again)
