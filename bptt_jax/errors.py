"""The exceptions of bptt_jax, and the one place where their messages are put together.

Every message names the request, the finding, and a remedy.
"""

from __future__ import annotations

import fractions
import inspect
import math
import operator
import os
import types
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_NOT_THE_USERS = tuple(
    str(Path(file).parent) + os.sep for file in (__file__, inspect.__file__)
)  # this package, Python's library


def format_bytes(count: int) -> str:
    """A byte count for people, exact below 1 KiB and with three digits above.

    >>> format_bytes(800), format_bytes(2048), format_bytes(5_000_000)
    ('800 B', '2.00 KiB', '4.77 MiB')
    """
    power = max(0, min(4, (abs(count).bit_length() - 1) // 10))
    if power == 0:
        return f"{count} B"
    size = count / 1024**power
    return f"{size:.{max(0, 2 - len(str(int(size))) + 1)}f} {'KMGT'[power - 1]}iB"


def _bytes(count: int) -> str:
    return f"{count:,} byte{'s' * (count != 1)}"


def _listed(parts: Iterable[tuple[int, str]]) -> str:
    return "; ".join(f"{_bytes(size)} for {name}" for size, name in parts)


def _as_percentage(budget: object, budget_bytes: int, smallest_bytes: int) -> str:
    """The smallest budget as a percentage, rounded up, if a percentage was asked for; else empty."""
    if not isinstance(budget, str) or "%" not in budget or budget_bytes <= 0:
        return ""
    asked = fractions.Fraction(budget.strip().rstrip("%").strip())
    percent = asked * smallest_bytes / budget_bytes
    if budget_bytes <= math.ceil(asked):  # n % are n bytes or more, so a scan of few bytes needs n % for n bytes
        percent = fractions.Fraction(smallest_bytes)
    return f', or "{math.ceil(percent * 100) / 100:.2f}%"'


FIXED_PART = "the part that does not grow with the length"


class BudgetError(ValueError):
    """No plan for this gradient of a scan needs as few bytes as the budget allows.

    `scan` and the layers raise it when a call is differentiated, `explain` and `make_plan` at once. The bytes are of
    the gradient with respect to the differentiated inputs, under `jax.vmap` for all examples.

    Attributes:
      budget_bytes: the budget asked for, in bytes.
      smallest_bytes: the smallest budget found to suffice, in bytes; as XLA reports it, if `scan` has compiled it.
      shares: the parts of the smallest budget, from names to bytes, adding up to it; empty where the planner does not
        tell them.

    >>> from bptt_jax import StepProfile, make_plan
    >>> try:
    ...     make_plan(StepProfile(carry_bytes=1, residual_bytes=4), 1000, 20)
    ... except BudgetError as error:
    ...     print(error.budget_bytes, error.smallest_bytes)
    20 21
    """

    def __init__(
        self,
        length: int,
        budget: object,
        budget_bytes: int,
        smallest_bytes: int,
        shares: Mapping[str, int] = types.MappingProxyType({}),
        host_budget: object = None,
    ):
        asked = _asked(budget, host_budget)
        message = (
            f"no plan for a scan of length {length} fits {asked}, which is {_bytes(budget_bytes)}; "
            f"the smallest that would do is budget={smallest_bytes} "
            f"({format_bytes(smallest_bytes)}{_as_percentage(budget, budget_bytes, smallest_bytes)})."
        )
        if shares:
            parts = sorted(((size, name) for name, size in shares.items() if size), key=lambda part: -part[0])
            order = ", the largest share first," if len(parts) > 1 else ""
            message += f" It consists{order} of {_listed(parts)}."
        if budget_bytes < shares.get(FIXED_PART, 0):
            message += f" The budget is below {FIXED_PART}."
        super().__init__(message)
        self.length = length
        self.budget = budget
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes
        self.shares = dict(shares)
        self._host_budget = host_budget

    def __reduce__(self) -> tuple[type[BudgetError], tuple[Any, ...]]:
        given = self.length, self.budget, self.budget_bytes, self.smallest_bytes, self.shares, self._host_budget
        return type(self), given


def _asked(budget: object, host_budget: object) -> str:
    """A budget as it was given; on CPU with the one for the host, which is of the same memory."""
    if host_budget is None:
        return f"budget={budget!r}"
    return f"budget={budget!r} and host_budget={host_budget!r} together, because a CPU has one memory"


class FitError(ValueError):
    """No budget makes a whole program fit within a limit; raised by `largest_budget`.

    Attributes:
      within_bytes: the limit asked for, in bytes.
      smallest_bytes: the bytes of the program with the smallest budget that its scans take; None where the compiler
        refuses it for its size.
      budget_bytes: this budget.
      shares: the parts of these bytes, from names to bytes, adding up to them.

    >>> print(FitError("1KiB", 1024, 512, {"temporaries of the scans": 500, "arguments": 1000}))
    no budget makes the program fit within='1KiB', which is 1,024 bytes: with budget=512, the smallest that its scans take, it takes 1,500 bytes. These are, the largest share first, 1,000 bytes for arguments; 500 bytes for temporaries of the scans. within=1500 would do.
    """  # noqa: E501  the text of a message is one line

    def __init__(
        self,
        within: object,
        within_bytes: int,
        budget_bytes: int,
        shares: Mapping[str, int] | None,
        hints: Iterable[str] = (),
    ):
        hints = tuple(hints)
        self.smallest_bytes = None if shares is None else sum(shares.values())
        message = (
            f"no budget makes the program fit within={within!r}, which is {_bytes(within_bytes)}: "
            f"with budget={budget_bytes}, the smallest that its scans take, "
        )
        if shares is None:
            message += "the compiler refuses it for its size."
        else:
            taken = sum(shares.values())
            parts = sorted(((size, name) for name, size in shares.items() if size), key=lambda part: -part[0])
            message += f"it takes {_bytes(taken)}. These are, the largest share first, {_listed(parts)}. "
            message += f"within={taken} would do."
        super().__init__(" ".join([message, *hints]))
        self.within_bytes = within_bytes
        self.budget_bytes = budget_bytes
        self.shares = dict(shares or {})
        self._given = within, within_bytes, budget_bytes, None if shares is None else dict(shares), hints

    def __reduce__(self) -> tuple[type[FitError], tuple[object, int, int, dict[str, int] | None, tuple[str, ...]]]:
        return type(self), self._given


class BudgetWarning(UserWarning):
    """No plan takes as few bytes as a percentage allows, so the smallest one runs; bytes raise `BudgetError`.

    Attributes:
      budget_bytes, smallest_bytes: as in `BudgetError`.

    >>> print(BudgetWarning(23, "5%", 800, 1624))
    the smallest plan runs, because budget='5%' of this scan of length 23 is 800 bytes, and none takes so few; it needs a budget of 1,624 bytes (1.59 KiB, or "10.15%").
    """  # noqa: E501  the text of a message is one line

    def __init__(self, length: int, budget: str, budget_bytes: int, smallest_bytes: int, host_budget: object = None):
        percentage = _as_percentage(budget, budget_bytes, smallest_bytes)
        super().__init__(
            f"the smallest plan runs, because {_asked(budget, host_budget)} of this scan of length {length} is "
            f"{_bytes(budget_bytes)}, and none takes so few; it needs a budget of {_bytes(smallest_bytes)} "
            f"({format_bytes(smallest_bytes)}{percentage})."
        )
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes
        self._given = length, budget, budget_bytes, smallest_bytes, host_budget

    def __reduce__(self) -> tuple[type[BudgetWarning], tuple[Any, ...]]:
        return type(self), self._given


class UnverifiedWarning(UserWarning):
    """A budget of bytes is kept by an estimate only, because the gradient cannot be compiled by itself at its place."""

    def __init__(self, budget: object, reason: str):
        super().__init__(
            f"budget={budget!r} is kept by an estimate, because this gradient cannot be compiled by itself here "
            f"({reason}); verify=False says that this is meant."
        )
        self._given = budget, reason

    def __reduce__(self) -> tuple[type[UnverifiedWarning], tuple[object, str]]:
        return type(self), self._given


def warn(warning: Warning) -> None:
    """Warns at the user's line: the innermost one outside of this package, Python's library and installed packages."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and (
        frame.f_code.co_filename.startswith(_NOT_THE_USERS) or "site-packages" in frame.f_code.co_filename
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(warning, stacklevel=level if frame is not None else 1)


def as_count(value: Any, least: int, name: str) -> int:
    """`value` as an int of at least `least`; errors name the field `name`."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}.") from None
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}.")
    return count
