"""`explain`: what a budget buys. The plan, its predicted bytes, and those that XLA reports for the compiled program."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax._budget import Budget, budget_to_bytes
from bptt_jax._calibrate import calibrated, estimate
from bptt_jax._choose import calibration_of, choose, fastest
from bptt_jax._cost import PlanCost, cost
from bptt_jax._free_bytes import free_bytes
from bptt_jax._gradient import Gradient, gradient_of
from bptt_jax._lower.block_sizes import BlockSummary, summary
from bptt_jax._options import Lowering, checked_options
from bptt_jax._plan import Plan
from bptt_jax._plan import length as length_of
from bptt_jax._render import render
from bptt_jax._step import Step, trace
from bptt_jax._step_profile import StepProfile
from bptt_jax._temporaries import temporaries_of_gradient
from bptt_jax.errors import format_bytes

_BACKWARD_TIME = 2.0  # of one step, in evaluations of the step


@dataclasses.dataclass(frozen=True)
class Effort:
    """Seconds that the first call takes before it runs, and the later ones do not.

    Attributes:
      plan_seconds: measuring the step and planning.
      calibrate_seconds: compiling the small programs that the profile was corrected by, once in a process.
      programs: how many; 0 where the call plans from an estimate, or does not plan.
      compile_seconds: compiling the vjp of the scan itself.
    """

    plan_seconds: float
    calibrate_seconds: float
    programs: int
    compile_seconds: float

    def __str__(self) -> str:
        parts = [f"planning {self.plan_seconds:.2f} s"]
        if self.programs:
            parts.append(f"calibrating {self.calibrate_seconds:.2f} s ({self.programs} programs, once)")
        return ", ".join([*parts, f"compiling {self.compile_seconds:.2f} s"])


@dataclasses.dataclass(frozen=True)
class Report:
    """What a scan under a budget takes, as `explain` finds it. `str(report)` is a table and a timeline.

    >>> import jax.numpy as jnp
    >>> report = explain(lambda c, x: (jnp.sin(c) * x, None), jnp.ones(64), jnp.ones((100, 64)))
    >>> report.budget_bytes is None, report.forward_steps, report.overhead
    (True, 100, 1.0)

    Attributes:
      plan: the plan that runs.
      profile: sizes of one step.
      budget_bytes: the budget in bytes, None without one.
      predicted_bytes: peak temporary bytes of the backward pass by the profile.
      measured_bytes: `temp_size_in_bytes` that XLA reports for the jitted vjp over (params, init, xs).
      store_all_bytes: predicted bytes of `jax.lax.scan`'s own vjp.
      forward_steps: evaluations of the step, first pass included.
      program_size: copies of the step's loop in the plan.
      block: for the sweep, what is done by block and what by step; None for the nest.
      effort: what planning and compiling took; None for a report put together by hand.
      calibration_programs: how many programs the profile was corrected by; 0 where it is an estimate from the shapes.
        A plan that is given is predicted by a calibrated profile, though the call itself does not calibrate.
      overhead: predicted time over that of keeping everything, backward = 2 forwards.
    """

    plan: Plan
    profile: StepProfile
    budget_bytes: int | None
    measured_bytes: int
    block: BlockSummary | None = None
    effort: Effort | None = None
    calibration_programs: int = 0

    @property
    def _cost(self) -> PlanCost:
        return cost(self.plan, self.profile)

    @property
    def predicted_bytes(self) -> int:
        return self._cost.peak_bytes

    @property
    def store_all_bytes(self) -> int:
        return self.profile.store_all_bytes(length_of(self.plan))

    @property
    def forward_steps(self) -> int:
        return self._cost.forward_steps

    @property
    def program_size(self) -> int:
        return self._cost.program_size

    @property
    def overhead(self) -> float:
        steps = length_of(self.plan)
        if steps == 0:
            return 1.0
        return (self.forward_steps / steps + _BACKWARD_TIME) / (1 + _BACKWARD_TIME)

    def _block_rows(self) -> list[tuple[str, str]]:
        """What the sweep does outside the loop over steps."""
        if self.block is None:
            return [("lowering", "nested checkpoints")]
        rows = [
            ("products of x, by block", self.block.hoisted),
            ("weight gradients, by block", self.block.deferred),
            ("gradients summed by step", self.block.in_loop),
            ("products merged", ("yes",) if self.block.merged else ()),
            ("products in turn", ("yes",) if self.block.in_turn else ()),
        ]
        lowering = ("lowering", f"sweep, blocks of at most {self.profile.block_steps} steps")
        return [lowering, *((name, ", ".join(values)) for name, values in rows if values)]

    @property
    def _source(self) -> str:
        """Where the prediction comes from."""
        programs = self.calibration_programs
        source = f"calibrated by {programs} programs" if programs else "estimated from shapes"
        return f"{source}, with a margin of {self.profile.margin:.0%}"

    @property
    def _verdict(self) -> str:
        """What is wrong with the measured bytes, if anything is."""
        if self.budget_bytes is not None and self.measured_bytes > self.budget_bytes:
            return "  OVER THE BUDGET"
        return "  above the prediction" if self.measured_bytes > self.predicted_bytes else ""

    def __str__(self) -> str:
        steps = length_of(self.plan)
        budget = "none" if self.budget_bytes is None else _bytes(self.budget_bytes)
        rows = [
            ("budget", budget),
            ("predicted by the profile", f"{_bytes(self.predicted_bytes)}, {self._source}"),
            ("measured by XLA", _bytes(self.measured_bytes) + self._verdict),
            ("keeping everything", _bytes(self.store_all_bytes)),
            ("one carry", _bytes(self.profile.carry_bytes)),
            ("residuals of one step", _bytes(self.profile.residual_bytes)),
            ("parameters", _bytes(self.profile.param_bytes)),
            ("forward steps", f"{self.forward_steps:,} for {steps:,}"),
            ("predicted time", f"{self.overhead:.2f} of keeping everything"),
            ("step loops in the program", f"{self.program_size}"),
            *self._block_rows(),
            *([] if self.effort is None else [("the first call", str(self.effort))]),
        ]
        table = "\n".join(f"{name:<26} {value}" for name, value in rows)
        return f"{table}\n\n{render(self.plan, lowering=self.profile.lowering)}"


def explain(
    f: Step,
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    budget: Budget = None,
    plan: Plan | None = None,
    lowering: Lowering | None = None,
    calibrate: bool = True,
    target: Any = None,
) -> Report:
    """What `scan` with the same arguments does, compiled but not run.

    Compiles the gradient of the scan with respect to its parameters, `init` and `xs`, for arguments of their shapes,
    and reads the bytes that XLA reports. This takes as long as compiling the scan itself.

    Args: as for `bptt_jax.scan`; the arrays may also be `jax.ShapeDtypeStruct`s, and

      target: the device to plan and to compile for, which need not be here: one of
        `jax.experimental.topologies.get_topology_desc(...).devices`. None: the default backend.

    Raises: as for `bptt_jax.scan`; `BudgetError` at once.

    >>> import jax.numpy as jnp
    >>> report = explain(lambda c, x: (jnp.sin(c) * x, None), jnp.ones(64), jnp.ones((100, 64)), budget="40%")
    >>> report.forward_steps, report.measured_bytes <= report.budget_bytes
    (190, True)
    """
    options = checked_options(budget, plan, lowering, calibrate, target)
    if budget == "auto":
        options = dataclasses.replace(options, budget=free_bytes(options.machine.device))
    reports: list[Report] = []

    def inspect(init: Any, xs: Any) -> None:
        traced = trace(f, init, xs, length, reverse, unroll, options)
        reports.append(_report(gradient_of(traced.call, traced.arguments)))

    jax.eval_shape(inspect, init, xs)
    return reports[0]


def explain_params(step: Any, params: Any, init: Any, xs: Any, **options: Any) -> Report:
    """The report for the gradient with respect to parameters alone, or without any to the first carry.

    Args:
      step: (params, carry, x) -> (carry, y).
      params, init, xs: as arrays or shapes.
      **options: those of `checked_options`.
    """
    reports: list[Report] = []

    def inspect(params: Any, init: Any, xs: Any) -> None:
        traced = trace(lambda carry, x: step(params, carry, x), init, xs, None, False, 1, checked_options(**options))
        leaves = set(map(id, jax.tree.leaves(params) or jax.tree.leaves(init)))
        wrt = tuple(id(leaf) in leaves for leaf in traced.arguments)
        reports.append(_report(gradient_of(traced.call, traced.arguments, wrt)))

    jax.eval_shape(inspect, params, init, xs)
    return reports[0]


def _report(gradient: Gradient) -> Report:
    call, choice = gradient.call, choose(gradient)
    # A plan that was given was run without a prediction; here there is one to compare with.
    calibration = choice.calibration
    if call.length > 0 and calibration.programs == 0:
        calibration = calibration_of(gradient, choice.form)
    start = time.perf_counter()
    measured_bytes = temporaries_of_gradient(gradient, choice.program(), call.length)
    seconds = time.perf_counter() - start
    form = choice.form
    return Report(
        plan=choice.plan,
        profile=calibration.profile,
        budget_bytes=budget_to_bytes(call.options.budget, choice.profile.store_all_bytes(call.length)),
        measured_bytes=measured_bytes,
        block=None if form is None else summary(form.vjp, form.style),
        effort=Effort(choice.plan_seconds, choice.calibration.seconds, choice.calibration.programs, seconds),
        calibration_programs=calibration.programs,
    )


def profile(
    f: Step, init: Any, x: Any, *, lowering: Lowering | None = None, calibrate: bool = False, target: Any = None
) -> StepProfile:
    """Bytes of one step of a scan, for planners.

    Args:
      f: the step, (carry, x) -> (carry, y), as for `bptt_jax.scan`.
      init: the first carry: any pytree of arrays or `jax.ShapeDtypeStruct`s.
      x: one step's input (a slice of xs, without the time axis); likewise, or None.
      lowering: as for `bptt_jax.scan`; the sweep keeps less.
      calibrate: whether to compile up to three small programs, as `scan` does, for bytes that XLA confirms; otherwise
        they are estimated from shapes alone, and have a larger margin.
      target: as for `bptt_jax.scan`.

    Returns:
      A `StepProfile`; each closed-over floating array counts as a differentiated parameter.

    Raises:
      what `jax.lax.scan` raises for such a step; ValueError for an unknown `lowering`.

    >>> import jax.numpy as jnp
    >>> measured = profile(lambda carry, x: (jnp.sin(carry) + x, carry), jnp.zeros(256), jnp.zeros(256))
    >>> measured.carry_bytes, measured.residual_bytes, measured.x_bytes, measured.y_bytes
    (1024, 1024, 1024, 1024)
    """
    options = checked_options(lowering=lowering, calibrate=calibrate, target=target)
    found: list[StepProfile] = []
    length = 2  # nothing depends on it

    def measured_here(init: Any, x: Any) -> None:
        xs = jax.tree.map(lambda leaf: jnp.stack([leaf] * length), x)
        traced = trace(f, init, xs, length, False, 1, options)
        gradient = gradient_of(traced.call, traced.arguments)
        found.append((calibrated if calibrate else estimate)(gradient, fastest(gradient)).profile)

    jax.eval_shape(measured_here, init, x)
    return found[0]


def _bytes(count: int) -> str:
    return f"{format_bytes(count):>10}  ({count:,} bytes)"
