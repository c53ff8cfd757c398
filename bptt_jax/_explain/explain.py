"""`explain`: the plan for a budget, its predicted bytes, and the bytes XLA reports for the compiled program."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from bptt_jax._budget import Budget, budget_to_bytes
from bptt_jax._device.free_bytes import free_bytes
from bptt_jax._explain.report import Compiled, Report
from bptt_jax._jaxprs.types import Device, Tree
from bptt_jax._lower.loop import unroll_of
from bptt_jax._measure.measure import measure
from bptt_jax._options import Options, checked_options
from bptt_jax._pipeline import Choice, choose, fastest, store_all_bytes, told
from bptt_jax._step.sizes import summary
from bptt_jax._trace.along import Layout, layout_of
from bptt_jax._trace.call import Step
from bptt_jax._trace.gradient import Gradient, gradient_of
from bptt_jax._trace.trace import trace
from bptt_jax._verify.beside import beside_bytes
from bptt_jax._verify.check import measured
from bptt_jax.plans._blocks import in_blocks, leaf_lengths
from bptt_jax.plans._nodes import Plan
from bptt_jax.plans._profile import Lowering, StepProfile


def explain(
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
    in_axes: Tree = 0,
    out_axes: Tree = 0,
) -> Report:
    """Report on `scan` with the same arguments, its gradient compiled but not run.

    The gradient of the scan with respect to its parameters, `init` and `xs` is compiled for arguments of their shapes,
    and the bytes XLA reports are read. Under a budget `scan` does the same by itself to find the plan. In a job of
    several processes all of them have to call `explain`, if there is a budget.

    Args: as for `bptt_jax.scan`; the arrays may also be `jax.ShapeDtypeStruct`s, and

      target: the device to plan and to compile for. It need not be attached: for example, one of
        `jax.experimental.topologies.get_topology_desc(...).devices`. None: the default backend.

    Raises: as for `bptt_jax.scan`; `BudgetError` at once.

    >>> import jax.numpy as jnp
    >>> report = explain(lambda c, x: (jnp.sin(c) * x, None), jnp.ones(64), jnp.ones((100, 64)), budget="40%")
    >>> 100 < report.forward_steps < 200, report.measured_bytes <= report.budget_bytes
    (True, True)
    """
    options = checked_options(budget, plan, lowering, verify, target, host_budget)
    return explain_along(f, init, xs, length, reverse, unroll, options, layout_of(in_axes, out_axes))


def explain_along(
    f: Step,
    init: Tree,
    xs: Tree,
    length: int | None,
    reverse: bool,
    unroll: int | bool | None,
    options: Options,
    layout: Layout,
) -> Report:
    """`explain` with checked options, and with `layout` for the time axis of each leaf of xs and ys."""
    reports: list[Report] = []

    def inspect(init: Tree, xs: Tree) -> None:
        traced = trace(f, init, xs, length, reverse, unroll, options, layout)
        reports.append(report_on(gradient_of(traced.call, traced.arguments)))

    with jax.disable_jit(False):  # reports are about compiled programs
        jax.eval_shape(inspect, init, xs)
    return reports[0]


def _in_numbers(options: Options) -> Options:
    """The options with "auto" read once, because plan and report have to be of the same budget."""
    if options.budget != "auto":
        return options
    return dataclasses.replace(options, budget=free_bytes(options.machine.device))


def report_on(gradient: Gradient) -> Report:
    """The report on a gradient, with "auto" read now."""
    options = _in_numbers(gradient.call.options)
    gradient = dataclasses.replace(gradient, call=dataclasses.replace(gradient.call, options=options))
    call, choice = gradient.call, told(choose(gradient))
    form, everything = choice.form, store_all_bytes(gradient)
    checks = [
        Compiled(
            found.candidate.plan,
            "nested" if found.candidate.form is None else "sweep",
            found.candidate.predicted_bytes,
            found.measured_bytes,
            found.seconds,
            found is choice.own_check,
            found.host_bytes,
        )
        for found in choice.checks
    ]
    measured_bytes, host_bytes = _measured_bytes(choice)
    return Report(
        plan=choice.plan,
        profile=choice.profile,
        budget_bytes=budget_to_bytes(call.options.budget, everything),
        measured_bytes=measured_bytes,
        store_all_bytes=everything,
        beside_bytes=beside_bytes(gradient, measured_bytes),
        block=None if form is None else summary(form.vjp, form.style),
        checks=tuple(checks),
        unchecked=choice.unchecked,
        plan_seconds=choice.plan_seconds,
        together=_together(choice),
        host_budget_bytes=budget_to_bytes(call.options.host_budget, everything),
        host_bytes=host_bytes,
        is_one_memory=call.options.machine.is_cpu,
    )


def _together(choice: Choice) -> tuple[int, ...]:
    """The numbers of steps in an iteration of the plan's innermost loops."""
    plan = choice.plan if choice.form is None else in_blocks(choice.plan, choice.form.sizes.most_steps)
    return tuple(sorted({unroll_of(choice.gradient.call, n) for n in leaf_lengths(plan)})) or (1,)


def _measured_bytes(choice: Choice) -> tuple[int | None, int | None]:
    """The bytes XLA reports for the plan, on the device and on the host; None where it cannot be compiled."""
    if choice.own_check is not None:
        on_device, on_host = choice.own_check.measured_bytes, choice.own_check.host_bytes
    else:  # `measured` and not `check`, because processes agree on a check and here one may ask alone
        found = measured(choice.gradient, choice.plan, choice.form)
        on_device, on_host = found.temporary_bytes, found.host_bytes
    return (int(on_device), int(on_host)) if math.isfinite(on_device) else (None, None)


def profile(f: Step, init: Tree, x: Tree, *, lowering: Lowering | None = None, target: Device = None) -> StepProfile:
    """Bytes of one step of a scan, for planners: estimated from its shapes, nothing compiled.

    Args:
      f: the step, (carry, x) -> (carry, y), as for `bptt_jax.scan`.
      init: the first carry: any pytree of arrays or `jax.ShapeDtypeStruct`s.
      x: one step's input (a slice of xs, without the time axis); likewise, or None.
      lowering: as for `bptt_jax.scan`; the sweep keeps fewer bytes.
      target: as for `bptt_jax.scan`.

    Returns:
      A `StepProfile`; each closed-over floating array counts as a differentiated parameter.

    Raises:
      the errors of `jax.lax.scan` for the step; ValueError for an unknown `lowering`.

    >>> import jax.numpy as jnp
    >>> measured = profile(lambda carry, x: (jnp.sin(carry) + x, carry), jnp.zeros(256), jnp.zeros(256))
    >>> measured.carry_bytes, measured.residual_bytes, measured.x_bytes, measured.y_bytes
    (1024, 1024, 1024, 1024)
    """
    options = checked_options(lowering=lowering, target=target)
    found: list[StepProfile] = []
    length = 2  # any number, because the bytes of a step do not depend on it

    def measured_here(init: Tree, x: Tree) -> None:
        xs = jax.tree.map(lambda leaf: jnp.stack([leaf] * length), x)
        traced = trace(f, init, xs, length, False, None, options)
        gradient = gradient_of(traced.call, traced.arguments)
        found.append(measure(gradient, fastest(gradient)))

    with jax.disable_jit(False):
        jax.eval_shape(measured_here, init, x)
    return found[0]
