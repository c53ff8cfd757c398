"""The search for the budget with which a whole program fills its limit, in at most four programs.

A program takes the bytes of its scans and a rest, which is not known: arguments, logits, an optimiser. Where both are
held at the same time, the program grows by a byte for each byte of the scans; where they are not, by less. So the first
program has all the bytes left by its arguments, and its excess tells the rest. A secant through the bytes of two
programs gives the next, with the bytes of the scans and not the budget on its axis: a plan mostly takes 0.86 to 1.0 of
its budget, and a scan keeping everything takes no more however much it may.

A budget is traced before it is compiled, so its plans and the bytes of its scans are known. Neighbouring budgets often
have the same plans, so the same program, which is not compiled again. Nor is one that is over the limit if it takes at
most a byte less for each byte that its scans take less than those of a known one: it is put off, and compiled only
where programs are left at the end. Where the largest budget that fits leaves much room, budgets a little below it are
tried, because their plans may take more.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

MOST_PROGRAMS = 4
LEAST_BUDGET = 4096  # bytes; a program fitting with so few is not asked to take fewer
ENOUGH = 0.95  # share of the limit; a program taking this much is improved on only where its scans have little
_AIM = 0.975  # share of the limit: the aim of a secant, because plans are steps, not a line
_SAFE_AIM = 0.945  # share of the limit: the aim after two programs over it, because one of the four has to hold
_NEAREST = 0.995  # share of the limit: the aim where the scans have little of it, so steps are small
_STEP = 0.06  # share of a scan's bytes between neighbouring plans, about
_GAIN = 0.15  # share of the scans' bytes worth a further program
_USED = 0.95  # share of its budget mostly taken by a plan
_LEAST_SLOPE = 0.25  # bytes of the program for a byte of its scans, at least: a secant of less would lead too far
_NARROW = 1.01  # ratio of neighbouring budgets; between them nothing is looked for
_BELOW = 0.97  # ratio of budgets tried one after the other below one that fits
_LOWEST = 0.86  # of these budgets; a plan mostly takes as much of its own
_MOST_ATTEMPTS = 24  # budgets tried, with those in need of no program of their own
_LATE = 14  # attempts; after them only the smallest budget is tried, if none has fitted


@dataclasses.dataclass(frozen=True)
class Taken:
    """A program, and its bytes.

    Attributes:
      budget: the budget it was made with.
      scan_bytes: temporaries of its differentiated scans, each compiled by itself.
      total_bytes: of the program; infinite where the compiler refused it for its size.
      is_everything: whether a larger budget would change nothing, because its scans keep everything.
      is_compiled: False for one whose plans are those of a program compiled before, so its bytes as well.
    """

    budget: int
    scan_bytes: int
    total_bytes: float
    is_everything: bool
    is_compiled: bool = True


@dataclasses.dataclass(frozen=True)
class Refused:
    """A budget below the smallest plan of a scan: no program.

    Attributes:
      budget: the budget.
      smallest: the smallest budget of this scan, as far as is known.
    """

    budget: int
    smallest: int


@dataclasses.dataclass(frozen=True)
class PutOff:
    """A budget whose program is not compiled for now, being probably over the limit or no gain; see `is_worth`.

    Attributes:
      budget: the budget.
      scan_bytes: as of `Taken`.
    """

    budget: int
    scan_bytes: int


Answer = Taken | Refused | PutOff


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a search.

    Attributes:
      best: of the compiled programs that fit, one whose scans keep everything, or else take the most bytes; None if
        none fits.
      taken: all compiled programs, in their order.
      refused: the budgets with no program.
      least: the smallest budget with a program, compiled or of known plans.
    """

    best: Taken | None
    taken: tuple[Taken, ...]
    refused: tuple[Refused, ...]
    least: int


def search(within: int, first: int, attempt: Callable[[int, Callable[[int], bool]], Answer]) -> Outcome:
    """Compiles at most four programs, to find the one that has the most for its scans within a limit.

    If none fits, the last program has the smallest budget with one.

    Args:
      within: the limit, in bytes.
      first: the budget of the first program.
      attempt: (budget, worth) -> answer: makes the program for a budget, and compiles it unless its plans are known, or
        `worth` of the bytes of its scans is False.
    """
    answers: list[Answer] = []
    while len(answers) < _MOST_ATTEMPTS and len(_compiled(answers)) < MOST_PROGRAMS:
        budget = next_budget(within, first, answers)
        if budget is None:
            break
        answers.append(attempt(budget, functools.partial(is_worth, within, answers, budget)))
    compiled = _compiled(answers)
    refused = tuple(one for one in answers if isinstance(one, Refused))
    least = min((one.budget for one in answers if isinstance(one, Taken)), default=LEAST_BUDGET)
    return Outcome(_best(within, compiled), tuple(compiled), refused, least)


def _compiled(answers: Sequence[Answer]) -> list[Taken]:
    return [one for one in answers if isinstance(one, Taken) and one.is_compiled]


def is_worth(within: int, answers: Sequence[Answer], budget: int, scan_bytes: int) -> bool:
    """Whether a program is worth compiling now, by the bytes of its scans; one that was put off before is.

    Args:
      within: the limit.
      answers: to the budgets tried.
      budget, scan_bytes: of the program.
    """
    compiled = _compiled(answers)
    low, best = fitting(within, compiled), _best(within, compiled)
    if low is None or best is None or any(isinstance(one, PutOff) and one.budget == budget for one in answers):
        return True
    over = (one for one in compiled if within < one.total_bytes < math.inf)
    if any(one.total_bytes - within > max(one.scan_bytes - scan_bytes, 0) for one in over):
        return False
    return budget > low.budget or scan_bytes > best.scan_bytes


def _best(within: int, taken: Sequence[Taken]) -> Taken | None:
    fits = (one for one in taken if one.total_bytes <= within)
    return max(fits, key=lambda one: (one.is_everything, one.scan_bytes, one.budget), default=None)


def fitting(within: int, taken: Sequence[Taken]) -> Taken | None:
    """The program with the largest budget that fits; None if none does."""
    return max((one for one in taken if one.total_bytes <= within), key=lambda one: one.budget, default=None)


def next_budget(within: int, first: int, answers: Sequence[Answer]) -> int | None:
    """The next budget to try; None where no other is worth it.

    Args:
      within, first: as for `search`.
      answers: to the budgets tried.
    """
    taken = [one for one in answers if isinstance(one, Taken)]
    least = max([LEAST_BUDGET, *(one.smallest for one in answers if isinstance(one, Refused))])
    if not taken:
        return max(first, least)
    low, best = fitting(within, taken), _best(within, taken)
    if low is None or best is None:
        high = min(one.budget for one in taken)
        # The last program is for the smallest budget, because only this one can tell.
        left = MOST_PROGRAMS - len(_compiled(answers))
        is_last, aim = left == 1 or len(answers) >= _LATE, _SAFE_AIM if left == 2 else _AIM
        aimed = least if is_last else min(_aimed(within, taken, aim), int(high / _NARROW))
        return max(least, aimed) if high > least else None
    if low.is_everything or (best.total_bytes >= ENOUGH * within and not _may_gain(within, best, taken)):
        return None
    over = [one.budget for one in taken if one.total_bytes > within]
    over += [one.budget for one in answers if isinstance(one, PutOff) and one.budget > low.budget]
    if not over:
        return max(_aimed(within, taken), int(low.budget * _NARROW) + 1)
    high = min(over)
    if high <= low.budget * _NARROW:
        return _below(low, best, least, answers) or _put_off(within, best, answers)
    aimed = _aimed(within, taken)
    return aimed if low.budget < aimed < high else (low.budget + high) // 2


def _below(low: Taken, best: Taken, least: int, answers: Sequence[Answer]) -> int | None:
    """The next budget below the largest one that fits, for a plan that takes more bytes; None at the last."""
    tried, budget = {one.budget for one in answers}, int(_BELOW * low.budget)
    while budget in tried:
        budget = int(_BELOW * budget)
    return budget if budget > max(_LOWEST * low.budget, best.scan_bytes, least) else None


def _put_off(within: int, best: Taken, answers: Sequence[Answer]) -> int | None:
    """The budget put off whose scans take the fewest bytes beyond those of the best program; None if there is none."""
    most = min((one.scan_bytes for one in answers if isinstance(one, Taken) and one.total_bytes > within), default=0)
    left = [one for one in answers if isinstance(one, PutOff) and best.scan_bytes < one.scan_bytes < most]
    return min(left, key=lambda one: one.scan_bytes).budget if left else None


def _may_gain(within: int, low: Taken, taken: Sequence[Taken]) -> bool:
    """Whether the room beside a fitting program is worth a further one, because its scans have little."""
    others = [one for one in taken if one.total_bytes > within]
    room = (_NEAREST * within - low.total_bytes) / _slope(low, others)
    return bool(others) and room > _GAIN * low.scan_bytes


def _aimed(within: int, taken: Sequence[Taken], aim: float = _AIM) -> int:
    """The budget for a program a little below the limit, by a secant, or by a byte for a byte where there is none."""
    near, *others = sorted(taken, key=lambda one: (abs(one.total_bytes - aim * within), -one.budget))
    if math.isinf(near.total_bytes):
        return near.budget // 4
    slope = _slope(near, others)
    rest = near.total_bytes - slope * near.scan_bytes
    scan_bytes = (aim * within - rest) / slope
    if aim == _AIM:
        scan_bytes = max(scan_bytes, (_NEAREST * within - rest) / (slope + _STEP))
    # A scan keeping everything says nothing on its share of a smaller budget.
    used = _USED if near.is_everything or not near.scan_bytes else near.scan_bytes / near.budget
    return max(int(scan_bytes / used), 1)


def _slope(near: Taken, others: Sequence[Taken]) -> float:
    """Bytes of the program for a byte of its scans, near a program."""
    for other in others:
        run, rise = other.scan_bytes - near.scan_bytes, other.total_bytes - near.total_bytes
        if math.isfinite(rise) and run * rise > 0:
            return max(rise / run, _LEAST_SLOPE)
    return 1.0
