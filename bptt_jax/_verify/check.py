"""A check: the temporary bytes that XLA reports for the gradient of one scan, compiled by itself under one plan."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, cast

import jax
from jax.extend import core

from bptt_jax._caches import remember
from bptt_jax._device.processes import greatest_of_processes
from bptt_jax._jaxprs.arrays import is_float
from bptt_jax._jaxprs.equations import has_own_gradient
from bptt_jax._lower.program import program_of
from bptt_jax._step.form import Swept
from bptt_jax._trace.call import Arrays, FlatStep, replace, select
from bptt_jax._trace.gradient import Gradient
from bptt_jax._verify.temporaries import mesh_of_types, temporaries_of_gradient
from bptt_jax.plans._nodes import Plan

_REMEMBERED = 1024


class CannotCompileError(Exception):
    """The gradient cannot be compiled by itself, outside of the mesh that it is in, say; or no memory is reported."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What XLA reports.

    Attributes:
      temporary_bytes: of the compiled program, on one device; infinite where the compiler refused it for its size, and
        not a number where it cannot be compiled by itself.
      seconds: that tracing and compiling took when it was done.
      reason: why it cannot be compiled.
    """

    temporary_bytes: float
    seconds: float
    reason: str = ""


def check(gradient: Gradient, plan: Plan, form: Swept | None) -> Measured:
    """`measured`, as the processes of a job agree on it, each of which has to call this: the largest.

    On a GPU their compilers may choose other kernels.

    Raises:
      CannotCompileError: if a process cannot compile the gradient.
    """
    found = measured(gradient, plan, form)
    agreed = greatest_of_processes(found.temporary_bytes)
    if math.isnan(agreed):
        raise CannotCompileError(found.reason or "another process cannot compile it")
    return dataclasses.replace(found, temporary_bytes=agreed)


def measured(gradient: Gradient, plan: Plan, form: Swept | None) -> Measured:
    """Compiles the gradient under a plan, for abstract arguments; what was compiled in this process is remembered.

    The result is a function of the step's equations, the shapes, the device and the versions.

    Args:
      gradient: the gradient.
      plan: of its length.
      form: the step as the sweep runs it; None for the nest.
    """
    call = gradient.call
    others = [field.name for field in dataclasses.fields(call) if field.name not in ("step", "options")]
    key = (
        program_key(call.step),
        (call.step.n_operands, call.step.n_carry),
        tuple(getattr(call, name) for name in others),
        tuple(map(str, gradient.types)),
        gradient.wrt,
        gradient.vmaps,
        None if form is None else form.style,
        plan,
        call.options.machine,
        jax.device_count(),  # where there are several, products may be merged otherwise
        (jax.sharding.get_abstract_mesh(), mesh_of_types(gradient)),
        cast(Any, jax.config).jax_enable_x64,
    )
    return _measured(_Program(key, gradient, plan, form))


@dataclasses.dataclass(frozen=True)
class _Program:
    """A program to compile; equal to another one if their keys are, in which is all that it depends on."""

    key: Any
    gradient: Gradient = dataclasses.field(compare=False)
    plan: Plan = dataclasses.field(compare=False)
    form: Swept | None = dataclasses.field(compare=False)


@remember(_REMEMBERED)
def _measured(asked: _Program) -> Measured:
    start, reason = time.perf_counter(), ""
    program = program_of(asked.gradient, asked.plan, asked.form)
    try:
        found: float = temporaries_of_gradient(asked.gradient, program)
    except (NameError, TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        # What JAX raises for a step that cannot be compiled outside of the mesh that it is in; its own errors, and that
        # of a backend which reports no memory, are RuntimeErrors.
        found, reason = math.nan, f"{type(error).__name__}: {error}"
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            found = math.inf
    return Measured(found, time.perf_counter() - start, reason)


def program_key(step: FlatStep) -> Any:
    """Equal for steps that are compiled to equal programs.

    Rules of the user's own are printed by their names, and closures have the same one; so the equations of their
    gradient are added.
    """
    text = str(step.jaxpr)
    if not has_own_gradient(step.jaxpr.jaxpr):
        return text

    def gradient(*leaves: Any) -> Any:
        mask = [is_float(leaf) for leaf in leaves]

        def run(given: Arrays) -> Arrays:
            return [out for out in core.jaxpr_as_fun(step.jaxpr)(*replace(leaves, mask, given)) if is_float(out)]

        outs, vjp = jax.vjp(run, select(leaves, mask))
        return vjp(outs)

    try:
        return text, str(jax.make_jaxpr(gradient)(*step.jaxpr.in_avals))
    except (TypeError, ValueError, NotImplementedError):  # there is no reverse-mode derivative
        return step
