"""Plans for two memories fit both, are executed within both, and evaluate fewer steps with a larger host."""

import dataclasses
import math
import re

import hypothesis
import hypothesis.strategies as st
import pytest

from bptt_jax import Remat, Repeat, StepProfile, Steps, cost, make_plan
from bptt_jax._cost.time import time_of
from bptt_jax.errors import BudgetError
from bptt_jax.plans import length, simulate
from bptt_jax.plans._memories import uses_host
from bptt_jax.plans._profile import StepTimes, SweepProfile
from tests.support.executor import Items, execute

SWEEP = SweepProfile(
    4, 14, fixed_bytes=30, block_bytes=6, operand_bytes=2, product_bytes=20, block_steps=48,
    times=StepTimes(recording=1.2, backward=1.6, block=2.0),
)  # fmt: skip
SWEPT = StepProfile(carry_bytes=4, residual_bytes=24, param_bytes=20, fixed_bytes=8, sweep=SWEEP)
NESTED = StepProfile(carry_bytes=4, residual_bytes=24)


def evaluations(profile, steps, budget, host):
    return cost(make_plan(profile, steps, budget, host), profile).forward_steps / steps


def evaluations_or_none(profile, steps, budget):
    """Without the host; infinitely many where no plan fits."""
    try:
        return evaluations(profile, steps, budget, None)
    except BudgetError:
        return math.inf


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    st.sampled_from((SWEPT, NESTED)), st.integers(1, 2000), st.integers(1, 20_000), st.integers(1, 60_000)
)
def test_plans_fit_both_budgets_and_are_executed_within_them(profile, steps, budget, host):
    try:
        plan = make_plan(profile, steps, budget, host)
    except BudgetError as error:  # its bytes are a budget with a plan
        budget = error.smallest_bytes
        plan = make_plan(profile, steps, budget, host)
    found = cost(plan, profile)
    assert length(plan) == steps
    assert found.peak_bytes <= budget
    assert found.host_bytes <= host
    run = profile.sweep or profile
    items = Items(carry=run.carry_bytes, residual=run.residual_bytes)
    ran = execute(simulate(plan, profile.lowering), steps, items, budget, host)
    assert ran.forward_steps == found.forward_steps
    # Each loop has room for the values of its last child as well, though they stay on the device.
    assert ran.host_units <= found.host_bytes <= 2 * ran.host_units + 2 * steps * items.residual * (ran.host_units == 0)


@pytest.mark.parametrize("profile", [SWEPT, NESTED], ids=["sweep", "nest"])
@pytest.mark.parametrize("steps", [100, 997, 1000, 10_000])
def test_with_room_for_carries_each_step_is_evaluated_once_more_whatever_the_device_has(profile, steps):
    """The device has room for a block of a few steps."""
    budget = cost(Repeat(2, Remat(Steps(4)), kept="host"), profile).peak_bytes
    assert evaluations(profile, steps, budget, 4 * steps) <= 2.0
    assert evaluations_or_none(profile, steps, budget) > 2.3


@pytest.mark.parametrize("steps", [96, 1000, 10_000])
def test_with_room_for_residuals_no_step_is_evaluated_twice(steps):
    budget = cost(Repeat(2, Steps(8), kept="host"), SWEPT).peak_bytes
    assert evaluations(SWEPT, steps, budget, 14 * steps) == 1.0
    assert evaluations(SWEPT, steps, budget, 4 * steps) > 1.5


@pytest.mark.parametrize("steps", [1000, 9973])
def test_evaluations_fall_with_the_bytes_of_the_host(steps):
    budget = cost(Repeat(2, Steps(10), kept="host"), SWEPT).peak_bytes
    found = [evaluations(SWEPT, steps, budget, share * steps) for share in (1, 3, 6, 9, 12, 15)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 1.01 < found[0]


def test_residuals_are_evaluated_again_where_moving_them_takes_longer():
    """With a transfer of 14 bytes longer than a step takes forwards and backwards together."""
    slow = dataclasses.replace(SWEPT, sweep=dataclasses.replace(SWEEP, times=StepTimes(transfer=1.0)))
    budget = cost(Repeat(2, Steps(8), kept="host"), SWEPT).peak_bytes
    quick, waiting = (make_plan(profile, 1000, budget, 14_000) for profile in (SWEPT, slow))
    assert cost(quick, SWEPT).forward_steps == 1000 < cost(waiting, slow).forward_steps
    assert time_of(waiting, slow) < time_of(quick, slow)


def test_time_of_waiting():
    """100 steps of 14 bytes: 1,400 bytes each way, at 0.2 a byte, beside 100 times 1.0 and 100 times 2.0."""
    profile = dataclasses.replace(SWEPT, sweep=dataclasses.replace(SWEEP, times=StepTimes(transfer=0.2)))
    assert time_of(Repeat(10, Steps(10), kept="host"), profile) == pytest.approx(300 + (280 - 100) + (280 - 200))


def test_a_larger_device_uses_no_host():
    assert make_plan(SWEPT, 1000, "100%", "100%") == Steps(1000)
    assert not uses_host(make_plan(SWEPT, 1000, "30%"))


@pytest.mark.parametrize(
    ("host", "error", "message"),
    [
        (0, ValueError, "host_budget=0 is 0 bytes, but a budget must be positive"),
        ("1 GiBi", ValueError, "host_budget='1 GiBi' has the unknown unit 'GiBi'"),
        (1.5, TypeError, "host_budget=1.5 of type float is not a budget"),
        ("auto", ValueError, 'host_budget="auto" is not known: JAX does not tell what a host has free'),
    ],
)
def test_malformed_budgets_of_the_host(host, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make_plan(SWEPT, 100, 1000, host)


def test_a_budget_for_the_host_alone_is_refused():
    with pytest.raises(ValueError, match="host_budget=7 needs a budget: without one, everything is kept on the device"):
        make_plan(SWEPT, 100, None, 7)


def test_a_plan_that_is_hardly_faster_does_not_use_the_host():
    """As `python -m bptt_jax plan --length 1000 --carry 32KiB --residual 190KiB --budget 10MiB --host-budget 1GiB`."""
    profile = StepProfile(carry_bytes=32 << 10, residual_bytes=190 << 10)
    assert make_plan(profile, 1000, "10MiB", "1GiB") == make_plan(profile, 1000, "10MiB")
