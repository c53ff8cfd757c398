"""A scan as `jax.lax.scan` runs it: forwards, and with all residuals where its gradient is asked for."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from jax import lax

from bptt_jax._jaxprs.types import Tree
from bptt_jax._lower.by_index import steps_of
from bptt_jax._lower.counting import Counting
from bptt_jax._lower.loop import unroll_of
from bptt_jax._lower.nested import lower
from bptt_jax._trace.call import Arrays, ScanCall
from bptt_jax.plans._blocks import in_blocks
from bptt_jax.plans._nodes import Steps

_BLOCKS = 25  # the fewest blocks of a scan that reports its progress: each report is between two


def run(call: ScanCall, inputs: Arrays) -> list[Any]:
    """The last carry and ys of a call."""
    return _run(call, inputs, [False] * len(call.x_along))


def evaluate(call: ScanCall, inputs: Arrays) -> list[Any]:
    """The same, where nothing is differentiated: xs are read where they are.

    On accelerators they are brought into order as a whole, because one kernel does it.
    """
    is_cpu = call.options.machine.is_cpu
    return _run(call, inputs, [is_cpu and not along.is_leading for along in call.x_along])


def _run(call: ScanCall, inputs: Arrays, by_index: Sequence[bool]) -> list[Any]:
    operands, init, _ = call.step.split(inputs)
    step, over = steps_of(call, inputs, tuple(by_index))

    def body(carry: Tree, x: Tree) -> Any:
        return step(operands, carry, x)

    lengths, progress = call.lengths_of(inputs), call.reporting("forward")
    if progress.label is None:
        carry: Arrays
        ys: Arrays
        carry, ys = lax.scan(body, list(init), over, call.length, call.reverse, unroll_of(call, call.length))
    else:
        blocks = in_blocks(Steps(call.length), max(call.length // _BLOCKS, 1))
        unroll = functools.partial(unroll_of, call)
        run = lower(blocks, step, reverse=call.reverse, unroll=unroll, counting=Counting(progress))
        carry, ys = run(operands, list(init), over)
        progress.end([*carry, *ys])
    return [*carry, *(along.back(leaf, lengths) for leaf, along in zip(ys, call.y_along, strict=True))]
