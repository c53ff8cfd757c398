"""Plans of equal segments, on as many levels as the budget demands.

A plan of d levels divides its steps into equal segments, each rematerialised and divided again d−1 times, and a
remainder at the end that is kept:

    plan(n, 0) = Steps(n)
    plan(n, d) = Repeat(k, Remat(plan(m, d−1))), followed by Steps(n − k·m) if that is not 0

so each of the k·m steps is evaluated once more than below, no length needs padding, and the plan is in the normal
form that `cost` describes. With d levels the bytes are about (d+1)·(h^d·s·n)^(1/(d+1)) for a carry of h bytes and
residuals of s bytes per step: n steps need some log2(n) levels at the most.

The planner takes the fewest evaluations that fit. Segment sizes are sought among the divisors of n and a geometric
grid, so the search is independent of n but for the factorisation; it is exact only on that grid.
"""

from __future__ import annotations

import functools
import math

from bptt_jax._budget import budget_to_bytes
from bptt_jax._cost import cost
from bptt_jax._plan import Chain, Plan, Remat, Repeat, Steps, _as_count
from bptt_jax._plan import length as length_of
from bptt_jax._step_profile import StepProfile
from bptt_jax.errors import BudgetError


def make_plan(profile: StepProfile, length: int, budget: int | str | None = None) -> Plan:
    """The plan with the fewest evaluations of the step whose peak fits the budget.

    Args:
      profile: sizes of one step.
      length: number of steps, ≥ 0.
      budget: temporary bytes of the backward pass: an int, a string such as "64MiB", or "5%" of
        `profile.store_all_bytes(length)`. None keeps everything.

    Raises:
      BudgetError: if nothing fits; it names the smallest budget that would do.
      TypeError, ValueError: for a malformed budget or a negative length.

    >>> profile = StepProfile(carry_bytes=1, residual_bytes=4)
    >>> make_plan(profile, 100)
    Steps(n=100)
    >>> make_plan(profile, 100, "20%")
    Chain(children=(Repeat(k=6, child=Remat(child=Steps(n=14))), Steps(n=16)))
    """
    length = _as_count(length, 0, "length")
    budget_bytes = budget_to_bytes(budget, profile.store_all_bytes(length))
    everything = Steps(length)
    if budget_bytes is None or cost(everything, profile).peak_bytes <= budget_bytes:
        return everything
    for levels in range(1, _most_levels(length) + 1):
        plan = _fewest_evaluations(profile, length, levels, budget_bytes)
        if plan is None:
            continue
        # One level more leaves room for a longer remainder that is kept, which now and then is the better trade.
        deeper = _fewest_evaluations(profile, length, levels + 1, budget_bytes)
        return min(filter(None, (plan, deeper)), key=lambda p: _by_evaluations(p, profile))
    raise BudgetError(length, budget_bytes, smallest_bytes(profile, length))


def smallest_bytes(profile: StepProfile, length: int) -> int:
    """The smallest budget, in bytes, for which `make_plan` finds a plan of `length` steps.

    >>> smallest_bytes(StepProfile(carry_bytes=1, residual_bytes=4), 1000)
    23
    """
    plans = (_smallest(profile, length, levels) for levels in range(_most_levels(length) + 1))
    return min(cost(plan, profile).peak_bytes for plan in plans if plan is not None)


def _by_evaluations(plan: Plan, profile: StepProfile) -> tuple[int, int]:
    c = cost(plan, profile)
    return c.forward_steps, c.peak_bytes


def _fewest_evaluations(profile: StepProfile, n: int, levels: int, budget_bytes: int) -> Plan | None:
    """The cheapest plan of n steps and so many levels that fits the budget, None if there is none."""
    fitting = (
        _segments(n, k, inner)
        for m in _sizes(n)
        if (inner := _smallest(profile, m, levels - 1)) is not None
        for k in _counts(n // m)
    )
    fitting = (plan for plan in fitting if cost(plan, profile).peak_bytes <= budget_bytes)
    return min(fitting, key=lambda plan: _by_evaluations(plan, profile), default=None)


@functools.lru_cache(maxsize=4096)
def _smallest(profile: StepProfile, n: int, levels: int) -> Plan | None:
    """The plan of n steps and so many levels with the lowest peak; None if n steps do not have so many levels."""
    if levels == 0:
        return Steps(n)
    plans = (_segments(n, n // m, inner) for m in _sizes(n) if (inner := _smallest(profile, m, levels - 1)) is not None)
    return min(plans, key=lambda plan: cost(plan, profile).peak_bytes, default=None)


def _segments(n: int, k: int, inner: Plan) -> Plan:
    """k rematerialised copies of `inner`, then what is left of n steps, kept."""
    loop = Repeat(k, Remat(inner))
    rest = n - length_of(loop)
    return Chain((loop, Steps(rest))) if rest else loop


def _most_levels(n: int) -> int:
    return max(n, 1).bit_length() - 1


@functools.lru_cache(maxsize=4096)
def _sizes(n: int) -> tuple[int, ...]:
    """Sizes worth trying for segments of n steps of which at least two must fit: divisors, and the grid."""
    divisors = {d for i in range(1, math.isqrt(n) + 1) if n % i == 0 for d in (i, n // i)}
    return tuple(sorted(m for m in divisors.union(_grid(n)) if 2 * m <= n))


def _counts(most: int) -> tuple[int, ...]:
    """Numbers of segments worth trying where `most` would fit; fewer leave a longer remainder that is kept."""
    return tuple(k for k in {*_grid(most), most} if 2 <= k <= most)


def _grid(n: int) -> tuple[int, ...]:
    """1, 2, 3 and {4, 5, 6, 7}·2^i up to at least n: steps of at most a quarter, with many common divisors."""
    return (1, 2, 3, *(m << i for i in range(max(n.bit_length() - 2, 0)) for m in range(4, 8)))
