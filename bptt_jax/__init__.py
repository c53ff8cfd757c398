"""`jax.lax.scan` with a memory budget: exact backpropagation through time inside as many bytes as you allow."""

import importlib
from typing import Any

from bptt_jax import errors, planners, plans
from bptt_jax._cost.cost import PlanCost, cost
from bptt_jax._explain.calls import Reports, explain_calls
from bptt_jax._explain.explain import explain, profile
from bptt_jax._explain.report import Report
from bptt_jax._options import show_recomputation
from bptt_jax._scan import checkpointed, scan
from bptt_jax.planners import make_plan
from bptt_jax.plans._nodes import Chain, Remat, Repeat, Steps
from bptt_jax.plans._profile import StepProfile, StepTimes

__all__ = [
    "Chain",
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
    meant = f"; did you mean bptt_jax.errors.{name}?" if name in ("BudgetError", "BudgetWarning") else ""
    raise AttributeError(f"module 'bptt_jax' has no attribute {name!r}{meant}")


def __dir__() -> list[str]:
    return [*__all__, "linen", "nnx"]
