"""The façade: `scan`, the drop-in for `jax.lax.scan`, and its decorator form."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from bptt_jax._budget import budget_to_bytes
from bptt_jax._lower.nested import Run, lower
from bptt_jax._measure import check_differentiation, measure
from bptt_jax._plan import Plan, Steps
from bptt_jax._plan import length as length_of
from bptt_jax._step import Arrays, FlatStep, Step, TracedScan, trace
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
    computes again is planned from the sizes of the step and the budget, when the call is differentiated; a call that
    is not differentiated is `jax.lax.scan`.

    With the default `differentiation="reverse"`, grad, vjp, vmap and derivatives of gradients work; jvp, linearize
    and jacfwd raise a TypeError. With "any" they all work.

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
        what `jax.lax.scan` would need. Under vmap it counts one example.
      plan: a plan to run as it is, instead of a budget.
      differentiation: "reverse" or "any".

    Returns:
      (carry, ys), as `jax.lax.scan`.

    Raises:
      BudgetError: when differentiated (at once for "any"), if no plan fits the budget.
      TypeError, ValueError: what `jax.lax.scan` raises, or for malformed options.

    >>> import jax, jax.numpy as jnp
    >>> def step(carry, x):
    ...     carry = jnp.tanh(carry + x)
    ...     return carry, carry
    >>> xs = jnp.linspace(0.0, 1.0, 100)
    >>> loss = lambda xs: scan(step, 0.0, xs, budget="25%")[0]
    >>> reference = lambda xs: jax.lax.scan(step, 0.0, xs)[0]
    >>> bool(jnp.allclose(jax.grad(loss)(xs), jax.grad(reference)(xs)))
    True

    Not for loops whose length is not static (`jax.lax.while_loop`), nor where everything fits anyway: then a budget
    only costs compile time.
    """
    check_options(budget, plan, differentiation)
    traced = trace(step, (), init, xs, length, reverse=reverse, unroll=unroll)
    return _run(traced, reverse, unroll, budget, plan, differentiation)


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
      step: (carry, x) -> (carry, y), or (params, carry, x) -> (carry, y) with `params=True`.
      params: whether the step, and so the decorated function, takes parameters first.
      unroll, budget, plan, differentiation: as for `scan`.

    Returns:
      run([params,] init, xs=None, length=None, reverse=False) -> (carry, ys).

    >>> import jax, jax.numpy as jnp
    >>> @checkpointed(budget="25%", params=True)
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

    def scan_with(given: tuple[Any, ...], init: Any, xs: Any, length: int | None, reverse: bool) -> tuple[Any, Any]:
        traced = trace(step, given, init, xs, length, reverse=reverse, unroll=unroll)
        return _run(traced, reverse, unroll, budget, plan, differentiation)

    if params:

        def run(params: Any, init: Any, xs: Any = None, length: int | None = None, reverse: bool = False) -> Any:
            return scan_with((params,), init, xs, length, reverse)
    else:

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


def choose_plan(traced: TracedScan, budget: Budget, plan: Plan | None) -> Plan:
    """The plan that a scan runs: the one given, or the one made for the budget.

    Raises:
      ValueError: for a plan of another length.
      BudgetError: if no plan fits the budget.
    """
    if plan is None:
        return _plan_within(budget, traced.length, traced.step, traced.operands, traced.carry, traced.xs)
    if length_of(plan) != traced.length:
        raise ValueError(f"the plan has {length_of(plan)} steps, but the scan has {traced.length}.")
    return plan


def _plan_within(budget: Budget, length: int, step: FlatStep, *arguments: Arrays) -> Plan:
    if budget is None or length == 0:
        return Steps(length)
    return make_plan(measure(step, *arguments), length, budget)


def _run(
    traced: TracedScan, reverse: bool, unroll: int | bool, budget: Budget, plan: Plan | None, differentiation: str
) -> tuple[Any, Any]:
    if plan is not None or differentiation == "any":
        plan, budget = choose_plan(traced, budget, plan), None
    if differentiation == "any":
        program = any_program(traced.step, plan, reverse, unroll)
    else:
        program = reverse_program(traced.step, traced.length, plan, budget, reverse, unroll)
    with _forward_mode_explained(differentiation):
        return traced.unflatten(*program(traced.operands, traced.carry, traced.xs))


@contextlib.contextmanager
def _forward_mode_explained(differentiation: str) -> Iterator[None]:
    """Says what to do where JAX says that a custom_vjp, of which the user need not know, has no forward mode."""
    try:
        yield
    except TypeError as error:
        if differentiation == "any" or "forward-mode" not in str(error) or "custom_vjp" not in str(error):
            raise
        raise TypeError(
            'bptt_jax.scan with differentiation="reverse" has no forward mode (jvp, linearize, jacfwd), found one '
            'applied to it; differentiation="any" has one.'
        ) from error


# Typed, for unroll=True and unroll=1 are equal and differ; bounded, for a step that is made anew for each call
# never asks for the same program twice. Each is a jitted function, so that calls outside jit compile once.
_remember = functools.lru_cache(maxsize=256, typed=True)


@_remember
def any_program(step: FlatStep, plan: Plan, reverse: bool, unroll: int | bool) -> Run:
    """The pure nest of checkpoints and scans: all of JAX's transformations work on it."""
    return jax.jit(lower(plan, step, reverse=reverse, unroll=unroll))


@_remember
def reverse_program(
    step: FlatStep, length: int, plan: Plan | None, budget: Budget, reverse: bool, unroll: int | bool
) -> Run:
    """A plain scan whose derivative rule runs the plan; without a plan, the rule makes one for the budget.

    Planning waits for the rule: a call that is never differentiated pays nothing and fits any budget.
    """
    lower_plan = functools.partial(lower, step=step, reverse=reverse, unroll=unroll)

    @jax.custom_vjp
    def program(operands: Arrays, carry: Arrays, xs: Arrays) -> tuple[Arrays, Arrays]:
        return lower_plan(Steps(length))(operands, carry, xs)

    # Jitted for its cache: JAX may call the rule several times for one program and takes the residuals' tree of the
    # last call for all of them; from the cache they all have the same.
    @jax.jit
    def forward(operands: Arrays, carry: Arrays, xs: Arrays) -> Any:
        chosen = _plan_within(budget, length, step, operands, carry, xs) if plan is None else plan
        return jax.vjp(lower_plan(chosen), operands, carry, xs)

    def backward(vjp: Any, cotangents: Any) -> Any:
        return vjp(cotangents)

    program.defvjp(forward, backward)
    return jax.jit(program)
