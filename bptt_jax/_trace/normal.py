"""The normal form of a step: no leaf of the carry is passed on unchanged, and no equation is without use.

Models are often handed on in the carry, through a `jax.checkpoint` or a jit of the step. Every checkpoint of a plan
would hold them. As operands they are held once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval as pe

from bptt_jax._caches import remember
from bptt_jax._jaxprs.equations import may_run_again, with_parts
from bptt_jax._jaxprs.structure import configuration, structure
from bptt_jax._jaxprs.untouched import sources
from bptt_jax._trace.call import Arrays, FlatStep, Mask, replace, select


@dataclasses.dataclass(frozen=True, eq=False)
class NormalStep:
    """A step in normal form.

    Attributes:
      step: the step; its last operands are the untouched leaves of the carry.
      untouched: the mask of leaves that the step as written passes on unchanged, over its carry.
    """

    step: FlatStep
    untouched: Mask

    def inputs(self, as_written: Arrays) -> list[Any]:
        """The inputs of the normal step from those of the step as written, for one step or for a scan."""
        start = self.step.n_operands - sum(self.untouched)
        end = start + len(self.untouched)
        carry = as_written[start:end]
        moving = [not is_untouched for is_untouched in self.untouched]
        return [*as_written[:start], *select(carry, self.untouched), *select(carry, moving), *as_written[end:]]

    def outputs(self, inputs: Arrays, outs: Arrays) -> list[Any]:
        """The outputs of the step as written from inputs and outputs of the normal step."""
        passed_on = inputs[self.step.n_operands - sum(self.untouched) : self.step.n_operands]
        carry = replace([None] * len(self.untouched), self.untouched, passed_on)
        moving = [not is_untouched for is_untouched in self.untouched]
        return [*replace(carry, moving, outs[: self.step.n_carry]), *outs[self.step.n_carry :]]


def normal(step: FlatStep) -> NormalStep:
    """The normal form of a step, the same object for equal steps.

    Steps with effects on references and the like stay as they are.
    """
    jaxpr, n = step.jaxpr.jaxpr, step.n_operands
    if not may_run_again(jaxpr):
        return NormalStep(step, (False,) * step.n_carry)
    untouched = tuple(source == n + i for i, source in enumerate(sources(jaxpr)[: step.n_carry]))
    found = NormalStep(FlatStep(step.jaxpr, n + sum(untouched), step.n_carry - sum(untouched)), untouched)
    moving = [not is_untouched for is_untouched in untouched]
    outvars = [*select(jaxpr.outvars[: step.n_carry], moving), *jaxpr.outvars[step.n_carry :]]
    part = with_parts(jaxpr, jaxpr.eqns, found.inputs(jaxpr.invars), outvars)
    useful, _ = pe.dce_jaxpr(part, [True] * len(outvars), instantiate=True)
    closed = core.ClosedJaxpr(with_parts(useful, useful.eqns), step.jaxpr.consts)
    made = dataclasses.replace(found.step, jaxpr=closed)
    if (key := structure(closed)) is not None:
        made = _the_same(_Traced((key, made.n_operands, made.n_carry, configuration()), made)).step
    return dataclasses.replace(found, step=made)


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A traced step, compared by its key alone."""

    key: Any
    step: FlatStep = dataclasses.field(compare=False)


# A step defined inside its caller is traced at each call: for the same equations its plan, checks and programs serve.
@remember(256)
def _the_same(traced: _Traced) -> _Traced:
    return traced
