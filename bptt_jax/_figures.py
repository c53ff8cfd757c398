"""Fitted numbers: each one fitted to a compiler or a device, not derived, with its unit, reason and binding case.

Bytes decide how near an estimate is, so how many programs are compiled until one holds. They promise nothing: the
promise is XLA's own figure for the compiled program. Times decide between plans: the one predicted to be faster is
taken. `python -m tests.fit` derives the bytes, the times of an LSTM's parts, and the gain of taking products out of
loops. The other times are judged, and the comments beside them say so. The values were fitted with JAX 0.10.2 on two
CPU cores.
"""

from __future__ import annotations

import dataclasses

# Bytes

# Bytes of the loops' counters, for any step. Binds: `tiny` of tests/audit/kinds.py, with a carry of 256 bytes.
COUNTER_BYTES = 256
# Bytes of XLA's line of memory on CPU: even the smallest array takes a whole line. Binds: a carry of one number.
LINE_BYTES = 64
# Share: the margin of an estimate without a check, as documented in `scan`. Binds: the smallest budgets of attention
# and of wide outputs, up to 1.6 times the estimate. The margin does not cover these, and `scan` promises nothing there.
ESTIMATE_MARGIN = 0.15
# Share: on accelerators, a whole program with a loss in it may take this much more than the gradient by itself. Binds:
# a GRU (16, 256) with resets for an H100, at 3 % of Flax's bytes, with the last carry in the loss: 8 %.
ACCELERATOR_SPARE = 0.1
# Ratio: nothing is compiled where the budget is this many times the estimate for everything kept, with twice the bytes
# made by one step added, because everything plainly fits. Binds: a product with a weight and with its transpose, where
# everything kept takes 1.33 times the estimate.
CERTAINLY_FITS = 1.5
# Bytes: smaller budgets are always checked, because loops of random bits and counters are in no estimate. Binds: step
# 1007 of tests/support/random_steps.py, of single numbers, where everything kept takes 5,700 bytes for 2,939 predicted.
CHECKED_BYTES = 1 << 16

# Count: reports of progress in one pass through a scan. A callback takes about a millisecond beside other work. Binds:
# an LSTM (16, 256) of 2,000 steps, whose gradient takes 1.8 seconds: 50 reports in each pass take 4 to 7 % more, 10
# take less than 1 % (`python -m pytest tests/bench/test_progress.py -s -o addopts=""`).
REPORTS = 10

# Times, relative to one advanced step of the sweep; a block's products count as 2 steps. Binds: LSTM (16, 256) on CPU.
SWEEP_TIMES = {"forward": 1.0, "recording": 1.2, "backward": 1.6, "block": 2.0}
# The same for merged products, of weights sharing an operand, and for products taken one at a time. Judged by the same
# LSTM.
MERGED_TIMES = SWEEP_TIMES | {"backward": 1.3}
IN_TURN_TIMES = SWEEP_TIMES | {"backward": 2.1}
# Ratio: the time of a step where products of x are not taken out of the loop, though they could be. Binds: LSTM and GRU
# (16, 256) on CPU.
WITHOUT_FEATURES = 1.08
# The same on accelerators, in launches: an advanced step launches 2.25 kernels, a recorded one 2.75 and its backward
# 3.75, with four steps in an iteration; a block launches 6 to 15 beside its steps. Products taken one at a time are
# loops of their own. Binds: LSTM (16, 256) for an H100 (`python -m pytest tests/bench/test_launches_h100.py`).
ACCELERATOR_TIMES = {"forward": 1.0, "recording": 1.2, "backward": 1.7, "block": 5.0}
ACCELERATOR_IN_TURN_TIMES = ACCELERATOR_TIMES | {"block": 9.0}
# Bytes moved between a device and its host in the time of an advanced step whose kernels are no longer than their
# launches: 9 microseconds at 55 GB/s, as PCIe 5.0 has. Judged; nothing was timed on a device with a host of its own.
HOST_BYTES = 1 << 19
# Shares of the gradient's time: the gain demanded of each further block of a plan for the sweep, of a length that
# another has, and of another length. Each is a body more to compile, with its backward, and the second kind more so:
# on CPU, XLA makes machine code once for equal kernels. Judged (`tests/bench/test_peers.py -k compile_time`).
SECOND_BODY, OTHER_BODY = 0.002, 0.03


@dataclasses.dataclass(frozen=True)
class DeviceFigures:
    """Rough figures of a kind of device, to decide on taking products out of loops.

    Attributes:
      launch_bytes: the bytes moved in the time of one kernel launch.
      stacking: cost of a byte written at one step and read for the whole block, relative to a byte of a weight.
      hoisting: the same for a byte written for the whole block and read at one step.
      merged_flops: operations of a product; up to this size several products are better run as one.
      merged_rows: rows of their common operand from which products are better run as one, whatever their size.
      cache_bytes: the bytes in which the arrays of a block should fit.
      longest_block: steps of a block, at most.
    """

    launch_bytes: int
    stacking: float
    hoisting: float
    merged_flops: int
    merged_rows: int
    cache_bytes: int
    longest_block: int


# Each decision forced both ways over batches of 1 to 128 and widths of 64 to 1024 (`python -m tests.fit --grid`), as
# ratios of times of an LSTM's gradient, of a GRU's for merging:
#   features            0.6 to 1.0 for a batch up to 16; 1.05 to 1.15 for (64, 64) to (64, 256), 0.98 for (64, 512)
#   deferred gradients  0.4 to 1.0 for a batch up to 16; 1.1 to 1.25 for (64, 64) and (64, 128), 1.05 for (64, 512)
#   merged products     0.75 to 1.0 for a batch of 16 or more, 1.07 for (16, 1024); 0.7 to 1.3 for fewer rows
# `hoisting` lies between (16, 64) and (64, 256), `stacking` takes what gains, but for a tenth at (16, 64).
CPU = DeviceFigures(
    launch_bytes=1 << 14,
    stacking=5.0,
    hoisting=4.4,
    merged_flops=1 << 19,
    merged_rows=16,
    cache_bytes=6 << 20,
    longest_block=48,
)
# Not timed on an accelerator: launches dominate, so fewer are better in any case.
ACCELERATOR = DeviceFigures(
    launch_bytes=1 << 22,
    stacking=1.0,
    hoisting=1.0,
    merged_flops=1 << 28,
    merged_rows=1 << 30,
    cache_bytes=32 << 20,
    longest_block=128,
)
# Bytes of a weight from which the product for its gradient is taken in a loop over the halves of a block, where
# products run one after another; for less the loop is not worth its launches. Judged.
LARGE_BYTES = 1 << 15
# Steps of a block, at least; shorter ones gain little from products over them. Judged.
SHORTEST_BLOCK = 8
# Bytes of a block's arrays, at least, for each byte of the gradients that are added once a block. Judged by an LSTM
# (32, 512) on CPU, which would have blocks of 8 steps otherwise.
BYTES_TO_ADD = 4
# Steps of an iteration of the innermost loops, where each kernel is a launch. Twice as many launch a tenth fewer
# kernels, and compiling takes twice as long. Binds: LSTM (16, 256) for an H100.
MOST_TOGETHER = 4
# Launches' worth of bytes moved by a step from which its kernels outlast their launches. Judged.
LARGE_STEP = 8
# Equations of a loop's body up to which several steps go into it, because each is compiled. Judged.
MOST_EQUATIONS = 1024
