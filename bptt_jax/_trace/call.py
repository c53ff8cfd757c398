"""A call of a scan made flat: the form in which every stage sees it.

Its step is a jaxpr with all that it closes over as explicit operands, so gradients of closed-over arrays and tracers
are those of ordinary arguments, and lowering a plan, however deep, never calls the user's Python again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from bptt_jax._jaxprs.equations import inline, is_debug, needed
from bptt_jax._jaxprs.types import Jaxpr, Leaf
from bptt_jax._options import Options
from bptt_jax._trace.along import Along

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


def with_eqns(jaxpr: Jaxpr, eqns: Sequence[Any]) -> Any:
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


def element(leaf: Leaf, axis: int) -> Any:
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
      x_along, y_along: where time is in each leaf of xs and of ys. Under vmap the batch is the first axis of ys.
      options: what was asked.
      lengths: which of the inputs are the lengths of sequences; the step does not read it. None without any.
    """

    step: FlatStep
    length: int
    reverse: bool
    unroll: int
    x_along: tuple[Along, ...]
    y_along: tuple[Along, ...]
    options: Options
    lengths: int | None = None

    def lengths_of(self, inputs: Arrays) -> Any:
        """The lengths of sequences, None without any."""
        return None if self.lengths is None else inputs[self.lengths]

    @property
    def jaxpr(self) -> Any:
        """The step's, for who looks into equations."""
        return self.step.jaxpr

    @property
    def quiet(self) -> ScanCall:
        """The call without callbacks for debugging."""
        return dataclasses.replace(self, step=self.step.quiet)
