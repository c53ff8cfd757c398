"""Cases of the audit on every core, in processes of their own."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
from collections.abc import Iterator, Sequence

import jax

from tests.audit import LITTLE, Case, Finding, audit, could_be_faster
from tests.quick_to_compile import compile_quickly


@dataclasses.dataclass(frozen=True)
class Audited:
    """A finding, and whether it used so little of its budget that a faster plan would have fitted."""

    finding: Finding
    wasteful: bool


def audited(case: Case, budgets: int) -> list[Audited]:
    """The findings of a case; none where there is nothing to differentiate."""
    if not case.differentiates:
        return []
    problem = case.problem()
    return [
        Audited(finding, finding.used < LITTLE and could_be_faster(case, problem, finding))
        for finding in audit(case, budgets)
    ]


def prepare() -> None:
    compile_quickly(other_emitters=False)
    jax.config.update("jax_enable_x64", True)


def run(cases: Sequence[Case], budgets: int) -> Iterator[list[Audited]]:
    """The findings of the cases, as they are done."""
    context = multiprocessing.get_context("spawn")  # not forked, for JAX has threads
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context, prepare) as pool:
        for future in concurrent.futures.as_completed([pool.submit(audited, case, budgets) for case in cases]):
            yield future.result()
