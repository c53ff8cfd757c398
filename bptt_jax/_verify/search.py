"""The fastest plan that XLA confirms, found with few compiled programs: a search on a ladder of plans.

A rung is a number of bytes, each some 6 % above the one below; on it stands the fastest plan that is predicted to take
no more. Predictions are near, not exact, so a plan is compiled, and the bytes that XLA reports say on which rung to
look next: as many times higher as there is room, or lower as there is not. Plans that held and plans that did not
enclose the answer. The rungs do not depend on the budget, so one that was compiled for a budget serves others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from bptt_jax._step.form import Swept
from bptt_jax.plans._nodes import Plan

MOST_PROGRAMS = 4
_RUNG = 1.06  # the ratio of two rungs
_AIM = 0.97  # of the bytes that are asked for, is predicted for later ones, from what was measured
_ENOUGH = 0.9  # of the bytes that are asked for; a plan that uses so many is not improved on
_LITTLE, _BEYOND = 0.75, 12  # of the bytes that are asked for; where no more are used, so many rungs are looked up to
_FARTHEST = 8.0  # times as many bytes, or as few, are tried next at most, whatever XLA reports


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan that may be run.

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
    """A candidate that was compiled.

    Attributes:
      candidate: which.
      measured_bytes: what XLA reports; infinite where the compiler refused the program for its size.
      seconds: that tracing and compiling took when it was done; a program is not compiled twice in a process.
    """

    candidate: Candidate
    measured_bytes: float
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a search came to.

    Attributes:
      best: the fastest plan that holds; if none was found, the smallest of the last resorts.
      checks: all that were compiled, in this order.
      unchecked: why nothing was compiled; empty if something was.
    """

    best: Check
    checks: tuple[Check, ...]
    unchecked: str = ""


class Ladder(Protocol):
    """Plans for one gradient."""

    def within(self, bytes_: int) -> Candidate | None:
        """The fastest plan that is predicted to take at most so many bytes; None if there is none."""

    def last_resorts(self) -> Sequence[Candidate]:
        """One to three plans that may be the smallest; where nothing else holds, one of them has to."""


def verify(ladder: Ladder, asked: int, compiled: Callable[[Candidate], Check]) -> Verdict:
    """Compiles at most four plans, to find the fastest that takes at most `asked` bytes.

    If none is found, the bytes of the best are a budget with which one is: the last resorts do not depend on what is
    asked for, and all of them are tried.

    Args:
      ladder: the plans.
      asked: bytes.
      compiled: compiles one.
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
    """The fastest that held; None if none did."""
    held = [check for check in checks if check.measured_bytes <= asked]
    return min(held, key=lambda check: check.candidate.predicted_time, default=None)


def _next(ladder: Ladder, asked: int, checks: Sequence[Check]) -> Candidate | None:
    """What to compile next; None where nothing else is worth it."""
    low = _fastest(checks, asked)
    over = [check.candidate for check in checks if check.measured_bytes > asked]
    high = min(over, key=lambda candidate: candidate.predicted_bytes, default=None)
    rung = _rung(_target(checks, asked))
    if low is not None:
        return None if low.measured_bytes >= _ENOUGH * asked else _faster(ladder, rung, low, high, asked)
    if len(checks) == 0 and (first := ladder.within(_bytes(rung))) is not None:
        return first
    resorts = [candidate for candidate in ladder.last_resorts() if candidate not in over]
    candidate = _below(ladder, rung, high) if len(checks) + len(resorts) < MOST_PROGRAMS else None
    return candidate if candidate is not None else next(iter(resorts), None)


def _below(ladder: Ladder, rung: int, high: Candidate | None) -> Candidate | None:
    """The plan of a rung, or of the next one below whose plan is predicted to take less than one that did not hold."""
    while (candidate := ladder.within(_bytes(rung))) is not None:
        if high is None or candidate.predicted_bytes < high.predicted_bytes:
            return candidate
        rung -= 1
    return None


def _faster(ladder: Ladder, rung: int, low: Check, high: Candidate | None, asked: int) -> Candidate | None:
    """The plan of a rung if it is faster than one that held; where little is used, else the first of those above it."""
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
    """The predicted bytes of the next plan: those at which what was measured comes to what was asked for.

    On the line through the two checks that came nearest to it; of one check, or of two that are on no line that rises,
    in proportion.
    """
    if not checks:
        return asked
    near, *others = sorted(checks, key=lambda check: abs(check.measured_bytes - asked))
    predicted, measured = near.candidate.predicted_bytes, max(near.measured_bytes, 1)
    target = predicted * _AIM * asked / measured
    if others and math.isfinite(others[0].measured_bytes):
        run, rise = others[0].candidate.predicted_bytes - predicted, others[0].measured_bytes - measured
        target = predicted + (_AIM * asked - measured) * run / rise if run * rise > 0 else target
    return min(max(target, predicted / _FARTHEST), predicted * _FARTHEST)
