"""One cell at one size by every method: bytes, time and evaluations of the step for each."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence

import jax
from jax import lax

from bptt_jax._bench.cells import CELLS, Problem
from bptt_jax._bench.floor import product_flops, product_rate
from bptt_jax._bench.launches import launches
from bptt_jax._bench.methods import Method, Ours, methods
from bptt_jax._bench.peers import Program, Run, compare, compile_program, evaluations, gradient
from bptt_jax._budget import Budget
from bptt_jax._explain.calls import explain_calls
from bptt_jax._jaxprs.types import Device
from bptt_jax.errors import BudgetError, BudgetWarning, format_bytes
from bptt_jax.plans._notation import notation

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
      launches: kernels and copies that its program sends to a GPU; None where they are not counted, for example in a
        loop of unknown length.
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
    launches: int | None = None
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
      launches_device: the device whose launches are counted; "" where none are.
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
    launches_device: str = ""

    @property
    def has_baseline(self) -> bool:
        """Whether `lax.scan` runs here; ratios to it exist only then."""
        return math.isfinite(self.rows[0].time_ratio)


def measure(
    cell: str,
    batch: int,
    width: int,
    length: int,
    budgets: Sequence[Budget],
    seconds: float,
    progress: Progress,
    *,
    vmap: bool = False,
    launches_device: Device = None,
) -> Comparison:
    """Compiles and runs every method.

    Args:
      cell: one of `CELLS`.
      batch, width, length: of the problem.
      budgets: budgets to measure this library with.
      seconds: approximate time to run each method for; at least 5 rounds.
      progress: called with the current task and the share of the work done; compiling is the first half.
      vmap: whether to measure a scan of one example mapped over the batch as well.
      launches_device: the GPU to count launches for, `targets.launches_device`; None to count none.
    """
    problem = CELLS[cell](batch, width)
    xs = problem.xs(length)
    compile_program("", lax.scan, problem, problem.xs(1))  # first, because no method is charged for a process's start
    asked = methods(length, budgets, vmap)
    programs, rows = [], []
    for done, method in enumerate(asked):
        progress(f"compiling {method.name}", 0.5 * done / len(asked))
        program, row = compiled(method, problem, xs)
        programs.append(program)
        rows.append(dataclasses.replace(row, launches=count_launches(method, program, problem, launches_device)))
    baseline, *others = programs
    timing = compare(others, baseline, seconds * len(others), lambda share: progress("running", 0.5 + share / 2))
    flops = product_flops(jax.make_jaxpr(gradient(problem, lax.scan))(*baseline.arguments).jaxpr)
    rate = product_rate(str(problem.x.dtype))
    timed = [
        _timed(row, run, flops / rate) for row, run in zip(rows, [timing.baseline, *timing.candidates], strict=True)
    ]
    device, counted = jax.devices()[0].device_kind, launches_device.device_kind if launches_device else ""
    found = tuple(_best_nests(timed))
    return Comparison(cell, batch, width, length, device, jax.__version__, flops, rate, found, counted)


def compiled(method: Method, problem: Problem, xs: jax.Array) -> tuple[Program, Row]:
    """The gradient by a method, and its row before it has run."""
    if isinstance(method, Ours):
        return _with_budget(method, problem, xs)
    program = compile_program(method.name, method.scan, problem, xs)
    return program, _row(program, evaluations(method.scan, xs.shape[0]))


def _with_budget(method: Ours, problem: Problem, xs: jax.Array) -> tuple[Program, Row]:
    """This library. `explain_calls` runs first and does the checks, because compiling is timed without them."""
    scan = method.scan_for(None)
    try:
        (report,) = explain_calls(gradient(problem, scan), problem.params, problem.init, xs).values()
    except BudgetError as error:
        short = f"the smallest budget is {format_bytes(error.smallest_bytes)}"
        return Program(method.name, None, (), 0, 0.0, short), Row(method.name, error=short)
    program = compile_program(method.name, scan, problem, xs)
    seconds = program.compile_seconds + report.plan_seconds  # added, because `explain_calls` has planned already
    steps = evaluations(method.scan_with(plan=report.plan), xs.shape[0])
    row = dataclasses.replace(_row(program, steps), compile_seconds=seconds)
    check_seconds = sum(check.seconds for check in report.checks)
    return program, dataclasses.replace(row, check_seconds=check_seconds, plan=notation(report.plan))


def count_launches(method: Method, program: Program, problem: Problem, device: Device) -> int | None:
    """The launches of a method's gradient on a device: of its program, or of one compiled for a device not here.

    Args:
      method: the method.
      program: its program for this machine, which has the arguments.
      problem: the problem.
      device: the device; None to count none.

    Returns:
      None as well where the gradient does not compile, or has a loop of unknown length.
    """
    if device is None or program.error:
        return None
    try:
        if device not in jax.devices():
            program = _compiled_for(device, method, program, problem)
        return None if program.error else launches(program.compiled.as_text())
    except ValueError:  # by `launches`, and for "auto", because a device not here has no free bytes
        return None


def _compiled_for(device: Device, method: Method, program: Program, problem: Problem) -> Program:
    """The gradient compiled for another device, with a plan for it, and not to be run."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    params, init, xs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), program.arguments
    )
    there = dataclasses.replace(problem, params=params, init=init)
    with warnings.catch_warnings():
        # The row has said so, or it is about another device's bytes.
        warnings.simplefilter("ignore", BudgetWarning)
        return compile_program(method.name, method.scan_for(device), there, xs)


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
