"""A step taken apart by the inputs its values depend on, so a block of steps can run each part where it is cheapest.

    constants   depend on operands only        evaluated once per scan
    features    depend on x, not on the carry  evaluated for all steps of a block at once (vmap)
    loop        the rest                       evaluated step by step

Features are products of x with weights, the equations leading to them, and the equations directly following them. For
a block, x @ W is one large product instead of many small ones, and so is its gradient. Other values independent of the
carry stay in the loop, where they take no memory.

In the loop, sums and products with a constant are *taps*: a block can defer the constant's gradient; see `taps`.
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
    TRANSCENDENTAL,
    Env,
    bind,
    evaluate,
    has_effects,
    is_arithmetic,
    needed,
    reachable,
    read,
    variables,
    with_gradient,
)
from bptt_jax._jaxprs.quiet import quiet
from bptt_jax._jaxprs.types import ClosedJaxpr, Eqn, Jaxpr
from bptt_jax._step.merge import invariant_variables
from bptt_jax._step.rows import evaluate_for_block
from bptt_jax._step.taps import SUMS, Tap, Taps
from bptt_jax._trace.active import Active
from bptt_jax._trace.call import Arrays, FlatStep, Mask, select


@dataclasses.dataclass(frozen=True, eq=False)
class SplitStep:
    """The parts of a step.

    Attributes:
      machine: the device for which its parts were chosen.
      active: the leaves that a derivative goes through.
      jaxpr: flat, with merged products; its inputs are operands, carry and x.
      base: the values it closes over, by variable.
      n_operands, n_carry: the numbers of operands and of leaves of the carry among its inputs.
      constants: its operands, and the variables derived from them for use in the other parts.
      differentiable: the constants with a gradient.
      derived_eqns, feature_eqns, loop_eqns: the equations of each part.
      features: the variables of the features' part read by the loop.
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
        """Whether constants are made of operands by moving data only: their gradients are then moved back."""
        return all(eqn.primitive.name in MOVES for eqn in self.derived_eqns)

    @property
    def hoisted(self) -> Sequence[Any]:
        """The variables differentiated by blocks: the operands if they are only moved, else the constants."""
        return self.constants[: self.n_operands] if self.moves_only else self.constants

    @property
    def reads_ahead(self) -> bool:
        """Whether features are best read a step ahead: on CPU, where the loop evaluates exp, tanh, ... of them."""
        made = reachable(self.loop_eqns, self.features)
        slow = (e for e in self.loop_eqns if e.primitive.name in TRANSCENDENTAL)
        return self.machine.is_cpu and any(v in made for e in slow for v in variables(e.invars))

    @property
    def feature_constants(self) -> list[Any]:
        """The differentiable constants read by the features' equations."""
        used = self.differentiable.intersection(variables(v for eqn in self.feature_eqns for v in eqn.invars))
        return [v for v in self.constants if v in used]

    @property
    def active_features(self) -> Mask:
        """The mask of features with a gradient."""
        given = [*self.differentiable, *select(self.x, self.active.x)]
        reached = with_gradient(self.feature_eqns, given)
        return tuple(v in reached for v in self.features)

    def x_reaching(self, given: Sequence[bool]) -> list[bool]:
        """For each active leaf of x whether one of these features depends on it; a mask of the active features."""
        features = select(select(self.features, self.active_features), given)
        return [
            any(v in with_gradient(self.feature_eqns, [x]) for v in features) for x in select(self.x, self.active.x)
        ]

    @property
    def carry(self) -> Sequence[Any]:
        return tuple(self.jaxpr.invars[self.n_operands : self.n_operands + self.n_carry])

    @property
    def x(self) -> Sequence[Any]:
        return tuple(self.jaxpr.invars[self.n_operands + self.n_carry :])

    def derive(self, operands: Arrays) -> Arrays:
        """The constants, derived from the operands."""
        env = self.base | bind(self.jaxpr.invars[: self.n_operands], operands)
        evaluate(self.derived_eqns, env)
        return [env[v] for v in self.constants]

    def features_of(self, constants: Arrays, x: Arrays) -> Arrays:
        """One step's features."""
        env = self.base | bind(self.constants, constants) | bind(self.x, x)
        evaluate(self.feature_eqns, env)
        return [env[v] for v in self.features]

    def features_of_block(self, constants: Arrays, xs: Arrays) -> Arrays:
        """The features of all steps of a block; xs has time first."""
        env = self.base | bind(self.constants, constants) | bind(self.x, xs)
        evaluate_for_block(self.feature_eqns, env, self.x)
        return [env[v] for v in self.features]

    def environment(self, constants: Arrays, carry: Arrays, x: Arrays, features: Arrays) -> Env:
        """The values known before the loop's equations run."""
        given = zip((self.constants, self.carry, self.x, self.features), (constants, carry, x, features), strict=True)
        return self.base | {v: value for pair in given for v, value in zip(*pair, strict=True)}

    def types(self, constants: Arrays, carry: Arrays, x: Arrays, features: Arrays) -> Env:
        """Values of the loop's variables, only for their types (with shardings), so callbacks do not run."""
        env = self.environment(constants, carry, x, features)
        evaluate(quiet(self.loop_eqns), env)
        return env

    def loop(
        self, constants: Arrays, carry: Arrays, x: Arrays, features: Arrays, taps: Taps | None = None
    ) -> tuple[Arrays, Arrays]:
        """One step with given features: (carry, y)."""
        env = self.environment(constants, carry, x, features)
        evaluate(self.loop_eqns, env, taps.apply if taps else None)
        outs = [read(env, v) for v in self.jaxpr.outvars]
        return outs[: self.n_carry], outs[self.n_carry :]


def split(
    closed: ClosedJaxpr, step: FlatStep, active: Active, machine: Machine, *, with_features: bool = True
) -> SplitStep:
    """Takes a step apart.

    Args:
      closed: its jaxpr, inlined, perhaps with merged products.
      step: the step, for the numbers of its inputs.
      active: the leaves that a derivative goes through.
      machine: the device for which parts are chosen.
      with_features: whether there are features; without, their equations are of the loop.
    """
    n_operands, n_carry = step.n_operands, step.n_carry
    jaxpr = closed.jaxpr
    base = bind(jaxpr.constvars, closed.consts)
    operands, x = jaxpr.invars[:n_operands], jaxpr.invars[n_operands + n_carry :]
    invariant = invariant_variables(jaxpr, n_operands)
    feature_eqns = _feature_eqns(jaxpr, invariant, set(x), machine) if with_features else []
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
    """The derived variables computed once per scan, and the equations repeated where their results are used.

    Broadcasts and iotas are repeated, because outside the loop they cost memory and inside it nothing. Other equations
    are not run once per step to save memory.
    """
    producer = {v: e for e in derived_eqns for v in e.outvars}
    crossing, repeated, todo = [], set(), list(used)
    while todo:
        v = todo.pop()
        if v in given or v in crossing or producer[v] in repeated:
            continue
        eqn = producer[v]
        if eqn.primitive.name in ("broadcast_in_dim", "iota") and not _only_adds_axes(eqn):
            repeated.add(eqn)
            todo.extend(variables(eqn.invars))
        else:
            crossing.append(v)
    return crossing, [e for e in derived_eqns if e in repeated]


def _only_adds_axes(eqn: Eqn) -> bool:
    """Whether a result has as many elements as the operand, as `b[None]` has: such a constant takes no more memory."""
    return bool(eqn.invars) and eqn.outvars[0].aval.size == eqn.invars[0].aval.size


def _feature_eqns(jaxpr: Jaxpr, invariant: set[Any], x: set[Any], machine: Machine) -> list[Any]:
    """The equations to evaluate for a whole block at once."""
    batchable: list[Any] = []
    producer: dict[Any, Any] = {}
    known = {*invariant, *x}
    for eqn in jaxpr.eqns:
        inputs = variables(eqn.invars)
        if all(v in known for v in inputs) and not all(v in invariant for v in inputs) and is_arithmetic(eqn):
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
            # Equations after features join them if only features are read and the stack does not grow.
            inside = [v for v in variables(eqn.invars) if producer.get(v) in chosen]
            others = [v for v in variables(eqn.invars) if v not in invariant and v not in inside]
            is_part = eqn.primitive.name in ("split", "slice")
            if inside and not others and not is_part and machine.bytes_of(eqn.outvars) <= machine.bytes_of(inside):
                chosen.add(eqn)
    return [e for e in batchable if e in chosen]


def _pays_as_feature(eqn: Eqn, invariant: set[Any], x: set[Any], machine: Machine) -> bool:
    weight = next(v for v in eqn.invars if v in invariant)
    other = next(v for v in eqn.invars if v not in invariant)
    # The product's gradient reads its other operand, stacked for the block as well unless it is a leaf of x.
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
