"""Time against `lax.scan` and Equinox at a fraction of the bytes. Not part of the suite; run it on a quiet machine:

python -m pytest tests/bench/test_peers.py -s -o addopts=""
"""

import itertools
import statistics

import jax
import pytest
from jax import lax

from bptt_jax._bench.cells import CELLS
from bptt_jax._bench.peers import Program, checkpointed_step, compare, compile_program, equinox, ours
from bptt_jax._caches import forget_everything
from bptt_jax._verify import check as _check
from tests.bench.budgets import RNN_CELLS, RNN_SIZES, budget_bytes, lax_scan_bytes, sizes

MIB = 2**20
LENGTH = 1000
# What one comparison takes about; 5 rounds of the largest sizes take longer.
SECONDS = 10
FRESH_COMPILES = 5


@pytest.fixture(autouse=True)
def strict_jax():
    """Instead of the suite's double precision: the programs are those that users run."""


def describe(program: Program, ratio: float, budget: int | None, baseline: Program) -> str:
    """One line of figures: bytes, over or under the budget, and time."""
    if program.error:
        return f"{program.method}: {program.error}"
    share = program.temp_bytes / baseline.temp_bytes
    limit = ""
    if budget is not None:
        limit = f", {'OVER' if program.temp_bytes > budget else 'under'} its {budget / MIB:.2f}"
    return (
        f"{program.method}: {program.temp_bytes / MIB:.2f} MiB{limit}, {share:.1%} of {baseline.method}, "
        f"time {ratio:.3f}, compiled in {program.compile_seconds:.2f} s"
    )


def against_lax_scan(cell: str, batch: int, width: int, percents: list[float | None]) -> list[float]:
    """The time ratios at these per cents of `lax.scan`'s temporaries (None: no budget), printed one a line."""
    problem = CELLS[cell](batch, width)
    xs = problem.xs(LENGTH)
    baseline = compile_program("lax.scan", lax.scan, problem, xs)
    budgets = [None if p is None else budget_bytes(cell, batch, width, LENGTH, p) for p in percents]
    programs = [
        compile_program("no budget" if percent is None else f"{percent} %", ours(budget=budget), problem, xs)
        for percent, budget in zip(percents, budgets, strict=True)
    ]
    ratios = compare(programs, baseline, SECONDS * len(programs)).ratios
    for program, ratio, budget in zip(programs, ratios, budgets, strict=True):
        print(f"{cell} ({batch},{width}) {describe(program, ratio, budget, baseline)}", flush=True)
    return ratios


def over_the_grid(percent: float | None) -> tuple[float, float]:
    """The geometric mean and the worst of the ratios over the recurrent cells and their sizes."""
    print()
    ratios = [against_lax_scan(cell, batch, width, [percent])[0] for cell in RNN_CELLS for batch, width in RNN_SIZES]
    mean, worst = statistics.geometric_mean(ratios), max(ratios)
    print(f"geometric mean {mean:.3f}, worst {worst:.3f}")
    return mean, worst


def test_at_five_per_cent_over_the_grid():
    mean, worst = over_the_grid(5)
    assert mean <= 1.00
    assert worst <= 1.25


def test_without_a_budget_over_the_grid():
    mean, worst = over_the_grid(None)
    assert mean <= 0.80
    assert worst <= 1.00


def test_a_plain_lstm_at_five_and_at_two_per_cent():
    print()
    at_five, at_two = against_lax_scan("lstm", 16, 256, [5, 2])
    assert at_five <= 1.00
    assert at_two <= 1.20


@pytest.mark.parametrize(("batch", "width"), [(32, 512), (64, 512)])
def test_large_products_at_five_per_cent_beside_a_checkpoint_at_each_step(batch, width):
    """The checkpoint at each step takes three to four times the bytes."""
    problem = CELLS["lstm"](batch, width)
    xs = problem.xs(400)
    theirs = compile_program("scan(checkpoint(step))", checkpointed_step, problem, xs)
    budget = budget_bytes("lstm", batch, width, 400, 5)
    program = compile_program("bptt_jax", ours(budget=budget), problem, xs)
    (ratio,) = compare([program], theirs, SECONDS).ratios
    print(f"\nlstm ({batch},{width}) {describe(program, ratio, budget, theirs)}")
    assert ratio <= 1.05
    assert 2 * program.temp_bytes <= theirs.temp_bytes


def test_faster_than_equinox_in_no_more_bytes():
    print()
    slower = []
    for cell in RNN_CELLS:
        problem = CELLS[cell](16, 256)
        xs = problem.xs(LENGTH)
        for slots in (10, 16, 44):
            theirs = compile_program(f"Equinox with {slots} slots", equinox(slots), problem, xs)
            program = compile_program("bptt_jax", ours(budget=theirs.temp_bytes), problem, xs)
            (ratio,) = compare([program], theirs, SECONDS).ratios
            print(f"{cell} (16,256) {describe(program, ratio, theirs.temp_bytes, theirs)}", flush=True)
            if not (ratio <= 0.95 and program.temp_bytes <= theirs.temp_bytes):
                slower.append((cell, slots))
    assert not slower


def test_more_bytes_take_no_more_time():
    """Beyond what runs differ by. To 2 per cent the fixed part is added, so that it is more than 3."""
    print()
    ratios = against_lax_scan("lstm", 16, 256, [3, 2, 5, 10, 20, 50, 80, None])
    assert all(more <= 1.1 * less for less, more in itertools.pairwise(ratios))


def forget_compilations() -> None:
    """Empties JAX's caches and this library's, so that the next compilation is one of a process that just started.

    Only the checks are remembered.
    """
    jax.clear_caches()
    forget_everything(but=_check._measured)


def compile_seconds(scan) -> float:
    forget_compilations()
    problem = CELLS["lstm"](16, 256)
    program = compile_program("", scan, problem, problem.xs_shape(LENGTH))
    return float("inf") if program.error else program.compile_seconds


def test_compile_time_against_lax_scan():
    print()
    ratios = {}
    compile_seconds(lax.scan)  # what is paid once by the process
    for percent in (1, 2, 5, 10, 20, 30, 50, None):
        budget = None if percent is None else budget_bytes("lstm", 16, 256, LENGTH, percent)
        compile_seconds(ours(budget=budget))  # with the checks
        pairs = [(compile_seconds(lax.scan), compile_seconds(ours(budget=budget))) for _ in range(FRESH_COMPILES)]
        ratios[percent] = statistics.median(bounded / plain for plain, bounded in pairs)
        name = "no budget" if percent is None else f"{percent} %"
        print(f"{name}: {pairs[-1][1]:.2f} s, {ratios[percent]:.2f} of lax.scan's", flush=True)
    assert max(ratios.values()) <= 2.6


def test_the_time_of_a_step_does_not_grow_with_the_length():
    problem = CELLS["lstm"](1, 256)
    budget = budget_bytes("lstm", 1, 256, 10**4, 5)
    short, long = (
        compile_program(f"T={length}", ours(budget=budget), problem, problem.xs(length)) for length in (10**4, 10**5)
    )
    assert not short.error
    ratio = compare([long], short, 6 * SECONDS).ratios[0] / 10
    print(f"\nlstm (1,256) a step {describe(long, ratio, budget, short)}")
    assert ratio <= 1.35
    assert max(short.temp_bytes, long.temp_bytes) <= budget


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in RNN_CELLS])
def test_other_cells_without_a_bound(cell):
    print()
    for batch, width in sizes(cell):
        print(f"lax.scan: {lax_scan_bytes(cell, batch, width, LENGTH) / MIB:.2f} MiB")
        against_lax_scan(cell, batch, width, [5, 20, None])
