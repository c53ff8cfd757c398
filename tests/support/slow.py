"""Which of many similar cases the default run takes; the others are marked slow: `-m ''` runs all, as CI does."""

from collections.abc import Iterable
from typing import Any

import pytest


def one_in(every: int, cases: Iterable[Any]) -> list[Any]:
    """Parameters of a test: the first and each `every`-th after it as they are, the others marked slow.

    In a product of columns a value may be left out of the default run where `every` and a column's length have a common
    divisor.
    """
    return [case if i % every == 0 else _slow(case) for i, case in enumerate(cases)]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
