"""`make_plan`: always within the budget, near the optimum, small to compile, and never slower with more bytes.

The worst cases over the grid are printed, as a table, by `python -m tests.bench.planner_table`.
"""

import dataclasses
import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest

from bptt_jax import Chain, Remat, Repeat, StepProfile, Steps, cost, make_plan
from bptt_jax._caches import forget_everything
from bptt_jax._cost.time import predicted_time
from bptt_jax.errors import BudgetError
from bptt_jax.planners._nested import octaves
from bptt_jax.planners._nested.search import Search
from bptt_jax.plans import length, simulate
from bptt_jax.plans._nodes import fold, is_normal_chain
from bptt_jax.plans._profile import StepTimes
from tests.support import planner_grid as grid
from tests.support.executor import Items, execute


def is_normal(plan) -> bool:
    """The form of which XLA's bytes are known: loops over rematerialised children, then one that is not."""

    def visit(node, children):
        match node:
            case Steps():
                fine = True
            case Repeat(k, child):
                fine = k >= 2 and isinstance(child, Remat)
            case Remat(child):
                fine = not isinstance(child, Remat)
            case Chain(parts):
                fine = len(parts) > 1 and is_normal_chain(node) and not any(isinstance(p, Chain) for p in parts)
        return fine and all(children)

    return not isinstance(plan, Remat) and fold(plan, visit)


@pytest.mark.one_in(11)
@pytest.mark.parametrize(("steps", "ratio"), list(itertools.product(grid.LENGTHS, grid.RATIOS)))
def test_plans_are_near_the_optimum(steps, ratio):
    for point in grid.sample(steps, ratio):
        measured = grid.measure(point)
        assert measured.peak_bytes <= point.budget_bytes, point
        assert measured.program_size <= 8, point
        assert is_normal(measured.plan), point
        assert length(measured.plan) == steps
        if steps == 7:  # an advance is 5 % of the time there; see the test of short plans
            continue
        if measured.optimum <= 3.5:
            aim = 1.06 if measured.optimum <= 2.5 else 1.15
            # `least_ratio` is a lower bound for all plans of 8 leaves: with little memory, some aims are out of reach.
            assert measured.ratio <= max(aim, 1.06 * measured.least_ratio), point
            assert measured.ratio <= (grid.WORST_UP_TO_2_5 if measured.optimum <= 2.5 else grid.WORST_UP_TO_3_5), point
            if steps >= 1000 and measured.optimum <= 2.5:
                assert measured.ratio <= 1.06, point


@functools.cache
def all_plans(steps: int, carry: int, residual: int) -> tuple[tuple[int, int], ...]:
    """The peaks and advances of all plans in normal form, without those that are no better than another."""
    found = {(steps * residual, 0)}
    for k in range(2, steps + 1):
        for inner_steps in range(1, steps // k + 1):
            rest = steps - k * inner_steps
            for peak, advances in all_plans(inner_steps, carry, residual):
                for rest_peak, more in all_plans(rest, carry, residual) if rest else [(0, 0)]:
                    found.add((k * carry + max(peak, rest_peak), k * (inner_steps + advances) + more))
    best: list[tuple[int, int]] = []
    for peak, advances in sorted(found):
        if not best or advances < best[-1][1]:
            best.append((peak, advances))
    return tuple(best)


@pytest.mark.parametrize("ratio", grid.RATIOS)
@pytest.mark.parametrize("steps", [1, 2, 5, 7, 9, 12, 16])
def test_short_plans_are_the_best_of_all(steps, ratio):
    # But for 6 % of the time, since budgets are rounded down (measured 5.8 %). No budget that has a plan is missed.
    profile = grid.profile_of(ratio)
    plans = all_plans(steps, profile.carry_bytes, profile.residual_bytes)
    assert grid.smallest_bytes(profile, steps) == plans[0][0]
    for budget in {peak + more for peak, _ in plans for more in (0, 300)}:
        advances = min(advances for peak, advances in plans if peak <= budget)
        time = predicted_time(make_plan(profile, steps, budget), profile.times)
        assert time <= (3 * steps + advances) * 1.06


@pytest.mark.one_in(7)
@pytest.mark.parametrize("ratio", grid.RATIOS)
@pytest.mark.parametrize("steps", [7, 97, 1000, 4096])
def test_plans_run_in_the_budget_by_items(steps, ratio):
    for point in grid.sample(steps, ratio):
        plan = make_plan(point.profile, steps, point.budget_bytes)
        items = Items(point.profile.carry_bytes, point.profile.residual_bytes)
        ran = execute(simulate(plan), steps, items, point.budget_bytes)
        assert ran.forward_steps == cost(plan, point.profile).forward_steps


@pytest.mark.one_in(7)
@pytest.mark.parametrize("steps", [10**4, 10**5, 10**6])
def test_long_plans_run_in_the_budget_by_items(steps):
    # Of the plans with at most 60,000 leaves; the others differ in nothing that the executor looks at.
    profile, ran_any = StepProfile(1000, 3500), False
    for point in grid.sample(steps, 3.5):
        plan = make_plan(profile, steps, point.budget_bytes)
        if predicted_time(plan, StepTimes(0, 0, 0, block=1)) < 60_000:
            execute(simulate(plan), steps, Items(1000, 3500), point.budget_bytes)
            ran_any = True
    assert ran_any


SIZES = st.one_of(st.sampled_from([0, 1, 2, 8, 100, 32_768]), st.integers(1, 10**6))


@st.composite
def profiles(draw):
    slices = st.sampled_from([0, 0, 0, 1, 100, 16_384])
    times = StepTimes(block=draw(st.sampled_from([0, 0, 0, 3])))
    params = draw(st.sampled_from([0, 0, 100, 10**6]))
    sizes = draw(SIZES), draw(SIZES), draw(slices), draw(slices), params, draw(st.sampled_from([0, 7]))
    return StepProfile(*sizes, times)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(profiles(), st.integers(0, 1100), st.lists(st.floats(0, 1), min_size=2, max_size=4))
def test_more_bytes_never_cost_more_time_and_every_plan_fits(profile, steps, shares):
    smallest, everything = grid.smallest_bytes(profile, steps), cost(Steps(steps), profile).peak_bytes
    assert smallest <= everything
    budgets = {smallest, everything, *(int(smallest * (everything / max(smallest, 1)) ** share) for share in shares)}
    slowest = math.inf
    for budget in sorted(b for b in budgets if b >= max(smallest, 1)):
        plan = make_plan(profile, steps, budget)
        found = cost(plan, profile)
        assert found.peak_bytes <= budget
        assert found.program_size <= 8
        assert length(plan) == steps
        assert is_normal(plan)
        time = predicted_time(plan, profile.times)
        assert time <= slowest * (1 + 1e-12)
        slowest = time


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(profiles(), st.integers(1, 1100))
def test_below_the_smallest_budget_the_error_names_it(profile, steps):
    smallest = grid.smallest_bytes(profile, steps)
    if smallest < 2:
        return
    with pytest.raises(BudgetError) as raised:
        make_plan(profile, steps, smallest - 1)
    assert raised.value.smallest_bytes == smallest
    assert cost(make_plan(profile, steps, smallest), profile).peak_bytes <= smallest


@pytest.mark.slow
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.floats(1, 19), st.sampled_from(grid.RATIOS))
def test_the_smallest_budget_is_logarithmic(bits, ratio):
    steps = int(2**bits)
    profile = grid.profile_of(ratio)
    most = profile.residual_bytes + (2 * math.log2(steps) + 2) * profile.carry_bytes
    assert grid.smallest_bytes(profile, steps) <= most


@pytest.mark.parametrize("steps", grid.LENGTHS)
def test_the_full_budget_keeps_everything(steps):
    profile = StepProfile(1000, 3500, x_bytes=10, param_bytes=500, fixed_bytes=7)
    assert make_plan(profile, steps, "100%") == make_plan(profile, steps) == Steps(steps)
    assert make_plan(profile, steps, profile.store_all_bytes(steps)) == Steps(steps)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(profiles(), st.integers(2, 600), st.integers(1, 127), st.sampled_from([(1, 2), (1, 1), (4, 1)]))
@hypothesis.example(StepProfile(237, 100, param_bytes=100), 216, 31, (1, 2))  # a chain of three
@hypothesis.example(StepProfile(67, 905, param_bytes=100), 304, 111, (1, 2))  # a child planned again for less memory
def test_the_search_charges_at_least_what_cost_does(profile, steps, units, scale):
    lattice = next(iter(octaves._octaves(profile, 10**9)), None)
    if lattice is None:
        return
    lattice = dataclasses.replace(lattice[0], coarse=scale[0], fine=scale[1])
    search = Search(lattice, octaves.reach_table(lattice, 127, 6))
    found = search.find(steps, units, 8)
    if found is None:
        return
    of_cost = cost(found.plan, profile)
    assert of_cost.forward_steps - steps == found.advances
    assert of_cost.program_size == found.leaves <= 8
    assert of_cost.peak_bytes - profile.param_bytes - profile.fixed_bytes <= lattice.bytes(units)
    assert search.least_advances(steps, units, 8) <= found.advances


def test_slices_make_factorisations_without_a_rest_win():
    sliced = StepProfile(carry_bytes=32_768, residual_bytes=196_608, x_bytes=16_384, y_bytes=16_384)
    plan = make_plan(sliced, 1000, "7%")
    assert isinstance(plan, Repeat)
    assert cost(plan, sliced).peak_bytes <= 0.07 * sliced.store_all_bytes(1000)
    # A prime has none, and the rest of a chain copies the slices of all steps.
    assert grid.smallest_bytes(sliced, 1009) > 3 * grid.smallest_bytes(sliced, 1000)


def test_blocks_that_cost_time_are_made_longer():
    dear = StepProfile(1000, 6000, times=StepTimes(block=20))
    cheap = StepProfile(1000, 6000)
    budget = 80_000
    blocks = StepTimes(0, 0, 0, block=1)
    plans = [make_plan(profile, 1000, budget) for profile in (dear, cheap)]
    assert predicted_time(plans[0], blocks) < predicted_time(plans[1], blocks)
    assert predicted_time(plans[0], dear.times) < predicted_time(plans[1], dear.times)


def test_plans_are_remembered_and_the_same_in_every_process():
    profile = StepProfile(1000, 3500)
    first = make_plan(profile, 1000, 60_000)
    assert make_plan(profile, 1000, 60_000) is first
    forget_everything()
    assert make_plan(profile, 1000, 60_000) == first


@pytest.mark.parametrize("share", ["30%", "50%", "70%"])
def test_what_the_search_charges_too_much_is_used(share):
    """With slices and parameters it rounds up; no loop with a rest that fits is faster than what is found."""
    profile = StepProfile(1024, 7200, x_bytes=1024, param_bytes=65_536)
    budget = int(share[:-1]) * profile.store_all_bytes(1000) // 100
    loops = [Repeat(k, Remat(Steps(n))) for n in range(1, 501) for k in range(2, 1000 // n + 1)]
    plans = [Chain((loop, Steps(1000 - length(loop)))) for loop in loops if length(loop) < 1000]
    fitting = [cost(plan, profile).forward_steps for plan in plans if cost(plan, profile).peak_bytes <= budget]
    assert cost(make_plan(profile, 1000, share), profile).forward_steps <= 1.01 * min(fitting)
