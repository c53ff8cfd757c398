"""From a traced scan and a budget to the way to run it: measure, plan, and pick the lowering."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax

from bptt_jax._budget import budget_to_bytes
from bptt_jax._calibrate import Calibration, calibrated, estimate, lower
from bptt_jax._cost import cost
from bptt_jax._free_bytes import free_bytes
from bptt_jax._lower.block_sizes import styles
from bptt_jax._lower.jaxprs import uses_16_bits
from bptt_jax._lower.nested import Run
from bptt_jax._lower.roofline import planning_for, platform
from bptt_jax._lower.style import FASTEST, Style
from bptt_jax._measure import lowering_of, measure
from bptt_jax._plan import Plan, Steps
from bptt_jax._plan import length as length_of
from bptt_jax._step import FlatStep, TracedScan
from bptt_jax._step_profile import Lowering, StepProfile
from bptt_jax._time import time_of
from bptt_jax.errors import BudgetError
from bptt_jax.planners import make_plan

Budget = int | str | None


@dataclasses.dataclass(frozen=True)
class Options:
    """What `scan` is asked for, beside the step and its arguments; see there.

    Attributes:
      target: the device that is compiled for; None for the default backend.
    """

    budget: Budget = None
    plan: Plan | None = None
    differentiation: str = "reverse"
    calibrate: bool = True
    target: Any = None

    @property
    def platform(self) -> str | None:
        return None if self.target is None else str(self.target.platform)


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a scan is run.

    Attributes:
      plan: the plan.
      lowering: what runs it.
      style: for the sweep, how blocks take their products.
      measured: gives sizes of one step, run so, and what it took to measure them.
      budget: what was asked; "auto" as the bytes that it stands for.
      plan_seconds: what planning took, without calibrating.
    """

    plan: Plan
    lowering: Lowering
    style: Style
    measured: Callable[[], Calibration]
    budget: Budget = None
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

    def program(self, step: FlatStep, reverse: bool, unroll: int | bool) -> Run:
        """The program, jitted; the same function for the same arguments."""
        return _program(step, self.plan, self.lowering, self.style, reverse, unroll, platform())


# Typed, for unroll=True and unroll=1 are equal and differ; bounded, for a step that is made anew for each call never
# asks for the same program twice. Jitted, so that calls outside jit compile once. The platform is what decisions within
# are for.
@functools.lru_cache(maxsize=256, typed=True)
def _program(
    step: FlatStep, plan: Plan, lowering: Lowering, style: Style, reverse: bool, unroll: int | bool, _platform: str
) -> Run:
    return jax.jit(lower(plan, step, lowering, style, reverse, unroll))


def choose(traced: TracedScan, options: Options) -> Choice:
    """How to run a scan: the plan given, or the fastest for the budget, as the sweep where that is possible.

    Only the way that looks fastest by the estimates is calibrated, unless it turns out not to fit.

    Raises:
      ValueError: for a plan of another length.
      BudgetError: if no plan fits the budget.
    """
    plan, budget = options.plan, options.budget
    if plan is not None and length_of(plan) != traced.length:
        raise ValueError(f"the plan has {length_of(plan)} steps, but the scan has {traced.length}.")

    def estimated() -> Calibration:
        with planning_for(options.platform):
            return estimate(traced, lowering, FASTEST)

    with planning_for(options.platform):
        lowering = lowering_of(traced, options.differentiation)
        budget = free_bytes(options.target) if budget == "auto" else budget
        unplanned = Choice(plan or Steps(traced.length), lowering, FASTEST, estimated, budget)
        if plan is not None or budget is None or traced.length == 0:
            return unplanned
        if not _converted(traced) and _fits(unplanned):
            return unplanned
        start, calibrating = time.perf_counter(), 0.0
        errors: list[BudgetError] = []
        for tried, style in _ways(traced, lowering, budget):
            before = time.perf_counter()
            calibration = calibration_of(traced, tried, style, options)
            calibrating += time.perf_counter() - before
            try:
                plan = make_plan(calibration.profile, traced.length, budget)
            except BudgetError as error:
                errors.append(error)
                continue
            seconds = time.perf_counter() - start - calibrating
            return Choice(plan, tried, style, _already(calibration), budget, seconds)
    raise min(errors, key=lambda error: error.smallest_bytes)


def _converted(traced: TracedScan) -> bool:
    """Whether arrays take what their types do not say: on a TPU, and where a step computes in 16 bits, in float32."""
    return platform() == "tpu" or uses_16_bits(traced.step.jaxpr.jaxpr)


# Estimates of what keeps everything were seen to be a quarter too low, without their margin: of products with a weight
# and with its transpose, of rows wider than the carry.
_CERTAINLY = 1.5


def _fits(choice: Choice) -> bool:
    """Whether a choice is so far within its budget by the estimate that nothing need be compiled to know it."""
    budget_bytes = budget_to_bytes(choice.budget, choice.profile.store_all_bytes(length_of(choice.plan)))
    return budget_bytes is None or _CERTAINLY * choice.predicted_bytes <= budget_bytes


def _already(calibration: Calibration) -> Callable[[], Calibration]:
    return lambda: calibration


def calibration_of(traced: TracedScan, lowering: Lowering, style: Style, options: Options) -> Calibration:
    """The calibrated profile, or the estimate where calibrating is switched off."""
    if options.calibrate:
        return calibrated(traced, lowering, style, options.target)
    return estimate(traced, lowering, style)


def _ways(traced: TracedScan, lowering: Lowering, budget: Budget) -> list[tuple[Lowering, Style]]:
    """Lowerings and styles: the one that looks fastest first, those that do not seem to fit last, and then the nest.

    A step that keeps nothing for its backward needs less in the nest than the sweep's loops hold.
    """
    if lowering == "nested":
        return [("nested", FASTEST)]
    times: dict[Style, float] = {}
    known = styles(traced.step)
    for style in known:
        profile = measure(traced, "sweep", style)
        try:
            times[style] = time_of(make_plan(profile, traced.length, budget), profile)
        except BudgetError:
            continue
    # What holds least comes last among the styles, and is the first to try of those that do not seem to fit.
    order = [*sorted(times, key=times.__getitem__), *(style for style in reversed(known) if style not in times)]
    # On a TPU the copies that a nest makes of padded slices are not foreseen.
    nest: list[tuple[Lowering, Style]] = [] if platform() == "tpu" else [("nested", FASTEST)]
    return [*(("sweep", style) for style in order), *nest]
