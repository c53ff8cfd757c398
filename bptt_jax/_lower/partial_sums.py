"""Gradients of weights summed by each device for itself, under explicit sharding, until the whole sweep is done.

A weight held by all devices and multiplied with divided data has a gradient summed over devices. Done for each block,
this is one reduction per block, inside loops out of which XLA moves it by one level at most. So each device adds up the
sums of its own part. JAX calls such values, with one summand per device, "unreduced"; they are the cotangents of values
typed as "reduced". In a `shard_map` nothing is to be done, because weights are made to vary before the scan. Under
automatic sharding types do not show the axes, so nothing is done either.
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

Axes = dict[int, frozenset[Any]]  # of the mesh, to sum over later; by position among the hoisted values


def partial_axes(parts: SplitStep, vjp: StepVjp) -> Axes:
    """The axes of a mesh over which gradients of hoisted values can wait to be summed."""
    uses = _uses(parts, vjp)
    if not any(uses.values()):
        return {}
    hoisted = parts.hoisted
    found: Axes = {}
    for group in _groups(parts) if parts.moves_only else [{v} for v in hoisted]:
        # A group's gradients are moved and added together, so all of its uses must wait over the same axes.
        axes = {uses[v] for v in group if v in uses}
        if len(axes) == 1 and (only := axes.pop()):
            waiting = {i: only for i, v in enumerate(hoisted) if v in group & parts.differentiable}
            found |= waiting if _can_wait(parts, hoisted, waiting) else {}
    return found


def _can_wait(parts: SplitStep, hoisted: Sequence[Any], axes: Axes) -> bool:
    """Whether JAX can type all operations on hoisted values: it cannot yet for some moves of sharded values."""

    def gradients(hoisted: Arrays) -> Any:
        typed = as_reduced(hoisted, axes)
        made, vjp = jax.vjp(lambda given: _floats(derive(replace(typed, mask, given))), select(typed, mask))
        waiting = {i: frozenset(jax.typeof(leaf).sharding.spec.reduced) for i, leaf in enumerate(made)}
        return vjp(list(unreduced(dict(enumerate(map(zeros_like, made))), waiting, []).values()))

    derive = parts.derive if parts.moves_only else list
    mask = [is_float(v) for v in hoisted]
    types = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=explicit_sharding(v.aval)) for v in hoisted]
    # JAX has no list of the operations it can type; it raises for the others.
    try:
        jax.eval_shape(gradients, types)
    except (TypeError, ValueError, NotImplementedError, AssertionError):
        return False
    return True


def _floats(leaves: Arrays) -> list[Any]:
    return [leaf for leaf in leaves if is_float(leaf)]


def as_reduced(hoisted: Arrays, axes: Axes) -> Arrays:
    """The hoisted values, typed as reduced over some axes: their cotangents are left unreduced over these."""
    return [
        jax.reshard(leaf, _sharding(leaf, reduced=axes[i])) if i in axes else leaf for i, leaf in enumerate(hoisted)
    ]


def unreduced(zeros: dict[int, Any], axes: Axes, inputs: Arrays) -> dict[int, Any]:
    """Zeros to start the sums of hoisted gradients from, typed as unreduced where these wait.

    A choice between the zeros and themselves makes them depend on all inputs; XLA drops it. Through it, vmap of a
    derivative of the sweep finds the inputs' batch axis in the zeros. It needs this because it cannot add a batch axis
    to an unreduced sum.
    """
    if axes and inputs:
        # `leaf != leaf` (NaN) makes the choice depend on every input, and both sides are the same zeros.
        mark = functools.reduce(jnp.logical_or, [jnp.any(leaf != leaf) for leaf in map(_data, inputs)])
        zeros = zeros | {i: lax.select_n(mark, zeros[i], zeros[i]) for i in axes}
    return zeros | {i: jax.reshard(zeros[i], _sharding(zeros[i], unreduced=axes[i])) for i in axes}


def _data(leaf: Leaf) -> Any:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def summed(gradients: dict[int, Any], hoisted: Arrays, axes: Axes) -> dict[int, Any]:
    """The gradients, the unreduced ones now summed over the devices."""
    return {i: jax.reshard(g, _sharding(hoisted[i])) if i in axes else g for i, g in gradients.items()}


def _sharding(leaf: Leaf, **kinds: frozenset[Any]) -> NamedSharding:
    sharding = jax.typeof(leaf).sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec.partitions, **kinds))


def _uses(parts: SplitStep, vjp: StepVjp) -> dict[Any, frozenset[Any]]:
    """For each constant the axes over which its uses sum its gradient; none where the sum cannot wait."""
    nothing: frozenset[Any] = frozenset()
    found: dict[Any, frozenset[Any]] = {parts.constants[i]: nothing for i in vjp.in_loop}

    def note(v: Var, axes: frozenset[Any]) -> None:
        # The gradients of all uses are added, so they wait over the same axes or not at all.
        found[v] = axes if found.get(v, axes) == axes else nothing

    for tap in vjp.taps:
        note(parts.constants[tap.const], _summed_over(tap.eqn, tap.side))
    for eqn in parts.feature_eqns:
        for side, v in enumerate(eqn.invars):
            if not isinstance(v, core.Literal) and v in parts.constants:
                note(v, _summed_over(eqn, side) if eqn.primitive is primitives.dot_general_p else nothing)
    return found


def _summed_over(eqn: Eqn, side: int) -> frozenset[Any]:
    """The axes over which an operand's gradient is summed, in a product or in a sum broadcasting the operand."""
    if eqn.primitive in SUMS:
        shape = eqn.invars[side].aval.shape
        return _axes_of(eqn.outvars[0], [i for i, size in enumerate(shape) if size == 1])
    if eqn.primitive is not primitives.dot_general_p or any(eqn.params["dimension_numbers"][1]):
        return frozenset()
    # An operand's gradient contracts the free dimensions of the other operand with those of the result.
    other, contracted = eqn.invars[1 - side], eqn.params["dimension_numbers"][0][1 - side]
    return _axes_of(other, [i for i in range(other.aval.ndim) if i not in contracted])


def _axes_of(v: Var, dimensions: Any = None) -> frozenset[Any]:
    """The axes of the mesh dividing an explicitly sharded variable, or some of its dimensions."""
    sharding = None if isinstance(v, core.Literal) else explicit_sharding(v.aval)
    if sharding is None:
        return frozenset()
    spec = [*sharding.spec.partitions, *[None] * v.aval.ndim][: v.aval.ndim]
    names = [spec[i] for i in (range(v.aval.ndim) if dimensions is None else dimensions)]
    return frozenset(a for name in names if name is not None for a in (name if isinstance(name, tuple) else (name,)))


def _groups(parts: SplitStep) -> list[set[Any]]:
    """Operands and the values made of them by moving data; different groups share no data."""
    groups: list[set[Any]] = [{v} for v in parts.constants]
    for eqn in parts.derived_eqns:
        touched = {*variables(eqn.invars), *eqn.outvars}
        joined = touched.union(*(group for group in groups if group & touched))
        groups = [group for group in groups if not group & touched] + [joined]
    return groups
