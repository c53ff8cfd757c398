"""Gradients of a scan by `lax.scan` and by the ways there are to bound its memory; their bytes and their times.

The loss is the sum of the last carry, and all data are arguments: what is closed over is a constant, and XLA folds it.
Times are only ever ratios to a baseline that ran right before, for a machine's speed changes within seconds.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import bptt_jax
from bptt_jax.errors import BudgetError
from tests.bench.cells import CELLS, Problem

MIB = 2**20
LEAST_ROUNDS = 5

# (step, init, xs) -> (carry, ys)
Scan = Callable[[Any, Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled gradient with its arguments; or, with an `error` and nothing compiled, that there is none."""

    method: str
    compiled: Any
    arguments: tuple[Any, ...]
    temp_bytes: int
    compile_seconds: float
    error: str = ""

    def seconds(self) -> float:
        """Runs it once."""
        start = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.arguments))
        return time.perf_counter() - start


def checkpointed_step(step: Any, init: Any, xs: Any) -> tuple[Any, Any]:
    return lax.scan(jax.checkpoint(step, prevent_cse=False), init, xs)


def nest(outer: int, inner: int) -> Scan:
    """Two levels by hand: `outer` segments of `inner` steps, of which only the first carry is kept."""

    def scan(step: Any, init: Any, xs: Any) -> tuple[Any, Any]:
        segment = jax.checkpoint(lambda carry, xs: lax.scan(step, carry, xs), prevent_cse=False)
        return lax.scan(segment, init, jax.tree.map(lambda x: x.reshape(outer, inner, *x.shape[1:]), xs))

    return scan


def nests(length: int) -> dict[str, Scan]:
    """The nests of a length around its root, by name: none for a prime."""
    root = length**0.5
    divisors = [n for n in range(2, length) if length % n == 0 and root / 2.6 <= n <= root * 2.6]
    return {f"nest {n}x{length // n}": nest(n, length // n) for n in divisors}


def equinox(slots: int) -> Scan:
    from equinox.internal import scan as equinox_scan  # here, for who measures nothing of Equinox need not have it

    return functools.partial(equinox_scan, kind="checkpointed", checkpoints=slots)


def ours(budget: int | None) -> Scan:
    return functools.partial(bptt_jax.scan, budget=budget)


def gradient(problem: Problem, scan: Scan) -> Callable[..., Any]:
    """(params, init, xs) -> the gradient of the sum of the last carry."""

    def loss(params: Any, init: Any, xs: Any) -> Any:
        carry, _ = scan(lambda carry, x: problem.step(params, carry, x), init, xs)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(carry) if jnp.issubdtype(leaf.dtype, jnp.floating))

    return jax.grad(loss, argnums=problem.argument)


def compile_program(method: str, scan: Scan, problem: Problem, xs: Any) -> Program:
    """The gradient, traced, lowered and compiled; `xs` are arrays, or shapes for a program that is not run."""
    arguments = (problem.params, problem.init, xs)
    start = time.perf_counter()
    try:
        compiled = jax.jit(gradient(problem, scan)).lower(*arguments).compile()
    except BudgetError as error:
        return Program(method, None, arguments, 0, time.perf_counter() - start, str(error))
    seconds = time.perf_counter() - start
    return Program(method, compiled, arguments, compiled.memory_analysis().temp_size_in_bytes, seconds)


def rounds_within(seconds: float, candidates: Sequence[Program], baseline: Program) -> int:
    """How many rounds of `ratios` take about so many seconds, at least 5; runs each program once, to warm it up."""
    once = sum(candidate.seconds() for candidate in candidates) + len(candidates) * baseline.seconds()
    return max(LEAST_ROUNDS, round(seconds / once))


def ratios(candidates: Sequence[Program], baseline: Program, rounds: int) -> list[float]:
    """The time of each candidate over that of the baseline's run right before it: the median over the rounds."""
    found: list[list[float]] = [[] for _ in candidates]
    for _ in range(rounds):
        for candidate, ratios_found in zip(candidates, found, strict=True):
            before = baseline.seconds()
            ratios_found.append(candidate.seconds() / before)
    return [statistics.median(ratios_found) for ratios_found in found]


def compare(candidates: Sequence[Program], baseline: Program, seconds: float) -> list[float]:
    """`ratios` in about so many seconds, infinite for the candidates that could not be compiled."""
    compiled = [candidate for candidate in candidates if not candidate.error]
    found = iter(ratios(compiled, baseline, rounds_within(seconds, compiled, baseline)) if compiled else ())
    return [float("inf") if candidate.error else next(found) for candidate in candidates]


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
