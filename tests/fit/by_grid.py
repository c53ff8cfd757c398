"""Three decisions on products, each forced both ways, over a grid of sizes: the times of gradients with it, of those
without it. For a quiet machine; the thresholds in `bptt_jax/_figures.py` are where these ratios cross 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax

from bptt_jax import Remat, Repeat, Steps
from bptt_jax._bench.cells import CELLS
from bptt_jax._bench.peers import compare, compile_program, ours
from bptt_jax._caches import forget_everything
from bptt_jax._device import machine
from bptt_jax.plans._nodes import Plan

BATCHES = (1, 4, 16, 64, 128)
WIDTHS = (64, 128, 256, 512, 1024)
LARGEST = 1 << 16  # features of all examples
PLANS = {"no budget": Steps(96), "recomputed": Repeat(4, Remat(Steps(24)))}
# A decision: the figures of `DeviceFigures` that force it to be taken, those that force it not to be, and the cell.
DECISIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "features": ({"hoisting": 0.0}, {"hoisting": math.inf}, "lstm"),
    "deferred gradients": ({"stacking": 0.0}, {"stacking": math.inf}, "lstm"),
    "merged products": ({"merged_rows": 0}, {"merged_rows": 1 << 62, "merged_flops": -1}, "flax-gru"),
}


def ratio(decision: str, batch: int, width: int, plan: Plan, seconds: float) -> float:
    """The time of a gradient with a decision taken, of that without it."""
    taken, not_taken, cell = DECISIONS[decision]
    cpu, programs = machine.CPU, []
    problem = CELLS[cell](batch, width)
    try:
        for figures in (taken, not_taken):
            machine.CPU = dataclasses.replace(cpu, **figures)
            jax.clear_caches()
            forget_everything()
            programs.append(compile_program("", ours(plan=plan), problem, problem.xs(96)))
    finally:
        machine.CPU = cpu
        forget_everything()
    return compare([programs[0]], programs[1], seconds).ratios[0]


def lines(seconds: float) -> Iterator[str]:
    """A Markdown table: a line for each size."""
    columns = list(itertools.product(DECISIONS, PLANS))
    yield f"| batch, width | {' | '.join(f'{decision}, {plan}' for decision, plan in columns)} |"
    yield f"|{'---|' * (len(columns) + 1)}"
    for batch, width in itertools.product(BATCHES, WIDTHS):
        if batch * width <= LARGEST:
            ratios = [ratio(decision, batch, width, PLANS[plan], seconds) for decision, plan in columns]
            yield f"| {batch}, {width} | {' | '.join(f'{one:.2f}' for one in ratios)} |"
