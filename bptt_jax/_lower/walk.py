"""The two directions in which the sweep walks a plan's tree: short recursions over its nodes.

`at` is the number of steps before a node: where it begins, whichever way the steps go through xs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bptt_jax._lower.block import Block, Gradients, Weights
from bptt_jax._lower.jaxprs import read, zeros_like
from bptt_jax._lower.pull import Pull
from bptt_jax._plan import Chain, Plan, Remat, Repeat, Steps, length
from bptt_jax._step import Arrays, ScanCall, select

Axes = Sequence[int]  # of time, one for each array


class Walk:
    """What both directions share: one global xs, read at an index along each leaf's own axis of time."""

    def __init__(self, block: Block, call: ScanCall, xs: Arrays):
        self._block = block
        self._call = call
        self._xs = xs

    def _place(self, at: Any, n: int) -> Any:
        """Where the n steps from `at` on begin in arrays over time."""
        return self._call.length - n - at if self._call.reverse else at

    def _read(self, arrays: Arrays, axes: Axes, at: Any, n: int) -> Arrays:
        """n steps of arrays, time first: only these are moved."""
        if n != self._call.length:
            start = self._place(at, n)
            arrays = [self._part(a, start, n, axis) for a, axis in zip(arrays, axes, strict=True)]
        return [jnp.moveaxis(a, axis, 0) for a, axis in zip(arrays, axes, strict=True)]

    def _write(self, arrays: Arrays, axes: Axes, new: Arrays, at: Any, n: int) -> Arrays:
        """The arrays with n steps replaced by new ones, which have time first."""
        new = [jnp.moveaxis(b, 0, axis) for b, axis in zip(new, axes, strict=True)]
        if n == self._call.length:
            return new
        start = self._place(at, n)
        return [self._with_part(a, b, start, axis) for a, b, axis in zip(arrays, new, axes, strict=True)]

    def _part(self, array: Any, start: Any, n: int, axis: int) -> Any:
        if self._slices(axis):
            return lax.dynamic_slice_in_dim(array, start, n, axis)
        return jnp.take(array, start + jnp.arange(n, dtype=jnp.int32), axis, mode="clip")

    def _with_part(self, array: Any, part: Any, start: Any, axis: int) -> Any:
        if self._slices(axis):
            return lax.dynamic_update_slice_in_dim(array, part, start, axis)
        places = (*[slice(None)] * axis, start + jnp.arange(part.shape[axis], dtype=jnp.int32))
        return array.at[places].set(part, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds")

    def _slices(self, axis: int) -> bool:
        """Whether parts are slices, or else gathered.

        XLA lays out what a slice is taken of as the slice is used, time first, for which it copies the whole; of a
        gather it does not (H100).
        """
        return axis == 0 or self._block.parts.machine.is_cpu

    def _read_xs(self, at: Any, n: int) -> Arrays:
        return self._read(self._xs, self._call.x_axes, at, n)


class Forward(Walk):
    """Forward through a plan. `at` is the number of steps before a node, ys what has been written so far, or None."""

    def __init__(self, block: Block, call: ScanCall, constants: Arrays, xs: Arrays):
        super().__init__(block, call, xs)
        self._constants = constants

    def no_ys(self, carry: Arrays) -> Arrays:
        """Room for ys, of the types that a step gives them."""
        parts, call = self._block.parts, self._call
        x = [lax.index_in_dim(leaf, 0, axis, keepdims=False) for leaf, axis in zip(self._xs, call.x_axes, strict=True)]
        env = parts.types(self._constants, carry, x, parts.features_of(self._constants, x))
        blanks = [_blank(read(env, y)) for y in parts.jaxpr.outvars[parts.n_carry :]]
        return [
            jnp.moveaxis(lax.broadcast(blank, (call.length,)), 0, axis)
            for blank, axis in zip(blanks, call.y_axes, strict=True)
        ]

    def _write_ys(self, ys: Arrays | None, new: Arrays, at: Any, n: int) -> Arrays | None:
        return None if ys is None else self._write(ys, self._call.y_axes, new, at, n)

    def advance(self, node: Plan, at: Any, carry: Arrays, ys: Arrays | None) -> tuple[Arrays, Arrays | None]:
        """Runs a node and keeps nothing."""
        match node:
            case Steps(n):
                if n == 0:
                    return carry, ys
                carry, new = self._block.advance(self._constants, carry, self._read_xs(at, n), n)
                return carry, self._write_ys(ys, new, at, n)
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
                carry, new, saved = self._block.record(self._constants, carry, self._read_xs(at, n), n)
                return carry, self._write_ys(ys, new, at, n), saved
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
    """Backward through a plan.

    Args:
      block, call: the step, and how it is run.
      pull: the backward of one step.
      weights: see there.
      xs: the inputs.
      ct_ys: the cotangents of ys for which `pull` has a variable.
    """

    def __init__(self, block: Block, call: ScanCall, pull: Pull, weights: Weights, xs: Arrays, ct_ys: Arrays):
        super().__init__(block, call, xs)
        self._pull = pull
        self._weights = weights
        self._ct_ys = ct_ys
        active = block.parts.active
        self._ct_y_axes = select(select(call.y_axes, active.y), [ct is not None for ct in pull.ct_y])
        self._ct_x_axes = select(select(call.x_axes, active.x), block.x_with_cotangents(pull))
        self._again = Forward(block, call, weights.constants, xs)

    def back(self, node: Plan, at: Any, saved: Any, state: tuple[Arrays, Arrays, Gradients]) -> Any:
        """Takes a node backwards; the state is cotangents of the carry, of xs, and the constants' gradients so far."""
        match node:
            case Steps(0):
                return state
            case Steps(n):
                ct_carry, ct_xs, gradients = state
                ct_ys = self._read(self._ct_ys, self._ct_y_axes, at, n)
                ct_carry, new, gradients = self._block.back(
                    self._pull, self._weights, self._read_xs(at, n), saved, ct_carry, ct_ys, gradients, n
                )
                return ct_carry, self._write(ct_xs, self._ct_x_axes, new, at, n), gradients
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
