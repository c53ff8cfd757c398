"""How long a gradient takes under a plan, predicted from the counts of what it evaluates.

With n the length of the plan, each step is recorded and taken backwards once, and each further evaluation is an
advance:

    time = n·(recording + backward) + (evaluations − n)·forward + block·(blocks evaluated)

The blocks evaluated obey the recursion of the evaluations with 1 in place of n: a `Remat` runs each block below it
once more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bptt_jax._plan import Chain, Plan, Remat, Repeat, Steps, _require_plan, fold, length
from bptt_jax._step_profile import StepTimes


@dataclasses.dataclass(frozen=True)
class _Counts:
    evals: int
    blocks: int
    blocks_evaluated: int


def predicted_time(plan: Plan, times: StepTimes) -> float:
    """The time of a gradient under `plan`, in the unit of `times`.

    >>> predicted_time(Repeat(40, Remat(Steps(25))), StepTimes())
    4000.0
    >>> predicted_time(Repeat(40, Remat(Steps(25))), StepTimes(block=10))
    4800.0

    Raises:
      TypeError: if `plan` is not a plan.
    """
    _require_plan(plan, "the plan")
    counts = fold(plan, _counts)
    steps = length(plan)
    advances = (counts.evals - steps) * times.forward
    return steps * (times.recording + times.backward) + advances + counts.blocks_evaluated * times.block


def _counts(node: Plan, children: Sequence[_Counts]) -> _Counts:
    match node:
        case Steps(n):
            return _Counts(n, blocks=int(n > 0), blocks_evaluated=int(n > 0))
        case Remat(child):
            (c,) = children
            return _Counts(length(child) + c.evals, c.blocks, c.blocks + c.blocks_evaluated)
        case Repeat(k):
            (c,) = children
            return _Counts(k * c.evals, k * c.blocks, k * c.blocks_evaluated)
        case Chain():
            totals = zip(*((c.evals, c.blocks, c.blocks_evaluated) for c in children), strict=True)
            return _Counts(*map(sum, totals))
    raise TypeError(f"not a plan node: {node!r}")
