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


@remember(1024)
def _swept(vjp: StepVjp, style: Style) -> Swept:
    return Swept(vjp, style)  # one object for each, because candidates are compared


def fastest_form(step: FlatStep, active: Active, machine: Machine) -> Swept | None:
    """The fastest form of a step; None where only the nest takes the step."""
    for style in (Style(), Style(merged=False)):
        if (vjp := _vjp_of(step, active, machine, style.merged, True)) is not None:
            return _swept(vjp, style)
    return None


def sweep_forms(step: FlatStep, active: Active, machine: Machine) -> list[Swept]:
    """The forms of a step, the fastest first and the one with the fewest bytes last; empty if only the nest takes it.

    The nest takes steps with effects, and steps with gradient rules of the user's own. A rule need not be the
    derivative of its function, so higher derivatives depend on when it is applied.
    """
    fastest = fastest_form(step, active, machine)
    if fastest is None:
        return []
    found = [fastest]
    if fastest.style.merged:
        found += _forms(step, active, machine, features=True)
    if found[-1].parts.features:
        found += _forms(step, active, machine, features=False)
    last = found[-1]
    if len(alternating(last.vjp)) > 1:  # one product has nothing to take turns with
        found.append(_swept(last.vjp, dataclasses.replace(last.style, in_turn=True)))
    return found


def _forms(step: FlatStep, active: Active, machine: Machine, *, features: bool) -> list[Swept]:
    """The form without merged products; none if there is none."""
    vjp = _vjp_of(step, active, machine, False, features)
    return [] if vjp is None else [_swept(vjp, Style(merged=False, features=features))]


@remember(256)
def _vjp_of(step: FlatStep, active: Active, machine: Machine, merged: bool, features: bool) -> StepVjp | None:
    """A step with its backward; None if only the nest takes it, or if it has no products to merge."""
    jaxpr = step.jaxpr.jaxpr
    if not may_run_again(jaxpr) or has_own_gradient(jaxpr):
        return None
    closed = step.body
    if merged and (closed := merge(closed, step.n_operands, step.n_carry, machine)) is step.body:
        return None
    try:
        return step_vjp(split(closed, step, active, machine, with_features=features))
    except (TypeError, ValueError, NotImplementedError):  # there is no reverse-mode derivative
        return None


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
