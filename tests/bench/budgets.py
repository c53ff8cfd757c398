"""The cells and sizes of the project's record, and what "5 %" is in it."""

import functools

from jax import lax

from bptt_jax._bench.cells import CELLS, OTHER_SIZES
from bptt_jax._bench.peers import compile_program

RNN_CELLS = ("lstm", "flax-lstm", "flax-optimized-lstm", "flax-gru")
RNN_SIZES = ((1, 256), (16, 256), (64, 128), (32, 512))


def sizes(cell: str) -> tuple[tuple[int, int], ...]:
    """(batch, width) that a cell is measured at."""
    return RNN_SIZES if cell in RNN_CELLS else (OTHER_SIZES[cell],)


@functools.cache
def lax_scan_bytes(cell: str, batch: int, width: int, length: int) -> int:
    """The temporaries of the gradient by `lax.scan`."""
    problem = CELLS[cell](batch, width)
    return compile_program("lax.scan", lax.scan, problem, problem.xs_shape(length)).temp_bytes


def budget_bytes(cell: str, batch: int, width: int, length: int, percent: float) -> int:
    """What so many per cent of `lax.scan`'s temporaries at this length are, in bytes.

    No plan can shrink the part that does not grow with the length: `lax.scan`'s temporaries at T = 0 by the line
    through T = 100 and T = 1000, and one set of weight gradients. Where it is more than three quarters of the figure,
    it comes on top.
    """
    figure = percent / 100 * lax_scan_bytes(cell, batch, width, length)
    short, long = (lax_scan_bytes(cell, batch, width, steps) for steps in (100, 1000))
    fixed = short - (long - short) / 900 * 100 + CELLS[cell](batch, width).param_bytes
    return int(figure + (fixed if fixed > 0.75 * figure else 0))
