"""The audit of the promise: for a grid of steps, lengths and budgets, the bytes asked for and those that XLA reports.

Nothing is run; programs are compiled for abstract shapes, through the public door and apart from the checks that `scan`
makes by itself, which are recorded beside them. The suite audits a part, `python -m tests.audit` all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bptt_jax
from bptt_jax import _pipeline
from bptt_jax._options import checked_options
from bptt_jax._pipeline import Choice, choose
from bptt_jax._trace.gradient import Gradient, gradient_of
from bptt_jax._trace.trace import trace
from bptt_jax._verify.search import Verdict
from bptt_jax.errors import BudgetError, BudgetWarning
from tests.audit.kinds import Problem, problem_of, shape

LENGTHS = (100, 997)
BUDGETS = 4
LITTLE = 0.75  # of a budget; so little is used only where no faster plan fits
MAPPINGS = ("none", "grad of vmap", "vmap of grad")
EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of step at one length.

    Attributes:
      lowering: "nested", or "sweep" where that can be, which is what `scan` does by itself.
      arguments: what is differentiated: "weights", "xs" or "all" (weights, init, xs).
      outputs: whether the step has per-step outputs, which are then in the loss.
      mapping: what is mapped over three examples: nothing, the scan, or its gradient.
    """

    kind: str
    length: int
    lowering: str = "sweep"
    arguments: str = "all"
    outputs: bool = True
    mapping: str = "none"

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
    """What one budget led to.

    Attributes:
      asked, measured: bytes, those that XLA reports for the whole program.
      checked: bytes that the check of the plan said; 0 where nothing had to be checked.
      programs: how many were compiled to find the plan.
      plan: in words; its form is the lowering.
    """

    case: Case
    asked: int
    measured: int
    checked: float
    programs: int
    plan: str

    @property
    def used(self) -> float:
        return self.measured / self.asked


def vjp(case: Case, problem: Problem, budget: int | None, **options: Any) -> Callable[..., Any]:
    """(params, init, xs, cotangents) -> results and gradients."""

    def run(params: Any, init: Any, xs: Any) -> Any:
        step = functools.partial(problem.step, params)
        return bptt_jax.scan(step, init, xs, case.length, budget=budget, **case.options, **options)

    scan = jax.vmap(run, in_axes=(None, 0, 0)) if case.mapping == "grad of vmap" else run

    def pullback(params: Any, init: Any, xs: Any, cotangents: Any) -> Any:
        if case.arguments == "all":
            results, pull = jax.vjp(scan, params, init, xs)
        elif case.arguments == "xs":
            results, pull = jax.vjp(lambda xs: scan(params, init, xs), xs)
        else:
            results, pull = jax.vjp(lambda params: scan(params, init, xs), params)
        return results, pull(cotangents)

    return jax.vmap(pullback, in_axes=(None, 0, 0, 0)) if case.mapping == "vmap of grad" else pullback


def _cotangent(result: Any) -> Any:
    is_float = jnp.issubdtype(result.dtype, jnp.inexact)
    return shape(*result.shape, dtype=result.dtype if is_float else jax.dtypes.float0)


def arguments(case: Case, problem: Problem) -> tuple[Any, ...]:
    """The types of the arguments of `vjp`."""
    given = problem.params, problem.init, problem.xs(case.length)
    results = jax.eval_shape(
        lambda params, init, xs: jax.lax.scan(functools.partial(problem.step, params), init, xs, case.length), *given
    )
    examples = () if case.mapping == "none" else (EXAMPLES,)
    init, xs, cotangents = jax.tree.map(
        lambda leaf: shape(*examples, *leaf.shape, dtype=leaf.dtype),
        (*given[1:], jax.tree.map(_cotangent, results)),
    )
    return given[0], init, xs, cotangents


def temporaries(case: Case, problem: Problem, budget: int | None, **options: Any) -> int:
    """What XLA reports for the jitted vjp."""
    lowered = jax.jit(vjp(case, problem, budget, **options)).lower(*arguments(case, problem))
    return int(lowered.compile().memory_analysis().temp_size_in_bytes)


@contextlib.contextmanager
def recorded() -> Iterator[list[Verdict]]:
    """The verdict of each decision that is made meanwhile."""
    found: list[Verdict] = []
    verify = _pipeline.verify

    def recording(*args: Any) -> Verdict:
        found.append(verify(*args))
        return found[-1]

    _pipeline.verify = recording
    try:
        yield found
    finally:
        _pipeline.verify = verify


def gradient(case: Case, problem: Problem, budget: int | None) -> Gradient:
    """The gradient that `scan` is asked for, of one example."""
    found: list[Gradient] = []

    def inspect(params: Any, init: Any, xs: Any) -> None:
        step = functools.partial(problem.step, params)
        traced = trace(step, init, xs, case.length, False, 1, checked_options(budget, **case.options))
        whole = gradient_of(traced.call, traced.arguments)
        of = {"weights": params, "xs": xs, "all": (params, init, xs)}[case.arguments]
        leaves = set(map(id, jax.tree.leaves(of)))
        is_asked = [case.arguments == "all" or id(leaf) in leaves for leaf in traced.arguments]
        found.append(gradient_of(traced.call, traced.arguments, tuple(is_asked)))
        assert case.arguments != "all" or found[0].wrt == whole.wrt

    jax.eval_shape(inspect, problem.params, problem.init, problem.xs(case.length))
    return found[0]


def decide(case: Case, problem: Problem, budget: int | None) -> Choice:
    """What `scan` decides for a budget, without compiling the scan."""
    return choose(gradient(case, problem, budget))


def budgets(case: Case, problem: Problem, count: int) -> list[int]:
    """From the smallest feasible one to everything, in equal ratios."""
    smallest = smallest_budget(case, problem)
    if smallest == 1:  # no result depends on what is asked for, so nothing is differentiated
        return []
    everything = temporaries(case, problem, None)
    return sorted({int(b) for b in np.geomspace(smallest, max(everything, smallest), count).round()})


def smallest_budget(case: Case, problem: Problem) -> int:
    """The one that the error for a budget of one byte states."""
    try:
        jax.eval_shape(vjp(case, problem, 1), *arguments(case, problem))
    except BudgetError as error:
        return error.smallest_bytes
    return 1


def could_be_faster(case: Case, problem: Problem, finding: Finding) -> bool:
    """Whether a faster plan is within this budget, of which little was used; of those that are predicted next.

    Of several examples it is not looked for.
    """
    if case.mapping != "none":
        return False
    whole = gradient(case, problem, finding.asked)
    choice, plans = choose(whole), _pipeline.Plans(whole)
    time = plans.candidate(choice.form, choice.plan).predicted_time
    tried = {choice.plan}
    for factor in np.linspace(1.0, 1.5 / finding.used, 12):
        candidate = plans.within(int(factor * choice.predicted_bytes))
        if candidate is None or candidate.plan in tried or candidate.predicted_time >= 0.999 * time:
            continue
        tried.add(candidate.plan)
        if _pipeline.check(whole, candidate.plan, candidate.form).temporary_bytes <= finding.asked:
            return True
    return False


def examine(case: Case, problem: Problem, asked: int, **options: Any) -> Finding:
    """One budget: planned, compiled, measured."""
    with recorded() as found, warnings.catch_warnings():
        warnings.simplefilter("error", BudgetWarning)
        measured = temporaries(case, problem, asked, **options)
    best = found[-1].best if found else None
    programs = sum(len(verdict.checks) for verdict in found)
    plan = "not checked" if best is None else bptt_jax.plans.notation(best.candidate.plan)
    lowering = "" if best is None else " nested" if best.candidate.form is None else " sweep"
    checked = 0.0 if best is None else best.measured_bytes
    return Finding(case, asked, measured, checked, programs, plan + lowering)


def audit(case: Case, count: int = BUDGETS, **options: Any) -> Iterator[Finding]:
    """The findings of a case, one by one."""
    problem = case.problem()
    for asked in budgets(case, problem, count):
        try:
            yield examine(case, problem, asked, **options)
        except BudgetError:
            if not options:  # without checks an estimate may be higher than what was measured
                raise
