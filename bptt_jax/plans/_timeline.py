"""A plan as text: a timeline of its runs of steps, with the carries and residuals kept meanwhile."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator

from bptt_jax.errors import as_count
from bptt_jax.plans._memories import uses_host
from bptt_jax.plans._nodes import Memory, Plan, length, require_plan
from bptt_jax.plans._notation import notation
from bptt_jax.plans._profile import Lowering
from bptt_jax.plans._schedule import Advance, Backward, Event, Free, Record, Save, simulate

LEGEND = "> advance   r record   < backward   | kept carry   : kept residuals"
ON_HOST = "   ! carry on the host   . residuals on the host"
_CARRY: dict[Memory, str] = {"device": "|", "host": "!"}
_RESIDUALS: dict[Memory, str] = {"device": ":", "host": "."}


def render(plan: Plan, *, width: int = 64, rows: int = 24, lowering: Lowering = "nested") -> str:
    """The notation of a plan and its timeline: steps from left to right, time from top to bottom.

    One row is one run of steps. In long sequences several steps share a column; of long schedules only the first and
    the last rows are shown.

    Args:
      plan: the plan; without steps, only its notation is shown.
      width: columns for the steps, at least 1.
      rows: the greatest number of rows of the timeline, at least 2.
      lowering: as for `simulate`.

    Raises:
      TypeError: if `plan` is not a plan, or `width` or `rows` not an integer.
      ValueError: if `width` or `rows` is too small, or the lowering is unknown.

    >>> from bptt_jax import Remat, Repeat, Steps
    >>> print(render(Repeat(3, Remat(Steps(4)))))
    3*[4]
    step 0         11
      1  >>>>>>>>>>>>  advance 0..12
      2  |   |   rrrr  record 8..12
      3  |   |   <<<<  backward 8..12
      4  |   rrrr      record 4..8
      5  |   <<<<      backward 4..8
      6  rrrr          record 0..4
      7  <<<<          backward 0..4
    > advance   r record   < backward   | kept carry   : kept residuals
    >>> print(render(Repeat(3, Remat(Steps(4)), kept="host"), rows=3))
    3@[4]
    step 0         11
      1  >>>>>>>>>>>>  advance 0..12
      2  !   !   rrrr  record 8..12
         ... 5 rows ...
    > advance   r record   < backward   | kept carry   : kept residuals   ! carry on the host   . residuals on the host
    """
    require_plan(plan, "the argument of render")
    width, rows = as_count(width, 1, "width"), as_count(rows, 2, "rows")
    steps = length(plan)
    if steps == 0:
        return f"{notation(plan)}\n(no steps)"
    columns = min(width, steps)
    ends = f"step 0{str(steps - 1).rjust(columns - 1)}" if columns > len(str(steps - 1)) + 1 else f"step 0..{steps - 1}"
    drawn = list(_first_and_last(_timeline(simulate(plan, lowering), steps, columns), rows))
    return "\n".join([notation(plan), ends, *drawn, LEGEND + ON_HOST * uses_host(plan)])


def _timeline(events: Iterator[Event], steps: int, columns: int) -> Iterator[str]:
    """One line per run of steps, with the carries and residuals kept while it runs."""
    kept = [" "] * columns
    carries: dict[int, int] = {}  # column -> kept carries in it

    def column(step: int) -> int:
        return step * columns // steps

    for number, (run, mark, before) in enumerate(_runs(events), start=1):
        for event in before:
            at = column(event.position)
            carries[at] = carries.get(at, 0) + (1 if isinstance(event, Save) else -1)
            kept[at] = _CARRY[event.memory] if carries[at] else " "
        cells = slice(column(run.start), column(run.stop - 1) + 1)
        line = kept.copy()
        line[cells] = mark * (cells.stop - cells.start)
        name = type(run).__name__.lower()
        yield f"{number:3d}  {''.join(line)}  {name} {run.start}..{run.stop}"
        if isinstance(run, Record):
            kept[cells] = _RESIDUALS[run.memory] * (cells.stop - cells.start)
        elif isinstance(run, Backward):
            kept[cells] = " " * (cells.stop - cells.start)


_MARKS = {Advance: ">", Record: "r", Backward: "<"}


def _runs(events: Iterator[Event]) -> Iterator[tuple[Advance | Record | Backward, str, list[Save | Free]]]:
    """Runs of steps, neighbours of one kind joined, each with the carries saved and freed before it."""
    run: Advance | Record | Backward | None = None
    before: list[Save | Free] = []
    later: list[Save | Free] = []
    for event in events:
        match event:
            case Save() | Free():
                later.append(event)
            case Advance() | Record() | Backward():
                # Carries saved between two joined runs are drawn from the next row on.
                if run is not None and _is_continued(run, event):
                    run = dataclasses.replace(run, stop=event.stop)
                    continue
                if run is not None:
                    yield run, _MARKS[type(run)], before
                run, before, later = event, later, []
    if run is not None:
        yield run, _MARKS[type(run)], before


def _is_continued(run: Advance | Record | Backward, event: Advance | Record | Backward) -> bool:
    return event == dataclasses.replace(run, start=event.start, stop=event.stop) and event.start == run.stop


def _first_and_last(lines: Iterator[str], most: int) -> Iterator[str]:
    """All lines if they are at most `most`; else the first two thirds, a count, and the last third."""
    head = most * 2 // 3
    yield from itertools.islice(lines, head)
    last: collections.deque[str] = collections.deque(maxlen=most - head)
    left_out = 0
    for line in lines:
        left_out += len(last) == last.maxlen
        last.append(line)
    if left_out:
        last.popleft()
        yield f"     ... {left_out + 1} rows ..."
    yield from last
