"""Plans for two memories: the host's, for values of outermost loops, and the device's, for all others.

    plan = carries, then residuals, then a rest        carries = Repeat(K, Remat(nest), kept="host")
                                                       residuals = Repeat(k, Steps(b), kept="host")

Each part may be missing. Steps with their residuals on the host are evaluated once, those with carries there once more,
or nearly twice more in a nest. The rest has a plan of the device alone. The device holds two blocks' residuals, because
those of the next block are moved meanwhile; so b is half as long as a block could be otherwise.

The candidates are some hundred trees, compared by their bytes and times. So the plan need not be the optimum.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from bptt_jax._cost.cost import cost
from bptt_jax._cost.time import time_of
from bptt_jax.plans._blocks import in_blocks, steps_together
from bptt_jax.plans._nodes import Chain, Plan, Remat, Repeat, Steps
from bptt_jax.plans._nodes import length as length_of
from bptt_jax.plans._profile import StepProfile

_SHARES = (1.0, 0.6, 0.3)  # of the host's bytes, for residuals
_BLOCKS = (1.0, 0.7, 0.45)  # lengths of blocks with residuals on the host, of the longest possible one
# Counts of the loops in a nest, by ascending steps.
_INNER = ((), (2,), (3,), (4,), (6,), (8,), (12,), (4, 4), (24,), (32,), (8, 8), (12, 12), (16, 16))
_LEAVES = 12  # lengths of leaves on a geometric grid
# Of the least time, because times are rough: up to so much more a plan is taken that evaluates no step twice, or one
# with less on the host.
_ONCE, _NEAR = 1.1, 1.01
# Loops with carries on the host, the fastest first, for each loop with residuals there; and those of them whose rest is
# too long to be kept.
_TRIES, _TRIES_WITH_REST = 8, 1

DevicePlan = Callable[[int, int], Plan | None]  # (length, budget in bytes) -> the fastest plan of the device alone


def fastest(
    profile: StepProfile, length: int, budget_bytes: int, host_bytes: int, on_device: DevicePlan
) -> Plan | None:
    """The fastest plan found within both budgets; None if none fits.

    Args:
      profile: sizes of one step.
      length: the number of steps.
      budget_bytes, host_bytes: the budgets.
      on_device: the planner of the device alone.
    """
    alone = on_device(length, budget_bytes)
    plans = [] if alone is None else [alone]
    for plan in _Search(profile, on_device).plans(length, budget_bytes, host_bytes):
        taken = cost(plan, profile)
        if taken.peak_bytes <= budget_bytes and taken.host_bytes <= host_bytes:
            plans.append(plan)
    if not plans:
        return None
    times = {plan: time_of(plan, profile) for plan in plans}
    least = min(times.values())
    once = [plan for plan in plans if cost(plan, profile).forward_steps == length and times[plan] <= _ONCE * least]
    near = once or [plan for plan in plans if times[plan] <= _NEAR * least]
    return min(near, key=lambda plan: (cost(plan, profile).host_bytes, times[plan]))


def smallest_plan(profile: StepProfile, length: int, host_bytes: int, alone: Plan) -> Plan:
    """The plan of the fewest bytes on the device: `alone`, or one with its carries on the host."""
    plans = [alone]
    for leaf, inner in itertools.product(range(1, min(length // 2, 8) + 1), _INNER):
        loop = _carries(profile, length, leaf, inner, host_bytes)
        if loop is not None:
            plans.append(_joined(loop, Steps(length - length_of(loop))))
    return min(plans, key=lambda plan: cost(plan, profile).peak_bytes)


@dataclasses.dataclass(frozen=True)
class _Search:
    """The candidates for a step and a planner of the device alone."""

    profile: StepProfile
    on_device: DevicePlan

    def plans(self, length: int, budget: int, host: int) -> Iterator[Plan]:
        """All candidates, also those that do not fit."""
        yield from self._with_carries((), length, budget, host)
        for loop in self._residuals(length, budget, host):
            rest, on_host = length - length_of(loop), cost(loop, self.profile).host_bytes
            room = budget - on_host // loop.k  # the values of its last child stay on the device
            if rest == 0:
                yield loop
            # With fewer steps in the loop, its place on the host goes to carries.
            elif self._is_full(loop, host) and (after := self.on_device(rest, room)) is not None:
                yield _joined(loop, after)
            if 1 < rest < length_of(loop.child):
                block = max(n for n in range(1, rest // 2 + 1) if rest % n == 0)
                yield _joined(loop, Repeat(rest // block, Steps(block), kept="host"))
            yield from self._with_carries((loop,), rest, room, host - on_host)

    def _is_full(self, loop: Repeat, host: int) -> bool:
        """Whether the host has no room for another child of a loop."""
        return cost(loop, self.profile).host_bytes // loop.k * (loop.k + 1) > host

    def _residuals(self, length: int, budget: int, host: int) -> Iterator[Repeat]:
        """Loops with residuals on the host; the nest leaves residuals to JAX, which keeps them on the device."""
        if self.profile.sweep is None:
            return
        by_step = max(self.profile.sweep.residual_bytes, 1)
        longest = self._longest(lambda n: Repeat(2, Steps(n), kept="host"), length // 2, budget)
        some = {max(int(longest * share), 1) for share in _BLOCKS}
        blocks = {n for n in some | self._dividing(length, longest) if n <= longest and self._is_whole(n)}
        found = {(min(length // n, int(share * host) // (n * by_step)), n) for n in blocks for share in _SHARES}
        yield from (Repeat(k, Steps(n), kept="host") for k, n in sorted(found) if k >= 2)

    def _dividing(self, length: int, longest: int) -> set[int]:
        """The longest block of at most `longest` steps that divides a length, if it has more than half of them."""
        return set(next(([n] for n in range(longest, longest // 2, -1) if length % n == 0 and self._is_whole(n)), []))

    def _with_carries(self, after: tuple[Plan, ...], steps: int, room: int, host: int) -> Iterator[Plan]:
        """Plans of `steps` steps, most of them with carries on the host, before the parts in `after`."""
        loops = sorted(self._loops(steps, room, host), key=lambda loop: time_of(loop, self.profile) / length_of(loop))
        whole = [loop for loop in loops if steps - length_of(loop) < length_of(loop.child)]
        loops = whole or loops
        kept = self._longest(Steps, steps, room)
        for number, loop in enumerate(loops[:_TRIES]):
            unit = length_of(loop.child)
            # As few children as leave no more steps than the device can keep.
            least = max(-(-(steps - kept) // unit), 2)
            for k in {loop.k, min(least, loop.k)}:
                rest = steps - k * unit
                last: Plan | None = Steps(rest) if rest <= kept else None
                if last is None and number < _TRIES_WITH_REST:
                    last = self.on_device(rest, room - 2 * cost(loop, self.profile).host_bytes // loop.k)
                if last is not None:
                    yield _joined(Repeat(k, loop.child, kept="host"), *after, last)

    def _loops(self, steps: int, room: int, host: int) -> Iterator[Repeat]:
        """Loops with carries on the host, for each length of a leaf: without a nest, and with the least that is needed.

        A loop in the nest is needed where the host has no room for a carry of each leaf.
        """
        longest = self._longest(lambda n: Repeat(2, Remat(Steps(n)), kept="host"), steps // 2, room)
        grid = {int(n) for n in np.geomspace(1, longest, _LEAVES)} if longest else set()
        for leaf in sorted(grid | self._dividing(steps, longest)):
            if not self._is_whole(leaf):
                continue
            for inner in _INNER:
                loop = _carries(self.profile, steps, leaf, inner, host)
                if loop is None or cost(loop, self.profile).peak_bytes > room:
                    break
                yield loop
                if loop.k == steps // length_of(loop.child):
                    break

    def _longest(self, plan_of: Callable[[int], Plan], most: int, room: int) -> int:
        """The most steps of a plan in `room` bytes, at most `most`; 0 if one step is too much."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            fits = cost(plan_of(middle), self.profile).peak_bytes <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _is_whole(self, n: int) -> bool:
        """Whether a leaf of n steps is cut into equal blocks, each of as many steps together as wanted."""
        sweep = self.profile.sweep
        if sweep is None:
            return True
        is_divisible = n < 2 * sweep.together or steps_together(n, sweep.together) >= sweep.together
        return is_divisible and not isinstance(in_blocks(Steps(n), sweep.block_steps), Chain)


def _carries(profile: StepProfile, steps: int, leaf: int, inner: tuple[int, ...], host: int) -> Repeat | None:
    """The longest loop over nests of `inner` loops around a leaf, with its carries on the host; None if too short."""
    unit = leaf * math.prod(inner)
    carry = (profile.sweep or profile).carry_bytes
    k = min(steps // unit, host // max(carry, 1))
    nest: Plan = Steps(leaf)
    for count in reversed(inner):
        nest = Repeat(count, Remat(nest))
    return Repeat(k, Remat(nest), kept="host") if k >= 2 else None


def _joined(*parts: Plan) -> Plan:
    """A chain of parts, without empty ones, and with the children of chains in their place."""
    flat = [child for part in parts for child in (part.children if isinstance(part, Chain) else (part,))]
    filled = [part for part in flat if length_of(part)]
    return Chain(tuple(filled)) if len(filled) > 1 else filled[0]
