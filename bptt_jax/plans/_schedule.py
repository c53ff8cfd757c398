"""The schedule of a plan: the events of a scan's gradient under it, in order.

Positions count carries: position i is the carry entering step i. Ranges are half-open. In both lowerings a `Remat`
first runs its child and keeps only the carry entering it. When the backward pass arrives there, the child runs once
more, and its own kept values are saved. The nest runs it to its end this time too. The sweep does not advance the last
of the rematerialised parts, because nothing reads the carry behind it.

Complexity: linear in the number of events, the size of the unrolled tree. They are generated lazily on a stack.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from bptt_jax.plans._nodes import Chain, Memory, Plan, Remat, Repeat, Steps, brief, length, require_plan
from bptt_jax.plans._profile import Lowering


@dataclasses.dataclass(frozen=True)
class Advance:
    """Evaluate steps start..stop−1 and keep nothing of them but the last carry.

    >>> Advance(0, 3) in simulate(Repeat(2, Remat(Steps(3))))
    True
    """

    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Save:
    """Keep the carry at `position`, in a memory.

    >>> Save(3) in simulate(Repeat(2, Remat(Steps(3))))
    True
    """

    position: int
    memory: Memory = "device"
    __repr__ = brief


@dataclasses.dataclass(frozen=True)
class Restore:
    """Go back to the kept carry at `position`, in a memory.

    >>> Restore(3) in simulate(Repeat(2, Remat(Steps(3))))
    True
    """

    position: int
    memory: Memory = "device"
    __repr__ = brief


@dataclasses.dataclass(frozen=True)
class Record:
    """Evaluate steps start..stop−1 and keep their residuals, in a memory.

    >>> Record(3, 6) in simulate(Repeat(2, Remat(Steps(3))))
    True
    """

    start: int
    stop: int
    memory: Memory = "device"
    __repr__ = brief


@dataclasses.dataclass(frozen=True)
class Backward:
    """Take steps stop−1, ..., start backwards and free their residuals, in a memory.

    >>> Backward(3, 6) in simulate(Repeat(2, Remat(Steps(3))))
    True
    """

    start: int
    stop: int
    memory: Memory = "device"
    __repr__ = brief


@dataclasses.dataclass(frozen=True)
class Free:
    """Drop the kept carry at `position`, in a memory.

    >>> Free(3) in simulate(Repeat(2, Remat(Steps(3))))
    True
    """

    position: int
    memory: Memory = "device"
    __repr__ = brief


Event = Advance | Save | Restore | Record | Backward | Free


def simulate(plan: Plan, lowering: Lowering = "nested") -> Iterator[Event]:
    """The events of a scan's gradient under `plan`, one by one.

    Args:
      plan: the plan.
      lowering: "nested", or "sweep" as `StepProfile.lowering` says.

    Raises:
      TypeError: if `plan` is not a plan.
      ValueError: if the lowering is unknown. Both are raised when the first event is asked for.

    >>> for event in simulate(Repeat(2, Remat(Steps(3)))):
    ...     print(event)
    Save(position=0)
    Advance(start=0, stop=3)
    Save(position=3)
    Advance(start=3, stop=6)
    Restore(position=3)
    Record(start=3, stop=6)
    Backward(start=3, stop=6)
    Free(position=3)
    Restore(position=0)
    Record(start=0, stop=3)
    Backward(start=0, stop=3)
    Free(position=0)
    """
    require_plan(plan, "the argument of simulate")
    if lowering not in ("nested", "sweep"):
        raise ValueError(f'lowering={lowering!r} is unknown; there are "nested" and "sweep".')
    backward = _backward if lowering == "nested" else _sweep_backward
    # A stack: the last is the next.
    todo: list[_Task] = [(backward, plan, 0, "device"), (_forward, plan, 0, "device")]
    while todo:
        match todo.pop():
            case (expand, node, start, memory):
                todo.extend(reversed(expand(node, start, memory)))
            case event:
                yield event


_Expand = Callable[[Plan, int, Memory], "list[_Task]"]
_Task = Event | tuple[_Expand, Plan, int, Memory]


def _forward(node: Plan, start: int, memory: Memory) -> list[_Task]:
    match node:
        case Steps(0):
            return []
        case Steps(n):
            return [Record(start, start + n, memory)]
        case Remat(child):
            return [Save(start, memory), Advance(start, start + length(child))] if length(child) else []
    return _of_children(_forward, node, start, memory)


def _backward(node: Plan, start: int, memory: Memory) -> list[_Task]:
    return _backward_by(_backward, _forward, node, start, memory)


def _sweep_backward(node: Plan, start: int, memory: Memory) -> list[_Task]:
    return _backward_by(_sweep_backward, _revisit, node, start, memory)


def _backward_by(back: _Expand, again: _Expand, node: Plan, start: int, memory: Memory) -> list[_Task]:
    match node:
        case Steps(0):
            return []
        case Steps(n):
            return [Backward(start, start + n, memory)]
        case Remat(child):
            if not length(child):
                return []
            inside: list[_Task] = [(again, child, start, "device"), (back, child, start, "device")]
            return [Restore(start, memory), *inside, Free(start, memory)]
    return _of_children(back, node, start, memory)[::-1]


def _revisit(node: Plan, start: int, memory: Memory) -> list[_Task]:
    """The second run of a node in the sweep, which saves its kept values.

    It ends before the last rematerialised part, because nothing reads the carry behind it.
    """
    match node:
        case Remat(child):
            return [Save(start, memory)] if length(child) else []
        case Repeat(_, Remat()) | Chain():
            *before, (_, last, at, _) = _of_children(_forward, node, start, memory)
            return [*before, (_revisit, last, at, memory)]
    return _forward(node, start, memory)


def _of_children(expand: _Expand, node: Plan, start: int, memory: Memory) -> list[Any]:
    """A task for each child of a Repeat or Chain beginning at `start`, each with its own start and memory."""
    match node:
        case Repeat(k, child, kept):
            # The values of the last child stay on the device.
            of_loop: list[Memory] = [kept if kept == "host" else memory] * (k - 1) + [memory]
            return [(expand, child, start + i * length(child), where) for i, where in enumerate(of_loop)]
        case Chain(children):
            starts = itertools.accumulate((length(child) for child in children), initial=start)
            return [(expand, child, at, memory) for child, at in zip(children, starts, strict=False)]
    raise TypeError(f"not a plan node: {node!r}")
