"""The corrected mixed optimum: the fewest evaluations of the step with carries and residuals kept in any mixture.

The mixed recurrence as published keeps charging for the carry at the start of a segment. It does so even after the
residuals of the segment's first step have been kept, although they contain this carry. An exhaustive search over memory
contents finds cheaper policies from alpha = 2 on. Here this carry may be dropped. The items are JAX's: the residuals of
a step (s units) contain the carry entering it (c units, 1 unless said otherwise) and not the carry leaving it. The
first carry of the scan is given, and the residuals of the one step being worked on are not counted.

    R(1, 0) = 1;  R(n ≥ 2, M < c) = ∞                 the start is in the register only: drop it, or put it in a slot
    R(n, M) = min{ n(n+1)/2                           [M ≥ c]
                   1 + R(n−1, M−s)                    [M ≥ s]      keep the residuals of the first step, drop the start
                   y + R(n−y, M−c) + R(y, M)          [M ≥ c]      1 ≤ y < n
                   y + R(n−y, M−c−s) + R(y−1, M) }    [M ≥ c+s]
    F(n, M) = min{ n(n+1)/2                           the start is pinned and free
                   y + R(n−y, M) + F(y, M)            1 ≤ y < n
                   y + R(n−y, M−s) + F(y−1, M) }      [M ≥ s]
    R(0, ·) = F(0, ·) = 0, the answer is F(T, M)

At s = c this is the mixed optimum of Maddison (2024). Time is O(T²·M), memory O(T·M), in NumPy; for longer scans
there is `lower_bound`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bptt_jax.errors import as_count

__all__ = ["cost", "lower_bound", "reaches"]

Table = npt.NDArray[np.int64]

_INFINITE = 1 << 60  # evaluations; three of them can be added without overflow
_MOST_BYTES = 1 << 23  # of a temporary, so it stays in the cache


def cost(length: int, units: int, residual_units: int, *, carry_units: int = 1) -> int:
    """The fewest evaluations of the step for `length` steps.

    Args:
      length: number of steps, ≥ 0.
      units: memory beside the first carry and the residuals of the step being worked on, ≥ 0.
      residual_units: the residuals of one step, in the same unit, ≥ 1.
      carry_units: a carry, in the same unit, ≥ 1. A ratio of 3.5 is residual_units=7, carry_units=2.

    The last table is kept in memory, so after the greatest budget all others of the same problem are free.

    Raises:
      TypeError, ValueError: for anything but integers in range.

    >>> cost(1000, 100, 5)
    1994
    """
    length, units = as_count(length, 0, "length"), as_count(units, 0, "units")
    s, c = as_count(residual_units, 1, "residual_units"), as_count(carry_units, 1, "carry_units")
    units = min(units, (length + 1) * (s + c))  # more than everything
    return int(_pinned(_tables.registers(length, units, s, c), length, units, s)[length])


def lower_bound(length: int, units: int, residual_units: int, *, carry_units: int = 1) -> int:
    """A lower bound on `cost` of the same arguments, for any length: time O(units · evaluations per step).

    Args:
      length, units, residual_units, carry_units: as for `cost`.

    A policy is a tree. By the recurrences above at most N(r, M) of its leaves can be reached with at most r
    evaluations; N obeys the same recurrences, with + for the children and r−1 for the recomputed one. So at least
    T − N(r, M) steps are evaluated more than r times, and these numbers for all r add up to a bound.

    Raises:
      TypeError, ValueError: for anything but integers in range.

    >>> lower_bound(1000, 50, 5), cost(1000, 50, 5)
    (2692, 2705)
    """
    length, units = as_count(length, 0, "length"), as_count(units, 0, "units")
    s, c = as_count(residual_units, 1, "residual_units"), as_count(carry_units, 1, "carry_units")
    total = 0
    for reach in reaches(min(units, (length + 1) * (s + c)), s, c):
        if reach >= length:
            break
        total += length - reach
    return total


def reaches(units: int, residual_units: int, carry_units: int = 1) -> Iterator[int]:
    """N(0, M) = 0, N(1, M), N(2, M), ...: the most steps evaluated at most 0, 1, 2, ... times each by a policy.

    Endless; each number takes time O(units).

    Args:
      units, residual_units, carry_units: as for `cost`.

    Raises:
      TypeError, ValueError: for anything but integers in range, when the first number is asked for.

    >>> import itertools
    >>> list(itertools.islice(reaches(10, 5), 5))
    [0, 3, 21, 109, 452]
    """
    units = as_count(units, 0, "units")
    s, c = as_count(residual_units, 1, "residual_units"), as_count(carry_units, 1, "carry_units")
    before, pinned = [0] * (units + 1), 0  # pinned: N of the problem F, whose start is free
    while True:
        yield pinned
        before, pinned = _next_reach(before, pinned, units, s, c)


def _next_reach(before: list[int], pinned: int, units: int, s: int, c: int) -> tuple[list[int], int]:
    """N(r, M) for all M, and N of the pinned problem for the largest M, from the values of r − 1."""
    reach: list[int] = []
    for m in range(units + 1):
        best = 1
        if m >= s:
            best = max(best, 1 + reach[m - s])
        if m >= c:
            best = max(best, reach[m - c] + before[m])
        if m >= c + s:
            best = max(best, reach[m - c - s] + 1 + before[m])
        reach.append(best)
    inner = max(reach[units], reach[units - s] + 1 if units >= s else 0)
    return reach, inner + pinned


class _Tables:
    """The last table of R; it serves all smaller problems of the same step."""

    def __init__(self) -> None:
        self._key = (0, 0)
        self._table: Table = np.zeros((0, 0), dtype=np.int64)

    def registers(self, length: int, units: int, s: int, c: int) -> Table:
        rows, columns = self._table.shape
        if self._key != (s, c) or rows <= units or columns <= length:
            self._key, self._table = (s, c), _register_table(length, units, s, c)
        return self._table


_tables = _Tables()


def _register_table(length: int, units: int, s: int, c: int) -> Table:
    """R[M, n] for all M ≤ units and n ≤ length."""
    table = np.full((units + 1, length + 1), _INFINITE, dtype=np.int64)
    table[:, 0] = 0
    table[:, 1:2] = 1
    # The cases of the recurrence in its order; R stays infinite where none of them has room.
    for n in range(2, length + 1):
        best = table[:, n]
        best[c:] = n * (n + 1) // 2
        np.minimum(best[s:], 1 + table[: units + 1 - s, n - 1] if units >= s else best[s:], out=best[s:])
        rows = max(1, _MOST_BYTES // (8 * n))  # budgets at a time, so the sums over y stay in the cache
        for low in range(c, units + 1, rows):
            high = min(units + 1, low + rows)
            _take_min(best[low:high], table[low - c : high - c, n - 1 : 0 : -1], table[low:high, 1:n])
            low = max(low, c + s)
            if low < high:
                right = table[low - c - s : high - c - s, n - 1 :: -1]
                _take_min(best[low:high], right, table[low:high, :n])
    return table


def _take_min(best: Table, right: Table, left: Table) -> None:
    """best = min(best, min over y of y + right + left); column i stands for y = i + 1."""
    sums = right + left
    sums += np.arange(1, sums.shape[-1] + 1, dtype=np.int64)
    np.minimum(best, sums.min(axis=-1), out=best)


def _pinned(registers: Table, length: int, units: int, s: int) -> Table:
    """F[n] for all n ≤ length at the full memory."""
    best = np.zeros(length + 1, dtype=np.int64)
    for n in range(1, length + 1):
        at = best[n : n + 1]
        at[:] = n * (n + 1) // 2
        if n > 1:
            _take_min(at, registers[units, None, n - 1 : 0 : -1], best[None, 1:n])
        if units >= s:
            _take_min(at, registers[units - s, None, n - 1 :: -1][:, :n], best[None, :n])
    return best
