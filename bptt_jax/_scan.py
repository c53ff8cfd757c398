"""The façade: `scan`, the drop-in for `jax.lax.scan`, and its decorator form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
from jax import lax

from bptt_jax._budget import Budget
from bptt_jax._jaxprs.equations import is_debug, is_named_axis
from bptt_jax._jaxprs.types import Device, Tree
from bptt_jax._options import Options, check_options, checked_options
from bptt_jax._primitives.direct import run_now
from bptt_jax._primitives.scan import scan_p
from bptt_jax._trace.along import TIME_FIRST, Layout, layout_of
from bptt_jax._trace.call import Step
from bptt_jax._trace.trace import trace
from bptt_jax.plans._nodes import Plan
from bptt_jax.plans._nodes import length as length_of
from bptt_jax.plans._profile import Lowering


def scan(
    f: Step,
    init: Tree,
    xs: Tree = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    budget: Budget = None,
    plan: Plan | None = None,
    lowering: Lowering | None = None,
    verify: bool = True,
    target: Device = None,
    in_axes: Tree = 0,
    out_axes: Tree = 0,
) -> tuple[Any, Any]:
    """`jax.lax.scan`, whose backward pass stays within a budget of bytes.

    Values and derivatives are those of `jax.lax.scan`, under every transformation: nothing is truncated. The arrays
    that the backward pass keeps, and those that it computes again, are planned from the sizes of the step and the
    budget, when the call is differentiated; a call that is not costs nothing extra.

    It is one JAX primitive. Under `jax.vmap` the batch goes into the step, so all examples together keep the budget,
    and weights that they share have one gradient, summed where it is made.

    Reference program, as for `jax.lax.scan`::

        def scan(f, init, xs, length=None):
            carry, ys = init, []
            for x in [None] * length if xs is None else xs:
                carry, y = f(carry, x)
                ys.append(y)
            return carry, np.stack(ys)

    Args:
      f: the step, (carry, x) -> (carry, y), pytrees of arrays; the carry keeps its structure, shapes and dtypes.
        Floating arrays that it closes over are differentiated as well.
      init: the first carry.
      xs: what to scan over, along the leading axes or `in_axes`; or None with `length`.
      length: the number of steps; must agree with `xs`.
      reverse: whether to go through `xs` from the end; `ys` are in the order of `xs`.
      unroll: steps per iteration of the innermost loops, as in `jax.lax.scan`.
      budget: temporary bytes, per device, of the compiled gradient of this scan with respect to all inputs that are
        differentiated (params, init, xs, or some leaves of them), as XLA reports them: None (no limit), an int,
        "64MiB", "1.5GB", "5%" of the bytes that `jax.lax.scan` would need for it, as predicted from the step's shapes,
        or "auto", three quarters of the bytes that the device has free when the call is differentiated (rounded down
        to three binary digits; the least of all processes). Bytes are a promise: where no plan keeps it, `BudgetError`
        is raised. A percentage is a wish: there the smallest plan runs, with a `BudgetWarning`. Under vmap all examples
        count; in a shard_map and under explicit sharding the shard's shapes; under automatic sharding the global
        array's, which is safe. Derivatives of gradients work, and are not bounded. In a job of several processes each
        has to trace the call: they agree on what was measured.
      plan: a plan to run as it is, instead of a budget.
      lowering: the way that a gradient runs: "sweep", "nested" (`jax.checkpoint` around `jax.lax.scan`, nested as the
        plan is), or None, the sweep where it can; steps with derivative rules of the user's own take the nest.
      verify: whether to compile the gradient by itself, with one to four plans, until XLA's own figure is within the
        budget; each step, length and budget once in a process. Without, sizes are estimated from shapes with a margin
        of 15 %, which is no promise. Where the gradient cannot be compiled by itself, a budget of bytes is an estimate
        as well, with an `UnverifiedWarning`.
      target: the device that is compiled for, where it is not the default backend (`jax.export`, ahead-of-time
        compiling): one of `jax.experimental.topologies.get_topology_desc(...).devices`, say. Plans are checked for it.
      in_axes, out_axes: the axes of time of `xs` and of `ys`, an int for all leaves or a pytree of ints that begins as
        `xs` or `ys` does. `in_axes=1, out_axes=1` takes (batch, time, features) and returns them: steps are read and
        written where they are, so a copy with time first, which `jnp.moveaxis` would make, is in no program.

    Returns:
      (carry, ys), as `jax.lax.scan`.

    Raises:
      BudgetError: if no plan takes as few bytes as asked, when the call is differentiated.
      TypeError, ValueError: what `jax.lax.scan` raises, or for malformed options.

    >>> import jax, jax.numpy as jnp
    >>> def running_sum(carry, x):
    ...     return carry + x, carry + x
    >>> total, sums = scan(running_sum, jnp.zeros(2), jnp.ones((2, 3)), in_axes=1, out_axes=1)
    >>> sums.tolist()
    [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]

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
    options = checked_options(budget, plan, lowering, verify, target)
    return scan_along(f, init, xs, length, reverse, unroll, options, layout_of(in_axes, out_axes))


def scan_along(
    f: Step,
    init: Tree,
    xs: Tree,
    length: int | None,
    reverse: bool,
    unroll: int | bool,
    options: Options,
    layout: Layout,
) -> tuple[Any, Any]:
    """`scan`, with time wherever it is in each leaf of xs and ys."""
    pair: tuple[Any, Any]
    if cast(Any, jax.config).jax_disable_jit:  # the step runs in Python, with values, as in JAX
        if layout is TIME_FIRST:
            pair = lax.scan(f, init, xs, length, reverse, unroll)
            return pair
        carry, ys = lax.scan(f, init, layout.first(xs), length, reverse, unroll)
        return carry, layout.back(ys)
    traced = trace(f, init, xs, length, reverse, unroll, options, layout)
    call, plan = traced.call, options.plan
    if plan is not None and length_of(plan) != call.length:
        raise ValueError(f"the plan has {length_of(plan)} steps, but the scan has {call.length}.")
    if all(is_debug(effect) or is_named_axis(effect) for effect in call.step.jaxpr.effects):
        pair = traced.finish(scan_p.bind(*traced.arguments, call=call))
    else:
        pair = traced.finish(run_now(call, traced.arguments))
    return pair


def checkpointed(
    step: Callable[..., tuple[Any, Any]] | None = None,
    *,
    params: bool = False,
    unroll: int | bool = 1,
    budget: Budget = None,
    plan: Plan | None = None,
    lowering: Lowering | None = None,
    verify: bool = True,
    target: Device = None,
    in_axes: Tree = 0,
    out_axes: Tree = 0,
) -> Any:
    """Decorator form of `scan`: from a step to a function that scans it.

    Args:
      step: (carry, x) -> (carry, y), or (params, carry, x) -> (carry, y) with `params=True`. Like a function under
        `jax.jit` it is traced once for inputs of the same types; what it reads from elsewhere is read then.
      params: whether the step, and so the decorated function, takes parameters first.
      unroll, budget, plan, lowering, verify, target, in_axes, out_axes: as for `scan`.

    Returns:
      run([params,] init, xs=None, length=None, reverse=False) -> (carry, ys).

    >>> import jax, jax.numpy as jnp
    >>> @checkpointed(budget="1MiB", params=True)
    ... def run(w, carry, x):
    ...     carry = jnp.tanh(w * carry + x)
    ...     return carry, None
    >>> carry, _ = run(0.5, 0.0, jnp.ones(100))
    >>> jax.grad(lambda w: run(w, 0.0, jnp.ones(100))[0])(0.5).shape
    ()
    """
    check_options(budget, plan, lowering, verify, target)
    options: dict[str, Any] = {"budget": budget, "plan": plan, "lowering": lowering, "verify": verify}
    options |= {"target": target, "unroll": unroll, "in_axes": in_axes, "out_axes": out_axes}
    if step is None:
        return functools.partial(checkpointed, params=params, **options)

    def with_params(carry: Tree, x: Tree) -> Any:
        # Handed on unchanged, which JAX finds out and makes an operand of: its cache of traces then knows the step.
        params, carry = carry
        carry, y = step(params, carry, x)
        return (params, carry), y

    if params:

        def run(params: Tree, init: Tree, xs: Tree = None, length: int | None = None, reverse: bool = False) -> Any:
            try:
                (_, carry), ys = scan(with_params, (params, init), xs, length, reverse, **options)
            except TypeError as error:
                if str(error).startswith("scan body function"):  # of the carry; named as in the user's step
                    jax.eval_shape(lambda: lax.scan(functools.partial(step, params), init, xs, length, reverse))
                raise
            return carry, ys
    else:
        # mypy wants both branches of one signature; that they differ is the point of `params`.
        def run(init: Tree, xs: Tree = None, length: int | None = None, reverse: bool = False) -> Any:  # type: ignore[misc]
            return scan(step, init, xs, length, reverse, **options)

    # The signature is run's own, so no __wrapped__; the names and the docstring are the step's.
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        if hasattr(step, name):
            setattr(run, name, getattr(step, name))
    return run
