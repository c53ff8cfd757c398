"""From a gradient that is asked for to the way to run it: measure, plan, and pick the lowering."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax

from bptt_jax._active import Active
from bptt_jax._budget import Budget, budget_to_bytes
from bptt_jax._calibrate import Calibration, calibrated, estimate, program_of
from bptt_jax._cost import cost
from bptt_jax._gradient import Gradient
from bptt_jax._lower.jaxprs import uses_16_bits
from bptt_jax._lower.swept import Swept, fastest_form, sweep_forms
from bptt_jax._measure import measure
from bptt_jax._plan import Plan, Steps
from bptt_jax._plan import length as length_of
from bptt_jax._step import ScanCall, replace, select
from bptt_jax._step_profile import StepProfile
from bptt_jax._temporaries import Program
from bptt_jax._time import time_of
from bptt_jax.errors import BudgetError
from bptt_jax.planners import make_plan


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """How a gradient is run.

    Attributes:
      gradient: which.
      plan: the plan.
      form: the step as the sweep runs it; None for the nest.
      measured: gives sizes of one step, run so, and what it took to measure them.
      plan_seconds: what planning took, without calibrating.
    """

    gradient: Gradient
    plan: Plan
    form: Swept | None
    measured: Callable[[], Calibration]
    plan_seconds: float = 0.0

    @functools.cached_property
    def calibration(self) -> Calibration:
        """What `measured` gives; with a plan or without a budget `scan` never asks for it."""
        return self.measured()

    @property
    def profile(self) -> StepProfile:
        return self.calibration.profile

    @property
    def predicted_bytes(self) -> int:
        """Peak temporary bytes by the profile."""
        return cost(self.plan, self.profile).peak_bytes

    def program(self, waits: bool = True) -> Program:
        """The program for one example; the same for the same argument. See `program_of`."""
        return self._waiting if waits else self._not_waiting

    @functools.cached_property
    def _waiting(self) -> Program:
        return program_of(self.gradient, self.plan, self.form)

    @functools.cached_property
    def _not_waiting(self) -> Program:
        return program_of(self.gradient, self.plan, self.form, waits=False)


def choose(gradient: Gradient) -> Choice:
    """How to run a gradient: the plan given, or the fastest for the budget, as the sweep where that is possible.

    The same for the same gradient: the rules of all primitives ask for it.

    Raises:
      ValueError: for a plan of another length; for the sweep where it cannot be.
      BudgetError: if no plan fits the budget.
    """
    return _choose(gradient, jax.sharding.get_abstract_mesh(), jax.device_count())


@functools.lru_cache(maxsize=256)
def _choose(gradient: Gradient, _mesh: Any, _devices: int) -> Choice:
    call = gradient.call
    plan, budget = call.options.plan, call.options.budget
    if plan is not None and length_of(plan) != call.length:
        raise ValueError(f"the plan has {length_of(plan)} steps, but the scan has {call.length}.")
    form = fastest(gradient)
    unplanned = Choice(gradient, plan or Steps(call.length), form, lambda: estimate(gradient, form))
    if plan is not None or budget is None or call.length == 0:
        return unplanned
    if not _converted(gradient) and _fits(unplanned, budget):
        return unplanned
    return _planned(gradient, budget)


def fastest(gradient: Gradient) -> Swept | None:
    """The step as the sweep runs it fastest; None for the nest."""
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


def has_vjp(call: ScanCall, active: Active) -> bool:
    """Whether a step has a reverse-mode derivative: one with a `jax.lax.while_loop` has none."""
    if call.options.lowering != "nested" and fastest_form(call.step, active, call.options.machine) is not None:
        return True
    return _has_vjp(call, active)


@functools.lru_cache(maxsize=1024)
def _has_vjp(call: ScanCall, active: Active) -> bool:
    step = call.step
    mask = (*active.operands, *active.carry, *active.x)

    def vjp(*inputs: Any) -> Any:
        def run(chosen: Any) -> Any:
            carry, y = step(*step.split(replace(inputs, mask, chosen)))
            return [*select(carry, active.carry), *select(y, active.y)]

        outs, pull = jax.vjp(run, select(inputs, mask))
        return pull(outs)

    try:
        jax.eval_shape(vjp, *step.jaxpr.in_avals)
    except (TypeError, ValueError, NotImplementedError):  # what JAX raises where there is no reverse-mode derivative
        return False
    return True


def _planned(gradient: Gradient, budget: Budget) -> Choice:
    start, calibrating = time.perf_counter(), 0.0
    errors: list[BudgetError] = []
    for form in _ways(gradient, budget):
        before = time.perf_counter()
        calibration = calibration_of(gradient, form)
        calibrating += time.perf_counter() - before
        try:
            plan = make_plan(calibration.profile, gradient.call.length, budget)
        except BudgetError as error:
            errors.append(error)
            continue
        seconds = time.perf_counter() - start - calibrating
        return Choice(gradient, plan, form, functools.partial(_already, calibration), seconds)
    raise min(errors, key=lambda error: error.smallest_bytes)


def _converted(gradient: Gradient) -> bool:
    """Whether arrays take what their types do not say: on a TPU, and where a step computes in 16 bits, in float32."""
    return gradient.call.options.machine.platform == "tpu" or uses_16_bits(gradient.call.step.jaxpr.jaxpr)


# Estimates of what keeps everything were seen to be a quarter too low, without their margin: of products with a weight
# and with its transpose, of rows wider than the carry.
_CERTAINLY = 1.5


def _fits(choice: Choice, budget: Budget) -> bool:
    """Whether a choice is so far within its budget by the estimate that nothing need be compiled to know it."""
    budget_bytes = budget_to_bytes(budget, choice.profile.store_all_bytes(length_of(choice.plan)))
    return budget_bytes is None or _CERTAINLY * choice.predicted_bytes <= budget_bytes


def _already(calibration: Calibration) -> Calibration:
    return calibration


def calibration_of(gradient: Gradient, form: Swept | None) -> Calibration:
    """The calibrated profile, or the estimate where calibrating is switched off."""
    return calibrated(gradient, form) if gradient.call.options.calibrate else estimate(gradient, form)


def _ways(gradient: Gradient, budget: Budget) -> list[Swept | None]:
    """Forms of the step: the one that looks fastest first, those that do not seem to fit last, and then the nest.

    A step that keeps nothing for its backward needs less in the nest than the sweep's loops hold.
    """
    options = gradient.call.options
    known = [] if options.lowering == "nested" else sweep_forms(gradient.call.step, gradient.active, options.machine)
    times: dict[Swept, float] = {}
    for form in known:
        profile = measure(gradient, form)
        try:
            times[form] = time_of(make_plan(profile, gradient.call.length, budget), profile)
        except BudgetError:
            continue
    # What holds least comes last among the forms, and is the first to try of those that do not seem to fit.
    order = [*sorted(times, key=times.__getitem__), *(form for form in reversed(known) if form not in times)]
    # On a TPU the copies that a nest makes of padded slices are not foreseen.
    with_nest = not known or (options.machine.platform != "tpu" and options.lowering is None)
    return [*order, None] if with_nest else [*order]
