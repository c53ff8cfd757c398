"""The plan of the fewest bytes: the lower end of the budgets of a scan.

Deep nests of short loops need the fewest bytes: k carries on a level for a factor of k in length, and one step's
residuals below. For example, k = 3 takes about 1.9 carries for each doubling of the length. A length without small
factors leaves a rest at the end of some loops. Rests as long as the children need still fewer carries, but leaves of
their own. The search walks down from the length over small factors, and over a few rests of each. Slices and parameter
gradients are held on each level, so where there are any it tries larger factors as well. It is not exhaustive: on 16
steps and fewer it misses nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from bptt_jax._caches import remember
from bptt_jax._cost.nested import chain_bytes, child_bytes, slice_bytes
from bptt_jax.planners._nested.search import _divisors
from bptt_jax.plans._nodes import Chain, Plan, Remat, Repeat, Steps
from bptt_jax.plans._profile import StepProfile

_FACTORS = (2, 3, 4, 5)
_MORE_FACTORS = (*_FACTORS, *(m << i for i in range(1, 40) for m in (3, 4)))


@remember(256)
def smallest_plan(profile: StepProfile, steps: int, leaves: int) -> Plan:
    """The plan of `steps` steps, of at most `leaves` leaves, with the lowest peak found.

    >>> smallest_plan(StepProfile(carry_bytes=1, residual_bytes=4), 3, 8)
    Chain(children=(Repeat(k=2, child=Remat(child=Steps(n=1))), Steps(n=1)))
    """
    return _Descent(profile).least(steps, leaves).plan


@dataclasses.dataclass(frozen=True)
class _Least:
    peak: int
    leaves: int
    plan: Plan


class _Descent:
    """The search; its peaks are the peaks of `cost` without parameters and fixed bytes, which are added once."""

    def __init__(self, profile: StepProfile):
        self._profile = profile
        self._levels_cost = slice_bytes(profile) + profile.param_bytes
        self._known: dict[tuple[int, int], _Least] = {}

    def least(self, steps: int, leaves: int) -> _Least:
        """The plan of the lowest peak; of equal ones, the one with the fewest leaves."""
        key = steps, leaves
        if key not in self._known:
            everything = _Least(steps * self._profile.residual_bytes, 1, Steps(steps))
            candidates = [everything, *self._loops(steps, leaves)]
            if leaves > 1 and not self._levels_cost:  # because a chain copies the slices of all its steps
                candidates.extend(self._with_long_rests(steps, leaves))
            self._known[key] = min(candidates, key=lambda c: (c.peak, c.leaves))
        return self._known[key]

    def _loops(self, steps: int, leaves: int) -> Iterator[_Least]:
        p = self._profile
        for k, inner_steps, rest in self._shapes(steps, leaves):
            inner = self.least(inner_steps, leaves - (rest > 0))
            carries, parts = k * p.carry_bytes, chain_bytes(steps, rest, p) if rest else 0
            peak = max(carries + inner.peak + child_bytes(inner_steps, p), carries + rest * p.residual_bytes) + parts
            loop = Repeat(k, Remat(inner.plan))
            plan = Chain((loop, Steps(rest))) if rest else loop
            yield _Least(peak, inner.leaves + (rest > 0), plan)

    def _with_long_rests(self, steps: int, leaves: int) -> Iterator[_Least]:
        """Chains with a rest about as long as each child: 2 carries for a factor of 3, but twice the leaves."""
        carry = self._profile.carry_bytes
        for k in (2, 3):
            inner_steps = -(-steps // (k + 1))
            rest_steps = steps - k * inner_steps
            if rest_steps < 1:
                continue
            inner = self.least(inner_steps, leaves // 2)
            rest = self.least(rest_steps, leaves - inner.leaves)
            after = rest.plan.children if isinstance(rest.plan, Chain) else (rest.plan,)
            peak = k * carry + max(inner.peak, rest.peak)
            yield _Least(peak, inner.leaves + rest.leaves, Chain((Repeat(k, Remat(inner.plan)), *after)))

    def _shapes(self, steps: int, leaves: int) -> Iterator[tuple[int, int, int]]:
        """Numbers of children, with the steps of a child and of the rest."""
        divisors = _divisors(steps)
        for k in divisors if self._levels_cost else [k for k in divisors if k <= 7]:
            yield k, steps // k, 0
        if leaves > 1:
            # Fewer rests and factors for long scans, to bound the number of subproblems.
            rests = 2 if self._levels_cost or steps > 512 else 3 if steps > 64 else 8
            for k in _MORE_FACTORS if self._levels_cost else _FACTORS[: 2 if steps > 4096 else None]:
                for inner_steps in range(steps // k, max(steps // k - rests, 0), -1):
                    if steps - k * inner_steps > 0:
                        yield k, inner_steps, steps - k * inner_steps
