"""The plan that needs the fewest bytes: where the budgets of a scan begin.

Deep nests of short loops need the least: k carries a level for a factor of k in length, so about 1.9 carries for each
doubling at k = 3, and one step's residuals below. A length that does not factor leaves a rest at the end of some
loops; and rests as long as the children need fewer carries yet, but leaves of their own. The search walks down from
the length over small factors, and over few of the rests that each leaves; with slices or parameters to hold, which
cost by level, it tries larger factors as well. It is not exhaustive: on 16 steps and fewer it misses nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from bptt_jax._cost import chain_bytes, child_bytes, slice_bytes
from bptt_jax._plan import Chain, Plan, Remat, Repeat, Steps
from bptt_jax._step_profile import StepProfile
from bptt_jax.errors import FIXED_PART
from bptt_jax.planners._search import _divisors

_FACTORS = (2, 3, 4, 5)
_MORE_FACTORS = (*_FACTORS, *(m << i for i in range(1, 40) for m in (3, 4)))


@functools.lru_cache(maxsize=256)
def smallest_plan(profile: StepProfile, steps: int, leaves: int) -> Plan:
    """The plan of so many steps, of at most `leaves` leaves, with the lowest peak that the search finds.

    >>> smallest_plan(StepProfile(carry_bytes=1, residual_bytes=4), 3, 8)
    Chain(children=(Repeat(k=2, child=Remat(child=Steps(n=1))), Steps(n=1)))
    """
    return _Descent(profile).least(steps, leaves, is_whole=True).plan


@dataclasses.dataclass(frozen=True)
class _Least:
    base: int  # the peak without what loops take
    loops: int
    leaves: int
    plan: Plan


class _Descent:
    """Peaks are those of `cost`, less the parameters and fixed bytes that it adds once."""

    def __init__(self, profile: StepProfile):
        self._profile = profile
        self._levels_cost = slice_bytes(profile) + profile.param_bytes
        self._known: dict[tuple[int, int, bool], _Least] = {}

    def least(self, steps: int, leaves: int, is_whole: bool = False) -> _Least:
        """The best; of the whole plan one loop is free."""
        key = steps, leaves, is_whole
        if key not in self._known:
            everything = _Least(steps * self._profile.residual_bytes, 0, 1, Steps(steps))
            candidates = [everything, *self._loops(steps, leaves)]
            if leaves > 1 and not self._levels_cost:  # a chain copies the slices of all its steps
                candidates.extend(self._with_long_rests(steps, leaves))
            self._known[key] = min(candidates, key=lambda c: (self._peak(c, int(is_whole)), c.leaves))
        return self._known[key]

    def _peak(self, found: _Least, free: int) -> int:
        return found.base + max(found.loops - free, 0) * self._profile.loop_bytes

    def _loops(self, steps: int, leaves: int) -> Iterator[_Least]:
        p = self._profile
        for k, inner_steps, rest in self._shapes(steps, leaves):
            inner = self.least(inner_steps, leaves - (rest > 0))
            carries, parts = k * p.carry_bytes, chain_bytes(steps, rest, p) if rest else 0
            base = max(carries + inner.base + child_bytes(inner_steps, p), carries + rest * p.residual_bytes) + parts
            loop = Repeat(k, Remat(inner.plan))
            plan = Chain((loop, Steps(rest))) if rest else loop
            yield _Least(base, inner.loops + 1, inner.leaves + (rest > 0), plan)

    def _with_long_rests(self, steps: int, leaves: int) -> Iterator[_Least]:
        """As many steps again in the rest as in each child: 2 carries for a factor of 3, but twice the leaves."""
        carry = self._profile.carry_bytes
        for k in (2, 3):
            inner_steps = -(-steps // (k + 1))
            rest_steps = steps - k * inner_steps
            if rest_steps < 1:
                continue
            inner = self.least(inner_steps, leaves // 2)
            rest = self.least(rest_steps, leaves - inner.leaves)
            after = rest.plan.children if isinstance(rest.plan, Chain) else (rest.plan,)
            base = k * carry + max(inner.base, rest.base)
            # A chain takes a loop's bytes for each child beyond the second, and this one has one more than the rest.
            loops = inner.loops + 1 + rest.loops + isinstance(rest.plan, Chain)
            yield _Least(base, loops, inner.leaves + rest.leaves, Chain((Repeat(k, Remat(inner.plan)), *after)))

    def _shapes(self, steps: int, leaves: int) -> Iterator[tuple[int, int, int]]:
        """Counts of children, their steps, and what is left."""
        divisors = _divisors(steps)
        for k in divisors if self._levels_cost else [k for k in divisors if k <= 7]:
            yield k, steps // k, 0
        if leaves > 1:
            rests = 2 if self._levels_cost or steps > 512 else 3 if steps > 64 else 8
            for k in _MORE_FACTORS if self._levels_cost else _FACTORS[: 2 if steps > 4096 else None]:
                for inner_steps in range(steps // k, max(steps // k - rests, 0), -1):
                    if steps - k * inner_steps > 0:
                        yield k, inner_steps, steps - k * inner_steps


def shares(profile: StepProfile, copies: int, smallest: int) -> dict[str, int]:
    """What the smallest budget consists of; `copies` are the bytes of copies of xs and ys, without margin."""
    if profile.block_peaks:
        steps, peak = profile.block_peaks[0]
        fixed = profile.fixed_bytes + max(peak - steps * (profile.residual_bytes + profile.block_bytes), 0)
    else:
        fixed = profile.fixed_bytes + profile.product_bytes + (profile.param_bytes if profile.plain is None else 0)
    copies = profile.with_margin(copies)
    fixed = min(profile.with_margin(fixed), smallest - copies)
    step = min(profile.residual_bytes + profile.block_bytes, smallest - copies - fixed)
    of_carries = f"carries ({profile.carry_bytes:,} bytes each) and copies"
    made_of = {FIXED_PART: fixed, "what one step keeps for its backward": step}
    made_of[of_carries] = smallest - copies - fixed - step
    return made_of | ({"copies that XLA makes of all xs or ys": copies} if copies else {})
