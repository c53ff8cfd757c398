"""The three strategies of Gruslys et al. (2016), as published: their costs, and plans to follow them.

Costs count evaluations of the step, the first pass and the one recording evaluation of each step included. Units of
memory are the paper's: the residuals of a step contain the carry leaving it. The last column is *not* counted:

    HSM  keeps carries    m slots, the first carry counted       the residuals being worked on
    ISM  keeps residuals  m slots, those worked on counted       the first carry
    MSM  keeps both       M units of one carry, alpha a residual the first carry, the residuals being worked on

HSM and ISM have closed forms. With rev(l, c) = r·l − binom(c+r, c+1) and r = min{r : binom(c+r, c) ≥ l}, the advances
of Griewank and Walther (2000), HSM(t, m) = t + rev(t, m) and ISM(t, m) = rev(t+1, m). All their optimal splits form
one interval, so a plan for a million steps needs no table: some hundreds of subproblems. MSM is a table of
length × units numbers, each a minimum over the length, in NumPy. The published recurrence is not optimal for alpha ≥ 2
(`bptt_jax.planners.exact` has the corrected one).

The plans are binary trees, not in the normal form of `bptt_jax.make_plan`. They are for reading, simulating and
comparing, and compile to as many bodies as they have steps. The plans to run are made by `bptt_jax.make_plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bptt_jax._caches import remember
from bptt_jax.errors import as_count
from bptt_jax.plans._nodes import Chain, Plan, Remat, Steps

__all__ = ["hsm_cost", "hsm_plan", "ism_cost", "ism_plan", "msm_cost", "msm_plan"]

Problem = tuple[int, int]  # steps, memory
Split = tuple[int, int, bool]  # advances before the kept item, memory for the steps right of it, keeps residuals


def hsm_cost(length: int, slots: int) -> int:
    """Evaluations of the step under HSM.

    Args:
      length: number of steps, ≥ 0.
      slots: carries that can be kept at once, the first one included, ≥ 1.

    Raises:
      TypeError, ValueError: for anything but integers in range.

    >>> hsm_cost(1000, 50)
    2948
    """
    length, slots = as_count(length, 0, "length"), as_count(slots, 1, "slots")
    return length + _advances(length, slots)


def ism_cost(length: int, slots: int) -> int:
    """Evaluations of the step under ISM.

    Args:
      length: number of steps, ≥ 0.
      slots: steps whose residuals can be held at once, the one being worked on included, ≥ 1.

    Raises:
      TypeError, ValueError: for anything but integers in range.

    >>> ism_cost(1000, 50)
    1950
    """
    length, slots = as_count(length, 0, "length"), as_count(slots, 1, "slots")
    return _advances(length + 1, slots)


def msm_cost(length: int, units: int, alpha: int) -> int:
    """Evaluations of the step under MSM for `length` steps.

    Args:
      length: number of steps, ≥ 0.
      units: memory in units of one carry, ≥ 0.
      alpha: the residuals of one step in the same unit, ≥ 1.

    Time is O(length²·units), memory O(length·units); the last table is kept.

    Raises:
      TypeError, ValueError: for anything but integers in range.

    >>> msm_cost(100, 10, 2)
    261
    """
    length, units = as_count(length, 0, "length"), as_count(units, 0, "units")
    return int(_msm_table(length, units, as_count(alpha, 1, "alpha"))[units, length])


def hsm_plan(length: int, slots: int) -> Plan:
    """A plan of `hsm_cost(length, slots)` evaluations.

    Args:
      length, slots: as for `hsm_cost`: numbers of steps and of kept carries.

    Raises:
      TypeError, ValueError: for anything but integers in range.

    >>> from bptt_jax.plans import notation
    >>> notation(hsm_plan(5, 3))
    '([([1] + 1)] + ([1] + ([1] + 1)))'
    """
    length, slots = as_count(length, 0, "length"), as_count(slots, 1, "slots")
    return _build(length, slots, _hsm_split)


def ism_plan(length: int, slots: int) -> Plan:
    """A plan of `ism_cost(length, slots)` evaluations.

    Args:
      length, slots: as for `ism_cost`: numbers of steps, and of steps whose residuals are held.

    Raises:
      TypeError, ValueError: for anything but integers in range.

    >>> from bptt_jax.plans import notation
    >>> notation(ism_plan(5, 3))
    '([(1 + 1)] + 1 + (1 + 1))'
    """
    length, slots = as_count(length, 0, "length"), as_count(slots, 1, "slots")
    return _build(length, slots, _ism_split)


def msm_plan(length: int, units: int, alpha: int) -> Plan:
    """A plan of `msm_cost(length, units, alpha)` evaluations.

    Args:
      length, units, alpha: as for `msm_cost`: a number of steps; memory and residuals in units of one carry.

    Raises:
      TypeError, ValueError: for anything but integers in range.

    >>> from bptt_jax.plans import notation
    >>> notation(msm_plan(5, 3, 2))
    '([1] + ([1] + 1 + ([1] + 1)))'
    """
    length, units, alpha = as_count(length, 0, "length"), as_count(units, 0, "units"), as_count(alpha, 1, "alpha")
    table = _msm_table(length, units, alpha)
    return _build(length, units, lambda t, m: _msm_split(table, t, m, alpha))


def _advances(length: int, slots: int) -> int:
    """rev(l, c): the advances of revolve for l steps and c slots."""
    if length <= 1:
        return 0
    r = _fewest_sweeps(length, slots, 0)
    return r * length - math.comb(slots + r, slots + 1)


def _fewest_sweeps(length: int, slots: int, less: int) -> int:
    """The least r with binom(slots + r, slots) − less ≥ length."""
    return _bisect(lambda r: math.comb(slots + r, slots) - less >= length)


def _bisect(holds: Callable[[int], bool]) -> int:
    """The least r ≥ 0 for which a monotone condition holds."""
    high = 1
    while not holds(high):
        high *= 2
    low = -1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if middle >= 0 and holds(middle) else (middle, high)
    return high


def hsm_splits(length: int, slots: int) -> range:
    """All y at which HSM may keep its next carry, for length ≥ 2 and slots ≥ 2.

    >>> hsm_splits(5, 3)
    range(1, 3)
    """

    def reach(c: int, r: int) -> int:
        return math.comb(c + r, c) if r >= 0 else 0

    r = _fewest_sweeps(length, slots, 0)
    first = max(reach(slots, r - 2), length - reach(slots - 1, r), 1)
    return range(first, min(reach(slots, r - 1), length - reach(slots - 1, r - 1)) + 1)


def ism_splits(length: int, slots: int) -> range:
    """All y for which ISM may keep the residuals of its y-th step next, for length ≥ 1 and slots ≥ 2.

    >>> ism_splits(5, 3)
    range(1, 4)
    """

    def reach(c: int, r: int) -> int:
        return math.comb(c + r, c) - 1 if r >= 0 else -1

    r = _fewest_sweeps(length, slots, 1)
    first = max(reach(slots, r - 2) + 1, length - reach(slots - 1, r), 1)
    return range(first, min(reach(slots, r - 1) + 1, length - reach(slots - 1, r - 1)) + 1)


def _hsm_split(t: int, m: int) -> Split:
    # One slot holds the start alone: each step is reached from there, the last one first.
    return (hsm_splits(t, m)[-1], m - 1, False) if m > 1 else (t - 1, m, False)


def _ism_split(t: int, m: int) -> Split:
    return (ism_splits(t, m)[-1] - 1, m - 1, True) if m > 1 else (t - 1, m, True)


def _build(length: int, memory: int, split: Callable[[int, int], Split]) -> Plan:
    """The plan of the splits chosen by a function, with one node for each distinct subproblem."""
    # An explicit stack, because some plans are as deep as long.
    done: dict[Problem, Plan] = {}
    todo = [(length, memory)]
    while todo:
        problem = t, m = todo[-1]
        if t <= 1:
            done[problem] = Steps(t)
        if problem in done:
            todo.pop()
            continue
        advances, right_memory, keeps_residuals = split(t, m)
        left, right = (advances, m), (t - advances - keeps_residuals, right_memory)
        waiting = [p for p in (left, right) if p[0] and p not in done]
        if waiting:
            todo.extend(waiting)
            continue
        parts: list[Plan] = [Remat(done[left])] if left[0] else []
        parts += [Steps(1)] if keeps_residuals else []
        parts += [done[right]] if right[0] else []
        done[problem] = Chain(tuple(parts))
    return done[length, memory]


_MOST_BYTES = 1 << 23  # of a temporary: tables are worked on in parts, because these stay in the cache


@remember(2)
def _msm_table(length: int, units: int, alpha: int) -> npt.NDArray[np.int64]:
    """C[M, t] of the mixed strategy for all M ≤ units and t ≤ length."""
    steps = np.arange(length + 1, dtype=np.int64)
    table = np.zeros((units + 1, length + 1), dtype=np.int64)
    table[0] = steps * (steps + 1) // 2
    for t in range(1, length + 1):
        best = table[1:, t]
        best[:] = table[0, t]
        rows = max(1, _MOST_BYTES // (8 * t))
        for low in range(1, units + 1, rows):
            high = min(units + 1, low + rows)
            if t > 1:
                _take_min(best[low - 1 : high - 1], table[low - 1 : high - 1, t - 1 : 0 : -1], table[low:high, 1:t])
            low = max(low, alpha)
            if low < high:
                right = table[low - alpha : high - alpha, t - 1 :: -1]
                _take_min(best[low - 1 : high - 1], right, table[low:high, :t])
    table.flags.writeable = False
    return table


def _take_min(best: npt.NDArray[np.int64], right: npt.NDArray[np.int64], left: npt.NDArray[np.int64]) -> None:
    """best = min(best, min over y of y + right + left); column i stands for y = i + 1."""
    sums = right + left
    sums += np.arange(1, sums.shape[1] + 1, dtype=np.int64)
    np.minimum(best, sums.min(axis=1), out=best)


def _msm_split(table: npt.NDArray[np.int64], t: int, m: int, alpha: int) -> Split:
    if m == 0:
        return t - 1, 0, False
    y = np.arange(1, t)
    by_carry = y + table[m - 1, t - y] + table[m, y]
    if by_carry.size and by_carry.min() == table[m, t]:
        return int(y[by_carry.argmin()]), m - 1, False
    if m < alpha:
        return t - 1, m, False
    y = np.arange(1, t + 1)
    by_residuals = y + table[m - alpha, t - y] + table[m, y - 1]
    if by_residuals.min() == table[m, t]:
        return int(by_residuals.argmin()), m - alpha, True
    return t - 1, m, False  # t(t+1)/2, as with no memory at all
