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
from jax.interpreters import ad, mlir
from jax.interpreters import partial_eval as pe

from bptt_jax._caches import remember
from bptt_jax._jaxprs.equations import is_named_axis
from bptt_jax._jaxprs.types import Leaf

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
