"""Gradients of a scan by `lax.scan` and by other ways to bound its memory, with their bytes and times.

The loss is the sum of the last carry. All data are arguments, because XLA folds closed-over constants. Times are only
ever ratios to a baseline run right before, because a machine's speed changes within seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bptt_jax._bench.cells import Problem
from bptt_jax._jaxprs.types import Tree
from bptt_jax._options import show_recomputation
from bptt_jax._scan import scan
from bptt_jax.errors import BudgetError

LEAST_ROUNDS = 5

# (step, init, xs) -> (carry, ys)
Scan = Callable[[Any, Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled gradient with its arguments; or, with `compiled` None, the `error` of compiling it."""

    method: str
    compiled: Any
    arguments: tuple[Any, ...]
    temp_bytes: int
    compile_seconds: float
    error: str = ""

    def seconds(self) -> float:
        """Runs the program once and returns the time."""
        start = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.arguments))
        return time.perf_counter() - start


def unrolled(steps: int) -> Scan:
    return functools.partial(lax.scan, unroll=steps)


def checkpointed_step(step: Any, init: Tree, xs: Tree) -> tuple[Any, Any]:
    return lax.scan(jax.checkpoint(step, prevent_cse=False), init, xs)


def nest(outer: int, inner: int) -> Scan:
    """A nest of two levels by hand: `outer` segments of `inner` steps, each keeping only its first carry."""

    def scan(step: Any, init: Tree, xs: Tree) -> tuple[Any, Any]:
        segment = jax.checkpoint(lambda carry, xs: lax.scan(step, carry, xs), prevent_cse=False)
        return lax.scan(segment, init, jax.tree.map(lambda x: x.reshape(outer, inner, *x.shape[1:]), xs))

    return scan


def nests(length: int) -> dict[str, Scan]:
    """The nests by name, for divisors of the length within a factor of 2.6 of its root; none for a prime."""
    root = length**0.5
    divisors = [n for n in range(2, length) if length % n == 0 and root / 2.6 <= n <= root * 2.6]
    return {f"nest {n}x{length // n}": nest(n, length // n) for n in divisors}


def equinox(slots: int) -> Scan:
    from equinox.internal import scan as equinox_scan  # here, because it is needed only to measure Equinox

    return functools.partial(equinox_scan, kind="checkpointed", checkpoints=slots)


def ours(**options: Any) -> Scan:
    """`bptt_jax.scan` with a budget or a plan."""
    return functools.partial(scan, **options)


def mapped(scan: Scan) -> Scan:
    """`jax.vmap` of a scan over a batch: one example is scanned, as a batch of 1, because steps have an axis for it.

    The batch is the first axis of each leaf of the first carry and the second of xs, without which all examples have
    the same xs. Step, arguments and gradient stay those of a scan of the whole batch.
    """

    def over_batch(step: Any, init: Tree, xs: jax.Array) -> tuple[Any, Any]:
        has_batch = xs.ndim > 1

        def step_of_one(carry: Tree, x: jax.Array) -> tuple[Any, Any]:
            # The axis is added to one x, because XLA would copy all xs for it.
            found: tuple[Any, Any] = step(carry, x[None] if has_batch else x)
            return found

        def of_one(init: Tree, xs: jax.Array) -> tuple[Any, Any]:
            return scan(step_of_one, jax.tree.map(lambda leaf: leaf[None], init), xs)

        return jax.vmap(of_one, in_axes=(0, 1 if has_batch else None))(init, xs)

    return over_batch


def gradient(problem: Problem, scan: Scan) -> Callable[..., Any]:
    """Function (params, init, xs) -> gradient of the sum of the last carry."""

    def loss(params: Tree, init: Tree, xs: Tree) -> Any:
        carry, _ = scan(lambda carry, x: problem.step(params, carry, x), init, xs)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(carry) if jnp.issubdtype(leaf.dtype, jnp.floating))

    return jax.grad(loss, argnums=problem.argument)


def compile_program(method: str, scan: Scan, problem: Problem, xs: Tree) -> Program:
    """The gradient, traced, lowered and compiled; `xs` are arrays, or shapes for a program not to be run."""
    arguments = (problem.params, problem.init, xs)
    start = time.perf_counter()
    try:
        compiled = jax.jit(gradient(problem, scan)).lower(*arguments).compile()
    except (BudgetError, jax.errors.JaxRuntimeError) as error:
        return Program(method, None, arguments, 0, time.perf_counter() - start, _short(error))
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not tell what a program takes"
    return Program(method, compiled, arguments, memory.temp_size_in_bytes, seconds)


def evaluations(scan: Scan, length: int) -> int:
    """Number of evaluations of the step in a gradient by `scan`, counted while it runs on a batch of one number."""
    count = 0

    def tick(_: Any) -> None:
        nonlocal count
        count += 1

    def step(carry: Tree, x: Tree) -> tuple[Any, None]:
        jax.debug.callback(tick, carry)  # of the carry, because JAX would call it only once if independent of it
        return jnp.sin(carry) + x, None

    with show_recomputation():
        last = jax.grad(lambda init, xs: jnp.sum(scan(step, init, xs)[0]))
        jax.block_until_ready(jax.jit(last)(jnp.full(1, 0.5), jnp.zeros((length, 1))))
    jax.effects_barrier()
    return count


def _short(error: Exception) -> str:
    """The first line of a runtime's message."""
    return str(error).strip().splitlines()[0]


@dataclasses.dataclass(frozen=True)
class Run:
    """The time of a program.

    Attributes:
      ratio: median of its times over the baseline's times right before; infinite without a baseline.
      seconds: the ratio times the median of the baseline's seconds; without a baseline, the median of its own.
      error: reason why it has not run.
    """

    ratio: float = math.inf
    seconds: float = math.inf
    error: str = ""


class Timing(NamedTuple):
    baseline: Run
    candidates: list[Run]

    @property
    def ratios(self) -> list[float]:
        """Ratios of the candidates."""
        return [run.ratio for run in self.candidates]


def compare(
    candidates: Sequence[Program], baseline: Program, seconds: float, after_round: Callable[[float], None] | None = None
) -> Timing:
    """Runs each candidate right after the baseline, in turn, for about `seconds` and at least 5 rounds.

    Each program is run twice before, to warm it up. Programs failing then, for lack of memory, are left out.

    Args:
      candidates, baseline: the programs.
      seconds: time for all of them together.
      after_round: called after each round with the share of rounds done.
    """
    warm = {id(program): _warm_up(program) for program in (baseline, *candidates)}
    running = [program for program in candidates if not warm[id(program)].error]
    has_baseline = not warm[id(baseline)].error
    before = warm[id(baseline)].seconds if has_baseline else 0.0
    once = sum(warm[id(program)].seconds + before for program in running)
    rounds = max(LEAST_ROUNDS, round(seconds / once)) if running else LEAST_ROUNDS
    own: dict[int, list[float]] = {id(program): [] for program in (baseline, *running)}
    ratios: dict[int, list[float]] = {id(program): [] for program in running}
    for done in range(1, rounds + 1):
        for program in running:
            if has_baseline:
                own[id(baseline)].append(baseline.seconds())
            own[id(program)].append(program.seconds())
            if has_baseline:
                ratios[id(program)].append(own[id(program)][-1] / own[id(baseline)][-1])
        if after_round is not None:
            after_round(done / rounds)
    whole = statistics.median(own[id(baseline)] or [warm[id(baseline)].seconds])

    def run_of(program: Program) -> Run:
        if warm[id(program)].error:
            return warm[id(program)]
        if not has_baseline:
            return Run(seconds=statistics.median(own[id(program)]))
        # Times are ratios to one median of the baseline, because its speed changed between the rounds.
        ratio = statistics.median(ratios[id(program)])
        return Run(ratio, ratio * whole)

    return Timing(Run(1.0, whole) if has_baseline else warm[id(baseline)], [run_of(program) for program in candidates])


def _warm_up(program: Program) -> Run:
    if program.error:
        return Run(error=program.error)
    try:
        program.seconds()
        return Run(seconds=program.seconds())
    except jax.errors.JaxRuntimeError as error:
        return Run(error=_short(error))
