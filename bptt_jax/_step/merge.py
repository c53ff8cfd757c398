"""Products that share their left operand become one product.

    h @ W1, h @ W2, ...   ->   split(h @ concatenate(W1, W2, ...))

Where their own axes may be divided among devices, weights are stacked along an axis of its own instead: a split along a
divided axis is sent from device to device at each step. On one device that takes longer (on CPU, a batch of one and 256
features: three times as long, for XLA transposes what has three axes).

Recurrent cells are written with one product per gate. Each is a kernel launch, and on small batches a pass over little
data; the weights do not change from step to step, so they are joined once for the whole scan, where that pays (see
`Machine`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.extend.core import primitives
from jax.sharding import AxisType

from bptt_jax._device.machine import Machine
from bptt_jax._jaxprs.arrays import explicit_sharding, is_float
from bptt_jax._jaxprs.equations import NO_GRADIENT, apply, bind, evaluate, has_effects, read, variables
from bptt_jax._jaxprs.types import ClosedJaxpr, Eqn, Jaxpr, Leaf


def merge(closed: ClosedJaxpr, n_operands: int, machine: Machine) -> Any:
    """The same jaxpr with products merged that share an operand, the other being invariant.

    Args:
      closed: inputs are operands, carry, x; without nested jits.
      n_operands: how many of its inputs do not change from step to step.
      machine: on which merging is to pay.
    """
    jaxpr = closed.jaxpr
    invariant = invariant_variables(jaxpr, n_operands)
    groups = _groups(jaxpr.eqns, invariant, _differentiable(jaxpr), machine)
    if not groups:
        return closed
    group_of = {id(eqn): group for group in groups for eqn in group}

    def run(*args: Leaf) -> list[Any]:
        env = bind(jaxpr.constvars, closed.consts) | bind(jaxpr.invars, args)
        ahead = [e for e in jaxpr.eqns if not has_effects(e) and all(v in invariant for v in variables(e.invars))]
        evaluate(ahead, env)
        done = set(map(id, ahead))
        for eqn in jaxpr.eqns:
            if id(eqn) in done:
                continue
            if id(eqn) in group_of:
                group = group_of[id(eqn)]
                env.update(bind([e.outvars[0] for e in group], _product(group, env)))
                done.update(map(id, group))
            else:
                evaluate([eqn], env, apply)
        return [read(env, v) for v in jaxpr.outvars]

    return jax.make_jaxpr(run)(*(v.aval for v in jaxpr.invars))


def invariant_variables(jaxpr: Jaxpr, n_operands: int) -> set[Any]:
    """The variables that do not depend on the step."""
    found = {*jaxpr.constvars, *jaxpr.invars[:n_operands]}
    for eqn in jaxpr.eqns:
        if not has_effects(eqn) and all(v in found for v in variables(eqn.invars)):
            found.update(v for v in eqn.outvars if not isinstance(v, core.DropVar))
    return found


def _differentiable(jaxpr: Jaxpr) -> set[Any]:
    """The variables through which a gradient comes back.

    A product that only decides something has none. Merged, it would get one of zeros, and times a weight that is not
    finite these are NaNs.
    """
    found = {v for v in variables(jaxpr.outvars) if is_float(v)}
    for eqn in reversed(jaxpr.eqns):
        if eqn.primitive.name not in NO_GRADIENT and any(v in found for v in eqn.outvars):
            found.update(v for v in variables(eqn.invars) if is_float(v))
    return found


def _groups(eqns: Sequence[Any], invariant: set[Any], differentiable: set[Any], machine: Machine) -> list[list[Any]]:
    groups = defaultdict(list)
    for eqn in eqns:
        if eqn.primitive is primitives.dot_general_p and not any(isinstance(v, core.Literal) for v in eqn.invars):
            side = _weight_side(eqn, invariant)
            is_placed = eqn.params.get("out_sharding") is not None  # for a result of other axes
            is_used = eqn.outvars[0] in differentiable
            if side is not None and not is_placed and is_used and machine.merging_pays(_flops(eqn)):
                weight, other = eqn.invars[side], eqn.invars[1 - side]
                shape = list(weight.aval.shape)
                shape[_free_axis(eqn, side)] = -1
                groups[other, side, tuple(shape), weight.aval.dtype, str(eqn.params)].append(eqn)
    return [group for group in groups.values() if len(group) > 1]


def _weight_side(eqn: Eqn, invariant: set[Any]) -> int | None:
    """Which operand of a product is an invariant matrix; None if not exactly one is."""
    is_invariant = [v in invariant for v in eqn.invars]
    if sum(is_invariant) != 1 or any(eqn.params["dimension_numbers"][1]):
        return None
    side = is_invariant.index(True)
    contracted = eqn.params["dimension_numbers"][0][side]
    return side if eqn.invars[side].aval.ndim == len(contracted) + 1 else None


def _free_axis(eqn: Eqn, side: int) -> int:
    contracted = eqn.params["dimension_numbers"][0][side]
    return int(next(i for i in range(eqn.invars[side].aval.ndim) if i not in contracted))


def _flops(eqn: Eqn) -> int:
    contracted = eqn.params["dimension_numbers"][0][0]
    return int(2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted))


def _product(group: Sequence[Any], env: dict[Any, Any]) -> Sequence[Any]:
    """The results of a group's products, by one product."""
    eqn = group[0]
    side = 0 if eqn.invars[1] is group[1].invars[1] and eqn.invars[0] is not group[1].invars[0] else 1
    axis = _free_axis(eqn, side)
    # A weight that is multiplied twice with the same operand is joined once for each, as it is in the gradient.
    weights, params, sizes = [env[e.invars[side]] for e in group], dict(eqn.params), [1] * len(group)
    is_stacked = len({weight.shape for weight in weights}) == 1 and _may_be_divided(eqn.invars[side], axis)
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
    along = 0 if side == 0 else result.ndim - 1 - is_stacked
    parts = lax.split(result, sizes, axis=along)
    return [lax.squeeze(part, [along]) for part in parts] if is_stacked else parts


def _may_be_divided(weight: Leaf, axis: int) -> bool:
    """Whether an axis may be divided among devices: explicit sharding is seen in types, automatic is not."""
    sharding = explicit_sharding(weight.aval)
    if sharding is not None:
        return sharding.spec.partitions[axis : axis + 1] not in ((), (None,))
    kinds = jax.sharding.get_abstract_mesh().axis_types
    is_part = bool(kinds) and all(kind == AxisType.Manual for kind in kinds)  # in a shard_map
    return not is_part and jax.device_count() > 1
