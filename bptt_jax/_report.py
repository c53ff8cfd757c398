"""What `explain` returns: a table of what a budget buys, and a timeline."""

from __future__ import annotations

import dataclasses

from bptt_jax._cost import PlanCost, cost
from bptt_jax._lower.block_sizes import BlockSummary
from bptt_jax._plan import Plan
from bptt_jax._plan import length as length_of
from bptt_jax._render import render
from bptt_jax._step_profile import StepProfile
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

    >>> import bptt_jax, jax.numpy as jnp
    >>> report = bptt_jax.explain(lambda c, x: (jnp.sin(c) * x, None), jnp.ones(64), jnp.ones((100, 64)))
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


def _bytes(count: int) -> str:
    return f"{format_bytes(count):>10}  ({count:,} bytes)"
