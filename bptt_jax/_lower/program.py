"""A plan for a gradient as a program, by one of the two lowerings."""

from __future__ import annotations

from typing import Any, Protocol

from bptt_jax._lower.nested import Nested
from bptt_jax._lower.sweep import Sweep
from bptt_jax._step.form import Swept
from bptt_jax._trace.call import Arrays
from bptt_jax._trace.gradient import Gradient
from bptt_jax.plans._nodes import Plan


class Program(Protocol):
    """A plan, run by one of the lowerings."""

    def forward(self, inputs: Arrays) -> tuple[list[Any], list[Any]]:
        """(last carry and ys, the arrays kept for `backward`)."""

    def kept(self, inputs: Arrays) -> list[Any]:
        """The second result of `forward`."""

    def backward(self, inputs: Arrays, saved: Arrays, cotangents: Arrays) -> list[Any]:
        """The gradients of the differentiated inputs; None where one is zero."""


def program_of(gradient: Gradient, plan: Plan, form: Swept | None, waits: bool = True) -> Program:
    """The program of `plan` for one example.

    Args:
      gradient: the gradient.
      plan: a plan for all its steps.
      form: the step as the sweep runs it; None for the nest.
      waits: whether sums over devices may wait; see `Sweep`.
    """
    call = gradient.call
    if form is None:
        return Nested(call, gradient.wrt, plan, gradient.active, bool(gradient.vmaps))
    return Sweep(call, gradient.wrt, plan, form, waits and not gradient.vmaps)
