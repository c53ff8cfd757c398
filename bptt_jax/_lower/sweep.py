"""The sweep: one `custom_vjp` around the scan, whose backward walks the plan's tree with loops of static length.

    forward    run through the plan once, keeping the carries (and residuals) that it names
    backward   take the nodes from the last to the first; for a `Remat`, run forward again from its carry, keeping what
               its child names, then go back through the child

There is one xs, one ys and one dxs; blocks read and write at an index, so no level of the tree holds copies. Gradients
of the constants are one running sum. Steps that are only advanced are never linearised, and the last child of what is
recomputed is not advanced, since nobody asks for the carry behind it.

The first pass of a call that is not differentiated runs the same program as that of one that is, so that vmap finds
the same batch axes in both. What is saved has the same structure whichever inputs are differentiated.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bptt_jax._lower.block import Block, Gradients, block_sizes
from bptt_jax._lower.jaxprs import has_own_gradient, is_float, read, varies, zeros_like
from bptt_jax._lower.nested import Run
from bptt_jax._lower.split import split
from bptt_jax._lower.step_vjp import floats, step_vjp
from bptt_jax._lower.tie import independent_outputs, tie
from bptt_jax._plan import Chain, Plan, Remat, Repeat, Steps, in_blocks, length
from bptt_jax._step import Arrays, FlatStep

_EFFECTS = ("DebugEffect", "OrderedDebugEffect")  # of jax.debug; JAX exports no name for them


def lower(plan: Plan, step: FlatStep, *, joined: bool = True, reverse: bool = False, unroll: int | bool = 1) -> Run:
    """A function (operands, carry, xs) -> (carry, ys) that runs `plan`; see `nested.lower` and `split`."""
    block = Block(step, joined, reverse, unroll)
    plan = in_blocks(plan, block_sizes(step, joined).most_steps)

    independent = independent_outputs(block.parts)

    def forward(held: Arrays, carry: Arrays, xs: Arrays) -> tuple[Arrays, Arrays, Any]:
        walk = _Forward(block, length(plan), reverse, block.constants(held), xs)
        last, written, saved = walk.record(plan, 0, carry, walk.no_ys(carry))
        ys = written or []
        outs = tie([*last, *ys], independent, [*held, *carry, *xs])
        return outs[: len(last)], outs[len(last) :], saved

    @jax.custom_vjp
    def run(held: Arrays, carry: Arrays, xs: Arrays) -> Any:
        return forward(held, carry, xs)[:2]

    def run_forward(held: Any, carry: Any, xs: Any) -> Any:
        held, carry, xs = ([leaf.value for leaf in group] for group in (held, carry, xs))
        last, ys, saved = forward(held, carry, xs)
        return (last, ys), (held, carry, xs, saved)

    def run_backward(kept: Any, cotangents: Any) -> Any:
        held, carry, xs, saved = kept
        ct_carry, ct_ys = cotangents
        ct_carry = [
            zeros_like(leaf) if _is_symbolic_zero(ct) else ct
            for leaf, ct in zip(carry, ct_carry, strict=True)
            if is_float(leaf)
        ]
        walk = _Backward(block, length(plan), reverse, held, xs, _instantiate(ct_ys))
        gradients = {i: zeros_like(leaf) for i, leaf in enumerate(held) if is_float(leaf)}
        ct_xs = [zeros_like(leaf) for leaf in floats(xs)]
        ct_carry, ct_xs, gradients = walk.back(plan, 0, saved, (ct_carry, ct_xs, gradients))
        return (
            [gradients.get(i) for i in range(len(held))],
            _with_nones(carry, ct_carry),
            _with_nones(xs, ct_xs),
        )

    run.defvjp(run_forward, run_backward, symbolic_zeros=True)

    def run_flat(operands: Arrays, carry: Arrays, xs: Arrays) -> tuple[Arrays, Arrays]:
        last, ys = run(block.hold(operands), list(carry), list(xs))
        return last, ys

    return run_flat


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


def _is_symbolic_zero(ct: Any) -> bool:
    return isinstance(ct, jax.custom_derivatives.SymbolicZero)


def _instantiate(ct_ys: Sequence[Any]) -> Arrays | None:
    """The cotangents of the floating ys; None if all are zero, which then cost nothing."""
    wanted = [ct for ct in ct_ys if jnp.issubdtype(ct.dtype, jnp.inexact)]
    if all(map(_is_symbolic_zero, wanted)):
        return None
    return [jnp.zeros(ct.shape, ct.dtype) if _is_symbolic_zero(ct) else ct for ct in wanted]


def _with_nones(leaves: Arrays, cts: Arrays) -> list[Any]:
    given = iter(cts)
    return [next(given) if is_float(leaf) else None for leaf in leaves]


class _Walk:
    """What both directions share: one global xs, read at an index."""

    def __init__(self, block: Block, total: int, reverse: bool, xs: Arrays):
        self._block = block
        self._total = total
        self._reverse = reverse
        self._xs = xs

    def _place(self, at: Any, n: int) -> Any:
        """Where the n steps from `at` on begin in arrays over time."""
        return self._total - n - at if self._reverse else at

    def _read(self, arrays: Arrays, at: Any, n: int) -> Arrays:
        if n == self._total:
            return list(arrays)
        return [lax.dynamic_slice_in_dim(a, self._place(at, n), n) for a in arrays]

    def _write(self, arrays: Arrays, new: Arrays, at: Any, n: int) -> Arrays:
        if n == self._total:
            return list(new)
        return [lax.dynamic_update_slice_in_dim(a, b, self._place(at, n), 0) for a, b in zip(arrays, new, strict=True)]


class _Forward(_Walk):
    """Forward through a plan. `at` is the number of steps before a node, ys what has been written so far, or None."""

    def __init__(self, block: Block, total: int, reverse: bool, constants: Arrays, xs: Arrays):
        super().__init__(block, total, reverse, xs)
        self._constants = constants

    def no_ys(self, carry: Arrays) -> Arrays:
        """Room for ys, of the types that a step gives them."""
        parts, x = self._block.parts, [leaf[0] for leaf in self._xs]
        env = parts.types(self._constants, carry, x, parts.features_of(self._constants, x))
        return [lax.broadcast(_blank(read(env, y)), (self._total,)) for y in parts.jaxpr.outvars[parts.n_carry :]]

    def advance(self, node: Plan, at: Any, carry: Arrays, ys: Arrays | None) -> tuple[Arrays, Arrays | None]:
        """Runs a node and keeps nothing."""
        match node:
            case Steps(n):
                if n == 0:
                    return carry, ys
                carry, new = self._block.advance(self._constants, carry, self._read(self._xs, at, n), n)
                return carry, None if ys is None else self._write(ys, new, at, n)
            case Remat(child):
                return self.advance(child, at, carry, ys)
            case Repeat(1, child):
                return self.advance(child, at, carry, ys)
            case Repeat(k, child):

                def body(state: Any, i: Any) -> Any:
                    return self.advance(child, at + i * length(child), *state), None

                (carry, ys), _ = lax.scan(body, (carry, ys), _counter(k))
                return carry, ys
            case Chain(children):
                for child in children:
                    carry, ys = self.advance(child, at, carry, ys)
                    at += length(child)
                return carry, ys
        raise TypeError(f"not a plan node: {node!r}")

    def record(self, node: Plan, at: Any, carry: Arrays, ys: Arrays | None) -> tuple[Arrays, Arrays | None, Any]:
        """Runs a node and keeps what it says: (carry, ys, kept)."""
        match node:
            case Steps(n):
                if n == 0:
                    return carry, ys, ()
                carry, new, saved = self._block.record(self._constants, carry, self._read(self._xs, at, n), n)
                return carry, None if ys is None else self._write(ys, new, at, n), saved
            case Remat(child):
                last, ys = self.advance(child, at, carry, ys)
                return last, ys, list(carry)
            case Repeat(1, child):
                return self.record(child, at, carry, ys)
            case Repeat(k, child):

                def body(state: Any, i: Any) -> Any:
                    carry, ys, saved = self.record(child, at + i * length(child), *state)
                    return (carry, ys), saved

                (carry, ys), saved = lax.scan(body, (carry, ys), _counter(k))
                return carry, ys, saved
            case Chain(children):
                kept = []
                for child in children:
                    carry, ys, saved = self.record(child, at, carry, ys)
                    kept.append(saved)
                    at += length(child)
                return carry, ys, kept
        raise TypeError(f"not a plan node: {node!r}")

    def revisit(self, node: Plan, at: Any, carry: Arrays) -> Any:
        """What `record` keeps of a node, without running to its end where that is not needed."""
        match node:
            case Remat():
                return list(carry)
            case Repeat(1, child):
                return self.revisit(child, at, carry)
            case Repeat(k, Remat(child)):

                def body(state: Any, i: Any) -> Any:
                    carry, kept = state
                    carry, _ = self.advance(child, at + i * length(child), carry, None)
                    put = functools.partial(lax.dynamic_update_index_in_dim, index=i + 1, axis=0)
                    return (carry, [put(a, b) for a, b in zip(kept, carry, strict=True)]), None

                room = [lax.broadcast(leaf, (k,)) for leaf in carry]
                (_, kept), _ = lax.scan(body, (list(carry), room), _counter(k - 1))
                return kept
            case Chain((*before, last)):
                kept = []
                for child in before:
                    carry, _, saved = self.record(child, at, carry, None)
                    kept.append(saved)
                    at += length(child)
                return [*kept, self.revisit(last, at, carry)]
        return self.record(node, at, carry, None)[2]


class _Backward(_Walk):
    """Backward through a plan."""

    def __init__(self, block: Block, total: int, reverse: bool, held: Arrays, xs: Arrays, ct_ys: Arrays | None):
        super().__init__(block, total, reverse, xs)
        self._held = held
        self._ct_ys = ct_ys
        self._constants = block.constants(held)  # once, not in every block
        self._again = _Forward(block, total, reverse, self._constants, xs)

    def back(self, node: Plan, at: Any, saved: Any, state: tuple[Arrays, Arrays, Gradients]) -> Any:
        """Takes a node backwards; the state is cotangents of the carry, of xs, and the constants' gradients so far."""
        match node:
            case Steps(0):
                return state
            case Steps(n):
                ct_carry, ct_xs, gradients = state
                ct_ys = None if self._ct_ys is None else self._read(self._ct_ys, at, n)
                xs = self._read(self._xs, at, n)
                ct_carry, new, gradients = self._block.back(
                    self._held, self._constants, xs, saved, ct_carry, ct_ys, gradients, n
                )
                return ct_carry, self._write(ct_xs, new, at, n), gradients
            case Remat(child):
                return self.back(child, at, self._again.revisit(child, at, saved), state)
            case Repeat(1, child):
                return self.back(child, at, saved, state)
            case Repeat(k, child):

                def body(state: Any, i_and_saved: Any) -> Any:
                    i, saved = i_and_saved
                    return self.back(child, at + i * length(child), saved, state), None

                state, _ = lax.scan(body, state, (_counter(k), saved), reverse=True)
                return state
            case Chain(children):
                at += length(node)
                for child, kept in zip(reversed(children), reversed(saved), strict=True):
                    at -= length(child)
                    state = self.back(child, at, kept, state)
                return state
        raise TypeError(f"not a plan node: {node!r}")


def _counter(k: int) -> Any:
    return jnp.arange(k, dtype=jnp.int32)


def _blank(leaf: Any) -> Any:
    """Something of the type of `leaf`, to be overwritten; keys have no zeros."""
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        return leaf
    return zeros_like(leaf)
