"""The cost of a plan in bytes, in evaluations of the step, and in size of the compiled program.

One recursion over the tree (`_cost/rules.py`) with two sets of rules: `_cost/nested.py` and `_cost/sweep.py`.

Recursions: Gruslys et al. (2016), eq. 1 to 4, with a tree in place of a table. Time is linear in the distinct nodes.
"""

from __future__ import annotations

import dataclasses

from bptt_jax._cost.nested import NestedRules
from bptt_jax._cost.rules import Rules
from bptt_jax._cost.sweep import SweepRules
from bptt_jax._cost.time import evaluations
from bptt_jax.plans._blocks import in_blocks
from bptt_jax.plans._nodes import Plan, brief, require_plan
from bptt_jax.plans._profile import StepProfile, require_profile


@dataclasses.dataclass(frozen=True)
class PlanCost:
    """The cost of a plan.

    Attributes:
      peak_bytes: peak temporary bytes of the backward pass, on the device.
      forward_steps: evaluations of the step, first pass and recording ones included. The backward evaluations, one
        per step, are not counted.
      program_size: copies of the step's loop in the plan; compile time grows with it, not with the length.
      host_bytes: temporary bytes in the host's memory.

    >>> from bptt_jax import StepProfile, Steps
    >>> taken = cost(Steps(10), StepProfile(carry_bytes=4, residual_bytes=8))
    >>> taken.peak_bytes, taken.forward_steps, taken.program_size
    (80, 10, 1)
    """

    peak_bytes: int
    forward_steps: int
    program_size: int
    host_bytes: int = 0
    __repr__ = brief


def cost(plan: Plan, profile: StepProfile) -> PlanCost:
    """The cost of running `plan` on a step of this profile.

    Args:
      plan: a plan of any length.
      profile: sizes of one step in bytes, made by `bptt_jax.profile` or given by hand.

    >>> from bptt_jax import Remat, Repeat, StepProfile, Steps
    >>> profile = StepProfile(carry_bytes=2, residual_bytes=12)
    >>> cost(Repeat(40, Remat(Steps(25))), profile)
    PlanCost(peak_bytes=380, forward_steps=2000, program_size=1)
    >>> cost(Repeat(40, Remat(Steps(25)), kept="host"), profile)
    PlanCost(peak_bytes=304, forward_steps=2000, program_size=1, host_bytes=80)

    Raises:
      TypeError: if `plan` is not a plan, or `profile` not a `StepProfile`.
    """
    require_plan(plan, "the plan")
    require_profile(profile)
    rules: Rules = NestedRules(profile)
    if profile.sweep is not None:
        # The sweep runs long `Steps` as loops over blocks, and its program has one body for each block in the tree.
        plan, rules = in_blocks(plan, profile.sweep.block_steps), SweepRules(profile.sweep)
    total = rules.total(plan)
    steps = evaluations(plan, profile.lowering).steps
    return PlanCost(rules.peak_bytes(plan, total), steps, total.leaves, total.host)
