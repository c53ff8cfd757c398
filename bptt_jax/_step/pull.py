"""The backward of one step as a list of equations, and a shorter list where some cotangents are zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.extend.core import primitives
from jax.interpreters import ad

from bptt_jax._caches import remember
from bptt_jax._jaxprs.equations import Env, apply, bind, evaluate, needed, reachable, read, variables
from bptt_jax._jaxprs.inline import inline
from bptt_jax._jaxprs.types import Eqn, Var
from bptt_jax._trace.call import Arrays, Mask, select


@dataclasses.dataclass(frozen=True, eq=False)
class Pull:
    """The backward program of one step.

    Attributes:
      base: values closed over by its equations.
      eqns: the equations from residuals and incoming cotangents to outgoing cotangents.
      residuals: its variables for the residuals of the step's vjp.
      ct_new, ct_y: its variables for incoming cotangents of the active leaves; None where a cotangent is zero.
      ct_carry, ct_x, ct_features, ct_taps, ct_constants: its results, likewise.
    """

    base: Env
    eqns: Sequence[Any]
    residuals: Sequence[Any]
    ct_new: Sequence[Any]
    ct_y: Sequence[Any]
    ct_carry: Sequence[Any]
    ct_x: Sequence[Any]
    ct_features: Sequence[Any]
    ct_taps: Sequence[Any]
    ct_constants: Sequence[Any]

    @property
    def stacked(self) -> list[Any]:
        """The distinct variables leaving the loop at each step."""
        return variables(v for v in (*self.ct_x, *self.ct_features, *self.ct_taps) if v is not None)


@remember(1024)
def pull_of(pull: Pull, last: Mask, y: Mask) -> Pull:
    """The backward where some cotangents are zero, without the equations reached by these alone.

    Such equations are not given arrays of zeros, because zero times an infinite derivative is NaN. The backward is
    linear in all cotangents together, so a result is zero where all cotangents it depends on are zero.

    Args:
      pull: the backward for cotangents of all active leaves.
      last, y: the masks of active leaves of the last carry and of ys with a cotangent.
    """
    # A leaf of the carry without a cotangent may get one at the step before: repeat until none is added.
    given = select(pull.ct_y, y)
    carried = set(select(pull.ct_new, last))
    while True:
        reached = reachable(pull.eqns, [*given, *carried])
        new = {ct for ct, back in zip(pull.ct_new, pull.ct_carry, strict=True) if back in reached}
        if new <= carried:
            break
        carried |= new
    if len(carried) == len(pull.ct_new) and all(y):
        return pull
    return _without_zeros(pull, [*pull.ct_new, *pull.ct_y], {*carried, *given}, reached)


def _without_zeros(pull: Pull, inputs: Sequence[Any], nonzero: set[Any], reached: set[Any]) -> Pull:
    of_cotangents = reachable(pull.eqns, inputs)  # in `run` these start as None: zero
    results = (pull.ct_carry, pull.ct_x, pull.ct_features, pull.ct_taps, pull.ct_constants)
    is_left = [[v is not None and v in reached for v in group] for group in results]

    def apply_to_others(eqn: Eqn, values: Sequence[Any]) -> Sequence[Any]:
        if eqn.primitive is ad.add_jaxvals_p and any(value is None for value in values):
            return [next(value for value in values if value is not None)]
        # Others read several cotangents, as a concatenation does: here the zero ones have to be arrays.
        given = [
            ad.instantiate_zeros(ad.Zero(v.aval)) if value is None else value
            for v, value in zip(eqn.invars, values, strict=True)
        ]
        return apply(eqn, given)

    def run(residuals: Arrays, cts: Arrays) -> Arrays:
        env = pull.base | bind(pull.residuals, residuals) | dict.fromkeys(of_cotangents)
        env |= bind([v for v in inputs if v in nonzero], cts)
        evaluate(
            [e for e in pull.eqns if any(v in reached or v not in of_cotangents for v in e.outvars)],
            env,
            apply_to_others,
        )
        return [read(env, v) for group, left in zip(results, is_left, strict=True) for v in select(group, left)]

    kept = [v for v in inputs if v in nonzero]
    closed = inline(jax.make_jaxpr(run)(avals(pull.residuals), avals(kept)))
    jaxpr = closed.jaxpr
    unused, outs = iter(jaxpr.invars), iter(jaxpr.outvars)
    residuals = [next(unused) for _ in pull.residuals]
    cts = [[next(unused) if v in nonzero else None for v in group] for group in (pull.ct_new, pull.ct_y)]
    groups = [[next(outs) if left else None for left in group] for group in is_left]
    return Pull(bind(jaxpr.constvars, closed.consts), needed(jaxpr.eqns, jaxpr.outvars), residuals, *cts, *groups)


def available(ct: Var, stacked: Container[Any], pull: Pull) -> bool:
    """Whether a cotangent is one of the stacked ones, or a part of one."""
    return ct in stacked or part_of(ct, stacked, pull) is not None


def part_of(ct: Var, stacked: Container[Any], pull: Pull) -> tuple[Any, int, int] | None:
    """The stacked concatenation with `ct` as a part: its variable, its axis, and the index at which `ct` begins.

    Where weights are merged by stacking, the part has one axis more than `ct`, of length 1.
    """
    same = {ct} | {e.outvars[0] for e in pull.eqns if e.invars[:1] == [ct] and _adds_an_axis(e)}
    for eqn in pull.eqns:
        if eqn.primitive is primitives.concatenate_p and eqn.outvars[0] in stacked:
            index = next((i for i, v in enumerate(eqn.invars) if not isinstance(v, core.Literal) and v in same), None)
            if index is not None:
                axis = eqn.params["dimension"]
                if _is_whole(ct, eqn.invars[index], axis):
                    return eqn.outvars[0], axis, sum(v.aval.shape[axis] for v in eqn.invars[:index])
    return None


def _adds_an_axis(eqn: Eqn) -> bool:
    return eqn.primitive.name in ("broadcast_in_dim", "reshape")


def _is_whole(ct: Var, part: Var, axis: int) -> bool:
    """Whether `part` is `ct`, or `ct` with an axis of length 1 before its axis number `axis`."""
    shape = tuple(ct.aval.shape)
    return part is ct or tuple(part.aval.shape) == (*shape[:axis], 1, *shape[axis:])


def cotangents_of(ct: Var, stacked: Env, pull: Pull) -> Any:
    """The cotangents of a variable at all steps of a block, from the stacked ones."""
    if ct in stacked:
        return stacked[ct]
    part = part_of(ct, stacked, pull)
    assert part is not None, "a tap whose cotangent is not stacked"
    whole, axis, start = part
    is_stacked = whole.aval.ndim > ct.aval.ndim
    found = lax.slice_in_dim(stacked[whole], start, start + (1 if is_stacked else ct.aval.shape[axis]), axis=axis + 1)
    return lax.squeeze(found, [axis + 1]) if is_stacked else found


def avals(atoms: Sequence[Any]) -> list[Any]:
    return [v.aval for v in atoms]
