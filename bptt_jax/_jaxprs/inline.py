"""A jaxpr with its calls replaced by their equations, at any depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives

from bptt_jax._jaxprs.equations import apply, bind, evaluate, is_arithmetic, read, value_of
from bptt_jax._jaxprs.types import ClosedJaxpr, Eqn, Leaf, Tree


def is_jit(eqn: Eqn) -> bool:
    """Whether an equation is a jit, without constraints on its arguments or results (shardings, layouts)."""
    return eqn.primitive is primitives.jit_p and not _is_constrained(eqn.params)


def is_checkpoint(eqn: Eqn) -> bool:
    """Whether an equation is a `jax.checkpoint`; under JAX_REMAT3 the name of a parameter's type tells."""
    return eqn.primitive is primitives.remat_p or type(eqn.params.get("_prim")).__name__ == "RematTraced"


def inline(closed: ClosedJaxpr, is_call: Callable[[Eqn], bool] = is_jit) -> Any:
    """The same jaxpr without these calls and without repeated equations, so equal values are one variable."""

    def run(*args: Leaf) -> list[Any]:
        return _run(closed, args, {}, is_call)  # the tracers go with the trace, as jax.checking_leaks wants it

    return jax.make_jaxpr(run)(*(v.aval for v in closed.jaxpr.invars))


def _run(closed: ClosedJaxpr, args: Sequence[Any], known: dict[Any, Any], is_call: Callable[[Eqn], bool]) -> list[Any]:
    def apply_eqn(eqn: Eqn, values: Sequence[Any]) -> Sequence[Any]:
        if is_call(eqn):
            return _run(called(eqn), values, known, is_call)
        if not is_arithmetic(eqn):
            return apply(eqn, values)
        literals = tuple(value_of(v) if isinstance(v, core.Literal) else None for v in eqn.invars)
        tracers = [value for v, value in zip(eqn.invars, values, strict=True) if not isinstance(v, core.Literal)]
        params = tuple(sorted(eqn.params.items(), key=lambda item: item[0]))
        key = (eqn.primitive, tuple(map(id, tracers)), literals, params, str(eqn.ctx))
        try:
            hash(key)
        except TypeError:  # a parameter without a hash, so not to be compared
            return apply(eqn, values)
        if key not in known:
            known[key] = apply(eqn, values), tracers  # held, so no other value gets their ids
        outs: Sequence[Any] = known[key][0]
        return outs

    env = bind(closed.jaxpr.constvars, closed.consts) | bind(closed.jaxpr.invars, args)
    evaluate(closed.jaxpr.eqns, env, apply_eqn)
    return [read(env, v) for v in closed.jaxpr.outvars]


def called(eqn: Eqn) -> Any:
    """The jaxpr of a call, closed."""
    found = [getattr(p, "jaxpr", None) if name == "_prim" else p for name, p in eqn.params.items()]
    (inner,) = (p for p in found if isinstance(p, core.Jaxpr | core.ClosedJaxpr))
    return inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())


def _is_constrained(params: Tree) -> bool:
    given = [params.get(f"{side}_{what}") or () for side in ("in", "out") for what in ("shardings", "layouts")]
    return any(g is not None and repr(g) != "UnspecifiedValue" for group in given for g in group)
