"""A function as two programs, its forward and its backward pass, as JAX differentiates it.

Only the backward pass knows the results with cotangents. Results without one are left out there, as in `jax.lax.scan`,
and are not given cotangents of zeros: these would cost as much as others, and zero times an infinite derivative is NaN.
So the backward pass differentiates the function once more, for the results with cotangents alone. The forward
equations are the same as before and do not run again, because their results are kept.

The callbacks for debugging of the forward pass run there only, unless asked for: in equations evaluated again they are
left out. Those of a derivative rule run in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from bptt_jax._jaxprs.equations import needed, value_of, variables, with_parts
from bptt_jax._jaxprs.quiet import callbacks, quiet
from bptt_jax._jaxprs.types import ClosedJaxpr, Leaf, Var
from bptt_jax._progress.report import SILENT, Pass
from bptt_jax._trace.call import Arrays, Mask, replace, select


class Differentiated:
    """A function with its gradient.

    Args:
      run: the function, from arrays to arrays.
      types: of its arguments.
      wrt: the arguments to differentiate.
      results: the positions of the results with a possible cotangent.
      shows_recomputation: whether callbacks for debugging run in equations evaluated again.
      progress: the first pass; its reports never run again.

    Attributes:
      forward: a jaxpr, from arguments to all results and the kept arrays.
    """

    def __init__(
        self,
        run: Callable[[Arrays], Arrays],
        types: Sequence[Any],
        wrt: Mask,
        results: Sequence[int],
        shows_recomputation: bool = False,
        progress: Pass = SILENT,
    ):
        self._run = run
        self._types = types
        self._wrt = wrt
        self._results = results
        self._shows_recomputation = shows_recomputation
        self._progress = progress
        self._pulls: dict[Mask, Any] = {}  # by the results with a cotangent
        self.forward, self._n_outs = self._trace_forward()

    def _trace_forward(self) -> tuple[Any, int]:
        def forward(*args: Leaf) -> tuple[Arrays, Arrays]:
            outs, pull = self._vjp(args, lambda outs: outs)
            return outs, jax.tree.leaves(pull)

        trace: Any = jax.make_jaxpr(forward, return_shape=True)
        closed, (outs, _) = trace(*self._types)
        jaxpr, n = closed.jaxpr, len(outs)
        # Residuals among the arguments are not kept: the backward pass is given all arguments anyway.
        known = {*jaxpr.invars, *jaxpr.constvars}
        kept = [v for v in variables(jaxpr.outvars[n:]) if v not in known]
        return _part(closed, jaxpr.invars, [*jaxpr.outvars[:n], *kept], jaxpr.eqns), n

    @functools.cached_property
    def _callbacks(self) -> set[Any]:
        return callbacks(self.forward.jaxpr.eqns)

    def _again(self, eqns: Sequence[Any]) -> list[Any]:
        """Equations to evaluate again, with the callbacks that are meant to run."""
        return quiet(eqns, self._progress.names if self._shows_recomputation else self._callbacks)

    @functools.cached_property
    def kept(self) -> Any:
        """The jaxpr from arguments to the kept arrays, for evaluating them again."""
        jaxpr = self.forward.jaxpr
        kept = jaxpr.outvars[self._n_outs :]
        return _part(self.forward, jaxpr.invars, kept, needed(self._again(jaxpr.eqns), kept))

    def pull(self, given: Mask) -> Any:
        """The jaxpr from arguments, kept arrays and cotangents to gradients.

        Args:
          given: the mask of results with a cotangent, over the positions in `results`.
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
        same, n_same = _same_variables(self.forward, closed)
        # A kept variable without a counterpart would be an unused input here, and its value computed again.
        kept = [same.get(v, v) for v in self.forward.jaxpr.outvars[self._n_outs :]]
        again = [*quiet(jaxpr.eqns[:n_same]), *self._again(jaxpr.eqns[n_same:])]
        eqns = needed(again, jaxpr.outvars, [*kept, *jaxpr.invars])
        return _part(closed, [*jaxpr.invars[:n], *kept, *jaxpr.invars[n:]], jaxpr.outvars, eqns)

    def _vjp(self, args: Arrays, choose: Callable[[Arrays], Arrays]) -> Any:
        return jax.vjp(lambda chosen: choose(self._run(replace(args, self._wrt, chosen))), select(args, self._wrt))


def _part(closed: ClosedJaxpr, invars: Sequence[Any], outvars: Sequence[Any], eqns: Sequence[Any]) -> Any:
    """A jaxpr made of some equations of another."""
    return core.ClosedJaxpr(with_parts(closed.jaxpr, eqns, invars, outvars), closed.consts)


def _same_variables(a: Leaf, b: Leaf) -> tuple[dict[Any, Any], int]:
    """The variables of b by those of a, and the number of equations of the same inputs with which both jaxprs begin."""
    same = dict(zip(a.jaxpr.invars, b.jaxpr.invars, strict=False))
    for v, w, left, right in zip(a.jaxpr.constvars, b.jaxpr.constvars, a.consts, b.consts, strict=False):
        if left is right:
            same[v] = w
    n = 0
    for left, right in zip(a.jaxpr.eqns, b.jaxpr.eqns, strict=False):
        if not _is_same(left, right, same):
            break
        same.update(zip(left.outvars, right.outvars, strict=True))
        n += 1
    return same, n


def _is_same(left: Leaf, right: Any, same: dict[Any, Any]) -> bool:
    """Whether two equations, from two traces of one function, are the same."""
    if left.primitive is not right.primitive or len(left.invars) != len(right.invars):
        return False
    of_same = all(_is_same_atom(v, w, same) for v, w in zip(left.invars, right.invars, strict=True))
    makes_same = [v.aval for v in left.outvars] == [w.aval for w in right.outvars]
    return of_same and makes_same and _values(left.params) == _values(right.params)


def _values(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with plain values; not jaxprs and functions, because each trace may have its own."""
    return {name: value for name, value in params.items() if _is_value(value)}


def _is_value(value: Leaf) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_value, value))
    return value is None or isinstance(value, str | int | float)


def _is_same_atom(v: Var, w: Any, same: dict[Any, Any]) -> bool:
    if isinstance(v, core.Literal) and isinstance(w, core.Literal):
        return value_of(v) == value_of(w)
    return not isinstance(v, core.Literal) and same.get(v) is w
