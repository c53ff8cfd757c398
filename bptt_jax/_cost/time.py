"""The time of a gradient under a plan, predicted from its counts of evaluated steps and blocks.

With n the length of the plan, each step is recorded and taken backwards once, and each further evaluation is an
advance:

    time = n·(recording + backward) + (evaluations − n)·forward + block·(blocks evaluated)

Values kept on the host are moved while other steps are evaluated or taken backwards. With B the bytes of a loop's
values, M its steps and t the time to move a byte, each pass waits for the rest:

    time += max(0, B·t − M·recording) + max(0, B·t − M·backward)

The blocks evaluated follow the recursion of the evaluations with 1 in place of n: a `Remat` runs each block below it
once more. In the sweep, the second run of a node ends before its last rematerialised part, because nothing reads the
carry behind it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from bptt_jax._cost.nested import NestedRules
from bptt_jax._cost.rules import Rules
from bptt_jax._cost.sweep import SweepRules
from bptt_jax._figures import OTHER_BODY, SECOND_BODY
from bptt_jax.plans._blocks import in_blocks, leaf_lengths
from bptt_jax.plans._memories import host_loops
from bptt_jax.plans._nodes import Chain, Plan, Remat, Repeat, Steps, fold, length, require_plan
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
    """The predicted time of a plan as the profile's lowering runs it; planners compare plans by it."""
    if profile.sweep is not None:
        return sweep_time(plan, profile.sweep)
    return predicted_time(plan, profile.times) + _waiting(plan, profile.times, NestedRules(profile))


def sweep_time(plan: Plan, profile: SweepProfile) -> float:
    """The predicted time of a plan in blocks, with a charge for each block to compile after the first."""
    blocks = in_blocks(plan, profile.block_steps)
    bodies, lengths = _bodies(blocks), leaf_lengths(blocks)
    # The first body is free, because every plan has one.
    charge = SECOND_BODY * (bodies - len(lengths)) + OTHER_BODY * max(len(lengths) - 1, 0)
    time = predicted_time(blocks, profile.times, "sweep") * (1 + charge)
    return time + _waiting(blocks, profile.times, SweepRules(profile))


def _waiting(plan: Plan, times: StepTimes, rules: Rules) -> float:
    """The time of waiting for the host, in both passes."""
    waits = 0.0
    for loop in host_loops(plan):
        moving, steps = rules.total(loop).host * times.transfer, length(loop)
        waits += max(moving - steps * times.recording, 0.0) + max(moving - steps * times.backward, 0.0)
    return waits


def _bodies(plan: Plan) -> int:
    """The number of bodies to compile: `Steps` nodes of a plan, without empty ones."""

    def count(node: Plan, children: Sequence[int]) -> int:
        return int(node.n > 0) if isinstance(node, Steps) else sum(children)

    return fold(plan, count)


@dataclasses.dataclass(frozen=True)
class Evaluations:
    """Counts of evaluated steps and blocks (`Steps` nodes), first pass included."""

    steps: int
    blocks: int


def evaluations(plan: Plan, lowering: Lowering) -> Evaluations:
    """The evaluations of a gradient under `plan`, in time linear in the distinct nodes of the plan."""
    total = fold(plan, functools.partial(_counts, is_sweep=lowering == "sweep"))
    return Evaluations(length(plan) + total.back_steps, total.blocks + total.back_blocks)


@dataclasses.dataclass(frozen=True)
class _Counts:
    """Counts of a node: its blocks; steps and blocks run to revisit it, and steps and blocks run within its backward.

    To revisit a node is to run it a second time, for its kept values.
    """

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
            # The kept value is the carry entering the node: the sweep has it, the nest advances through the child too.
            again = (0, 0) if is_sweep else (length(child), c.blocks)
            return _Counts(c.blocks, *again, c.revisit_steps + c.back_steps, c.revisit_blocks + c.back_blocks)
        case Repeat(k, child):
            (c,) = children
            ends_early = is_sweep and isinstance(child, Remat)
            revisited = (k - 1) * length(child) + c.revisit_steps if ends_early else length(node)
            blocks = (k - 1) * c.blocks + c.revisit_blocks if ends_early else k * c.blocks
            return _Counts(k * c.blocks, revisited, blocks, k * c.back_steps, k * c.back_blocks)
        case Chain(nodes):
            # Only the last child can end early in the sweep: each other one has to hand on its carry.
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
