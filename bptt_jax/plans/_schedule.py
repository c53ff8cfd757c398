"""The schedule of a plan: the events of a scan's gradient under it, in order.

Positions count carries: position i is the carry entering step i. Ranges are half-open. In both lowerings a `Remat`
first runs its child and keeps only the carry entering it. When the backward pass arrives there, the child runs once
more, and its own kept values are saved. The nest runs it to its end this time too. The sweep does not advance the last
of the rematerialised parts, because nothing reads the carry behind it.

Complexity: linear in the number of events, the size of the unrolled tree. They are generated lazily on a stack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from bptt_jax.plans._nodes import Chain, Plan, Remat, Repeat, Steps, length, require_plan
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
    """Keep the carry at `position`.

    >>> Save(3) in simulate(Repeat(2, Remat(Steps(3))))
    True
    """

    position: int


@dataclasses.dataclass(frozen=True)
class Restore:
    """Go back to the kept carry at `position`.

    >>> Restore(3) in simulate(Repeat(2, Remat(Steps(3))))
    True
    """

    position: int


@dataclasses.dataclass(frozen=True)
class Record:
    """Evaluate steps start..stop−1 and keep their residuals.

    >>> Record(3, 6) in simulate(Repeat(2, Remat(Steps(3))))
    True
    """

    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Backward:
    """Take steps stop−1, ..., start backwards and free their residuals.

    >>> Backward(3, 6) in simulate(Repeat(2, Remat(Steps(3))))
    True
    """

    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Free:
    """Drop the kept carry at `position`.

    >>> Free(3) in simulate(Repeat(2, Remat(Steps(3))))
    True
    """

    position: int


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
    todo: list[_Task] = [(backward, plan, 0), (_forward, plan, 0)]  # a stack: the last is the next
    while todo:
        match todo.pop():
            case (expand, node, start):
                todo.extend(reversed(expand(node, start)))
            case event:
                yield event


_Task = Event | tuple[Callable[[Plan, int], "list[_Task]"], Plan, int]


def _forward(node: Plan, start: int) -> list[_Task]:
    match node:
        case Steps(0):
            return []
        case Steps(n):
            return [Record(start, start + n)]
        case Remat(child):
            return [Save(start), Advance(start, start + length(child))] if length(child) else []
    return [(_forward, child, at) for child, at in _placed(node, start)]


def _backward(node: Plan, start: int) -> list[_Task]:
    match node:
        case Steps(0):
            return []
        case Steps(n):
            return [Backward(start, start + n)]
        case Remat(child):
            if not length(child):
                return []
            return [Restore(start), (_forward, child, start), (_backward, child, start), Free(start)]
    return [(_backward, child, at) for child, at in reversed(_placed(node, start))]


def _sweep_backward(node: Plan, start: int) -> list[_Task]:
    match node:
        case Steps():
            return _backward(node, start)
        case Remat(child):
            if not length(child):
                return []
            return [Restore(start), (_revisit, child, start), (_sweep_backward, child, start), Free(start)]
    return [(_sweep_backward, child, at) for child, at in reversed(_placed(node, start))]


def _revisit(node: Plan, start: int) -> list[_Task]:
    """The second run of a node in the sweep, which saves its kept values.

    It ends before the last rematerialised part, because nothing reads the carry behind it.
    """
    match node:
        case Remat(child):
            return [Save(start)] if length(child) else []
        case Repeat(_, Remat()) | Chain():
            *before, (last, at) = _placed(node, start)
            return [*((_forward, child, place) for child, place in before), (_revisit, last, at)]
    return _forward(node, start)


def _placed(node: Plan, start: int) -> list[tuple[Plan, int]]:
    """The children of a Repeat or Chain beginning at `start`, each with its own start."""
    match node:
        case Repeat(k, child):
            return [(child, start + i * length(child)) for i in range(k)]
        case Chain(children):
            placed = []
            for child in children:
                placed.append((child, start))
                start += length(child)
            return placed
    raise TypeError(f"not a plan node: {node!r}")
