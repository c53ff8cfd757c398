"""Equations without callbacks for debugging, for programs that evaluate a step again: each callback then runs once."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable
from typing import Any

from jax.extend import core

from bptt_jax._jaxprs.equations import inner_jaxprs, is_debug
from bptt_jax._jaxprs.types import ClosedJaxpr, Eqn, Jaxpr


def quiet(eqns: Iterable[Any], only: Container[Hashable] | None = None) -> list[Any]:
    """The equations without callbacks for debugging, at any depth of calls, loops and branches.

    Args:
      eqns: the equations.
      only: the callbacks to leave out, as `callbacks` names them; None for all.
    """
    found = []
    for eqn in eqns:
        if not any(map(is_debug, eqn.effects)):
            found.append(eqn)
        elif inner_jaxprs(eqn):
            found.append(_quiet(eqn, only))
        elif eqn.outvars or not (only is None or _name(eqn) in only):
            found.append(eqn)
    return found


def callbacks(eqns: Iterable[Any]) -> set[Hashable]:
    """The names of the callbacks for debugging, at any depth."""
    found: set[Hashable] = set()
    for eqn in eqns:
        if any(map(is_debug, eqn.effects)):
            inner = inner_jaxprs(eqn)
            found.update(*(callbacks(jaxpr.eqns) for jaxpr in inner) if inner else [{_name(eqn)}])
    return found


def _name(eqn: Eqn) -> Hashable:
    """A callback's name: JAX keeps its function, and its text, in derivatives."""
    params = ((name, value if isinstance(value, str) else id(value)) for name, value in sorted(eqn.params.items()))
    return eqn.primitive.name, *(pair for pair in params if pair[0] in ("callback", "fmt"))


def without_callbacks(closed: ClosedJaxpr, only: Container[Hashable] | None = None) -> Any:
    """A jaxpr without callbacks for debugging, at any depth; see `quiet`."""
    if not any(map(is_debug, closed.jaxpr.effects)):
        return closed
    return core.ClosedJaxpr(with_eqns(closed.jaxpr, quiet(closed.jaxpr.eqns, only)), closed.consts)


def _quiet(eqn: Eqn, only: Container[Hashable] | None) -> Any:
    params = {name: _without_callbacks(value, only) for name, value in eqn.params.items()}
    made = [getattr(jaxpr, "effects", ()) for value in params.values() for jaxpr in _jaxprs_of(value)]
    still = any(is_debug(effect) for effects in made for effect in effects)
    return eqn.replace(params=params, effects={effect for effect in eqn.effects if still or not is_debug(effect)})


def _jaxprs_of(value: Any) -> list[Any]:
    values = value if isinstance(value, tuple | list) else [value]
    return [getattr(one, "jaxpr", one) for one in values if _has_eqns(getattr(one, "jaxpr", one))]


def _without_callbacks(value: Any, only: Container[Hashable] | None) -> Any:
    match value:
        case core.ClosedJaxpr():
            return without_callbacks(value, only)
        case core.Jaxpr():
            return with_eqns(value, quiet(value.eqns, only))
        case tuple() | list():
            return type(value)(_without_callbacks(one, only) for one in value) if any(map(_has_eqns, value)) else value
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
