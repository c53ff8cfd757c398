"""The golden numbers of two relatives of the planners' recurrences, which bound them.

`release`: the paper's items (the residuals of a step contain the carry that leaves it) with the correction that the
start of a segment may be dropped once the residuals of its first step are kept. `reach`: the most steps that the
published mixed recurrence covers when each is evaluated at most r times.
"""

import functools
import json
import pathlib

import numpy as np
import pytest

from bptt_jax.planners import exact, paper

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "data" / "golden.json").read_text())
ALPHAS = sorted({int(key.split(",")[2]) for key in GOLDEN["release"]})
LENGTH, UNITS = 100, 60


@functools.lru_cache
def released_costs(alpha):
    """F[M, n] with a start that is pinned and free, from R[M, n] with a start in the register only."""
    pinned, register = (np.zeros((UNITS + 1, LENGTH + 1), dtype=np.int64) for _ in range(2))
    for n in range(1, LENGTH + 1):
        carry, kept = np.arange(1, n), np.arange(1, n + 1)  # the y of each way to split
        for m in range(UNITS + 1):
            of_register = [1] if n == 1 else []
            of_pinned = [n * (n + 1) // 2, *(carry + register[m, n - carry] + pinned[m, carry])]
            if m >= 1:
                of_register += [n * (n + 1) // 2, *(carry + register[m - 1, n - carry] + register[m, carry])]
            if m >= alpha:
                of_register.append(1 + pinned[m - alpha, n - 1])
                of_pinned += [*(kept + pinned[m - alpha, n - kept] + pinned[m, kept - 1])]
            if m >= 1 + alpha:
                of_register += [*(kept + pinned[m - 1 - alpha, n - kept] + register[m, kept - 1])]
            register[m, n] = min(of_register, default=1 << 40)
            pinned[m, n] = min(of_pinned)
    return pinned


@pytest.mark.parametrize("alpha", ALPHAS)
def test_release_is_golden_and_bounds_the_published_recurrence_and_the_exact_optimum(alpha):
    costs = released_costs(alpha)
    checked = 0
    for key, golden in GOLDEN["release"].items():
        length, units, of = map(int, key.split(","))
        if of == alpha and length <= LENGTH and units <= UNITS:
            assert costs[units, length] == golden
            assert golden <= min(paper.msm_cost(length, units, alpha), exact.cost(length, units, alpha))
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("alpha", sorted(GOLDEN["reach"]))
def test_reach_is_golden_and_the_published_recurrence_costs_no_less(alpha):
    s = int(alpha)
    before = [0] * 21
    for evaluations, golden in enumerate(GOLDEN["reach"][alpha], start=1):
        reach = [evaluations]
        for m in range(1, len(golden)):
            reach.append(max(before[m] + reach[m - 1], before[m] + 1 + reach[m - s] if m >= s else 0))
        assert reach == golden
        for m in range(0, len(golden), 5):
            # One step more must evaluate some step more often, so it costs at least one more than it has steps.
            if evaluations == 1 and reach[m] < 60:
                assert paper.msm_cost(reach[m], m, s) == reach[m] < paper.msm_cost(reach[m] + 1, m, s) - 1
        before = reach
