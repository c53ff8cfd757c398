"""The leaves of a scan that a derivative goes through, so gradients are of exactly the differentiated inputs."""

from __future__ import annotations

import dataclasses

from bptt_jax._caches import remember
from bptt_jax._jaxprs.arrays import is_float
from bptt_jax._jaxprs.equations import is_in, read_by, variables, with_gradient
from bptt_jax._trace.call import FlatStep, Mask, select


@dataclasses.dataclass(frozen=True)
class Active:
    """The leaves of a scan that a derivative goes through: for each leaf whether its tangent may be nonzero.

    Attributes:
      operands, carry, x, y: masks of the leaves of a step; a leaf of the carry counts if it is active at any step.
    """

    operands: Mask
    carry: Mask
    x: Mask
    y: Mask


@remember(1024)
def active(step: FlatStep, wrt: Mask) -> Active:
    """The leaves that a derivative with respect to some inputs goes through; unread inputs are left out.

    Args:
      step: the step.
      wrt: for each of its inputs whether the scan is differentiated with respect to it.
    """
    jaxpr = step.inlined.jaxpr
    inputs, outputs = jaxpr.invars, jaxpr.outvars
    used = read_by(jaxpr.eqns, outputs)
    carry = step.split(inputs)[1]
    found = {v for v, differentiated in zip(inputs, wrt, strict=True) if differentiated and v in used and is_float(v)}
    # An active new carry is the carry of the next step: repeat until no leaf is added.
    while True:
        reached = with_gradient(jaxpr.eqns, found)
        new = {v for v, out in zip(carry, outputs, strict=False) if is_in(out, reached) and is_float(v)}
        if new <= found:
            break
        found |= new
    operands, moving, x = (tuple(v in found for v in group) for group in step.split(inputs))
    return Active(operands, moving, x, tuple(is_in(out, reached) for out in outputs[step.n_carry :]))


def reached(step: FlatStep, found: Active, carry: Mask, y: Mask) -> tuple[Mask, Mask, Mask]:
    """Masks of the active operands, leaves of the first carry and of xs reached by cotangents.

    Args:
      step: the step.
      found: its active leaves.
      carry, y: masks of active leaves of the last carry and of ys with a cotangent.
    """
    jaxpr = step.inlined.jaxpr
    inputs, outs = step.split(jaxpr.invars), jaxpr.outvars
    last, ys = select(outs[: step.n_carry], found.carry), select(outs[step.n_carry :], found.y)
    carried = select(inputs[1], found.carry)
    given = {*variables(select(ys, y)), *variables(select(last, carry))}
    # A cotangent of a step's carry goes on to the new carry of the step before: repeat until no leaf is added.
    while True:
        back = set(given)
        for eqn in reversed(jaxpr.eqns):
            if any(v in back for v in eqn.outvars):
                back.update(v for v in variables(eqn.invars) if is_float(v))
        new = {*variables(out for v, out in zip(carried, last, strict=True) if v in back)}
        if new <= given:
            break
        given |= new
    masks = zip(inputs, (found.operands, found.carry, found.x), strict=True)
    operands, first, x = (tuple(a and v in back for v, a in zip(vs, mask, strict=True)) for vs, mask in masks)
    return operands, first, x
