"""Primitives defined by their expansion.

Each has one function, `expand`, of its arguments and parameters, in JAX's own primitives. It is traced once for the
same types and parameters. The trace is the primitive's implementation, its lowering, its abstract evaluation (so
shardings and varying axes are right) and its derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe

from bptt_jax._caches import remember
from bptt_jax._jaxprs.equations import is_named_axis
from bptt_jax._jaxprs.types import Jaxpr, Leaf

Expand = Callable[..., list[Any]]


def primitive(name: str, expand: Expand) -> core.Primitive:
    """A primitive with several results, computed by `expand`; without rules for vmap and transposition."""
    made = core.Primitive(f"bptt_{name}")
    made.multiple_results = True

    def run(*args: Leaf, **params: Any) -> list[Any]:
        closed = traced(expand, tuple(map(jax.typeof, args)), params)
        return list(core.jaxpr_as_fun(closed)(*args))

    def abstract(*avals: Any, **params: Any) -> tuple[list[Any], Any]:
        closed = traced(expand, avals, params)
        return closed.out_avals, {effect for effect in closed.jaxpr.effects if not is_named_axis(effect)}

    def implement(*args: Leaf, **params: Any) -> list[Any]:
        return list(_jitted(expand, tuple(sorted(params.items())))(*args))

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
        return jvp_of(functools.partial(run, **params), primals, tangents)

    made.def_impl(implement)
    made.def_effectful_abstract_eval(abstract)
    mlir.register_lowering(made, mlir.lower_fun(run, multiple_results=True))
    ad.primitive_jvps[made] = jvp
    return made


def prune_unused_results(primitive: core.Primitive, expand: Expand) -> None:
    """Lets JAX drop work for unused results of a primitive, at any depth of its loops, because XLA does not."""

    def rule(used: list[bool], *rest: Any) -> tuple[list[bool], Any]:
        eqn = rest[-1]  # after JAX 0.10 an argument about references comes before it
        if all(used):
            return [True] * len(eqn.invars), eqn
        try:
            with eqn.ctx.manager:
                closed = traced(expand, [v.aval for v in eqn.invars], eqn.params)
        except NameError:  # a named axis is not bound here
            return [True] * len(eqn.invars), eqn
        if closed.consts:
            return [True] * len(eqn.invars), eqn
        jaxpr, used_inputs = pe.dce_jaxpr(closed.jaxpr, used)
        if not any(used) and not jaxpr.effects:
            return [False] * len(eqn.invars), None
        invars = [v for v, is_used in zip(eqn.invars, used_inputs, strict=True) if is_used]
        outvars = [v for v, is_used in zip(eqn.outvars, used, strict=True) if is_used]
        params = {"jaxpr": core.ClosedJaxpr(jaxpr, ())}
        pruned = eqn.replace(primitive=pruned_p, invars=invars, outvars=outvars, params=params)
        return list(used_inputs), pruned

    pe.dce_rules[primitive] = rule


def _pruned(*args: Leaf, jaxpr: Jaxpr) -> list[Any]:
    return list(core.jaxpr_as_fun(jaxpr)(*args))


def _batch_pruned(axis: Any, args: Sequence[Any], dims: Sequence[Any], *, jaxpr: Jaxpr) -> tuple[Any, Any]:
    run = jax.vmap(
        core.jaxpr_as_fun(jaxpr), tuple(dims), axis_name=axis.name, axis_size=axis.size, spmd_axis_name=axis.spmd_name
    )
    outs = run(*args) if any(dim is not None for dim in dims) else pruned_p.bind(*args, jaxpr=jaxpr)
    return outs, [0 if any(dim is not None for dim in dims) else None] * len(outs)


def jvp_of(run: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The results of a function and their tangents, where tangents may be symbolic zeros."""
    moving = [type(t) is not ad.Zero for t in tangents]

    def of_moving(*values: Any) -> Any:
        given = iter(values)
        return run(*(next(given) if moves else p for p, moves in zip(primals, moving, strict=True)))

    chosen, given = (tuple(v for v, moves in zip(vs, moving, strict=True) if moves) for vs in (primals, tangents))
    outs, found = jax.jvp(of_moving, chosen, given)
    return list(outs), list(found)


def traced(expand: Expand, types: Sequence[Any], params: dict[str, Any]) -> Any:
    """The expansion of a primitive for arguments of these types; remembered."""
    return _traced(expand, tuple(types), tuple(sorted(params.items())), jax.sharding.get_abstract_mesh())


# Steps among the parameters know the context of their trace. Of the call's context only the mesh matters, because types
# refer to it.
@remember(256)
def _traced(expand: Expand, types: tuple[Any, ...], params: tuple[tuple[str, Any], ...], _mesh: Any) -> Any:
    closed = jax.make_jaxpr(functools.partial(expand, **dict(params)))(*types)
    if closed.consts:
        return closed
    # JAX drops unneeded equations from a jitted function, at any depth of its loops, but not from primitives.
    jaxpr, _ = pe.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return core.ClosedJaxpr(jaxpr, ())


@remember(256)
def _jitted(expand: Expand, params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(functools.partial(expand, **dict(params)))


pruned_p = primitive("pruned", _pruned)
batching.fancy_primitive_batchers[pruned_p] = _batch_pruned
