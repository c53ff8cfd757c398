"""A step as the sweep runs it: made once for its differentiated leaves and a machine, and handed on."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from bptt_jax._caches import remember
from bptt_jax._device.machine import Machine
from bptt_jax._jaxprs.equations import has_own_gradient, may_run_again
from bptt_jax._jaxprs.quiet import callbacks, quiet
from bptt_jax._jaxprs.types import Leaf
from bptt_jax._step.merge import merge
from bptt_jax._step.sizes import BlockSizes, alternating, block_sizes
from bptt_jax._step.split import SplitStep, split
from bptt_jax._step.style import Style
from bptt_jax._step.vjp import StepVjp, step_vjp
from bptt_jax._trace.active import Active
from bptt_jax._trace.call import FlatStep, ScanCall, replace, select


@dataclasses.dataclass(frozen=True, eq=False)
class Swept:
    """A step with its backward, and the style in which its blocks take their products.

    Attributes:
      vjp: the step taken apart, and its backward.
      style: how blocks take products.
    """

    vjp: StepVjp
    style: Style

    @property
    def parts(self) -> SplitStep:
        return self.vjp.parts

    @functools.cached_property
    def quiet(self) -> Swept:
        """The same without callbacks for debugging; itself if there are none."""
        parts, pull = self.parts, self.vjp.pull
        if not callbacks([*parts.loop_eqns, *self.vjp.eqns, *pull.eqns]):
            return self
        return Swept(
            dataclasses.replace(
                self.vjp,
                parts=dataclasses.replace(parts, loop_eqns=tuple(quiet(parts.loop_eqns))),
                eqns=quiet(self.vjp.eqns),
                pull=dataclasses.replace(pull, eqns=quiet(pull.eqns)),
            ),
            self.style,
        )

    @functools.cached_property
    def sizes(self) -> BlockSizes:
        """The bytes of its blocks."""
        return block_sizes(self.vjp, self.style)


def fastest_form(step: FlatStep, active: Active, machine: Machine) -> Swept | None:
    """The fastest form of a step; None where only the nest takes the step."""
    found = _forms_of(step, active, machine, True) or _forms_of(step, active, machine, False)
    return found[0] if found else None


def sweep_forms(step: FlatStep, active: Active, machine: Machine) -> list[Swept]:
    """The forms of a step, the fastest first and the one with the fewest bytes last; empty if only the nest takes it.

    The nest takes steps with effects, and steps with gradient rules of the user's own. A rule need not be the
    derivative of its function, so higher derivatives depend on when it is applied.
    """
    return [form for merged in (True, False) for form in _forms_of(step, active, machine, merged)]


@remember(256)
def _forms_of(step: FlatStep, active: Active, machine: Machine, merged: bool) -> tuple[Swept, ...]:
    jaxpr = step.jaxpr.jaxpr
    if not may_run_again(jaxpr) or has_own_gradient(jaxpr):
        return ()
    closed = step.body
    # A step without products to merge has no merged form.
    if merged and (closed := merge(closed, step.n_operands, step.n_carry, machine)) is step.body:
        return ()
    try:
        vjp = step_vjp(split(closed, step, active, machine))
    except (TypeError, ValueError, NotImplementedError):  # there is no reverse-mode derivative
        return ()
    styles = [Style(merged=merged)]
    if not merged and len(alternating(vjp)) > 1:  # one product has nothing to take turns with
        styles.append(Style(merged=False, in_turn=True))
    return tuple(Swept(vjp, style) for style in styles)


def has_vjp(call: ScanCall, active: Active) -> bool:
    """Whether a step has a reverse-mode derivative; for example, one with a `jax.lax.while_loop` has none."""
    # A form has a backward, traced already.
    if call.options.lowering != "nested" and fastest_form(call.step, active, call.options.machine) is not None:
        return True
    return _has_vjp(call.step, active)


@remember(1024)
def _has_vjp(step: FlatStep, active: Active) -> bool:
    mask = (*active.operands, *active.carry, *active.x)

    def vjp(*inputs: Leaf) -> Any:
        def run(chosen: Any) -> Any:
            carry, y = step(*step.split(replace(inputs, mask, chosen)))
            return [*select(carry, active.carry), *select(y, active.y)]

        outs, pull = jax.vjp(run, select(inputs, mask))
        return pull(outs)

    try:
        jax.eval_shape(vjp, *step.jaxpr.in_avals)
    except (TypeError, ValueError, NotImplementedError):  # JAX's errors where there is no reverse-mode derivative
        return False
    return True
