"""A step taken apart by what its values depend on, so that a block of steps can run each part where it is cheapest.

    constants   depend on operands only        evaluated once per scan
    features    depend on x, not on the carry  evaluated for all steps of a block at once (vmap)
    loop        the rest                       evaluated step by step

Features are products of x with weights, what leads to them and what directly follows them: x @ W for a block is one
large product instead of many small ones, and so is its gradient. Other values that do not depend on the carry stay in
the loop, where they take no memory.

In the loop, sums and products with a constant are *taps*, whose gradients a block can defer; see `taps`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.extend import core

from bptt_jax._device.machine import Machine
from bptt_jax._jaxprs.arrays import is_float
from bptt_jax._jaxprs.equations import (
    MOVES,
    PRODUCTS,
    Env,
    bind,
    can_be_batched,
    evaluate,
    has_effects,
    needed,
    read,
    variables,
    with_gradient,
)
from bptt_jax._jaxprs.types import ClosedJaxpr, Eqn, Jaxpr
from bptt_jax._step.merge import invariant_variables
from bptt_jax._step.taps import SUMS, Tap, Taps
from bptt_jax._trace.active import Active
from bptt_jax._trace.call import Arrays, FlatStep, Mask, select


@dataclasses.dataclass(frozen=True, eq=False)
class SplitStep:
    """The parts of a step.

    Attributes:
      machine: for which its parts were chosen.
      active: the leaves that are differentiated.
      jaxpr: flat, with merged products; its inputs are operands, carry and x.
      base: values of what it closes over.
      n_operands, n_carry: how its inputs divide.
      constants: its operands, and the variables derived from them that the other parts use.
      differentiable: those of the constants that have a gradient.
      derived_eqns, feature_eqns, loop_eqns: the equations of each part.
      features: the variables that the loop takes from the features' part.
      taps: the products and sums with a constant in the loop.
    """

    machine: Machine
    active: Active
    jaxpr: Any
    base: Env
    n_operands: int
    n_carry: int
    constants: tuple[Any, ...]
    differentiable: frozenset[Any]
    derived_eqns: tuple[Any, ...]
    feature_eqns: tuple[Any, ...]
    loop_eqns: tuple[Any, ...]
    features: tuple[Any, ...]
    taps: tuple[Tap, ...]

    @property
    def moves_only(self) -> bool:
        """Whether constants are made from operands by moving data, so that their gradients are made by moving too."""
        return all(eqn.primitive.name in MOVES for eqn in self.derived_eqns)

    @property
    def hoisted(self) -> Sequence[Any]:
        """What is differentiated by blocks: the operands, or where more is done to them than moving, the constants."""
        return self.constants[: self.n_operands] if self.moves_only else self.constants

    @property
    def feature_constants(self) -> list[Any]:
        """The differentiable constants that features are made with."""
        used = self.differentiable.intersection(variables(v for eqn in self.feature_eqns for v in eqn.invars))
        return [v for v in self.constants if v in used]

    @property
    def active_features(self) -> Mask:
        """Of which features a gradient is taken."""
        given = [*self.differentiable, *select(self.x, self.active.x)]
        reached = with_gradient(self.feature_eqns, given)
        return tuple(v in reached for v in self.features)

    @property
    def carry(self) -> Sequence[Any]:
        return tuple(self.jaxpr.invars[self.n_operands : self.n_operands + self.n_carry])

    @property
    def x(self) -> Sequence[Any]:
        return tuple(self.jaxpr.invars[self.n_operands + self.n_carry :])

    def derive(self, operands: Arrays) -> Arrays:
        """The constants."""
        env = self.base | bind(self.jaxpr.invars[: self.n_operands], operands)
        evaluate(self.derived_eqns, env)
        return [env[v] for v in self.constants]

    def features_of(self, constants: Arrays, x: Arrays) -> Arrays:
        """One step's features."""
        env = self.base | bind(self.constants, constants) | bind(self.x, x)
        evaluate(self.feature_eqns, env)
        return [env[v] for v in self.features]

    def environment(self, constants: Arrays, carry: Arrays, x: Arrays, features: Arrays) -> Env:
        """What the loop's equations start from."""
        given = zip((self.constants, self.carry, self.x, self.features), (constants, carry, x, features), strict=True)
        return self.base | {v: value for pair in given for v, value in zip(*pair, strict=True)}

    def types(self, constants: Arrays, carry: Arrays, x: Arrays, features: Arrays) -> Env:
        """Values of the loop's variables, for their types (shardings too) only; effects are left out."""
        env = self.environment(constants, carry, x, features)
        evaluate([e for e in self.loop_eqns if not has_effects(e)], env)
        return env

    def loop(
        self, constants: Arrays, carry: Arrays, x: Arrays, features: Arrays, taps: Taps | None = None
    ) -> tuple[Arrays, Arrays]:
        """One step, the features being known: (carry, y)."""
        env = self.environment(constants, carry, x, features)
        evaluate(self.loop_eqns, env, taps.apply if taps else None)
        outs = [read(env, v) for v in self.jaxpr.outvars]
        return outs[: self.n_carry], outs[self.n_carry :]


def split(closed: ClosedJaxpr, step: FlatStep, active: Active, machine: Machine) -> SplitStep:
    """A step taken apart.

    Args:
      closed: its jaxpr, inlined, perhaps with merged products.
      step: how its inputs divide.
      active: the leaves that are differentiated.
      machine: for which parts are chosen.
    """
    n_operands, n_carry = step.n_operands, step.n_carry
    jaxpr = closed.jaxpr
    base = bind(jaxpr.constvars, closed.consts)
    operands, x = jaxpr.invars[:n_operands], jaxpr.invars[n_operands + n_carry :]
    invariant = invariant_variables(jaxpr, n_operands)
    feature_eqns = _feature_eqns(jaxpr, invariant, set(x), machine)
    made = {v for e in feature_eqns for v in e.outvars}
    varying = [e for e in jaxpr.eqns if has_effects(e) or any(v not in invariant for v in variables(e.invars))]
    rest = needed([e for e in varying if e not in feature_eqns], jaxpr.outvars)
    derived_eqns = [e for e in jaxpr.eqns if any(v in invariant for v in e.outvars)]
    used = variables([*(v for e in (*rest, *feature_eqns) for v in e.invars), *jaxpr.outvars])
    known = {*operands, *base}
    crossing, repeated = _crossing(derived_eqns, [v for v in used if v in invariant and v not in known], known)
    constants = [*operands, *crossing]
    differentiable = with_gradient(derived_eqns, select(operands, active.operands)).intersection(constants)
    loop_eqns = needed([*repeated, *rest], jaxpr.outvars, {*constants, *base, *made})
    features = [v for v in variables([*(v for e in loop_eqns for v in e.invars), *jaxpr.outvars]) if v in made]
    return SplitStep(
        machine=machine,
        active=active,
        jaxpr=jaxpr,
        base=base,
        n_operands=n_operands,
        n_carry=n_carry,
        constants=tuple(constants),
        differentiable=differentiable,
        derived_eqns=tuple(needed(derived_eqns, crossing, known)),
        feature_eqns=tuple(needed([*repeated, *feature_eqns], features, {*constants, *base})),
        loop_eqns=tuple(loop_eqns),
        features=tuple(features),
        taps=tuple(_taps(loop_eqns, constants, differentiable)),
    )


def _crossing(derived_eqns: Sequence[Any], used: Sequence[Any], given: set[Any]) -> tuple[list[Any], list[Any]]:
    """Which derived variables are computed once per scan, and which equations are better repeated where they are used.

    A broadcast costs memory outside the loop and nothing inside it. Anything else is not run once per step for that.
    """
    producer = {v: e for e in derived_eqns for v in e.outvars}
    crossing, repeated, todo = [], set(), list(used)
    while todo:
        v = todo.pop()
        if v in given or v in crossing or producer[v] in repeated:
            continue
        eqn = producer[v]
        if eqn.primitive.name in ("broadcast_in_dim", "iota"):
            repeated.add(eqn)
            todo.extend(variables(eqn.invars))
        else:
            crossing.append(v)
    return crossing, [e for e in derived_eqns if e in repeated]


def _feature_eqns(jaxpr: Jaxpr, invariant: set[Any], x: set[Any], machine: Machine) -> list[Any]:
    """The equations to evaluate for a whole block at once."""
    batchable: list[Any] = []
    producer: dict[Any, Any] = {}
    known = {*invariant, *x}
    for eqn in jaxpr.eqns:
        inputs = variables(eqn.invars)
        if all(v in known for v in inputs) and not all(v in invariant for v in inputs) and can_be_batched(eqn):
            batchable.append(eqn)
            known.update(eqn.outvars)
            producer.update((v, eqn) for v in eqn.outvars)
    chosen: set[Any] = set()
    for eqn in batchable:
        if eqn.primitive in PRODUCTS and sum(v in invariant for v in eqn.invars) == 1:
            if _pays_as_feature(eqn, invariant, x, machine):
                chosen.add(eqn)
                chosen.update(needed(batchable, eqn.invars))
        else:
            inside = [v for v in variables(eqn.invars) if producer.get(v) in chosen]
            others = [v for v in variables(eqn.invars) if v not in invariant and v not in inside]
            is_part = eqn.primitive.name in ("split", "slice")
            if inside and not others and not is_part and machine.bytes_of(eqn.outvars) <= machine.bytes_of(inside):
                chosen.add(eqn)
    return [e for e in batchable if e in chosen]


def _pays_as_feature(eqn: Eqn, invariant: set[Any], x: set[Any], machine: Machine) -> bool:
    weight = next(v for v in eqn.invars if v in invariant)
    other = next(v for v in eqn.invars if v not in invariant)
    stacked_bytes = machine.bytes_of(eqn.outvars) + (0 if other in x else machine.bytes_of([other]))
    return machine.hoisting_pays(machine.bytes_of([weight]), stacked_bytes)


def _taps(loop_eqns: Sequence[Any], constants: Sequence[Any], differentiable: frozenset[Any]) -> list[Tap]:
    position = {v: i for i, v in enumerate(constants)}
    found = []
    for eqn in loop_eqns:
        if eqn.primitive not in PRODUCTS | SUMS or not is_float(eqn.outvars[0]):
            continue
        sides = [i for i, v in enumerate(eqn.invars) if not isinstance(v, core.Literal) and v in position]
        if len(sides) == 1 and eqn.invars[sides[0]] in differentiable:
            found.append(Tap(eqn, sides[0], position[eqn.invars[sides[0]]]))
    return found
