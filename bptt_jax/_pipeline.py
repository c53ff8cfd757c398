"""The pipeline from a gradient to the way to run it: measure, plan, check, and pick the lowering."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax

from bptt_jax._budget import budget_to_bytes, is_percentage
from bptt_jax._caches import remember
from bptt_jax._cost.cost import cost
from bptt_jax._figures import (
    CERTAINLY_FITS,
    CHECKED_BYTES,
    ESTIMATE_MARGIN,
)
from bptt_jax._jaxprs.arrays import is_unknown
from bptt_jax._lower.program import Program, program_of
from bptt_jax._measure.measure import made_bytes, measure
from bptt_jax._step.form import Swept, fastest_form
from bptt_jax._trace.gradient import Gradient
from bptt_jax._verify.beside import asked_for, left_for_check
from bptt_jax._verify.check import CannotCompileError, check
from bptt_jax._verify.ladder import Plans
from bptt_jax._verify.search import Candidate, Check, Verdict, verify
from bptt_jax.errors import BudgetError, BudgetWarning, UnverifiedWarning, warn
from bptt_jax.planners._make_plan import shares
from bptt_jax.plans._memories import host_loops
from bptt_jax.plans._nodes import Plan, Remat, Steps
from bptt_jax.plans._nodes import length as length_of
from bptt_jax.plans._notation import notation
from bptt_jax.plans._profile import StepProfile

_FEWER = (0.9, 0.5, 0.0)  # shares of the host's bytes to plan for next, where they were exceeded


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

    @property
    def own_check(self) -> Check | None:
        """The check of the plan; None where it was not compiled for one."""
        ran = self.plan, self.form
        return next((one for one in self.checks if (one.candidate.plan, one.candidate.form) == ran), None)

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
        _require_kept(unplanned)
        return unplanned
    _require_known_sizes(gradient)
    asked, on_host = _asked(gradient)
    gradient = seen_through
    left = left_for_check(gradient, asked)
    # The estimate leaves out arrays made and dropped again within one step, so they are added.
    certain_bytes = CERTAINLY_FITS * (unplanned.predicted_bytes + 2 * made_bytes(gradient))
    if left >= max(certain_bytes, CHECKED_BYTES):
        return dataclasses.replace(unplanned, unchecked="it plainly fits")
    return _planned(gradient, asked, left, on_host)


def _require_kept(choice: Choice) -> None:
    """Raises for a plan with residuals on the host, if it runs as a nest: this leaves residuals to JAX."""
    kept = [loop for loop in host_loops(choice.plan) if not isinstance(loop.child, Remat)]
    if choice.form is None and kept:
        raise ValueError(
            f"the plan {notation(choice.plan)} keeps residuals on the host, and the nest of jax.checkpoint, which runs "
            "this step, can keep carries there only: for example, 10@[5] in place of 10@5."
        )


def _asked(gradient: Gradient) -> tuple[int, int]:
    """The bytes asked for on the device and on the host; a CPU has one memory for both."""
    options, everything = gradient.call.options, store_all_bytes(gradient)
    on_device, on_host = budget_to_bytes(options.budget, everything), budget_to_bytes(options.host_budget, everything)
    assert on_device is not None
    return (on_device, on_host or 0) if options.may_use_host else (on_device + (on_host or 0), 0)


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


def _planned(gradient: Gradient, asked: int, left: int, on_host: int) -> Choice:
    """The choice of the fastest plan within `left` bytes, and `on_host` on the host, by checks where possible."""
    start, spent = time.perf_counter(), 0.0
    warning: Warning | None = None
    plans = Plans(gradient, on_host)

    def compiled(candidate: Candidate) -> Check:
        nonlocal spent
        before = time.perf_counter()
        found = check(gradient, candidate.plan, candidate.form)
        spent += time.perf_counter() - before
        return Check(candidate, found.temporary_bytes, found.seconds, found.host_bytes)

    if gradient.call.options.verify:
        try:
            verdict = _verified(plans, left, compiled)
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


def _verified(plans: Plans, left: int, compiled: Callable[[Candidate], Check]) -> Verdict:
    """The verdict of the search; where the host's bytes were exceeded, of another for plans with fewer there.

    The last search is for plans without the host; bytes that a step puts there by itself are not counted.
    """
    verdict = verify(plans, left, compiled)
    for share in _FEWER:
        if verdict.best.host_bytes <= plans.host_bytes:
            break
        fewer = dataclasses.replace(plans, host_bytes=int(plans.host_bytes * share))
        verdict = verify(fewer, left, compiled)
    return verdict


def _estimated(plans: Plans, asked: int, why: str) -> Verdict:
    """The plan chosen by predicted bytes alone, with a margin."""
    found = plans.within(int(asked / (1 + ESTIMATE_MARGIN))) or plans.last_resorts()[0]
    return Verdict(Check(found, found.predicted_bytes * (1 + ESTIMATE_MARGIN)), (), why)


def _refused(gradient: Gradient, asked: int, left: int, smallest: Check) -> BudgetWarning:
    """Raises for bytes, because they are a promise; a warning for a percentage, because it is a wish."""
    call, candidate, taken = gradient.call, smallest.candidate, smallest.measured_bytes
    is_refused = math.isinf(taken)  # by the compiler, so the bytes of the program are not known
    known = asked_for(gradient, max(candidate.predicted_bytes, left + 1) if is_refused else taken)
    made_of = shares(measure(gradient, candidate.form), candidate.plan, known)
    # On CPU the bytes asked for are of both budgets.
    host_budget = None if call.options.may_use_host else call.options.host_budget
    error = BudgetError(call.length, call.options.budget, asked, known, made_of, host_budget)
    if is_refused:
        error.add_note(
            "The compiler refuses the program of the smallest plan for its size: these bytes are an estimate."
        )
    if not is_percentage(call.options.budget):
        raise error
    return BudgetWarning(call.length, str(call.options.budget), asked, known, host_budget)
