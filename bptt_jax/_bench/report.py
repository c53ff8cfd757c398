"""Comparisons for people: a table for the terminal or for Markdown, JSON, and a plot of bytes against time."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from bptt_jax._bench.comparison import Comparison, Row
from bptt_jax._jaxprs.types import Leaf
from bptt_jax.errors import format_bytes

_SHARE = "of lax.scan"
_HEAD = ("method", "temporaries", _SHARE, "time", _SHARE, "of products", "steps", "launches", "compile", "plan")


@dataclasses.dataclass(frozen=True)
class _Series:
    """Methods drawn in one colour: those whose names match a pattern; `marker` is Matplotlib's format, "-o" a line."""

    pattern: str
    label: str
    colour: str
    marker: str = "o"


_SERIES = (
    _Series(r"bptt_jax, (?!.*vmap)", "bptt_jax over budgets", "#d95f02", "-o"),
    _Series(r"bptt_jax, .*vmap", "bptt_jax over budgets, vmap", "#d95f02", "--s"),
    _Series(r"Equinox", "Equinox over slots", "#7570b3"),
    _Series(r"nest", "nests by hand", "#1b9e77"),
    _Series(r"scan\(", "scan(checkpoint(step))", "#666666"),
    _Series(r"lax\.scan$", "lax.scan", "#000000"),
    _Series(r"lax\.scan, unroll", "lax.scan, unrolled", "#000000", "^"),
    _Series(r"lax\.scan, vmap", "lax.scan, vmap", "#000000", "s"),
)


def table(comparison: Comparison, *, markdown: bool = False) -> Table:
    """Table with a line for each method: bytes, times, and evaluations of the step."""
    found = Table(
        *_HEAD[:1],
        title=None if markdown else title(comparison),
        caption=None if markdown else caption(comparison),
        box=box.MARKDOWN if markdown else box.SIMPLE_HEAD,
    )
    # Launches have a column only where they are counted.
    shown = [name != "launches" or bool(comparison.launches_device) for name in _HEAD]
    for name in list(itertools.compress(_HEAD, shown))[1:-1]:
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column(_HEAD[-1])
    for row in comparison.rows:
        style = "bold" if row.method.startswith("bptt_jax") else None
        cells = list(itertools.compress(_cells(row, comparison), shown))
        plan = f"`{row.plan}`" if markdown and row.plan else cells[-1]  # as code, because its stars are not Markdown's
        found.add_row(*cells[:-1], plan, style=style)
    return found


def title(comparison: Comparison) -> str:
    size = f"batch {comparison.batch}, width {comparison.width}, {comparison.length:,} steps"
    return f"gradient of {comparison.cell}: {size}; {comparison.device}, JAX {comparison.jax_version}"


def caption(comparison: Comparison) -> str:
    """Legend of the columns."""
    products = ""
    if comparison.product_flops:
        products = (
            f" of products: time over that of its {comparison.product_flops / 1e9:.3g} GFLOP of matrix products"
            f" at the {comparison.product_rate / 1e9:.3g} GFLOP/s that this device reaches;"
        )
    return (
        "time: medians of runs interleaved with lax.scan's;"
        f"{products} steps: evaluations of the step;{_launches(comparison)} compile: + checks of the plan"
        f"{'' if importlib.util.find_spec('equinox') else '; Equinox is not installed'}"
    )


def _launches(comparison: Comparison) -> str:
    """Legend of the launches, if they are counted."""
    device = comparison.launches_device
    if device:
        elsewhere = "" if device == comparison.device else f", of programs planned and compiled for an {device}"
        return f" launches: kernels and copies that the GPU is sent{elsewhere}, where all loops have known lengths;"
    return ""


def _cells(row: Row, comparison: Comparison) -> tuple[str, ...]:
    if row.error:
        return (row.method, *["–"] * (len(_HEAD) - 2), row.error)
    whole = comparison.rows[0].temp_bytes  # 0 if it does not compile
    share = f"{row.temp_bytes / whole:.1%}" if whole else "–"
    ratio = f"{row.time_ratio:.2f}" if math.isfinite(row.time_ratio) else "–"
    floor = "–" if row.floor_ratio is None else f"{row.floor_ratio:.2f}"
    steps, compiling = f"{row.forward_steps:,}", f"{row.compile_seconds:.2f} s"
    if row.check_seconds:
        compiling += f" + {row.check_seconds:.2f}"
    time = f"{_three_digits(row.seconds * 1e3)} ms" if row.seconds < 1 else f"{_three_digits(row.seconds)} s"
    return (
        row.method,
        format_bytes(row.temp_bytes),
        share,
        time,
        ratio,
        floor,
        steps,
        "–" if row.launches is None else f"{row.launches:,}",
        compiling,
        row.plan,
    )


def _three_digits(value: float) -> str:
    """A number in three digits.

    >>> _three_digits(816.4), _three_digits(1.0), _three_digits(0.62)
    ('816', '1.00', '0.620')
    """
    return f"{value:#.3g}".rstrip(".")


def write_json(comparisons: Sequence[Comparison], path: Path) -> None:
    """Writes all figures as JSON, with null for the times of methods without a program."""

    def finite(value: Leaf) -> Any:
        if isinstance(value, dict):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    found = [finite(dataclasses.asdict(comparison)) for comparison in comparisons]
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def plot(comparison: Comparison, path: Path | None = None, axes: Any = None) -> Any:
    """Plot of temporaries against time, both relative to `lax.scan`'s: with matplotlib, on given axes or a new figure.

    Returns:
      the axes.
    """
    from matplotlib.figure import Figure  # here, because tables need no matplotlib

    if axes is None:
        axes = Figure(figsize=(8, 5), layout="constrained").add_subplot()
    if not comparison.has_baseline:
        raise ValueError(f"lax.scan does not run here, so there is nothing to compare with: {comparison.rows[0].error}")
    rows = [row for row in comparison.rows if not row.error]
    whole = max(comparison.rows[0].temp_bytes, 1)
    for series in _SERIES:
        points = sorted(
            (row.temp_bytes / whole, row.time_ratio) for row in rows if re.match(series.pattern, row.method)
        )
        if points:
            axes.plot(*zip(*points, strict=True), series.marker, color=series.colour, label=series.label)
    axes.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set(xscale="log", xlabel="temporaries, of lax.scan's", ylabel="time, of lax.scan's", title=title(comparison))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3%}".rstrip("0%").rstrip(".") + "%")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    if path is not None:
        axes.figure.savefig(path, dpi=150)
    return axes
