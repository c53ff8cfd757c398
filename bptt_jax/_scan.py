"""The façade: `scan`, the drop-in for `jax.lax.scan`, and its decorator form `checkpointed`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
from jax import lax

from bptt_jax._budget import Budget
from bptt_jax._jaxprs.equations import may_run_again
from bptt_jax._jaxprs.types import Device, Tree
from bptt_jax._options import Options, check_options, checked_options, label_of
from bptt_jax._primitives.effects import run_now
from bptt_jax._primitives.scan import scan_p
from bptt_jax._progress.report import Pass, reporting_step
from bptt_jax._trace.along import TIME_FIRST, Layout, layout_of
from bptt_jax._trace.call import Step
from bptt_jax._trace.trace import given_unroll, trace
from bptt_jax.plans._nodes import Plan
from bptt_jax.plans._nodes import length as length_of
from bptt_jax.plans._profile import Lowering


def scan(
    f: Step,
    init: Tree,
    xs: Tree = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool | None = None,
    *,
    budget: Budget = None,
    host_budget: Budget = None,
    plan: Plan | str | None = None,
    lowering: Lowering | None = None,
    verify: bool = True,
    target: Device = None,
    progress: str | bool | None = None,
    in_axes: Tree = 0,
    out_axes: Tree = 0,
) -> tuple[Any, Any]:
    """`jax.lax.scan`, whose backward pass stays within a budget of bytes.

    Values and derivatives are those of `jax.lax.scan`, under every transformation: nothing is truncated. When the call
    is differentiated, a plan is made from the sizes of the step and the budget: which arrays the backward pass keeps,
    and which it computes again. A call without derivatives costs nothing extra.

    `scan` is one JAX primitive. Under `jax.vmap` the batch goes into the step, so all examples together keep the
    budget. Weights shared by the examples have one gradient, summed over the examples where it is computed.

    Reference program, as for `jax.lax.scan`::

        def scan(f, init, xs, length=None):
            carry, ys = init, []
            for x in [None] * length if xs is None else xs:
                carry, y = f(carry, x)
                ys.append(y)
            return carry, np.stack(ys)

    Args:
      f: the step, (carry, x) -> (carry, y), pytrees of arrays; the carry keeps its structure, shapes and dtypes.
        Floating arrays in its closure are differentiated as well.
      init: the first carry.
      xs: a pytree of arrays to scan over, along the leading axes or `in_axes`; or None with `length`.
      length: the number of steps; must agree with `xs`.
      reverse: whether to go through `xs` from the end; `ys` are in the order of `xs`.
      unroll: steps per iteration of the innermost loops, as in `jax.lax.scan`; True and 0 are all. None is one on CPU;
        on accelerators up to five of small steps, because iterations launch kernels, where a loop's length can be
        divided so. `explain` shows the number.
      budget: a limit on the temporary bytes, per device, of this scan's compiled gradient, as XLA reports them. The
        gradient is with respect to all differentiated inputs (params, init, xs, or some leaves of them). The limit is
        None (no limit), an int, or a string: "64MiB", "1.5GB", "5%" or "auto".
        A percentage is a share of the bytes `jax.lax.scan` would need for this gradient, as predicted from the step's
        shapes. "auto" is three quarters of the bytes free on the device when the call is differentiated (rounded down
        to three binary digits; the least of all processes).
        Bytes are a promise: if no plan keeps it, `BudgetError` is raised. A percentage is a wish: if no plan keeps it,
        the smallest plan runs, with a `BudgetWarning`.
        Under vmap all examples count. In a shard_map and under explicit sharding the shard's shapes count; under
        automatic sharding the global array's, which is safe. Derivatives of gradients keep the plan, unchecked.
        In a job of several processes each has to trace the call, because they agree on the bytes measured.
      host_budget: beside a budget, a limit on bytes in the host's memory (GPU, TPU), in the same forms but for "auto".
        The outermost loops of a plan may keep carries or residuals there, if moving them is predicted to be faster than
        evaluating steps again. Blocks are moved while others are worked on. With room for all residuals no step is
        evaluated twice; with room for carries, each step once more. Both limits are checked. On CPU there is one
        memory, so the budget is the sum of both.
      plan: a plan to run as it is, instead of a budget; or its notation, for example "(3*[25] + 25)".
      lowering: the program of the gradient: "sweep"; "nested" (`jax.checkpoint` around `jax.lax.scan`, nested as the
        plan is); or None, the sweep where possible. Steps with derivative rules of the user's own take the nest.
      verify: whether to compile the gradient by itself, with one to four plans, until the bytes XLA reports are within
        the budget. This is done once in a process for each step, length and budget. With False, sizes are estimated
        from shapes with a margin of 15 %, which is no promise. Where the gradient cannot be compiled by itself, a
        budget of bytes is kept by an estimate as well, with an `UnverifiedWarning`.
      target: the device to compile for, if it is not the default backend (`jax.export`, ahead-of-time compiling): for
        example, one of `jax.experimental.topologies.get_topology_desc(...).devices`. Plans are checked for it.
      progress: a label such as "training", or True for "scan": a bar of the steps done, "training forward", and one of
        the backward pass, drawn by rich on stderr; lines of text where rich is not installed or stderr is no terminal.
        Calls of equal labels share their bars: each starts them anew. The compiled program reports before some ten
        of its blocks in each pass, by callbacks of a millisecond or so on CPU: once for all examples of a vmap,
        and never from steps evaluated again. These count among the bytes of a budget, and keep JAX from exporting the
        program and from storing it in its persistent compilation cache. Forward mode has the forward bar only, as have
        `jax.disable_jit` and steps with effects that JAX itself has to differentiate. None and False: nothing is shown,
        traced or transferred.
      in_axes, out_axes: the time axes of `xs` and of `ys`: an int for all leaves, or a pytree of ints, a tree prefix of
        `xs` or `ys`. For example, `in_axes=1, out_axes=1` takes and returns (batch, time, features). Steps are read
        and written along these axes, so no program contains the time-first copy of `jnp.moveaxis`.

    Returns:
      (carry, ys), as `jax.lax.scan`.

    Raises:
      BudgetError: when the call is differentiated, if no plan takes as few bytes as asked.
      TypeError, ValueError: as raised by `jax.lax.scan`, or for malformed options.

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

    Not for loops of dynamic length (`jax.lax.while_loop`), nor where everything fits anyway: then a budget only costs
    compile time.
    """
    options = checked_options(budget, plan, lowering, verify, target, host_budget, progress)
    return scan_along(f, init, xs, length, reverse, unroll, options, layout_of(in_axes, out_axes))


def scan_along(
    f: Step,
    init: Tree,
    xs: Tree,
    length: int | None,
    reverse: bool,
    unroll: int | bool | None,
    options: Options,
    layout: Layout,
) -> tuple[Any, Any]:
    """`scan` with checked options, and with `layout` for the time axis of each leaf of xs and ys."""
    pair: tuple[Any, Any]
    if cast(Any, jax.config).jax_disable_jit:  # the step runs in Python, with values, as in JAX
        f = reporting_step(f, Pass(options.progress, "forward", 0), lambda: layout.steps(xs, length))
        return _by_jax(f, init, xs, length, reverse, unroll, layout)
    if layout.has_unknown_length(xs, length):  # as in `jax.export` for any length
        if options.budget is not None or options.plan is not None:
            raise ValueError("the number of steps is not known, so no plan is made: leave out budget= and plan=.")
        if options.progress is not None:
            raise ValueError("the number of steps is not known, so there is no bar: leave out progress=.")
        return _by_jax(f, init, xs, length, reverse, unroll, layout)
    traced = trace(f, init, xs, length, reverse, unroll, options, layout)
    call, plan = traced.call, options.plan
    if plan is not None and length_of(plan) != call.length:
        raise ValueError(f"the plan has {length_of(plan)} steps, but the scan has {call.length}.")
    if may_run_again(call.step.jaxpr.jaxpr):
        pair = traced.finish(scan_p.bind(*traced.arguments, call=call))
    else:  # JAX allows other effects, on references or by callbacks with results, only in equations of its own
        pair = traced.finish(run_now(call, traced.arguments))
    return pair


def _by_jax(
    f: Step, init: Tree, xs: Tree, length: int | None, reverse: bool, unroll: int | bool | None, layout: Layout
) -> tuple[Any, Any]:
    """The results of `jax.lax.scan` itself."""
    pair: tuple[Any, Any]
    if layout is TIME_FIRST:
        pair = lax.scan(f, init, xs, length, reverse, given_unroll(unroll))
        return pair
    carry, ys = lax.scan(f, init, layout.first(xs), length, reverse, given_unroll(unroll))
    return carry, layout.back(ys)


def checkpointed(
    step: Callable[..., tuple[Any, Any]] | None = None,
    *,
    params: bool = False,
    unroll: int | bool | None = None,
    budget: Budget = None,
    host_budget: Budget = None,
    plan: Plan | str | None = None,
    lowering: Lowering | None = None,
    verify: bool = True,
    target: Device = None,
    progress: str | bool | None = None,
    in_axes: Tree = 0,
    out_axes: Tree = 0,
) -> Any:
    """Decorator form of `scan`: turns a step into a function scanning it.

    Args:
      step: (carry, x) -> (carry, y), or (params, carry, x) -> (carry, y) with `params=True`. Like a function under
        `jax.jit` it is traced once for inputs of the same types, and reads values from outside only then.
      params: whether the step, and so the decorated function, takes parameters first.
      unroll, budget, host_budget, plan, lowering, verify, target, in_axes, out_axes: as for `scan`.
      progress: likewise, where True stands for the name of the step.

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
    check_options(budget, plan, lowering, verify, target, host_budget, progress)
    options: dict[str, Any] = {"budget": budget, "plan": plan, "lowering": lowering, "verify": verify}
    options |= {
        "host_budget": host_budget,
        "target": target,
        "unroll": unroll,
        "in_axes": in_axes,
        "out_axes": out_axes,
    }
    if step is not None and not callable(step):
        raise TypeError(f"checkpointed decorates a step, got {step!r}. Did you mean budget={step!r}?")
    if step is None:
        return functools.partial(checkpointed, params=params, progress=progress, **options)
    options["progress"] = label_of(progress, getattr(step, "__name__", "scan"))

    def with_params(carry: Tree, x: Tree) -> Any:
        # Params are part of the carry, because JAX's cache of traces would not know a new closure over them. They are
        # passed on unchanged, so JAX makes operands of them.
        params, carry = carry
        carry, y = step(params, carry, x)
        return (params, carry), y

    if params:

        def run(params: Tree, init: Tree, xs: Tree = None, length: int | None = None, reverse: bool = False) -> Any:
            try:
                (_, carry), ys = scan(with_params, (params, init), xs, length, reverse, **options)
            except TypeError as error:
                if str(error).startswith("scan body function"):  # raised again, with the names in the user's own carry
                    jax.eval_shape(lambda: lax.scan(functools.partial(step, params), init, xs, length, reverse))
                raise
            return carry, ys
    else:
        # mypy wants one signature in both branches, but to differ is the point of `params`.
        def run(init: Tree, xs: Tree = None, length: int | None = None, reverse: bool = False) -> Any:  # type: ignore[misc]
            return scan(step, init, xs, length, reverse, **options)

    _name_after(run, step)
    return run


def _name_after(run: Callable[..., Any], step: Callable[..., Any]) -> None:
    """Gives `run` the names and the docstring of the step; no __wrapped__, because the signature is its own."""
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        if hasattr(step, name):
            setattr(run, name, getattr(step, name))
