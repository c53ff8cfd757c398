"""The `StepProfile` of a step, by abstract evaluation: nothing is run and nothing is compiled.

For the sweep, the equations of a step give the sizes of residuals and blocks. For the nest, JAX decides on the
residuals. Those of a loop are not the residuals of one step's vjp, because slices of xs and operands exist anyway, and
values independent of the iteration are kept once. So the residuals of two short loops, of 2 and of 4 steps, are
compared: arrays whose shapes differ count for each step, all others are fixed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar

import jax
from jax import lax

from bptt_jax._caches import remember
from bptt_jax._device.machine import Machine
from bptt_jax._figures import (
    ACCELERATOR_IN_TURN_TIMES,
    ACCELERATOR_TIMES,
    COUNTER_BYTES,
    IN_TURN_TIMES,
    MERGED_TIMES,
    SWEEP_TIMES,
    WITHOUT_FEATURES,
)
from bptt_jax._jaxprs.equations import inner_jaxprs
from bptt_jax._jaxprs.types import Jaxpr
from bptt_jax._lower.loop import most_together, moved_bytes
from bptt_jax._lower.nested import lower, read_by_index, with_unit_axes
from bptt_jax._step.form import Swept
from bptt_jax._trace.call import Arrays, FlatStep, Mask, element, replace, select
from bptt_jax._trace.gradient import Gradient
from bptt_jax.plans._nodes import Steps
from bptt_jax.plans._profile import StepProfile, StepTimes, SweepProfile

Profile = TypeVar("Profile", StepProfile, SweepProfile)

_SHORT, _LONG = 2, 4  # steps of the two loops; at least 2, because a single step runs without a loop


def measure(gradient: Gradient, form: Swept | None) -> StepProfile:
    """The profile of a gradient's step, for all examples together.

    Args:
      gradient: the gradient.
      form: the step as the sweep runs it; None for the nest.
    """
    call = gradient.call
    operands, carry, xs = call.step.split(gradient.types)
    x = tuple(element(leaf, along.axis) for leaf, along in zip(xs, call.x_along, strict=True))
    plain = _measure_plain(call.step, gradient.wrt, call.options.machine, (*operands, *carry, *x))
    profile = _with_moved(plain, gradient) if form is None else dataclasses.replace(plain, sweep=_swept(gradient, form))
    return profile if gradient.examples == 1 else _of_examples(profile, gradient.examples)


def made_bytes(gradient: Gradient) -> int:
    """Bytes of the results of all equations of one step, at any depth, for all examples."""

    # A scan inside the step counts once for each of its iterations.
    def made(jaxpr: Jaxpr) -> int:
        inner = [int(eqn.params.get("length", 1)) * made(one) for eqn in jaxpr.eqns for one in inner_jaxprs(eqn)]
        return sum(inner) + sum(machine.bytes_of(eqn.outvars) for eqn in jaxpr.eqns)

    machine = gradient.call.options.machine
    return gradient.examples * made(gradient.call.step.body.jaxpr)


def _copied_bytes(gradient: Gradient) -> int:
    """Bytes, per step and example, of the leaves of xs copied as a whole in the sweep.

    These are the leaves mapped over an axis other than their first, because under vmap JAX moves the examples to the
    first axis of each array read by a loop.
    """
    call = gradient.call
    places = call.step.split(range(len(gradient.types)))[2]
    moved = [any(vmap.dims[i] for vmap in gradient.vmaps) for i in places]
    return call.options.machine.nbytes(select(call.step.x, moved))


def _with_moved(profile: StepProfile, gradient: Gradient) -> StepProfile:
    """The profile of a nest, with the bytes, per step and example, of putting time first, where its loops want it.

    Leaves of xs read by index are residuals of a block. Other leaves, without time first or under vmap, are copied
    as a whole: xs and ys, and their cotangents where they are differentiated.
    """
    call, active, is_mapped = gradient.call, gradient.active, bool(gradient.vmaps)
    by_index = read_by_index(call, gradient.wrt, is_mapped)
    machine, copied = call.options.machine, 0
    kept = machine.nbytes(select(call.step.x, by_index))
    for leaf, along, is_active, is_read in zip(call.step.x, call.x_along, active.x, by_index, strict=True):
        if not is_read and (is_mapped or not along.is_leading):
            copied += machine.type_bytes(leaf) * (1 + is_active)
    for leaf, along, is_active in zip(call.step.y, call.y_along, active.y, strict=True):
        if is_mapped or not along.is_leading:
            copied += machine.type_bytes(leaf) * (1 + is_active)
    return dataclasses.replace(
        profile, copied_bytes=profile.copied_bytes + copied, residual_bytes=profile.residual_bytes + kept
    )


def _of_examples(profile: Profile, examples: int) -> Profile:
    """The profile of `examples` examples, each with gradients of its own."""
    names = [field.name for field in dataclasses.fields(profile) if field.name.endswith("_bytes")]
    larger: dict[str, Any] = {name: examples * getattr(profile, name) for name in names}
    if isinstance(profile, StepProfile) and profile.sweep is not None:
        larger["sweep"] = _of_examples(profile.sweep, examples)
    return dataclasses.replace(profile, **larger)


def _swept(gradient: Gradient, form: Swept) -> SweepProfile:
    call, sizes, machine = gradient.call, form.sizes, form.parts.machine
    carry = call.step.split(call.step.jaxpr.in_avals)[1]
    carry_bytes = machine.nbytes(carry) + machine.narrowing_bytes(carry)
    return SweepProfile(
        carry_bytes=carry_bytes,
        residual_bytes=sizes.saved_bytes,
        block_bytes=sizes.working_bytes,
        operand_bytes=sizes.operand_bytes,
        product_bytes=sizes.product_bytes,
        block_steps=sizes.most_steps,
        copied_bytes=_widened_bytes(call.step, machine) + _copied_bytes(gradient),
        # The backward of one step works on the cotangents of both its carries, the entering and the leaving one.
        fixed_bytes=sizes.fixed_bytes + 2 * carry_bytes + COUNTER_BYTES,
        together=most_together(call),
        times=dataclasses.replace(_times(form), transfer=_transfer(call.step, machine)),
    )


def _times(form: Swept) -> StepTimes:
    style, machine = form.style, form.parts.machine
    if not machine.is_cpu:
        return StepTimes(**(ACCELERATOR_IN_TURN_TIMES if style.in_turn else ACCELERATOR_TIMES))
    times = MERGED_TIMES if style.merged else IN_TURN_TIMES if style.in_turn else SWEEP_TIMES
    more = 1.0 if style.features else WITHOUT_FEATURES
    return StepTimes(**times | {name: more * times[name] for name in ("forward", "recording")})


@remember(1024)
def _measure_plain(step: FlatStep, wrt: Mask, machine: Machine, types: tuple[Any, ...]) -> StepProfile:
    operands, carry, x = step.split(types)

    def kept(n: int) -> Arrays:
        xs = [jax.eval_shape(lambda leaf: lax.broadcast(leaf, (n,)), leaf) for leaf in x]
        found: Arrays = jax.eval_shape(functools.partial(_residuals, step, wrt, n), (*operands, *carry, *xs))
        return found

    short, long = kept(_SHORT), kept(_LONG)
    params = select(operands, step.split(wrt)[0])
    by_length = [leaf for leaf, other in zip(short, long, strict=True) if leaf.shape != other.shape]
    once = [leaf for leaf, other in zip(short, long, strict=True) if leaf.shape == other.shape]
    residual_bytes = (machine.nbytes(by_length) + machine.narrowing_bytes(by_length)) // _SHORT
    # The backward of one step works on the cotangents of its residuals and of both its carries, under any plan.
    working_bytes = residual_bytes + 2 * machine.nbytes(carry) + COUNTER_BYTES
    fixed_bytes = machine.nbytes(once) + machine.narrowing_bytes(once) + working_bytes
    return StepProfile(
        carry_bytes=machine.nbytes(carry) + machine.narrowing_bytes(carry),
        residual_bytes=residual_bytes,
        x_bytes=_narrow_bytes(machine, step.x),
        y_bytes=_narrow_bytes(machine, step.y),
        param_bytes=machine.nbytes(params),
        fixed_bytes=fixed_bytes,
        copied_bytes=_widened_bytes(step, machine),
        unit_axis_bytes=machine.nbytes(with_unit_axes(step)),
        times=StepTimes(transfer=_transfer(step, machine)),
    )


def _transfer(step: FlatStep, machine: Machine) -> float:
    """The time to move a byte to or from the host, in evaluations of a step; a CPU has no host beside it."""
    return 0.0 if machine.is_cpu else machine.transfer(moved_bytes(step, machine))


def _widened_bytes(step: FlatStep, machine: Machine) -> int:
    """Bytes of the leaves of x and y copied by XLA as a whole into another type."""
    return machine.nbytes(leaf for leaf in (*step.x, *step.y) if machine.widens(leaf))


def _narrow_bytes(machine: Machine, leaves: Arrays) -> int:
    """Bytes of leaves in the types handed in; where XLA widens a leaf, its loops slice the whole copy."""
    narrow = (leaf.dtype.itemsize / 4 if machine.widens(leaf) else 1 for leaf in leaves)
    return sum(int(machine.type_bytes(leaf) * share) for leaf, share in zip(leaves, narrow, strict=True))


def _residuals(step: FlatStep, wrt: Mask, n: int, inputs: Arrays) -> Arrays:
    """The residuals of the vjp of n steps, without its arguments; xs has time first."""
    run = lower(Steps(n), step)
    _, vjp = jax.vjp(lambda chosen: run(*step.split(replace(inputs, wrt, chosen))), select(inputs, wrt))
    arguments = {id(leaf) for leaf in inputs}  # they exist anyway, so as residuals they take nothing
    return [leaf for leaf in jax.tree.leaves(vjp) if id(leaf) not in arguments]
