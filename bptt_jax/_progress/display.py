"""Bars of progress on this process's terminal, by rich; lines of text where there is no rich or no terminal.

Reports come from JAX's threads, of several programs at once: each names its bar by label and direction. A report of no
steps, or one going back from the end, begins a new call, so a bar serves a whole training loop. It stays for a
second after the last call has ended. An interrupted program never ends its bar: the bar is left as it stands after a
while, or when Python exits. Everything is written to stderr.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol, TextIO

from bptt_jax._caches import remember

Direction = Literal["forward", "backward"]
Clock = Callable[[], float]

_STAYS_SECONDS = 1.0  # after the last report, where all bars are full
_GIVEN_UP_SECONDS = 60.0  # after the last report, where one is not; or ten times the longest wait before
_REFRESHES_PER_SECOND = 1  # of 3 ms each; ten, as by default, take 3 % of a core
_BETWEEN_LINES_SECONDS = 1.0  # from the second call of a label on: a loop of short calls is to have few lines


@dataclasses.dataclass
class Bar:
    """The steps done in one direction of the last call of a label.

    Attributes:
      label, direction: its name.
      total: the steps of a call.
      done: of these, the greatest number reported.
      calls: the calls so far.
      waits: whether a new call has begun in the other direction, so this one is to come.
    """

    label: str
    direction: Direction
    total: int
    done: int = 0
    calls: int = 0
    waits: bool = True

    @property
    def name(self) -> str:
        return f"{self.label} {self.direction}"

    @property
    def is_full(self) -> bool:
        return self.done >= self.total

    def begins_anew(self, total: int, done: int) -> bool:
        """Whether a report is the first of another call."""
        goes_back = (done == 0 and self.done > 0) or (self.is_full and done < self.done)
        return self.waits or total != self.total or goes_back


class Drawing(Protocol):
    """A place where bars are shown."""

    def draw(self, bar: Bar, is_new: bool) -> None:
        """Shows a bar after a report; `is_new` for the first one of a call."""


class Bars:
    """All bars of a process, safe for several threads."""

    def __init__(self, drawing: Callable[[], Drawing]):
        self._drawing = drawing  # called at each report, because stderr may be another one by then
        self._bars: dict[tuple[str, Direction], Bar] = {}
        self._lock = threading.Lock()

    def report(self, label: str, direction: Direction, total: int, done: int) -> None:
        """Takes a report of `done` steps out of `total`."""
        # A lost terminal must not end a training run: JAX raises errors of callbacks in the program.
        with self._lock, contextlib.suppress(OSError, ValueError):
            bar = self._bars.setdefault((label, direction), Bar(label, direction, total))
            is_new = bar.begins_anew(total, done)
            if is_new:
                bar.total, bar.done, bar.calls, bar.waits = total, 0, bar.calls + 1, False
            bar.done = max(bar.done, done)
            drawing = self._drawing()
            drawing.draw(bar, is_new)
            other = self._bars.get((label, "backward"))
            if is_new and direction == "forward" and other is not None and other.is_full:
                other.done, other.waits = 0, True
                drawing.draw(other, False)


class Lines:
    """Bars as lines of text: one for each tenth of the steps, and from the second call on at most one each second."""

    def __init__(self, file: TextIO | None = None, clock: Clock = time.monotonic):
        self._file = file
        self._clock = clock
        self._shown: dict[str, tuple[int, float]] = {}  # by name: the tenth of the last line, and its time

    def draw(self, bar: Bar, is_new: bool) -> None:
        tenth, now = 10 * bar.done // max(bar.total, 1), self._clock()
        last, then = self._shown.get(bar.name, (0, -_BETWEEN_LINES_SECONDS))
        if is_new or tenth < last:
            last = 0
        is_due = tenth > last and (bar.calls == 1 or now - then >= _BETWEEN_LINES_SECONDS)
        self._shown[bar.name] = (tenth, now) if is_due else (last, then)
        if is_due:
            print(f"{bar.name}: {10 * tenth} % of {bar.total:,} steps", file=self._file or sys.stderr, flush=True)


class RichBars:
    """Bars drawn by rich, from the first report until they are full or given up; then others may begin.

    Args:
      console: of rich.
      clock: the time in seconds.
    """

    def __init__(self, console: Any, clock: Clock = time.monotonic):
        self._console = console
        self._clock = clock
        self._lock = threading.RLock()
        self._live: Any = None
        self._tasks: dict[str, Any] = {}
        self._last, self._longest = clock(), 0.0

    def draw(self, bar: Bar, is_new: bool) -> None:
        with self._lock:
            now = self._clock()
            if self._live is None:
                self._start()
            else:
                self._longest = max(self._longest, now - self._last)
            self._last = now
            if bar.name not in self._tasks:
                self._tasks[bar.name] = self._live.add_task(bar.name, total=bar.total, call="", waits=False)
            task, call = self._tasks[bar.name], f"call {bar.calls:,}" if bar.calls > 1 else ""
            if is_new:
                self._live.reset(task, total=bar.total)
            self._live.update(task, completed=bar.done, call=call, waits=bar.waits)

    def is_over(self) -> bool:
        """Whether the bars have been full, or without a report, for long enough."""
        waited = self._clock() - self._last
        if all(task.finished or task.fields["waits"] for task in self._live.tasks):
            return waited >= _STAYS_SECONDS
        return waited >= max(_GIVEN_UP_SECONDS, 10 * self._longest)

    def stop(self) -> None:
        """Leaves the bars as they stand."""
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live, self._tasks = None, {}

    def _start(self) -> None:
        from rich import progress

        class Progress(progress.Progress):
            def refresh(self) -> None:
                """Draws nothing: rich's thread does, and a report, for which a program waits, would take 3 ms more."""

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.completed:,.0f} of {task.total:,.0f} steps"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[call]}"),
        )
        # Where stdout is a file, lines printed meanwhile stay in it.
        own: dict[str, Any] = {"redirect_stdout": sys.stdout.isatty(), "refresh_per_second": _REFRESHES_PER_SECOND}
        self._live, self._longest = Progress(*columns, console=self._console, **own), 0.0
        self._live.start()
        threading.Thread(target=self._watch, args=(self._live,), name="bptt_jax progress", daemon=True).start()

    def _watch(self, live: Any) -> None:
        while True:
            time.sleep(_STAYS_SECONDS / 4)
            with self._lock:
                if self._live is not live:
                    return
                if self.is_over():
                    self.stop()
                    return


@remember(1)
def _rich_bars() -> RichBars | None:
    """Bars by rich on the terminal; None without rich or without a terminal."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=True)
    if not console.is_terminal or console.is_jupyter:
        return None
    bars = RichBars(console)
    atexit.register(bars.stop)
    return bars


_lines = Lines()
_bars = Bars(lambda: _rich_bars() or _lines)


def report(label: str, direction: Direction, total: int, done: int) -> None:
    """Shows `done` steps out of `total`, of one direction of the call with this label."""
    _bars.report(label, direction, total, done)
