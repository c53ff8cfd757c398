"""Gradients of a scan by `lax.scan` and by the ways there are to bound its memory; their bytes and their times.

The loss is the sum of the last carry, and all data are arguments: what is closed over is a constant, and XLA folds it.
Times are only ever ratios to a baseline that ran right before, for a machine's speed changes within seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bptt_jax._bench.cells import Problem
from bptt_jax._choose import Budget
from bptt_jax._scan import scan
from bptt_jax.errors import BudgetError

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


def ours(budget: Budget) -> Scan:
    return functools.partial(scan, budget=budget)


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
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not tell what a program takes"
    return Program(method, compiled, arguments, memory.temp_size_in_bytes, seconds)


def evaluations(scan: Scan, length: int) -> int:
    """How many times a gradient by `scan` evaluates its step, counted while it runs."""
    count = 0

    def tick(_: Any) -> None:
        nonlocal count
        count += 1

    def step(carry: Any, x: Any) -> tuple[Any, None]:
        jax.debug.callback(tick, carry)  # of what does not depend on the carry, JAX would make one call
        return jnp.sin(carry) + x, None

    jax.block_until_ready(jax.jit(jax.grad(lambda init, xs: scan(step, init, xs)[0]))(0.5, jnp.zeros(length)))
    jax.effects_barrier()
    return count


@dataclasses.dataclass(frozen=True)
class Timing:
    """Medians over the rounds.

    Attributes:
      ratios: of each candidate's time to that of the baseline's run right before it; infinite for what has no program.
      baseline_seconds: of one run of the baseline.
    """

    ratios: list[float]
    baseline_seconds: float


def rounds_within(seconds: float, candidates: Sequence[Program], baseline: Program) -> int:
    """How many rounds take about so many seconds, at least 5; runs each program once, to warm it up."""
    once = sum(candidate.seconds() for candidate in candidates) + len(candidates) * baseline.seconds()
    return max(LEAST_ROUNDS, round(seconds / once))


def compare(
    candidates: Sequence[Program], baseline: Program, seconds: float, after_round: Callable[[float], None] | None = None
) -> Timing:
    """Runs each candidate right after the baseline, in turn, for about so many seconds.

    Args:
      candidates, baseline: the programs.
      seconds: for all of them together.
      after_round: called with the share of the rounds that are done.
    """
    compiled = [candidate for candidate in candidates if not candidate.error]
    found: dict[int, list[float]] = {id(candidate): [] for candidate in compiled}
    baselines: list[float] = []
    rounds = rounds_within(seconds, compiled, baseline) if compiled else LEAST_ROUNDS
    for done in range(1, rounds + 1):
        for candidate in compiled:
            baselines.append(baseline.seconds())
            found[id(candidate)].append(candidate.seconds() / baselines[-1])
        if after_round is not None:
            after_round(done / rounds)
    ratios = [statistics.median(found.get(id(candidate), [float("inf")])) for candidate in candidates]
    return Timing(ratios, statistics.median(baselines or [baseline.seconds()]))
