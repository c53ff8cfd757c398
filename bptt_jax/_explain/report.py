"""`Report`, the result of `explain`: a table of bytes and times, and a timeline of the plan."""

from __future__ import annotations

import dataclasses
import math

from bptt_jax._cost.cost import PlanCost, cost
from bptt_jax._step.sizes import BlockSummary
from bptt_jax.errors import format_bytes
from bptt_jax.plans._memories import uses_host
from bptt_jax.plans._nodes import Plan
from bptt_jax.plans._nodes import length as length_of
from bptt_jax.plans._notation import notation
from bptt_jax.plans._profile import Lowering, StepProfile
from bptt_jax.plans._timeline import render

_BACKWARD_TIME = 2.0  # of the backward of one step, in evaluations of the step


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program compiled by itself to read its bytes.

    Attributes:
      plan: the plan of the program.
      lowering: "sweep" or "nested".
      predicted_bytes: bytes predicted by the profile.
      measured_bytes: `temp_size_in_bytes` as XLA reports it; infinite where the compiler refused it for its size.
      seconds: time of tracing and compiling, spent once in a process.
      runs: whether `scan` runs this plan, in this lowering.
      host_bytes: `host_temp_size_in_bytes` as XLA reports it.
    """

    plan: Plan
    lowering: Lowering
    predicted_bytes: int
    measured_bytes: float
    seconds: float
    runs: bool
    host_bytes: float = 0.0

    def __str__(self) -> str:
        found = f"{self.measured_bytes:,.0f} bytes" if math.isfinite(self.measured_bytes) else "too large to compile"
        on_host = f", {self.host_bytes:,.0f} on the host" if self.host_bytes else ""
        words = f"{notation(self.plan)}, {self.lowering}: {found}{on_host} for {self.predicted_bytes:,} predicted"
        return f"{words}, {self.seconds:.2f} s{', runs' * self.runs}"


@dataclasses.dataclass(frozen=True)
class Report:
    """Bytes and times of a scan under a budget, as `explain` finds them. `str(report)` is a table and a timeline.

    >>> import bptt_jax, jax.numpy as jnp
    >>> report = bptt_jax.explain(lambda c, x: (jnp.sin(c) * x, None), jnp.ones(64), jnp.ones((100, 64)))
    >>> report.budget_bytes is None, report.forward_steps, report.overhead
    (True, 100, 1.0)

    Attributes:
      plan: the plan of the scan.
      profile: sizes of one step.
      budget_bytes: the budget in bytes, None without one.
      predicted_bytes: peak temporary bytes of the backward pass by the profile.
      measured_bytes: `temp_size_in_bytes` reported by XLA for the jitted vjp over (params, init, xs); None where it
        cannot be compiled by itself, for example inside some meshes, or is too large for the compiler.
      store_all_bytes: predicted bytes of `jax.lax.scan`'s own vjp, of the step as it is written.
      beside_bytes: what a whole program holds beside the measured one, counted under a budget: the last carry and its
        cotangent, and on accelerators a spare.
      forward_steps: evaluations of the step, first pass included.
      program_size: copies of the step's loop in the plan.
      block: for the sweep, the operations done by block and by step; None for the nest.
      checks: the programs compiled by themselves to find the plan, in their order.
      unchecked: the reason for having no checks under a budget; empty if there are some.
      plan_seconds: seconds of planning, without the checks.
      host_budget_bytes: the budget of the host's memory; None without one.
      host_bytes: `host_temp_size_in_bytes` reported by XLA; None as for `measured_bytes`.
      is_one_memory: whether device and host are one, as on CPU, so that the budgets are added up.
      together: the numbers of steps in an iteration of the innermost loops, each once; they depend on a loop's length.
      overhead: predicted time over the time of keeping everything, with backward = 2 forwards.
    """

    plan: Plan
    profile: StepProfile
    budget_bytes: int | None
    measured_bytes: int | None
    store_all_bytes: int
    beside_bytes: int = 0
    block: BlockSummary | None = None
    checks: tuple[Compiled, ...] = ()
    unchecked: str = ""
    plan_seconds: float = 0.0
    together: tuple[int, ...] = (1,)
    host_budget_bytes: int | None = None
    host_bytes: int | None = None
    is_one_memory: bool = False

    @property
    def _cost(self) -> PlanCost:
        return cost(self.plan, self.profile)

    @property
    def predicted_bytes(self) -> int:
        return self._cost.peak_bytes

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

    @property
    def _limit_bytes(self) -> int:
        """The budget; that of the host is added where both are of one memory."""
        return (self.budget_bytes or 0) + (self.host_budget_bytes or 0) * self.is_one_memory

    @property
    def summary(self) -> str:
        """Bytes, budget and plan in a line."""
        taken = "not known" if self.measured_bytes is None else format_bytes(self.measured_bytes)
        budget = ", no budget" if self.budget_bytes is None else f" of a budget of {format_bytes(self._limit_bytes)}"
        return f"{taken}{budget}, plan {notation(self.plan)}"

    def _block_rows(self) -> list[tuple[str, str]]:
        """Rows on the lowering: for the sweep, the products and sums done by block and by step."""
        if self.block is None:
            return [("lowering", "nested checkpoints")]
        rows = [
            ("products of x, by block", self.block.hoisted),
            ("weight gradients, by block", self.block.deferred),
            ("gradients summed by step", self.block.in_loop),
            ("products merged", ("yes",) if self.block.merged else ()),
            ("products in turn", ("yes",) if self.block.in_turn else ()),
            ("products of x, read ahead", ("yes",) if self.block.ahead else ()),
            ("values saved by a step", (self._packed,) if self.block.arrays < self.block.saved else ()),
        ]
        assert self.profile.sweep is not None
        lowering = ("lowering", f"sweep, blocks of at most {self.profile.sweep.block_steps} steps")
        return [lowering, *((name, ", ".join(values)) for name, values in rows if values)]

    @property
    def _packed(self) -> str:
        return "" if self.block is None else f"{self.block.saved} in {self.block.arrays} arrays"

    def _check_rows(self) -> list[tuple[str, str]]:
        """Rows on the programs compiled, one each."""
        if self.unchecked:
            return [("checks", f"none, because {self.unchecked}")]
        return [(f"check {number}", str(check)) for number, check in enumerate(self.checks, 1)]

    @property
    def _measured(self) -> str:
        if self.measured_bytes is None:
            return "not known: it cannot be compiled by itself here"
        if self.budget_bytes is None:
            return _bytes(self.measured_bytes)
        is_over = self.measured_bytes + self.beside_bytes > self._limit_bytes
        return _bytes(self.measured_bytes) + "  OVER THE BUDGET" * is_over

    def _host_rows(self) -> list[tuple[str, str]]:
        """Rows on the host's memory, where it is asked for or used."""
        rows = []
        if self.host_budget_bytes is not None:
            one = "  added to the budget, because this device has one memory" * self.is_one_memory
            rows.append(("budget on the host", _bytes(self.host_budget_bytes) + one))
        if uses_host(self.plan) and not self.is_one_memory:
            found = "not known" if self.host_bytes is None else _bytes(self.host_bytes)
            rows += [("predicted on the host", _bytes(self._cost.host_bytes)), ("measured on the host", found)]
        return rows

    def __str__(self) -> str:
        steps = length_of(self.plan)
        budget = "none" if self.budget_bytes is None else _bytes(self.budget_bytes)
        rows = [
            ("budget", budget),
            ("predicted from shapes", _bytes(self.predicted_bytes)),
            ("measured by XLA", self._measured),
            *self._host_rows(),
            *([] if self.budget_bytes is None else [("the last carry, beside", _bytes(self.beside_bytes))]),
            ("keeping everything", _bytes(self.store_all_bytes)),
            ("one carry", _bytes(self.profile.carry_bytes)),
            ("residuals of one step", _bytes((self.profile.sweep or self.profile).residual_bytes)),
            ("parameters", _bytes(self.profile.param_bytes)),
            ("forward steps", f"{self.forward_steps:,} for {steps:,}"),
            ("predicted time", f"{self.overhead:.2f} of keeping everything"),
            ("step loops in the program", f"{self.program_size}"),
            *([("steps in an iteration", ", ".join(map(str, self.together)))] if max(self.together) > 1 else []),
            *self._block_rows(),
            ("planning", f"{self.plan_seconds:.2f} s"),
            *self._check_rows(),
        ]
        table = "\n".join(f"{name:<26} {value}" for name, value in rows)
        return f"{table}\n\n{render(self.plan, lowering=self.profile.lowering)}"


def _bytes(count: int) -> str:
    return f"{format_bytes(count):>10}  ({count:,} bytes)"
