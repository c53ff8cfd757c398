"""Times, by measuring with decisions forced: interleaved, as medians of ratios. For a quiet machine."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, Steps, _figures
from bptt_jax._bench.cells import CELLS
from bptt_jax._bench.peers import Program, compare, compile_program
from bptt_jax._cost.time import evaluations
from bptt_jax._device import machine
from tests.audit.kinds import Problem

PLANS = (
    Steps(480),
    Repeat(2, Remat(Steps(240))),
    Repeat(10, Remat(Steps(48))),
    Repeat(40, Remat(Steps(12))),
    Repeat(120, Remat(Steps(4))),
    Repeat(6, Remat(Repeat(10, Remat(Steps(8))))),
    Repeat(6, Remat(Repeat(5, Remat(Repeat(4, Remat(Steps(4))))))),
    Chain((Repeat(6, Remat(Steps(40))), Steps(240))),
)
SIZES = ((1, 256), (16, 64), (16, 256), (64, 128))


def compiled(problem: Any, length: int, **options: Any) -> Program:
    def scan(step: Any, init: Any, xs: Any) -> Any:
        return bptt_jax.scan(step, init, xs, **options)

    return compile_program("", scan, problem, problem.xs(length))


def step_times(seconds: float) -> tuple[float, float]:
    """(recording and backward, a block), in steps that are advanced: by least squares over plans of an LSTM."""
    problem = CELLS["lstm"](16, 256)
    programs = [compiled(problem, 480, plan=plan) for plan in PLANS]
    runs = compare(programs, programs[0], seconds * len(programs), lambda _: None).candidates
    blocks = [bptt_jax.plans._nodes.in_blocks(plan, 48) for plan in PLANS]
    counts = [evaluations(plan, "sweep") for plan in blocks]
    columns = np.array([[480, count.steps - 480, count.blocks] for count in counts], float)
    (step, advance, block), *_ = np.linalg.lstsq(columns, np.array([run.ratio for run in runs]), rcond=None)
    return step / advance, block / advance


def forced(name: str, problem: Problem, seconds: float) -> float:
    """The time of a gradient with a decision against that without it."""
    programs = []
    cpu = machine.CPU
    try:
        for cost in (0.0, math.inf):
            machine.CPU = dataclasses.replace(cpu, **{name: cost})
            jax.clear_caches()
            programs.append(compiled(problem, 300))
    finally:
        machine.CPU = cpu
    return compare([programs[0]], programs[1], seconds, lambda _: None).candidates[0].ratio


def rows(seconds: float = 4.0) -> Iterator[tuple[str, str, str, str]]:
    """(figure, now, derived, binds)."""
    times = _figures.SWEEP_TIMES
    step, block = step_times(seconds)
    yield (
        "SWEEP_TIMES, recording + backward",
        f"{times.recording + times.backward:.1f}",
        f"{step:.1f}",
        "LSTM (16, 256)",
    )
    yield "SWEEP_TIMES, block", f"{times.block:.1f}", f"{block:.1f}", "LSTM (16, 256)"
    for name, (batch, width) in itertools.product(("stacking", "hoisting"), SIZES):
        ratio = forced(name, CELLS["lstm"](batch, width), seconds)
        weight, stacked = 4 * width * width, 4 * batch * width
        limit = (2 * weight + _figures.CPU.launch_bytes) / (2 * stacked)
        binds = f"LSTM ({batch}, {width}): taken where the figure is below {limit:.0f}"
        yield f"CPU.{name}", f"{getattr(_figures.CPU, name):.0f}", f"{ratio:.2f} of the time if taken", binds
