"""A call of a scan made flat: the form in which every stage sees it.

Its step is a jaxpr with all closed-over arrays and tracers as explicit operands. So their gradients are gradients of
ordinary arguments, and lowering a plan, however deep, never calls the user's Python again.
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

from bptt_jax._jaxprs.equations import needed, with_parts
from bptt_jax._jaxprs.inline import inline, is_checkpoint, is_jit
from bptt_jax._jaxprs.quiet import without_callbacks
from bptt_jax._jaxprs.types import ClosedJaxpr, Leaf
from bptt_jax._options import Options
from bptt_jax._progress.display import Direction
from bptt_jax._progress.report import Pass
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
      n_operands, n_carry: the numbers of operands and of leaves of the carry among its inputs.
    """

    jaxpr: Any
    n_operands: int
    n_carry: int

    def split(self, leaves: Sequence[T]) -> tuple[Sequence[T], Sequence[T], Sequence[T]]:
        """The leaves of operands, of the carry and of x."""
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
    def body(self) -> Any:
        """The jaxpr without nested jits, repeated equations, and equations not needed for its results."""
        return _needed(inline(self.jaxpr))

    @functools.cached_property
    def inlined(self) -> Any:
        """`body` without checkpoints too: which results depend on which inputs shows best here."""
        if not any(map(is_checkpoint, self.body.jaxpr.eqns)):
            return self.body
        return _needed(inline(self.body, lambda eqn: is_jit(eqn) or is_checkpoint(eqn)))

    @functools.cached_property
    def seen_through(self) -> FlatStep:
        """The step without the user's own checkpoint around its work, because a plan evaluates steps again anyway.

        Two or more checkpoints after one another stay: while a step is differentiated, they bound its residuals.
        """
        closed = self.body
        while len(own := [eqn for eqn in closed.jaxpr.eqns if is_checkpoint(eqn)]) == 1:
            closed = _needed(inline(closed, functools.partial(_is_jit_or_in, own)))
        return self if closed is self.body else dataclasses.replace(self, jaxpr=closed)

    @functools.cached_property
    def quiet(self) -> FlatStep:
        """The step without callbacks for debugging: for programs that evaluate it again, so each callback runs once."""
        jaxpr = without_callbacks(self.jaxpr)
        return self if jaxpr is self.jaxpr else dataclasses.replace(self, jaxpr=jaxpr)

    def __call__(self, operands: Arrays, carry: Arrays, x: Arrays) -> tuple[Arrays, Arrays]:
        outs = core.jaxpr_as_fun(self.jaxpr)(*operands, *carry, *x)
        # A literal among the results is a Python number.
        outs = [out if isinstance(out, jax.Array) else jnp.asarray(out) for out in outs]
        return outs[: self.n_carry], outs[self.n_carry :]


def _needed(closed: ClosedJaxpr) -> Any:
    # Arrays closed over by a step are no constants: JAX makes them inputs of the scan, or literals of equations.
    return core.ClosedJaxpr(with_parts(closed.jaxpr, needed(closed.jaxpr.eqns, closed.jaxpr.outvars)), closed.consts)


def _is_jit_or_in(eqns: Sequence[Any], eqn: Any) -> bool:
    return is_jit(eqn) or eqn in eqns


def select(leaves: Sequence[T], mask: Sequence[bool]) -> list[T]:
    """The leaves chosen by a mask."""
    return [leaf for leaf, chosen in zip(leaves, mask, strict=True) if chosen]


def replace(leaves: Arrays, mask: Sequence[bool], new: Arrays) -> list[Any]:
    """`leaves` with those chosen by a mask replaced."""
    given = iter(new)
    return [next(given) if chosen else leaf for leaf, chosen in zip(leaves, mask, strict=True)]


def element(leaf: Leaf, axis: int) -> Any:
    """The type of one step of an array over time.

    It is made by slicing where there is a step to slice, because a slice keeps the sharding and the varying axes.
    """
    if leaf.shape[axis]:
        return jax.eval_shape(lambda leaf: lax.index_in_dim(leaf, 0, axis, keepdims=False), leaf)
    return jax.ShapeDtypeStruct(leaf.shape[:axis] + leaf.shape[axis + 1 :], leaf.dtype)


@dataclasses.dataclass(frozen=True)
class ScanCall:
    """A call of `scan` without its arrays; hashable, so it can be a parameter of an equation.

    Attributes:
      step: the step.
      length: the number of steps.
      reverse: whether its steps go through xs from the end.
      unroll: steps per iteration of the innermost loops; None for a number chosen by sizes.
      x_along, y_along: the place of time in each leaf of xs and of ys. Under vmap the batch is the first axis of ys.
      options: the options of the call.
      lengths: the index among the inputs of the sequences' lengths, not read by the step. None without any.
    """

    step: FlatStep
    length: int
    reverse: bool
    unroll: int | None
    x_along: tuple[Along, ...]
    y_along: tuple[Along, ...]
    options: Options
    lengths: int | None = None

    def lengths_of(self, inputs: Arrays) -> Any:
        """The lengths of sequences, None without any."""
        return None if self.lengths is None else inputs[self.lengths]

    @property
    def jaxpr(self) -> Any:
        """The step's jaxpr, for functions looking into equations, such as `inner_jaxprs`."""
        return self.step.jaxpr

    @property
    def quiet(self) -> ScanCall:
        """The call without callbacks for debugging, and without reports of progress."""
        return dataclasses.replace(self.silent, step=self.step.quiet)

    @property
    def silent(self) -> ScanCall:
        """The call without reports of progress."""
        return dataclasses.replace(self, options=dataclasses.replace(self.options, progress=None))

    def reporting(self, direction: Direction) -> Pass:
        """One pass through its steps, which reports where the call has a label."""
        return Pass(self.options.progress, direction, self.length)
