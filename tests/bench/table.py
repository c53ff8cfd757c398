"""Every cell by every method at every budget, as one Markdown table: the project's record.

python -m tests.bench.table --cells "plain LSTM" --sizes 16x256 --budgets 2,5,none --seconds 5
"""

import argparse
import dataclasses
from collections.abc import Iterator

from jax import lax
from rich.console import Console
from rich.progress import Progress

from tests.bench.cells import CELLS, sizes
from tests.bench.peers import (
    MIB,
    Program,
    Scan,
    budget_bytes,
    checkpointed_step,
    compare,
    compile_program,
    equinox,
    nests,
    ours,
)

EQUINOX_SLOTS = (10, 16, 44)
HEAD = "| cell | B | H | T | method | temporaries MiB | % of lax.scan | time ratio |\n|---|---|---|---|---|---|---|---|"


def methods(cell: str, batch: int, width: int, length: int, budgets: list[float | None]) -> Iterator[tuple[str, Scan]]:
    """What is compared with `lax.scan`, by name."""
    yield "scan(checkpoint(step))", checkpointed_step
    yield from nests(length).items()
    for slots in EQUINOX_SLOTS:
        yield f"Equinox, {slots} slots", equinox(slots)
    for percent in budgets:
        if percent is None:
            yield "bptt_jax, no budget", ours(None)
        else:
            budget = budget_bytes(cell, batch, width, length, percent)
            yield f"bptt_jax, {percent:g} % ({budget / MIB:.2f} MiB)", ours(budget)


def row(place: tuple[str, int, int, int], program: Program, baseline: Program, ratio: float) -> str:
    if program.error:
        return f"| {' | '.join(map(str, place))} | {program.method} | – | – | {program.error} |"
    share = program.temp_bytes / baseline.temp_bytes
    figures = (program.method, f"{program.temp_bytes / MIB:.2f}", f"{100 * share:.1f}", f"{ratio:.2f}")
    return f"| {' | '.join(map(str, (*place, *figures)))} |"


def best_nest(programs: list[Program], ratios: list[float], percent: float, limit_bytes: int) -> tuple[Program, float]:
    """The fastest hand-written nest of at most so many bytes, named so, and its ratio."""
    title = f"best nest within {percent:g} %"
    fitting = [
        (ratio, i)
        for i, (program, ratio) in enumerate(zip(programs, ratios, strict=True))
        if program.method.startswith("nest") and program.temp_bytes <= limit_bytes
    ]
    if not fitting:
        return Program(title, None, (), 0, 0.0, error="no nest of two levels fits"), float("inf")
    ratio, i = min(fitting)
    return dataclasses.replace(programs[i], method=f"{title}: {programs[i].method}"), ratio


def rows(place: tuple[str, int, int, int], budgets: list[float | None], seconds: float) -> Iterator[str]:
    """The lines of one cell at one size: every method, and for each budget the best nest by hand."""
    cell, batch, width, length = place
    problem = CELLS[cell](batch, width)
    xs = problem.xs(length)
    baseline = compile_program("lax.scan", lax.scan, problem, xs)
    programs = [compile_program(name, scan, problem, xs) for name, scan in methods(*place, budgets)]
    ratios = compare(programs, baseline, seconds * len(programs))
    yield row(place, baseline, baseline, 1.0)
    for program, ratio in zip(programs, ratios, strict=True):
        yield row(place, program, baseline, ratio)
    for percent in budgets:
        if percent is not None:
            nest, ratio = best_nest(programs, ratios, percent, budget_bytes(*place, percent))
            yield row(place, nest, baseline, ratio)


def parse() -> argparse.Namespace:
    def pair(text: str) -> tuple[int, int]:
        batch, width = text.split("x")
        return int(batch), int(width)

    def several(one):
        return lambda text: [one(part.strip()) for part in text.split(",")]

    parser = argparse.ArgumentParser(prog="python -m tests.bench.table", description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=several(str), default=list(CELLS), help=f"of {', '.join(CELLS)}")
    parser.add_argument("--sizes", type=several(pair), help="such as 1x256,16x256; default: each cell's own")
    parser.add_argument("--length", type=int, default=1000, help="number of steps")
    parser.add_argument(
        "--budgets",
        type=several(lambda text: None if text == "none" else float(text)),
        default=[2.0, 5.0, 20.0, None],
        help="per cent of lax.scan's temporaries, or none",
    )
    parser.add_argument("--seconds", type=float, default=10, help="for each program, about; at least 5 rounds")
    return parser.parse_args()


def main() -> None:
    options = parse()
    places = [(cell, *size, options.length) for cell in options.cells for size in options.sizes or sizes(cell)]
    print(HEAD, flush=True)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(places))
        for place in places:
            progress.update(task, description="{} ({}, {}), T={}".format(*place))
            print("\n".join(rows(place, options.budgets, options.seconds)), flush=True)
            progress.advance(task)


if __name__ == "__main__":
    main()
