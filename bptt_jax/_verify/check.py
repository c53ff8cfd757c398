"""A check: XLA's temporary bytes for the gradient of one scan, compiled by itself under one plan."""

from __future__ import annotations

import dataclasses
import logging
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
from bptt_jax.plans._notation import notation

_log = logging.getLogger("bptt_jax")
_REMEMBERED = 1024


class CannotCompileError(Exception):
    """The gradient cannot be compiled by itself, for example outside its mesh; or no memory is reported."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """XLA's report on one program.

    Attributes:
      temporary_bytes: of the compiled program, on one device; infinite where the compiler refused it for its size, and
        not a number where it cannot be compiled by itself.
      seconds: the time of tracing and compiling; a remembered result keeps its first time.
      reason: why it cannot be compiled; else empty.
      host_bytes: of the compiled program, in the memory of the host.
    """

    temporary_bytes: float
    seconds: float
    reason: str = ""
    host_bytes: float = 0.0


def check(gradient: Gradient, plan: Plan, form: Swept | None) -> Measured:
    """The result of `measured`, with the largest bytes of all processes of a job; each of them has to call this.

    The processes may differ, because on a GPU their compilers may choose different kernels.

    Raises:
      CannotCompileError: if a process cannot compile the gradient.
    """
    found = measured(gradient, plan, form)
    agreed = greatest_of_processes(found.temporary_bytes)
    if math.isnan(agreed):
        raise CannotCompileError(found.reason or "another process cannot compile it")
    on_host = greatest_of_processes(found.host_bytes) if gradient.call.options.may_use_host else 0.0
    return dataclasses.replace(found, temporary_bytes=agreed, host_bytes=on_host)


def measured(gradient: Gradient, plan: Plan, form: Swept | None) -> Measured:
    """Compiles the gradient under a plan, for abstract arguments; results are remembered in the process.

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
        call.options.progress is not None,  # its callbacks take some bytes; its label takes none
        jax.device_count(),  # with several devices, products may be merged differently
        (jax.sharding.get_abstract_mesh(), mesh_of_types(gradient)),
        cast(Any, jax.config).jax_enable_x64,
    )
    return _measured(_Program(key, gradient, plan, form))


@dataclasses.dataclass(frozen=True)
class _Program:
    """A program to compile, compared by its key alone: the key has everything the program depends on."""

    key: Any
    gradient: Gradient = dataclasses.field(compare=False)
    plan: Plan = dataclasses.field(compare=False)
    form: Swept | None = dataclasses.field(compare=False)


@remember(_REMEMBERED)
def _measured(asked: _Program) -> Measured:
    start, reason, on_host = time.perf_counter(), "", 0
    program = program_of(asked.gradient, asked.plan, asked.form)
    try:
        found: float
        found, on_host = temporaries_of_gradient(asked.gradient, program)
    except (NameError, TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        # JAX raises these for a step that cannot be compiled outside its mesh. JAX's own errors, and the error for a
        # backend without reports of memory, are RuntimeErrors.
        found, reason = math.nan, f"{type(error).__name__}: {error}"
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            found = math.inf
    seconds = time.perf_counter() - start
    length, plan = asked.gradient.call.length, notation(asked.plan)
    _log.info(
        "compiled a scan of %d steps with plan %s in %.1f s, to check its bytes: %s", length, plan, seconds, found
    )
    return Measured(found, seconds, reason, on_host)


def program_key(step: FlatStep) -> Any:
    """A key of a step, equal for steps compiled to equal programs.

    The text of a jaxpr has the user's own derivative rules by name only, and closures share one name. So the equations
    of the gradient are added for steps with rules of their own.
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
    except (TypeError, ValueError, NotImplementedError):  # no reverse-mode derivative: equal to itself only
        return step
