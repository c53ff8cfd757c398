"""A call of a scan, traced once and made flat: the form in which every later stage sees it.

`jax.lax.scan` itself checks and traces the call, so its errors are JAX's, in the user's names, and its cache of traces
serves. The one equation that this leaves is then run by this library: its step is a jaxpr with all that it closes over
as explicit operands, so gradients of closed-over arrays and tracers are those of ordinary arguments, and lowering a
plan, however deep, never calls the user's Python again. JAX has also made operands of carry leaves that the step
passes on unchanged: they need no checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from bptt_jax._lower.jaxprs import (
    bind,
    evaluate,
    inline,
    inner_jaxprs,
    is_debug,
    needed,
    read,
)
from bptt_jax._options import Options

T = TypeVar("T")
Arrays = Sequence[Any]
Step = Callable[[Any, Any], tuple[Any, Any]]
Mask = tuple[bool, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class FlatStep:
    """(operands, carry, x) -> (carry, y) on lists of arrays; equal only to itself, so it can key a cache.

    Attributes:
      jaxpr: closed over nothing; its inputs are operands, carry and x, its outputs carry and y.
      n_operands, n_carry: how its inputs divide.
    """

    jaxpr: Any
    n_operands: int
    n_carry: int

    def split(self, leaves: Sequence[T]) -> tuple[Sequence[T], Sequence[T], Sequence[T]]:
        """What belongs to operands, carry and x."""
        end = self.n_operands + self.n_carry
        return leaves[: self.n_operands], leaves[self.n_operands : end], leaves[end:]

    @property
    def x(self) -> Arrays:
        """Types of the leaves of x."""
        return self.split(self.jaxpr.in_avals)[2]

    @property
    def y(self) -> Arrays:
        """Types of the leaves of y."""
        found: Arrays = self.jaxpr.out_avals[self.n_carry :]
        return found

    @functools.cached_property
    def inlined(self) -> Any:
        """The jaxpr without nested jits, repeated equations, and equations that the results do not need."""
        closed = inline(self.jaxpr)
        jaxpr = closed.jaxpr
        # Constants become equations' literals or inputs of the caller's: JAX hoists the arrays that a step closes over.
        eqns = needed(jaxpr.eqns, jaxpr.outvars)
        return core.ClosedJaxpr(with_eqns(jaxpr, eqns), closed.consts)

    @functools.cached_property
    def quiet(self) -> FlatStep:
        """The step without callbacks for debugging, for programs that evaluate it beside the one that is seen."""
        jaxpr = self.jaxpr.jaxpr
        eqns = [eqn for eqn in jaxpr.eqns if eqn.outvars or not any(map(is_debug, eqn.effects))]
        if len(eqns) == len(jaxpr.eqns):
            return self
        return dataclasses.replace(self, jaxpr=core.ClosedJaxpr(with_eqns(jaxpr, eqns), self.jaxpr.consts))

    def __call__(self, operands: Arrays, carry: Arrays, x: Arrays) -> tuple[Arrays, Arrays]:
        outs = core.jaxpr_as_fun(self.jaxpr)(*operands, *carry, *x)
        # A literal among the results is a Python number.
        outs = [out if isinstance(out, jax.Array) else jnp.asarray(out) for out in outs]
        return outs[: self.n_carry], outs[self.n_carry :]


def with_eqns(jaxpr: Any, eqns: Sequence[Any]) -> Any:
    """The same jaxpr with other equations."""
    return core.Jaxpr(
        constvars=jaxpr.constvars,
        invars=jaxpr.invars,
        outvars=jaxpr.outvars,
        eqns=eqns,
        effects=jaxpr.effects,
        debug_info=core.DebugInfo("bptt_jax", jaxpr.debug_info.func_src_info, None, None),
    )


def select(leaves: Sequence[T], mask: Sequence[bool]) -> list[T]:
    """The leaves of a mask."""
    return [leaf for leaf, chosen in zip(leaves, mask, strict=True) if chosen]


def replace(leaves: Arrays, mask: Sequence[bool], new: Arrays) -> list[Any]:
    """`leaves`, those of a mask replaced."""
    given = iter(new)
    return [next(given) if chosen else leaf for leaf, chosen in zip(leaves, mask, strict=True)]


def element(leaf: Any, axis: int) -> Any:
    """The type of one step of an array over time.

    By slicing where there is something to slice: sharding, and the axes that values vary over, come along.
    """
    if leaf.shape[axis]:
        return jax.eval_shape(lambda leaf: lax.index_in_dim(leaf, 0, axis, keepdims=False), leaf)
    return jax.ShapeDtypeStruct(leaf.shape[:axis] + leaf.shape[axis + 1 :], leaf.dtype)


@dataclasses.dataclass(frozen=True)
class ScanCall:
    """A call of `scan` without its arrays; hashable, so that it can be the parameter of an equation.

    Attributes:
      step: the step.
      length: the number of steps.
      reverse: whether it goes through xs from the end.
      unroll: steps per iteration of the innermost loops.
      x_axes, y_axes: the axis of time of each leaf of xs and of ys.
      options: what was asked.
    """

    step: FlatStep
    length: int
    reverse: bool
    unroll: int
    x_axes: tuple[int, ...]
    y_axes: tuple[int, ...]
    options: Options

    @property
    def jaxpr(self) -> Any:
        """The step's, for who looks into equations."""
        return self.step.jaxpr

    @property
    def quiet(self) -> ScanCall:
        """The call without callbacks for debugging."""
        return dataclasses.replace(self, step=self.step.quiet)


@dataclasses.dataclass(frozen=True)
class TracedScan:
    """A call with its arrays: operands, first carry and xs; `finish` makes the user's pair of the scan's results."""

    call: ScanCall
    arguments: Arrays
    finish: Callable[[Arrays], Any]


def trace(
    step: Step, init: Any, xs: Any, length: Any, reverse: bool, unroll: int | bool, options: Options
) -> TracedScan:
    """Traces a call, as `jax.lax.scan` does.

    Args:
      step, init, xs, length, reverse, unroll: as in `jax.lax.scan`; the arrays may be tracers.
      options: of the call.

    Raises:
      what `jax.lax.scan` raises, in its words and the user's names.
    """
    if any(np.ndim(leaf) == 0 for leaf in jax.tree.leaves(xs)):
        lax.scan(step, init, xs, length, reverse, unroll)  # raises, with the values and not the tracers of them
    trees: list[Any] = []

    def run(init: Any, xs: Any) -> Any:
        leaves, tree = jax.tree.flatten(lax.scan(step, init, xs, length, reverse, unroll))
        trees.append(tree)
        return leaves

    closed = jax.make_jaxpr(run)(init, xs)
    jaxpr, arguments = closed.jaxpr, jax.tree.leaves((init, xs))
    (at,) = [i for i, eqn in enumerate(jaxpr.eqns) if eqn.primitive is primitives.scan_p]
    eqn = jaxpr.eqns[at]
    env = bind(jaxpr.constvars, closed.consts) | bind(jaxpr.invars, arguments)
    evaluate(jaxpr.eqns[:at], env)

    def finish(outs: Arrays) -> Any:
        known = env | {v: out for v, out in zip(eqn.outvars, outs, strict=True) if not isinstance(v, core.DropVar)}
        evaluate(jaxpr.eqns[at + 1 :], known)
        return jax.tree.unflatten(trees[0], [_as_array(read(known, v)) for v in jaxpr.outvars])

    flat, inputs = _flat_step(eqn), [_as_array(read(env, v)) for v in eqn.invars]
    over = flat.split(inputs)[2]
    n = int(over[0].shape[0] if over else length)
    whole = unroll if isinstance(unroll, bool) else unroll == 0
    call = ScanCall(
        step=flat,
        length=n,
        reverse=bool(reverse),
        unroll=max(n if whole else int(unroll), 1),
        x_axes=(0,) * len(flat.x),
        y_axes=(0,) * len(flat.y),
        options=options,
    )
    return TracedScan(call, inputs, finish)


def _as_array(leaf: Any) -> Any:
    """Numbers and NumPy's arrays as JAX's; references stay as they are."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic | int | float | complex) else leaf


# From the body of an equation, which JAX keeps one of for a step and types, to the flat form. Weak, because the
# equations hold what the step closes over, which the value does not.
_flat_steps: weakref.WeakKeyDictionary[Any, FlatStep] = weakref.WeakKeyDictionary()


def _flat_step(eqn: Any) -> FlatStep:
    """The step of a scan's equation; the same object for the same body.

    The equation's own parameters are private to JAX. Inputs and outputs over time are those with an axis more than in
    the body.
    """
    (body,) = inner_jaxprs(eqn)
    if body not in _flat_steps:
        n_x = sum(outer.aval.ndim > inner.aval.ndim for outer, inner in zip(eqn.invars, body.invars, strict=True))
        n_carry = sum(
            outer.aval.ndim == inner.aval.ndim for outer, inner in zip(eqn.outvars, body.outvars, strict=True)
        )
        jaxpr = core.ClosedJaxpr(with_eqns(body, body.eqns), ())
        _flat_steps[body] = FlatStep(jaxpr, len(body.invars) - n_carry - n_x, n_carry)
    return _flat_steps[body]
