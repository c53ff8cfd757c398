"""One cell at one size by every method: bytes, time and evaluations of the step for each."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Sequence

import jax
from jax import lax

from bptt_jax._bench.cells import CELLS, Problem
from bptt_jax._bench.floor import product_flops, product_rate
from bptt_jax._bench.peers import (
    Program,
    Run,
    Scan,
    checkpointed_step,
    compare,
    compile_program,
    equinox,
    evaluations,
    gradient,
    nests,
    ours,
)
from bptt_jax._budget import Budget
from bptt_jax._explain.explain import explain_params
from bptt_jax.errors import BudgetError, format_bytes
from bptt_jax.plans._notation import notation

EQUINOX_SLOTS = (10, 16, 44)
Progress = Callable[[str, float], None]  # (current task, share of the work done)


@dataclasses.dataclass(frozen=True)
class Row:
    """Figures of one method.

    Attributes:
      method: its name.
      temp_bytes: temporary bytes reported by XLA.
      time_ratio: median of its times over the times of `lax.scan` right before; infinite if `lax.scan` does not run.
      seconds: `time_ratio` times the median of `lax.scan`'s times; without `lax.scan`, the median of its own.
      compile_seconds: time to trace, plan and compile, without the checks.
      check_seconds: time to compile programs by themselves to read their bytes.
      forward_steps: evaluations of the step, counted on a scan of numbers run the same way.
      floor_ratio: its time over the time of the products alone; None for a step without products.
      plan: the plan in short notation, for this library.
      error: reason for missing figures, for example a budget no plan fits, or too little memory; "" otherwise.
    """

    method: str
    temp_bytes: int = 0
    time_ratio: float = math.inf
    seconds: float = math.inf
    compile_seconds: float = 0.0
    check_seconds: float = 0.0
    forward_steps: int = 0
    floor_ratio: float | None = None
    plan: str = ""
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All methods for one cell at one size.

    Attributes:
      cell, batch, width, length: of the scan.
      device, jax_version: where it ran.
      product_flops: floating-point operations of the products in the gradient by `lax.scan`.
      product_rate: rate of products on this device, in FLOPs per second.
      rows: `lax.scan` first.
    """

    cell: str
    batch: int
    width: int
    length: int
    device: str
    jax_version: str
    product_flops: int
    product_rate: float
    rows: tuple[Row, ...]

    @property
    def has_baseline(self) -> bool:
        """Whether `lax.scan` runs here; ratios to it exist only then."""
        return math.isfinite(self.rows[0].time_ratio)


def measure(
    cell: str, batch: int, width: int, length: int, budgets: Sequence[Budget], seconds: float, progress: Progress
) -> Comparison:
    """Compiles and runs every method.

    Args:
      cell: one of `CELLS`.
      batch, width, length: of the problem.
      budgets: budgets to measure this library with.
      seconds: approximate time to run each method for; at least 5 rounds.
      progress: called with the current task and the share of the work done; compiling is the first half.
    """
    problem = CELLS[cell](batch, width)
    xs = problem.xs(length)
    compile_program("", lax.scan, problem, problem.xs(1))  # first, because no method is charged for a process's start
    baseline = compile_program("lax.scan", lax.scan, problem, xs)
    peers = _peers(length)
    programs, rows = [], [_row(baseline, length)]
    for done, (name, scan) in enumerate(peers.items()):
        progress(f"compiling {name}", 0.5 * done / (len(peers) + len(budgets)))
        programs.append(compile_program(name, scan, problem, xs))
        rows.append(_row(programs[-1], evaluations(scan, length)))
    for done, budget in enumerate(budgets, start=len(peers)):
        progress(f"planning and compiling for {budget or 'no budget'}", 0.5 * done / (len(peers) + len(budgets)))
        program, row = _with_budget(budget, problem, xs)
        programs.append(program)
        rows.append(row)
    timing = compare(programs, baseline, seconds * len(programs), lambda share: progress("running", 0.5 + share / 2))
    flops = product_flops(jax.make_jaxpr(gradient(problem, lax.scan))(*baseline.arguments).jaxpr)
    rate = product_rate(str(problem.x.dtype))
    timed = [
        _timed(row, run, flops / rate) for row, run in zip(rows, [timing.baseline, *timing.candidates], strict=True)
    ]
    device = jax.devices()[0].device_kind
    return Comparison(cell, batch, width, length, device, jax.__version__, flops, rate, tuple(_best_nests(timed)))


def _peers(length: int) -> dict[str, Scan]:
    """The scans to compare with, by name."""
    peers = {"scan(checkpoint(step))": checkpointed_step, **nests(length)}
    if importlib.util.find_spec("equinox") is not None:
        peers |= {f"Equinox, {slots} slots": equinox(slots) for slots in EQUINOX_SLOTS if slots < length}
    return peers


def _with_budget(budget: Budget, problem: Problem, xs: jax.Array) -> tuple[Program, Row]:
    """This library. `explain` runs first and does the checks, because compiling is timed without them."""
    asked = "no budget" if budget is None else budget if isinstance(budget, str) else f"{budget:,} bytes"
    method = f"bptt_jax, {asked}"
    try:
        report = explain_params(problem.step, problem.params, problem.init, xs, budget=budget)
    except BudgetError as error:
        short = f"the smallest budget is {format_bytes(error.smallest_bytes)}"
        return Program(method, None, (), 0, 0.0, short), Row(method, error=short)
    program = compile_program(method, ours(budget=budget), problem, xs)
    seconds = program.compile_seconds + report.plan_seconds  # added, because `explain` has planned already
    steps = evaluations(ours(plan=report.plan), xs.shape[0])
    row = dataclasses.replace(_row(program, steps), compile_seconds=seconds)
    check_seconds = sum(check.seconds for check in report.checks)
    return program, dataclasses.replace(row, check_seconds=check_seconds, plan=notation(report.plan))


def _row(program: Program, forward_steps: int) -> Row:
    """The row of a program before it has run."""
    return Row(
        program.method,
        temp_bytes=program.temp_bytes,
        compile_seconds=program.compile_seconds,
        forward_steps=forward_steps,
        error=program.error,
    )


def _timed(row: Row, run: Run, floor_seconds: float) -> Row:
    if row.error or run.error:
        return dataclasses.replace(row, error=row.error or run.error)
    floor_ratio = run.seconds / floor_seconds if floor_seconds else None
    return dataclasses.replace(row, time_ratio=run.ratio, seconds=run.seconds, floor_ratio=floor_ratio)


def _best_nests(rows: Sequence[Row]) -> list[Row]:
    """The rows without those nests for which another nest is better in time or bytes, and no worse in the other."""
    by_hand = [row for row in rows if row.method.startswith("nest ") and not row.error]

    def is_bettered(row: Row) -> bool:
        own = (row.seconds, row.temp_bytes)
        return any(
            other.seconds <= row.seconds
            and other.temp_bytes <= row.temp_bytes
            and (other.seconds, other.temp_bytes) != own
            for other in by_hand
        )

    return [row for row in rows if row not in by_hand or not is_bettered(row)]
