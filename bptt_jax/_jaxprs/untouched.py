"""The results of a jaxpr that are its inputs, unchanged, seen through calls, branches and loops.

Not through functions with derivative rules of the user's own: their values may be the inputs', but a rule decides about
the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import primitives

from bptt_jax._jaxprs.equations import inner_jaxprs, is_in, loop_of
from bptt_jax._jaxprs.inline import called, is_checkpoint, is_jit
from bptt_jax._jaxprs.types import Eqn, Jaxpr

Sources = list[int | None]  # for each result the position of the input that it is, None where it is another value


def sources(jaxpr: Jaxpr) -> Sources:
    """For each result of a jaxpr the position of the input passed on as this result."""
    source = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        for v, i in zip(eqn.outvars, _of_equation(eqn), strict=True):
            atom = None if i is None else eqn.invars[i]
            if atom is not None and is_in(atom, source):
                source[v] = source[atom]
    return [source[v] if is_in(v, source) else None for v in jaxpr.outvars]


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
    body, first, n_carry = loop_of(eqn)
    return [i if i == first + j and j < n_carry else None for j, i in enumerate(sources(body))]
