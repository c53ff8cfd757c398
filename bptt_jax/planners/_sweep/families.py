"""Plans for the sweep: at most two nests of loops and a kept rest.

    plan = nest, then perhaps a second nest, then perhaps Steps(r);   nest = Repeat(k1, Remat(Repeat(k2, ... Steps(n))))

The plan compiles to at most three bodies. Bodies matter more to the sweep than to the nest, because each is compiled
with its backward. With M the steps of a nest, h a carry and s a step's residuals, the plan takes

    evaluations   T + Σ M·(1 + Σ_{i≥2} (1 − 1/k_i))
    bytes         max( Σ k_i·h + block(n),  k1·h + Σ k'_i·h + block(n),  (k1 + k'1)·h + block(r) )  + fixed

because the sweep never advances the last child of a node run a second time. For every n and k2, k3, … of a grid, four
k1 are tried. Three keep the remaining steps as a rest: the k1 without a rest, the least whose rest fits, and the least
whose rest is one block. The largest k1 leaves them to a second nest over blocks of n. The fastest plan wins; lower
bounds on times, in NumPy, leave few plans whose bytes have to be computed. The plans tried depend on the budget, so
more bytes may cost more predicted time, though seldom and by a per cent or two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from bptt_jax._caches import remember
from bptt_jax._cost.sweep import sweep_bytes
from bptt_jax._cost.time import sweep_time
from bptt_jax._figures import SECOND_BODY
from bptt_jax.planners._sweep.shapes import Bools, Floats, Ints, blocks_of, inner_counts
from bptt_jax.plans._blocks import in_blocks, steps_together
from bptt_jax.plans._nodes import Chain, Plan, Remat, Repeat, Steps
from bptt_jax.plans._profile import SweepProfile

_SHORT = 64  # all leaves up to this long are tried, longer ones on a geometric grid or dividing the length
_MOST_REST = 1024  # steps of a rest with a peak of its own in a table; beyond, each step adds its residuals
_CORRECTIONS = 12  # of the first guess at the least k1 with a rest that fits
_TRIES = 64  # plans of a family, the least bounds first, because bounds leave out costs of a second nest


@remember(1024)
def fastest(profile: SweepProfile, length: int, budget_bytes: int) -> Plan | None:
    """The fastest plan found of this form within the budget; None if none fits.

    >>> from bptt_jax.plans._profile import StepTimes
    >>> profile = SweepProfile(2, 7, block_bytes=6, block_steps=48, times=StepTimes(block=2))
    >>> from bptt_jax.plans import notation
    >>> notation(fastest(profile, 1000, 450))
    '(39*[25] + 25)'
    >>> notation(fastest(profile, 1000, 150))
    '(17*[8*[7]] + 6*[7] + 6)'
    """
    plan = _search(profile, length, budget_bytes)
    # The search tries the most promising plans only, so near the smallest budget it may miss a plan. And the budget is
    # held against the smallest plan, because an error names its bytes as the least to be accepted.
    little = sweep_bytes(Steps(1), profile) + (length.bit_length() + 2) * 3 * profile.carry_bytes
    if plan is None or budget_bytes < little:
        smallest = smallest_plan(profile, length)
        if budget_bytes < sweep_bytes(smallest, profile):
            return None
        plan = smallest if plan is None else plan
    return plan


@remember(256)
def smallest_plan(profile: SweepProfile, length: int) -> Plan:
    """The plan of this form with the fewest bytes, found by bisecting budgets down to an eighth of a carry.

    >>> profile = SweepProfile(2, 7, block_bytes=6, block_steps=48)
    >>> sweep_bytes(smallest_plan(profile, 1000), profile)
    55
    """
    best: Plan = Steps(length)
    enough, refused = sweep_bytes(best, profile), sweep_bytes(Steps(min(length, 1)), profile) - 1
    while enough - refused > max(profile.carry_bytes // 8, 1):
        # At most twice the refused budget, because the answer is near the lower end and small budgets are less work.
        middle = min((enough + refused) // 2, 2 * refused + 2)
        plan = _search(profile, length, middle)
        if plan is None:
            refused = middle
        else:
            best, enough = plan, sweep_bytes(plan, profile)
    return best


def _search(profile: SweepProfile, length: int, budget_bytes: int) -> Plan | None:
    best, least = None, np.inf
    for family in sorted(_families(profile, length, budget_bytes), key=lambda family: family.least):
        if family.least >= least:
            break
        for bound, plan in family.plans():
            if bound >= least:
                break
            if sweep_bytes(plan, profile) <= budget_bytes and (time := sweep_time(plan, profile)) < least:
                best, least = plan, time
    return best


@dataclasses.dataclass(frozen=True)
class _Family:
    """Plans with leaves of n steps, one for each row of inner counts; their rests are kept.

    Attributes:
      length: steps of the plans.
      n: steps of a leaf.
      counts: k1, for each row.
      bounds: lower bounds on their times, infinite where a plan cannot fit.
    """

    length: int
    n: int
    counts: Ints
    bounds: Floats

    @property
    def least(self) -> float:
        return float(self.bounds.min())

    def plans(self) -> Iterator[tuple[float, Plan]]:
        """The most promising plans with their bounds, in ascending order."""
        inner = inner_counts(self.length // self.n)
        for row in _ascending(self.bounds):
            k = int(self.counts[row])
            for after in self._after(k, self.length - k * self.n * int(inner.products[row])):
                parts = (_nest(self.n, k, inner.counts[row]), *(part for part in after if part != Steps(0)))
                yield float(self.bounds[row]), Chain(parts) if len(parts) > 1 else parts[0]

    def _after(self, k: int, rest: int) -> Iterator[tuple[Plan, ...]]:
        """The plans of the rest, after a nest of k children: also in blocks of their length, where it can be."""
        yield (Steps(rest),)
        if rest > self.n and rest % self.n == 0:
            yield (Repeat(rest // self.n, Steps(self.n)),)


@dataclasses.dataclass(frozen=True)
class _WithSecondNest(_Family):
    """The same with a second nest for the rest; beside a leaf there is room for so many carries."""

    carries: int

    def _after(self, k: int, rest: int) -> Iterator[tuple[Plan, ...]]:
        found = _second_nest(rest, self.n, self.carries - k)
        if found is not None:
            yield found


def _families(profile: SweepProfile, length: int, budget_bytes: int) -> Iterator[_Family]:
    carry = max(profile.carry_bytes, 1)
    for n in _leaf_lengths(length, profile.together):
        free = budget_bytes - sweep_bytes(Steps(n), profile)
        # A leaf below a Remat is cut into equal blocks, because two loops in a row would hold their arrays at once.
        if free < 0 or isinstance(in_blocks(Steps(n), profile.block_steps), Chain):
            continue
        inner = inner_counts(length // n)
        unit = n * inner.products  # steps of a child of the outermost loop
        exact = np.where(length % unit == 0, length // unit, 0)
        kept = _least_counts(profile, length, unit, budget_bytes - carry)
        one_block = -(-(length - profile.block_steps) // unit)  # a rest of one block is one body less to compile
        for counts in (exact, kept, np.where(kept > 0, np.maximum(kept, one_block), 0)):
            rest = length - counts * unit
            fits = (counts + inner.carries + (rest > 0)) * carry <= free
            yield _Family(length, n, counts, _bounds(profile, length, n, counts, rest, fits))
        counts, carries = length // unit, free // carry - 1
        rest = length - counts * unit
        fits = (counts + inner.carries < carries) & (rest > n)
        bounds = _bounds(profile, length, n, counts, np.minimum(rest, n), fits)
        yield _WithSecondNest(length, n, counts, bounds, carries)


def _bounds(profile: SweepProfile, length: int, n: int, counts: Ints, kept: Ints, fits: Bools) -> Floats:
    """Lower bounds on the times of plans; of the rest `kept` steps are evaluated once, and the others twice."""
    inner = inner_counts(length // n)
    times, covered = profile.times, counts * n * inner.products
    advanced = covered * (1 + inner.advanced) + (length - covered - kept)
    in_leaf, in_rest = (blocks_of(steps, profile.block_steps, length) for steps in (np.array([n]), np.maximum(kept, 0)))
    blocks = covered // n * in_leaf * (2 + inner.advanced) + in_rest
    time = length * (times.recording + times.backward) + advanced * times.forward + blocks * times.block
    bounds: Floats = np.where(fits & (counts >= 2) & (covered <= length), time, np.inf)
    return bounds * (1 + SECOND_BODY * (covered < length))


@remember(65536)
def _second_nest(steps: int, n: int, carries: int) -> tuple[Plan, ...] | None:
    """The fastest nest with leaves of n steps and at most `carries` carries, and its rest of at most n steps.

    None if there is no such nest; of n steps or fewer there is only the rest.
    """
    if steps <= n:
        return (Steps(steps),)
    inner = inner_counts(steps // n)
    counts = steps // (n * inner.products)
    rests = steps - counts * n * inner.products
    fits = (counts >= 2) & (counts + inner.carries <= carries) & (rests <= n)
    row = int(np.argmin(np.where(fits, (steps - rests) * (1 + inner.advanced), np.inf)))
    return (_nest(n, int(counts[row]), inner.counts[row]), Steps(int(rests[row]))) if fits[row] else None


def _nest(n: int, k: int, inner: Ints) -> Plan:
    plan: Plan = Steps(n)
    for count in (*reversed(inner[inner > 0]), k):
        plan = Repeat(int(count), Remat(plan))
    return plan


def _ascending(bounds: Floats) -> list[int]:
    """Indices of the least bounds, in ascending order, without infinite ones."""
    count = min(_TRIES, len(bounds))
    least = np.argpartition(bounds, count - 1)[:count]
    return [int(at) for at in least[np.argsort(bounds[least], kind="stable")] if np.isfinite(bounds[at])]


def _least_counts(profile: SweepProfile, length: int, unit: Ints, free_bytes: int) -> Ints:
    """For each row the least k1 whose carries and kept rest fit; 0 where none does.

    The first guess and each correction err downwards: one more child shortens the rest by `unit` steps, and so frees
    at most a block's bytes for them.
    """
    carry, by_step = max(profile.carry_bytes, 1), profile.residual_bytes + profile.block_bytes
    # Of lengths rounded up, because scans of nearly one length share a table.
    peaks = _kept_peaks(profile, min(1 << length.bit_length(), _MOST_REST))[: min(length, _MOST_REST) + 1]
    most, beside = len(peaks) - 1, int((peaks - profile.residual_bytes * np.arange(len(peaks))).min())
    shrink = np.maximum(unit * profile.residual_bytes - carry, 1)
    counts: Ints = np.maximum(-(-(length * profile.residual_bytes + beside - free_bytes) // shrink), 2)
    for _ in range(_CORRECTIONS):
        rests = np.maximum(length - counts * unit, 0)
        beyond = np.maximum(rests - most, 0) * profile.residual_bytes
        excess = counts * carry + peaks[np.minimum(rests, most)] + beyond - free_bytes
        counts = counts + np.maximum(-(-excess // np.maximum(unit * by_step, 1)), 0)
    return np.where(excess <= 0, counts, 0)


@remember(64)
def _kept_peaks(profile: SweepProfile, most: int) -> Ints:
    """Peak bytes of 0, 1, ..., `most` kept steps."""
    peaks: Ints = np.array([sweep_bytes(Steps(n), profile) for n in range(most + 1)])
    return peaks


@remember(64)
def _leaf_lengths(length: int, together: int) -> list[int]:
    most = max(length // 2, 1)
    grid = {int(n) for n in np.geomspace(1, most, 48)}
    dividing = {length // k for k in range(2, min(length, 256) + 1) if length % k == 0}
    found = sorted({*range(1, min(_SHORT, most) + 1), *grid, *dividing})
    # Of long leaves those that take as many steps together as wanted, so that none is left over; short ones serve small
    # budgets.
    return [n for n in found if n < 2 * together or steps_together(n, together) >= together]
