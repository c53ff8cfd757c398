"""Every number that was fitted to a compiler or a device, not derived: value, unit, reason, and the case that binds it.

Bytes decide how near an estimate is, so how many programs are compiled until one holds; XLA's own figure for the
compiled program is the promise, not they. Times decide which of two plans is taken to be faster. `python -m tests.fit`
derives bytes, the times of an LSTM's parts, and what taking products out of loops gains; the other times are judged, as
is said beside them. The values are of JAX 0.10.2 on two CPU cores.
"""

from __future__ import annotations

import dataclasses

# Bytes

# Bytes of counters of loops, whatever the step. Binds: `tiny`, a carry of 256 bytes.
COUNTER_BYTES = 256
# XLA's line of memory on CPU, which an array takes whole, however small. Binds: a carry of one number.
LINE_BYTES = 64
# The share that an estimate that is not verified may be too low, stated in the documentation of `scan`. Binds: the
# smallest budgets of attention and of wide outputs, which it does not cover (up to 1.6), as is stated too.
ESTIMATE_MARGIN = 0.15
# The share by which, on accelerators, a whole program with a loss in it takes more than the gradient by itself. Binds:
# a GRU (16, 256) with resets for an H100, at 3 % of Flax's bytes, with the last carry in the loss: 8 %.
ACCELERATOR_SPARE = 0.1
# A budget is so many times the estimate, and twice what one step makes, where nothing is compiled because everything
# plainly fits. Binds: a product with a weight and with its transpose, of which everything kept takes 1.33.
CERTAINLY_FITS = 1.5

# Times, relative to a step that is advanced in the sweep; a block's products count as some steps. Binds: LSTM
# (16, 256) on CPU.
SWEEP_TIMES = {"forward": 1.0, "recording": 1.2, "backward": 1.6, "block": 2.0}
# Merged products, of weights that share an operand, and products that are taken one at a time. Judged by the same LSTM.
MERGED_TIMES = SWEEP_TIMES | {"backward": 1.3}
IN_TURN_TIMES = SWEEP_TIMES | {"backward": 2.1}
# What the second block of a plan for the sweep has to gain, and each further one, as a share of the gradient's time: it
# is one more body to compile, with its backward, and with two of them compiling takes up to three times lax.scan's.
# Judged.
SECOND_BODY, FURTHER_BODY = 0.002, 0.02


@dataclasses.dataclass(frozen=True)
class DeviceFigures:
    """Rough figures of a kind of device, by which products are taken out of loops.

    Attributes:
      launch_bytes: the bytes that could be moved while a kernel is launched.
      stacking: cost of a byte that is written at one step and read for the block, relative to one of a weight.
      hoisting: the same for a byte that is written for the block and read at one step.
      merged_flops: operations of a product below which several are better run as one.
      cache_bytes: the size that the arrays of a block should fit in.
    """

    launch_bytes: int
    stacking: float
    hoisting: float
    merged_flops: int
    cache_bytes: int


# Binds: LSTM and GRU of batches 1 to 64 and widths 32 to 512 (`python -m bptt_jax bench`).
CPU = DeviceFigures(launch_bytes=1 << 14, stacking=5.0, hoisting=40.0, merged_flops=1 << 19, cache_bytes=6 << 20)
# Not timed on an accelerator: launches dominate, so fewer are better in any case.
ACCELERATOR = DeviceFigures(
    launch_bytes=1 << 22, stacking=1.0, hoisting=1.0, merged_flops=1 << 28, cache_bytes=32 << 20
)
# Steps of a block, at least and at most; longer ones gained nothing at any size.
SHORTEST_BLOCK, LONGEST_BLOCK = 8, 48
