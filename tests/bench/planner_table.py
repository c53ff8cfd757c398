"""Prints the worst cases of `make_plan` over the grid of tests/planners, as a Markdown table.

python -m tests.bench.planner_table
"""

from tests.support import planner_grid as grid

BANDS = ((0, 1), (1, 2.0), (2.0, 2.5), (2.5, 3.5), (3.5, 1e9))
HEAD = (
    "| steps | evaluations per step | points | worst ratio | least possible there | T | ratio s/h | budget, carries |"
)


def row(steps: str, band: str, found: list[tuple[grid.Measured, grid.Point]]) -> str:
    worst, at = max(found, key=lambda pair: pair[0].ratio)
    carries = at.budget_bytes / at.profile.carry_bytes
    cells = (
        steps,
        band,
        len(found),
        f"{worst.ratio:.3f}",
        f"{worst.least_ratio:.3f}",
        at.steps,
        at.ratio,
        f"{carries:.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    found = [
        (grid.measure(point), point)
        for steps in grid.LENGTHS
        for ratio in grid.RATIOS
        for point in grid.points(steps, ratio)
    ]
    print(f"{HEAD}\n|---|---|---|---|---|---|---|---|")
    for few, many in ((7, 7), (97, 100), (1000, 10**6)):
        for low, high in BANDS:
            in_band = [pair for pair in found if few <= pair[1].steps <= many and low < pair[0].optimum <= high]
            if in_band:
                print(row(f"{few} to {many}", f"{low:g} to {high:g}" if high < 1e9 else f"above {low:g}", in_band))
    print(f"\nLargest program: {max(measured.program_size for measured, _ in found)} copies of the step's body.")


if __name__ == "__main__":
    main()
