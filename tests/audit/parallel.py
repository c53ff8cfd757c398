"""Cases of the audit on every core, in processes of their own."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
from collections.abc import Iterator, Sequence

import jax

from bptt_jax._caches import forget_everything
from bptt_jax._verify import check as _check
from tests.audit import LITTLE, Case, Finding, audit, could_be_faster
from tests.support.quick_to_compile import compile_quickly

PLANTED = ("skipped", "wrong")


@dataclasses.dataclass(frozen=True)
class Audited:
    """A finding, and whether it used so little of its budget that a faster plan would have fitted."""

    finding: Finding
    wasteful: bool

    @property
    def is_over(self) -> bool:
        """Whether the program takes more than was asked."""
        return self.finding.measured > self.finding.asked


def audited(case: Case, budgets: int, planted: str | None = None) -> list[Audited]:
    """The findings of a case; none where there is nothing to differentiate.

    Args:
      case: the case.
      budgets: how many.
      planted: a fault of the checks: "skipped", all plans are estimates, or "wrong", XLA's figures are halved.
    """
    if not case.differentiates:
        return []
    problem, options = case.problem(), {"verify": False} if planted == "skipped" else {}
    measure = _check.temporaries_of_gradient
    if planted:
        forget_everything()
    if planted == "wrong":
        _check.temporaries_of_gradient = lambda *args: tuple(size // 2 for size in measure(*args))
    try:
        return [
            Audited(finding, finding.used < LITTLE and not planted and could_be_faster(case, problem, finding))
            for finding in audit(case, budgets, **options)
        ]
    finally:
        _check.temporaries_of_gradient = measure
        if planted:
            forget_everything()


def prepare() -> None:
    compile_quickly(other_emitters=False)
    jax.config.update("jax_enable_x64", True)


def run(cases: Sequence[Case], budgets: int, planted: str | None = None) -> Iterator[list[Audited]]:
    """The findings of the cases, as they are done."""
    context = multiprocessing.get_context("spawn")  # not forked, for JAX has threads
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context, prepare) as pool:
        futures = [pool.submit(audited, case, budgets, planted) for case in cases]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
