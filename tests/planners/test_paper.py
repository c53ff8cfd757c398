"""HSM, ISM and MSM: golden numbers, brute force, closed forms against tables, and plans that can be executed."""

import functools
import json
import pathlib

import checkpoint_schedules
import hypothesis
import hypothesis.strategies as st
import pytest

from bptt_jax import StepProfile, cost
from bptt_jax.planners import paper
from bptt_jax.plans import length, notation, parse, simulate
from tests.support.executor import Items, execute
from tests.support.exhaustive import Memory, fewest_evaluations

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "data" / "golden.json").read_text())
LENGTHS, SLOTS = st.integers(1, 400), st.integers(1, 30)


def numbers(key: str) -> tuple[int, ...]:
    return tuple(map(int, key.split(",")))


@pytest.mark.parametrize(("name", "function"), [("hsm", paper.hsm_cost), ("ism", paper.ism_cost)])
def test_closed_forms_are_golden_up_to_a_million_steps(name, function):
    found = {key: function(*numbers(key)) for key in GOLDEN[name]}
    assert found == GOLDEN[name]
    assert max(numbers(key)[0] for key in found) == 10**6


def test_mixed_costs_are_golden():
    # By alpha and from the largest problem down: each table then serves all that follow.
    keys = sorted(GOLDEN["msm"], key=lambda key: (numbers(key)[2], -numbers(key)[0], -numbers(key)[1]))
    for alpha in {numbers(key)[2] for key in keys}:
        of_alpha = [numbers(key) for key in keys if numbers(key)[2] == alpha]
        table = paper._msm_table(max(t for t, _, _ in of_alpha), max(m for _, m, _ in of_alpha), alpha)
        assert {f"{t},{m},{alpha}": int(table[m, t]) for t, m, _ in of_alpha} == {
            key: GOLDEN["msm"][key] for key in keys if numbers(key)[2] == alpha
        }
    assert paper.msm_cost(100, 10, 2) == GOLDEN["msm"]["100,10,2"]


@functools.cache
def hsm(t: int, m: int) -> int:
    if t < 2 or m == 1:
        return t * (t + 1) // 2
    return min(y + hsm(t - y, m - 1) + hsm(y, m) for y in range(1, t))


@functools.cache
def ism(t: int, m: int) -> int:
    if t == 0 or m == 1:
        return t * (t + 1) // 2
    return min(y + ism(t - y, m - 1) + ism(y - 1, m) for y in range(1, t + 1))


@pytest.mark.parametrize("m", range(1, 7))
def test_closed_forms_solve_the_recurrences(m):
    for t in range(60):
        assert paper.hsm_cost(t, m) == hsm(t, m)
        assert paper.ism_cost(t, m) == ism(t, m)


@pytest.mark.parametrize("m", range(2, 7))
def test_split_intervals_are_all_optimal_splits(m):
    for t in range(1, 60):
        by_residuals = [y for y in range(1, t + 1) if y + ism(t - y, m - 1) + ism(y - 1, m) == ism(t, m)]
        assert list(paper.ism_splits(t, m)) == by_residuals
        if t > 1:
            by_carry = [y for y in range(1, t) if y + hsm(t - y, m - 1) + hsm(y, m) == hsm(t, m)]
            assert list(paper.hsm_splits(t, m)) == by_carry


@pytest.mark.parametrize("t", range(1, 9))
@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_hsm_and_ism_are_optimal_over_all_policies(t, m):
    carries = Memory(m, carry=1, residual=None, holds_leaving=False, first_is_free=False, counts_worked_on=False)
    residuals = Memory(m, carry=None, residual=1, holds_leaving=True, first_is_free=True, counts_worked_on=True)
    assert paper.hsm_cost(t, m) == fewest_evaluations(t, carries)
    assert paper.ism_cost(t, m) == fewest_evaluations(t, residuals)


@pytest.mark.parametrize("t", [2, 3, 7, 10, 31, 100])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 10, 40])
def test_hsm_agrees_with_an_independent_revolve(t, m):
    forwards = 0
    for action in checkpoint_schedules.Revolve(t, m):
        if isinstance(action, checkpoint_schedules.EndReverse):
            break
        if isinstance(action, checkpoint_schedules.Forward):
            forwards += action.n1 - action.n0
    assert paper.hsm_cost(t, m) == forwards


@hypothesis.given(LENGTHS, SLOTS)
def test_costs_fall_with_memory_and_reach_plain_backpropagation(t, m):
    assert t <= paper.hsm_cost(t, m + 1) <= paper.hsm_cost(t, m) <= m * t ** (1 + 1 / m) * (1 + 1e-12)
    assert t <= paper.ism_cost(t, m + 1) <= paper.ism_cost(t, m) == paper.hsm_cost(t + 1, m) - (t + 1)
    assert paper.hsm_cost(t, max(1, t - 1)) == 2 * t - 1
    assert paper.ism_cost(t, t) == t


@hypothesis.given(st.integers(1, 400), SLOTS)
def test_hsm_and_ism_are_convex_in_the_length(t, m):
    for f in (paper.hsm_cost, paper.ism_cost):
        assert f(t + 1, m) - f(t, m) >= f(t, m) - f(t - 1, m)


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.integers(1, 60), st.integers(0, 12), st.integers(1, 6))
def test_mixed_falls_with_memory_and_contains_the_others(t, units, alpha):
    found = paper.msm_cost(t, units, alpha)
    assert t <= paper.msm_cost(t, units + 1, alpha) <= found <= paper.hsm_cost(t, units + 1)
    assert found <= paper.ism_cost(t, units // alpha + 1)
    assert paper.msm_cost(t, units, 1) == paper.ism_cost(t, units + 1)
    assert paper.msm_cost(t, alpha * (t - 1), alpha) == t


def test_mixed_is_not_convex_in_the_length():
    # So tricks that need convexity are wrong: see the module's docstring on its complexity.
    costs = [paper.msm_cost(t, 2, 2) for t in range(12)]
    assert any(costs[t + 1] - costs[t] < costs[t] - costs[t - 1] for t in range(1, 11))


# The paper's bytes: HSM m·h + s, ISM h + m·s, MSM h + s + M·h. Large units tell which items are held.
@hypothesis.settings(max_examples=40)
@hypothesis.given(st.integers(1, 120), st.integers(1, 12), st.integers(1, 6))
def test_plans_run_in_the_papers_memory_and_cost_what_it_says(t, m, alpha):
    runs = [
        (paper.hsm_plan(t, m), paper.hsm_cost(t, m), Items(1000, 1), m * 1000 + 1),
        (paper.ism_plan(t, m), paper.ism_cost(t, m), Items(1, 1000, holds_leaving=True), m * 1000 + 1),
        (paper.msm_plan(t, m, alpha), paper.msm_cost(t, m, alpha), Items(1, alpha, holds_leaving=True), 1 + alpha + m),
    ]
    for plan, expected, items, budget in runs:
        assert length(plan) == t
        assert execute(simulate(plan), t, items, budget).forward_steps == expected
        assert cost(plan, StepProfile(1, 1)).forward_steps == expected


def test_a_million_steps_need_few_nodes_and_survive_the_interpreters():
    plan = paper.hsm_plan(10**6, 20)
    assert cost(plan, StepProfile(1, 1)).forward_steps == GOLDEN["hsm"]["1000000,20"]
    line = notation(plan)
    assert len(line) < 20_000
    assert parse(line) == plan
    assert next(simulate(plan)) == next(simulate(parse(line)))


def test_a_chain_as_deep_as_the_scan_survives_the_interpreters():
    plan = paper.hsm_plan(3000, 1)
    assert cost(plan, StepProfile(1, 1)).forward_steps == 3000 * 3001 // 2
    assert parse(notation(plan)) == plan


def test_costs_and_plans_are_public_and_helpers_are_not():
    assert paper.__all__ == ["hsm_cost", "hsm_plan", "ism_cost", "ism_plan", "msm_cost", "msm_plan"]


@pytest.mark.parametrize("function", [paper.hsm_cost, paper.ism_cost, paper.hsm_plan, paper.ism_plan])
def test_malformed_numbers_are_named(function):
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        function(10, 0)
    with pytest.raises(TypeError, match="length must be an integer"):
        function(2.5, 3)
