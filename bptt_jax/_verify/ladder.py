"""The plans for a gradient: of the sweep, in each form of the step, and of the nest."""

from __future__ import annotations

import dataclasses
import functools

from bptt_jax._cost.cost import cost
from bptt_jax._cost.time import time_of
from bptt_jax._measure.measure import measure
from bptt_jax._step.form import Swept, sweep_forms
from bptt_jax._trace.gradient import Gradient
from bptt_jax._verify.search import Candidate
from bptt_jax.planners._make_plan import fastest_plan, smallest_plan
from bptt_jax.plans._nodes import Plan, Steps

_SHORT = 4  # a scan is short where everything kept is predicted to take at most this many times the smallest plan


@dataclasses.dataclass(frozen=True)
class Plans:
    """The plans for a gradient, by their predicted bytes: the `Ladder` of the search.

    Attributes:
      gradient: the gradient.
      host_bytes: bytes that plans may take in the host's memory.
    """

    gradient: Gradient
    host_bytes: int = 0

    @functools.cached_property
    def _forms(self) -> list[Swept]:
        options = self.gradient.call.options
        if options.lowering == "nested":
            return []
        return sweep_forms(self.gradient.call.step, self.gradient.active, options.machine)

    @property
    def _has_nest(self) -> bool:
        return not self._forms or self.gradient.call.options.lowering is None

    def within(self, bytes_: int) -> Candidate | None:
        """The fastest plan predicted to take at most `bytes_`; None if there is none.

        The nest is asked only where the sweep has no plan. It may have one, because a step without residuals needs less
        there than the sweep's loops hold.
        """
        swept = [self._within(form, bytes_) for form in self._forms]
        found = min((one for one in swept if one is not None), key=lambda one: one.predicted_time, default=None)
        return self._within(None, bytes_) if found is None and self._has_nest else found

    def last_resorts(self) -> list[Candidate]:
        """The smallest plan of each lowering and, for short scans, everything kept, by ascending predicted bytes.

        Beside the sweep's plan, the nest's is left out unless it is predicted to be smaller. It may be for a step
        without residuals, but not where XLA copies the step's outputs in the nest.
        """
        length = self.gradient.call.length
        swept = [self._smallest(form) for form in self._forms]
        found = [min(swept, key=lambda one: one.predicted_bytes)] if swept else []
        if self._has_nest:
            nest = self._smallest(None)
            found += [nest] if not found or nest.predicted_bytes < found[0].predicted_bytes else []
        everything = self.candidate(self._forms[0] if self._forms else None, Steps(length))
        if everything.predicted_bytes <= _SHORT * min(one.predicted_bytes for one in found):
            found.append(everything)
        return sorted(dict.fromkeys(found), key=lambda one: one.predicted_bytes)

    def _smallest(self, form: Swept | None) -> Candidate:
        profile, length = measure(self.gradient, form), self.gradient.call.length
        return self.candidate(form, smallest_plan(profile, length, self.host_bytes))

    def _within(self, form: Swept | None, bytes_: int) -> Candidate | None:
        plan = fastest_plan(measure(self.gradient, form), self.gradient.call.length, bytes_, self.host_bytes)
        return None if plan is None else self.candidate(form, plan)

    def candidate(self, form: Swept | None, plan: Plan) -> Candidate:
        """A plan with its predicted bytes and time."""
        profile = measure(self.gradient, form)
        return Candidate(plan, form, cost(plan, profile).peak_bytes, time_of(plan, profile))
