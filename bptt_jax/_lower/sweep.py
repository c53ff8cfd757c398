"""The sweep: one `custom_vjp` around the scan, whose backward walks the plan's tree with loops of static length.

    forward    run through the plan once, keeping the carries (and residuals) that it names
    backward   take the nodes from the last to the first; for a `Remat`, run forward again from its carry, keeping what
               its child names, then go back through the child

There is one xs, one ys and one dxs; blocks read and write at an index, so no level of the tree holds copies. Gradients
of the constants are one running sum, of each device where that can be (`partial_sums`). Steps that are only advanced
are never linearised, and the last child of what is recomputed is not advanced, since nobody asks for the carry behind
it.

The first pass of a call that is not differentiated runs the same program as that of one that is, so that vmap finds
the same batch axes in both. What is saved has the same structure whichever inputs are differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bptt_jax._lower.block import Block
from bptt_jax._lower.block_sizes import block_sizes
from bptt_jax._lower.jaxprs import has_own_gradient, is_float, varies, varying_axes, zeros_like
from bptt_jax._lower.nested import Run
from bptt_jax._lower.partial_sums import summed, unreduced
from bptt_jax._lower.split import split
from bptt_jax._lower.step_vjp import floats, step_vjp
from bptt_jax._lower.style import FASTEST, Style
from bptt_jax._lower.tie import independent_outputs, tie
from bptt_jax._lower.walk import Backward, Forward
from bptt_jax._plan import Plan, in_blocks, length
from bptt_jax._step import Arrays, FlatStep

_EFFECTS = ("DebugEffect", "OrderedDebugEffect")  # of jax.debug; JAX exports no name for them


def lower(plan: Plan, step: FlatStep, *, style: Style = FASTEST, reverse: bool = False, unroll: int | bool = 1) -> Run:
    """A function (operands, carry, xs) -> (carry, ys) that runs `plan`; see `nested.lower` and `Style`."""
    block = Block(step, style, reverse, unroll)
    rule = _Rule(in_blocks(plan, block_sizes(step, style).most_steps), block, reverse)
    run = jax.custom_vjp(rule.primal)
    run.defvjp(rule.forward, rule.backward, symbolic_zeros=True)

    def run_flat(operands: Arrays, carry: Arrays, xs: Arrays) -> tuple[Arrays, Arrays]:
        last, ys = run(block.hold(operands), list(carry), list(xs))
        return last, ys

    return run_flat


class _Rule:
    """The functions of the custom_vjp: of what blocks hold, the first carry and xs."""

    def __init__(self, plan: Plan, block: Block, reverse: bool):
        self._plan = plan
        self._block = block
        self._reverse = reverse
        self._independent = independent_outputs(block.parts)

    def _walk(self, held: Arrays, xs: Arrays) -> Forward:
        return Forward(self._block, length(self._plan), self._reverse, self._block.constants(held), xs)

    def _run(self, held: Arrays, carry: Arrays, xs: Arrays) -> tuple[Arrays, Arrays, Any]:
        walk = self._walk(held, xs)
        last, written, saved = walk.record(self._plan, 0, carry, walk.no_ys(carry))
        outs = tie([*last, *(written or [])], self._independent, [*held, *carry, *xs])
        return outs[: len(last)], outs[len(last) :], saved

    def primal(self, held: Arrays, carry: Arrays, xs: Arrays) -> tuple[Arrays, Arrays]:
        return self._run(held, carry, xs)[:2]

    def forward(self, held: Any, carry: Any, xs: Any) -> Any:
        held, carry, xs = ([leaf.value for leaf in group] for group in (held, carry, xs))
        last, ys, saved = self._run(held, carry, xs)
        return (last, ys), (held, carry, xs, saved)

    def backward(self, kept: Any, cotangents: Any) -> Any:
        held, carry, xs, saved = kept
        ct_last, ct_ys = cotangents
        ct_carry = _cotangents(ct_last, carry)
        wanted = [ct for ct in ct_ys if jnp.issubdtype(ct.dtype, jnp.inexact)]
        # No ys in the loss: then their cotangents cost nothing.
        no_ys = all(map(_is_symbolic_zero, wanted))
        ct_steps = None if no_ys else _cotangents(ct_ys, self._walk(held, xs).no_ys(carry))
        walk = Backward(self._block, length(self._plan), self._reverse, held, xs, ct_steps)
        zero = _late_zero(ct_last, ct_ys)
        zeros = {i: _late_zeros(held[i], zero) for i in self._block.differentiable_positions}
        waiting = self._block.partial_axes
        gradients = unreduced(zeros, waiting, [*held, *carry, *xs, *ct_carry, *(ct_steps or [])])
        ct_xs = [_late_zeros(leaf, zero) for leaf in floats(xs)]
        ct_carry, ct_xs, gradients = walk.back(self._plan, 0, saved, (ct_carry, ct_xs, gradients))
        gradients = summed(gradients, held, waiting)
        return [gradients.get(i) for i in range(len(held))], _with_nones(carry, ct_carry), _with_nones(xs, ct_xs)


def can_sweep(step: FlatStep) -> bool:
    """Whether the sweep takes a step: its reverse-mode derivative with respect to all floating inputs exists.

    The nest does not ask for that; it also runs effects that custom_vjp refuses, and takes higher derivatives of steps
    with gradients of their own. In a `shard_map`, results that do not vary as the inputs do cannot be tied (`tie`).
    """
    jaxpr = step.jaxpr.jaxpr
    if any(type(effect).__name__ not in _EFFECTS for effect in jaxpr.effects) or has_own_gradient(jaxpr):
        return False
    try:
        parts = split(step, joined=False)
        step_vjp(parts)
    except (TypeError, ValueError, NotImplementedError):
        return False
    return not (any(map(varies, jaxpr.invars)) and any(independent_outputs(parts)))


def _late_zero(ct_last: Sequence[Any], ct_ys: Sequence[Any]) -> Any:
    """A scalar zero that XLA does not know to be one before it has the cotangents; None if all of them are zero."""
    last, ys = (
        [ct for ct in cts if not _is_symbolic_zero(ct) and is_float(ct) and ct.size] for cts in (ct_last, ct_ys)
    )
    largest = [jnp.max(jnp.real(lax.stop_gradient(ct))) for ct in [*last[:1], *(ct[0] for ct in ys[:1])]]
    return sum((value > jnp.inf).astype(jnp.float32) for value in largest) if largest else None


def _late_zeros(leaf: Any, zero: Any) -> Any:
    """Zeros of the type of `leaf` that exist from when the cotangents do.

    Of plain zeros XLA makes one array for all scans of a program, and before it runs the first of them a copy for each.
    """
    zeros = zeros_like(leaf)
    if zero is None or varying_axes(zero) - varying_axes(zeros):
        return zeros
    return zeros + zero.astype(zeros.dtype)


def _is_symbolic_zero(ct: Any) -> bool:
    return isinstance(ct, jax.custom_derivatives.SymbolicZero)


def _cotangents(cts: Sequence[Any], like: Arrays) -> list[Any]:
    """The cotangents of floating leaves, zeros of the type of `like` where they are zero."""
    return [
        zeros_like(leaf) if _is_symbolic_zero(ct) else ct for leaf, ct in zip(like, cts, strict=True) if is_float(leaf)
    ]


def _with_nones(leaves: Arrays, cts: Arrays) -> list[Any]:
    given = iter(cts)
    return [next(given) if is_float(leaf) else None for leaf in leaves]
