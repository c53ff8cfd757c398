"""Derivatives of gradients: the rules of `forward` and `backward`, for forward and for reverse mode.

    motion      from tangents of a scan's inputs to tangents of the arrays that `forward` keeps
    curvature   from tangents of a gradient's inputs to tangents of the gradient: forward over reverse. It is the
                derivative of the plan's own program, which keeps as few bytes as the plan
    pullback    its transpose, reverse over reverse. The derivative of the program would keep the residuals of every
                loop in it. So the gradient is taken once more, by the nest of the same plan: JAX keeps the checkpoints
                of `jax.checkpoint` in derivatives of any order

The kept arrays are functions of the inputs. `pullback` differentiates with respect to the inputs all the way, so the
kept arrays have no cotangents there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching
from jax.interpreters import partial_eval as pe

from bptt_jax._jaxprs.equations import has_own_gradient, is_debug
from bptt_jax._jaxprs.quiet import without_callbacks
from bptt_jax._jaxprs.types import Leaf
from bptt_jax._lower.nested import Nested
from bptt_jax._pipeline import Choice
from bptt_jax._primitives.expansion import jvp_of, primitive, traced
from bptt_jax._primitives.gradient import (
    EXPANSIONS,
    Vmaps,
    backward_of_one,
    backward_p,
    batch,
    choice_of_backward,
    forward_of_one,
    forward_p,
    of_argument,
    only_used,
    returned,
    with_cotangents,
)
from bptt_jax._primitives.scan import scan_p
from bptt_jax._trace.call import Arrays, Mask, ScanCall, replace, select
from bptt_jax._trace.gradient import mapped


def _jvp_of_forward(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Any], list[Any]]:
    if _by_expansion(params):
        return _jvp_of_expansion(forward_p, primals, tangents, params)
    outs = forward_p.bind(*primals, **params)
    call, vmaps, moving = params["call"].quiet, params["vmaps"], _moving(tangents)
    # The results are those of a scan, whose transpose keeps a budget as well.
    _, of_results = jvp_of(mapped(vmaps, functools.partial(scan_p.bind, call=call)), primals, tangents)
    params |= {"vmaps": _with_tangents(vmaps, moving)}
    of_kept = motion_p.bind(*primals, *select(tangents, moving), moving=moving, **params)
    return outs, only_used([*of_results, *of_kept], params["used"])


def _jvp_of_backward(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Any], list[Any]]:
    if _by_expansion(params):
        return _jvp_of_expansion(backward_p, primals, tangents, params)
    outs, moving = backward_p.bind(*primals, **params), _moving(tangents)
    params |= {"vmaps": _with_tangents(params["vmaps"], moving)}
    return outs, curvature_p.bind(*primals, *select(tangents, moving), moving=moving, **params)


def _by_expansion(params: dict[str, Any]) -> bool:
    """Whether JAX differentiates the programs themselves.

    This is so without a budget or a plan, because then nothing is computed twice. It has to be for rules of the user's
    own: the second derivative is that of what the rule computes, so the function is not differentiated anew.
    """
    call: ScanCall = params["call"]
    is_free = call.options.budget is None and call.options.plan is None
    return is_free or has_own_gradient(call.step.jaxpr.jaxpr)


def _jvp_of_expansion(
    of: core.Primitive, primals: Sequence[Any], tangents: Sequence[Any], params: dict[str, Any]
) -> tuple[list[Any], list[Any]]:
    closed = traced(EXPANSIONS[of], tuple(map(jax.typeof, primals)), params)
    outs, found = jvp_of(core.jaxpr_as_fun(without_callbacks(closed)), primals, tangents)
    # Reverse mode may evaluate the derivative's equations again, so callbacks run outside of them.
    return list(of.bind(*primals, **params)) if any(map(is_debug, closed.jaxpr.effects)) else outs, found


def _moving(tangents: Sequence[Any]) -> Mask:
    return tuple(type(t) is not ad.Zero for t in tangents)


def _with_tangents(vmaps: Vmaps, moving: Mask) -> Vmaps:
    """The vmaps over arguments and their tangents."""
    return tuple(dataclasses.replace(v, dims=(*v.dims, *select(v.dims, moving))) for v in vmaps)


def _tangents_of(run: Callable[..., Any], moving: Mask) -> Callable[..., list[Any]]:
    """A function from arguments, and the tangents of those that move, to tangents of results."""
    n = len(moving)

    def of_one(*args: Leaf) -> list[Any]:
        zeros = [ad.Zero(jax.typeof(leaf).to_tangent_aval()) for leaf in args[:n]]
        return jvp_of(run, args[:n], replace(zeros, moving, args[n:]))[1]

    return of_one


def _motion(*args: Leaf, moving: Mask, vmaps: Vmaps, used: Mask | None, **params: Any) -> list[Any]:
    del used  # all the kept arrays have tangents here
    call: ScanCall = params["call"]
    n = call.step.n_carry + len(call.y_along)
    forward = forward_of_one(vmaps=_of_first(vmaps, len(moving)), **params)
    has_callbacks = call.options.progress is not None or any(map(is_debug, call.step.jaxpr.effects))
    of_one = _tangents_of(_quiet(forward) if has_callbacks else forward, moving)
    return list(mapped(vmaps, lambda *args: of_one(*args)[n:])(*args))


def _quiet(run: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A function without its callbacks: a call without callbacks may keep other arrays."""

    def quiet(*args: Leaf) -> list[Any]:
        closed = jax.make_jaxpr(run)(*map(jax.typeof, args))
        return list(core.jaxpr_as_fun(without_callbacks(closed))(*args))

    return quiet


def _of_first(vmaps: Vmaps, n: int) -> Vmaps:
    return tuple(vmap.of_first(n) for vmap in vmaps)


def _transpose_motion(cts: Sequence[Any], *args: Leaf, moving: Mask, **params: Any) -> list[Any]:
    n, given = len(moving), [type(ct) is not ad.Zero for ct in cts]
    if not any(given):
        return [None] * len(args)

    def run(tangents: Arrays) -> list[Any]:
        return select(_motion(*args[:n], *tangents, moving=moving, **params), given)

    transposed: Any = jax.linear_transpose(_without_waste(run), [t.aval for t in args[n:]])
    return [None] * n + list(transposed(select(cts, given))[0])


def _curvature(*args: Leaf, moving: Mask, vmaps: Vmaps, **params: Any) -> list[Any]:
    backward = backward_of_one(vmaps=_of_first(vmaps, len(moving)), **params)
    of_one = _tangents_of(backward if params["call"].options.progress is None else _quiet(backward), moving)
    return list(mapped(vmaps, of_one)(*args))


def _transpose(
    cts: Sequence[Any], *args: Leaf, moving: Mask, vmaps: Vmaps, wrt: Mask, n_saved: int, **params: Any
) -> list[Any]:
    n, given = len(moving), tuple(type(ct) is not ad.Zero for ct in cts)
    wanted = tuple(moves and not len(wrt) <= i < len(wrt) + n_saved for i, moves in enumerate(moving))
    given_cts = select(cts, given)
    of_cts = with_cotangents(vmaps, n, len(given_cts))
    params |= {"wrt": wrt, "n_saved": n_saved}
    found = iter(pullback_p.bind(*args[:n], *given_cts, of_results=given, wanted=wanted, vmaps=of_cts, **params))
    results = [
        of_argument(next(found), n + j, vmaps) if is_wanted else None
        for j, is_wanted in enumerate(select(wanted, moving))
    ]
    return [None] * n + [r if ad.is_undefined_primal(t) else None for r, t in zip(results, args[n:], strict=True)]


def _pullback(
    *args: Leaf,
    call: ScanCall,
    wrt: Mask,
    given: Mask,
    n_saved: int,
    planned: Vmaps,
    vmaps: Vmaps,
    of_results: Mask,
    wanted: Mask,
    transfers: Any,
) -> list[Any]:
    del transfers  # for JAX
    n = len(wanted)
    inputs_and_cts = (*wanted[: len(wrt)], *wanted[len(wrt) + n_saved :])

    def of_one(*args: Leaf) -> list[Any]:
        choice = choice_of_backward(args[: len(wrt)], call, wrt, planned, vmaps)
        primals = [*args[: len(wrt)], *args[len(wrt) + n_saved : n]]

        def gradient(moved: Arrays) -> list[Any]:
            values = replace(primals, inputs_and_cts, moved)
            found = _by_nest(choice, wrt, given, values[: len(wrt)], values[len(wrt) :])
            return select(select(found, select(returned(call, wrt, given), wrt)), of_results)

        _, pull = jax.vjp(_without_waste(gradient), select(primals, inputs_and_cts))
        (found,) = pull(list(args[n:]))
        return list(found)

    return list(mapped(vmaps, of_one)(*args))


def _without_waste(run: Callable[[Arrays], Arrays]) -> Callable[[Arrays], Arrays]:
    """A function whose loops have no results without use: JAX fails to transpose a scan with some (0.10)."""

    def pruned(args: Arrays) -> Arrays:
        closed: Any = jax.make_jaxpr(run)(args)
        jaxpr, _ = pe.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
        return list(core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, closed.consts))(*args))

    return pruned


def _by_nest(choice: Choice, wrt: Mask, given: Mask, inputs: Arrays, cts: Arrays) -> list[Any]:
    """The gradient of a choice by the nest of its plan, all in `jax.checkpoint` and `lax.scan`."""
    active = choice.gradient.active
    nest = Nested(choice.gradient.call.quiet, wrt, choice.plan, active)

    def results(moved: Arrays) -> list[Any]:
        outs = nest.evaluate(replace(inputs, wrt, moved))
        return select(select(outs, (*active.carry, *active.y)), given)

    _, pull = jax.vjp(results, select(inputs, wrt))
    return list(pull(list(cts))[0])


motion_p = primitive("motion", _motion)
curvature_p = primitive("curvature", _curvature)
pullback_p = primitive("pullback", _pullback)
ad.primitive_jvps[forward_p] = _jvp_of_forward
ad.primitive_jvps[backward_p] = _jvp_of_backward
ad.primitive_transposes[motion_p] = _transpose_motion
ad.primitive_transposes[curvature_p] = _transpose
for _primitive in (motion_p, curvature_p, pullback_p):
    batching.fancy_primitive_batchers[_primitive] = functools.partial(batch, _primitive)
