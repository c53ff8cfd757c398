"""Steps of a nest counted and reported: their number is the last leaf of the carry.

`jax.checkpoint` traces its function once, so a count cannot be kept beside the nest. Forward, some steps report before
they are run. The callbacks of a first pass run nowhere else (see `differentiated`). Backward, the cotangents of these
steps report when they come to them, by the rule of an identity behind the steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from bptt_jax._progress.report import SILENT, Pass, marking_backward
from bptt_jax._trace.active import Active
from bptt_jax._trace.call import Arrays, replace, select

Run = Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays]]
_FINE = 20  # the fewest reports in a pass where blocks are not cut for it


@dataclasses.dataclass(frozen=True, eq=False)
class Counting:
    """The steps of a nest, counted in its carry.

    Attributes:
      forward, backward: the passes.
      active: the leaves that a derivative goes through; None where nothing is differentiated.
    """

    forward: Pass
    backward: Pass = SILENT
    active: Active | None = None

    def leaf(self, n: int, step: Run, loop: Callable[[int, Run], Run], in_loop: bool) -> Run:
        """A loop over n steps, with the count behind its carry.

        It reports as a whole, or step by step where it is too long for this or in no loop itself: outside of loops XLA
        would call back before everything else.
        """
        if in_loop and n * _FINE <= self.forward.length:
            return self._count(n, loop(n, step))
        return loop(n, self._count(1, step, reports=n > 1 or in_loop))

    def _count(self, n: int, run: Run, reports: bool = True) -> Run:

        def counted(operands: Arrays, carry: Arrays, x: Arrays) -> tuple[Arrays, Arrays]:
            carry, done = carry[:-1], carry[-1]
            if reports:
                self.forward.before_counted(done, n)
            carry, y = run(operands, carry, x)
            if reports:
                carry, y = self._marked(carry, y, done, n)
            return [*carry, done + n], y

        return counted

    def counted(self, run: Run) -> Run:
        """A nest that counts, as one with the carry of the user's."""

        def whole(operands: Arrays, carry: Arrays, xs: Arrays) -> tuple[Arrays, Arrays]:
            carry, ys = run(operands, [*carry, self.forward.count()], xs)
            return carry[:-1], ys

        return whole

    def _marked(self, carry: Arrays, y: Arrays, done: Any, n: int) -> tuple[Arrays, Arrays]:
        if self.active is None or self.backward.label is None:
            return carry, y
        mark = marking_backward(self.backward, n)
        if any(self.active.carry):
            return replace(carry, self.active.carry, mark(select(carry, self.active.carry), done)), y
        return carry, replace(y, self.active.y, mark(select(y, self.active.y), done))
