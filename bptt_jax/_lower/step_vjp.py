"""The backward of one step, written down once as two lists of equations.

`record` evaluates a step and what its vjp needs; `pull` applies the vjp. Between the two, a value is saved unless it is
there anyway (constants, x), or is made of saved values by elementwise arithmetic, which costs less than reading it
back: of an LSTM's step 7 arrays are saved in place of the 12 that `jax.vjp` keeps.

Tapped weights (see `taps`) are held fixed. Which taps pay is decided here, with the equations at hand.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from bptt_jax._lower.jaxprs import CHEAP, Env, bind, bytes_of, inline, is_float, needed, variables, zeros_like
from bptt_jax._lower.roofline import deferring_pays
from bptt_jax._lower.split import SplitStep
from bptt_jax._lower.taps import Tap, Taps
from bptt_jax._step import Arrays


@dataclasses.dataclass(frozen=True, eq=False)
class Pull:
    """The backward program of one step.

    Attributes:
      base: values that its equations close over.
      eqns: from residuals and incoming cotangents to cotangents.
      residuals: its variables for what the step's vjp keeps.
      ct_new, ct_y: its variables for incoming cotangents; no ct_y where y has none.
      ct_carry, ct_x, ct_features, ct_taps, ct_constants: its results; None where a cotangent is zero.
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
        """The distinct variables that leave the loop for each step."""
        return variables(v for v in (*self.ct_x, *self.ct_features, *self.ct_taps) if v is not None)


@dataclasses.dataclass(frozen=True, eq=False)
class StepVjp:
    """A step with its backward.

    Attributes:
      parts: the step, taken apart.
      taps: those of which the weights' gradients are deferred to the end of a block.
      in_loop: positions of the constants that are differentiated in the loop.
      base: values that the equations of `record` close over.
      eqns: of `record`, whose inputs are constants, carry, x and features.
      invars: these inputs.
      outs: the new carry and y, variables of `record`.
      residuals: of which the vjp consists, variables of `record`.
      lefts: for each tap what its weight is multiplied with, a variable of `record`; None for sums.
      saved: the variables of `record` that are saved.
      pull, pull_without_y: the backward.
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
    pull_without_y: Pull


_known: weakref.WeakKeyDictionary[SplitStep, StepVjp] = weakref.WeakKeyDictionary()


def step_vjp(parts: SplitStep) -> StepVjp:
    """The backward of a step, with the taps that pay; the same object for the same step."""
    if parts not in _known:
        everything = _trace(parts, parts.taps)
        paying = _paying(everything)
        _known[parts] = everything if len(paying) == len(parts.taps) else _trace(parts, paying)
    return _known[parts]


def floats(leaves: Sequence[Any]) -> list[Any]:
    """Those that are differentiable."""
    return [leaf for leaf in leaves if is_float(leaf)]


def with_floats(leaves: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """`leaves` with the differentiable ones replaced."""
    given = iter(new)
    return [next(given) if is_float(leaf) else leaf for leaf in leaves]


def _paying(vjp: StepVjp) -> list[Tap]:
    """The taps whose deferral saves more than it costs.

    In the loop, a weight's gradient is read and written at each step. Deferred, the cotangent of each step is written
    and read again, unless it is stacked anyway: as a feature's, or another tap's.
    """
    pull = vjp.pull
    stacked: set[Any] = {v for v in (*pull.ct_x, *pull.ct_features) if v is not None}
    chosen: set[Tap] = set()
    for tap, ct in zip(vjp.taps, pull.ct_taps, strict=True):
        if tap.left is None or ct is None:
            continue
        weight = vjp.parts.constants[tap.const]
        if available(ct, stacked, pull) or deferring_pays(bytes_of([weight]), bytes_of([ct])):
            chosen.add(tap)
            stacked.add(ct)
    for tap, ct in zip(vjp.taps, pull.ct_taps, strict=True):
        if tap.left is None and (ct is None or available(ct, stacked, pull)):
            chosen.add(tap)
    return [tap for tap in vjp.taps if tap in chosen]


def available(ct: Any, stacked: Container[Any], pull: Pull) -> bool:
    """Whether a cotangent can be had from stacked ones: it is one of them, or a part of one."""
    return ct in stacked or part_of(ct, stacked, pull) is not None


def part_of(ct: Any, stacked: Container[Any], pull: Pull) -> tuple[Any, int, int] | None:
    """The stacked concatenation that `ct` is a part of: its variable, the axis and the place where `ct` begins.

    The part may have an axis of length 1 there, which `ct` has not: where weights are merged by stacking them.
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


def _adds_an_axis(eqn: Any) -> bool:
    return eqn.primitive.name in ("broadcast_in_dim", "reshape")


def _is_whole(ct: Any, part: Any, axis: int) -> bool:
    """Whether `part` is `ct`, or `ct` with an axis of length 1 before its axis number `axis`."""
    shape = tuple(ct.aval.shape)
    return part is ct or tuple(part.aval.shape) == (*shape[:axis], 1, *shape[axis:])


def _avals(atoms: Sequence[Any]) -> list[Any]:
    return [v.aval for v in atoms]


def _trace(parts: SplitStep, taps: Sequence[Tap]) -> StepVjp:
    in_loop = _in_loop(parts, taps)
    trees: list[Any] = []

    def record(*given: Arrays) -> Any:
        (new, y, lefts), vjp = _vjp_of_step(parts, taps, in_loop, *given)
        residuals, tree = jax.tree.flatten(vjp)
        trees.append(tree)
        return [*new, *y, *(left for left in lefts if left is not None), *residuals]

    groups = (parts.constants, parts.carry, parts.x, parts.features)
    closed = inline(jax.make_jaxpr(record)(*map(_avals, groups)))
    jaxpr = closed.jaxpr
    results = iter(jaxpr.outvars)
    outs = [next(results) for _ in parts.jaxpr.outvars]
    lefts = [None if tap.left is None else next(results) for tap in taps]
    residuals = list(results)
    unused = iter(jaxpr.invars)
    invars = tuple([next(unused) for _ in group] for group in groups)
    base = bind(jaxpr.constvars, closed.consts)
    pull, without_y = (_trace_pull(parts, taps, in_loop, trees[0], residuals, with_y) for with_y in (True, False))
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
        pull=pull,
        pull_without_y=without_y,
    )


def _in_loop(parts: SplitStep, taps: Sequence[Tap]) -> list[int]:
    """The positions of the differentiable constants that the loop reads elsewhere than at taps."""
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
    """((new carry, y, what tapped weights are multiplied with), vjp), the tapped weights being held fixed."""
    weights = [constants[tap.const] for tap in taps]
    types = parts.types(constants, carry, x, features)
    zeros = [zeros_like(types[tap.eqn.outvars[0]]) for tap in taps]

    def run(carry_f: Arrays, x_f: Arrays, features_f: Arrays, zeros: Arrays, constants_f: Arrays) -> Any:
        tapped = Taps(taps, weights, zeros)
        own = list(constants)
        for i, constant in zip(in_loop, constants_f, strict=True):
            own[i] = constant
        given = (with_floats(carry, carry_f), with_floats(x, x_f), with_floats(features, features_f))
        new, y = parts.loop(own, *given, tapped)
        return (floats(new), floats(y)), (new, y, tapped.lefts)

    arguments = (floats(carry), floats(x), floats(features), zeros, [constants[i] for i in in_loop])
    _, vjp, results = jax.vjp(run, *arguments, has_aux=True)
    return results, vjp


def _trace_pull(
    parts: SplitStep, taps: Sequence[Tap], in_loop: Sequence[int], tree: Any, residuals: Sequence[Any], with_y: bool
) -> Pull:
    new, y = (floats(vs) for vs in (parts.jaxpr.outvars[: parts.n_carry], parts.jaxpr.outvars[parts.n_carry :]))
    given = (parts.constants, parts.carry, parts.x, parts.features)

    def pull(residuals: Arrays, ct_new: Arrays, ct_y: Arrays, given: Any) -> Any:
        if not with_y:
            types = parts.types(*given)
            ct_y = [zeros_like(types[v]) for v in y]
        return jax.tree.unflatten(tree, residuals)((list(ct_new), list(ct_y)))

    groups = (residuals, new, y if with_y else [])
    closed = inline(jax.make_jaxpr(pull)(*map(_avals, groups), list(map(_avals, given))))
    jaxpr = closed.jaxpr
    zeros = {e.outvars[0] for e in jaxpr.eqns if e.primitive is primitives.broadcast_in_dim_p and _is_zero(e.invars[0])}
    outs = iter(None if _is_zero(v) or v in zeros else v for v in jaxpr.outvars)
    unused = iter(jaxpr.invars)
    ct_groups = (floats(parts.carry), floats(parts.x), floats(parts.features), taps, in_loop)
    return Pull(
        bind(jaxpr.constvars, closed.consts),
        needed(jaxpr.eqns, jaxpr.outvars),
        *([next(unused) for _ in group] for group in groups),
        *([next(outs) for _ in group] for group in ct_groups),
    )


def _is_zero(atom: Any) -> bool:
    return isinstance(atom, core.Literal) and bool(jnp.ndim(atom.val) == 0) and atom.val == 0


def _saved(jaxpr: Any, invars: Sequence[Sequence[Any]], base: Env, residuals: Any, lefts: Any) -> list[Any]:
    """The variables to save, so that the residuals and the operands of the taps can be had."""
    constants, _, x, _ = invars
    producer = {v: e for e in jaxpr.eqns for v in e.outvars}
    free = {*constants, *x, *base}
    for eqn in jaxpr.eqns:
        if not eqn.effects and eqn.primitive.name in CHEAP and all(v in free for v in variables(eqn.invars)):
            free.update(eqn.outvars)
    order = {v: i for i, v in enumerate([*jaxpr.invars, *(v for e in jaxpr.eqns for v in e.outvars)])}
    stacked = {v for v in variables(v for v in lefts if v is not None) if v not in {*constants, *x}}
    saved = {v for v in variables(residuals) if v not in free} | stacked

    cheap = [e for e in jaxpr.eqns if not e.effects and e.primitive.name in CHEAP]
    for v in sorted(saved - stacked, key=order.__getitem__, reverse=True):
        made = free | saved - {v}
        for eqn in cheap if producer.get(v) in cheap else []:
            if all(u in made for u in variables(eqn.invars)):
                made.update(eqn.outvars)
        if v in made:
            saved.remove(v)
    return sorted(saved, key=order.__getitem__)
