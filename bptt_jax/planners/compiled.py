"""What `make_plan` uses: the fastest plan that fits the bytes and compiles to a few copies of the step's body.

Optimal trees have hundreds of distinct leaves. Here equal neighbours are grouped into loops and a plan has at most
`MOST_LEAVES` leaves; that costs a few percent of time, for which `_reach` has a lower bound and `_search` the plans.

Budgets are rounded down to a lattice of some seven significant bits, within an octave of which all share their
subproblems. A plan that fits some bytes fits more bytes too, so the result is the fastest that fits of the plans for
all lattice budgets up to the one asked, and somewhat above, since a plan may take less than the search charged: more
bytes never cost more time, by construction. Few of them are ever made: from there downwards, until the lower bound on
the time of what could come is no better than what has been found. The last resort is the plan with the fewest bytes,
`_smallest`, which is where the budgets of a scan begin.

Every plan's bytes are those of `bptt_jax.cost`, and a plan that should exceed its budget is not taken. All this is for
the nest; the sweep's plans are `planners.sweep`'s.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from bptt_jax._budget import budget_to_bytes
from bptt_jax._cost import _require_profile, cost
from bptt_jax._nested_cost import slice_bytes
from bptt_jax._plan import Plan, Remat, Repeat, Steps, _as_count
from bptt_jax._plan import length as length_of
from bptt_jax._step_profile import StepProfile
from bptt_jax._time import predicted_time
from bptt_jax.errors import FIXED_PART, BudgetError
from bptt_jax.planners import _smallest, exact, sweep
from bptt_jax.planners._reach import MOST_LEAVES, Lattice, reach_table
from bptt_jax.planners._search import Search

_UNITS = 128  # a budget is between half and all of this many units; every other one is on the lattice of budgets
_FINEST = 2  # units of half a carry, where a carry is not larger than a step's residuals
_BEYOND = 1.25  # of a budget is searched: the search rounds up what copies and sums take, level by level
_ENOUGH = 1.003  # of the least possible time; more leaves are not tried for less than that
_BLOCKS = (1, 4, 16, 64)  # least lengths of blocks that are tried where blocks cost time
_LEAVES = (2, 4, MOST_LEAVES)


def make_plan(profile: StepProfile, length: int, budget: int | str | None = None) -> Plan:
    """The fastest plan that it finds whose peak fits the budget, of at most 8 copies of the step's loop.

    A search, not an optimum: how much faster another plan may be, the README's "How near the optimum" has measured.

    Args:
      profile: sizes and relative times of one step.
      length: number of steps, ≥ 0.
      budget: temporary bytes of the backward pass: an int, a string such as "64MiB", or "5%" of
        `profile.store_all_bytes(length)`. None keeps everything.

    The plan is in the normal form that `bptt_jax.cost` describes. Results are remembered by profile, length and budget.

    Raises:
      BudgetError: if nothing fits; it names the smallest budget that would do.
      TypeError: if `profile` is not a `StepProfile`.
      TypeError, ValueError: for a malformed budget or a negative length.

    >>> profile = StepProfile(carry_bytes=1, residual_bytes=4)
    >>> make_plan(profile, 100)
    Steps(n=100)
    >>> make_plan(profile, 1000, "10%")
    Chain(children=(Repeat(k=10, child=Remat(child=Steps(n=91))), Steps(n=90)))
    """
    _require_profile(profile)
    length = _as_count(length, 0, "length")
    budget_bytes = budget_to_bytes(budget, profile.store_all_bytes(length))
    plan = Steps(length) if budget_bytes is None else fastest_plan(profile, length, budget_bytes)
    if plan is None:
        assert budget_bytes is not None
        least = smallest_plan(profile, length)
        smallest = cost(least, profile).peak_bytes
        raise BudgetError(length, budget, budget_bytes, smallest, shares(profile, least, smallest))
    return plan


def fastest_plan(profile: StepProfile, length: int, budget_bytes: int) -> Plan | None:
    """`make_plan` for a budget in bytes; None if nothing fits."""
    everything, bare = Steps(length), _bare(profile)
    if cost(everything, profile).peak_bytes <= budget_bytes:
        return everything
    # Planners search in what is left of the budget by all that is there in any case.
    if profile.sweep is not None and bare.sweep is not None:
        return sweep.fastest(bare.sweep, length, budget_bytes - length * profile.sweep.copied_bytes)
    plan = _fastest(bare, length, budget_bytes - length * (profile.copied_bytes + profile.unit_axis_bytes))
    return _or_single_steps(plan, profile, length, budget_bytes) if profile.unit_axis_bytes and length > 1 else plan


def smallest_plan(profile: StepProfile, length: int) -> Plan:
    """The plan that takes the fewest bytes, of those that are found."""
    bare = _bare(profile)
    if bare.sweep is not None:
        return sweep.smallest_plan(bare.sweep, length)
    plan = _smallest_nest(bare, length)
    if profile.unit_axis_bytes and length > 1:
        plan = min(plan, _single_steps(length, profile).plan, key=lambda plan: cost(plan, profile).peak_bytes)
    return plan


def _bare(profile: StepProfile) -> StepProfile:
    """The profile without what is there for each step whatever the plan."""
    sweep = None if profile.sweep is None else dataclasses.replace(profile.sweep, copied_bytes=0)
    return dataclasses.replace(profile, copied_bytes=0, unit_axis_bytes=0, sweep=sweep)


def _single_steps(length: int, profile: StepProfile) -> _Timed:
    return _timed(Repeat(length, Remat(Steps(1))), profile)


def _or_single_steps(plan: Plan | None, profile: StepProfile, length: int, budget_bytes: int) -> Plan | None:
    """A plan, or the loop over single steps where that fits and is faster: it makes no copies of a nest."""
    single = _single_steps(length, profile)
    if single.peak_bytes > budget_bytes or (plan is not None and _timed(plan, profile).time <= single.time):
        return plan
    return single.plan


def shares(profile: StepProfile, plan: Plan, smallest: int) -> dict[str, int]:
    """What the smallest budget consists of: what is predicted for its plan, in proportion; adds up to it."""
    run, sweep = profile.sweep or profile, profile.sweep
    products, working = (profile.param_bytes, 0) if sweep is None else (sweep.product_bytes, sweep.block_bytes)
    made_of = {
        FIXED_PART: run.fixed_bytes + products,
        "what one step keeps for its backward": run.residual_bytes + working,
        "copies that XLA makes of all xs or ys": length_of(plan) * run.copied_bytes,
    }
    predicted = max(cost(plan, profile).peak_bytes, sum(made_of.values()), 1)
    made_of = {name: size * smallest // predicted for name, size in made_of.items()}
    return made_of | {f"carries ({run.carry_bytes:,} bytes each) and copies": smallest - sum(made_of.values())}


def _smallest_nest(profile: StepProfile, length: int) -> Plan:
    return _smallest.smallest_plan(profile, length, MOST_LEAVES)


def _is_tight(profile: StepProfile, length: int, budget_bytes: int) -> bool:
    """Whether the budget may be below the smallest one, which takes a while to find out."""
    levels = length.bit_length()
    by_level = profile.carry_bytes + profile.param_bytes
    # The smallest budget is at most that of nests of two, of which each level holds two carries.
    little = profile.residual_bytes + 2 * (levels + 1) * by_level + profile.fixed_bytes
    return slice_bytes(profile) > 0 or budget_bytes < little


@functools.lru_cache(maxsize=1024)
def _fastest(profile: StepProfile, length: int, budget_bytes: int) -> Plan | None:
    """The fastest plan that fits of those for all lattice budgets up to a little more, None if there is none."""
    is_tight = _is_tight(profile, length, budget_bytes)
    least_bytes = cost(_smallest_nest(profile, length), profile).peak_bytes if is_tight else 0
    if budget_bytes < least_bytes:
        return None
    # So near to the smallest budget a search of a million steps would take seconds; the smallest plan has to do.
    worth_bytes = least_bytes + 2 * max(0, length.bit_length() - 17) * profile.carry_bytes if least_bytes else 0
    best: _Timed | None = None
    always_bytes = profile.fixed_bytes + profile.param_bytes
    # Not near the smallest budget, which is that of a plan which is known.
    is_rounded = slice_bytes(profile) + profile.param_bytes > 0 and budget_bytes > _BEYOND * least_bytes
    beyond = _BEYOND if is_rounded else 1.0
    for lattice, first, last in _octaves(profile, int(beyond * (budget_bytes - always_bytes))):
        if lattice.bytes(first) + always_bytes < worth_bytes:
            break
        if best is not None and _least_time(profile, length, lattice.bytes(first)) >= best.time:
            break
        for units in _budgets(profile, lattice, first, last):
            if lattice.bytes(units) + always_bytes < worth_bytes:
                break
            if best is not None and _bound(profile, length, lattice, units, MOST_LEAVES) >= best.time:
                break
            found = _timed_plan(profile, length, lattice, units)
            if found is not None and found.peak_bytes <= budget_bytes and (best is None or found.time < best.time):
                best = found
    if best is None or least_bytes:
        last_resort = _timed(_smallest_nest(profile, length), profile)
        if last_resort.peak_bytes <= budget_bytes:
            best = last_resort if best is None or last_resort.time < best.time else best
    return None if best is None else best.plan


def _budgets(profile: StepProfile, lattice: Lattice, first: int, last: int) -> Iterator[int]:
    """The budgets of one lattice, descending; farther apart where the bound is loose and more have to be tried."""
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
    """Lattices from the one that holds `free_bytes` downwards, each with its largest and its smallest budget."""
    carry, residual = max(profile.carry_bytes, 1), max(profile.residual_bytes, 1)
    finest = _FINEST
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


@functools.lru_cache(maxsize=4096)
def _timed_plan(profile: StepProfile, length: int, lattice: Lattice, units: int) -> _Timed | None:
    """The fastest plan that the search finds for one lattice budget."""
    enough = _ENOUGH * _bound(profile, length, lattice, units, MOST_LEAVES)
    budget_bytes = lattice.bytes(units) + profile.fixed_bytes + profile.param_bytes
    best: _Timed | None = None
    for block, leaves in itertools.product(_BLOCKS if profile.times.block else _BLOCKS[:1], _LEAVES):
        if block > 1 and 2 * block > min(length, lattice.most_steps(units)):
            continue
        search = _search(profile, length, dataclasses.replace(lattice, least_block=block), units)
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
    """A lower bound on the time of the plans of one lattice budget, and of smaller ones of the same lattice."""
    advances = _search(profile, length, lattice, units).least_advances(length, units, leaves)
    return _time_of(profile, length, advances, lattice.bytes(units))


@functools.lru_cache(maxsize=4096)
def _least_time(profile: StepProfile, length: int, free_bytes: int) -> float:
    """A lower bound on the time of any plan in so many bytes: that of the optimum for items in any mixture."""
    advances = sum(max(0, length - reach) for reach in _reaches(profile, length, free_bytes)[1:])
    return _time_of(profile, length, advances, free_bytes)


@functools.lru_cache(maxsize=4096)
def _reaches(profile: StepProfile, length: int, free_bytes: int) -> list[int]:
    """At least the most steps that can be evaluated at most 0, 1, 2, ... times, up to the length."""
    carry, residual = max(profile.carry_bytes, 1), max(profile.residual_bytes, 1)
    # Items no larger than the true ones and no less memory: a bound, and small numbers.
    unit = min(carry, residual) if free_bytes > 512 * min(carry, residual) else -(-min(carry, residual) // 4)
    if free_bytes > 8192 * unit:
        return [0, 1 + free_bytes // residual, length]
    found: list[int] = []
    for reach in exact.reaches(free_bytes // unit, residual // unit, carry // unit):
        found.append(reach)
        if reach >= length or len(found) > 2 * length.bit_length() + 2:
            return found
    raise AssertionError("the reaches do not end")


@functools.lru_cache(maxsize=64)
def _search_with(lattice: Lattice, advances: int) -> Search:
    return Search(lattice, reach_table(lattice, _UNITS - 1, advances))


@functools.lru_cache(maxsize=4096)
def _search(profile: StepProfile, length: int, lattice: Lattice, units: int) -> Search:
    """The search with the smallest table that reaches so many steps in so many units."""
    advances = max(2, len(_reaches(profile, length, lattice.bytes(units))) - 1)
    most = 2 * length.bit_length() + 2  # more than nests of two take
    while True:
        search = _search_with(lattice, min(advances, most))
        if advances >= most or search.reaches(length, units):
            return search
        advances += 1 + advances // 2


def _time_of(profile: StepProfile, length: int, advances: float, free_bytes: int) -> float:
    """The least time of so many advances: blocks are at most as long as their residuals fit in all of the bytes."""
    times = profile.times
    longest = max(1, free_bytes // max(profile.residual_bytes, 1))
    blocks = (length + advances) / longest if times.block else 0.0
    return length * (times.recording + times.backward) + advances * times.forward + blocks * times.block
