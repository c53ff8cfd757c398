"""`python -m bptt_jax`: plans from numbers, and this library beside others on the user's own device.

It only reads arguments and prints: plans come from `make_plan`, measurements from `_bench`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bptt_jax._bench.cells import CELLS, default_size
from bptt_jax._budget import Budget, budget_to_bytes
from bptt_jax._cli.arguments import Output, budget_of, budget_or_auto, pair, seconds_of, size
from bptt_jax._cost.cost import cost
from bptt_jax._cost.time import time_of
from bptt_jax.errors import format_bytes
from bptt_jax.planners import make_plan
from bptt_jax.plans._nodes import Plan
from bptt_jax.plans._picture import plot, svg
from bptt_jax.plans._profile import StepProfile
from bptt_jax.plans._timeline import render

_PLAN_EXAMPLES = """
Examples:

\b
  python -m bptt_jax plan --length 1000 --carry 32KiB --residual 190KiB --budget 10MiB
  python -m bptt_jax plan --length 32 --carry 1KiB --residual 4KiB --budget 30% --png plan.png
"""
_BENCH_EXAMPLES = """
Examples:

\b
  python -m bptt_jax bench
  python -m bptt_jax bench --cell flax-gru --size 64x128 --budget 2% --budget 5% --plot gru.png
  python -m bptt_jax bench --cell wave --length 4000 --json wave.json
  JAX_PLATFORMS=cpu python -m bptt_jax bench --launches
"""


_POSITIVE = click.IntRange(min=1)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="bptt_jax")
def main() -> None:
    """jax.lax.scan with a memory budget: plans, and measurements on your own device."""


@main.command(epilog=_PLAN_EXAMPLES)
@click.option("--length", type=_POSITIVE, required=True, help="Steps of the scan.")
@click.option("--carry", type=size, metavar="BYTES", required=True, help="Bytes of one carry.")
@click.option(
    "--residual", type=size, metavar="BYTES", required=True, help="Bytes that one step keeps for its backward."
)
@click.option(
    "--budget", type=budget_of, metavar="BUDGET", required=True, help="Bytes, 64MiB, 5% of keeping everything, or none."
)
@click.option(
    "--host-budget",
    type=budget_of,
    metavar="BUDGET",
    default="none",
    help="In the host's memory, for carries.",
)
@click.option("--x", type=size, metavar="BYTES", default="0", help="Bytes of one step's input.")
@click.option("--y", type=size, metavar="BYTES", default="0", help="Bytes of one step's output.")
@click.option("--param", type=size, metavar="BYTES", default="0", help="Bytes of the parameters.")
@click.option("--svg", "svg_path", type=Output(".svg"), help="Where to draw it as SVG.")
@click.option("--png", "png_path", type=Output(".png"), help="Where to draw it as PNG.")
def plan(
    length: int,
    carry: int,
    residual: int,
    budget: Budget,
    host_budget: Budget,
    x: int,
    y: int,
    param: int,
    svg_path: Path | None,
    png_path: Path | None,
) -> None:
    """The plan for a scan given by numbers.

    It says which arrays to keep and which to compute again. Prints the plan for a nest of checkpoints, its cost, and
    its timeline. Exits with 1 if no plan fits. A scan runs as a sweep where it can, in fewer bytes than a nest: ask
    bptt_jax.explain about a step of your own.
    """
    profile = StepProfile(carry, residual, x_bytes=x, y_bytes=y, param_bytes=param)
    try:
        found = make_plan(profile, length, budget, host_budget)
    except ValueError as error:  # no plan fits, or there is a budget for the host alone
        raise click.ClickException(str(error)) from error
    Console().print(_plan_table(found, profile, length, budget))
    click.echo(render(found))
    try:
        if svg_path is not None:
            svg_path.write_text(svg(found))
        if png_path is not None:
            plot(found, png_path)
    except (OSError, ValueError, ImportError) as error:
        raise click.ClickException(f"no picture: {error}") from error


def _plan_table(found: Plan, profile: StepProfile, length: int, budget: Budget) -> Table:
    taken, everything = cost(found, profile), profile.store_all_bytes(length)
    limit = budget_to_bytes(budget, everything)
    times = profile.times
    overhead = time_of(found, profile) / (length * (times.recording + times.backward))
    rows = Table.grid(padding=(0, 2))
    rows.add_row("budget", "none" if limit is None else f"{format_bytes(limit)}  ({limit:,} bytes)")
    rows.add_row("the plan takes", f"{format_bytes(taken.peak_bytes)}  ({taken.peak_bytes:,} bytes)")
    if taken.host_bytes:
        rows.add_row("on the host", f"{format_bytes(taken.host_bytes)}  ({taken.host_bytes:,} bytes)")
    rows.add_row("keeping everything", f"{format_bytes(everything)}  ({everything:,} bytes)")
    rows.add_row("forward steps", f"{taken.forward_steps:,} for {length:,}")
    rows.add_row("predicted time", f"{overhead:.2f} of keeping everything")
    rows.add_row("step loops", f"{taken.program_size}")
    return rows


@main.command(epilog=_BENCH_EXAMPLES)
@click.option(
    "--cell",
    "cells",
    type=click.Choice(list(CELLS)),
    multiple=True,
    default=["lstm"],
    show_default=True,
    help="What is scanned; may be given several times.",
)
@click.option(
    "--size",
    "sizes",
    type=pair,
    metavar="BATCHxWIDTH",
    multiple=True,
    help="Batch x width; may be given several times.  [default: 16x256; waves and convolutions smaller]",
)
@click.option("--length", type=_POSITIVE, default=1000, show_default=True, help="Steps.")
@click.option(
    "--budget",
    "budgets",
    type=budget_or_auto,
    metavar="BUDGET",
    multiple=True,
    default=["2%", "5%", "20%", "none"],
    show_default=True,
    help="For this library; may be given several times. One that no plan fits gets a row that says so.",
)
@click.option(
    "--seconds",
    type=seconds_of,
    metavar="SECONDS",
    default="5",
    show_default=True,
    help="To time each method for, about; at least 5 rounds.",
)
@click.option(
    "--vmap",
    is_flag=True,
    help="Measure jax.lax.scan and this library on one example mapped over the batch, too, with the same budgets.",
)
@click.option(
    "--launches/--no-launches",
    default=None,
    help="Count the kernels and copies that a GPU is sent. Without a GPU each program is compiled once more, for an "
    "H100, by JAX's CUDA plugins.  [default: on a GPU only]",
)
@click.option(
    "--json",
    "json_path",
    type=Output(),
    help="Where to write all figures, after each cell and size.",
)
@click.option(
    "--plot",
    "plot_path",
    type=Output(),
    help="Where to draw bytes against time; of several cells or sizes one file each.",
)
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
def bench(
    cells: tuple[str, ...],
    sizes: tuple[tuple[int, int], ...],
    length: int,
    budgets: tuple[Budget, ...],
    seconds: float,
    vmap: bool,
    launches: bool | None,
    json_path: Path | None,
    plot_path: Path | None,
    markdown: bool,
) -> None:
    """This library beside others, on this device.

    Compiles and runs the gradient of a scan by jax.lax.scan, also unrolled; with a checkpoint at each step, and as the
    best nests by hand; by Equinox's checkpointed scan, if it is installed; and by this library. Nothing else should be
    running. On a GPU the kernel launches of each program are counted, because small steps are bound by them.
    """
    # Here, because `plan` does without them.
    from bptt_jax._bench import report
    from bptt_jax._bench.comparison import measure

    options = {"vmap": vmap, "launches_device": _launches_device(launches)}
    places = [(cell, *size) for cell in cells for size in sizes or [default_size(cell)]]
    _check_picture(plot_path)
    comparisons = []
    # Wide enough not to wrap Markdown, nor output for another program.
    console = Console(width=400 if markdown else None if sys.stdout.isatty() else 180)
    for place in places:
        comparisons.append(_with_progress(measure, place, length, budgets, seconds, **options))
        try:
            if json_path is not None:
                report.write_json(comparisons, json_path)
            if markdown:
                click.echo(f"{report.title(comparisons[-1])}\n")
            console.print(report.table(comparisons[-1], markdown=markdown))
            if markdown:
                click.echo(f"\n{report.caption(comparisons[-1])}\n")
            if plot_path is not None and not comparisons[-1].has_baseline:
                click.echo("not drawn: lax.scan does not run here, so there is nothing to compare with", err=True)
            elif plot_path is not None:
                several = plot_path.with_stem("-".join([plot_path.stem, *map(str, place)]))
                report.plot(comparisons[-1], several if len(places) > 1 else plot_path)
        except (OSError, ValueError, ImportError) as error:
            raise click.ClickException(f"not written: {error}") from error


def _check_picture(path: Path | None) -> None:
    if path is not None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise click.ClickException("--plot needs matplotlib; install bptt_jax[cli].") from error
        known = Figure().canvas.get_supported_filetypes()
        if path.suffix[1:].lower() not in known:
            text = f"{path.name} is no picture that can be drawn; use one of .{', .'.join(known)}."
            raise click.BadParameter(text, param_hint="'--plot'")


def _launches_device(asked: bool | None) -> Any:
    """The device to count launches for; None to count none."""
    from bptt_jax._bench.targets import TargetMissingError, launches_device

    try:
        return launches_device(asked)
    except TargetMissingError as error:
        raise click.ClickException(f"--launches: {error}") from error


def _with_progress(measure: Any, place: tuple[str, int, int], *arguments: Any, **options: Any) -> Any:
    """One comparison, with a progress bar naming the current task."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def progress(what: str, share: float) -> None:
            bar.update(task, description=f"{place[0]} {place[1]}x{place[2]}: {what}", completed=share)

        try:
            return measure(*place, *arguments, progress, **options)
        except ModuleNotFoundError as error:
            raise click.ClickException(f"{place[0]} needs {error.name}; install bptt_jax[cli].") from error
