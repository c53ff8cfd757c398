"""Reports of progress, recorded instead of drawn."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from bptt_jax._progress import display
from bptt_jax.plans._nodes import Chain, Remat, Repeat, Steps


class Recorder:
    """In the place of all bars: a list of (label, direction, total, done)."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, str, int, int]] = []

    def report(self, *one: Any) -> None:
        self.reports.append(one)

    def done(self, direction: str, label: str | None = None) -> list[int]:
        """The steps done, in the order of the reports."""
        return [done for name, way, _, done in self.reports if way == direction and label in (None, name)]


@contextlib.contextmanager
def recorded() -> Iterator[Recorder]:
    """Records the reports of all programs that run meanwhile."""
    recorder, before = Recorder(), display._bars
    display._bars = recorder
    try:
        yield recorder
        jax.effects_barrier()
    finally:
        display._bars = before


def leaves(plan: Any, start: int = 0) -> list[tuple[int, int]]:
    """The blocks of a plan as (first step, number of steps), from the first to the last."""
    match plan:
        case Steps(n):
            return [(start, n)]
        case Remat(child):
            return leaves(child, start)
        case Repeat(k, child):
            one = leaves(child, 0)
            size = sum(n for _, n in one)
            return [(start + i * size + at, n) for i in range(k) for at, n in one]
        case Chain(children):
            found: list[tuple[int, int]] = []
            for child in children:
                found += leaves(child, start + sum(n for _, n in found))
            return found
    raise TypeError(plan)


def expected(blocks: Sequence[tuple[int, int]], every: int = 1) -> tuple[list[int], list[int]]:
    """The reports of both passes: before each block with a multiple of `every` steps, and at the end."""
    total = sum(n for _, n in blocks)

    def due(done: list[tuple[int, int]]) -> list[int]:
        return [at for at, n in done if any(step % every == 0 for step in range(at, at + n))]

    back = [(total - at - n, n) for at, n in reversed(blocks)]
    return [*due(list(blocks)), total], [*due(back), total]
