"""A plan as a picture: steps from left to right, time from top to bottom.

A line falling to the right evaluates steps, a line falling to the left is their backward; its colour tells a first
evaluation from a repeated one. Grey areas are kept residuals, each step's from its recording to its backward; thin
vertical lines are kept carries. Both are pink on the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bptt_jax.errors import as_count
from bptt_jax.plans._memories import uses_host
from bptt_jax.plans._nodes import Plan, length, require_plan
from bptt_jax.plans._notation import notation
from bptt_jax.plans._profile import StepTimes
from bptt_jax.plans._schedule import Advance, Backward, Event, Free, Record, Restore, Save, simulate

_MOST_EVENTS = 20_000
_LEAST_WIDTH = 600  # pixels, for the legend
_COLOURS = {
    "first evaluation": "#1f77b4",
    "recomputation": "#d95f02",
    "recording": "#1b9e77",
    "backward": "#7570b3",
    "kept carry": "#444444",
    "kept residuals": "#d9d9d9",
    "carry on the host": "#e7298a",
    "residuals on the host": "#f6d5e5",
}
_ON_HOST = ("carry on the host", "residuals on the host")


@dataclasses.dataclass(frozen=True)
class Line:
    """A straight line from (step, time) to (step, time), and the kind of event it stands for."""

    kind: str
    start: tuple[float, float]
    stop: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Area:
    """Kept residuals: four corners, each (step, time), and the kind."""

    corners: tuple[tuple[float, float], ...]
    kind: str


def svg(plan: Plan, *, times: StepTimes | None = None, width: int = 720) -> str:
    """The picture of a plan as an SVG document.

    Args:
      plan: a plan of at least one step and at most 20,000 events.
      times: relative times of the parts of a step; by default a backward takes 2 forwards.
      width: of the picture, in pixels, at least 600.

    >>> from bptt_jax import Remat, Repeat, Steps
    >>> svg(Repeat(4, Remat(Steps(8)))).count("<line")
    16

    Raises:
      TypeError: if `plan` is not a plan, or `width` not an int.
      ValueError: for a plan without steps, one with too many events to draw, or a width without room for its legend.
    """
    width = as_count(width, _LEAST_WIDTH, "width")
    lines, areas, end = _shapes(plan, times or StepTimes())
    height, margin, legend = width * 3 // 5, 40, 90
    x_scale, y_scale = (width - 2 * margin) / length(plan), (height - margin - legend) / end

    def at(point: tuple[float, float]) -> tuple[str, str]:
        return f"{margin + point[0] * x_scale:.2f}", f"{margin + point[1] * y_scale:.2f}"

    body = [f'<text x="{margin}" y="24">{notation(plan)}</text>']
    for area in areas:
        corners = " ".join(",".join(at(corner)) for corner in area.corners)
        body.append(f'<polygon points="{corners}" fill="{_COLOURS[area.kind]}"/>')
    for line in lines:
        (x1, y1), (x2, y2) = at(line.start), at(line.stop)
        stroke = f'stroke="{_COLOURS[line.kind]}" stroke-width="{1 if "carry" in line.kind else 2.5}"'
        body.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" {stroke}/>')
    body.extend(_legend(margin, height - legend + 40, uses_host(plan)))
    style = 'font-family="sans-serif" font-size="12"'
    frame = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}" {style}'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {frame}>', '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([*head, *body, "</svg>", ""])


def plot(plan: Plan, path: str | Path | None = None, *, axes: Any = None, times: StepTimes | None = None) -> Any:
    """The picture of a plan with matplotlib: on the given axes, or on a new figure; saved if there is a path.

    Args:
      plan: a plan of at least one step and at most 20,000 events.
      path: where to save the figure; the suffix gives the format.
      axes: matplotlib axes to draw on.
      times: relative times of the parts of a step; by default a backward takes 2 forwards.

    Returns:
      the axes.

    >>> from bptt_jax import Remat, Repeat, Steps
    >>> plot(Repeat(4, Remat(Steps(8)))).get_title()
    '4*[8]'

    Raises:
      ImportError: without matplotlib.
      TypeError: if `plan` is not a plan.
      ValueError: for a plan without steps, or one with too many events to draw; for a suffix unknown to matplotlib.
      OSError: if the file cannot be written.
    """
    # Imported here, because plans are also made where matplotlib is not installed.
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Polygon
    except ImportError as error:
        message = "bptt_jax.plans.plot needs matplotlib; install it with: python -m pip install 'bptt_jax[cli]'"
        raise ImportError(message) from error

    lines, areas, end = _shapes(plan, times or StepTimes())
    if axes is None:
        axes = Figure(figsize=(9, 5.4), layout="constrained").add_subplot()
    for area in areas:
        axes.add_patch(Polygon(area.corners, facecolor=_COLOURS[area.kind], label=area.kind))
    for line in lines:
        thin = "carry" in line.kind
        x, y = zip(line.start, line.stop, strict=True)
        axes.plot(x, y, color=_COLOURS[line.kind], linewidth=0.8 if thin else 2, label=line.kind)
    axes.set(
        xlim=(0, length(plan)), ylim=(end, 0), xlabel="step", ylabel="time, in forward steps", title=notation(plan)
    )
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    if path is not None:
        axes.figure.savefig(path, dpi=150)
    return axes


def _legend(left: int, top: int, with_host: bool) -> Iterator[str]:
    shown = [kind for kind in _COLOURS if with_host or kind not in _ON_HOST]
    columns = -(-len(shown) // 2)
    for i, kind in enumerate(shown):
        x, y, colour = left + 600 // columns * (i % columns), top + 24 * (i // columns), _COLOURS[kind]
        yield f'<rect x="{x}" y="{y - 6}" width="24" height="6" fill="{colour}"/>'
        yield f'<text x="{x + 32}" y="{y}">{kind}</text>'


def _shapes(plan: Plan, times: StepTimes) -> tuple[list[Line], list[Area], float]:
    """The lines and areas of the picture, and the time at its end."""
    require_plan(plan, "the plan to draw")
    if length(plan) == 0:
        raise ValueError("a plan without steps has no picture.")
    drawing = _Drawing(times)
    for count, event in enumerate(simulate(plan)):
        if count == _MOST_EVENTS:
            raise ValueError(
                f"the plan of {length(plan)} steps has more than {_MOST_EVENTS} events; draw a shorter one."
            )
        drawing.add(event)
    return drawing.lines, drawing.areas, drawing.time


class _Drawing:
    def __init__(self, times: StepTimes):
        self.lines: list[Line] = []
        self.areas: list[Area] = []
        self.time = 0.0
        self._times = times
        self._reached = 0  # steps before this one have been evaluated
        self._saved: dict[int, list[float]] = {}
        self._recorded: dict[int, tuple[float, float]] = {}

    def add(self, event: Event) -> None:
        match event:
            case Save(position):
                self._saved.setdefault(position, []).append(self.time)
            case Free(position, memory):
                since = self._saved[position].pop()
                kind = "kept carry" if memory == "device" else "carry on the host"
                self.lines.append(Line(kind, (position, since), (position, self.time)))
            case Advance(start, stop):
                self._forward("recomputation" if start < self._reached else "first evaluation", start, stop)
            case Record(start, stop):
                since = self.time
                self._forward("recording", start, stop)
                self._recorded[start] = (since, self.time)
            case Backward(start, stop, memory):
                since = self.time
                self.time += (stop - start) * self._times.backward
                self.lines.append(Line("backward", (stop, since), (start, self.time)))
                first, last = self._recorded.pop(start)
                kind = "kept residuals" if memory == "device" else "residuals on the host"
                self.areas.append(Area(((start, first), (stop, last), (stop, since), (start, self.time)), kind))
            case Restore():
                pass  # takes no time

    def _forward(self, kind: str, start: int, stop: int) -> None:
        since = self.time
        self.time += (stop - start) * (self._times.recording if kind == "recording" else self._times.forward)
        self.lines.append(Line(kind, (start, since), (stop, self.time)))
        self._reached = max(self._reached, stop)
