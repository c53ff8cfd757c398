"""Times of the parts of a step, by measuring plans: interleaved, as medians of ratios. For a quiet machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, Steps, _figures
from bptt_jax._bench.cells import CELLS
from bptt_jax._bench.peers import Program, compare, compile_program
from bptt_jax._cost.time import evaluations

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


def compiled(problem: Any, length: int, **options: Any) -> Program:
    def scan(step: Any, init: Any, xs: Any) -> Any:
        return bptt_jax.scan(step, init, xs, **options)

    return compile_program("", scan, problem, problem.xs(length))


def step_times(seconds: float) -> tuple[float, float]:
    """(recording and backward, a block), in steps that are advanced: by least squares over plans of an LSTM."""
    problem = CELLS["lstm"](16, 256)
    programs = [compiled(problem, 480, plan=plan) for plan in PLANS]
    runs = compare(programs, programs[0], seconds * len(programs), lambda _: None).candidates
    blocks = [bptt_jax.plans._blocks.in_blocks(plan, 48) for plan in PLANS]
    counts = [evaluations(plan, "sweep") for plan in blocks]
    columns = np.array([[480, count.steps - 480, count.blocks] for count in counts], float)
    (step, advance, block), *_ = np.linalg.lstsq(columns, np.array([run.ratio for run in runs]), rcond=None)
    return step / advance, block / advance


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
