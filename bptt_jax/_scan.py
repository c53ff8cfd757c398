"""The façade: `scan`, the drop-in for `jax.lax.scan`, and its decorator form."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax._budget import budget_to_bytes
from bptt_jax._lower import nested, sweep
from bptt_jax._lower.block_sizes import styles
from bptt_jax._lower.nested import Run
from bptt_jax._lower.style import FASTEST, Style
from bptt_jax._measure import check_differentiation, lowering_of, measure
from bptt_jax._plan import Plan, Steps
from bptt_jax._plan import length as length_of
from bptt_jax._step import FlatStep, Step, TracedScan, trace
from bptt_jax._step_profile import Lowering, StepProfile
from bptt_jax._time import predicted_time
from bptt_jax.errors import BudgetError
from bptt_jax.planners import make_plan

Budget = int | str | None


def scan(
    step: Step,
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    budget: Budget = None,
    plan: Plan | None = None,
    differentiation: str = "reverse",
) -> tuple[Any, Any]:
    """`jax.lax.scan`, whose backward pass stays within a budget of bytes.

    Values and gradients are those of `jax.lax.scan`: nothing is truncated. What the backward pass keeps and what it
    computes again is planned from the sizes of the step and the budget, when the call is traced.

    With the default `differentiation="reverse"`, grad, vjp, vmap and derivatives of gradients work; jvp, jacfwd, and
    applying what linearize returns, raise a TypeError. With "any" they all work.

    Reference program, as for `jax.lax.scan`::

        def scan(step, init, xs, length=None):
            carry, ys = init, []
            for x in [None] * length if xs is None else xs:
                carry, y = step(carry, x)
                ys.append(y)
            return carry, np.stack(ys)

    Args:
      step: (carry, x) -> (carry, y), pytrees of arrays; the carry keeps its structure, shapes and dtypes. Floating
        arrays that it closes over are differentiated as well.
      init: the first carry.
      xs: what to scan over, along the leading axes; or None with `length`.
      length: the number of steps; must agree with `xs`.
      reverse: whether to go through `xs` from the end; `ys` are in the order of `xs`.
      unroll: steps per iteration of the innermost loops, as in `jax.lax.scan`.
      budget: temporary bytes of the compiled backward pass: None (no limit), an int, "64MiB", "1.5GB", or "5%" of
        what `jax.lax.scan` would need, as predicted from the step's shapes. Under vmap it counts one example.
      plan: a plan to run as it is, instead of a budget.
      differentiation: "reverse" or "any".

    Returns:
      (carry, ys), as `jax.lax.scan`.

    Raises:
      BudgetError: if no plan fits the budget; with "reverse" only when the call is differentiated.
      TypeError, ValueError: what `jax.lax.scan` raises, or for malformed options.

    >>> import jax, jax.numpy as jnp
    >>> def step(carry, x):
    ...     carry = jnp.tanh(carry + x)
    ...     return carry, carry
    >>> xs = jnp.linspace(0.0, 1.0, 100)
    >>> loss = lambda xs: scan(step, 0.0, xs, budget="60%")[0]
    >>> reference = lambda xs: jax.lax.scan(step, 0.0, xs)[0]
    >>> bool(jnp.allclose(jax.grad(loss)(xs), jax.grad(reference)(xs)))
    True

    Not for loops whose length is not static (`jax.lax.while_loop`), nor where everything fits anyway: then a budget
    only costs compile time.
    """
    check_options(budget, plan, differentiation)
    traced = trace(step, (), init, xs, length, reverse=reverse, unroll=unroll)
    pair: tuple[Any, Any] = _run(traced, reverse, unroll, budget, plan, differentiation)
    return pair


def checkpointed(
    step: Callable[..., tuple[Any, Any]] | None = None,
    *,
    params: bool = False,
    unroll: int | bool = 1,
    budget: Budget = None,
    plan: Plan | None = None,
    differentiation: str = "reverse",
) -> Any:
    """Decorator form of `scan`: from a step to a function that scans it.

    Args:
      step: (carry, x) -> (carry, y), or (params, carry, x) -> (carry, y) with `params=True`. Like a function under
        `jax.jit` it is traced once for inputs of the same types; what it reads from elsewhere is read then.
      params: whether the step, and so the decorated function, takes parameters first.
      unroll, budget, plan, differentiation: as for `scan`.

    Returns:
      run([params,] init, xs=None, length=None, reverse=False) -> (carry, ys).

    >>> import jax, jax.numpy as jnp
    >>> @checkpointed(budget="60%", params=True)
    ... def run(w, carry, x):
    ...     carry = jnp.tanh(w * carry + x)
    ...     return carry, None
    >>> carry, _ = run(0.5, 0.0, jnp.ones(100))
    >>> jax.grad(lambda w: run(w, 0.0, jnp.ones(100))[0])(0.5).shape
    ()
    """
    check_options(budget, plan, differentiation)
    if step is None:
        return functools.partial(
            checkpointed, params=params, unroll=unroll, budget=budget, plan=plan, differentiation=differentiation
        )

    def scan_with(given: tuple[Any, ...], init: Any, xs: Any, length: int | None, reverse: bool) -> Any:
        traced = trace(step, given, init, xs, length, reverse=reverse, unroll=unroll)
        return _run(traced, reverse, unroll, budget, plan, differentiation)

    if params:

        def run(params: Any, init: Any, xs: Any = None, length: int | None = None, reverse: bool = False) -> Any:
            return scan_with((params,), init, xs, length, reverse)
    else:
        # mypy wants both branches of one signature; that they differ is the point of `params`.
        def run(init: Any, xs: Any = None, length: int | None = None, reverse: bool = False) -> Any:  # type: ignore[misc]
            return scan_with((), init, xs, length, reverse)

    # The signature is run's own, so no __wrapped__; the names and the docstring are the step's.
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        if hasattr(step, name):
            setattr(run, name, getattr(step, name))
    return run


def check_options(budget: Budget, plan: Plan | None, differentiation: str) -> None:
    """Raises for what is wrong with the options whatever the step, so also where nothing is differentiated."""
    check_differentiation(differentiation)
    budget_to_bytes(budget, store_all_bytes=1)
    if plan is None:
        return
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a plan (Steps, Repeat, Chain or Remat) or None, got {plan!r}.")
    if budget is not None:
        raise ValueError(f"got budget={budget!r} and a plan: a plan is run as it is; pass one of the two.")


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a scan is run.

    Attributes:
      plan: the plan.
      lowering: what runs it.
      style: for the sweep, how blocks take their products.
      profile: sizes of one step, run so.
    """

    plan: Plan
    lowering: Lowering
    style: Style
    profile: StepProfile

    def program(self, step: FlatStep, reverse: bool, unroll: int | bool) -> Run:
        """The program, jitted; the same function for the same arguments."""
        return _program(step, self.plan, self.lowering, self.style, reverse, unroll)


def choose(traced: TracedScan, budget: Budget, plan: Plan | None, differentiation: str) -> Choice:
    """How to run a scan: the plan given, or the fastest for the budget, as the sweep where that is possible.

    Of the ways in which blocks can take their products the fastest is taken, by predicted time. The nest comes last: a
    step that keeps nothing for its backward needs less there than the sweep's loops hold.

    Raises:
      ValueError: for a plan of another length.
      BudgetError: if no plan fits the budget.
    """
    lowering = lowering_of(traced, differentiation)
    if plan is not None and length_of(plan) != traced.length:
        raise ValueError(f"the plan has {length_of(plan)} steps, but the scan has {traced.length}.")
    if plan is not None or budget is None or traced.length == 0:
        return Choice(plan or Steps(traced.length), lowering, FASTEST, measure(traced, lowering))
    errors: list[BudgetError] = []
    if lowering == "sweep":
        found = [_planned(traced, budget, "sweep", style, errors) for style in styles(traced.step)]
        fitting = [choice for choice in found if choice is not None]
        if fitting:
            return min(fitting, key=lambda choice: predicted_time(choice.plan, choice.profile.times, "sweep"))
    nest = _planned(traced, budget, "nested", FASTEST, errors)
    if nest is None:
        raise min(errors, key=lambda error: error.smallest_bytes)
    return nest


def _planned(
    traced: TracedScan, budget: Budget, lowering: Lowering, style: Style, errors: list[BudgetError]
) -> Choice | None:
    """The fastest plan of one way to run a scan; None, and an error more, where none fits."""
    profile = measure(traced, lowering, style)
    try:
        return Choice(make_plan(profile, traced.length, budget), lowering, style, profile)
    except BudgetError as error:
        errors.append(error)
        return None


def _run(
    traced: TracedScan, reverse: bool, unroll: int | bool, budget: Budget, plan: Plan | None, differentiation: str
) -> Any:
    arguments = (traced.operands, traced.carry, traced.xs)
    try:
        program = choose(traced, budget, plan, differentiation).program(traced.step, reverse, unroll)
    except BudgetError as error:
        if differentiation == "any":
            raise
        # Forwards any budget is enough; it is the gradient for which there is no plan.
        everything = choose(traced, None, None, differentiation).program(traced.step, reverse, unroll)
        program = _without_gradient(everything, error)
    if differentiation == "reverse":
        arguments = jax.tree.map(_reverse_only, arguments)
    return traced.unflatten(*program(*arguments))


# Typed, for unroll=True and unroll=1 are equal and differ; bounded, for a step that is made anew for each call never
# asks for the same program twice. Jitted, so that calls outside jit compile once.
@functools.lru_cache(maxsize=256, typed=True)
def _program(step: FlatStep, plan: Plan, lowering: Lowering, style: Style, reverse: bool, unroll: int | bool) -> Run:
    if lowering == "sweep":
        return jax.jit(sweep.lower(plan, step, style=style, reverse=reverse, unroll=unroll))
    return jax.jit(nested.lower(plan, step, reverse=reverse, unroll=unroll))


def _reverse_only(leaf: Any) -> Any:
    """`leaf`, of which there is a vjp but no jvp.

    A rule around each argument and not one around the scan: under vmap, JAX 0.10 takes a custom_vjp's primal and its
    forward rule to put the batch on the same axis of every result, and sums the cotangent of a result without one
    over the batch. Around one leaf neither can go wrong, and what is not differentiated is not touched.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    try:
        return _no_forward_mode(leaf)
    except TypeError as error:
        raise TypeError(
            'bptt_jax.scan with differentiation="reverse" has no forward mode (jvp, linearize, jacfwd), found one '
            'applied to it; differentiation="any" has one.'
        ) from error


@jax.custom_vjp
def _no_forward_mode(leaf: Any) -> Any:
    return leaf


_no_forward_mode.defvjp(lambda leaf: (leaf, None), lambda _, cotangent: (cotangent,))


def _without_gradient(program: Run, error: BudgetError) -> Run:
    """`program`, raising `error` when it is differentiated."""

    def fail(*_: Any) -> Any:
        raise error

    run = jax.custom_vjp(program)
    run.defvjp(fail, fail)
    return run
