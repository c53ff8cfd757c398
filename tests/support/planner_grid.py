"""The grid on which `make_plan` is held against the exact optimum of the same bytes.

Bytes and memory of the optimum: the first carry and the residuals of one step are there in any case, so B bytes are
(B − h − s)/h units for it. Where its table is out of reach, its lower bound, of the same recurrences, stands in.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from bptt_jax import StepProfile, cost, make_plan
from bptt_jax.planners import exact
from bptt_jax.planners._nested import octaves
from bptt_jax.plans import Plan

LENGTHS = (7, 97, 100, 1000, 4096, 10**4, 10**5, 10**6)
RATIOS = (1, 2, 3.5, 6, 12)
WORST_UP_TO_2_5 = 1.11  # measured 1.106, at 97 steps in 10 carries; from 1000 steps on, 1.06 holds
WORST_UP_TO_3_5 = 1.24  # measured 1.222 on the grid; see `least_ratio`
_TABLE = 510  # units of the exact optimum's table
_BUDGETS = 9  # between the smallest and everything, in a geometric sequence


@dataclasses.dataclass(frozen=True)
class Point:
    steps: int
    ratio: float
    budget_bytes: int

    @property
    def profile(self) -> StepProfile:
        return profile_of(self.ratio)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found at a point.

    Attributes:
      optimum: evaluations per step of the exact optimum, or of its lower bound.
      ratio: predicted time over that of the optimum, with a backward of two forwards.
      least_ratio: the same for a lower bound on the time of all plans with 8 leaves that `make_plan` chooses from.
    """

    plan: Plan
    peak_bytes: int
    program_size: int
    optimum: float
    ratio: float
    least_ratio: float


def smallest_bytes(profile: StepProfile, steps: int) -> int:
    return cost(octaves.smallest_plan(profile, steps), profile).peak_bytes


def profile_of(ratio: float) -> StepProfile:
    return StepProfile(carry_bytes=1000, residual_bytes=int(1000 * ratio))


def sample(steps: int, ratio: float) -> Iterator[Point]:
    """All points of short scans, and every third of long ones, for which planning takes longer."""
    stride = 1 if steps <= 1000 else 3
    return itertools.islice(points(steps, ratio), int(2 * ratio) % stride, None, stride)


def points(steps: int, ratio: float) -> Iterator[Point]:
    profile = profile_of(ratio)
    smallest, everything = smallest_bytes(profile, steps), profile.store_all_bytes(steps)
    for i in range(_BUDGETS + 1):
        yield Point(steps, ratio, round(smallest * (everything / smallest) ** (i / _BUDGETS)))
    # Where the bounds on the ratio apply, and most is to be gained.
    for carries in (16, 20, 25, 32, 40, 50, 64, 80, 100, 150, 250):
        budget = profile.residual_bytes + (carries + 1) * profile.carry_bytes
        if smallest <= budget <= everything:
            yield Point(steps, ratio, budget)


@functools.lru_cache(maxsize=4096)
def measure(point: Point) -> Measured:
    plan = make_plan(point.profile, point.steps, point.budget_bytes)
    found = cost(plan, point.profile)
    optimum, backward = _optimum(point), 2 * point.steps
    ratio = (found.forward_steps + backward) / (optimum + backward)
    return Measured(
        plan,
        found.peak_bytes,
        found.program_size,
        optimum / point.steps,
        ratio,
        _least_time(point) / (optimum + backward),
    )


def _optimum(point: Point) -> int:
    carries = (point.budget_bytes - point.profile.residual_bytes) / point.profile.carry_bytes - 1
    units, residual_units = max(0, math.floor(2 * carries)), int(2 * point.ratio)  # of half a carry each
    if units > 20_000:  # more than that keeps so much that most steps are evaluated once: a bound is enough
        reach = 1 + units // residual_units
        return point.steps + max(0, point.steps - reach)
    if point.steps > 1000 or units > _TABLE:
        return exact.lower_bound(point.steps, units, residual_units, carry_units=2)
    exact.cost(point.steps, _TABLE, residual_units, carry_units=2)  # one table for all budgets
    return exact.cost(point.steps, units, residual_units, carry_units=2)


def _least_time(point: Point) -> float:
    octave = next(octaves._octaves(point.profile, point.budget_bytes), None)
    if octave is None:
        return math.inf
    lattice, first, _ = octave
    return octaves._bound(point.profile, point.steps, lattice, min(first + 1, octaves._UNITS - 1), 8)
