"""The optimum by trying everything: a shortest path through all contents of memory.

A state is the register (one carry, or nothing), the kept carries, the kept residuals, and the number of steps whose
backward is still to come. Evaluating a step costs 1, everything else is free: to keep the register, to drop an item,
to take a carry back from an item that contains it, to take the last step backwards when its residuals are kept.
Instead of being kept, the residuals of the last step may come from an evaluation right before its backward.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

State = tuple[int, int, int, int]  # register (−1: nothing), carries and residuals as bits, steps to come


@dataclasses.dataclass(frozen=True)
class Memory:
    """How much there is, and what is counted: a size of None says that such items cannot be kept."""

    units: int
    carry: int | None
    residual: int | None
    holds_leaving: bool
    first_is_free: bool
    counts_worked_on: bool


def fewest_evaluations(length: int, memory: Memory) -> int | None:
    """The length of the shortest path, None if there is none.

    >>> fewest_evaluations(3, Memory(0, 1, 1, False, True, False))
    6
    """
    first: State = (0, 0 if memory.first_is_free or memory.carry is None else 1, 0, length)
    todo: collections.deque[tuple[int, State]] = collections.deque([(0, first)])
    done: set[State] = set()
    while todo:
        count, state = todo.popleft()
        if state in done:
            continue
        done.add(state)
        if state[3] == 0:
            return count
        for price, after in _moves(state, memory):
            if after not in done and _fits(after, memory):
                (todo.append if price else todo.appendleft)((count + price, after))
    return None


def _moves(state: State, memory: Memory) -> Iterator[tuple[int, State]]:
    register, carries, residuals, left = state
    last = left - 1
    for position in range(left):
        if (carries >> position) & 1:
            yield 0, (register, carries & ~(1 << position), residuals, left)
        if (residuals >> position) & 1 and position != last:
            yield 0, (register, carries, residuals & ~(1 << position), left)
        if position != register and _can_restore(position, carries, residuals, memory):
            yield 0, (position, carries, residuals, left)
    below = (1 << last) - 1
    if (residuals >> last) & 1:
        yield 0, (register if register < last else -1, carries & below, residuals & below, last)
    if register < 0:
        return
    if memory.carry is not None and register < left:
        yield 0, (register, carries | 1 << register, residuals, left)
    if register < last:
        yield 1, (register + 1, carries, residuals, left)
    if memory.residual is not None and register < left:
        yield 1, (register + 1, carries, residuals | 1 << register, left)
    if register == last and not memory.counts_worked_on:
        yield 1, (-1, carries & below, residuals & below, last)


def _can_restore(position: int, carries: int, residuals: int, memory: Memory) -> bool:
    leaves = memory.holds_leaving and position > 0 and (residuals >> (position - 1)) & 1
    given = memory.first_is_free and position == 0
    return bool(given or (carries >> position) & 1 or (residuals >> position) & 1 or leaves)


def _fits(state: State, memory: Memory) -> bool:
    _, carries, residuals, _ = state
    held = carries.bit_count() * (memory.carry or 0) + residuals.bit_count() * (memory.residual or 0)
    return held <= memory.units
