"""`scan`: the call itself.

evaluated       the plain loop of `jax.lax.scan`, because nothing is planned without derivatives
under vmap      the batch goes into the step, so gradients of inputs shared by examples are summed where they are made
differentiated  `forward` and `tangent`, for exactly the inputs with a tangent
transposed      as `jax.lax.scan`, where the step is linear
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching
from jax.interpreters import partial_eval as pe

from bptt_jax._caches import remember
from bptt_jax._device.free_bytes import free_bytes
from bptt_jax._jaxprs.equations import is_in, is_named_axis, needed, reachable, with_parts
from bptt_jax._jaxprs.types import Leaf, Tree
from bptt_jax._lower import plain
from bptt_jax._options import Options
from bptt_jax._pipeline import choose, told
from bptt_jax._primitives.expansion import jvp_of, primitive
from bptt_jax._primitives.gradient import Vmaps, forward_p, names_axis, tangent_p, transfers_of, vmaps_around
from bptt_jax._step.form import has_vjp
from bptt_jax._trace.active import active
from bptt_jax._trace.call import Arrays, FlatStep, Mask, ScanCall, element, replace, select
from bptt_jax._trace.gradient import Gradient, gradient_of

scan_p = primitive("scan", lambda *inputs, call: plain.evaluate(call, inputs))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: ScanCall) -> tuple[list[Any], list[Any]]:
    tangents = [_symbolic(t) for t in tangents]
    given = tuple(type(t) is not ad.Zero for t in tangents)
    found = active(call.step, given)
    moving = (*found.carry, *found.y)
    if call.length > 0 and not any(moving):
        outs = scan_p.bind(*primals, call=call)
        return outs, [_zero(out) for out in outs]
    if call.length == 0 or not has_vjp(call, found):  # forward mode alone: there is nothing to plan
        return jvp_of(lambda *inputs: plain.run(call, inputs), primals, tangents)
    if call.options.budget == "auto":
        call = dataclasses.replace(call, options=_with_bytes(call.options))
    wrt = gradient_of(call, primals, given).wrt
    planned: Vmaps = ()
    if call.options.budget is not None:
        planned = vmaps_around(primals)
        told(choose(Gradient(call, wrt, tuple(map(jax.typeof, primals)), planned)))
    common = {"call": call, "wrt": wrt, "planned": planned, "vmaps": (), "transfers": transfers_of(call.options)}
    outs = forward_p.bind(*primals, used=None, **common)
    outs, kept = outs[: len(moving)], outs[len(moving) :]
    chosen = [t for t, differentiated in zip(tangents, wrt, strict=True) if differentiated]
    out_tangents = iter(tangent_p.bind(*primals, *kept, *chosen, n_saved=len(kept), **common))
    return outs, [next(out_tangents) if moves else _zero(out) for out, moves in zip(outs, moving, strict=True)]


def _with_bytes(options: Options) -> Options:
    """Budget "auto" as the bytes free now, fixed so all rules of one gradient see the same."""
    return dataclasses.replace(options, budget=free_bytes(options.machine.device))


def _symbolic(tangent: Any) -> Any:
    """The tangent, as a symbolic zero where it is float0: integers have no tangents."""
    if type(tangent) is ad.Zero or jax.typeof(tangent).dtype != jax.dtypes.float0:
        return tangent
    return ad.Zero(jax.typeof(tangent))


def _zero(out: Any) -> Any:
    return ad.Zero(jax.typeof(out).to_tangent_aval())


def _transpose(cts: Sequence[Any], *inputs: Leaf, call: ScanCall) -> list[Any]:
    unknown = [ad.is_undefined_primal(leaf) for leaf in inputs]
    types = [leaf.aval for leaf in inputs if ad.is_undefined_primal(leaf)]
    given = [type(ct) is not ad.Zero for ct in cts]

    def run(chosen: Arrays) -> list[Any]:
        values = iter(chosen)
        outs = plain.run(call.silent, [next(values) if u else leaf for leaf, u in zip(inputs, unknown, strict=True)])
        return [out for out, has_cotangent in zip(outs, given, strict=True) if has_cotangent]

    transposed: Any = jax.linear_transpose(run, types)
    (found,) = transposed([ct for ct in cts if type(ct) is not ad.Zero])
    results = iter(found)
    return [next(results) if u else None for u in unknown]


def _batch(axis: Any, inputs: Sequence[Any], dims: Sequence[Any], *, call: ScanCall) -> tuple[list[Any], list[Any]]:
    step = call.step
    if all(dim is None for dim in dims) and not names_axis(call, axis.name):
        outs = scan_p.bind(*inputs, call=call)
        return outs, [None] * len(outs)
    # New batch axes are sharded as the batch of an input with one; without any, 0 stands for it.
    example = next(((leaf, dim) for leaf, dim in zip(inputs, dims, strict=True) if dim is not None), (0, None))
    of_lengths = call.lengths_of(dims)
    inputs, dims = _with_lengths_of_their_own(axis, inputs, dims, call, example)
    operands, carry, xs = step.split(inputs)
    of_operands, of_carry, of_xs = step.split(dims)
    moving, of_ys = _batched(step, dims)
    if of_lengths is not None:
        of_ys = tuple(
            batched or along.batch_axes is not None for batched, along in zip(of_ys, call.y_along, strict=True)
        )
    carry = [
        _first(axis, leaf, dim, example) if moves else leaf
        for leaf, dim, moves in zip(carry, of_carry, moving, strict=True)
    ]
    x_along = tuple(along.batched(d, of_lengths) for along, d in zip(call.x_along, of_xs, strict=True))
    # One step has no axis of time, so a batch axis behind it moves up by one.
    of_x = tuple(None if d is None else d - (d > t.axis) for t, d in zip(x_along, of_xs, strict=True))
    x = [element(leaf, along.axis) for leaf, along in zip(xs, x_along, strict=True)]
    in_axes = (*of_operands, *(0 if moves else None for moves in moving), *of_x)
    out_axes = tuple(0 if batched else None for batched in (*moving, *of_ys))
    types = (*map(jax.typeof, (*operands, *carry)), *x)
    inside = _batched_step(step, in_axes, out_axes, axis.name, axis.size, axis.spmd_name, types)
    y_along = tuple(
        along.batched(0 if batched else None, of_lengths) for along, batched in zip(call.y_along, of_ys, strict=True)
    )
    inner = dataclasses.replace(call, step=inside, x_along=x_along, y_along=y_along)
    return scan_p.bind(*operands, *carry, *xs, call=inner), list(out_axes)


def _with_lengths_of_their_own(
    axis: Any, inputs: Sequence[Any], dims: Sequence[Any], call: ScanCall, example: Any
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Inputs and dims; where examples have lengths of their own, arrays read by lengths get an axis for the batch."""
    if call.lengths is None or dims[call.lengths] is None:
        return inputs, dims
    is_read_by_them = [False] * (len(inputs) - len(call.x_along)) + [a.batch_axes is not None for a in call.x_along]
    chosen = [is_read and d is None for is_read, d in zip(is_read_by_them, dims, strict=True)]
    new = [_first(axis, leaf, None, example) for leaf in select(inputs, chosen)]
    return replace(inputs, chosen, new), replace(dims, chosen, [0] * len(new))


def _batched(step: FlatStep, dims: Sequence[Any]) -> tuple[Mask, Mask]:
    """Masks of the leaves of the carry and of ys with a batch axis: those depending on an input with it."""
    jaxpr = step.jaxpr.jaxpr
    if any(map(is_named_axis, jaxpr.effects)):  # the step may ask which example it is
        return (True,) * step.n_carry, (True,) * (len(jaxpr.outvars) - step.n_carry)
    return _reached_from(step, [dim is not None for dim in dims])


def _reached_from(step: FlatStep, given: Sequence[bool]) -> tuple[Mask, Mask]:
    """Masks of the leaves of the carry and of ys depending on the given inputs."""
    jaxpr = step.jaxpr.jaxpr
    inputs = {v for v, is_given in zip(jaxpr.invars, given, strict=True) if is_given}
    carry = step.split(jaxpr.invars)[1]
    # A new carry enters the next step, so its leaves join the inputs until none is added.
    while True:
        reached = reachable(jaxpr.eqns, inputs)
        new = {v for v, out in zip(carry, jaxpr.outvars, strict=False) if is_in(out, reached)}
        if new <= inputs:
            return tuple(v in inputs for v in carry), tuple(is_in(v, reached) for v in jaxpr.outvars[step.n_carry :])
        inputs |= new


def _first(axis: Any, leaf: Leaf, dim: int | None, example: tuple[Any, int | None]) -> Any:
    """`leaf` with the batch as its first axis, sharded as the batch of `example`."""
    take: Any = jax.vmap(
        lambda leaf, _: leaf, in_axes=(dim, example[1]), axis_size=axis.size, spmd_axis_name=axis.spmd_name
    )
    return take(leaf, example[0])


@remember(256)
def _batched_step(
    step: FlatStep, in_axes: Tree, out_axes: Tree, name: Any, size: int, spmd_name: Any, types: Any
) -> FlatStep:
    """A step for a batch; the same object for the same arguments."""

    def run(*inputs: Leaf) -> tuple[Any, ...]:
        carry, y = step(*step.split(inputs))
        return (*carry, *y)

    inside: Any = jax.vmap(run, in_axes, out_axes, axis_name=name, axis_size=size, spmd_axis_name=spmd_name)
    closed: Any = jax.make_jaxpr(inside)
    return FlatStep(closed(*types), step.n_operands, step.n_carry)


def _partial_eval(trace: Any, *tracers: Any, call: ScanCall) -> list[Any]:
    """Makes results of known inputs known; for example, the primals of a rule that scans over primals and tangents."""
    unknown = [not tracer.is_known() for tracer in tracers]
    outs = list(trace.default_process_primitive(scan_p, tracers, {"call": call}))
    if not any(unknown) or call.lengths_of(unknown):
        return outs
    moving, of_ys = _reached_from(call.step, unknown)
    known_outs = [not reached for reached in (*moving, *of_ys)]
    if not any(known_outs):
        return outs
    step = call.step
    # A carry with a known start may become unknown at a later step, so `moving` decides.
    operands, _, xs = step.split([not u for u in unknown])
    known_inputs = (*operands, *(not moves for moves in moving), *xs)
    inside = _known_step(step, known_inputs, tuple(known_outs))
    known_call = dataclasses.replace(
        call.silent,
        step=inside,
        x_along=tuple(select(call.x_along, xs)),
        y_along=tuple(select(call.y_along, [not reached for reached in of_ys])),
        # Their index among the known operands.
        lengths=None if call.lengths is None else sum(operands[: call.lengths]),
    )
    found = iter(scan_p.bind(*(t.pval.get_known() for t in select(tracers, known_inputs)), call=known_call))
    return [trace.to_jaxpr_tracer(next(found)) if known else out for out, known in zip(outs, known_outs, strict=True)]


@remember(256)
def _known_step(step: FlatStep, inputs: Mask, outputs: Mask) -> FlatStep:
    """The part of a step from some inputs to some results."""
    closed = step.quiet.body  # the other part has the callbacks
    jaxpr = closed.jaxpr
    outvars, invars = select(jaxpr.outvars, outputs), select(jaxpr.invars, inputs)
    part = with_parts(jaxpr, needed(jaxpr.eqns, outvars), invars, outvars)
    n_operands, n_carry = (sum(mask) for mask in step.split(inputs)[:2])
    return FlatStep(core.ClosedJaxpr(part, closed.consts), n_operands, n_carry)


pe.custom_partial_eval_rules[scan_p] = _partial_eval
ad.primitive_jvps[scan_p] = _jvp
ad.primitive_transposes[scan_p] = _transpose
batching.fancy_primitive_batchers[scan_p] = _batch
