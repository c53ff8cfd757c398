"""`FitReport`, the result of `largest_budget` beside the budget: a table of the programs compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bptt_jax._whole.program import Program
from bptt_jax._whole.search import Refused
from bptt_jax.errors import FitError, format_bytes

_HEADS = ("program", "budget", "arguments", "results", "aliases", "temporaries", "total", "of within", "evaluations")
_FULL = 0.93  # share of the limit; for less the report gives the reason
_LIKE = 0.5  # ratio of budgets; bytes equal over a greater one are suspicious
_SCANS, _REST = "temporaries of the scans", "other temporaries"


@dataclasses.dataclass(frozen=True)
class FitReport:
    """The programs compiled by `largest_budget`. `str(report)` is a table of them.

    >>> import bptt_jax, jax, jax.numpy as jnp
    >>> def make(budget):
    ...     loss = lambda xs: bptt_jax.scan(lambda c, x: (jnp.sin(c) * x, None), jnp.ones(64), xs, budget=budget)[0].sum()
    ...     return jax.jit(jax.grad(loss))
    >>> budget, report = bptt_jax.largest_budget(make, jax.ShapeDtypeStruct((100, 64), "float32"), within="1MiB")
    >>> print(str(report).splitlines()[-1])
    chosen: program 1, budget=1022976; its scans keep everything, as without a budget

    Attributes:
      within_bytes: the limit in bytes.
      programs: the compiled programs in their order, each with its `budget_bytes`, `bytes`, `total_bytes`, `scan_bytes`,
        `evaluations`, `keeps_everything`, `seconds` and `compiled`, the program itself.
      chosen: the chosen one: call `chosen.compiled` with the arguments to compile nothing again.
      refused: budgets with no program, because no plan of a scan is so small, each with its `budget` and `smallest`.
      target: the device compiled for; None for the default backend.
    """  # noqa: E501  an example's line

    within_bytes: int
    programs: tuple[Program, ...]
    chosen: Program
    refused: tuple[Refused, ...] = ()
    target: Any = None

    def __str__(self) -> str:
        rows = [_HEADS, *(_row(i, one, self.within_bytes) for i, one in enumerate(self.programs, 1))]
        lines = [f"within {format_bytes(self.within_bytes)} ({self.within_bytes:,} bytes) of one device", ""]
        lines += _aligned(rows)
        lines += ["", *(_no_program(one) for one in self.refused), self._choice, *self._notes]
        return "\n".join(lines)

    @property
    def _choice(self) -> str:
        number, kept = self.programs.index(self.chosen) + 1, ""
        if self.chosen.scans == 0:
            kept = "; it differentiates no scan of bptt_jax, so any budget would do"
        elif self.chosen.keeps_everything:
            kept = "; its scans keep everything, as without a budget"
        return f"chosen: program {number}, budget={self.chosen.budget_bytes}{kept}"

    @property
    def _notes(self) -> list[str]:
        notes, over = [], [one for one in self.programs if one.total_bytes > self.within_bytes]
        if over and self.chosen.total_bytes < _FULL * self.within_bytes:
            notes.append("plans are steps: the next larger one that was found is over the limit")
        if self.target is not None and not self.chosen.platforms <= {self.target.platform}:
            planned = ", ".join(sorted(self.chosen.platforms))
            notes.append(f"its scans are planned for {planned}: pass target= to them as well")
        return notes


def _row(number: int, program: Program, within: int) -> tuple[str, ...]:
    start, evaluations = (str(number), format_bytes(program.budget_bytes)), f"{program.evaluations:.2f}"
    if program.scans == 0:
        evaluations = "no scan"
    found = program.bytes
    if found is None:
        return (*start, *[""] * 4, "refused by the compiler", "over", evaluations)
    parts = (found.arguments, found.results, found.aliases, found.temporaries, found.total)
    share = f"{found.total / within:.3f}{' over' * (found.total > within)}"
    return (*start, *map(format_bytes, parts), share, evaluations)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *(text.rjust(n) for text, n in zip(rest, widths[1:], strict=True))])
        for first, *rest in rows
    ]


def _no_program(refused: Refused) -> str:
    return f"budget={refused.budget}: no program, because a scan's smallest plan needs budget={refused.smallest}"


def does_not_fit(within: object, within_bytes: int, programs: Sequence[Program], least: int) -> FitError:
    """The error for programs none of which fits.

    Args:
      within, within_bytes: the limit.
      programs: the compiled ones.
      least: the smallest budget tried; its plans are those of one of the programs.
    """
    smallest = min(programs, key=lambda one: one.budget_bytes)
    found, hints = smallest.bytes, []
    if found is None:
        return FitError(within, within_bytes, least, None)
    scans = min(smallest.scan_bytes, found.temporaries)
    shares = {
        "arguments": found.arguments,
        "results in memory of their own": found.results - found.aliases,
        _SCANS: scans,
        _REST: found.temporaries - scans,
        "code": found.code,
    }
    if smallest.scans == 0:
        hints.append("It differentiates no scan of bptt_jax, so a budget has nothing to bound.")
    elif least < _LIKE * programs[0].budget_bytes and len({one.total_bytes for one in programs}) == 1:
        hints.append("It takes as many with each budget: does make(budget) hand its budget on to the scans?")
    if found.aliases == 0 and found.results > found.total // 20:
        hints.append("No argument is donated: with donate_argnums results take the place of arguments.")
    if shares[_REST] > scans:
        hints.append("Other temporaries are of outputs, logits or the optimiser: a smaller batch has fewer.")
    return FitError(within, within_bytes, least, shares, hints)
