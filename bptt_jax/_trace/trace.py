"""A call of `scan`, traced to a flat one.

`jax.lax.scan` itself checks and traces the call, so errors are JAX's, in the user's names, and JAX's cache of traces
serves. The trace has one scan equation, and this library runs it. Carry leaves passed on unchanged by the step have
become operands, by JAX or by `normal`, so these need no checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from bptt_jax._caches import remember, remember_while_alive
from bptt_jax._jaxprs.equations import Env, apply, bind, evaluate, is_in, loop_of, read, read_by, with_parts
from bptt_jax._jaxprs.types import Eqn, Jaxpr, Leaf, Tree, Var
from bptt_jax._options import Options, is_budget
from bptt_jax._trace.along import TIME_FIRST, Along, Layout
from bptt_jax._trace.call import Arrays, FlatStep, ScanCall, Step
from bptt_jax._trace.normal import NormalStep, normal


@dataclasses.dataclass(frozen=True)
class TracedScan:
    """A call with its arrays: operands, first carry and xs; `finish` makes the user's pair of the scan's results."""

    call: ScanCall
    arguments: Arrays
    finish: Callable[[Arrays], Any]


def trace(
    step: Step,
    init: Tree,
    xs: Tree,
    length: Any,
    reverse: bool,
    unroll: int | bool | None,
    options: Options,
    layout: Layout = TIME_FIRST,
) -> TracedScan:
    """Traces a call, as `jax.lax.scan` does.

    Args:
      step, init, xs, length, reverse, unroll: as in `jax.lax.scan`; the arrays may be tracers, and `unroll` None.
      options: the options of the call.
      layout: the place of time in xs, and its wanted place in ys.

    Raises:
      Exception: as `jax.lax.scan`, in its words and the user's names.
      TypeError: for a string in the place of a number.
      ValueError: for a layout that does not fit.
    """
    for name, given in {"length": length, "reverse": reverse, "unroll": unroll}.items():
        if isinstance(given, str):
            meant = f" Did you mean budget={given!r}?" if is_budget(given) else ""
            raise TypeError(f"{name} is not for strings, got {name}={given!r}.{meant}")
    if any(np.ndim(leaf) == 0 for leaf in jax.tree.leaves(xs)):
        lax.scan(step, init, xs, length, reverse, given_unroll(unroll))  # raises, and shows values instead of tracers
    of_xs, results = layout.of_xs(xs), _Results(layout)
    leaves, tree = jax.tree.flatten(xs)

    def run(init: Tree, leaves: Arrays) -> Any:
        return results.flatten(
            lax.scan(step, init, jax.tree.unflatten(tree, leaves), length, reverse, given_unroll(unroll))
        )

    closed = jax.make_jaxpr(run)(init, list(map(_time_first, leaves, of_xs)))
    jaxpr, arguments = closed.jaxpr, jax.tree.leaves((init, xs))
    # Equations before the scan's are evaluated here, and those after it in `finish`.
    (at,) = [i for i, eqn in enumerate(jaxpr.eqns) if eqn.primitive is primitives.scan_p]
    eqn, placed = jaxpr.eqns[at], _Placed(jaxpr, of_xs, results.of_ys, layout.lengths)
    placed.make(eqn, jaxpr.eqns[at + 1 :])
    env = bind(jaxpr.constvars, closed.consts) | bind(jaxpr.invars, arguments)
    evaluate(jaxpr.eqns[:at], env, placed.apply)

    def finish(outs: Arrays) -> Any:
        outs = made.outputs(inputs, outs)
        known = env | {v: out for v, out in zip(eqn.outvars, outs, strict=True) if not isinstance(v, core.DropVar)}
        evaluate(jaxpr.eqns[at + 1 :], known, placed.apply)
        return jax.tree.unflatten(results.tree, placed.results(known))

    made = _normal_step(eqn)
    flat, inputs = made.step, made.inputs([_as_array(read(env, v)) for v in eqn.invars])
    of_x = tuple(placed[v] for v in flat.split(eqn.invars)[2])
    of_y = tuple(placed[v] for v in eqn.outvars[len(made.untouched) :])
    over = flat.split(inputs)[2]
    n = int(over[0].shape[of_x[0].axis] if over else length)
    # As in `jax.lax.scan`, True and 0 unroll the whole loop.
    whole = unroll if isinstance(unroll, bool) else unroll == 0
    together = None if unroll is None else max(n if whole else int(unroll), 1)
    call = ScanCall(flat, n, bool(reverse), together, of_x, of_y, options)
    return TracedScan(*_with_lengths(call, inputs, layout.lengths), finish)


def given_unroll(unroll: int | bool | None) -> int | bool:
    """`unroll` as `jax.lax.scan` takes it."""
    return 1 if unroll is None else unroll


class _Results:
    """The structure of the results of `jax.lax.scan` in a trace, and the wanted place of time in ys."""

    def __init__(self, layout: Layout):
        self._layout = layout
        self.tree: Any = None
        self.of_ys: list[Along] = []

    def flatten(self, results: Any) -> list[Any]:
        if self._layout is not TIME_FIRST:  # results need not be a tuple
            self.of_ys = self._layout.of_ys(results[1])
        leaves, self.tree = jax.tree.flatten(results)
        return leaves


class _Placed:
    """The place of time in the values of a trace, which was made for arrays with time first."""

    def __init__(self, jaxpr: Jaxpr, of_xs: Sequence[Along], of_ys: Sequence[Along], lengths: Leaf):
        self._outvars = jaxpr.outvars
        self._wanted = [*[Along()] * (len(jaxpr.outvars) - len(of_ys)), *of_ys]
        self._lengths = lengths
        self._of = dict(zip(jaxpr.invars[len(jaxpr.invars) - len(of_xs) :], of_xs, strict=True))

    def make(self, eqn: Eqn, later: Sequence[Any]) -> None:
        """Puts time in its wanted place in results of an equation, unless a later equation reads them."""
        made = set(eqn.outvars) - read_by(later)
        self._of |= {v: along for v, along in zip(self._outvars, self._wanted, strict=True) if is_in(v, made)}

    def __getitem__(self, variable: Var) -> Along:
        return Along() if isinstance(variable, core.Literal) else self._of.get(variable, Along())

    def apply(self, eqn: Eqn, values: Sequence[Any]) -> Sequence[Any]:
        """The results of an equation traced for operands with time first."""
        return apply(eqn, [self._first(v, value) for v, value in zip(eqn.invars, values, strict=True)])

    def results(self, env: Env) -> list[Any]:
        """The results of the trace, with time in its wanted place."""
        found = []
        for v, wanted in zip(self._outvars, self._wanted, strict=True):
            value = _as_array(read(env, v))
            found.append(value if self[v] == wanted else wanted.back(self._first(v, value), self._lengths))
        return found

    def _first(self, variable: Var, value: Leaf) -> Any:
        along = self[variable]
        return value if along.is_leading else along.whole(value, self._lengths)


def _time_first(leaf: Leaf, along: Along) -> Any:
    """A leaf of xs, or its type, with time first, as in `jax.lax.scan`."""
    return leaf if along.axis == 0 else jax.eval_shape(lambda leaf: jnp.moveaxis(leaf, along.axis, 0), leaf)


def _with_lengths(call: ScanCall, inputs: Arrays, lengths: Leaf) -> tuple[ScanCall, Arrays]:
    """A call and its inputs, with the lengths of sequences, if any, before the others."""
    if lengths is None:
        return call, inputs
    step = _with_an_operand(call.step, jax.typeof(lengths))
    return dataclasses.replace(call, step=step, lengths=0), [lengths, *inputs]


@remember(256)
def _with_an_operand(step: FlatStep, type_: Any) -> FlatStep:
    """The same step with an unread operand before the others."""
    run = core.jaxpr_as_fun(step.jaxpr)
    closed: Any = jax.make_jaxpr(lambda _, *inputs: run(*inputs))(type_, *step.jaxpr.in_avals)
    return FlatStep(closed, step.n_operands + 1, step.n_carry)


def _as_array(leaf: Leaf) -> Any:
    """Numbers and NumPy's arrays as JAX's; references stay as they are."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic | int | float | complex) else leaf


# Steps by the bodies of their equations; JAX keeps one body for a step and types. Weak, because equations hold the
# values closed over by a step. A flat step does not hold its body, so both can go.
_normal_steps: MutableMapping[Any, NormalStep] = remember_while_alive()


def _normal_step(eqn: Eqn) -> NormalStep:
    """The step of a scan's equation; the same object for the same body."""
    body, n_operands, n_carry = loop_of(eqn)
    if body not in _normal_steps:
        jaxpr = core.ClosedJaxpr(with_parts(body, body.eqns), ())
        _normal_steps[body] = normal(FlatStep(jaxpr, n_operands, n_carry))
    return _normal_steps[body]
