"""Plans for the sweep: at most two nests of loops and a kept rest.

    plan = nest, then perhaps a second nest, then perhaps Steps(r);   nest = Repeat(k1, Remat(Repeat(k2, ... Steps(n))))

Such a plan compiles to at most three bodies, which matters more to the sweep than to the nest: a body is compiled with
its backward. With M the steps of a nest, h a carry and s a step's residuals, it takes

    evaluations   T + Σ M·(1 + Σ_{i≥2} (1 − 1/k_i))
    bytes         max( Σ k_i·h + block(n),  k1·h + Σ k'_i·h + block(n),  (k1 + k'1)·h + rest(r, n) )  + fixed

since the sweep never advances the last child of what it revisits. For every n and k2, k3, … of a grid the least k1 is
taken whose rest fits, and the most; what that leaves is a rest of steps that are kept, or a second nest over blocks as
long. The fastest of all these wins, of which bounds on their times in NumPy leave few to be costed. What
is tried depends on the budget, so that more bytes may cost more predicted time, though seldom and by a per cent or two.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from bptt_jax._cost import ahead_bytes, chain_sums_bytes, cost, rest_bytes
from bptt_jax._plan import Chain, Plan, Remat, Repeat, Steps, in_blocks
from bptt_jax._step_profile import StepProfile
from bptt_jax._time import SECOND_BODY, time_of
from bptt_jax.planners._tables import Bools, Floats, Ints, blocks_of, inner_counts

_SHORT = 64  # leaves up to this long are all tried, longer ones on a geometric grid and where they divide
_SHORT_SCAN = 10_000  # in longer ones, a rest of one block is nothing
_FEW_BLOCKS, _MOST_REST = 8, 1024  # blocks and steps of a rest for which each length is looked at
_TRIES = 64  # of the fastest by bounds that leave out what a second nest takes and what a rest takes beside its steps


@functools.lru_cache(maxsize=1024)
def fastest(profile: StepProfile, length: int, budget_bytes: int) -> Plan | None:
    """The fastest plan of this form that fits; None if none does.

    >>> from bptt_jax._step_profile import StepTimes
    >>> plain = StepProfile(carry_bytes=2, residual_bytes=12)
    >>> profile = StepProfile(2, 7, block_bytes=6, block_steps=48, plain=plain, times=StepTimes(block=2))
    >>> from bptt_jax.plans import notation
    >>> notation(fastest(profile, 1000, 450))
    '(36*[27] + 28)'
    >>> notation(fastest(profile, 1000, 150))
    '(17*[8*[7]] + 6*[7] + 6)'
    """
    plan = _search(profile, length, budget_bytes)
    # The search tries the most promising plans only, so near the smallest budget it may miss what is there.
    by_levels = (length.bit_length() + 1) * (3 * profile.carry_bytes + profile.loop_bytes)
    little = cost(Steps(1), profile).peak_bytes + by_levels + chain_sums_bytes(profile)
    if plan is None or budget_bytes < little:
        smallest = smallest_plan(profile, length)
        if budget_bytes < cost(smallest, profile).peak_bytes:
            return None
        plan = smallest if plan is None else plan
    return plan


@functools.lru_cache(maxsize=256)
def smallest_plan(profile: StepProfile, length: int) -> Plan:
    """The plan of this form with the fewest bytes that halving finds, to half a carry.

    >>> plain = StepProfile(carry_bytes=2, residual_bytes=12)
    >>> profile = StepProfile(2, 7, block_bytes=6, block_steps=48, plain=plain)
    >>> cost(smallest_plan(profile, 1000), profile).peak_bytes
    55
    """
    best: Plan = Steps(length)
    enough, refused = cost(best, profile).peak_bytes, cost(Steps(min(length, 1)), profile).peak_bytes - 1
    while enough - refused > max(profile.carry_bytes // 2, 1):
        # Budgets this small are near to the lower end, and less work.
        middle = min((enough + refused) // 2, 2 * refused + 2)
        plan = _search(profile, length, middle)
        if plan is None:
            refused = middle
        else:
            best, enough = plan, cost(plan, profile).peak_bytes
    return best


def _search(profile: StepProfile, length: int, budget_bytes: int) -> Plan | None:
    best, least = None, np.inf
    for family in sorted(_families(profile, length, budget_bytes), key=lambda family: family.least):
        if family.least >= least:
            break
        for bound, plan in family.plans():
            if bound >= least:
                break
            if cost(plan, profile).peak_bytes <= budget_bytes and (time := time_of(plan, profile)) < least:
                best, least = plan, time
    return best


@dataclasses.dataclass(frozen=True)
class _Family:
    """Plans with leaves of n steps, one for each row of inner counts.

    Attributes:
      length: steps of the plans.
      n: steps of a leaf.
      counts: k1, for each row.
      bounds: lower bounds on their times, infinite for plans that cannot fit.
      carries: how many carries there is room for beside a leaf, if the rest is a second nest; None if it is kept.
      loop: what a loop takes, in carries.
    """

    length: int
    n: int
    counts: Ints
    bounds: Floats
    carries: int | None = None
    loop: float = 0.0

    @property
    def least(self) -> float:
        return float(self.bounds.min())

    def plans(self) -> Iterator[tuple[float, Plan]]:
        """The most promising plans, with their bounds, which ascend."""
        inner = inner_counts(self.length // self.n)
        for row in _ascending(self.bounds):
            k = int(self.counts[row])
            rest = self.length - k * self.n * int(inner.products[row])
            after = (Steps(rest),) if self.carries is None else _second_nest(rest, self.n, self.carries - k, self.loop)
            if after is not None:
                parts = (_nest(self.n, k, inner.counts[row]), *(part for part in after if part != Steps(0)))
                yield float(self.bounds[row]), Chain(parts) if len(parts) > 1 else parts[0]


def _families(profile: StepProfile, length: int, budget_bytes: int) -> Iterator[_Family]:
    carry, sums_bytes = max(profile.carry_bytes, 1), chain_sums_bytes(profile)
    rests = _rests(profile, length, budget_bytes)
    for n in _leaf_lengths(length):
        free = budget_bytes - cost(Steps(n), profile).peak_bytes
        # Below a Remat, blocks are one loop: two in a row would hold their arrays at once.
        if free < 0 or isinstance(in_blocks(Steps(n), profile.block_steps), Chain):
            continue
        inner = inner_counts(length // n)
        unit = n * inner.products  # steps of a child of the outermost loop
        exact = np.where(length % unit == 0, length // unit, 0)
        loops = (inner.counts > 0).sum(1)  # beside the outermost one
        cut, *of_one_block = rests.counts(length, n, unit)
        cut[0] = min(cut[0], _least_count(profile, length, n, rests.free_bytes))
        for counts in (exact, cut, *of_one_block):
            has_rest = counts * unit < length
            taken = (counts + inner.carries) * carry + loops * profile.loop_bytes
            fits = taken + np.where(has_rest, sums_bytes, 0) <= free
            yield _Family(length, n, counts, _bounds(profile, length, n, counts, fits))
        counts, carries = length // unit, (free - sums_bytes) // carry
        loop = profile.loop_bytes / carry
        fits = (counts + inner.carries + loops * loop < carries) & (length - counts * unit > n)
        yield _Family(length, n, counts, _bounds(profile, length, n, counts, fits, again=n), carries, loop)


def _bounds(profile: StepProfile, length: int, n: int, counts: Ints, fits: Bools, again: int | None = None) -> Floats:
    """Lower bounds on the times of plans; all but `again` steps of the rest are evaluated again, None: none are."""
    inner = inner_counts(length // n)
    times, covered = profile.times, counts * n * inner.products
    kept = length - covered if again is None else np.minimum(length - covered, again)
    advanced = covered * (1 + inner.advanced) + (length - covered - kept)
    in_leaf, in_rest = (blocks_of(steps, profile.block_steps, length) for steps in (np.array([n]), np.maximum(kept, 0)))
    blocks = covered // n * in_leaf * (2 + inner.advanced) + in_rest
    time = length * (times.recording + times.backward) + advanced * times.forward + blocks * times.block
    bounds: Floats = np.where(fits & (counts >= 2) & (covered <= length), time, np.inf)
    return bounds * (1 + SECOND_BODY * (covered < length))


@functools.lru_cache(maxsize=65536)
def _second_nest(steps: int, n: int, carries: int, loop: float) -> tuple[Plan, ...] | None:
    """The fastest nest with leaves of n steps and at most so many carries that leaves at most n of so many steps.

    Each loop takes as much as `loop` carries.
    """
    if steps <= n:
        return (Steps(steps),)
    inner = inner_counts(steps // n)
    counts = steps // (n * inner.products)
    rests = steps - counts * n * inner.products
    taken = counts + inner.carries + loop * (1 + (inner.counts > 0).sum(1))
    fits = (counts >= 2) & (taken <= carries) & (rests <= n)
    row = int(np.argmin(np.where(fits, (steps - rests) * (1 + inner.advanced), np.inf)))
    return (_nest(n, int(counts[row]), inner.counts[row]), Steps(int(rests[row]))) if fits[row] else None


def _nest(n: int, k: int, inner: Ints) -> Plan:
    plan: Plan = Steps(n)
    for count in (*reversed(inner[inner > 0]), k):
        plan = Repeat(int(count), Remat(plan))
    return plan


def _ascending(bounds: Floats) -> list[int]:
    """Where the least of them are, in order."""
    count = min(_TRIES, len(bounds))
    least = np.argpartition(bounds, count - 1)[:count]
    return [int(at) for at in least[np.argsort(bounds[least], kind="stable")] if np.isfinite(bounds[at])]


@dataclasses.dataclass(frozen=True)
class _Rests:
    """What a rest that is kept may take of a budget, whatever the nest before it.

    Attributes:
      profile: of a step.
      free_bytes: for carries and the rest.
      cut_bytes: for the residuals of a rest that is cut into blocks.
      of_one_block: lengths of rests that are one block.
    """

    profile: StepProfile
    free_bytes: int
    cut_bytes: int
    of_one_block: tuple[int, ...]

    def counts(self, length: int, n: int, unit: Ints) -> Iterator[Ints]:
        """The least k1 whose rest fits: rests that are cut into blocks, and such of one block of at most so many steps.

        The rest shrinks by `unit` steps for each child, and each child takes a carry.
        """
        carry, residual = max(self.profile.carry_bytes, 1), self.profile.residual_bytes
        shrink = np.maximum(unit * residual - carry, 1)
        yield np.maximum(-(-(length * residual - self.cut_bytes) // shrink), 2)
        if not self.of_one_block:
            return
        peaks = _rest_peaks(self.profile, self.profile.block_steps, n)
        for steps in self.of_one_block:
            least = np.maximum(-(-(length - steps) // unit), 2)
            yield np.where(least * carry + peaks[steps] <= self.free_bytes, least, length + 1)


def _rests(profile: StepProfile, length: int, budget_bytes: int) -> _Rests:
    carry, longest = max(profile.carry_bytes, 1), profile.block_steps
    free = budget_bytes - chain_sums_bytes(profile)
    lengths = {max(longest * i // 4, 1) for i in range(1, 5)} if length <= _SHORT_SCAN else ()
    return _Rests(profile, free, free - int(_rest_peaks(profile, longest, 0)[longest]) - carry, tuple(lengths))


def _least_count(profile: StepProfile, length: int, n: int, free_bytes: int) -> int:
    """The least k for which (k*[n] + rest) should fit, the rest being at most a few blocks, cut as they will be.

    Where a rest is a few blocks their length matters: 50 steps are two blocks of 25, beside which there is room for
    more than beside one of 48.
    """
    peaks = _rest_peaks(profile, min(length, _FEW_BLOCKS * profile.block_steps, _MOST_REST), n)
    counts = np.arange(max(-(-(length - len(peaks) + 1) // n), 2), length // n + 1)
    beside = profile.loop_bytes if n > profile.block_steps else 0  # the child is a loop of blocks itself
    fits = counts * profile.carry_bytes + peaks[length - counts * n] + beside <= free_bytes
    return int(counts[fits].min(initial=length + 1))


def _rest_peaks(profile: StepProfile, most: int, n: int) -> Ints:
    """Bytes of rests of 0, 1, ... steps that are kept, up to so many, beside loops over n steps."""
    peaks, longest = _kept_peaks(profile, most), profile.block_steps
    placed = _placed_bytes(profile, min(most, longest), min(n, longest))
    placed = np.maximum(peaks[: len(placed)], placed)
    placed[1:] += ahead_bytes(min(n, longest), profile)
    return np.concatenate([placed, peaks[len(placed) :]])


@functools.lru_cache(maxsize=4096)
def _placed_bytes(profile: StepProfile, most: int, leaf: int) -> Ints:
    """Bytes of 0, 1, ... steps as a last block."""
    placed: Ints = profile.fixed_bytes + np.array([rest_bytes(steps, leaf, profile) for steps in range(most + 1)])
    return placed


@functools.lru_cache(maxsize=64)
def _kept_peaks(profile: StepProfile, most: int) -> Ints:
    """Bytes of 0, 1, ... steps that are kept, anywhere."""
    rests = [in_blocks(Steps(n), profile.block_steps) for n in range(most + 1)]
    loops = [0 if isinstance(rest, Steps) else profile.loop_bytes for rest in rests]
    peaks: Ints = np.array([cost(rest, profile).peak_bytes for rest in rests]) + np.array(loops)
    return peaks


@functools.lru_cache(maxsize=64)
def _leaf_lengths(length: int) -> list[int]:
    most = max(length // 2, 1)
    grid = {int(n) for n in np.geomspace(1, most, 48)}
    dividing = {length // k for k in range(2, min(length, 256) + 1) if length % k == 0}
    return sorted({*range(1, min(_SHORT, most) + 1), *grid, *dividing})
