"""The audit of the promise: for a grid of steps, lengths and budgets, the bytes asked for and those that XLA reports.

Nothing is run; programs are compiled for abstract shapes. The suite audits a part, `python -m tests.audit` all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bptt_jax
from bptt_jax._choose import Choice, Options, choose
from bptt_jax._step import trace
from bptt_jax.errors import BudgetError

LENGTHS = (100, 997, 1000, 10_000)
BUDGETS = 12
LITTLE = 0.6  # of a budget; so little is used only where no faster plan fits


@dataclasses.dataclass(frozen=True)
class Problem:
    """A step to audit: (params, carry, x) -> (carry, y), with abstract arrays."""

    step: Callable[..., Any]
    params: Any
    init: Any
    x: Any

    def without_outputs(self) -> Problem:
        return dataclasses.replace(self, step=lambda *given: (self.step(*given)[0], None))

    def of_type(self, dtype: Any) -> Problem:
        """With all arrays of this type."""
        params, init, x = jax.tree.map(lambda leaf: _shape(*leaf.shape, dtype=dtype), (self.params, self.init, self.x))
        return Problem(self.step, params, init, x)

    def xs(self, length: int) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((length, *leaf.shape), leaf.dtype), self.x)


def _shape(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _cell(cell: nn.RNNCellBase, *x_shape: int) -> Problem:
    x = _shape(*x_shape)
    carry = jax.eval_shape(lambda: cell.initialize_carry(jax.random.key(0), x.shape))
    params = jax.eval_shape(cell.init, jax.random.key(1), carry, x)
    return Problem(cell.apply, params, carry, x)


def _stacked() -> Problem:
    """Two layers of LSTM, the outputs of one being the inputs of the other."""
    lower, upper = _cell(nn.LSTMCell(64), 8, 32), _cell(nn.LSTMCell(96), 8, 64)

    def step(params: Any, carry: Any, x: Any) -> Any:
        below, hidden = lower.step(params[0], carry[0], x)
        above, y = upper.step(params[1], carry[1], hidden)
        return (below, above), y

    return Problem(step, (lower.params, upper.params), (lower.init, upper.init), lower.x)


def _attention() -> Problem:
    """A state that attends at each step over a memory that the carry hands on unchanged."""
    batch, places, width = 4, 32, 64

    def step(params: Any, carry: Any, x: Any) -> Any:
        state, memory = carry
        scores = jnp.einsum("bw,bpw->bp", state @ params["query"], memory) * width**-0.5
        read = jnp.einsum("bp,bpw->bw", jax.nn.softmax(scores), memory)
        state = jnp.tanh(jnp.concatenate([read, x], -1) @ params["mix"] + state)
        return (state, memory), state @ params["out"]

    params = {"query": _shape(width, width), "mix": _shape(2 * width, width), "out": _shape(width, width)}
    return Problem(step, params, (_shape(batch, width), _shape(batch, places, width)), _shape(batch, width))


def _waves() -> Problem:
    """The sine-Gordon equation u_tt = c² Δu − sin u on a grid, c being learnt, in double precision."""
    side, f64 = 48, jnp.float64

    def step(params: Any, carry: Any, x: Any) -> Any:
        u, before = carry
        around = jnp.pad(u, 1)
        laplacian = around[2:, 1:-1] + around[:-2, 1:-1] + around[1:-1, 2:] + around[1:-1, :-2] - 4 * u
        after = 2 * u - before + params * laplacian - 0.01 * jnp.sin(u)
        after = after.at[side // 2, side // 2].add(x)
        return (after, u), after[:, 0]

    u = _shape(side, side, dtype=f64)
    return Problem(step, _shape(side, side, dtype=f64), (u, u), _shape(dtype=f64))


def _tiny() -> Problem:
    """No weights and a carry of 256 bytes, beside which the counters of loops are not small."""
    carry = _shape(64)
    return Problem(lambda params, carry, x: (jnp.tanh(0.9 * carry + x),) * 2, (), carry, carry)


def _wide() -> Problem:
    """A residual network as the step, with weights and products that are wider than the carry."""
    weights = [_shape(32, 128), _shape(128, 128), _shape(128, 32)]

    def step(params: Any, carry: Any, x: Any) -> Any:
        hidden = carry
        for weight in params:
            hidden = jnp.tanh(hidden @ weight)
        return carry + hidden * x, carry

    return Problem(step, weights, _shape(16, 32), _shape(16, 32))


def _mixed() -> Problem:
    """A GRU that computes in bfloat16, with weights, carry and inputs in float32."""
    cell = _cell(nn.GRUCell(64, dtype=jnp.bfloat16), 8, 32)

    def step(params: Any, carry: Any, x: Any) -> Any:
        after, y = cell.step(params, carry, x)
        return after.astype(carry.dtype), y

    return dataclasses.replace(cell, step=step)


def _readout() -> Problem:
    """A GRU with logits in the step, which are wider than the carry."""
    cell = _cell(nn.GRUCell(32), 8, 32)

    def step(params: Any, carry: Any, x: Any) -> Any:
        carry, y = cell.step(params[0], carry, x)
        return carry, y @ params[1]

    return dataclasses.replace(cell, step=step, params=(cell.params, _shape(32, 512)))


KINDS: dict[str, Callable[[], Problem]] = {
    "lstm": lambda: _cell(nn.LSTMCell(128), 16, 128),
    "gru": lambda: _cell(nn.GRUCell(96), 8, 64),
    "stacked": _stacked,
    "convlstm": lambda: _cell(nn.ConvLSTMCell(8, (3, 3)), 2, 12, 12, 4),
    "attention": _attention,
    "waves": _waves,
    "narrow": lambda: _cell(nn.GRUCell(16), 32, 1),
    "wide": _wide,
    "tiny": _tiny,
    "bfloat16": lambda: _cell(nn.LSTMCell(64), 8, 32).of_type(jnp.bfloat16),
    "mixed": _mixed,
    "readout": _readout,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of step at one length.

    Attributes:
      arguments: what is differentiated: "weights" or "all" (weights, init, xs).
      outputs: whether the step has per-step outputs, which are then in the loss.
    """

    kind: str
    length: int
    differentiation: str = "reverse"
    arguments: str = "all"
    outputs: bool = True

    @property
    def differentiates(self) -> bool:
        """Whether there is anything to differentiate: a step without weights has no gradients for them."""
        return self.arguments == "all" or bool(jax.tree.leaves(self.problem().params))

    def problem(self) -> Problem:
        problem = KINDS[self.kind]()
        return problem if self.outputs else problem.without_outputs()


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one budget led to, in bytes."""

    case: Case
    asked: int
    predicted: int
    measured: int
    plan: str
    forward_steps: int

    @property
    def used(self) -> float:
        return self.measured / self.asked


def vjp(case: Case, problem: Problem, budget: int) -> Callable[..., Any]:
    """(params, init, xs, cotangents) -> results and gradients."""

    def run(params: Any, init: Any, xs: Any) -> Any:
        step = functools.partial(problem.step, params)
        return bptt_jax.scan(step, init, xs, budget=budget, differentiation=case.differentiation)

    def pullback(params: Any, init: Any, xs: Any, cotangents: Any) -> Any:
        if case.arguments == "all":
            results, pull = jax.vjp(run, params, init, xs)
        else:
            results, pull = jax.vjp(lambda params: run(params, init, xs), params)
        return results, pull(cotangents)

    return pullback


def temporaries(case: Case, problem: Problem, budget: int) -> int:
    """What XLA reports for the jitted vjp."""
    xs = problem.xs(case.length)
    arguments = (problem.params, problem.init, xs)
    cotangents = jax.eval_shape(
        lambda params, init, xs: jax.lax.scan(functools.partial(problem.step, params), init, xs), *arguments
    )
    compiled = jax.jit(vjp(case, problem, budget)).lower(*arguments, cotangents).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def decide(case: Case, problem: Problem, budget: int | None) -> Choice:
    """What `scan` decides for a budget, without compiling the scan."""
    found: list[Choice] = []

    def inspect(params: Any, init: Any, xs: Any) -> None:
        step = functools.partial(problem.step, params)
        traced = trace(step, (), init, xs, None, reverse=False, unroll=1)
        found.append(choose(traced, Options(budget, None, case.differentiation)))

    jax.eval_shape(inspect, problem.params, problem.init, problem.xs(case.length))
    return found[0]


def budgets(case: Case, problem: Problem, count: int) -> list[int]:
    """From the smallest feasible one to everything, in equal ratios."""
    smallest = smallest_budget(case, problem)
    everything = decide(case, problem, None).predicted_bytes
    return sorted({int(b) for b in np.geomspace(smallest, max(everything, smallest), count).round()})


def smallest_budget(case: Case, problem: Problem) -> int:
    """The one that the error for a budget of one byte states."""
    try:
        decide(case, problem, 1)
    except BudgetError as error:
        return error.smallest_bytes
    raise AssertionError("a budget of one byte was accepted")


def could_be_faster(case: Case, problem: Problem, finding: Finding) -> bool:
    """Whether within this budget a plan with fewer recomputations would have been possible, with its margin.

    For budgets of which little was used. A budget is about the gradients of all arguments, whatever `case` is about.
    """
    case = dataclasses.replace(case, arguments="all")
    refused, accepted = finding.asked, decide(case, problem, None).predicted_bytes
    if _steps(decide(case, problem, accepted)) >= finding.forward_steps:
        return False
    while accepted - refused > max(refused // 500, 1):
        middle = (refused + accepted) // 2
        is_faster = _steps(decide(case, problem, middle)) < finding.forward_steps
        refused, accepted = (refused, middle) if is_faster else (middle, accepted)
    profile = decide(case, problem, accepted).profile
    spare = profile.fixed_bytes if profile.block_peaks else profile.carry_bytes
    return profile.with_margin(examine(case, problem, accepted).measured + spare) <= finding.asked


def _steps(choice: Choice) -> int:
    return bptt_jax.cost(choice.plan, choice.profile).forward_steps


def examine(case: Case, problem: Problem, asked: int) -> Finding:
    """One budget: planned, compiled, measured."""
    choice = decide(case, problem, asked)
    name = f"{bptt_jax.plans.notation(choice.plan)} {choice.lowering}"
    return Finding(case, asked, choice.predicted_bytes, temporaries(case, problem, asked), name, _steps(choice))


def audit(case: Case, count: int = BUDGETS) -> Iterator[Finding]:
    """The findings of a case, one by one."""
    problem = case.problem()
    for asked in budgets(case, problem, count):
        yield examine(case, problem, asked)
