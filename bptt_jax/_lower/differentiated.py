"""A function as two programs, its forward and its backward pass, as JAX differentiates it.

Which results have cotangents is known only where the backward pass is: a result without one is left out there, as
`jax.lax.scan` does it, and not given a cotangent of zeros. An array of zeros costs what a cotangent costs, and zero
times an infinite derivative is no number. So the function is differentiated once more, for those results alone. Its
forward pass is the same equations as before, so it is not run again: what these made is at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from bptt_jax._jaxprs.equations import needed, value_of, variables
from bptt_jax._jaxprs.types import ClosedJaxpr, Leaf, Var
from bptt_jax._trace.call import Arrays, Mask, replace, select


class Differentiated:
    """A function with its gradient.

    Args:
      run: the function, from arrays to arrays.
      types: of its arguments.
      wrt: the arguments whose gradients are asked for.
      results: the positions of the results that may have a cotangent.

    Attributes:
      forward: a jaxpr, from arguments to all results and the arrays that are kept.
    """

    def __init__(self, run: Callable[[Arrays], Arrays], types: Sequence[Any], wrt: Mask, results: Sequence[int]):
        self._run = run
        self._types = types
        self._wrt = wrt
        self._results = results
        self._pulls: dict[Mask, Any] = {}  # by the results that have a cotangent
        self.forward, self._n_outs = self._trace_forward()

    def _trace_forward(self) -> tuple[Any, int]:
        def forward(*args: Leaf) -> tuple[Arrays, Arrays]:
            outs, pull = self._vjp(args, lambda outs: outs)
            return outs, jax.tree.leaves(pull)

        trace: Any = jax.make_jaxpr(forward, return_shape=True)
        closed, (outs, _) = trace(*self._types)
        jaxpr, n = closed.jaxpr, len(outs)
        known = {*jaxpr.invars, *jaxpr.constvars}
        kept = [v for v in variables(jaxpr.outvars[n:]) if v not in known]
        return _part(closed, jaxpr.invars, [*jaxpr.outvars[:n], *kept], jaxpr.eqns), n

    def pull(self, given: Mask) -> Any:
        """A jaxpr, from arguments, the arrays that are kept, and cotangents to gradients.

        Args:
          given: of the results that may have a cotangent, those that have one.
        """
        if given not in self._pulls:
            self._pulls[given] = self._trace_pull(select(self._results, given))
        return self._pulls[given]

    def _trace_pull(self, chosen: Sequence[int]) -> Any:
        def gradient(args: Arrays, cts: Arrays) -> Any:
            _, pull = self._vjp(args, lambda outs: [outs[i] for i in chosen])
            return pull(cts)[0]

        cts = [self.forward.out_avals[i].to_tangent_aval() for i in chosen]
        closed: Any = jax.make_jaxpr(gradient)(self._types, cts)
        jaxpr, n = closed.jaxpr, len(self._types)
        same = _same_variables(self.forward, closed)
        # What were not found again would be computed again.
        kept = [same.get(v, v) for v in self.forward.jaxpr.outvars[self._n_outs :]]
        eqns = needed(jaxpr.eqns, jaxpr.outvars, [*kept, *jaxpr.invars])
        return _part(closed, [*jaxpr.invars[:n], *kept, *jaxpr.invars[n:]], jaxpr.outvars, eqns)

    def _vjp(self, args: Arrays, choose: Callable[[Arrays], Arrays]) -> Any:
        return jax.vjp(lambda chosen: choose(self._run(replace(args, self._wrt, chosen))), select(args, self._wrt))


def _part(closed: ClosedJaxpr, invars: Sequence[Any], outvars: Sequence[Any], eqns: Sequence[Any]) -> Any:
    """A jaxpr of some equations of another."""
    jaxpr = core.Jaxpr(
        constvars=closed.jaxpr.constvars,
        invars=invars,
        outvars=outvars,
        eqns=eqns,
        effects=frozenset().union(*(eqn.effects for eqn in eqns)),
        debug_info=core.DebugInfo("bptt_jax", closed.jaxpr.debug_info.func_src_info, None, None),
    )
    return core.ClosedJaxpr(jaxpr, closed.consts)


def _same_variables(a: Leaf, b: Leaf) -> dict[Any, Any]:
    """From variables of a jaxpr to another's, as far as both begin with the same equations of the same inputs."""
    same = dict(zip(a.jaxpr.invars, b.jaxpr.invars, strict=False))
    for v, w, left, right in zip(a.jaxpr.constvars, b.jaxpr.constvars, a.consts, b.consts, strict=False):
        if left is right:
            same[v] = w
    for left, right in zip(a.jaxpr.eqns, b.jaxpr.eqns, strict=False):
        if not _is_same(left, right, same):
            break
        same.update(zip(left.outvars, right.outvars, strict=True))
    return same


def _is_same(left: Leaf, right: Any, same: dict[Any, Any]) -> bool:
    """Whether two equations are one, in two traces of the same function."""
    if left.primitive is not right.primitive or len(left.invars) != len(right.invars):
        return False
    of_same = all(_is_same_atom(v, w, same) for v, w in zip(left.invars, right.invars, strict=True))
    makes_same = [v.aval for v in left.outvars] == [w.aval for w in right.outvars]
    return of_same and makes_same and _values(left.params) == _values(right.params)


def _values(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters that are plain values: of jaxprs and functions each trace may have its own."""
    return {name: value for name, value in params.items() if _is_value(value)}


def _is_value(value: Leaf) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_value, value))
    return value is None or isinstance(value, str | int | float)


def _is_same_atom(v: Var, w: Any, same: dict[Any, Any]) -> bool:
    if isinstance(v, core.Literal) and isinstance(w, core.Literal):
        return value_of(v) == value_of(w)
    return not isinstance(v, core.Literal) and same.get(v) is w
