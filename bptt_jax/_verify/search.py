"""The search on a ladder of plans for the fastest one confirmed by XLA, with few compiled programs.

A rung is a number of bytes, each 6 % above the rung below; on it stands the fastest plan predicted to take no more.
Predictions are near, not exact, so a plan is compiled. XLA's bytes for it give the next rung: higher in proportion to
the room left, or lower in proportion to the excess. Plans that held and plans that did not enclose the answer. The
rungs do not depend on the budget, so a program compiled for one budget serves others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from bptt_jax._step.form import Swept
from bptt_jax.plans._nodes import Plan

MOST_PROGRAMS = 4
_RUNG = 1.06  # the ratio of neighbouring rungs
_AIM = 0.97  # share of the asked bytes: the aim of later programs, because predictions are near, not exact
_ENOUGH = 0.9  # share of the asked bytes; a plan using this much is not improved on
_LITTLE, _BEYOND = 0.75, 12  # share of the asked bytes; below it, this many higher rungs are looked up too
_FARTHEST = 8.0  # the next target is at most this many times higher or lower, whatever XLA reports


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan to be considered, with its predictions.

    Attributes:
      plan: the plan.
      form: the step as the sweep runs it; None for the nest.
      predicted_bytes: by the estimate.
      predicted_time: in the unit of the profile's times.
    """

    plan: Plan
    form: Swept | None
    predicted_bytes: int
    predicted_time: float


@dataclasses.dataclass(frozen=True)
class Check:
    """A compiled candidate.

    Attributes:
      candidate: the candidate.
      measured_bytes: XLA's temporary bytes; infinite where the compiler refused the program for its size.
      seconds: the time of tracing and compiling, perhaps earlier: a program is not compiled twice in a process.
      host_bytes: XLA's temporary bytes in the host's memory.
    """

    candidate: Candidate
    measured_bytes: float
    seconds: float = 0.0
    host_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of a search.

    Attributes:
      best: the fastest plan that holds; if none was found, the smallest of the last resorts.
      checks: all compiled candidates, in this order.
      unchecked: why nothing was compiled; empty if something was.
    """

    best: Check
    checks: tuple[Check, ...]
    unchecked: str = ""


class Ladder(Protocol):
    """The plans for one gradient, by their predicted bytes."""

    def within(self, bytes_: int) -> Candidate | None:
        """The fastest plan predicted to take at most `bytes_`; None if there is none."""

    def last_resorts(self) -> Sequence[Candidate]:
        """One to three plans, each perhaps the smallest; where nothing else holds, one of them has to."""


def verify(ladder: Ladder, asked: int, compiled: Callable[[Candidate], Check]) -> Verdict:
    """Compiles at most four plans, to find the fastest within `asked` bytes.

    If none is found, the bytes measured for the best are a budget with a plan: the last resorts do not depend on the
    budget, and all of them are tried.

    Args:
      ladder: the plans.
      asked: the budget in bytes.
      compiled: compiles a candidate.
    """
    checks: list[Check] = []
    while len(checks) < MOST_PROGRAMS and (candidate := _next(ladder, asked, checks)) is not None:
        checks.append(compiled(candidate))
    best = _fastest(checks, asked)
    if best is None:
        resorts = ladder.last_resorts()
        best = min((one for one in checks if one.candidate in resorts), key=lambda one: one.measured_bytes)
    return Verdict(best, tuple(checks))


def _fastest(checks: Sequence[Check], asked: int) -> Check | None:
    """The fastest check that held; None if none did."""
    held = [check for check in checks if check.measured_bytes <= asked]
    return min(held, key=lambda check: check.candidate.predicted_time, default=None)


def _next(ladder: Ladder, asked: int, checks: Sequence[Check]) -> Candidate | None:
    """The next candidate to compile; None where no other is worth it."""
    low = _fastest(checks, asked)
    over = [check.candidate for check in checks if check.measured_bytes > asked]
    high = min(over, key=lambda candidate: candidate.predicted_bytes, default=None)
    rung = _rung(_target(checks, asked))
    if low is not None:
        return None if low.measured_bytes >= _ENOUGH * asked else _faster(ladder, rung, low, high, asked)
    if len(checks) == 0 and (first := ladder.within(_bytes(rung))) is not None:
        return first
    # Programs are reserved for the last resorts, because all of them have to be tried before a budget is refused.
    resorts = [candidate for candidate in ladder.last_resorts() if candidate not in over]
    candidate = _below(ladder, rung, high) if len(checks) + len(resorts) < MOST_PROGRAMS else None
    return candidate if candidate is not None else next(iter(resorts), None)


def _below(ladder: Ladder, rung: int, high: Candidate | None) -> Candidate | None:
    """The plan of a rung, or of the first rung below with a plan predicted smaller than `high`, which did not hold."""
    while (candidate := ladder.within(_bytes(rung))) is not None:
        if high is None or candidate.predicted_bytes < high.predicted_bytes:
            return candidate
        rung -= 1
    return None


def _faster(ladder: Ladder, rung: int, low: Check, high: Candidate | None, asked: int) -> Candidate | None:
    """The plan of a rung if faster than `low`, which held; where `low` uses little, else the first faster one above."""
    beyond = _BEYOND if low.measured_bytes < _LITTLE * asked else 0
    for candidate in (_below(ladder, rung + more, high) for more in range(beyond + 1)):
        if candidate is not None and candidate.predicted_time < low.candidate.predicted_time:
            return candidate
    return None


def _bytes(rung: int) -> int:
    return int(_RUNG**rung)


def _rung(bytes_: float) -> int:
    return math.floor(math.log(max(bytes_, 1)) / math.log(_RUNG))


def _target(checks: Sequence[Check], asked: int) -> float:
    """The predicted bytes of the next plan, for measured bytes of `_AIM` of those asked for.

    A secant gives them: the line through the two checks measured nearest to the asked bytes. With one check, or two on
    no rising line, measured bytes are taken to be in proportion to predicted ones.
    """
    if not checks:
        return asked
    # At least 1, because XLA reports 0 bytes for a program that fits on a TPU's chip.
    near, *others = sorted(checks, key=lambda check: abs(check.measured_bytes - asked))
    predicted, measured = near.candidate.predicted_bytes, max(near.measured_bytes, 1)
    target = predicted * _AIM * asked / measured
    if others and math.isfinite(others[0].measured_bytes):
        run, rise = others[0].candidate.predicted_bytes - predicted, others[0].measured_bytes - measured
        target = predicted + (_AIM * asked - measured) * run / rise if run * rise > 0 else target
    return min(max(target, predicted / _FARTHEST), predicted * _FARTHEST)
