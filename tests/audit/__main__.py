"""The audit as a command: a Markdown table by kind of step, every finding as JSON, and a picture.

python -m tests.audit                 # the whole grid, some 4,400 programs: an hour on two cores
python -m tests.audit --kinds lstm --lengths 100 --json audit.json --plot audit.png
python -m tests.audit --kinds --random 20 --seed 100 --lengths 100 --budgets 5    # steps drawn at random, and no others
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

from tests.audit import BUDGETS, LENGTHS, Case
from tests.audit.kinds import KINDS, RANDOM, group
from tests.audit.parallel import Audited, run

HEAD = """| step | lowering | programs | over what was asked | measured / asked: median | least | could be faster |
|---|---|---|---|---|---|---|"""


def row(name: str, lowering: str, found: Sequence[Audited]) -> str:
    used = [one.finding.used for one in found]
    over, wasteful = sum(share > 1 for share in used), sum(one.wasteful for one in found)
    figures = f"{statistics.median(used):.2f} | {min(used):.2f}"
    return f"| {name} | {lowering} | {len(used)} | {over} | {figures} | {wasteful} |"


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
    parser.add_argument("--arguments", nargs="+", choices=["weights", "all"], default=["weights", "all"])
    parser.add_argument("--outputs", nargs="+", type=int, choices=[0, 1], default=[0, 1])
    parser.add_argument("--budgets", type=int, default=BUDGETS)
    parser.add_argument("--json", type=Path, help="where to write all findings")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    return parser.parse_args()


def main() -> None:
    options = parse()
    drawn = [f"{RANDOM}-{seed}" for seed in range(options.seed, options.seed + options.random)]
    kinds = [*options.kinds, *drawn]
    grid = itertools.product(kinds, options.lengths, options.lowering, options.arguments, options.outputs)
    cases = [Case(*given[:4], bool(given[4])) for given in grid]
    found: list[Audited] = []
    done = run(cases, options.budgets)
    for several in track(done, "auditing", len(cases), console=Console(stderr=True)):
        found += several
        for one in several:
            if one.finding.used > 1 or one.wasteful:
                print("OVER" if one.finding.used > 1 else "could be faster", one.finding, file=sys.stderr, flush=True)
    print(HEAD)
    for lowering, kind in itertools.product(options.lowering, dict.fromkeys(map(group, kinds))):
        case_of = [one for one in found if group(one.finding.case.kind) == kind]
        print(row(kind, lowering, [o for o in case_of if o.finding.case.lowering == lowering]))
    for lowering in options.lowering:
        print(row("all", lowering, [o for o in found if o.finding.case.lowering == lowering]))
    if options.json:
        figures = [
            dataclasses.asdict(one.finding) | {"used": one.finding.used, "wasteful": one.wasteful} for one in found
        ]
        options.json.write_text(json.dumps(figures, indent=1))
    if options.plot:
        plot(found, options.plot)
    sys.exit(any(one.finding.used > 1 for one in found))


if __name__ == "__main__":
    main()
