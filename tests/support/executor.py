"""An executor of schedules that knows no planning: it does what the events say and checks that it can be done.

It knows nothing of plans, trees or loops. After each event it has checked that

* what is used is there: the carry in the register for an evaluation, a kept carry for a restore, the residuals of a
  step for its backward;
* each step is recorded once for its backward, and the backward runs from the last step to the first;
* at the end everything has been freed;

and it has counted the memory held, of the device and of the host: what is kept in one is not to be found in the other.
An item is counted once: a carry is named by its position, however many times it
has been saved. What the residuals of a step contain need not be held beside them.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
from collections.abc import Iterable

from bptt_jax.plans import Advance, Backward, Event, Free, Record, Restore, Save
from bptt_jax.plans._nodes import Memory


class ScheduleError(AssertionError):
    """An event that cannot be executed."""


@dataclasses.dataclass(frozen=True)
class Items:
    """What is counted, and in which units.

    Attributes:
      carry: a kept carry.
      residual: the residuals of one step.
      holds_entering, holds_leaving: whether those contain the carry before, and the one after their step.
      first_is_free: whether the carry before the first step is given, and not counted.
    """

    carry: int
    residual: int
    holds_entering: bool = True
    holds_leaving: bool = False
    first_is_free: bool = False


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a schedule took: evaluations of the step, and the units held at the most, on the device and on the host."""

    forward_steps: int
    peak_units: int
    host_units: int = 0


def execute(
    events: Iterable[Event], length: int, items: Items, budget: int | None = None, host_budget: int | None = None
) -> Ran:
    """Run the events of a gradient over `length` steps.

    >>> from bptt_jax.plans import parse, simulate
    >>> execute(simulate(parse("(2*[3] + 3)")), 9, Items(carry=1, residual=10))
    Ran(forward_steps=15, peak_units=32, host_units=0)
    >>> execute(simulate(parse("(2@[3] + 3)")), 9, Items(carry=1, residual=10))
    Ran(forward_steps=15, peak_units=31, host_units=1)
    """
    machine = _Machine(length, items, {"device": budget, "host": host_budget})
    for event in events:
        machine.run(event)
    machine.finish()
    return Ran(machine.forward_steps, machine.peak["device"], machine.peak["host"])


class _Machine:
    def __init__(self, length: int, items: Items, budgets: dict[Memory, int | None]):
        self._items = items
        self._budgets = budgets
        self._register: int | None = 0
        self._saved: collections.Counter[tuple[int, Memory]] = collections.Counter()
        self._starts: list[int] = []  # of blocks of kept residuals, ascending, disjoint
        self._stops: list[int] = []
        self._where: list[Memory] = []
        self._kept_steps: dict[Memory, int] = {"device": 0, "host": 0}
        self._next_backward = length
        self.forward_steps = 0
        self.peak: dict[Memory, int] = {"device": 0, "host": 0}

    def run(self, event: Event) -> None:
        match event:
            case Advance(start, stop):
                self._forward(start, stop)
            case Record(start, stop, memory):
                self._forward(start, stop)
                self._keep_residuals(start, stop, memory)
            case Backward(start, stop, memory):
                self._backward(start, stop, memory)
            case Save(position, memory):
                self._require(self._register == position, event, f"the register holds {self._register}")
                self._saved[position, memory] += 1
            case Restore(position, memory):
                self._require(self._saved[position, memory] > 0, event, "that carry is not kept there")
                self._register = position
            case Free(position, memory):
                self._require(self._saved[position, memory] > 0, event, "that carry is not kept there")
                self._saved[position, memory] -= 1
                if not self._saved[position, memory]:
                    del self._saved[position, memory]
        for memory in self._budgets:
            self._account(event, memory)

    def finish(self) -> None:
        self._require(self._next_backward == 0, None, f"steps before {self._next_backward} had no backward")
        self._require(not self._saved and not self._starts, None, "something is still held")

    def _forward(self, start: int, stop: int) -> None:
        self._require(self._register == start, (start, stop), f"the register holds {self._register}")
        self._require(start < stop <= self._next_backward, (start, stop), "there is no such step to evaluate")
        self._register = stop
        self.forward_steps += stop - start

    def _keep_residuals(self, start: int, stop: int, memory: Memory) -> None:
        after = not self._stops or self._stops[-1] <= start
        self._require(after, (start, stop), "a step is recorded a second time, or out of order")
        self._starts.append(start)
        self._stops.append(stop)
        self._where.append(memory)
        self._kept_steps[memory] += stop - start

    def _backward(self, start: int, stop: int, memory: Memory) -> None:
        self._require(stop == self._next_backward, (start, stop), f"the backward is at {self._next_backward}")
        while self._next_backward > start:
            there = bool(self._stops) and self._stops[-1] == self._next_backward and self._starts[-1] >= start
            self._require(there and self._where.pop() == memory, (start, stop), "the residuals are not kept there")
            self._next_backward = self._starts.pop()
            self._kept_steps[memory] -= self._stops.pop() - self._next_backward
        self._register = None

    def _account(self, event: Event, memory: Memory) -> None:
        carries = sum(self._is_counted(position, memory) for position, where in self._saved if where == memory)
        held = carries * self._items.carry + self._kept_steps[memory] * self._items.residual
        self.peak[memory] = max(self.peak[memory], held)
        budget = self._budgets[memory]
        if budget is not None:
            self._require(held <= budget, event, f"{held} units are held, {budget} are allowed on the {memory}")

    def _is_counted(self, position: int, memory: Memory) -> bool:
        if position == 0 and self._items.first_is_free:
            return False
        enters = self._items.holds_entering and self._is_recorded(position, memory)
        leaves = self._items.holds_leaving and self._is_recorded(position - 1, memory)
        return not (enters or leaves)

    def _is_recorded(self, step: int, memory: Memory) -> bool:
        at = bisect.bisect_right(self._starts, step) - 1
        return at >= 0 and step < self._stops[at] and self._where[at] == memory

    def _require(self, holds: bool, event: object, otherwise: str) -> None:
        if not holds:
            raise ScheduleError(f"{event}: {otherwise}.")
