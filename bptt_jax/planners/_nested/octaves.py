"""The planner of the nest: the fastest plan within the bytes, with at most `MOST_LEAVES` copies of the step.

Optimal trees have hundreds of distinct leaves and would take minutes to compile. Here equal neighbours are grouped into
loops, because a loop is compiled once. Fewer leaves cost a few per cent of time: `reach.py` has a lower bound for it,
and `search.py` finds the plans.

Budgets are searched on a lattice, from the asked budget downwards. A plan for fewer bytes fits more bytes too, so more
bytes never cost more time. The search stops where the lower bound on the time of all smaller budgets is no better than
the best plan so far. The budgets of an octave, between 64 and 128 units of memory, share their subproblems. The
search starts a quarter above the budget, because it rounds copies and sums up on each level, so a plan charged too much
may fit. The last resort is the plan of the fewest bytes, from `smallest.py`.

The bytes of every plan are computed by `bptt_jax.cost`, and a plan exceeding its budget is not taken.

Nearest paper: Gruslys et al. (2016), section 3.4, for trees without a limit on their leaves (`planners.exact`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from bptt_jax._caches import remember
from bptt_jax._cost.cost import cost
from bptt_jax._cost.nested import slice_bytes
from bptt_jax._cost.time import predicted_time
from bptt_jax.planners import exact
from bptt_jax.planners._nested import smallest
from bptt_jax.planners._nested.reach import MOST_LEAVES, Lattice, reach_table
from bptt_jax.planners._nested.search import Search
from bptt_jax.plans._nodes import Plan
from bptt_jax.plans._profile import StepProfile

_UNITS = 128  # a budget is between half and all of this many units, so it has 7 significant bits
_FINEST = 2  # units of half a carry, where a carry is not larger than a step's residuals
_BEYOND = 1.25  # the first budget searched over the asked one, because copies and sums are rounded up on each level
_ENOUGH = 1.003  # ratio to the least possible time; more leaves are not tried for a smaller gain
_BLOCKS = (1, 4, 16, 64)  # least lengths of blocks, tried in turn where blocks cost time
_LEAVES = (2, 4, MOST_LEAVES)  # limits on leaves, tried in turn
_LONG_BITS = 17  # bits of a length; for longer scans, budgets near the smallest are not searched


def smallest_plan(profile: StepProfile, length: int) -> Plan:
    """The plan of the fewest bytes found."""
    return smallest.smallest_plan(profile, length, MOST_LEAVES)


@remember(1024)
def fastest(profile: StepProfile, length: int, budget_bytes: int) -> Plan | None:
    """The fastest fitting plan found for any lattice budget up to a little above `budget_bytes`; None if none fits."""
    last_resort: _Timed | None = None
    if _is_tight(profile, length, budget_bytes):
        last_resort = _timed(smallest_plan(profile, length), profile)
    least_bytes = 0 if last_resort is None else last_resort.peak_bytes
    if budget_bytes < least_bytes:
        return None
    always_bytes = profile.fixed_bytes + profile.param_bytes
    # Near the smallest budget a search of a million steps would take seconds; there the smallest plan has to do.
    near_bytes = 2 * max(0, length.bit_length() - _LONG_BITS) * profile.carry_bytes if least_bytes else 0
    # Not near the smallest budget, because its plan is known.
    is_rounded = slice_bytes(profile) + profile.param_bytes > 0 and budget_bytes > _BEYOND * least_bytes
    beyond = _BEYOND if is_rounded else 1.0
    best: _Timed | None = None
    for lattice, first, last in _octaves(profile, int(beyond * (budget_bytes - always_bytes))):
        worth_units = lattice.units_for(max(least_bytes + near_bytes - always_bytes, 0))
        if first < worth_units or (best and _least_time(profile, length, lattice.bytes(first)) >= best.time):
            break
        for units in _budgets(profile, lattice, first, max(last, worth_units)):
            if best and _bound(profile, length, lattice, units, MOST_LEAVES) >= best.time:
                break
            found = _timed_plan(profile, length, lattice, units)
            if found is not None and found.peak_bytes <= budget_bytes and (best is None or found.time < best.time):
                best = found
    best = best or last_resort or _timed(smallest_plan(profile, length), profile)
    if last_resort is not None and last_resort.time < best.time:
        best = last_resort
    return best.plan if best.peak_bytes <= budget_bytes else None


def _is_tight(profile: StepProfile, length: int, budget_bytes: int) -> bool:
    """Whether the budget may be below the smallest one, which takes up to a quarter of a second to find out.

    Without slices the smallest budget is at most that of nests of two, with two carries on each level.
    """
    by_level = profile.carry_bytes + profile.param_bytes
    of_nests_of_two = profile.residual_bytes + 2 * (length.bit_length() + 1) * by_level + profile.fixed_bytes
    return slice_bytes(profile) > 0 or budget_bytes < of_nests_of_two


def _budgets(profile: StepProfile, lattice: Lattice, first: int, last: int) -> Iterator[int]:
    """The budgets of one lattice, descending; farther apart where the bound is loose, because more are tried then."""
    for units in range(first, last - 1, -1):
        if profile.times.block:
            step = 8
        elif lattice.copies or lattice.coarse > 1:
            step = 4
        else:
            step = 1 if units < _UNITS // 2 else 2
        if units % step == 0:
            yield units


@dataclasses.dataclass(frozen=True)
class _Timed:
    time: float
    peak_bytes: int
    plan: Plan


def _timed(plan: Plan, profile: StepProfile) -> _Timed:
    return _Timed(predicted_time(plan, profile.times), cost(plan, profile).peak_bytes, plan)


def _octaves(profile: StepProfile, free_bytes: int) -> Iterator[tuple[Lattice, int, int]]:
    """Lattices from the one for `free_bytes` downwards, each with its largest and its smallest budget in units."""
    carry, residual = max(profile.carry_bytes, 1), max(profile.residual_bytes, 1)
    finest = _FINEST
    # The finest unit is half a carry, and at most a step's residuals.
    while carry > residual * finest:
        finest *= 2
    coarse, fine = 1, finest
    while free_bytes * fine // (carry * coarse) >= _UNITS:
        coarse, fine = (coarse, fine // 2) if fine > 1 else (coarse * 2, 1)
    while True:
        lattice = Lattice(carry, residual, profile.x_bytes, profile.y_bytes, profile.param_bytes, coarse, fine)
        first = min(lattice.units(free_bytes), _UNITS - 1)
        if lattice.most_steps(first) < 1:  # not even the residuals of one step
            return
        if fine == finest:
            yield lattice, first, 1
            return
        yield lattice, first, _UNITS // 2
        coarse, fine = (coarse // 2, 1) if coarse > 1 else (1, fine * 2)


@remember(4096)
def _timed_plan(profile: StepProfile, length: int, lattice: Lattice, units: int) -> _Timed | None:
    """The fastest plan found by the search for one lattice budget."""
    enough = _ENOUGH * _bound(profile, length, lattice, units, MOST_LEAVES)
    budget_bytes = lattice.bytes(units) + profile.fixed_bytes + profile.param_bytes
    best: _Timed | None = None
    for block, leaves in itertools.product(_BLOCKS if profile.times.block else _BLOCKS[:1], _LEAVES):
        if block > 1 and 2 * block > min(length, lattice.most_steps(units)):
            continue
        search = _search_of(profile, length, dataclasses.replace(lattice, least_block=block), units)
        if leaves < MOST_LEAVES and _bound(profile, length, lattice, units, leaves) > enough:
            continue
        found = search.find(length, units, leaves)
        if found is None or (timed := _timed(found.plan, profile)).peak_bytes > budget_bytes:
            continue
        best = timed if best is None or timed.time < best.time else best
        if best.time <= enough:
            break
    return best


def _bound(profile: StepProfile, length: int, lattice: Lattice, units: int, leaves: int) -> float:
    """A lower bound on the time of the plans for one lattice budget, and for smaller ones of the same lattice."""
    advances = _search_of(profile, length, lattice, units).least_advances(length, units, leaves)
    return _time_of(profile, length, advances, lattice.bytes(units))


@remember(4096)
def _least_time(profile: StepProfile, length: int, free_bytes: int) -> float:
    """A lower bound on the time of any plan within `free_bytes`: the optimum of `exact`, for items in any mixture."""
    advances = sum(max(0, length - reach) for reach in _reaches(profile, length, free_bytes)[1:])
    return _time_of(profile, length, advances, free_bytes)


@remember(4096)
def _reaches(profile: StepProfile, length: int, free_bytes: int) -> list[int]:
    """Upper bounds on the steps evaluated at most 0, 1, 2, ... times each by a plan, up to the length."""
    carry, residual = max(profile.carry_bytes, 1), max(profile.residual_bytes, 1)
    # Items are rounded down to whole units, so a plan within the bytes is within the units: a bound in small numbers.
    unit = min(carry, residual) if free_bytes > 512 * min(carry, residual) else -(-min(carry, residual) // 4)
    if free_bytes > 8192 * unit:  # a looser bound, because the time of `exact.reaches` is linear in the units
        return [0, 1 + free_bytes // residual, length]
    found: list[int] = []
    for reach in exact.reaches(free_bytes // unit, residual // unit, carry // unit):
        found.append(reach)
        if reach >= length or len(found) > 2 * length.bit_length() + 2:
            return found
    raise AssertionError("the reaches do not end")


@remember(64)
def _tabulated(lattice: Lattice, advances: int) -> Search:
    return Search(lattice, reach_table(lattice, _UNITS - 1, advances))


@remember(4096)
def _search_of(profile: StepProfile, length: int, lattice: Lattice, units: int) -> Search:
    """The search with the smallest table, of those tried, to reach `length` steps in `units` units."""
    advances = max(2, len(_reaches(profile, length, lattice.bytes(units))) - 1)
    most = 2 * length.bit_length() + 2  # more than nests with k = 2 take
    while True:
        search = _tabulated(lattice, min(advances, most))
        if advances >= most or search.reaches(length, units):
            return search
        advances += 1 + advances // 2


def _time_of(profile: StepProfile, length: int, advances: float, free_bytes: int) -> float:
    """The least time of a plan with `advances`: no block is longer than its residuals fit in all of the bytes."""
    times = profile.times
    longest = max(1, free_bytes // max(profile.residual_bytes, 1))
    blocks = (length + advances) / longest if times.block else 0.0
    return length * (times.recording + times.backward) + advances * times.forward + blocks * times.block
