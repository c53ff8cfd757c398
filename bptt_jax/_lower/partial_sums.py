"""Gradients of weights that each device sums up for itself, under explicit sharding, until the whole sweep is done.

A weight that all devices hold, multiplied with what is divided among them, has a gradient that is a sum over devices.
Taken for each block, that is a reduction for each block, in the middle of loops out of which XLA moves it by one level
at most. So the sums over a device's own part are what is added up: JAX calls a value of which each device has a summand
"unreduced", and has it as the cotangent of one that is typed as "reduced". In a `shard_map` nothing is to be done, for
there weights are made to vary before the scan; and under automatic sharding types do not tell.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.extend.core import primitives
from jax.sharding import NamedSharding, PartitionSpec

from bptt_jax._jaxprs.arrays import explicit_sharding, is_float, zeros_like
from bptt_jax._jaxprs.equations import variables
from bptt_jax._jaxprs.types import Eqn, Leaf, Var
from bptt_jax._step.split import SplitStep
from bptt_jax._step.taps import SUMS
from bptt_jax._step.vjp import StepVjp
from bptt_jax._trace.call import Arrays, replace, select

Axes = dict[int, frozenset[Any]]  # of the mesh, by the position of what is summed over them among what a block holds


def partial_axes(parts: SplitStep, vjp: StepVjp) -> Axes:
    """The axes of a mesh over which gradients can wait to be summed."""
    uses = _uses(parts, vjp)
    if not any(uses.values()):
        return {}
    hoisted = parts.hoisted
    found: Axes = {}
    for group in _groups(parts) if parts.moves_only else [{v} for v in hoisted]:
        axes = {uses[v] for v in group if v in uses}
        if len(axes) == 1 and (only := axes.pop()):
            waiting = {i: only for i, v in enumerate(hoisted) if v in group & parts.differentiable}
            found |= waiting if _can_wait(parts, hoisted, waiting) else {}
    return found


def _can_wait(parts: SplitStep, hoisted: Sequence[Any], axes: Axes) -> bool:
    """Whether JAX can type all that is done to what is hoisted: some moves of what is sharded as well it cannot yet."""

    def gradients(hoisted: Arrays) -> Any:
        typed = as_reduced(hoisted, axes)
        made, vjp = jax.vjp(lambda given: _floats(derive(replace(typed, mask, given))), select(typed, mask))
        waiting = {i: frozenset(jax.typeof(leaf).sharding.spec.reduced) for i, leaf in enumerate(made)}
        return vjp(list(unreduced(dict(enumerate(map(zeros_like, made))), waiting, []).values()))

    derive = parts.derive if parts.moves_only else list
    mask = [is_float(v) for v in hoisted]
    types = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=explicit_sharding(v.aval)) for v in hoisted]
    try:
        jax.eval_shape(gradients, types)
    except (TypeError, ValueError, NotImplementedError, AssertionError):
        return False
    return True


def _floats(leaves: Arrays) -> list[Any]:
    return [leaf for leaf in leaves if is_float(leaf)]


def as_reduced(hoisted: Arrays, axes: Axes) -> Arrays:
    """What is hoisted, typed so that cotangents are left unreduced over some axes."""
    return [
        jax.reshard(leaf, _sharding(leaf, reduced=axes[i])) if i in axes else leaf for i, leaf in enumerate(hoisted)
    ]


def unreduced(zeros: dict[int, Any], axes: Axes, inputs: Arrays) -> dict[int, Any]:
    """Zeros, to which the gradients of what is hoisted are added, typed so that those wait.

    A choice between them and themselves makes them depend on all inputs, and XLA drops it: vmap of a derivative of the
    sweep has to find the batch axis that the inputs have, because it cannot add one to a sum that waits.
    """
    if axes and inputs:
        mark = functools.reduce(jnp.logical_or, [jnp.any(leaf != leaf) for leaf in map(_data, inputs)])
        zeros = zeros | {i: lax.select_n(mark, zeros[i], zeros[i]) for i in axes}
    return zeros | {i: jax.reshard(zeros[i], _sharding(zeros[i], unreduced=axes[i])) for i in axes}


def _data(leaf: Leaf) -> Any:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def summed(gradients: dict[int, Any], hoisted: Arrays, axes: Axes) -> dict[int, Any]:
    """The gradients, those that waited now summed over the devices."""
    return {i: jax.reshard(g, _sharding(hoisted[i])) if i in axes else g for i, g in gradients.items()}


def _sharding(leaf: Leaf, **kinds: frozenset[Any]) -> NamedSharding:
    sharding = jax.typeof(leaf).sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec.partitions, **kinds))


def _uses(parts: SplitStep, vjp: StepVjp) -> dict[Any, frozenset[Any]]:
    """For each constant the axes that its gradient is summed over where it is used; none where it cannot wait."""
    nothing: frozenset[Any] = frozenset()
    found: dict[Any, frozenset[Any]] = {parts.constants[i]: nothing for i in vjp.in_loop}

    def note(v: Var, axes: frozenset[Any]) -> None:
        found[v] = axes if found.get(v, axes) == axes else nothing

    for tap in vjp.taps:
        note(parts.constants[tap.const], _summed_over(tap.eqn, tap.side))
    for eqn in parts.feature_eqns:
        for side, v in enumerate(eqn.invars):
            if not isinstance(v, core.Literal) and v in parts.constants:
                note(v, _summed_over(eqn, side) if eqn.primitive is primitives.dot_general_p else nothing)
    return found


def _summed_over(eqn: Eqn, side: int) -> frozenset[Any]:
    """The axes over which an operand's gradient is a sum, of a product or of a sum that broadcasts it."""
    if eqn.primitive in SUMS:
        shape = eqn.invars[side].aval.shape
        return _axes_of(eqn.outvars[0], [i for i, size in enumerate(shape) if size == 1])
    if eqn.primitive is not primitives.dot_general_p or any(eqn.params["dimension_numbers"][1]):
        return frozenset()
    other, contracted = eqn.invars[1 - side], eqn.params["dimension_numbers"][0][1 - side]
    return _axes_of(other, [i for i in range(other.aval.ndim) if i not in contracted])


def _axes_of(v: Var, dimensions: Any = None) -> frozenset[Any]:
    """The axes of the mesh that an explicitly sharded variable, or some of its dimensions, are divided over."""
    sharding = None if isinstance(v, core.Literal) else explicit_sharding(v.aval)
    if sharding is None:
        return frozenset()
    spec = [*sharding.spec.partitions, *[None] * v.aval.ndim][: v.aval.ndim]
    names = [spec[i] for i in (range(v.aval.ndim) if dimensions is None else dimensions)]
    return frozenset(a for name in names if name is not None for a in (name if isinstance(name, tuple) else (name,)))


def _groups(parts: SplitStep) -> list[set[Any]]:
    """Operands and what is made of them by moving data, such that what is in different groups has nothing in common."""
    groups: list[set[Any]] = [{v} for v in parts.constants]
    for eqn in parts.derived_eqns:
        touched = {*variables(eqn.invars), *eqn.outvars}
        joined = touched.union(*(group for group in groups if group & touched))
        groups = [group for group in groups if not group & touched] + [joined]
    return groups
