"""`jax.lax.scan` with a memory budget: exact backpropagation through time inside as many bytes as you allow.

    carry, ys = bptt_jax.scan(step, init, xs, budget="64MiB")

The call is `jax.lax.scan`, under every transformation. Its gradient keeps some carries and computes the other steps
again, as planned from the sizes of the step, and XLA's bytes are checked while it is compiled.

    scan            the call; `checkpointed` is its decorator
    linen, nnx      `RNN` and `rnn`: Flax's recurrent layers with a budget; `Stack`, `share_budget`
    explain         the plan for a scan, its bytes and its timeline; `explain_calls` reports on a model or training step
    largest_budget  the budget with which a whole training step fits on a device
    make_plan       plans from sizes alone: `profile` measures a step, `cost` counts the bytes and evaluations of a plan
    Steps, Repeat, Chain, Remat
                    the nodes of plans, to write one by hand; `plans` prints and draws them, `planners` has the paper's
    errors          BudgetError, FitError, BudgetWarning, UnverifiedWarning
    show_recomputation
                    a context in which the callbacks of `jax.debug` run again in steps computed again

`help(bptt_jax.scan)` has all options. On the command line there is `python -m bptt_jax --help`.

>>> import jax, jax.numpy as jnp
>>> from bptt_jax import scan
>>> def step(carry, x):
...     carry = jnp.tanh(0.9 * carry + x)
...     return carry, carry
>>> gradient = jax.grad(lambda xs: scan(step, jnp.zeros(64), xs, budget="60%")[1].sum())(jnp.ones((100, 64)))
>>> gradient.shape
(100, 64)
"""

import importlib
from typing import Any

from bptt_jax import errors, planners, plans
from bptt_jax._cost.cost import PlanCost, cost
from bptt_jax._explain.calls import Reports, explain_calls
from bptt_jax._explain.explain import explain, profile
from bptt_jax._explain.report import Report
from bptt_jax._options import show_recomputation
from bptt_jax._scan import checkpointed, scan
from bptt_jax._whole.largest_budget import largest_budget
from bptt_jax._whole.report import FitReport
from bptt_jax.planners import make_plan
from bptt_jax.plans._nodes import Chain, Remat, Repeat, Steps
from bptt_jax.plans._profile import StepProfile, StepTimes

__all__ = [
    "Chain",
    "FitReport",
    "PlanCost",
    "Remat",
    "Repeat",
    "Report",
    "Reports",
    "StepProfile",
    "StepTimes",
    "Steps",
    "checkpointed",
    "cost",
    "errors",
    "explain",
    "explain_calls",
    "largest_budget",
    "make_plan",
    "planners",
    "plans",
    "profile",
    "scan",
    "show_recomputation",
]


def __getattr__(name: str) -> Any:
    """Imports `bptt_jax.linen` and `bptt_jax.nnx` when they are first used, because they need Flax."""
    if name in ("linen", "nnx"):
        return importlib.import_module(f"bptt_jax.{name}")
    meant = f"; did you mean bptt_jax.errors.{name}?" if name in ("BudgetError", "BudgetWarning", "FitError") else ""
    raise AttributeError(f"module 'bptt_jax' has no attribute {name!r}{meant}")


def __dir__() -> list[str]:
    return [*__all__, "linen", "nnx"]
