"""The two directions in which the sweep walks a plan's tree: short recursions over its nodes.

`at` is the number of steps before a node: where it begins, whichever way the steps go through xs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bptt_jax._lower.block import Block, Gradients
from bptt_jax._lower.jaxprs import read, zeros_like
from bptt_jax._lower.partial_sums import as_reduced
from bptt_jax._plan import Chain, Plan, Remat, Repeat, Steps, length
from bptt_jax._step import Arrays


class Walk:
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


class Forward(Walk):
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


class Backward(Walk):
    """Backward through a plan."""

    def __init__(self, block: Block, total: int, reverse: bool, held: Arrays, xs: Arrays, ct_ys: Arrays | None):
        super().__init__(block, total, reverse, xs)
        self._held = as_reduced(held, block.partial_axes)
        self._ct_ys = ct_ys
        self._constants = block.constants(held)  # once, not in every block
        self._typed = block.constants(self._held)
        self._again = Forward(block, total, reverse, self._constants, xs)

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
                    self._held, self._constants, self._typed, xs, saved, ct_carry, ct_ys, gradients, n
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
