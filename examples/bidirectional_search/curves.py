"""Curves of training runs: what was logged, against updates."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.bidirectional_search.training import Log

METRICS = "metrics.jsonl"


def plot(directories: Sequence[Path], path: Path) -> None:
    """Held-out success of each run on the left, where it was measured; -log p of a decision on the right."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    success, nats = figure.subplots(1, 2)
    for directory in directories:
        if not (directory / METRICS).is_file():
            raise ValueError(f"{directory} holds no {METRICS}; make it with: train ... --directory {directory}")
        _add(directory, success, nats)
    success.set(xlabel="updates", ylabel="held-out tasks solved", ylim=(-0.02, 1.02))
    nats.set(xlabel="updates", ylabel="-log p of a decision, nats", ylim=(0, None))
    for axes in (success, nats):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _add(directory: Path, success: Axes, nats: Axes) -> None:
    before, ends, records = 0, dict[str, int](), Log.read(directory / METRICS)
    stages = dict.fromkeys(record["stage"] for record in records)
    supervised: list[tuple[int, float]] = []
    held_out: dict[str, list[tuple[int, float]]] = {}
    for stage in stages:
        of_stage = [record for record in records if record["stage"] == stage and "update" in record]
        supervised += [(before + record["update"], record["nats"]) for record in of_stage]
        for record in of_stage:
            for name in record:
                if name.startswith("held out "):
                    held_out.setdefault(name.removeprefix("held out "), []).append(
                        (before + record["update"] + 1, record[name])
                    )
        before += max((record["update"] + 1 for record in of_stage), default=0)
        ends[stage] = before
    for record in records:
        if record["stage"] == "held out" and "split" in record:
            points = held_out.setdefault(record["split"], [])
            points += [(end, record[stage]["success"]) for stage, end in ends.items() if stage in record]
    for name, points in held_out.items():
        label = directory.name if len(held_out) == 1 else f"{directory.name}, {name}"
        success.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
    if supervised:
        nats.plot(*zip(*supervised, strict=True), linewidth=0.9, label=directory.name)
