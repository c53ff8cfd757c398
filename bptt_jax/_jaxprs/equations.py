"""Reading and evaluating jaxprs, with public API only: equations are evaluated one by one, never rebuilt.

A traced step is a list of equations. The block (`split`, `block`) runs some of them here and some there, so all it
needs is: to flatten nested jits, to evaluate a list of equations in an environment, and to ask what an equation is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.extend.core import primitives

from bptt_jax._caches import remember
from bptt_jax._jaxprs.arrays import is_float
from bptt_jax._jaxprs.types import Atom, ClosedJaxpr, Effect, Eqn, Jaxpr, Leaf, Tree

Env = dict[Any, Any]

_JAX_FOLDER = os.path.dirname(jax.__file__) + os.sep

# What vmap leaves as it is: JAX's own arithmetic. Not what others define (callbacks, foreign functions).
_BATCHABLE = {p.name for p in vars(primitives).values() if isinstance(p, core.Primitive)} | {"split"}
PRODUCTS = {primitives.dot_general_p, primitives.conv_general_dilated_p}
# Values that are only moved: their gradients are moved back at each block, and no sums of their own are held.
MOVES = frozenset({
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "reshape", "slice", "split", "squeeze",
    "transpose",
})  # fmt: skip
# Elementwise and free of transcendental functions: evaluated again, fused with what uses it, faster than read back.
CHEAP = frozenset({
    "abs", "add", "add_any", "and", "broadcast_in_dim", "convert_element_type", "copy", "eq", "ge", "gt", "integer_pow",
    "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "reshape", "select_n", "sign", "slice", "split",
    "square", "squeeze", "stop_gradient", "sub", "xor",
})  # fmt: skip
NO_GRADIENT = frozenset(["stop_gradient", "floor", "ceil", "round", "sign", "nextafter"])
# Other bits under vmap than in a loop, for keys of the "rbg" kind.
_RANDOM = ("random", "rng", "threefry")


def inline(closed: ClosedJaxpr) -> Any:
    """The same jaxpr without nested jits and repeated equations, so that equal values are one variable.

    A jit that constrains its arguments (shardings, layouts) is left as it is.
    """

    def run(*args: Leaf) -> list[Any]:
        return _run_inlined(closed, args, {})  # gone when the trace is, as jax.checking_leaks wants it

    return jax.make_jaxpr(run)(*(v.aval for v in closed.jaxpr.invars))


def _run_inlined(closed: ClosedJaxpr, args: Sequence[Any], known: dict[Any, Any]) -> list[Any]:
    def apply_eqn(eqn: Eqn, values: Sequence[Any]) -> Sequence[Any]:
        if eqn.primitive is primitives.jit_p and not _is_constrained(eqn.params):
            (inner,) = (p for p in eqn.params.values() if isinstance(p, core.ClosedJaxpr))
            return _run_inlined(inner, values, known)
        # The same for equal arithmetic only: what others define may print alike and differ.
        if eqn.primitive.name not in _BATCHABLE or has_effects(eqn) or is_random(eqn) or has_inner_jaxpr(eqn):
            return apply(eqn, values)
        literals = tuple(value_of(v) if isinstance(v, core.Literal) else None for v in eqn.invars)
        tracers = [value for v, value in zip(eqn.invars, values, strict=True) if not isinstance(v, core.Literal)]
        params = tuple(sorted(eqn.params.items(), key=lambda item: item[0]))
        key = (eqn.primitive, tuple(map(id, tracers)), literals, params, str(eqn.ctx))
        try:
            hash(key)
        except TypeError:  # a parameter that cannot be compared
            return apply(eqn, values)
        if key not in known:
            known[key] = apply(eqn, values), tracers  # held, so that their ids stay theirs
        outs: Sequence[Any] = known[key][0]
        return outs

    env = bind(closed.jaxpr.constvars, closed.consts) | bind(closed.jaxpr.invars, args)
    evaluate(closed.jaxpr.eqns, env, apply_eqn)
    return [read(env, v) for v in closed.jaxpr.outvars]


def value_of(literal: Any) -> tuple[str, str, bytes]:
    """A literal's type and its bits: printed, two numbers may look the same."""
    value = np.asarray(literal.val)
    return str(literal.aval), value.dtype.str, value.tobytes()


def _is_constrained(params: Tree) -> bool:
    given = [params.get(f"{side}_{what}") or () for side in ("in", "out") for what in ("shardings", "layouts")]
    return any(g is not None and repr(g) != "UnspecifiedValue" for group in given for g in group)


def bind(variables: Sequence[Any], values: Sequence[Any]) -> Env:
    """An environment in which the variables have these values."""
    return dict(zip(variables, values, strict=True))


def read(env: Env, atom: Atom) -> Any:
    """The value of a variable or literal."""
    return atom.val if isinstance(atom, core.Literal) else env[atom]


def evaluate(
    eqns: Iterable[Any], env: Env, apply_eqn: Callable[[Any, Sequence[Any]], Sequence[Any]] | None = None
) -> None:
    """Runs equations in order, writing their results into `env`."""
    for eqn in eqns:
        outs = (apply_eqn or apply)(eqn, [read(env, v) for v in eqn.invars])
        env.update((v, out) for v, out in zip(eqn.outvars, outs, strict=True) if not isinstance(v, core.DropVar))


def apply(eqn: Eqn, values: Sequence[Any]) -> Sequence[Any]:
    """The results of one equation."""
    alone, kept = _alone(eqn)
    given = {v: value for v, value in zip(eqn.invars, values, strict=True) if not isinstance(v, core.Literal)}
    outs = iter(core.jaxpr_as_fun(alone)(*(given[v] for v in alone.jaxpr.invars)))
    return [next(outs) if keep else None for keep in kept]


@remember(4096)  # equations are compared by identity
def _alone(eqn: Eqn) -> tuple[Any, tuple[bool, ...]]:
    """A jaxpr of just this equation, and which of its results it returns (all that anyone reads)."""
    kept = tuple(not isinstance(v, core.DropVar) for v in eqn.outvars)
    jaxpr = core.Jaxpr(
        constvars=(),
        invars=variables(eqn.invars),
        outvars=[v for v in eqn.outvars if not isinstance(v, core.DropVar)],
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=core.DebugInfo("bptt_jax", "step", None, None),
    )
    return core.ClosedJaxpr(jaxpr, ()), kept


def variables(atoms: Iterable[Any]) -> list[Any]:
    """The distinct variables among atoms, in order."""
    return list(dict.fromkeys(a for a in atoms if not isinstance(a, core.Literal)))


def needed(eqns: Sequence[Any], outputs: Iterable[Any], given: Iterable[Any] = ()) -> list[Any]:
    """Those of the equations that `outputs` depend on, or that have effects, with `given` known."""
    known = set(given)
    wanted = set(variables(outputs)) - known
    kept = []
    for eqn in reversed(eqns):
        if has_effects(eqn) or any(v in wanted for v in eqn.outvars):
            kept.append(eqn)
            wanted.update(v for v in variables(eqn.invars) if v not in known)
    return kept[::-1]


def read_by(eqns: Iterable[Any], outputs: Iterable[Any] = ()) -> set[Any]:
    """The variables that equations read, and those among their outputs."""
    return {*variables(outputs), *(v for eqn in eqns for v in variables(eqn.invars))}


def reachable(eqns: Iterable[Any], inputs: Iterable[Any]) -> set[Any]:
    """The inputs, and all that equations make of them."""
    found = set(inputs)
    for eqn in eqns:
        if any(v in found for v in variables(eqn.invars)):
            found.update(eqn.outvars)
    return found


def is_in(atom: Atom, found: Container[Any]) -> bool:
    """Whether an atom is one of some variables."""
    return not isinstance(atom, core.Literal) and atom in found


def with_gradient(eqns: Iterable[Any], inputs: Iterable[Any]) -> frozenset[Any]:
    """The differentiable ones of the inputs, and of what equations make of them, that a gradient goes back from.

    A matrix that the step makes itself has none, nor has what comes out of a stop_gradient.
    """
    found = {v for v in inputs if is_float(v)}
    for eqn in eqns:
        if eqn.primitive.name not in NO_GRADIENT and any(v in found for v in variables(eqn.invars)):
            found.update(v for v in eqn.outvars if is_float(v))
    return frozenset(found)


def is_debug(effect: Effect) -> bool:
    """Whether an effect is one of `jax.debug`; JAX exports no name for them."""
    return type(effect).__name__ in ("DebugEffect", "OrderedDebugEffect")


def is_named_axis(effect: Effect) -> bool:
    """Whether an effect is the use of a named axis, which whoever maps over it takes care of."""
    return type(effect).__name__ == "NamedAxisEffect"


def has_effects(eqn: Eqn) -> bool:
    """Whether an equation does more than compute its results; to name an axis is no such effect."""
    return not all(map(is_named_axis, eqn.effects))


def has_inner_jaxpr(eqn: Eqn) -> bool:
    """Whether an equation is a call, a loop or a branch."""
    return bool(inner_jaxprs(eqn))


def is_random(eqn: Eqn) -> bool:
    """Whether an equation draws random bits, or makes keys."""
    return str(eqn.primitive.name).startswith(_RANDOM)


def can_be_batched(eqn: Eqn) -> bool:
    """Whether vmap leaves an equation's results, derivatives and effects what they are in a loop.

    Branches do not qualify: under vmap both are evaluated, and a NaN in the one not taken reaches the gradient.
    """
    is_arithmetic = eqn.primitive.name in _BATCHABLE and not has_inner_jaxpr(eqn)
    return is_arithmetic and not has_effects(eqn) and not is_random(eqn)


def has_own_gradient(jaxpr: Jaxpr) -> bool:
    """Whether a function with a derivative rule of the user's own occurs in a jaxpr, at any depth.

    A rule need not be the derivative of its function; then higher derivatives depend on when it was applied. JAX's own
    (`jax.nn.relu`) are, and are told by where they are defined.
    """
    return any(_is_own_rule(eqn) or any(map(has_own_gradient, inner_jaxprs(eqn))) for eqn in jaxpr.eqns)


def _is_own_rule(eqn: Eqn) -> bool:
    if eqn.primitive is not primitives.custom_jvp_call_p:
        return bool(eqn.primitive is primitives.custom_vjp_call_p)
    # Of the function and of its rule: a user may give one of JAX's functions another derivative.
    infos = [
        getattr(value, "debug_info", getattr(getattr(value, "jaxpr", None), "debug_info", None))
        for value in eqn.params.values()
    ]
    return not all(_JAX_FOLDER in str(info.func_src_info) for info in infos if info is not None)


def inner_jaxprs(eqn: Eqn) -> list[Any]:
    """The jaxprs among an equation's parameters, or that these have: of this library's scans those of their steps."""
    values = [q for p in eqn.params.values() for q in (p if isinstance(p, tuple | list) else [p])]
    found = [q if isinstance(q, core.Jaxpr | core.ClosedJaxpr) else getattr(q, "jaxpr", None) for q in values]
    return [getattr(q, "jaxpr", q) for q in found if isinstance(q, core.Jaxpr | core.ClosedJaxpr)]
