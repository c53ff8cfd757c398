"""The backward of one step, written down once as two lists of equations.

`record` evaluates a step and the residuals of its vjp; `pull` applies the vjp. Between the two, a residual is saved
unless it is at hand anyway (constants, x), or can be made of saved values by elementwise arithmetic. Making it again
costs less than reading it back. For example, an LSTM's step saves 7 arrays in place of the 12 kept by `jax.vjp`.

Tapped weights (see `taps`) are held fixed. This module also chooses the taps that pay, with the equations at hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from bptt_jax._jaxprs.arrays import zeros_like
from bptt_jax._jaxprs.equations import CHEAP, Env, bind, has_effects, needed, variables
from bptt_jax._jaxprs.inline import inline
from bptt_jax._jaxprs.types import Atom, Jaxpr, Tree
from bptt_jax._step.pull import Pull, available, avals
from bptt_jax._step.split import SplitStep
from bptt_jax._step.taps import Tap, Taps
from bptt_jax._trace.call import Arrays, replace, select


@dataclasses.dataclass(frozen=True, eq=False)
class StepVjp:
    """A step with its backward.

    Attributes:
      parts: the step, taken apart.
      taps: the taps with their weights' gradients deferred to the end of a block.
      in_loop: positions of the constants differentiated in the loop.
      base: values closed over by the equations of `record`.
      eqns: the equations of `record`; its inputs are constants, carry, x and features.
      invars: these inputs, in four groups.
      outs: the new carry and y, variables of `record`.
      residuals: the residuals of the vjp, variables of `record`.
      lefts: for each tap the variable of `record` multiplied with its weight; None for sums.
      saved: the variables of `record` to save.
      pull: the backward for cotangents of all active leaves; see `pull.pull_of`.
    """

    parts: SplitStep
    taps: Sequence[Tap]
    in_loop: Sequence[int]
    base: Env
    eqns: Sequence[Any]
    invars: tuple[Sequence[Any], ...]
    outs: Sequence[Any]
    residuals: Sequence[Any]
    lefts: Sequence[Any]
    saved: Sequence[Any]
    pull: Pull


def step_vjp(parts: SplitStep) -> StepVjp:
    """The backward of a step, with the taps that pay."""
    everything = _trace(parts, parts.taps)
    paying = _paying(everything)
    return everything if len(paying) == len(parts.taps) else _trace(parts, paying)


def _paying(vjp: StepVjp) -> list[Tap]:
    """The taps whose deferral saves more than it costs.

    In the loop, a weight's gradient is read and written at each step. Deferred, the cotangent of each step is written
    and read again, unless it is stacked anyway as the cotangent of x, of a feature, or of another tap.
    """
    pull = vjp.pull
    stacked: set[Any] = {v for v in (*pull.ct_x, *pull.ct_features) if v is not None}
    chosen: set[Tap] = set()
    for tap, ct in zip(vjp.taps, pull.ct_taps, strict=True):
        if tap.left is None or ct is None:
            continue
        weight, machine = vjp.parts.constants[tap.const], vjp.parts.machine
        pays = machine.deferring_pays(machine.bytes_of([weight]), machine.bytes_of([ct]))
        if available(ct, stacked, pull) or pays:
            chosen.add(tap)
            stacked.add(ct)
    # Sums come second: they pay only where products, features or x stack their cotangent anyway.
    for tap, ct in zip(vjp.taps, pull.ct_taps, strict=True):
        if tap.left is None and (ct is None or available(ct, stacked, pull)):
            chosen.add(tap)
    return [tap for tap in vjp.taps if tap in chosen]


def _trace(parts: SplitStep, taps: Sequence[Tap]) -> StepVjp:
    in_loop = _in_loop(parts, taps)
    trees: list[Any] = []

    def record(*given: Arrays) -> Any:
        (new, y, lefts), vjp = _vjp_of_step(parts, taps, in_loop, *given)
        residuals, tree = jax.tree.flatten(vjp)
        trees.append(tree)  # the vjp without its arrays leaves the trace here; its arrays are results
        return [*new, *y, *(left for left in lefts if left is not None), *residuals]

    groups = (parts.constants, parts.carry, parts.x, parts.features)
    closed = inline(jax.make_jaxpr(record)(*map(avals, groups)))
    jaxpr = closed.jaxpr
    results = iter(jaxpr.outvars)
    outs = [next(results) for _ in parts.jaxpr.outvars]
    lefts = [None if tap.left is None else next(results) for tap in taps]
    residuals = list(results)
    unused = iter(jaxpr.invars)
    invars = tuple([next(unused) for _ in group] for group in groups)
    base = bind(jaxpr.constvars, closed.consts)
    return StepVjp(
        parts=parts,
        taps=taps,
        in_loop=in_loop,
        base=base,
        eqns=jaxpr.eqns,
        invars=invars,
        outs=outs,
        residuals=residuals,
        lefts=lefts,
        saved=_saved(jaxpr, invars, base, residuals, lefts),
        pull=_trace_pull(parts, taps, in_loop, trees[0], residuals),
    )


def _in_loop(parts: SplitStep, taps: Sequence[Tap]) -> list[int]:
    """The positions of the differentiable constants read by the loop outside taps."""
    sides = {tap.eqn: tap.side for tap in taps}
    atoms = [v for e in parts.loop_eqns for side, v in enumerate(e.invars) if sides.get(e) != side]
    used = parts.differentiable.intersection(variables([*atoms, *parts.jaxpr.outvars]))
    return [i for i, v in enumerate(parts.constants) if v in used]


def _vjp_of_step(
    parts: SplitStep,
    taps: Sequence[Tap],
    in_loop: Sequence[int],
    constants: Arrays,
    carry: Arrays,
    x: Arrays,
    features: Arrays,
) -> tuple[tuple[Arrays, Arrays, Arrays], Any]:
    """((new carry, y, the variables multiplied with tapped weights), vjp); tapped weights are held fixed."""
    active, weights = parts.active, [constants[tap.const] for tap in taps]
    types = parts.types(constants, carry, x, features)
    # Added to the results of taps: the cotangents of these zeros are the cotangents of the results.
    zeros = [zeros_like(types[tap.eqn.outvars[0]]) for tap in taps]

    def run(carry_f: Arrays, x_f: Arrays, features_f: Arrays, zeros: Arrays, constants_f: Arrays) -> Any:
        tapped = Taps(taps, weights, zeros)
        own = list(constants)
        for i, constant in zip(in_loop, constants_f, strict=True):
            own[i] = constant
        new, y = parts.loop(
            own,
            replace(carry, active.carry, carry_f),
            replace(x, active.x, x_f),
            replace(features, parts.active_features, features_f),
            tapped,
        )
        return (select(new, active.carry), select(y, active.y)), (new, y, tapped.lefts)

    chosen = (select(carry, active.carry), select(x, active.x), select(features, parts.active_features))
    arguments = (*chosen, zeros, [constants[i] for i in in_loop])
    _, vjp, results = jax.vjp(run, *arguments, has_aux=True)
    return results, vjp


def _trace_pull(
    parts: SplitStep, taps: Sequence[Tap], in_loop: Sequence[int], tree: Tree, residuals: Sequence[Any]
) -> Pull:
    active, outs = parts.active, parts.jaxpr.outvars
    new, y = select(outs[: parts.n_carry], active.carry), select(outs[parts.n_carry :], active.y)

    def pull(residuals: Arrays, ct_new: Arrays, ct_y: Arrays) -> Any:
        return jax.tree.unflatten(tree, residuals)((list(ct_new), list(ct_y)))

    groups = (residuals, new, y)
    closed = inline(jax.make_jaxpr(pull)(*map(avals, groups)))
    jaxpr = closed.jaxpr
    # JAX gives zeros, literal or broadcast, for an input without a gradient: its result is then None.
    zeros = {e.outvars[0] for e in jaxpr.eqns if e.primitive is primitives.broadcast_in_dim_p and _is_zero(e.invars[0])}
    results = iter(None if _is_zero(v) or v in zeros else v for v in jaxpr.outvars)
    unused = iter(jaxpr.invars)
    ct_groups = (
        select(parts.carry, active.carry),
        select(parts.x, active.x),
        select(parts.features, parts.active_features),
        taps,
        in_loop,
    )
    return Pull(
        bind(jaxpr.constvars, closed.consts),
        needed(jaxpr.eqns, jaxpr.outvars),
        *([next(unused) for _ in group] for group in groups),
        *([next(results) for _ in group] for group in ct_groups),
    )


def _is_zero(atom: Atom) -> bool:
    return isinstance(atom, core.Literal) and bool(jnp.ndim(atom.val) == 0) and atom.val == 0


def _saved(jaxpr: Jaxpr, invars: Sequence[Sequence[Any]], base: Env, residuals: Any, lefts: Any) -> list[Any]:
    """The variables to save for the residuals and for the operands of the taps."""
    constants, _, x, _ = invars
    producer = {v: e for e in jaxpr.eqns for v in e.outvars}
    free = {*constants, *x, *base}
    # Cheap values of constants and x alone are made again without saving anything.
    for eqn in jaxpr.eqns:
        if not has_effects(eqn) and eqn.primitive.name in CHEAP and all(v in free for v in variables(eqn.invars)):
            free.update(eqn.outvars)
    order = {v: i for i, v in enumerate([*jaxpr.invars, *(v for e in jaxpr.eqns for v in e.outvars)])}
    # Operands of taps are read for a whole block at once, so they are saved even where a step could rebuild them.
    stacked = {v for v in variables(v for v in lefts if v is not None) if v not in {*constants, *x}}
    saved = {v for v in variables(residuals) if v not in free} | stacked

    cheap = [e for e in jaxpr.eqns if not has_effects(e) and e.primitive.name in CHEAP]
    # Equations read earlier values only: a value dropped here can still be rebuilt when its own sources are dropped.
    for v in sorted(saved - stacked, key=order.__getitem__, reverse=True):
        made = free | saved - {v}
        for eqn in cheap if producer.get(v) in cheap else []:
            if all(u in made for u in variables(eqn.invars)):
                made.update(eqn.outvars)
        if v in made:
            saved.remove(v)
    return sorted(saved, key=order.__getitem__)


def rebuilding(vjp: StepVjp) -> Sequence[Any]:
    """The equations that make the residuals from saved values, constants and x."""
    pure = [eqn for eqn in vjp.eqns if not has_effects(eqn)]
    return needed(pure, vjp.residuals, {*vjp.saved, *vjp.invars[0], *vjp.invars[2], *vjp.base})
