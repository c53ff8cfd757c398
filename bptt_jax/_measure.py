"""From a step to its `StepProfile`, by abstract evaluation: nothing is run and nothing is compiled.

For the sweep, the equations of a step say what is kept and what a block holds. For the nest, JAX decides: what a loop
of steps keeps for its backward is not what the vjp of the bare step keeps, since slices of xs and operands are there
anyway, and values that do not depend on the iteration are kept once. So the residuals of two short loops are counted;
the difference is the share of one step, and what is left over is fixed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.extend import core

from bptt_jax._device.machine import Machine
from bptt_jax._gradient import Gradient
from bptt_jax._lower.jaxprs import has_own_gradient, inline, is_float, needed, read_by
from bptt_jax._lower.nested import lower, read_by_index, with_unit_axes
from bptt_jax._lower.swept import Swept
from bptt_jax._plan import Steps
from bptt_jax._step import Arrays, FlatStep, Mask, ScanCall, element, replace, select
from bptt_jax._step_profile import StepProfile, StepTimes

_COUNTERS_BYTES = 256  # of loops and of the tables that they are called with
# Of each further loop, fitted to tiny steps (CPU); half as much again in a nest of checkpoints.
_LOOP_BYTES, _BY_ARRAY, _BY_PARAM = 512, 96, 48
# Of an LSTM on CPU, relative to a step that is advanced in the sweep; a block's products count as some steps.
_SWEEP_TIMES = StepTimes(forward=1.0, recording=1.2, backward=1.6, block=2.0)
_JOINED_TIMES = dataclasses.replace(_SWEEP_TIMES, backward=1.3)
_IN_TURN_TIMES = dataclasses.replace(_SWEEP_TIMES, backward=2.1)
_SHORT, _LONG = 2, 4  # at least 2: a loop of one step is not a loop


def measure(gradient: Gradient, form: Swept | None) -> StepProfile:
    """The profile of the step of a gradient, for all its examples.

    Args:
      gradient: the gradient.
      form: the step as the sweep runs it; None for the nest.
    """
    call = gradient.call
    operands, carry, xs = call.step.split(gradient.types)
    x = tuple(element(leaf, along.axis) for leaf, along in zip(xs, call.x_along, strict=True))
    plain = _measure_plain(call.step, gradient.wrt, call.options.machine, (*operands, *carry, *x))
    if form is None:
        profile = _with_moved(plain, gradient)
    else:
        profile = _of_sweep(call.step, plain, form)
        copied_bytes, moved_bytes = profile.copied_bytes + _copied_bytes(gradient), _moved_bytes(call)
        profile = dataclasses.replace(profile, copied_bytes=copied_bytes, moved_bytes=moved_bytes)
    return profile if gradient.examples == 1 else _of_examples(profile, gradient.examples)


def _moved_bytes(call: ScanCall) -> int:
    """Of each step of a block at a fixed place, what XLA brings into the order of the loop beside reading it.

    Of x or of the cotangents of y, whichever are more: not both are there at a time (CPU).
    """
    moved = [
        call.options.machine.nbytes(leaf for leaf, along in zip(leaves, alongs, strict=True) if not along.is_leading)
        for leaves, alongs in ((call.step.x, call.x_along), (call.step.y, call.y_along))
    ]
    return max(moved)


def _copied_bytes(gradient: Gradient) -> int:
    """Of each step of one example, what the sweep has as a whole a second time: of xs what has not the examples first.

    Under vmap JAX has them first in all that a loop reads.
    """
    call = gradient.call
    places = call.step.split(range(len(gradient.types)))[2]
    moved = [any(vmap.dims[i] for vmap in gradient.vmaps) for i in places]
    return call.options.machine.nbytes(select(call.step.x, moved))


def _with_moved(profile: StepProfile, gradient: Gradient) -> StepProfile:
    """The profile of a nest with all that time first, which its loops want, takes for each step of one example.

    What is read by index a block keeps for its backward. What is differentiated is there as a whole a second time, as
    are its cotangents, and ys.
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


def _of_examples(profile: StepProfile, examples: int) -> StepProfile:
    """The profile of so many examples, each with gradients of its own."""
    sizes = {
        field.name: examples * getattr(profile, field.name)
        for field in dataclasses.fields(profile)
        if field.name.endswith("_bytes") and field.name != "loop_bytes"
    }
    plain = None if profile.plain is None else _of_examples(profile.plain, examples)
    return dataclasses.replace(profile, plain=plain, **sizes)


def _of_sweep(step: FlatStep, plain: StepProfile, form: Swept) -> StepProfile:
    sizes, style, machine = form.sizes, form.style, form.parts.machine
    return StepProfile(
        carry_bytes=plain.carry_bytes,
        residual_bytes=sizes.saved_bytes,
        x_bytes=machine.nbytes(step.x),
        y_bytes=machine.nbytes(step.y),
        param_bytes=plain.param_bytes,
        fixed_bytes=sizes.fixed_bytes + 10 * plain.carry_bytes + _COUNTERS_BYTES,
        copied_bytes=_widened_bytes(step, machine),
        block_bytes=sizes.working_bytes,
        stacked_bytes=sizes.stacked_bytes,
        advance_bytes=sizes.advance_bytes,
        left_bytes=sizes.left_bytes,
        reread_bytes=sizes.reread_bytes,
        reread_ct_bytes=sizes.reread_ct_bytes,
        product_bytes=sizes.product_bytes,
        block_steps=sizes.most_steps,
        ahead_bytes=0 if any(form.parts.active.x) else 3 * machine.nbytes(step.x) // 2,
        loop_bytes=2 * plain.loop_bytes // 3,
        plain=plain,
        times=_JOINED_TIMES if style.joined else _IN_TURN_TIMES if style.in_turn else _SWEEP_TIMES,
    )


@functools.lru_cache(maxsize=1024)
def _measure_plain(step: FlatStep, wrt: Mask, machine: Machine, types: tuple[Any, ...]) -> StepProfile:
    operands, carry, x = step.split(types)

    def kept(n: int) -> Arrays:
        xs = [jax.eval_shape(lambda leaf: lax.broadcast(leaf, (n,)), leaf) for leaf in x]
        found: Arrays = jax.eval_shape(functools.partial(_residuals, step, wrt, n), (*operands, *carry, *xs))
        return found

    short, long = kept(_SHORT), kept(_LONG)
    params = select(operands, step.split(wrt)[0])
    stepwise = len(step.jaxpr.jaxpr.outvars) + len(x)
    by_length = [leaf for leaf, other in zip(short, long, strict=True) if leaf.shape != other.shape]
    once = [leaf for leaf, other in zip(short, long, strict=True) if leaf.shape == other.shape]
    residual_bytes = (machine.nbytes(by_length) + machine.narrowing_bytes(by_length)) // _SHORT
    # The backward of one step works on cotangents of its residuals and of both its carries, whatever is kept.
    working_bytes = residual_bytes + 2 * machine.nbytes(carry) + _COUNTERS_BYTES
    fixed_bytes = machine.nbytes(once) + machine.narrowing_bytes(once) + working_bytes
    return StepProfile(
        carry_bytes=machine.nbytes(carry) + machine.narrowing_bytes(carry),
        residual_bytes=residual_bytes,
        x_bytes=_narrow_bytes(machine, step.x),
        y_bytes=_narrow_bytes(machine, step.y),
        param_bytes=machine.nbytes(params),
        fixed_bytes=fixed_bytes,
        copied_bytes=_widened_bytes(step, machine) + machine.nbytes(_shared(step)),
        nest_copied_bytes=machine.nbytes(with_unit_axes(step)),
        loop_bytes=3 * (_LOOP_BYTES + _BY_ARRAY * stepwise + _BY_PARAM * len(params)) // 2,
    )


def _widened_bytes(step: FlatStep, machine: Machine) -> int:
    """Of the leaves of x and y of which XLA keeps the whole in another type."""
    return machine.nbytes(leaf for leaf in (*step.x, *step.y) if machine.widens(leaf))


def _shared(step: FlatStep) -> Arrays:
    """The types that both x and y have, of which XLA makes zeros for two loops in an array of its own.

    Results are written into them. Where the backward loop waits for carries of the forward one, one of the two is
    written into that array itself (CPU, JAX 0.10).
    """
    in_x = {(leaf.shape, leaf.dtype) for leaf in step.x if is_float(leaf)}
    found = {(leaf.shape, leaf.dtype): leaf for leaf in step.y if (leaf.shape, leaf.dtype) in in_x}
    return list(found.values()) if found and not _backward_reads_carry(step) else []


def _backward_reads_carry(step: FlatStep) -> bool:
    def residuals(*leaves: Any) -> Arrays:
        _, vjp = jax.vjp(step, *step.split(leaves))
        return jax.tree.leaves(vjp)

    flat = inline(jax.make_jaxpr(residuals)(*step.jaxpr.in_avals)).jaxpr
    read = read_by(needed(flat.eqns, flat.outvars), flat.outvars)
    return any(v in read for v in step.split(flat.invars)[1])


def told_apart_by(step: FlatStep) -> Any:
    """Equal for steps that are compiled to equal programs.

    Rules of the user's own are printed by their names, and closures have the same one; so the equations of their
    gradient are added.
    """
    text = str(step.jaxpr)
    if not has_own_gradient(step.jaxpr.jaxpr):
        return text

    def gradient(*leaves: Any) -> Any:
        mask = [is_float(leaf) for leaf in leaves]

        def run(given: Arrays) -> Arrays:
            return [out for out in core.jaxpr_as_fun(step.jaxpr)(*replace(leaves, mask, given)) if is_float(out)]

        outs, vjp = jax.vjp(run, select(leaves, mask))
        return vjp(outs)

    try:
        return text, str(jax.make_jaxpr(gradient)(*step.jaxpr.in_avals))
    except (TypeError, ValueError, NotImplementedError):  # there is no reverse-mode derivative
        return step


def _narrow_bytes(machine: Machine, leaves: Arrays) -> int:
    """As the leaves are handed in: where XLA widens them, it slices what it has copied."""
    return sum(machine.type_bytes(leaf) // (2 if machine.widens(leaf) else 1) for leaf in leaves)


def _residuals(step: FlatStep, wrt: Mask, n: int, inputs: Arrays) -> Arrays:
    """What the vjp of n steps keeps beyond its arguments, xs having time first."""
    run = lower(Steps(n), step)
    _, vjp = jax.vjp(lambda chosen: run(*step.split(replace(inputs, wrt, chosen))), select(inputs, wrt))
    arguments = {id(leaf) for leaf in inputs}
    return [leaf for leaf in jax.tree.leaves(vjp) if id(leaf) not in arguments]
