"""The results of a jaxpr that are its inputs, unchanged, seen through calls, branches and loops.

Not through functions with derivative rules of the user's own: their values may be the inputs', but a rule decides about
the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend import core
from jax.extend.core import primitives

from bptt_jax._jaxprs.equations import inner_jaxprs
from bptt_jax._jaxprs.inline import called, is_checkpoint, is_jit
from bptt_jax._jaxprs.types import Eqn, Jaxpr

Sources = list[int | None]  # for each result the position of the input that it is, None where it is another value


def sources(jaxpr: Jaxpr) -> Sources:
    """For each result of a jaxpr the position of the input passed on as this result."""
    source = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        for v, i in zip(eqn.outvars, _of_equation(eqn), strict=True):
            atom = None if i is None else eqn.invars[i]
            if atom in source if not isinstance(atom, core.Literal | None) else False:
                source[v] = source[atom]
    return [None if isinstance(v, core.Literal) else source.get(v) for v in jaxpr.outvars]


def _of_equation(eqn: Eqn) -> Sequence[int | None]:
    if is_jit(eqn) or is_checkpoint(eqn):
        return sources(called(eqn).jaxpr)
    if eqn.primitive is primitives.cond_p:  # its first operand chooses the branch
        of_branches = [[None if i is None else i + 1 for i in sources(branch)] for branch in inner_jaxprs(eqn)]
        return [of_all[0] if len(set(of_all)) == 1 else None for of_all in zip(*of_branches, strict=True)]
    if eqn.primitive is primitives.scan_p:
        return _of_loop(eqn)
    return [None] * len(eqn.outvars)


def _of_loop(eqn: Eqn) -> Sequence[int | None]:
    """A leaf of the carry that each iteration hands on is the first one; outputs over time are none."""
    (body,) = inner_jaxprs(eqn)
    n_x = sum(outer.aval.ndim > inner.aval.ndim for outer, inner in zip(eqn.invars, body.invars, strict=True))
    is_carry = [outer.aval.ndim == inner.aval.ndim for outer, inner in zip(eqn.outvars, body.outvars, strict=True)]
    first = len(eqn.invars) - n_x - sum(is_carry)
    found = sources(body)
    return [first + i if carried and found[i] == first + i else None for i, carried in enumerate(is_carry)]
