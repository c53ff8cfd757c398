"""Equations without callbacks for debugging, for programs that evaluate a step again: each callback then runs once."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable
from typing import Any

from jax.extend import core

from bptt_jax._jaxprs.equations import inner_jaxprs, is_debug, with_parts
from bptt_jax._jaxprs.types import ClosedJaxpr, Eqn


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
            of_inner = set[Hashable]().union(*(callbacks(jaxpr.eqns) for jaxpr in inner_jaxprs(eqn)))
            found |= of_inner or {_name(eqn)}  # a scan of this library's may have some beside those of its step
    return found


def _name(eqn: Eqn) -> Hashable:
    """A callback's name: JAX keeps its function, and its text, in derivatives."""
    params = ((name, value if isinstance(value, str) else id(value)) for name, value in sorted(eqn.params.items()))
    return eqn.primitive.name, *(pair for pair in params if pair[0] in ("callback", "fmt"))


def without_callbacks(closed: ClosedJaxpr, only: Container[Hashable] | None = None) -> Any:
    """A jaxpr without callbacks for debugging, at any depth; see `quiet`."""
    if not any(map(is_debug, closed.jaxpr.effects)):
        return closed
    return core.ClosedJaxpr(with_parts(closed.jaxpr, quiet(closed.jaxpr.eqns, only)), closed.consts)


def _quiet(eqn: Eqn, only: Container[Hashable] | None) -> Any:
    params = {name: _without_callbacks(value, only) for name, value in eqn.params.items()}
    made = eqn.replace(params=params)
    still = any(is_debug(effect) for jaxpr in inner_jaxprs(made) for effect in jaxpr.effects)
    return made.replace(effects={effect for effect in eqn.effects if still or not is_debug(effect)})


def _without_callbacks(value: Any, only: Container[Hashable] | None) -> Any:
    match value:
        case core.ClosedJaxpr():
            return without_callbacks(value, only)
        case core.Jaxpr():
            return with_parts(value, quiet(value.eqns, only))
        case tuple() | list():
            return type(value)(_without_callbacks(one, only) for one in value) if any(map(_has_eqns, value)) else value
    return getattr(value, "quiet", value)  # a call of this library's


def _has_eqns(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)
