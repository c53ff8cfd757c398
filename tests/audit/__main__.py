"""The audit as a command: a Markdown table by kind of step, every finding as JSON, and a picture.

python -m tests.audit                 # the whole grid
python -m tests.audit --kinds lstm --lengths 100 --json audit.json --plot audit.png
python -m tests.audit --kinds --random 20 --seed 100 --lengths 100     # steps drawn at random, and no others
python -m tests.audit --kinds lstm --plant skipped      # checks that are left out, which the audit has to find

Ends with 1 if a program takes more than was asked.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from tests.audit import BUDGETS, LENGTHS, MAPPINGS, Case
from tests.audit.kinds import KINDS, RANDOM, group
from tests.audit.parallel import PLANTED, Audited, run

ARGUMENTS = ("weights", "xs", "all")

HEAD = """| step | lowering | programs | over | used: median | 1 in 20 less than | could be faster | checks | most |
|---|---|---|---|---|---|---|---|---|"""


def row(name: str, lowering: str, found: Sequence[Audited]) -> str:
    # Of what keeps everything no more can be used.
    used = sorted(one.finding.used for one in found if one.finding.programs)
    checks = [one.finding.programs for one in found]
    over, wasteful = sum(one.is_over for one in found), sum(one.wasteful for one in found)
    figures = f"{statistics.median(used):.2f} | {used[len(used) // 20]:.2f}" if used else "– | –"
    return (
        f"| {name} | {lowering} | {len(found)} | {over} | {figures} | {wasteful} "
        f"| {statistics.median(checks):.0f} | {max(checks)} |"
    )


def plot(found: Sequence[Audited], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind in dict.fromkeys(group(one.finding.case.kind) for one in found):
        ours = [one.finding for one in found if group(one.finding.case.kind) == kind]
        axes.semilogx([f.asked / 2**20 for f in ours], [f.used for f in ours], ".", alpha=0.6, label=kind)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="asked, MiB", ylabel="measured by XLA, of what was asked", ylim=(0, 1.1))
    axes.legend(frameon=False, ncols=2, loc="lower left")
    figure.savefig(path, dpi=150)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--random", type=int, default=0, metavar="N", help="so many steps drawn at random besides")
    parser.add_argument("--seed", type=int, default=0, help="of the first of them")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--lowering", nargs="+", choices=["sweep", "nested"], default=["sweep", "nested"])
    parser.add_argument("--arguments", nargs="+", choices=ARGUMENTS, default=ARGUMENTS)
    parser.add_argument("--outputs", nargs="+", type=int, choices=[0, 1], default=[0, 1])
    parser.add_argument("--mapping", nargs="+", choices=MAPPINGS, default=["none"])
    parser.add_argument("--budgets", type=int, default=BUDGETS)
    parser.add_argument("--plant", choices=PLANTED, help="a fault of the checks, which the audit has to find")
    parser.add_argument("--json", type=Path, help="where to write all findings")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    return parser.parse_args()


def main() -> None:
    options = parse()
    drawn = [f"{RANDOM}-{seed}" for seed in range(options.seed, options.seed + options.random)]
    kinds = [*options.kinds, *drawn]
    grid = itertools.product(
        kinds, options.lengths, options.lowering, options.arguments, map(bool, options.outputs), options.mapping
    )
    cases = [Case(*given) for given in grid]
    found: list[Audited] = []
    done = run(cases, options.budgets, options.plant)
    for several in track(done, "auditing", len(cases), console=Console(stderr=True)):
        found += several
        for one in several:
            if one.is_over or one.wasteful:
                print("OVER" if one.is_over else "could be faster", one.finding, file=sys.stderr, flush=True)
    print(HEAD)
    for lowering, kind in itertools.product(options.lowering, dict.fromkeys(map(group, kinds))):
        case_of = [one for one in found if group(one.finding.case.kind) == kind]
        if ours := [one for one in case_of if one.finding.case.lowering == lowering]:
            print(row(kind, lowering, ours))
    for lowering in options.lowering:
        if ours := [one for one in found if one.finding.case.lowering == lowering]:
            print(row("all", lowering, ours))
    if options.json:
        figures = [
            dataclasses.asdict(one.finding) | {"used": one.finding.used, "wasteful": one.wasteful} for one in found
        ]
        options.json.write_text(json.dumps(figures, indent=1))
    if options.plot:
        plot(found, options.plot)
    sys.exit(any(one.is_over for one in found))


if __name__ == "__main__":
    main()
