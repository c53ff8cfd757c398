"""The table of the nest's planner: how far a budget reaches, with a lower bound on advances.

The plans considered are grouped trees: k equal rematerialised children, then a rest,

    plan = Steps(n)  |  Repeat(k, Remat(plan))  |  Chain(Repeat(k, Remat(plan)), plan)

A `Repeat` holds its k carries and its own accumulator of parameter gradients while a child is worked on. The table
does not ask for the fewest advances of n steps, for each n. It asks for the largest gain if a step is worth w advances:
a step advanced e times before it is recorded gains w − e. With b units of memory and g leaves the largest gain is

    V(w, b, g) = max of  w · cap(b)                                                      Steps(cap(b))
                         k·V(w−1, b − k·carry − params, g1) + V(w, b − k·carry, g − g1)  1 ≤ g1 ≤ g, k ≥ 2

with V = 0 for w ≤ 0 or g = 0. The length is an outcome, not a parameter, so one table serves scans of all lengths.
By Lagrangian duality every plan of n steps has at least max over w of (w·n − V(w, b, g)) advances, the worth of all
steps less the largest gain. The bound holds for each w, so any grid will do: there are `_PER_ADVANCE` points between
any two integers.

Time and memory are linear in the grid of w and in the budgets; time also in the numbers of k and of pairs (g1, g2).
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import numpy as np

from bptt_jax._caches import remember
from bptt_jax.planners._sweep.shapes import Floats, Ints

Number = TypeVar("Number", int, Ints)

MOST_LEAVES = 8
_PER_ADVANCE = 8
_PAIRS = [(g1, g - g1) for g in range(1, MOST_LEAVES + 1) for g1 in range(1, g + 1)]
_INNER = np.array([g1 for g1, _ in _PAIRS])
_REST = np.array([g2 for _, g2 in _PAIRS])


@dataclasses.dataclass(frozen=True)
class Lattice:
    """Memory in integer units; budgets that share a lattice share their subproblems.

    Attributes:
      carry_bytes, residual_bytes, x_bytes, y_bytes, param_bytes: as in the profile; carry and residuals at least 1.
      coarse, fine: a unit is coarse/fine carries; one of the two is 1.
      least_block: the shortest block aimed for by the search.
    """

    carry_bytes: int
    residual_bytes: int
    x_bytes: int
    y_bytes: int
    param_bytes: int
    coarse: int
    fine: int
    least_block: int = 1

    @property
    def copies(self) -> bool:
        """Whether loops and chains copy slices of xs or ys."""
        return self.x_bytes > 0 or self.y_bytes > 0

    def units(self, bytes_: int) -> int:
        """The units of `bytes_` bytes, rounded down."""
        return bytes_ * self.fine // (self.carry_bytes * self.coarse)

    def units_for(self, bytes_: Number) -> Number:
        """The units taken by `bytes_` bytes, rounded up."""
        return -(-bytes_ * self.fine // (self.carry_bytes * self.coarse))

    def bytes(self, units: int) -> int:
        """The bytes of `units` units, rounded down."""
        return units * self.carry_bytes * self.coarse // self.fine

    def whole_carries(self, units: int) -> Ints:
        """All numbers of carries, two or more, filling whole units, fewer than `units`."""
        most = (units - 1) * self.coarse // self.fine
        return np.arange(self.coarse, most + 1, self.coarse, dtype=np.int64)[self.coarse < 2 :]

    def units_for_carries(self, k: Ints) -> Ints:
        """The units taken by k carries, rounded up."""
        return -(-k * self.fine // self.coarse)

    def most_steps(self, units: int) -> int:
        """The steps of the longest block whose residuals fit."""
        return units * self.carry_bytes * self.coarse // (self.fine * self.residual_bytes)


@dataclasses.dataclass(frozen=True)
class Reach:
    """V of the module's docstring for all budgets up to some size.

    Attributes:
      worth: the grid of w, ascending, in advances.
      gain: V[units, leaves, w].
      steps: the length of a plan attaining it.
    """

    worth: Floats
    gain: Floats
    steps: Floats

    def least_advances(self, steps: Floats | Ints | int, units: Ints | int, leaves: Ints | int) -> Floats:
        """The lower bound on the advances of plans with these steps, units and leaves; the arguments are broadcast."""
        value = np.asarray(steps, dtype=np.float64)[..., None] * self.worth - self.gain[units, leaves]
        bound: Floats = np.maximum(value.max(axis=-1), 0)
        return bound

    def coarser(self) -> Reach:
        """The table for every other w, from the last below 1 on: enough for estimates, in less than half the time."""
        rows = slice(_PER_ADVANCE - 1, None, 2)
        gain, steps = (np.ascontiguousarray(a[:, :, rows]) for a in (self.gain, self.steps))
        return Reach(self.worth[rows], gain, steps)

    def reaches(self, steps: int, units: int, leaves: int) -> bool:
        """Whether the grid of w is long enough to make the bound for `steps` steps a good estimate."""
        return bool(self.steps[units, leaves, -1] >= steps)


@remember(32)
def reach_table(lattice: Lattice, units: int, advances: int) -> Reach:
    """The table of a lattice for budgets up to `units`, and w up to `advances`."""
    worth = (np.arange(advances * _PER_ADVANCE) + 0.5) / _PER_ADVANCE
    gain = np.zeros((units + 1, MOST_LEAVES + 1, worth.size))
    steps = np.zeros_like(gain)
    params = lattice.units_for(lattice.param_bytes)
    for i in range(1, units + 1):
        block = lattice.most_steps(i)
        if block >= lattice.least_block:
            gain[i, 1:] = worth * block
            steps[i, 1:] = block
        k = lattice.whole_carries(i)  # a number of carries in between takes as many units and gains less
        rest = i - lattice.units_for_carries(k)
        k, rest = k[rest > params], rest[rest > params]
        if k.size and advances > 1:
            _take_loops(gain, steps, i, k, rest - params, rest)
    return Reach(worth, gain, steps)


def _take_loops(gain: Floats, steps: Floats, i: int, k: Ints, inner: Ints, rest: Ints) -> None:
    """gain[i] = max(gain[i], loops of k children on `inner` units followed by a rest on `rest` units)."""
    # The steps of a child are advanced once more, so they are worth w − 1: `_PER_ADVANCE` columns before.
    by_count = k[:, None, None] * gain[inner, :, :-_PER_ADVANCE][:, _INNER] + gain[rest, :, _PER_ADVANCE:][:, _REST]
    best_k = by_count.argmax(axis=0)
    by_pair = np.take_along_axis(by_count, best_k[None], axis=0)[0]
    column = np.arange(by_pair.shape[1])
    first = 0
    for g in range(1, MOST_LEAVES + 1):
        pair = first + by_pair[first : first + g].argmax(axis=0)
        first += g
        at = best_k[pair, column]
        value = by_pair[pair, column]
        inner_steps = steps[inner[at], _INNER[pair], column]
        length = k[at] * inner_steps + steps[rest[at], _REST[pair], column + _PER_ADVANCE]
        better = value > gain[i, g, _PER_ADVANCE:]
        gain[i, g, _PER_ADVANCE:] = np.where(better, value, gain[i, g, _PER_ADVANCE:])
        steps[i, g, _PER_ADVANCE:] = np.where(better, length, steps[i, g, _PER_ADVANCE:])
