"""Scans in JAX's own equations, because JAX lets only these have effects on references, or callbacks with results."""

from __future__ import annotations

from typing import Any

from bptt_jax._lower import plain
from bptt_jax._lower.nested import Nested
from bptt_jax._pipeline import choose
from bptt_jax._step.form import has_vjp
from bptt_jax._trace.call import Arrays, ScanCall
from bptt_jax._trace.gradient import gradient_of


def run_now(call: ScanCall, inputs: Arrays) -> list[Any]:
    """The results of a call, in JAX's own equations.

    With a plan or a budget, the nest runs it, planned at once for gradients of all inputs. Without gradients, because
    results of callbacks have none, every program keeps the budget.
    """
    if call.options.plan is None and call.options.budget is None:
        return plain.run(call, inputs)
    gradient = gradient_of(call, inputs)
    if call.options.plan is None and not has_vjp(call, gradient.active):
        return plain.run(call, inputs)
    return Nested(call, gradient.wrt, choose(gradient).plan, gradient.active).evaluate(inputs)
