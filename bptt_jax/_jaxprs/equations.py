"""Reading and evaluating jaxprs, with public API only: equations are evaluated one by one, and not rebuilt here.

A traced step is a list of equations, and a block (`_step/split.py`, `_lower/block.py`) runs each where it is cheapest.
For this, lists of equations are evaluated in an environment here, and equations classified.
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
from bptt_jax._jaxprs.types import Atom, Effect, Eqn, Jaxpr

Env = dict[Any, Any]

_JAX_FOLDER = os.path.dirname(jax.__file__) + os.sep

# Primitives defined by JAX: vmap leaves their arithmetic as it is. Others may change under it (callbacks, foreign
# functions).
_BATCHABLE = {p.name for p in vars(primitives).values() if isinstance(p, core.Primitive)} | {"split"}
PRODUCTS = {primitives.dot_general_p, primitives.conv_general_dilated_p}
# These move values only: gradients are moved back at each block, so the moved values need no sums of their own.
MOVES = frozenset({
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "reshape", "slice", "split", "squeeze",
    "transpose",
})  # fmt: skip
# Elementwise, without transcendental functions: evaluating it again, fused with its reader, is faster than reading it
# back from memory.
CHEAP = frozenset({
    "abs", "add", "add_any", "and", "broadcast_in_dim", "convert_element_type", "copy", "eq", "ge", "gt", "integer_pow",
    "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "reshape", "select_n", "sign", "slice", "split",
    "square", "squeeze", "stop_gradient", "sub", "xor",
})  # fmt: skip
# Elementwise, with many instructions. On CPU, XLA makes vector code of them unless they are fused with some reads.
TRANSCENDENTAL = frozenset({
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cos", "cosh", "digamma", "erf", "erf_inv",
    "erfc", "exp", "exp2", "expm1", "lgamma", "log", "log1p", "logistic", "pow", "sin", "sinh", "tan", "tanh",
})  # fmt: skip
# Their derivatives are zero in JAX.
NO_GRADIENT = frozenset(["stop_gradient", "floor", "ceil", "round", "sign", "nextafter"])
# With keys of the "rbg" kind, these draw other bits under vmap than in a loop.
_RANDOM = ("random", "rng", "threefry")


def value_of(literal: Any) -> tuple[str, str, bytes]:
    """A literal's type and its bits, because two different numbers may print alike."""
    value = np.asarray(literal.val)
    return str(literal.aval), value.dtype.str, value.tobytes()


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
    """A jaxpr of just this equation, and the mask of results it returns (all but the dropped ones)."""
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
    """The equations with effects, and those needed for `outputs` from the `given` variables."""
    known = set(given)
    wanted = set(variables(outputs)) - known
    kept = []
    for eqn in reversed(eqns):
        if has_effects(eqn) or any(v in wanted for v in eqn.outvars):
            kept.append(eqn)
            wanted.update(v for v in variables(eqn.invars) if v not in known)
    return kept[::-1]


def read_by(eqns: Iterable[Any], outputs: Iterable[Any] = ()) -> set[Any]:
    """The variables read by equations or listed in `outputs`."""
    return {*variables(outputs), *(v for eqn in eqns for v in variables(eqn.invars))}


def reachable(eqns: Iterable[Any], inputs: Iterable[Any]) -> set[Any]:
    """The inputs, and all variables depending on them."""
    found = set(inputs)
    for eqn in eqns:
        if any(v in found for v in variables(eqn.invars)):
            found.update(eqn.outvars)
    return found


def is_in(atom: Atom, found: Container[Any]) -> bool:
    """Whether an atom is one of some variables."""
    return not isinstance(atom, core.Literal) and atom in found


def with_gradient(eqns: Iterable[Any], inputs: Iterable[Any]) -> frozenset[Any]:
    """The differentiable variables, among the inputs and the results of equations, with a gradient back to the inputs.

    A matrix made by the step itself has none, nor has the result of a stop_gradient.
    """
    found = {v for v in inputs if is_float(v)}
    for eqn in eqns:
        if eqn.primitive.name not in NO_GRADIENT and any(v in found for v in variables(eqn.invars)):
            found.update(v for v in eqn.outvars if is_float(v))
    return frozenset(found)


def is_debug(effect: Effect) -> bool:
    """Whether an effect is one of `jax.debug`; JAX exports no name for them."""
    return type(effect).__name__ in ("DebugEffect", "OrderedDebugEffect")


def is_reference(effect: Effect) -> bool:
    """Whether an effect is the use of a reference (`jax.new_ref`); JAX exports no name for these."""
    return type(effect).__name__ in ("ReadEffect", "WriteEffect", "AccumEffect", "InternalMutableArrayEffect")


def is_named_axis(effect: Effect) -> bool:
    """Whether an effect is the use of a named axis; the transformation mapping over the axis handles it."""
    return type(effect).__name__ == "NamedAxisEffect"


def may_run_again(jaxpr: Jaxpr) -> bool:
    """Whether a step may be evaluated again: its effects are callbacks for debugging, and uses of named axes, only."""
    return all(is_debug(effect) or is_named_axis(effect) for effect in jaxpr.effects)


def has_effects(eqn: Eqn) -> bool:
    """Whether an equation does more than compute its results; naming an axis does not count."""
    return not all(map(is_named_axis, eqn.effects))


def has_inner_jaxpr(eqn: Eqn) -> bool:
    """Whether an equation is a call, a loop or a branch."""
    return bool(inner_jaxprs(eqn))


def is_random(eqn: Eqn) -> bool:
    """Whether an equation draws random bits, or makes keys."""
    return str(eqn.primitive.name).startswith(_RANDOM)


def is_arithmetic(eqn: Eqn) -> bool:
    """Whether an equation is plain arithmetic of JAX: of two that are alike one is enough, and vmap may take it.

    Branches do not qualify: under vmap both are evaluated, and a NaN in the one not taken reaches the gradient. Other
    primitives than JAX's may print alike and differ.
    """
    is_plain = eqn.primitive.name in _BATCHABLE and not has_inner_jaxpr(eqn)
    return is_plain and not has_effects(eqn) and not is_random(eqn)


def has_own_gradient(jaxpr: Jaxpr) -> bool:
    """Whether a function with a derivative rule of the user's own occurs in a jaxpr, at any depth.

    A rule need not be the derivative of its function; then higher derivatives depend on when it was applied. JAX's own
    `custom_jvp` rules (for example, of `jax.nn.relu`) are derivatives; the folder of their source tells them apart.
    """
    return any(is_own_rule(eqn) or any(map(has_own_gradient, inner_jaxprs(eqn))) for eqn in jaxpr.eqns)


def is_own_rule(eqn: Eqn) -> bool:
    """Whether an equation is a function with a derivative rule of the user's own."""
    if eqn.primitive is not primitives.custom_jvp_call_p:
        return bool(eqn.primitive is primitives.custom_vjp_call_p)
    # Both the function and its rule are looked up, because a user may give a function of JAX another derivative.
    infos = [
        getattr(value, "debug_info", getattr(getattr(value, "jaxpr", None), "debug_info", None))
        for value in eqn.params.values()
    ]
    return not all(_JAX_FOLDER in str(info.func_src_info) for info in infos if info is not None)


def with_parts(
    jaxpr: Jaxpr,
    eqns: Sequence[Any],
    invars: Sequence[Any] | None = None,
    outvars: Sequence[Any] | None = None,
) -> Any:
    """A jaxpr with other equations, and perhaps other inputs and results."""
    made = {effect for eqn in eqns for effect in eqn.effects}
    return core.Jaxpr(
        constvars=jaxpr.constvars,
        invars=jaxpr.invars if invars is None else invars,
        outvars=jaxpr.outvars if outvars is None else outvars,
        eqns=eqns,
        # Effects on references are named by inputs, in a jaxpr by its own.
        effects={e for e in jaxpr.effects if e in made or not (is_debug(e) or is_named_axis(e))},
        debug_info=core.DebugInfo("bptt_jax", jaxpr.debug_info.func_src_info, None, None),
    )


def loop_of(eqn: Eqn) -> tuple[Any, int, int]:
    """(body, number of operands, number of leaves of the carry) of the equation of a `jax.lax.scan`.

    Its parameters are private to JAX, so inputs and outputs over time are recognised by their axes: one more than in
    the body.
    """
    (body,) = inner_jaxprs(eqn)
    n_x = sum(outer.aval.ndim > inner.aval.ndim for outer, inner in zip(eqn.invars, body.invars, strict=True))
    n_carry = sum(outer.aval.ndim == inner.aval.ndim for outer, inner in zip(eqn.outvars, body.outvars, strict=True))
    return body, len(body.invars) - n_carry - n_x, n_carry


def inner_jaxprs(eqn: Eqn) -> list[Any]:
    """The jaxprs among an equation's parameters, or held by these, as by the call of this library's scans."""
    values = [q for p in eqn.params.values() for q in (p if isinstance(p, tuple | list) else [p])]
    found = [q if isinstance(q, core.Jaxpr | core.ClosedJaxpr) else getattr(q, "jaxpr", None) for q in values]
    return [getattr(q, "jaxpr", q) for q in found if isinstance(q, core.Jaxpr | core.ClosedJaxpr)]
