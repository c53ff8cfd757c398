"""How far a budget reaches: the planner's table, and the lower bound that comes with it.

The plans considered are grouped trees: k equal rematerialised children, then a rest,

    plan = Steps(n)  |  Repeat(k, Remat(plan))  |  Chain(Repeat(k, Remat(plan)), plan)

A `Repeat` holds its k carries and its own accumulator of parameter gradients while a child is worked on. Instead of
asking for the fewest advances of n steps, for each n, the table asks what pays if a step is worth w advances: a step
that is advanced e times before it is recorded gains w − e, and the most that b units of memory and g leaves can gain is

    V(w, b, g) = max of  w · cap(b)                                                      Steps(cap(b))
                         k·V(w−1, b − k·carry − params, g1) + V(w, b − k·carry, g − g1)  1 ≤ g1 ≤ g, k ≥ 2

with V = 0 for w ≤ 0 or g = 0. The length is an outcome, not a parameter, so one table serves scans of all lengths.
By Lagrangian duality every plan of n steps has at least max over w of (w·n − V(w, b, g)) advances, the sum of what the
steps are worth less the gain. The values of w are a grid of `_PER_ADVANCE` points between any two integers: the bound
holds for each of them.

Time and memory are linear in the grid of w and in the budgets, the former times the k and the pairs (g1, g2).
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
      carry_bytes, residual_bytes, x_bytes, y_bytes, param_bytes: of a step's profile, carry and residuals at least 1.
      coarse, fine: a unit is coarse/fine carries, one of the two being 1.
      least_block: the least length of a block that the search aims for.
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
        """Whole units that fit in so many bytes."""
        return bytes_ * self.fine // (self.carry_bytes * self.coarse)

    def units_for(self, bytes_: Number) -> Number:
        """Units that so many bytes take."""
        return -(-bytes_ * self.fine // (self.carry_bytes * self.coarse))

    def bytes(self, units: int) -> int:
        """Bytes that so many units are, rounded down."""
        return units * self.carry_bytes * self.coarse // self.fine

    def whole_carries(self, units: int) -> Ints:
        """All numbers of carries, two or more, that fill a number of units below `units`."""
        most = (units - 1) * self.coarse // self.fine
        return np.arange(self.coarse, most + 1, self.coarse, dtype=np.int64)[self.coarse < 2 :]

    def units_for_carries(self, k: Ints) -> Ints:
        """Units that so many carries take."""
        return -(-k * self.fine // self.coarse)

    def most_steps(self, units: int) -> int:
        """The longest block of which the residuals fit."""
        return units * self.carry_bytes * self.coarse // (self.fine * self.residual_bytes)


@dataclasses.dataclass(frozen=True)
class Reach:
    """V of the module's docstring for all budgets up to some size.

    Attributes:
      worth: the grid of w, ascending, in advances.
      gain: V[units, leaves, w].
      steps: the length of a plan that attains it.
    """

    worth: Floats
    gain: Floats
    steps: Floats

    def least_advances(self, steps: Floats | Ints | int, units: Ints | int, leaves: Ints | int) -> Floats:
        """The lower bound on the advances of plans of so many steps, units and leaves, which are broadcast."""
        value = np.asarray(steps, dtype=np.float64)[..., None] * self.worth - self.gain[units, leaves]
        bound: Floats = np.maximum(value.max(axis=-1), 0)
        return bound

    def coarser(self) -> Reach:
        """Every other w, from the last below 1 on: enough for estimates, in less than half of the time."""
        rows = slice(_PER_ADVANCE - 1, None, 2)
        gain, steps = (np.ascontiguousarray(a[:, :, rows]) for a in (self.gain, self.steps))
        return Reach(self.worth[rows], gain, steps)

    def reaches(self, steps: int, units: int, leaves: int) -> bool:
        """Whether the grid of w is long enough for its bound on so many steps to be a good estimate."""
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
        k = lattice.whole_carries(i)  # a loop of a number between two of these takes as much memory and gains less
        rest = i - lattice.units_for_carries(k)
        k, rest = k[rest > params], rest[rest > params]
        if k.size and advances > 1:
            _take_loops(gain, steps, i, k, rest - params, rest)
    return Reach(worth, gain, steps)


def _take_loops(gain: Floats, steps: Floats, i: int, k: Ints, inner: Ints, rest: Ints) -> None:
    """gain[i] = max(gain[i], loops of k children on `inner` units followed by a rest on `rest` units)."""
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
