"""Plans for the sweep: nests of loops with one kept rest, all of them tried.

    plan = Repeat(k1, Remat(Repeat(k2, Remat(... Steps(n)))))    and, if that leaves r steps, a last Steps(r)

Such a plan compiles to one or two bodies, which matters more to the sweep than to the nest: a body is compiled with its
backward. With M = n·k1·k2·…, h a carry and s a step's residuals, it takes

    evaluations   T + M + M·Σ_{i≥2} (1 − 1/k_i)
    bytes         max( Σ k_i·h + block(n),  k1·h + r·s + block's own )  + fixed

since the sweep never advances the last child of what it revisits. For every n and k2, k3, … of a grid the least k1 is
taken whose rest fits, and the fastest of all these wins. The grid does not depend on the budget, so more bytes never
cost more time. About 10^5 candidates in NumPy, some 20 ms.

What this form cannot reach, very small budgets for lengths without small factors, `compiled` does with more bodies.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bptt_jax._cost import chain_sums_bytes, cost, rest_bytes
from bptt_jax._plan import Chain, Plan, Remat, Repeat, Steps, in_blocks
from bptt_jax._step_profile import StepProfile
from bptt_jax._time import REST_TIME

Ints = npt.NDArray[np.int64]

_COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 32, 50, 64)  # of children, on inner levels
_MOST_LEVELS = 6
_SHORT = 64  # leaves up to this long are all tried, longer ones on a geometric grid and where they divide
_SHORT_SCAN = 10_000  # in longer ones, a rest of one block is nothing
_TRIES = 8  # of the fastest by the formulas above, which leave out what a rest takes beside its steps


def fastest(profile: StepProfile, length: int, budget_bytes: int) -> Plan | None:
    """The fastest plan of this form that fits; None if none does.

    >>> from bptt_jax._step_profile import StepTimes
    >>> plain = StepProfile(carry_bytes=2, residual_bytes=12)
    >>> profile = StepProfile(2, 7, block_bytes=6, block_steps=48, plain=plain, times=StepTimes(block=2))
    >>> fastest(profile, 1000, 450)
    Repeat(k=40, child=Remat(child=Steps(n=25)))
    >>> fastest(profile, 1000, 150)
    Repeat(k=25, child=Remat(child=Repeat(k=8, child=Remat(child=Steps(n=5)))))
    """
    inner, products = _inner_counts(length)
    best: tuple[float, Plan] | None = None
    for n in _leaf_lengths(length):
        leaf_bytes = cost(Steps(n), profile).peak_bytes
        # Below a Remat, blocks are one loop: two in a row would hold their arrays at once.
        if leaf_bytes > budget_bytes or isinstance(in_blocks(Steps(n), profile.block_steps), Chain):
            continue
        found = _with_leaf(profile, length, budget_bytes, n, leaf_bytes, inner, products)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    return None if best is None else best[1]


def _with_leaf(
    profile: StepProfile, length: int, budget_bytes: int, n: int, leaf_bytes: int, inner: Ints, products: Ints
) -> tuple[float, Plan] | None:
    """The fastest plan with leaves of n steps, and its time."""
    carry, times = max(profile.carry_bytes, 1), profile.times
    unit = n * products  # steps of a child of the outermost loop
    carries_bytes = budget_bytes - leaf_bytes - inner.sum(axis=1) * carry
    exact = np.where(length % unit == 0, length // unit, 0)
    best: tuple[float, Plan] | None = None
    for counts in (exact, *_with_rest(profile, length, budget_bytes, unit)):
        covered = counts * unit
        sums_bytes = np.where(covered < length, chain_sums_bytes(profile), 0)
        ok = (counts >= 2) & (counts * carry + sums_bytes <= carries_bytes) & (covered <= length)
        if not ok.any():
            continue
        again = covered * (1 + _advanced(inner))
        in_leaf, in_rest = (_blocks_of(steps, profile.block_steps) for steps in (np.array([n]), length - covered))
        blocks = covered // n * in_leaf * (2 + _advanced(inner)) + in_rest
        time = length * (times.recording + times.backward) + again * times.forward + blocks * times.block
        time = time * (1 + REST_TIME * (covered < length))
        time = np.where(ok, time, np.inf)
        for at in map(int, np.argsort(time)[:_TRIES]):
            if not np.isfinite(time[at]) or (best is not None and time[at] >= best[0]):
                break
            plan = _nest(length, n, [int(counts[at]), *map(int, inner[at][inner[at] > 0])])
            if cost(plan, profile).peak_bytes <= budget_bytes:
                best = float(time[at]), plan
                break
    return best


def _blocks_of(steps: Ints, most_steps: int) -> Ints:
    """Into how many blocks `in_blocks` cuts so many steps."""
    loops = -(-steps // most_steps)
    blocks: Ints = np.where(steps > most_steps, loops + (steps % np.maximum(loops, 1) > 0), np.minimum(steps, 1))
    for equal in range(max(most_steps // 2, 1), most_steps + 1):
        blocks = np.where((steps > most_steps) & (steps % equal == 0), steps // equal, blocks)
    return blocks


def _nest(length: int, n: int, counts: list[int]) -> Plan:
    plan: Plan = Steps(n)
    for k in reversed(counts):
        n *= k
        plan = Repeat(k, Remat(plan))
    return plan if n == length else Chain((plan, Steps(length - n)))


def _with_rest(profile: StepProfile, length: int, budget_bytes: int, unit: Ints) -> Iterator[Ints]:
    """The least k1 whose rest fits: rests that are cut into blocks, and such of one block of at most so many steps.

    The rest shrinks by `unit` steps for each child, and each child takes a carry.
    """
    carry, residual, longest = max(profile.carry_bytes, 1), profile.residual_bytes, profile.block_steps
    free = budget_bytes - chain_sums_bytes(profile)
    shrink = np.maximum(unit * residual - carry, 1)
    cut_free = free - cost(Steps(longest), profile).peak_bytes - rest_bytes(Steps(longest), profile) - carry
    yield np.maximum(-(-(length * residual - cut_free) // shrink), 2)
    for steps in {max(longest * i // 4, 1) for i in range(1, 5)} if length <= _SHORT_SCAN else ():
        # The most carries beside such a rest, and the fewest children that leave no more than it.
        rest = Steps(steps)
        most = (free - cost(rest, profile).peak_bytes - rest_bytes(rest, profile)) // carry
        least = np.maximum(-(-(length - steps) // unit), 2)
        yield np.where(least <= most, least, length + 1)


def _advanced(inner: Ints) -> npt.NDArray[np.float64]:
    """For each row of counts, the sum of 1 − 1/k."""
    total: npt.NDArray[np.float64] = np.where(inner > 0, 1 - 1 / np.maximum(inner, 1), 0.0).sum(axis=1)
    return total


@functools.lru_cache(maxsize=64)
def _inner_counts(length: int) -> tuple[Ints, Ints]:
    """All choices of k2, k3, ..., padded with zeros, and their products; at most `length`."""
    rows = [
        row + (0,) * (_MOST_LEVELS - 1 - len(row))
        for levels in range(_MOST_LEVELS)
        for row in itertools.combinations_with_replacement(_COUNTS, levels)
    ]
    inner = np.array(rows, dtype=np.int64)
    products = np.where(inner > 0, inner, 1).prod(axis=1)
    keep = 2 * products <= max(length, 2)
    return inner[keep], products[keep]


@functools.lru_cache(maxsize=64)
def _leaf_lengths(length: int) -> list[int]:
    most = max(length // 2, 1)
    grid = {int(n) for n in np.geomspace(1, most, 48)}
    dividing = {length // k for k in range(2, min(length, 256) + 1) if length % k == 0}
    return sorted({*range(1, min(_SHORT, most) + 1), *grid, *dividing})
