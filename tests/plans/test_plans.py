"""The pure layer: plans, costs, pictures, budgets, and the planner."""

import dataclasses
import functools
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bptt_jax import Chain, Remat, Repeat, StepProfile, Steps, cost, make_plan
from bptt_jax._budget import budget_to_bytes
from bptt_jax.errors import BudgetError
from bptt_jax.plans import Advance, Record, length, notation, parse, render, simulate
from bptt_jax.plans._nodes import fold, is_normal_chain

NESTED = Chain((Repeat(4, Remat(Chain((Repeat(3, Remat(Steps(5))), Steps(2))))), Steps(7)))


def test_equal_plans_are_equal_and_hash_alike():
    again = Chain((Repeat(4, Remat(Chain((Repeat(3, Remat(Steps(5))), Steps(2))))), Steps(7)))
    assert again == NESTED
    assert hash(again) == hash(NESTED)
    assert Chain((Steps(7), Repeat(4, Remat(Chain((Repeat(3, Remat(Steps(5))), Steps(2))))))) != NESTED
    assert (length(NESTED), notation(NESTED)) == (75, "(4*[(3*[5] + 2)] + 7)")


def test_plans_are_graphs_and_may_be_deep():
    """A million steps in twenty nodes, and a tree deeper than Python's stack."""
    doubled = Steps(1)
    for _ in range(20):
        doubled = Chain((Remat(doubled), doubled))
    assert length(doubled) == 2**20
    visits = []
    fold(doubled, lambda node, children: visits.append(node))
    assert len(visits) == 1 + 2 * 20
    deep = Steps(1)
    for _ in range(5000):
        deep = Remat(deep)
    profile = StepProfile(carry_bytes=1, residual_bytes=1)
    assert cost(deep, profile).forward_steps == 5001
    assert sum(isinstance(event, Advance | Record) for event in simulate(deep)) == 5001


@pytest.mark.parametrize(
    ("children", "found"), [(Steps(3), "one Steps"), (3, "3 of type int"), (None, "None of type NoneType")]
)
def test_children_that_are_no_sequence_are_refused(children, found):
    message = f"Chain.children must be a sequence of plans, got {found}; put them into a tuple: Chain((a, b))."
    with pytest.raises(TypeError, match=re.escape(message)):
        Chain(children)
    assert Chain([Steps(3)]) == Chain((Steps(3),))


def test_what_is_no_profile_is_refused():
    message = "the profile must be a StepProfile, as bptt_jax.profile measures one, got 7."
    with pytest.raises(TypeError, match=re.escape(message)):
        cost(Steps(3), 7)
    with pytest.raises(TypeError, match=re.escape(message)):
        make_plan(7, 2, 3)


def test_cost_by_hand():
    profile = StepProfile(carry_bytes=10, residual_bytes=100, x_bytes=1, y_bytes=2, param_bytes=1000, fixed_bytes=5)
    assert cost(Steps(7), profile).peak_bytes == 7 * 100 + 1000 + 5 == profile.store_all_bytes(7)
    copying = dataclasses.replace(profile, copied_bytes=10, unit_axis_bytes=1)
    assert cost(Steps(7), copying).peak_bytes == 7 * 110 + 1000 + 5 == copying.store_all_bytes(7)
    loop = cost(Repeat(4, Remat(Steps(5))), profile)
    slices = 5 * (2 * 1 + 2) + 1000
    assert loop.peak_bytes == 4 * 10 + 5 * 100 + slices + 1000 + 5
    assert (loop.forward_steps, loop.program_size) == (40, 1)
    chain = cost(Chain((Repeat(4, Remat(Steps(5))), Steps(3))), profile)
    parts = 23 * (1 + 2 * 2) + 3 * 2 * 1 + 1000
    assert chain.peak_bytes == max(4 * 10 + 5 * 100 + slices, 4 * 10 + 3 * 100) + parts + 1000 + 5
    assert (chain.forward_steps, chain.program_size) == (43, 2)
    three = cost(Chain((Repeat(4, Remat(Steps(5))), Repeat(2, Remat(Steps(4))), Steps(3))), profile)
    parts = 31 * (1 + 2 * 2) + 3 * 2 * 1 + 2 * 1000
    second = 4 * 10 + 2 * 10 + 4 * 100 + 4 * (2 * 1 + 2) + 1000
    assert three.peak_bytes == max(4 * 10 + 5 * 100 + slices, second) + parts + 1000 + 5


def test_a_chain_out_of_normal_form_is_charged_the_sum():
    profile = StepProfile(carry_bytes=1, residual_bytes=10)
    assert cost(Chain((Remat(Steps(8)), Steps(8))), profile).peak_bytes == 81 + 80
    assert cost(Chain((Repeat(2, Remat(Steps(8))), Steps(8))), profile).peak_bytes == 82
    assert cost(Chain((Repeat(1, Remat(Steps(8))), Steps(8))), profile).peak_bytes == 81 + 80
    assert cost(Chain((Repeat(2, Remat(Steps(4))), Remat(Steps(8)))), profile).peak_bytes == 42 + 81


def test_picture_of_a_plan_with_a_kept_rest():
    assert render(Chain((Repeat(2, Remat(Steps(4))), Steps(3)))).splitlines() == [
        "(2*[4] + 3)",
        "step 0        10",
        "  1  >>>>>>>>     advance 0..8",
        "  2  |   |   rrr  record 8..11",
        "  3  |   |   <<<  backward 8..11",
        "  4  |   rrrr     record 4..8",
        "  5  |   <<<<     backward 4..8",
        "  6  rrrr         record 0..4",
        "  7  <<<<         backward 0..4",
        "> advance   r record   < backward   | kept carry   : kept residuals",
    ]


def test_picture_shows_residuals_that_are_kept_while_others_are_worked_on():
    lines = render(Chain((Steps(3), Repeat(2, Remat(Steps(2)))))).splitlines()
    assert lines[3] == "  2  :::>>>>  advance 3..7"


def test_long_pictures_are_cut():
    text = render(Repeat(1000, Remat(Steps(1000))), width=40, rows=10)
    lines = text.splitlines()
    assert len(lines) == 2 + 10 + 1
    assert "... 1992 rows ..." in text
    assert lines[-2].endswith("backward 0..1000")
    assert render(Steps(0)) == "0\n(no steps)"


@pytest.mark.parametrize(
    ("budget", "bytes_"),
    [(1, 1), ("1B", 1), ("64MiB", 64 * 2**20), ("1.5GB", 1_500_000_000), ("5%", 50), ("2 KiB", 2048), (".5kB", 500)],
)
def test_budgets(budget, bytes_):
    assert budget_to_bytes(budget, store_all_bytes=1000) == bytes_


profiles = st.builds(
    StepProfile,
    carry_bytes=st.integers(1, 100),
    residual_bytes=st.integers(0, 1000),
    x_bytes=st.sampled_from((0, 0, 5)),
    y_bytes=st.sampled_from((0, 0, 3)),
    param_bytes=st.sampled_from((0, 700)),
)


def is_normal(plan):
    """Every Remat is the child of a loop of two or more; every Chain is such loops and a last child kept."""
    match plan:
        case Steps():
            return True
        case Remat():
            return False
        case Repeat(k, Remat(child)):
            return k >= 2 and is_normal(child)
        case Repeat(k, child):
            return is_normal(child)
        case Chain(children):
            return is_normal_chain(plan) and all(map(is_normal, children))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(profile=profiles, steps=st.integers(0, 3000), share=st.floats(0.001, 1.2))
def test_planner_fits_any_budget_or_says_what_would(profile, steps, share):
    budget = math.ceil(share * profile.store_all_bytes(steps)) or 1
    try:
        plan = make_plan(profile, steps, budget)
    except BudgetError as error:
        smallest = error.smallest_bytes
        assert smallest > budget
        plan = make_plan(profile, steps, smallest)
        assert cost(plan, profile).peak_bytes == smallest
        with pytest.raises(BudgetError):
            make_plan(profile, steps, smallest - 1)
    else:
        assert cost(plan, profile).peak_bytes <= budget
        if share >= 1:
            assert plan == Steps(steps)
    assert length(plan) == steps
    assert is_normal(plan)


ON_HOST = Chain((Repeat(4, Remat(Steps(8)), kept="host"), Repeat(3, Steps(6), kept="host"), Steps(5)))


def test_where_a_loop_keeps_is_part_of_a_plan():
    assert Repeat(4, Steps(8), kept="host") != Repeat(4, Steps(8))
    assert Chain((Repeat(4, Remat(Steps(8)), "host"), Repeat(3, Steps(6), "host"), Steps(5))) == ON_HOST
    assert (notation(ON_HOST), parse("(4@[8] + 3@6 + 5)")) == ("(4@[8] + 3@6 + 5)", ON_HOST)
    assert repr(Repeat(4, Steps(8), kept="host")) == "Repeat(k=4, child=Steps(n=8), kept='host')"


@pytest.mark.parametrize("make", [Remat, functools.partial(Repeat, 2), functools.partial(Repeat, 2, kept="host")])
def test_only_outermost_loops_keep_on_the_host(make):
    message = re.escape('has a loop with kept="host", but only outermost loops keep values on the host')
    for inner in (Repeat(2, Steps(3), kept="host"), ON_HOST):
        with pytest.raises(ValueError, match=message):
            make(inner)
    with pytest.raises(ValueError, match=message):
        parse("2*[3@4]")


@pytest.mark.parametrize("kept", [None, "disk", True])
def test_other_memories_are_refused(kept):
    with pytest.raises(ValueError, match=re.escape(f'Repeat.kept must be "device" or "host", got {kept!r}.')):
        Repeat(2, Steps(3), kept=kept)


def test_the_timeline_shows_the_host():
    rows = render(ON_HOST).splitlines()
    assert rows[3].startswith("  2  !       !       !       |       rrrrrrrrrrrr")
    assert rows[6].startswith("  5  !       !       !       |       ............<<<<<<")
    assert "! carry on the host   . residuals on the host" in rows[-1]
    assert "host" not in render(NESTED)
