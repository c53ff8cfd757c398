"""The audit of the promise: for a grid of steps, lengths and budgets, the bytes asked for and those that XLA reports.

Nothing is run; programs are compiled for abstract shapes. The suite audits a part, `python -m tests.audit` all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bptt_jax
from bptt_jax._choose import Choice, choose
from bptt_jax._gradient import Gradient, gradient_of
from bptt_jax._options import checked_options
from bptt_jax._trace import trace
from bptt_jax.errors import BudgetError
from tests.audit.kinds import Problem, problem_of, shape

LENGTHS = (100, 997, 1000, 10_000)
BUDGETS = 12
LITTLE = 0.6  # of a budget; so little is used only where no faster plan fits


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of step at one length.

    Attributes:
      lowering: "nested", or "sweep" where that can be, which is what `scan` does by itself.
      arguments: what is differentiated: "weights" or "all" (weights, init, xs).
      outputs: whether the step has per-step outputs, which are then in the loss.
    """

    kind: str
    length: int
    lowering: str = "sweep"
    arguments: str = "all"
    outputs: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """What `scan` is asked for."""
        return {"lowering": None if self.lowering == "sweep" else self.lowering}

    @property
    def differentiates(self) -> bool:
        """Whether there is anything to differentiate: a step that reads no weights has no gradients for them."""
        return any(gradient(self, self.problem(), None).wrt)

    def problem(self) -> Problem:
        problem = problem_of(self.kind)
        return problem if self.outputs else problem.without_outputs()


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one budget led to, in bytes."""

    case: Case
    asked: int
    predicted: int
    measured: int
    plan: str
    forward_steps: int

    @property
    def used(self) -> float:
        return self.measured / self.asked


def vjp(case: Case, problem: Problem, budget: int) -> Callable[..., Any]:
    """(params, init, xs, cotangents) -> results and gradients."""

    def run(params: Any, init: Any, xs: Any) -> Any:
        step = functools.partial(problem.step, params)
        return bptt_jax.scan(step, init, xs, case.length, budget=budget, **case.options)

    def pullback(params: Any, init: Any, xs: Any, cotangents: Any) -> Any:
        if case.arguments == "all":
            results, pull = jax.vjp(run, params, init, xs)
        else:
            results, pull = jax.vjp(lambda params: run(params, init, xs), params)
        return results, pull(cotangents)

    return pullback


def _cotangent(result: Any) -> Any:
    is_float = jnp.issubdtype(result.dtype, jnp.inexact)
    return shape(*result.shape, dtype=result.dtype if is_float else jax.dtypes.float0)


def temporaries(case: Case, problem: Problem, budget: int) -> int:
    """What XLA reports for the jitted vjp."""
    xs = problem.xs(case.length)
    arguments = (problem.params, problem.init, xs)
    results = jax.eval_shape(
        lambda params, init, xs: jax.lax.scan(functools.partial(problem.step, params), init, xs, case.length),
        *arguments,
    )
    cotangents = jax.tree.map(_cotangent, results)
    compiled = jax.jit(vjp(case, problem, budget)).lower(*arguments, cotangents).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def gradient(case: Case, problem: Problem, budget: int | None) -> Gradient:
    """The gradient that `scan` is asked for."""
    found: list[Gradient] = []

    def inspect(params: Any, init: Any, xs: Any) -> None:
        step = functools.partial(problem.step, params)
        traced = trace(step, init, xs, case.length, False, 1, checked_options(budget, **case.options))
        whole = gradient_of(traced.call, traced.arguments)
        weights = set(map(id, jax.tree.leaves(params)))
        is_asked = [case.arguments == "all" or id(leaf) in weights for leaf in traced.arguments]
        wrt = tuple(a and b for a, b in zip(whole.wrt, is_asked, strict=True))
        found.append(Gradient(whole.call, wrt, whole.types))

    jax.eval_shape(inspect, problem.params, problem.init, problem.xs(case.length))
    return found[0]


def decide(case: Case, problem: Problem, budget: int | None) -> Choice:
    """What `scan` decides for a budget, without compiling the scan."""
    return choose(gradient(case, problem, budget))


def budgets(case: Case, problem: Problem, count: int) -> list[int]:
    """From the smallest feasible one to everything, in equal ratios."""
    smallest = smallest_budget(case, problem)
    everything = decide(case, problem, None).predicted_bytes
    return sorted({int(b) for b in np.geomspace(smallest, max(everything, smallest), count).round()})


def smallest_budget(case: Case, problem: Problem) -> int:
    """The one that the error for a budget of one byte states."""
    try:
        decide(case, problem, 1)
    except BudgetError as error:
        return error.smallest_bytes
    raise AssertionError("a budget of one byte was accepted")


def could_be_faster(case: Case, problem: Problem, finding: Finding) -> bool:
    """Whether within this budget a plan with fewer recomputations would have been possible, with its margin.

    For budgets of which little was used.
    """
    # By the estimate everything may take less than the smallest budget of tiny steps.
    refused, accepted = finding.asked, max(finding.asked, decide(case, problem, None).predicted_bytes)
    if _steps(decide(case, problem, accepted)) >= finding.forward_steps:
        return False
    while accepted - refused > max(refused // 500, 1):
        middle = (refused + accepted) // 2
        is_faster = _steps(decide(case, problem, middle)) < finding.forward_steps
        refused, accepted = (refused, middle) if is_faster else (middle, accepted)
    profile = decide(case, problem, accepted).profile
    spare = profile.fixed_bytes if profile.block_peaks else profile.carry_bytes
    return profile.with_margin(examine(case, problem, accepted).measured + spare) <= finding.asked


def _steps(choice: Choice) -> int:
    return bptt_jax.cost(choice.plan, choice.profile).forward_steps


def examine(case: Case, problem: Problem, asked: int) -> Finding:
    """One budget: planned, compiled, measured."""
    choice = decide(case, problem, asked)
    name = f"{bptt_jax.plans.notation(choice.plan)} {choice.profile.lowering}"
    return Finding(case, asked, choice.predicted_bytes, temporaries(case, problem, asked), name, _steps(choice))


def audit(case: Case, count: int = BUDGETS) -> Iterator[Finding]:
    """The findings of a case, one by one."""
    problem = case.problem()
    for asked in budgets(case, problem, count):
        yield examine(case, problem, asked)
