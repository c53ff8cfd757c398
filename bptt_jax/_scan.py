"""The façade: `scan`, the drop-in for `jax.lax.scan`, and its decorator form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax._budget import budget_to_bytes
from bptt_jax._choose import Budget, Options, choose
from bptt_jax._lower.nested import Run
from bptt_jax._measure import check_differentiation
from bptt_jax._plan import Plan
from bptt_jax._step import Step, TracedScan, trace
from bptt_jax.errors import BudgetError


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
    calibrate: bool = True,
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
      budget: temporary bytes, per device, of the compiled vjp of this scan over (params, init, xs), as XLA reports
        them: None (no limit), an int, "64MiB", "1.5GB", "5%" of what `jax.lax.scan` would need, as predicted from the
        step's shapes, or "auto", three quarters of what the device has free when the call is traced (rounded down to
        three binary digits; the least of all processes, each of which has to trace the call). Shapes are those that
        the scan sees: under vmap one example's, so batch inside the step or divide; in a shard_map and under explicit
        sharding the shard's; under automatic sharding the global array's, which is safe.
      plan: a plan to run as it is, instead of a budget.
      differentiation: "reverse" or "any".
      calibrate: whether to compile up to three small programs for a budget that XLA's own figures confirm, once in a
        process for each kind of step; predictions then have a margin of 2 % (of 5 % for a nest). Without, sizes are
        estimated from shapes and the margin is 5 % (8 %). Say False when tracing for another platform, as for
        `jax.export`: small programs are compiled for the default backend.

    Returns:
      (carry, ys), as `jax.lax.scan`.

    Raises:
      BudgetError: if no plan fits the budget; with "reverse" only when the call is differentiated.
      TypeError, ValueError: what `jax.lax.scan` raises, or for malformed options.

    >>> import jax, jax.numpy as jnp
    >>> def step(carry, x):
    ...     carry = jnp.tanh(carry + x)
    ...     return carry, carry
    >>> init, xs = jnp.zeros(256), jnp.linspace(0.0, 1.0, 25_600).reshape(100, 256)
    >>> loss = lambda xs: scan(step, init, xs, budget="60%")[0].sum()
    >>> reference = lambda xs: jax.lax.scan(step, init, xs)[0].sum()
    >>> bool(jnp.allclose(jax.grad(loss)(xs), jax.grad(reference)(xs)))
    True

    Not for loops whose length is not static (`jax.lax.while_loop`), nor where everything fits anyway: then a budget
    only costs compile time.
    """
    options = checked_options(budget, plan, differentiation, calibrate)
    traced = trace(step, (), init, xs, length, reverse=reverse, unroll=unroll)
    pair: tuple[Any, Any] = _run(traced, reverse, unroll, options)
    return pair


def checkpointed(
    step: Callable[..., tuple[Any, Any]] | None = None,
    *,
    params: bool = False,
    unroll: int | bool = 1,
    budget: Budget = None,
    plan: Plan | None = None,
    differentiation: str = "reverse",
    calibrate: bool = True,
) -> Any:
    """Decorator form of `scan`: from a step to a function that scans it.

    Args:
      step: (carry, x) -> (carry, y), or (params, carry, x) -> (carry, y) with `params=True`. Like a function under
        `jax.jit` it is traced once for inputs of the same types; what it reads from elsewhere is read then.
      params: whether the step, and so the decorated function, takes parameters first.
      unroll, budget, plan, differentiation, calibrate: as for `scan`.

    Returns:
      run([params,] init, xs=None, length=None, reverse=False) -> (carry, ys).

    >>> import jax, jax.numpy as jnp
    >>> @checkpointed(budget="90%", params=True)
    ... def run(w, carry, x):
    ...     carry = jnp.tanh(w * carry + x)
    ...     return carry, None
    >>> carry, _ = run(0.5, 0.0, jnp.ones(100))
    >>> jax.grad(lambda w: run(w, 0.0, jnp.ones(100))[0])(0.5).shape
    ()
    """
    options = checked_options(budget, plan, differentiation, calibrate)
    if step is None:
        return functools.partial(
            checkpointed,
            params=params,
            unroll=unroll,
            budget=budget,
            plan=plan,
            differentiation=differentiation,
            calibrate=calibrate,
        )

    def scan_with(given: tuple[Any, ...], init: Any, xs: Any, length: int | None, reverse: bool) -> Any:
        traced = trace(step, given, init, xs, length, reverse=reverse, unroll=unroll)
        return _run(traced, reverse, unroll, options)

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


def checked_options(
    budget: Budget, plan: Plan | None, differentiation: str, calibrate: bool, target: Any = None
) -> Options:
    """The options; raises for what is wrong with them whatever the step, so also where nothing is differentiated."""
    check_differentiation(differentiation)
    if budget != "auto":
        budget_to_bytes(budget, store_all_bytes=1)
    if not isinstance(calibrate, bool):
        raise TypeError(f"calibrate must be True or False, got {calibrate!r}.")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be a plan (Steps, Repeat, Chain or Remat) or None, got {plan!r}.")
    if plan is not None and budget is not None:
        raise ValueError(f"got budget={budget!r} and a plan: a plan is run as it is; pass one of the two.")
    if target is not None and not isinstance(getattr(target, "platform", None), str):
        raise TypeError(
            f"target must be a device, such as one of jax.experimental.topologies.get_topology_desc(...).devices, or "
            f"None, got {target!r}."
        )
    return Options(budget, plan, differentiation, calibrate, target)


def _run(traced: TracedScan, reverse: bool, unroll: int | bool, options: Options) -> Any:
    arguments = (traced.operands, traced.carry, traced.xs)
    try:
        program = choose(traced, options).program(traced.step, reverse, unroll)
    except BudgetError as error:
        if options.differentiation == "any":
            raise
        # Forwards any budget is enough; it is the gradient for which there is no plan.
        everything = choose(traced, Options()).program(traced.step, reverse, unroll)
        program = _without_gradient(everything, error)
    if options.differentiation == "reverse":
        arguments = jax.tree.map(_reverse_only, arguments)
    return traced.unflatten(*program(*arguments))


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
