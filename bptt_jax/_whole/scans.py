"""The differentiated scans of a traced program: their evaluations and their bytes."""

from __future__ import annotations

import dataclasses
import math

from bptt_jax._cost.cost import cost
from bptt_jax._explain.calls import called
from bptt_jax._jaxprs.types import Jaxpr
from bptt_jax._pipeline import Choice, choose, fastest
from bptt_jax._step.form import Swept
from bptt_jax.plans._nodes import Plan, Steps


@dataclasses.dataclass(frozen=True)
class Scans:
    """The differentiated scans of a program, together.

    Attributes:
      count: the number of scans.
      steps: the number of their steps.
      evaluations: evaluations of these steps under their plans, first pass included.
      temporary_bytes: of the scans, each compiled by itself, as XLA reports them; predicted where nothing was compiled.
      is_everything: whether each runs as without a budget.
      platforms: the platforms they are planned for.
      plans: the plan of each, and the form of its step; the programs of two budgets with equal ones are equal.
    """

    count: int
    steps: int
    evaluations: int
    temporary_bytes: int
    is_everything: bool
    platforms: frozenset[str]
    plans: tuple[tuple[Plan, Swept | None], ...]

    @property
    def per_step(self) -> float:
        """Evaluations of a step; 1 without steps."""
        return self.evaluations / self.steps if self.steps else 1.0


def scans_of(jaxpr: Jaxpr) -> Scans:
    """The differentiated scans of a program's jaxpr. Their plans were made when it was traced, and are remembered."""
    choices = []
    for one in called(jaxpr):
        if one.is_differentiated:
            with one.context:
                choices.append(choose(one.gradient))
    return Scans(
        count=len(choices),
        steps=sum(choice.gradient.call.length for choice in choices),
        evaluations=sum(cost(choice.plan, choice.profile).forward_steps for choice in choices),
        temporary_bytes=sum(map(_temporary_bytes, choices)),
        is_everything=all(map(_is_everything, choices)),
        platforms=frozenset(choice.gradient.call.options.machine.platform for choice in choices),
        plans=tuple((choice.plan, choice.form) for choice in choices),
    )


def _temporary_bytes(choice: Choice) -> int:
    found = math.inf if choice.own_check is None else choice.own_check.measured_bytes
    return int(found) if math.isfinite(found) else choice.predicted_bytes


def _is_everything(choice: Choice) -> bool:
    """Whether a larger budget would change nothing, for none makes a difference beside a plan of the user's."""
    options, steps = choice.gradient.call.options, choice.gradient.call.length
    if options.plan is not None or options.budget is None:
        return True
    return choice.plan == Steps(steps) and choice.form is fastest(choice.gradient)
