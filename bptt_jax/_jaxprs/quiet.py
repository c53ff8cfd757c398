"""Equations without callbacks for debugging, for programs that evaluate a step again: each callback then runs once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jax.extend import core

from bptt_jax._jaxprs.equations import inner_jaxprs, is_debug
from bptt_jax._jaxprs.types import ClosedJaxpr, Eqn, Jaxpr


def quiet(eqns: Iterable[Any]) -> list[Any]:
    """The equations without callbacks for debugging, at any depth of calls, loops and branches."""
    found = []
    for eqn in eqns:
        if not any(map(is_debug, eqn.effects)):
            found.append(eqn)
        elif eqn.outvars or inner_jaxprs(eqn):
            found.append(_quiet(eqn))
    return found


def without_callbacks(closed: ClosedJaxpr) -> Any:
    """A jaxpr without callbacks for debugging, at any depth."""
    if not any(map(is_debug, closed.jaxpr.effects)):
        return closed
    return core.ClosedJaxpr(with_eqns(closed.jaxpr, quiet(closed.jaxpr.eqns)), closed.consts)


def _quiet(eqn: Eqn) -> Any:
    params = {name: _without_callbacks(value) for name, value in eqn.params.items()}
    return eqn.replace(params=params, effects={effect for effect in eqn.effects if not is_debug(effect)})


def _without_callbacks(value: Any) -> Any:
    match value:
        case core.ClosedJaxpr():
            return without_callbacks(value)
        case core.Jaxpr():
            return with_eqns(value, quiet(value.eqns))
        case tuple() | list():
            return type(value)(map(_without_callbacks, value)) if any(map(_has_eqns, value)) else value
    return getattr(value, "quiet", value)  # a call of this library's


def _has_eqns(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def with_eqns(jaxpr: Jaxpr, eqns: list[Any]) -> Any:
    """The same jaxpr with other equations, with or without callbacks for debugging."""
    calls_back = any(is_debug(effect) for eqn in eqns for effect in eqn.effects)
    return core.Jaxpr(
        constvars=jaxpr.constvars,
        invars=jaxpr.invars,
        outvars=jaxpr.outvars,
        eqns=eqns,
        effects={effect for effect in jaxpr.effects if calls_back or not is_debug(effect)},
        debug_info=core.DebugInfo("bptt_jax", jaxpr.debug_info.func_src_info, None, None),
    )
