"""Plans of an exact length on a lattice of memory: one step of looking ahead, guided by the table of `reach.py`.

A plan of n steps in b units and g leaves is `Steps(n)` where its residuals fit. Otherwise it is k children of L steps
and a rest of n − k·L. For each k, and each way to share the leaves, few L are worth trying. These are the L at which
the table's plans for a child, or for the rest, are on the convex hull, and the L with the longest rest that fits as one
block. Each choice is scored by the table's lower bounds for its parts, in one NumPy expression, and the best few are
tried in turn. Any n is covered exactly, because the rest takes the steps left by division.

The search charges the bytes of `bptt_jax.cost`, with each term rounded up to whole units.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from bptt_jax._caches import remember
from bptt_jax._cost.nested import chain_bytes, slice_bytes
from bptt_jax.planners._nested.reach import MOST_LEAVES, Lattice, Reach
from bptt_jax.planners._sweep.shapes import Bools, Floats, Ints
from bptt_jax.plans._nodes import Chain, Plan, Remat, Repeat, Steps

# Splits tried for each subproblem. Twice as many are twice as slow and gain 0.4 % of time at best, but up to 1.5 %
# where memory is short and the lattice fine.
_WIDTH = 2
_WIDTH_IF_FINE = 4
_MOST_FAILURES = 12  # splits tried as long as none has given a plan
_MOST_ESTIMATES = 16  # splits of a subproblem that are handed on, of the best estimates


@dataclasses.dataclass(frozen=True)
class Found:
    """A plan with its advances (evaluations beside the recording ones) and its leaves."""

    advances: int
    leaves: int
    plan: Plan


@dataclasses.dataclass(frozen=True)
class _Split:
    estimate: float
    k: int
    inner_steps: int
    inner_leaves: int
    exact: bool = False


@dataclasses.dataclass(frozen=True)
class _Shares:
    """How splits share memory and leaves: arrays that broadcast to the axes [k, leaves of a child, length of a child].

    Attributes:
      k: numbers of children.
      inner_units, rest_units: units of memory for a child and for the rest.
      inner_leaves, rest_leaves: leaves of a child and of the rest.
    """

    k: Ints
    inner_units: Ints
    rest_units: Ints
    inner_leaves: Ints
    rest_leaves: Ints

    def without(self, units: Ints) -> _Shares:
        """The same with fewer units for both, for slices that exist all the time."""
        return dataclasses.replace(self, inner_units=self.inner_units - units, rest_units=self.rest_units - units)


class Search:
    """The search on one lattice and one table; subproblems are remembered for as long as it lives."""

    def __init__(self, lattice: Lattice, reach: Reach):
        self._lattice = lattice
        self._reach = reach
        self._coarse = reach.coarser()
        self._residual_units = lattice.residual_bytes * lattice.fine / (lattice.carry_bytes * lattice.coarse)
        self._params = lattice.units_for(lattice.param_bytes)
        self._found: dict[tuple[int, int, int, bool], Found | None] = {}

    def find(self, steps: int, units: int, leaves: int, *, in_chain: bool = False) -> Found | None:
        """A plan of `steps` steps within `units` and `leaves`; None if the search finds none.

        With `in_chain` the plan continues a chain, whose slices are charged already.
        """
        if steps <= self._lattice.most_steps(units):
            return Found(0, 1, Steps(steps))
        key = steps, units, leaves, in_chain
        if key not in self._found:
            self._found[key] = self._find(*key)
        return self._found[key]

    def reaches(self, steps: int, units: int) -> bool:
        """Whether the table is large enough for plans of `steps` steps within `units`."""
        return self._reach.reaches(steps, units, MOST_LEAVES)

    def least_advances(self, steps: int, units: int, leaves: int) -> float:
        """A lower bound on the advances of any plan from `find`."""
        if steps <= self._lattice.most_steps(units):
            return 0.0
        at_least = max(
            float(self._reach.least_advances(steps, units, leaves)), self._of_first_sweeps(steps, units, leaves)
        )
        if not self._lattice.copies:
            return at_least
        # With copies, a plan is a loop without a rest or a chain, and each pays for its copies first.
        bounds = [
            steps + k * float(self._reach.least_advances(steps // k, inner, leaves))
            for k, inner in self._whole_loops(steps, units)
        ]
        in_chain = units - self._parts(steps, 1)
        if in_chain > 0 and leaves > 1:
            bounds.append(float(self._reach.least_advances(steps, in_chain, leaves)))
        return max(at_least, min(bounds, default=math.inf))

    def _of_first_sweeps(self, steps: int, units: int, leaves: int) -> float:
        """A lower bound on the advances, tight where most steps are advanced once.

        With K carries in the loops of the outermost chain, at most (b − K)/s steps are never advanced. Steps advanced
        once are in children of loops j = 1, 2, ... of k_j carries, at most (b − k_1 − ... − k_j)/s in each child. They
        are most for equal k_j, because the sum of k_j·(k_1 + ... + k_j) is least then. All others are advanced at
        least twice.
        """
        if leaves < 2:
            return 0.0
        carry, residuals = self._lattice.fine / self._lattice.coarse, self._residual_units
        kept = np.arange(2, max(3, min(units / carry, steps) + 1)) * carry
        never = np.maximum(units - kept, 0) / residuals
        # The sum of k_j·(k_1 + ... + k_j) for g equal k_j = K/g is K²·(1 + 1/g)/2.
        once = (kept * units - kept**2 * (1 + 1 / leaves) / 2) / (carry * residuals)
        return float((np.maximum(steps - never, 0) + np.maximum(steps - never - once, 0)).min())

    def _find(self, steps: int, units: int, leaves: int, in_chain: bool) -> Found | None:
        if leaves < 1 or units < 1 or not self._reach.reaches(steps, units, leaves):
            return None
        short = self._lattice.fine > 1 and units < 64  # memory for fewer than 32 carries
        width = _WIDTH_IF_FINE if short and leaves >= MOST_LEAVES - 1 else _WIDTH
        best: Found | None = None
        for tried, split in enumerate(self._splits(steps, units, leaves, in_chain)):
            if best is not None and (tried >= width or split.estimate >= best.advances):
                break
            if tried >= _MOST_FAILURES:
                break
            found = self._assemble(steps, units, leaves, in_chain, split)
            if found is not None and (best is None or found.advances < best.advances):
                best = found
        return best

    def _assemble(self, steps: int, units: int, leaves: int, in_chain: bool, split: _Split) -> Found | None:
        """The plan of a split; None if one of its parts has none."""
        k, rest_steps = split.k, steps - split.k * split.inner_steps
        if rest_steps:
            units -= self._params if in_chain else self._parts(steps, rest_steps)
        units -= -(-k * self._lattice.fine // self._lattice.coarse)
        inner_units = units - self._params - self._slices(split.inner_steps)
        inner = self.find(split.inner_steps, inner_units, split.inner_leaves)
        if inner is None:
            return None
        if not rest_steps:
            return Found(k * (split.inner_steps + inner.advances), inner.leaves, Repeat(k, Remat(inner.plan)))
        rest = self.find(rest_steps, units, leaves - inner.leaves, in_chain=True) if leaves > inner.leaves else None
        if rest is None:
            return None
        after = rest.plan.children if isinstance(rest.plan, Chain) else (rest.plan,)
        if len(after) > 1:  # one sum of gradients is charged already, the others are known only now
            inner = self.find(split.inner_steps, inner_units - (len(after) - 1) * self._params, inner.leaves)
            if inner is None:
                return None
        advances = k * (split.inner_steps + inner.advances) + rest.advances
        return Found(advances, inner.leaves + rest.leaves, Chain((Repeat(k, Remat(inner.plan)), *after)))

    def _splits(self, steps: int, units: int, leaves: int, in_chain: bool) -> list[_Split]:
        """The most promising splits, best first."""
        splits = [
            _Split(steps + k * self.least_advances(steps // k, inner, leaves), k, steps // k, leaves)
            for k, inner in self._whole_loops(steps, units)
        ]
        in_chain_units = units - (self._params if in_chain else self._parts(steps, 0))
        if leaves > 1 and in_chain_units > 1:
            rest_slices = 0 if in_chain else 2 * self._lattice.x_bytes
            splits.extend(self._with_rest(steps, in_chain_units, leaves, rest_slices))
        splits = [split for split in splits if split.estimate < math.inf]
        splits.sort(key=lambda split: (split.estimate, split.inner_leaves, split.k, split.inner_steps))
        # Estimates are optimistic where they are not exact, so the best of the exact ones is tried first.
        known = next((split for split in splits if split.exact), None)
        return splits if known is None else [known, *splits]

    def _whole_loops(self, steps: int, units: int) -> Iterator[tuple[int, int]]:
        """Numbers of equal children without a rest, with the units left for a child."""
        for k in _divisors(steps):
            carries = -(-k * self._lattice.fine // self._lattice.coarse)
            inner = units - carries - self._params - self._slices(steps // k)
            if inner > 0:
                yield k, inner

    def _with_rest(self, steps: int, units: int, leaves: int, rest_slices: int) -> list[_Split]:
        """The best few splits with a rest; each step of the rest has `rest_slices` bytes of slices."""
        k = self._counts(steps, units)
        rest_units = units - self._lattice.units_for_carries(k)
        k, rest_units = (a[rest_units > self._params, None, None] for a in (k, rest_units))
        if not k.size:
            return []
        inner_leaves = np.arange(1, leaves)[:, None]
        shares = _Shares(k, rest_units - self._params, rest_units, inner_leaves, leaves - inner_leaves)
        inner_steps = self._inner_steps(steps, shares, rest_slices)
        slices = self._lattice.units_for((steps - k * inner_steps) * rest_slices)
        estimate, exact = self._estimate(steps, shares.without(slices), inner_steps)
        count = min(estimate.size, _MOST_ESTIMATES)
        order = np.argpartition(estimate, count - 1, axis=None)[:count]
        order = np.append(order, np.where(exact, estimate, math.inf).argmin())
        a, b, _ = np.unravel_index(order, estimate.shape)
        parts = estimate.flat[order], k[a, 0, 0], inner_steps.flat[order], inner_leaves[b, 0], exact.flat[order]
        splits = {_Split(float(e), int(n), int(m), int(g), bool(x)) for e, n, m, g, x in zip(*parts, strict=True)}
        return list(splits)

    def _counts(self, steps: int, units: int) -> Ints:
        """Numbers of children worth trying: small ones, a geometric grid, and the numbers of short children."""
        most = min((units - 1) * self._lattice.coarse // self._lattice.fine, steps)
        if most <= 64:
            return np.arange(2, most + 1, dtype=np.int64)
        grid = np.geomspace(24, most, 32).astype(np.int64) // self._lattice.coarse * self._lattice.coarse
        short = steps // np.arange(1, 33)
        k = np.unique(np.concatenate([np.arange(2, 24), grid, short, short - 1]))
        return k[(k >= 2) & (k <= most)]

    def _inner_steps(self, steps: int, shares: _Shares, rest_slices: int) -> Ints:
        """Lengths of a child worth trying, along the last axis."""
        reach, residual_bytes = self._coarse.steps, self._lattice.residual_bytes
        rest_steps = reach[shares.rest_units[..., 0], shares.rest_leaves[:, 0]]
        # The longest rest to be kept as one block, beside the slices of its steps.
        longest_rest = _blocks(self._lattice, shares.rest_units) * residual_bytes // (residual_bytes + rest_slices)
        longest_rest = np.broadcast_to(longest_rest, (*rest_steps.shape[:2], 1))
        rest_steps = np.concatenate([rest_steps, longest_rest], axis=-1)
        to_leave_rest = np.ceil((steps - rest_steps) / shares.k)
        of_child = reach[shares.inner_units[..., 0], shares.inner_leaves[:, 0]]
        inner_steps = np.concatenate([to_leave_rest, of_child], axis=-1)
        lengths: Ints = np.clip(inner_steps, 1, steps // shares.k).astype(np.int64)
        return lengths

    def _estimate(self, steps: int, shares: _Shares, inner_steps: Ints) -> tuple[Floats, Bools]:
        """Advances of splits, from the table's lower bounds for their parts, and whether they are known to be exact."""
        rest_steps = steps - shares.k * inner_steps
        child = shares.inner_units - self._lattice.units_for(inner_steps * slice_bytes(self._lattice))
        inner, inner_is_block = self._of_part(inner_steps, child, shares.inner_leaves)
        rest, rest_is_block = self._of_part(rest_steps, shares.rest_units, shares.rest_leaves)
        advances: Floats = shares.k * (inner_steps + inner) + rest
        return advances, inner_is_block & rest_is_block

    def _of_part(self, steps: Ints, units: Ints, leaves: Ints) -> tuple[Floats, Bools]:
        """Advances of one part of splits, infinite where it cannot fit, and whether it is one kept block."""
        has_units, units = units > 0, np.maximum(units, 0)
        fits = has_units & (steps <= self._coarse.steps[units, leaves, -1])
        is_block = steps <= _blocks(self._lattice, units)
        advances = np.where(is_block, 0, self._coarse.least_advances(steps, units, leaves))
        return np.where(fits, advances, math.inf), is_block

    def _slices(self, steps: int) -> int:
        return self._lattice.units_for(steps * slice_bytes(self._lattice))

    def _parts(self, steps: int, rest_steps: int) -> int:
        return self._lattice.units_for(chain_bytes(steps, rest_steps, self._lattice))


def _blocks(lattice: Lattice, units: Ints) -> Ints:
    return units * (lattice.carry_bytes * lattice.coarse) // (lattice.fine * lattice.residual_bytes)


@remember(4096)
def _divisors(n: int) -> tuple[int, ...]:
    """The divisors of n without 1, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))[1:]
