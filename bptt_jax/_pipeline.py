"""The pipeline from a gradient to the way to run it: measure, plan, check, and pick the lowering."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any

import jax

from bptt_jax._budget import budget_to_bytes, is_percentage
from bptt_jax._caches import remember
from bptt_jax._cost.cost import cost
from bptt_jax._cost.time import time_of
from bptt_jax._figures import (
    ACCELERATOR_SPARE,
    CERTAINLY_FITS,
    CHECKED_BYTES,
    COUNTER_BYTES,
    ESTIMATE_MARGIN,
    LINE_BYTES,
)
from bptt_jax._jaxprs.arrays import is_unknown
from bptt_jax._lower.program import Program, program_of
from bptt_jax._measure.measure import made_bytes, measure
from bptt_jax._step.form import Swept, fastest_form, sweep_forms
from bptt_jax._trace.call import select
from bptt_jax._trace.gradient import Gradient
from bptt_jax._verify.check import CannotCompileError, check
from bptt_jax._verify.search import Candidate, Check, Verdict, verify
from bptt_jax.errors import BudgetError, BudgetWarning, UnverifiedWarning, warn
from bptt_jax.planners._make_plan import fastest_plan, shares, smallest_plan
from bptt_jax.plans._nodes import Plan, Steps
from bptt_jax.plans._nodes import length as length_of
from bptt_jax.plans._profile import StepProfile

_SHORT = 4  # a scan is short where everything kept is predicted to take at most this many times the smallest plan


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """The way to run a gradient.

    Attributes:
      gradient: the gradient.
      plan: the plan.
      form: the step as the sweep runs it; None for the nest.
      checks: the programs compiled to find the plan.
      unchecked: under a budget, the reason why there are no checks; else empty.
      plan_seconds: the time of planning, without the checks.
      warning: of a budget that is not kept, or not verified; see `told`.
    """

    gradient: Gradient
    plan: Plan
    form: Swept | None
    checks: tuple[Check, ...] = ()
    unchecked: str = ""
    plan_seconds: float = 0.0
    warning: Warning | None = None

    @functools.cached_property
    def profile(self) -> StepProfile:
        """Sizes of one step, from its shapes; made on first use, because `scan` needs none with a plan or no budget."""
        return measure(self.gradient, self.form)

    @property
    def predicted_bytes(self) -> int:
        """Peak temporary bytes of the plan, predicted from the profile."""
        return cost(self.plan, self.profile).peak_bytes

    def program(self, waits: bool = True) -> Program:
        """The program for one example, made once for each argument; see `program_of`."""
        return self._waiting if waits else self._not_waiting

    @functools.cached_property
    def _waiting(self) -> Program:
        return program_of(self.gradient, self.plan, self.form)

    @functools.cached_property
    def _not_waiting(self) -> Program:
        return program_of(self.gradient, self.plan, self.form, waits=False)


def told(choice: Choice) -> Choice:
    """A choice, with its warning given: a choice may be remembered, and each call of the user's is to hear of it."""
    if choice.warning is not None:
        warn(choice.warning)
    return choice


def choose(gradient: Gradient) -> Choice:
    """The choice for a gradient: the given plan, or the fastest for the budget, as the sweep where possible.

    Equal gradients get the same choice, because the rules of all primitives ask for it.

    Raises:
      ValueError: for a plan of another length; if the sweep is asked for and only the nest takes the step.
      BudgetError: if no plan fits the budget.
    """
    return _choose(gradient, jax.sharding.get_abstract_mesh(), jax.device_count())


@remember(256)
def _choose(gradient: Gradient, _mesh: Any, _devices: int) -> Choice:
    call = gradient.call
    plan, budget = call.options.plan, call.options.budget
    if plan is not None and length_of(plan) != call.length:
        raise ValueError(f"the plan has {length_of(plan)} steps, but the scan has {call.length}.")
    if plan is None and (budget is None or call.length == 0):
        return Choice(gradient, Steps(call.length), fastest(gradient))
    seen_through = dataclasses.replace(gradient, call=dataclasses.replace(call, step=call.step.seen_through))
    unplanned = Choice(seen_through, plan or Steps(call.length), fastest(seen_through))
    if plan is not None:
        return unplanned
    _require_known_sizes(gradient)
    asked = budget_to_bytes(budget, store_all_bytes(gradient))
    assert asked is not None
    gradient = seen_through
    left = _left(gradient, asked)
    # The estimate leaves out arrays made and dropped again within one step, so they are added.
    certain_bytes = CERTAINLY_FITS * (unplanned.predicted_bytes + 2 * made_bytes(gradient))
    if left >= max(certain_bytes, CHECKED_BYTES):
        return dataclasses.replace(unplanned, unchecked="it plainly fits")
    return _planned(gradient, asked, left)


def store_all_bytes(gradient: Gradient) -> int:
    """Predicted bytes of the gradient by `jax.lax.scan`, of the step as it is written; see `StepProfile`."""
    return measure(gradient, fastest(gradient)).store_all_bytes(gradient.call.length)


def _require_known_sizes(gradient: Gradient) -> None:
    """Raises for a budget of arrays of unknown sizes, as in `jax.export` for any batch, unless it is an estimate."""
    unknown = [str(leaf) for leaf in gradient.types if any(map(is_unknown, leaf.shape))]
    options = gradient.call.options
    if unknown and (options.verify or not is_percentage(options.budget)):
        raise ValueError(
            f"budget={options.budget!r} cannot be kept, because the sizes of {', '.join(unknown)} are not known. "
            "Give a plan, or a percentage with verify=False."
        )


def fastest(gradient: Gradient) -> Swept | None:
    """The fastest form of the step for the sweep; None for the nest."""
    options, step = gradient.call.options, gradient.call.step
    if options.lowering == "nested" or gradient.call.length == 0:
        return None
    form = fastest_form(step, gradient.active, options.machine)
    if form is None and options.lowering == "sweep":
        raise ValueError(
            'lowering="sweep" was asked for, but the step has a derivative rule of its own, or effects, that only the '
            'nest takes; use lowering=None or "nested".'
        )
    return form


def _planned(gradient: Gradient, asked: int, left: int) -> Choice:
    """The choice of the fastest plan within `left` bytes, by checks where possible."""
    start, spent, plans = time.perf_counter(), 0.0, Plans(gradient)
    warning: Warning | None = None

    def compiled(candidate: Candidate) -> Check:
        nonlocal spent
        before = time.perf_counter()
        found = check(gradient, candidate.plan, candidate.form)
        spent += time.perf_counter() - before
        return Check(candidate, found.temporary_bytes, found.seconds)

    if gradient.call.options.verify:
        try:
            verdict = verify(plans, left, compiled)
        except CannotCompileError as error:
            verdict = _estimated(plans, left, f"it cannot be compiled by itself here ({error})")
            if not is_percentage(gradient.call.options.budget):
                warning = UnverifiedWarning(gradient.call.options.budget, str(error))
    else:
        verdict = _estimated(plans, left, "verify=False")
    found, taken = verdict.best.candidate, verdict.best.measured_bytes
    if taken > left:
        if warning is not None:
            warn(warning)  # it explains an error
        warning = _refused(gradient, asked, left, verdict.best)
    seconds = time.perf_counter() - start - spent
    return Choice(gradient, found.plan, found.form, verdict.checks, verdict.unchecked, seconds, warning)


def _estimated(plans: Plans, asked: int, why: str) -> Verdict:
    """The plan chosen by predicted bytes alone, with a margin."""
    found = plans.within(int(asked / (1 + ESTIMATE_MARGIN))) or plans.last_resorts()[0]
    return Verdict(Check(found, found.predicted_bytes * (1 + ESTIMATE_MARGIN)), (), why)


def _left(gradient: Gradient, asked: int) -> int:
    """The bytes left for the checked program, out of those asked for a whole program."""
    return int((asked - _beside_bytes(gradient)) / (1 + _spare(gradient)))


def _asked(gradient: Gradient, taken: float) -> int:
    """The least budget for a program of `taken` bytes in its check: the inverse of `_left`."""
    spare = _spare(gradient)
    # With a spare, `_left` divides and rounds down: one byte more makes up for it.
    return math.ceil(taken * (1 + spare)) + (spare > 0) + _beside_bytes(gradient)


def beside_bytes(gradient: Gradient, taken: int | None) -> int:
    """The bytes counted beside a program that takes so many in its check."""
    return 0 if taken is None or gradient.call.options.budget is None else _asked(gradient, taken) - taken


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


def _refused(gradient: Gradient, asked: int, left: int, smallest: Check) -> BudgetWarning:
    """Raises for bytes, because they are a promise; a warning for a percentage, because it is a wish."""
    call, candidate, taken = gradient.call, smallest.candidate, smallest.measured_bytes
    is_refused = math.isinf(taken)  # by the compiler, so the bytes of the program are not known
    known = _asked(gradient, max(candidate.predicted_bytes, left + 1) if is_refused else taken)
    made_of = shares(measure(gradient, candidate.form), candidate.plan, known)
    error = BudgetError(call.length, call.options.budget, asked, known, made_of)
    if is_refused:
        error.add_note(
            "The compiler refuses the program of the smallest plan for its size: these bytes are an estimate."
        )
    if not is_percentage(call.options.budget):
        raise error
    return BudgetWarning(call.length, str(call.options.budget), asked, known)


@dataclasses.dataclass(frozen=True)
class Plans:
    """The plans for a gradient, by their predicted bytes: the `Ladder` of the search."""

    gradient: Gradient

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
        return self.candidate(form, smallest_plan(measure(self.gradient, form), self.gradient.call.length))

    def _within(self, form: Swept | None, bytes_: int) -> Candidate | None:
        plan = fastest_plan(measure(self.gradient, form), self.gradient.call.length, bytes_)
        return None if plan is None else self.candidate(form, plan)

    def candidate(self, form: Swept | None, plan: Plan) -> Candidate:
        """A plan with its predicted bytes and time."""
        profile = measure(self.gradient, form)
        return Candidate(plan, form, cost(plan, profile).peak_bytes, time_of(plan, profile))
