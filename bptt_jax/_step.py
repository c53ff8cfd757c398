"""A user's step, traced once and made flat: the form in which every later stage sees it.

The step is traced to a jaxpr with all that it closes over as explicit operands, so that gradients for closed-over
arrays and tracers come from ordinary arguments, and so that lowering a plan, however deep, never calls the user's
Python again. Carry leaves that the step passes on unchanged become operands too: they need no checkpoint. Equations
that the results do not need are left out, and operands that no equation reads, so that a budget does not pay for their
gradients; what the step hands to a nested jit, loop or checkpoint counts as read.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from bptt_jax._lower.jaxprs import needed, read_by

Arrays = Sequence[Any]
Step = Callable[[Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class FlatStep:
    """(operands, carry, x) -> (carry, y) on lists of arrays; equal only to itself, so it can key a cache.

    Attributes:
      jaxpr: closed over nothing; its inputs are operands, carry and x, its outputs carry and y.
      moving: for each leaf of the user's carry whether the step computes it; the others are operands.
      n_x: how many of the jaxpr's inputs are x.
      read: for each constant, each leaf of params and each carry leaf that does not move, whether it is an operand:
        what no equation reads is none.
    """

    jaxpr: Any
    moving: tuple[bool, ...]
    n_x: int
    read: tuple[bool, ...]

    @property
    def n_operands(self) -> int:
        return len(self.jaxpr.jaxpr.invars) - self.n_carry - self.n_x

    @property
    def n_carry(self) -> int:
        return sum(self.moving)

    @property
    def x(self) -> Arrays:
        """Types of the leaves of x."""
        found: Arrays = self.jaxpr.in_avals[self.n_operands + self.n_carry :]
        return found

    @property
    def y(self) -> Arrays:
        """Types of the leaves of y."""
        found: Arrays = self.jaxpr.out_avals[self.n_carry :]
        return found

    def __call__(self, operands: Arrays, carry: Arrays, x: Arrays) -> tuple[Arrays, Arrays]:
        outs = core.jaxpr_as_fun(self.jaxpr)(*operands, *carry, *x)
        # A literal among the results is a Python number.
        outs = [out if isinstance(out, jax.Array) else jnp.asarray(out) for out in outs]
        return outs[: self.n_carry], outs[self.n_carry :]


@dataclasses.dataclass(frozen=True)
class TracedScan:
    """A call of `scan`, flat: `operands`, `carry` and `xs` belong to `step`; `unflatten` rebuilds the user's pair."""

    step: FlatStep
    length: int
    operands: Arrays
    carry: Arrays
    xs: Arrays
    unflatten: Callable[[Arrays, Arrays], Any]


def trace(step: Step, params: tuple[Any, ...], init: Any, xs: Any, length: Any, **scan_options: Any) -> TracedScan:
    """Checks a call as `jax.lax.scan` does, and traces its step.

    Args:
      step: called as step(*params, carry, x).
      params: what to pass before the carry; () or (params,).
      init, xs, length: as in `jax.lax.scan`; the arrays may be tracers.
      **scan_options: `reverse` and `unroll`, for the checks.

    Raises:
      what `jax.lax.scan` raises, in its words and the user's names.
    """
    # lax.scan itself judges the call: its errors name the user's pytrees. Without params the user's own function goes
    # in, so that JAX's trace cache knows it.
    body = functools.partial(step, *params) if params else step
    jax.eval_shape(lambda: lax.scan(body, init, xs, length, **scan_options))
    xs = jax.tree.map(jnp.asarray, xs)
    n = _length(xs, length)
    x = _element(xs, n)
    init = _promote(body, jax.tree.map(jnp.asarray, init), x)
    jaxpr, out = jax.make_jaxpr(step, return_shape=True)(*params, init, x)
    carry, out_tree = jax.tree.leaves(init), jax.tree.structure(out)
    flat = flat_step(jaxpr, n_carry=len(carry), n_x=len(jax.tree.leaves(xs)))
    still = [leaf for leaf, moves in zip(carry, flat.moving, strict=True) if not moves]
    given = [*jaxpr.consts, *jax.tree.leaves(params), *still]

    def unflatten(moved: Arrays, ys: Arrays) -> Any:
        movers, stayers = iter(moved), iter(still)
        leaves = [next(movers if moves else stayers) for moves in flat.moving]
        return jax.tree.unflatten(out_tree, [*leaves, *ys])

    return TracedScan(
        step=flat,
        length=n,
        operands=[jnp.asarray(leaf) for leaf in itertools.compress(given, flat.read)],
        carry=[leaf for leaf, moves in zip(carry, flat.moving, strict=True) if moves],
        xs=jax.tree.leaves(xs),
        unflatten=unflatten,
    )


def _length(xs: Any, length: Any) -> int:
    """The number of steps of a scan that `jax.lax.scan` accepts."""
    leaves = jax.tree.leaves(xs)
    return int(leaves[0].shape[0] if leaves else length)


def _promote(body: Step, init: Any, x: Any) -> Any:
    """`init` with the types that the carry has in the loop, by the rule of `jax.lax.scan`.

    A weakly typed leaf that the step returns as another dtype becomes strongly typed, of the dtype of both.
    """
    if not any(map(_is_weak, jax.tree.leaves(init))):
        return init
    leaves, tree = jax.tree.flatten(init)
    first = jax.tree.leaves(jax.eval_shape(body, init, x))[: len(leaves)]
    promoted = [
        lax.convert_element_type(leaf, jnp.result_type(leaf, new))
        if _is_weak(leaf) and leaf.dtype != new.dtype
        else leaf
        for leaf, new in zip(leaves, first, strict=True)
    ]
    return jax.tree.unflatten(tree, promoted)


def _is_weak(leaf: Any) -> bool:
    return getattr(leaf, "weak_type", False)  # PRNG keys have no such thing


def _element(xs: Any, n: int) -> Any:
    """The type of one x. By slicing and not from the shapes, so that sharding and varying axes come along."""
    if n == 0:  # nothing to slice, and nothing will be run
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), xs)
    return jax.eval_shape(lambda xs: jax.tree.map(lambda leaf: leaf[0], xs), xs)


# From the jaxpr that make_jaxpr returns, which JAX keeps one of per step and types, to the flat form. Weak, because
# the key holds what the step closes over, which the value does not.
_flat_steps: weakref.WeakKeyDictionary[Any, dict[tuple[int, int], FlatStep]] = weakref.WeakKeyDictionary()


def flat_step(closed: Any, n_carry: int, n_x: int) -> FlatStep:
    """The flat form of a step's jaxpr; the same object for the same jaxpr."""
    known = _flat_steps.setdefault(closed.jaxpr, {})
    if (n_carry, n_x) not in known:
        known[n_carry, n_x] = _make_flat_step(closed.jaxpr, n_carry, n_x)
    return known[n_carry, n_x]


def _make_flat_step(jaxpr: Any, n_carry: int, n_x: int) -> FlatStep:
    at = len(jaxpr.invars) - n_carry - n_x
    params, carry, x = jaxpr.invars[:at], jaxpr.invars[at : at + n_carry], jaxpr.invars[at + n_carry :]
    moving = tuple(new is not old for new, old in zip(jaxpr.outvars[:n_carry], carry, strict=True))
    still = [old for old, moves in zip(carry, moving, strict=True) if not moves]
    movers = [old for old, moves in zip(carry, moving, strict=True) if moves]
    outs = [new for new, moves in zip(jaxpr.outvars, (*moving, *[True] * len(jaxpr.outvars)), strict=False) if moves]
    eqns = needed(jaxpr.eqns, outs)
    wanted = read_by(eqns, outs)
    operands = [*jaxpr.constvars, *params, *still]
    opened = core.Jaxpr(
        constvars=(),
        invars=[*(v for v in operands if v in wanted), *movers, *x],
        outvars=outs,
        eqns=eqns,
        effects=jaxpr.effects,
        debug_info=core.DebugInfo("bptt_jax", jaxpr.debug_info.func_src_info, None, None),
    )
    return FlatStep(core.ClosedJaxpr(opened, ()), moving, n_x, tuple(v in wanted for v in operands))
