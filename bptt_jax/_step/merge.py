"""Products with one operand in common become one product.

    h @ W1, h @ W2, ...   ->   split(h @ concatenate(W1, W2, ...))

Where their own axes may be divided among devices, weights are stacked along a new axis instead. A split along a divided
axis would be sent from device to device at each step. On one device stacking takes longer (on CPU, a batch of one and
256 features: three times as long, because XLA transposes arrays with three axes).

Recurrent cells are written with one product per gate. Each is a kernel launch, and on small batches a pass over little
data. The weights do not change from step to step, so they are joined once for the whole scan, where merging pays (see
`Machine.merging_pays`).
"""

from __future__ import annotations

import functools
import math
import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from bptt_jax._device.machine import Machine
from bptt_jax._jaxprs.arrays import counted, is_float, may_be_divided
from bptt_jax._jaxprs.equations import NO_GRADIENT, apply, bind, evaluate, has_effects, read, variables
from bptt_jax._jaxprs.types import ClosedJaxpr, Eqn, Jaxpr, Leaf


def merge(closed: ClosedJaxpr, n_operands: int, n_carry: int, machine: Machine) -> Any:
    """The same jaxpr with merged products: those with one operand in common and an invariant other operand.

    Args:
      closed: a jaxpr without nested jits; its inputs are operands, carry, x.
      n_operands, n_carry: the numbers of its operands and of the leaves of its carry.
      machine: the device on which merging has to pay.
    """
    jaxpr = closed.jaxpr
    invariant = invariant_variables(jaxpr, n_operands)
    groups = _groups(jaxpr.eqns, invariant, _readers(jaxpr, n_operands, n_carry), machine)
    if not groups:
        return closed
    group_of = {id(eqn): (group, side) for side, group in groups for eqn in group}

    def run(*args: Leaf) -> list[Any]:
        env = bind(jaxpr.constvars, closed.consts) | bind(jaxpr.invars, args)
        # A merged product runs at the place of its first member and needs all weights there.
        ahead = [e for e in jaxpr.eqns if not has_effects(e) and all(v in invariant for v in variables(e.invars))]
        evaluate(ahead, env)
        done = set(map(id, ahead))
        for eqn in jaxpr.eqns:
            if id(eqn) in done:
                continue
            if id(eqn) in group_of:
                group, side = group_of[id(eqn)]
                with eqn.ctx.manager:  # as the user's products: on the host, or with metadata
                    env.update(bind([e.outvars[0] for e in group], _product(group, side, env)))
                done.update(map(id, group))
            else:
                evaluate([eqn], env, apply)
        return [read(env, v) for v in jaxpr.outvars]

    return jax.make_jaxpr(run)(*(v.aval for v in jaxpr.invars))


def invariant_variables(jaxpr: Jaxpr, n_operands: int) -> set[Any]:
    """The variables independent of the step."""
    found = {*jaxpr.constvars, *jaxpr.invars[:n_operands]}
    for eqn in jaxpr.eqns:
        if not has_effects(eqn) and all(v in found for v in variables(eqn.invars)):
            found.update(v for v in eqn.outvars if not isinstance(v, core.DropVar))
    return found


def _readers(jaxpr: Jaxpr, n_operands: int, n_carry: int) -> dict[Any, int]:
    """For each variable, as bits, the results of a whole scan from which a gradient goes back to it: last carry and ys.

    Products are merged only if they have the same results, because then either all their cotangents are zero or none
    is. Merged with another, a product without a cotangent gets one of zeros, and zero times a weight that is not finite
    is NaN. For example, a product for a decision has no results, and one for an output has no last carry.
    """
    carry = jaxpr.invars[n_operands : n_operands + n_carry]
    found: dict[Any, int] = {}
    while True:
        before = [found.get(v, 0) for v in carry]
        found = {}
        for i, v in enumerate(jaxpr.outvars):
            if not isinstance(v, core.Literal) and is_float(v):
                later = before[i] if i < n_carry else 0  # of the steps after this one
                found[v] = found.get(v, 0) | 1 << i | later
        for eqn in reversed(jaxpr.eqns):
            readers = functools.reduce(operator.or_, (found.get(v, 0) for v in eqn.outvars), 0)
            if readers and eqn.primitive.name not in NO_GRADIENT:
                found |= {v: found.get(v, 0) | readers for v in variables(eqn.invars) if is_float(v)}
        if before == [found.get(v, 0) for v in carry]:
            return found


def _groups(
    eqns: Sequence[Any], invariant: set[Any], readers: dict[Any, int], machine: Machine
) -> list[tuple[int, list[Any]]]:
    """Products to be merged, each group with the side of its weights."""
    groups = defaultdict(list)
    for eqn in eqns:
        if eqn.primitive is primitives.dot_general_p and not any(isinstance(v, core.Literal) for v in eqn.invars):
            side = _weight_side(eqn, invariant)
            is_placed = eqn.params.get("out_sharding") is not None  # a sharding of its own result only
            read = readers.get(eqn.outvars[0])
            if side is not None and not is_placed and read and machine.merging_pays(*_flops_and_rows(eqn, side)):
                weight, other = eqn.invars[side], eqn.invars[1 - side]
                shape = list(weight.aval.shape)
                shape[_free_axis(eqn, side)] = -1  # weights are joined along it, so its size may differ
                alike = (tuple(shape), weight.aval.dtype, str(eqn.params), str(eqn.ctx), read)
                groups[side, other, alike].append(eqn)
    return [(side, group) for (side, *_), group in groups.items() if len(group) > 1]


def _weight_side(eqn: Eqn, invariant: set[Any]) -> int | None:
    """The index of the invariant matrix among a product's operands; None if not exactly one is invariant."""
    is_invariant = [v in invariant for v in eqn.invars]
    if sum(is_invariant) != 1 or any(eqn.params["dimension_numbers"][1]):
        return None
    side = is_invariant.index(True)
    contracted = eqn.params["dimension_numbers"][0][side]
    return side if eqn.invars[side].aval.ndim == len(contracted) + 1 else None


def _free_axis(eqn: Eqn, side: int) -> int:
    contracted = eqn.params["dimension_numbers"][0][side]
    return int(next(i for i in range(eqn.invars[side].aval.ndim) if i not in contracted))


def _flops_and_rows(eqn: Eqn, side: int) -> tuple[int, int]:
    """Operations of a product, and the rows of the operand that is not its weight."""
    shape = counted(eqn.invars[side].aval.shape)
    rows = math.prod(counted(eqn.outvars[0].aval.shape)) // max(shape[_free_axis(eqn, side)], 1)
    return 2 * rows * math.prod(shape), rows


def _product(group: Sequence[Any], side: int, env: dict[Any, Any]) -> Sequence[Any]:
    """The results of a group's products, by one product, whose operand number `side` is made of the weights."""
    eqn = group[0]
    axis = _free_axis(eqn, side)
    # A weight multiplied twice with the same operand is joined twice, as it is in the gradient.
    weights, params, sizes = [env[e.invars[side]] for e in group], dict(eqn.params), [1] * len(group)
    is_stacked = len({weight.shape for weight in weights}) == 1 and may_be_divided(eqn.invars[side], axis)
    if is_stacked:
        weights = [lax.expand_dims(weight, [axis]) for weight in weights]
        contracted, batch = params["dimension_numbers"]
        moved = tuple(i + (i > axis) for i in contracted[side])
        contracted = (moved, contracted[1]) if side == 0 else (contracted[0], moved)
        params["dimension_numbers"] = (contracted, batch)
    else:
        sizes = [weight.shape[axis] for weight in weights]
    joined = lax.concatenate(weights, axis)
    operands = [joined, env[eqn.invars[1]]] if side == 0 else [env[eqn.invars[0]], joined]
    result = lax.dot_general(*operands, **params)
    # A result has the free axes of the left operand first, and of the right operand last.
    along = 0 if side == 0 else result.ndim - 1 - is_stacked
    parts = lax.split(result, sizes, axis=along)
    return [lax.squeeze(part, [along]) for part in parts] if is_stacked else parts
