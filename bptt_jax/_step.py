"""A user's step, traced once and made flat: the form in which every later stage sees it.

The step is traced to a jaxpr with all that it closes over as explicit operands, so that gradients for closed-over
arrays and tracers come from ordinary arguments, and so that lowering a plan, however deep, never calls the user's
Python again. Carry leaves that the step passes on unchanged become operands too: they need no checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

Arrays = Sequence[Any]
Step = Callable[[Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class FlatStep:
    """(operands, carry, x) -> (carry, y) on lists of arrays; equal only to itself, so it can key a cache.

    Attributes:
      jaxpr: closed over nothing; its inputs are operands, carry and x, its outputs carry and y.
      moving: for each leaf of the user's carry whether the step computes it; the others are operands.
    """

    jaxpr: Any
    moving: tuple[bool, ...]

    def __call__(self, operands: Arrays, carry: Arrays, x: Arrays) -> tuple[Arrays, Arrays]:
        outs = core.jaxpr_as_fun(self.jaxpr)(*operands, *carry, *x)
        return outs[: sum(self.moving)], outs[sum(self.moving) :]


@dataclasses.dataclass(frozen=True)
class TracedScan:
    """A call of `scan`, flat: `operands`, `carry` and `xs` belong to `step`; `unflatten` rebuilds the user's pair."""

    step: FlatStep
    length: int
    operands: Arrays
    carry: Arrays
    xs: Arrays
    unflatten: Callable[[Arrays, Arrays], tuple[Any, Any]]


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
    # lax.scan itself judges the call: its errors name the user's pytrees, and its result has the carry's final type,
    # which for a weakly typed init is not the type that came in. Without params the user's own function goes in, so
    # that JAX's trace cache knows it.
    body = functools.partial(step, *params) if params else step
    final_carry, _ = jax.eval_shape(lambda: lax.scan(body, init, xs, length, **scan_options))
    xs = jax.tree.map(jnp.asarray, xs)
    n = _length(xs, length)
    init = jax.tree.map(_with_type_of, init, final_carry)
    jaxpr, out = jax.make_jaxpr(step, return_shape=True)(*params, init, _element(xs, n))
    carry, out_tree = jax.tree.leaves(init), jax.tree.structure(out)
    flat = flat_step(jaxpr, n_carry=len(carry), n_x=len(jax.tree.leaves(xs)))
    still = [leaf for leaf, moves in zip(carry, flat.moving, strict=True) if not moves]

    def unflatten(moved: Arrays, ys: Arrays) -> tuple[Any, Any]:
        movers, stayers = iter(moved), iter(still)
        leaves = [next(movers if moves else stayers) for moves in flat.moving]
        rebuilt: tuple[Any, Any] = jax.tree.unflatten(out_tree, [*leaves, *ys])
        return rebuilt[0], rebuilt[1]

    return TracedScan(
        step=flat,
        length=n,
        operands=list(map(jnp.asarray, [*jaxpr.consts, *jax.tree.leaves(params), *still])),
        carry=[leaf for leaf, moves in zip(carry, flat.moving, strict=True) if moves],
        xs=jax.tree.leaves(xs),
        unflatten=unflatten,
    )


def _length(xs: Any, length: Any) -> int:
    """The number of steps of a scan that `jax.lax.scan` accepts."""
    leaves = jax.tree.leaves(xs)
    return int(leaves[0].shape[0] if leaves else length)


def _with_type_of(leaf: Any, aval: Any) -> Any:
    """`leaf` with the type that the carry has in the loop; they differ only where `leaf` is weakly typed."""
    leaf = jnp.asarray(leaf)
    weak = getattr(leaf, "weak_type", False)  # PRNG keys have no such thing
    return lax.convert_element_type(leaf, aval.dtype) if weak and not aval.weak_type else leaf


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
    opened = core.Jaxpr(
        constvars=(),
        invars=[*jaxpr.constvars, *params, *still, *movers, *x],
        outvars=outs,
        eqns=jaxpr.eqns,
        effects=jaxpr.effects,
        debug_info=core.DebugInfo("bptt_jax", jaxpr.debug_info.func_src_info, None, None),
    )
    return FlatStep(core.ClosedJaxpr(opened, ()), moving)
