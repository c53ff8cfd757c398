"""A Markdown table of fitted numbers of `bptt_jax/_figures.py`, as they are and as they come out here.

python -m tests.fit                    # bytes: some 90 programs, three minutes
python -m tests.fit --times            # and times: for a quiet machine, five minutes more
python -m tests.fit --grid             # instead, each decision forced over a grid of sizes: quiet, ten minutes
"""

import argparse
import itertools

from tests.audit.kinds import KINDS
from tests.fit import by_bytes, by_grid, by_time


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each program that is timed")
    parser.add_argument("--grid", action="store_true")
    options = parser.parse_args()
    if options.grid:
        for line in by_grid.lines(options.seconds):
            print(line, flush=True)
        return
    print("| figure | now | here | binds |\n|---|---|---|---|")
    timed = by_time.rows(options.seconds) if options.times else ()
    for row in itertools.chain(by_bytes.rows(options.kinds), timed):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
