"""Tables of the sweep's planner: numbers independent of budgets and of the sizes of a step."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import numpy.typing as npt

from bptt_jax._caches import remember

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 32, 50, 64)  # of children, on inner levels
_MOST_LEVELS = 6
_TABULATED = 10**6  # steps; for longer scans the number of blocks is bounded from below, not counted


@dataclasses.dataclass(frozen=True)
class Inner:
    """Choices of k2, k3, ..., one a row.

    Attributes:
      counts: the choices, padded with zeros.
      products: the product of each.
      carries: the number of carries held by each, the sum of its counts.
      advanced: the sum of 1 − 1/k over each.
    """

    counts: Ints
    products: Ints
    carries: Ints
    advanced: Floats

    def at(self, rows: npt.NDArray[np.bool_]) -> Inner:
        return Inner(self.counts[rows], self.products[rows], self.carries[rows], self.advanced[rows])


@remember(1024)
def inner_counts(children: int) -> Inner:
    """All choices with at least two children left for the outermost loop, out of `children` leaves."""
    inner = _all_inner_counts()
    return inner.at(2 * inner.products <= max(children, 2))


@remember(1)
def _all_inner_counts() -> Inner:
    rows = [
        row + (0,) * (_MOST_LEVELS - 1 - len(row))
        for levels in range(_MOST_LEVELS)
        for row in itertools.combinations_with_replacement(_COUNTS, levels)
    ]
    counts = np.array(rows, dtype=np.int64)
    used, some = counts > 0, np.maximum(counts, 1)
    return Inner(counts, some.prod(axis=1), counts.sum(axis=1), np.where(used, 1 - 1 / some, 0.0).sum(axis=1))


def blocks_of(steps: Ints, most_steps: int, length: int) -> Ints:
    """The numbers of blocks into which `in_blocks` cuts each of `steps`, all of them at most `length`."""
    blocks: Ints = _block_counts(most_steps, length)[steps] if length <= _TABULATED else -(-steps // most_steps)
    return blocks


@remember(16)
def _block_counts(most_steps: int, length: int) -> Ints:
    """`blocks_of` for every number of steps up to `length`."""
    steps = np.arange(length + 1)
    loops = -(-steps // most_steps)
    blocks: Ints = np.where(steps > most_steps, loops + (steps % np.maximum(loops, 1) > 0), np.minimum(steps, 1))
    # Ascending, so the longest divisor is written last: `in_blocks` takes the longest.
    for equal in range(max(most_steps // 2, 1), most_steps + 1):
        first = equal * (most_steps // equal + 1)  # the least multiple that is more than one block
        blocks[first::equal] = steps[first::equal] // equal
    return blocks
