"""A key of a jaxpr, equal for jaxprs that are the same up to the names of their variables.

JAX compares jaxprs by identity, and each trace of a function defined inside its caller makes a new one. Keys are
strict: where two values may differ without showing it, there is no key. For example, of a callback, or of an array in
a nested function: a key would also keep these alive. A derivative rule is a new function in each trace, so the
equations it makes are compared.
"""

from __future__ import annotations

import numbers
import os
import types
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives

from bptt_jax._jaxprs.arrays import is_float
from bptt_jax._jaxprs.equations import apply, inner_jaxprs, is_own_rule, value_of
from bptt_jax._jaxprs.types import Atom, ClosedJaxpr, Eqn, Jaxpr

# Rules within rules are compared down to this depth, which is derivatives of this order.
_DEPTH = 2
# Below it, JAX's own rules of functions in these folders are known by the function, because they call it themselves
# (`jax.nn.relu`). Others of JAX's depend on functions of the user's (`lax.custom_root`).
_PLAIN = tuple(os.path.join(os.path.dirname(jax.__file__), "_src", folder) + os.sep for folder in ("nn", "numpy"))
# Parameters made anew for each derivative rule; JAX exports no names for them.
_RULES = {"jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees"}


class _NoKeyError(Exception):
    """A jaxpr has no key."""


def structure(closed: ClosedJaxpr) -> Hashable:
    """The key of a jaxpr: its equations with their contexts, parameters and types of results, and its inputs' types.

    None if it has none.

    >>> import jax.numpy as jnp
    >>> a, b, c = (jax.make_jaxpr(f)(1.0) for f in (jnp.sin, lambda x: jnp.sin(x), lambda x: jnp.sin(x) + 1))
    >>> structure(a) == structure(b), structure(a) == structure(c)
    (True, False)
    """
    try:
        return _of_closed(closed, 0)
    except _NoKeyError:
        return None


def configuration() -> Hashable:
    """All of JAX's settings, by which a step may be traced or lowered to different programs, and the mesh."""
    names = sorted(jax.config.values)
    return tuple(repr(getattr(jax.config, name, None)) for name in names), jax.sharding.get_abstract_mesh()


def _of_closed(closed: ClosedJaxpr, depth: int) -> Hashable:
    if closed.consts:
        raise _NoKeyError
    return _of_jaxpr(closed.jaxpr, depth)


def _of_jaxpr(jaxpr: Jaxpr, depth: int) -> Hashable:
    """The key within as many derivative rules as `depth`."""
    number: dict[Any, int] = {}

    def read(atom: Atom) -> Hashable:
        return (
            (value_of(atom), getattr(atom.aval, "weak_type", False)) if isinstance(atom, core.Literal) else number[atom]
        )

    def made(variables: Iterable[Any]) -> Hashable:
        for v in variables:
            number[v] = len(number)
        return tuple(v.aval for v in variables)

    def of_eqn(eqn: Eqn) -> Hashable:
        # The names of scopes tell where a scan is (`explain_calls`).
        context = (str(eqn.ctx), str(eqn.source_info.name_stack), frozenset(eqn.effects))
        return eqn.primitive, context, tuple(map(read, eqn.invars)), _of_params(eqn, depth), made(eqn.outvars)

    return made([*jaxpr.constvars, *jaxpr.invars]), tuple(map(of_eqn, jaxpr.eqns)), tuple(map(read, jaxpr.outvars))


def _of_params(eqn: Eqn, depth: int) -> Hashable:
    params = {name: value for name, value in eqn.params.items() if name not in _RULES}
    rules = [] if len(params) == len(eqn.params) else [_of_rule(eqn, depth)]
    return tuple((name, _of_value(params[name], depth)) for name in sorted(params)), *rules


def _of_rule(eqn: Eqn, depth: int) -> Hashable:
    """The key of the equations that a rule makes: tangents of results, or cotangents of inputs."""
    if eqn.params.get("symbolic_zeros"):  # these equations would depend on the zeros
        raise _NoKeyError
    if depth == _DEPTH:
        source = str(inner_jaxprs(eqn)[0].debug_info.func_src_info)
        if is_own_rule(eqn) or not any(folder in source for folder in _PLAIN):
            raise _NoKeyError
        return source
    places = [i for i, v in enumerate(eqn.invars) if is_float(v)]

    # Tangents and cotangents are arguments of their own: a rule may confuse them with values.
    def derivative(values: Sequence[Any], tangents: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        def run(*chosen: Any) -> Any:
            given = dict(zip(places, chosen, strict=True))
            outs = apply(eqn, [given.get(i, value) for i, value in enumerate(values)])
            return [out for out in outs if out is not None and is_float(out)]

        chosen = [values[i] for i in places]
        if eqn.primitive is primitives.custom_jvp_call_p:
            return jax.jvp(run, chosen, tangents)
        outs, pull = jax.vjp(run, *chosen)
        return outs, pull(cotangents)

    values = [v.aval for v in eqn.invars]
    tangents = [values[i].to_tangent_aval() for i in places]
    cotangents = [v.aval.to_tangent_aval() for v in eqn.outvars if is_float(v) and not isinstance(v, core.DropVar)]
    try:
        closed = jax.make_jaxpr(derivative)(values, tangents, cotangents)
    except Exception as error:  # a rule is code of the user's: what it raises, it raises again where it is used
        raise _NoKeyError from error
    return _of_closed(closed, depth + 1)


def _of_value(value: Any, depth: int) -> Hashable:
    """The key of a parameter of an equation."""
    match value:
        case core.ClosedJaxpr():
            return "closed", _of_closed(value, depth)
        case core.Jaxpr():
            return "open", _of_jaxpr(value, depth)
        case tuple() | list():
            return type(value), tuple(_of_value(one, depth) for one in value)
        case numbers.Number():
            return type(value), repr(value)  # 0.0 and -0.0 are equal
        case types.FunctionType() if value.__closure__ is None and "<locals>" not in value.__qualname__:
            return value
    if isinstance(value, jax.Array | types.FunctionType | types.MethodType) or _is_partial(value):
        raise _NoKeyError
    try:
        hash(value)
    except TypeError as error:
        raise _NoKeyError from error
    return type(value), value


def _is_partial(value: Any) -> bool:
    """Whether a value is a function with values of its own: a partial, or one of JAX's wrapped functions."""
    return callable(value) and any(hasattr(value, name) for name in ("func", "f", "callback", "callback_func"))
