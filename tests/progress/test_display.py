"""Bars as they are drawn: by rich, and as lines of text."""

import io
import os
import subprocess
import sys
import threading

import pytest
from rich.console import Console

from bptt_jax._progress import display
from bptt_jax._progress.display import Bars, Lines, RichBars


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Drawn:
    """Bars, drawn as a list of (name, done, calls)."""

    def __init__(self):
        self.list = []

    def draw(self, bar, is_new):
        self.list.append((bar.name, bar.done, bar.calls))


def lines():
    clock, file = Clock(), io.StringIO()
    drawing = Lines(file, clock)
    return Bars(lambda: drawing), clock, file


def rich_bars():
    clock, console = Clock(), Console(record=True, file=io.StringIO(), force_terminal=True, width=100)
    drawing = RichBars(console, clock)
    return Bars(lambda: drawing), drawing, console, clock


def call(bars, label="training", total=100, stop=101, directions=("forward", "backward")):
    for direction in directions:
        for done in range(0, min(total + 1, stop), 2):
            bars.report(label, direction, total, done)


def test_a_line_for_each_tenth():
    bars, _, file = lines()
    call(bars, total=1_000_000, stop=0)
    for done in range(0, 1_000_001, 20_000):
        bars.report("training", "forward", 1_000_000, done)
    found = file.getvalue().splitlines()
    assert found == [f"training forward: {10 * i} % of 1,000,000 steps" for i in range(1, 11)]


def test_a_loop_of_short_calls_has_few_lines():
    bars, clock, file = lines()
    for i in range(1000):
        clock.now = i / 100  # ten seconds
        call(bars, total=10)
    found = file.getvalue().splitlines()
    assert found[:10] == [f"training forward: {10 * i} % of 10 steps" for i in (2, 4, 6, 8, 10)] + [
        f"training backward: {10 * i} % of 10 steps" for i in (2, 4, 6, 8, 10)
    ]
    assert 10 < len(found) <= 10 + 2 * 10


def test_a_new_call_begins_at_no_steps_or_where_a_full_bar_goes_back():
    drawn = Drawn()
    bars = Bars(lambda: drawn)
    for done in (0, 4, 2, 8):  # in between a late report: steps once done stay done
        bars.report("a", "forward", 10, done)
    assert [one[1:] for one in drawn.list] == [(0, 1), (4, 1), (4, 1), (8, 1)]
    drawn.list.clear()
    for total, done in [(10, 0), (10, 10), (10, 3), (20, 3)]:  # after an interruption; a full bar; another length
        bars.report("a", "forward", total, done)
    assert [one[1:] for one in drawn.list] == [(0, 2), (10, 2), (3, 3), (3, 4)]


def test_a_forward_pass_empties_the_bar_of_the_backward_pass():
    drawn = Drawn()
    bars = Bars(lambda: drawn)
    call(bars, total=2)
    call(bars, total=2)
    assert drawn.list == [
        *[("training forward", 0, 1), ("training forward", 2, 1), ("training backward", 0, 1)],
        *[("training backward", 2, 1), ("training forward", 0, 2), ("training backward", 0, 1)],
        *[("training forward", 2, 2), ("training backward", 0, 2), ("training backward", 2, 2)],
    ]


def test_two_labels_have_bars_of_their_own():
    drawn = Drawn()
    bars = Bars(lambda: drawn)
    for done in (0, 1, 2):
        for label in ("lower", "upper"):
            bars.report(label, "forward", 2, done)
    assert drawn.list == [(f"{label} forward", done, 1) for done in (0, 1, 2) for label in ("lower", "upper")]


def test_rich_draws_two_bars():
    bars, drawing, console, _ = rich_bars()
    call(bars)
    drawing.stop()
    text = console.export_text()
    for name in ("training forward", "training backward"):
        (line,) = [line for line in text.splitlines() if line.startswith(name)][-1:]
        assert "━" * 20 in line
        assert "100 of 100 steps" in line
    assert "call" not in text


def test_lines_printed_meanwhile_stay_in_a_file(capsys):
    bars, drawing, console, _ = rich_bars()
    call(bars)
    print("loss 0.5")
    drawing.stop()
    assert capsys.readouterr().out == "loss 0.5\n"
    assert "loss" not in console.export_text()


def test_rich_counts_calls_in_one_pair_of_bars():
    bars, drawing, console, _ = rich_bars()
    for _ in range(3):
        call(bars)
    assert len(drawing._live.tasks) == 2
    drawing.stop()
    assert "call 3" in console.export_text()


def test_rich_ends_a_second_after_the_last_call():
    bars, drawing, _, clock = rich_bars()
    call(bars)
    assert not drawing.is_over()
    clock.now = 1.5
    assert drawing.is_over()
    call(bars, directions=["forward"])  # the backward bar waits
    clock.now = 3.0
    assert drawing.is_over()
    drawing.stop()
    call(bars)  # begins anew, after its end
    assert not drawing.is_over()
    drawing.stop()
    drawing.stop()


def test_rich_gives_up_a_call_that_is_interrupted():
    bars, drawing, console, clock = rich_bars()
    call(bars, stop=41, directions=["forward"])
    clock.now = 50.0
    assert not drawing.is_over()
    bars.report("training", "forward", 100, 42)
    clock.now = 400.0  # the longest wait so far was 50
    assert not drawing.is_over()
    clock.now = 600.0
    assert drawing.is_over()
    drawing.stop()
    assert "42 of 100" in console.export_text()


def test_the_watch_ends_full_bars():
    """With a real clock: within two seconds or so, and its thread with them."""
    console = Console(record=True, file=io.StringIO(), force_terminal=True)
    drawing = RichBars(console)
    threads = threading.active_count()
    call(Bars(lambda: drawing))
    for thread in threading.enumerate():
        if thread.name.startswith("bptt_jax"):
            thread.join(10)
    assert drawing._live is None
    assert threading.active_count() <= threads


def test_a_report_does_not_wait_for_rich_to_draw(monkeypatch):
    """After the first one of all, also where it is the first of a bar or of a call: rich's thread draws."""
    monkeypatch.setattr(display, "_REFRESHES_PER_SECOND", 0.001)
    bars, drawing, console, _ = rich_bars()
    bars.report("training", "forward", 100, 0)
    before = console.file.getvalue()
    call(bars)
    call(bars)
    assert console.file.getvalue() == before
    drawing.stop()
    assert "call 2" in console.file.getvalue()


def test_reports_from_many_threads():
    bars, drawing, _, _ = rich_bars()
    threads = [
        threading.Thread(target=lambda i=i: [bars.report("a", "forward", 1000, j) for j in range(i, 1000, 8)])
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (task,) = drawing._live.tasks
    assert (task.completed, task.fields["call"]) == (999, "")
    drawing.stop()


def test_lines_without_rich_and_without_a_terminal(monkeypatch, capsys):
    for missing in (False, True):
        display._rich_bars.cache_clear()
        if missing:
            monkeypatch.setitem(sys.modules, "rich.console", None)
        assert display._rich_bars() is None
        display.report(f"lines {missing}", "forward", 2, 1)
        assert capsys.readouterr().err == f"lines {missing} forward: 50 % of 2 steps\n"
    display._rich_bars.cache_clear()


def test_a_terminal_that_is_gone():
    bars, _, file = lines()
    file.close()
    call(bars)


IN_A_TERMINAL = """
import jax, jax.numpy as jnp, bptt_jax
step = lambda carry, x: (jnp.tanh(carry + x), None)
scan = lambda init: bptt_jax.scan(step, init, jnp.ones((100, 3)), progress="training")[0].sum()
print(jax.jit(jax.grad(scan))(jnp.ones(3)).shape)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_on_a_terminal():
    """In a process of its own, that exits right after the call: the cursor is back, and the bars stay."""
    import pty

    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", IN_A_TERMINAL], stderr=theirs, stdout=theirs, env=environment)
    os.close(theirs)
    text = b""
    while True:
        try:
            text += os.read(ours, 4096)
        except OSError:  # the end of a pseudo-terminal
            break
    os.close(ours)
    assert process.wait() == 0
    shown = text.decode()
    assert shown.count("100 of 100") >= 2
    assert "training forward" in shown
    assert "training backward" in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0
