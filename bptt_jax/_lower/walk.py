"""The sweep's walk through a plan's tree, forward and backward: short recursions over its nodes.

`at` is the number of steps run before a node begins, whichever way the steps go through xs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bptt_jax._jaxprs.arrays import varying_axes, zeros_like
from bptt_jax._jaxprs.equations import read
from bptt_jax._jaxprs.types import Index, Leaf, Tree
from bptt_jax._lower.block import Block
from bptt_jax._lower.block_values import Gradients, Into, Weights
from bptt_jax._lower.host import scan_back, scan_keeping
from bptt_jax._lower.late import late_zero
from bptt_jax._progress.report import SILENT, Pass
from bptt_jax._step.pull import Pull
from bptt_jax._trace.along import Along
from bptt_jax._trace.call import Arrays, ScanCall, select
from bptt_jax.plans._nodes import Chain, Plan, Remat, Repeat, Steps, length


class Walk:
    """The part common to both directions: one global xs, read at an index along each leaf's axis of time."""

    def __init__(self, block: Block, call: ScanCall, xs: Arrays, lengths: Leaf):
        self._block = block
        self._call = call
        self._xs = xs
        self._lengths = lengths
        self._is_cpu = call.options.machine.is_cpu

    def _place(self, at: Index, n: int) -> Any:
        """The index in arrays over time at which the n steps from `at` on begin."""
        # In reverse, the steps run so far are at the end of the arrays.
        return self._call.length - n - at if self._call.reverse else at

    def _read(self, arrays: Arrays, alongs: Sequence[Along], at: Index, n: int) -> Arrays:
        """n steps of arrays, time first: only these steps are moved."""
        start = self._place(at, n)
        return [
            along.read(a, start, n, self._lengths, along.is_sliced(self._is_cpu))
            for a, along in zip(arrays, alongs, strict=True)
        ]

    def _write(self, arrays: Arrays, alongs: Sequence[Along], new: Arrays, at: Index, n: int) -> Arrays:
        """The arrays with n steps replaced by new ones; these have time first."""
        return self._put(arrays, alongs, new, self._place(at, n))

    def _put(self, arrays: Arrays, alongs: Sequence[Along], new: Arrays, start: Index) -> Arrays:
        return [
            along.write(a, b, start, self._lengths, along.is_sliced(self._is_cpu))
            for a, b, along in zip(arrays, new, alongs, strict=True)
        ]

    def _read_xs(self, at: Index, n: int) -> Arrays:
        return self._read(self._xs, self._call.x_along, at, n)


class Forward(Walk):
    """Forward through a plan. In its methods, ys are the arrays written so far, or None where none are made."""

    def __init__(
        self, block: Block, call: ScanCall, constants: Arrays, xs: Arrays, lengths: Leaf, progress: Pass = SILENT
    ):
        super().__init__(block, call, xs, lengths)
        self._constants = constants
        self._progress = progress

    def no_ys(self, carry: Arrays) -> Arrays:
        """Room for ys, with the types given by a step."""
        parts, call = self._block.parts, self._call
        x = [
            lax.index_in_dim(leaf, 0, along.axis, keepdims=False)
            for leaf, along in zip(self._xs, call.x_along, strict=True)
        ]
        env = parts.types(self._constants, carry, x, parts.features_of(self._constants, x))
        blanks = [_blank(read(env, y)) for y in parts.jaxpr.outvars[parts.n_carry :]]
        return [
            jnp.moveaxis(lax.broadcast(blank, (call.length,)), 0, along.axis)
            for blank, along in zip(blanks, call.y_along, strict=True)
        ]

    def _run(self, run: Any, carry: Arrays, ys: Arrays | None, at: Index, n: int) -> tuple[Any, ...]:
        """Runs a block of n steps by `run`: (carry, ys, ...).

        Outside of loops each step writes its own y. XLA would repeat the write of a whole block there for each reader
        of ys, each time with a copy of all ys (CPU: a third of a program with ys in the loss).
        """
        self._progress.before(at, n, carry)
        over, alongs = self._read_xs(self._after(carry, at), n), self._call.y_along
        # In a loop `at` is traced. A block of all steps needs no write into ys.
        if ys is None or not isinstance(at, int) or n == self._call.length:
            carry, new, *kept = run(self._constants, carry, over, n)
            return carry, None if ys is None else self._write(ys, alongs, new, at, n), *kept
        first = self._place(at, n)

        def write(arrays: Arrays, y: Arrays, i: Index) -> Arrays:
            # A literal among the results is a Python number.
            steps = [leaf[None] if isinstance(leaf, jax.Array) else jnp.asarray(leaf)[None] for leaf in y]
            return self._put(arrays, alongs, steps, first + i)

        return tuple(run(self._constants, carry, over, n, Into(ys, write)))

    def _after(self, carry: Arrays, at: Index) -> Any:
        """`at`, but not known to XLA before the carry is.

        XLA would make the features of a block outside of loops while the loop before it runs, because they need xs only
        (CPU; `python -m pytest tests/lower -k features_take_no_more_bytes`).
        """
        is_early = isinstance(at, int) and at > 0 and self._block.makes_room_late
        zero = late_zero(carry) if is_early else None
        # In a `shard_map` an index that varies over more axes of the mesh would change the types of carry and xs.
        if zero is None or any(varying_axes(zero) - varying_axes(leaf) for leaf in (*carry, *self._xs)):
            return at
        return at + zero.astype(jnp.int32)

    def advance(self, node: Plan, at: Index, carry: Arrays, ys: Arrays | None) -> tuple[Arrays, Arrays | None]:
        """Runs a node and keeps nothing: (carry, ys)."""
        match node:
            case Steps(n):
                if n == 0:
                    return carry, ys
                carry, ys = self._run(self._block.advance, carry, ys, at, n)
                return carry, ys
            case Remat(child):
                return self.advance(child, at, carry, ys)
            case Repeat(1, child):
                return self.advance(child, at, carry, ys)
            case Repeat(k, child):

                def body(state: Tree, i: Index) -> Any:
                    return self.advance(child, at + i * length(child), *state), None

                (carry, ys), _ = lax.scan(body, (carry, ys), _counter(k))
                return carry, ys
            case Chain(children):
                for child in children:
                    carry, ys = self.advance(child, at, carry, ys)
                    at += length(child)
                return carry, ys
        raise TypeError(f"not a plan node: {node!r}")

    def record(self, node: Plan, at: Index, carry: Arrays, ys: Arrays | None) -> tuple[Arrays, Arrays | None, Any]:
        """Runs a node and keeps the carries and residuals it names: (carry, ys, kept)."""
        match node:
            case Steps(n):
                if n == 0:
                    return carry, ys, ()
                carry, ys, saved = self._run(self._block.record, carry, ys, at, n)
                return carry, ys, saved
            case Remat(child):
                last, ys = self.advance(child, at, carry, ys)
                return last, ys, list(carry)
            case Repeat(1, child):
                return self.record(child, at, carry, ys)
            case Repeat(k, child, memory):

                def body(state: Tree, i: Index) -> Any:
                    carry, ys, saved = self.record(child, at + i * length(child), *state)
                    return (carry, ys), saved

                (carry, ys), saved = scan_keeping(memory, body, (carry, ys), _counter(k))
                return carry, ys, saved
            case Chain(children):
                kept = []
                for child in children:
                    carry, ys, saved = self.record(child, at, carry, ys)
                    kept.append(saved)
                    at += length(child)
                return carry, ys, kept
        raise TypeError(f"not a plan node: {node!r}")

    def revisit(self, node: Plan, at: Index, carry: Arrays) -> Any:
        """The values that `record` keeps of a node, without running to its end where possible."""
        match node:
            case Remat():
                return list(carry)
            case Repeat(1, child):
                return self.revisit(child, at, carry)
            case Repeat(k, Remat(child)):

                def body(state: Tree, i: Index) -> Any:
                    carry, kept = state
                    carry, _ = self.advance(child, at + i * length(child), carry, None)
                    put = functools.partial(lax.dynamic_update_index_in_dim, index=i + 1, axis=0)
                    return (carry, [put(a, b) for a, b in zip(kept, carry, strict=True)]), None

                # Each place starts as the first carry. Places 1 to k - 1 are left to write: the last child is not run.
                room = [lax.broadcast(leaf, (k,)) for leaf in carry]
                (_, kept), _ = lax.scan(body, (list(carry), room), _counter(k - 1))
                return kept
            case Chain((*before, last)):  # nobody reads the carry after `last`
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
      block, call: the step and its scan.
      pull: the backward of one step.
      weights: the constants of the step.
      xs: the inputs over time.
      ct_ys: the cotangents of ys with a variable in `pull`.
      lengths: of sequences; None without any.
    """

    def __init__(
        self, block: Block, call: ScanCall, pull: Pull, weights: Weights, xs: Arrays, ct_ys: Arrays, lengths: Leaf
    ):
        super().__init__(block, call, xs, lengths)
        self._progress = call.reporting("backward")
        self._pull = pull
        self._weights = weights
        self._ct_ys = ct_ys
        active = block.parts.active
        self._ct_y_along = select(select(call.y_along, active.y), [ct is not None for ct in pull.ct_y])
        self._ct_x_along = select(select(call.x_along, active.x), block.x_with_cotangents(pull))
        self._again = Forward(block, call, weights.constants, xs, lengths)  # for the steps below a `Remat`

    def back(self, node: Plan, at: Index, saved: Any, state: tuple[Arrays, Arrays, Gradients]) -> Any:
        """Takes a node backwards. The state: cotangents of the carry and of xs, and the constants' gradients so far."""
        match node:
            case Steps(0):
                return state
            case Steps(n):
                ct_carry, ct_xs, gradients = state
                self._progress.before(self._call.length - n - at, n, ct_carry)
                ct_ys = self._read(self._ct_ys, self._ct_y_along, at, n)
                ct_carry, new, gradients = self._block.back(
                    self._pull, self._weights, self._read_xs(at, n), saved, ct_carry, ct_ys, gradients, n
                )
                return ct_carry, self._write(ct_xs, self._ct_x_along, new, at, n), gradients
            case Remat(child):
                return self.back(child, at, self._again.revisit(child, at, saved), state)
            case Repeat(1, child):
                return self.back(child, at, saved, state)
            case Repeat(k, child, memory):

                def body(state: Tree, i: Index, saved: Any) -> Any:
                    return self.back(child, at + i * length(child), saved, state)

                return scan_back(memory, body, state, _counter(k), saved)
            case Chain(children):
                at += length(node)
                for child, kept in zip(reversed(children), reversed(saved), strict=True):
                    at -= length(child)
                    state = self.back(child, at, kept, state)
                return state
        raise TypeError(f"not a plan node: {node!r}")


def _counter(k: int) -> Any:
    return jnp.arange(k, dtype=jnp.int32)


def _blank(leaf: Leaf) -> Any:
    """A value of the type of `leaf`, to be overwritten; PRNG keys have no zeros."""
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        return leaf
    return zeros_like(leaf)
