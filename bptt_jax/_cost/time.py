"""How long a gradient takes under a plan, predicted from the counts of what it evaluates.

With n the length of the plan, each step is recorded and taken backwards once, and each further evaluation is an
advance:

    time = n·(recording + backward) + (evaluations − n)·forward + block·(blocks evaluated)

The blocks evaluated obey the recursion of the evaluations with 1 in place of n: a `Remat` runs each block below it
once more. In the sweep, what is run once more ends before its last rematerialised part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from bptt_jax._figures import FURTHER_BODY, SECOND_BODY
from bptt_jax.plans._nodes import Chain, Plan, Remat, Repeat, Steps, fold, in_blocks, length, require_plan
from bptt_jax.plans._profile import Lowering, StepProfile, StepTimes, SweepProfile


def predicted_time(plan: Plan, times: StepTimes, lowering: Lowering = "nested") -> float:
    """The time of a gradient under `plan`, in the unit of `times`.

    >>> predicted_time(Repeat(40, Remat(Steps(25))), StepTimes())
    4000.0
    >>> predicted_time(Repeat(40, Remat(Steps(25))), StepTimes(block=10))
    4800.0

    Raises:
      TypeError: if `plan` is not a plan.
    """
    require_plan(plan, "the plan")
    counts = evaluations(plan, lowering)
    steps = length(plan)
    advances = (counts.steps - steps) * times.forward
    return steps * (times.recording + times.backward) + advances + counts.blocks * times.block


def time_of(plan: Plan, profile: StepProfile) -> float:
    """What planners compare plans for a profile by: the predicted time of what runs."""
    return predicted_time(plan, profile.times) if profile.sweep is None else sweep_time(plan, profile.sweep)


def sweep_time(plan: Plan, profile: SweepProfile) -> float:
    """The predicted time of the blocks that the sweep runs, with a charge for each further one to compile."""
    blocks = in_blocks(plan, profile.block_steps)
    further = _bodies(blocks) - 2
    charge = 0.0 if further < 0 else SECOND_BODY + FURTHER_BODY * further
    return predicted_time(blocks, profile.times, "sweep") * (1 + charge)


def _bodies(plan: Plan) -> int:
    """How many blocks of steps are written down in a plan."""

    def count(node: Plan, children: Sequence[int]) -> int:
        return int(node.n > 0) if isinstance(node, Steps) else sum(children)

    return fold(plan, count)


@dataclasses.dataclass(frozen=True)
class Evaluations:
    """How many steps and blocks (`Steps` nodes) are evaluated, first pass included."""

    steps: int
    blocks: int


def evaluations(plan: Plan, lowering: Lowering) -> Evaluations:
    """What a gradient under `plan` evaluates. Time is linear in the distinct nodes of the plan."""
    total = fold(plan, functools.partial(_counts, is_sweep=lowering == "sweep"))
    return Evaluations(length(plan) + total.back_steps, total.blocks + total.back_blocks)


@dataclasses.dataclass(frozen=True)
class _Counts:
    """Blocks of a node; steps and blocks that are run to revisit it, and within its backward."""

    blocks: int
    revisit_steps: int
    revisit_blocks: int
    back_steps: int
    back_blocks: int


def _counts(node: Plan, children: Sequence[_Counts], is_sweep: bool) -> _Counts:
    match node:
        case Steps(n):
            blocks = int(n > 0)
            return _Counts(blocks, n, blocks, 0, 0)
        case Remat(child):
            (c,) = children
            again = (0, 0) if is_sweep else (length(child), c.blocks)
            return _Counts(c.blocks, *again, c.revisit_steps + c.back_steps, c.revisit_blocks + c.back_blocks)
        case Repeat(k, child):
            (c,) = children
            ends_early = is_sweep and isinstance(child, Remat)
            revisited = (k - 1) * length(child) + c.revisit_steps if ends_early else length(node)
            blocks = (k - 1) * c.blocks + c.revisit_blocks if ends_early else k * c.blocks
            return _Counts(k * c.blocks, revisited, blocks, k * c.back_steps, k * c.back_blocks)
        case Chain(nodes):
            before = length(node) - length(nodes[-1])
            blocks = sum(c.blocks for c in children)
            last = children[-1]
            return _Counts(
                blocks,
                before + last.revisit_steps if is_sweep else length(node),
                blocks - last.blocks + last.revisit_blocks if is_sweep else blocks,
                sum(c.back_steps for c in children),
                sum(c.back_blocks for c in children),
            )
    raise TypeError(f"not a plan node: {node!r}")
