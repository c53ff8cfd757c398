"""A block of consecutive steps, differentiated as one unit.

Forward, the features of all its steps are evaluated at once, and a loop runs the rest. Backward, a loop takes the steps
from the last to the first and multiplies with the transposed weights only. The cotangents of tapped products are
stacked, and the gradient of each weight is one product over the whole block.

A `Block` has no length of its own: each method takes the number of steps. Its arrays have time first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax._jaxprs.arrays import zeros_like
from bptt_jax._jaxprs.equations import Env, bind, evaluate, needed, read
from bptt_jax._jaxprs.quiet import quiet
from bptt_jax._jaxprs.types import Leaf, Tree
from bptt_jax._lower.block_values import Gradients, Into, Weights
from bptt_jax._lower.loop import run_loop, run_reading_ahead, run_stacking_late
from bptt_jax._lower.partial_sums import Axes, as_reduced, partial_axes
from bptt_jax._step.form import Swept
from bptt_jax._step.packing import Packing
from bptt_jax._step.pull import Pull, cotangents_of, pull_of
from bptt_jax._step.split import SplitStep
from bptt_jax._step.taps import Tap, by_halves, is_large
from bptt_jax._step.vjp import StepVjp, rebuilding
from bptt_jax._trace.call import Arrays, Mask, ScanCall, replace, select


class Block:
    """The programs of a block of steps. Arrays over time are in the order of xs, also where `reverse`.

    Args:
      swept: the step and its backward.
      call: the scan, for the order of its steps and how many an iteration has.
      waits: whether gradients may wait to be summed over devices (see `partial_sums`).
    """

    def __init__(self, swept: Swept, call: ScanCall, waits: bool):
        self._vjp: StepVjp = swept.vjp
        self.parts: SplitStep = swept.parts
        self._rebuilding = rebuilding(self._vjp)
        self.packing = Packing(self._vjp)
        self._in_turn = swept.style.in_turn
        self.partial_axes: Axes = partial_axes(self.parts, self._vjp) if waits else {}
        self._call = call

    @property
    def makes_room_late(self) -> bool:
        """Whether room is made late: with features on CPU; not where loops have no messages, because it takes some."""
        return bool(self.parts.features) and self.parts.machine.is_cpu and not self.partial_axes

    @property
    def differentiable_positions(self) -> list[int]:
        """The positions of the differentiable values among the results of `hoist`."""
        return [i for i, v in enumerate(self.parts.hoisted) if v in self.parts.differentiable]

    def hoist(self, operands: Arrays) -> Arrays:
        """The values of `SplitStep.hoisted`."""
        return list(operands) if self.parts.moves_only else self.parts.derive(operands)

    def constants(self, hoisted: Arrays) -> Arrays:
        """The constants of a step, from the results of `hoist`."""
        return self.parts.derive(hoisted) if self.parts.moves_only else list(hoisted)

    def weights(self, hoisted: Arrays) -> Weights:
        """The values shared by all blocks of a backward pass: made once, not in every block."""
        typed = as_reduced(hoisted, self.partial_axes)
        return Weights(typed, self.constants(hoisted), self.constants(typed))

    def of_operands(self, gradients: Gradients, operands: Arrays) -> list[Any]:
        """The gradients of the active operands, from the gradients of the hoisted values."""
        mask = self.parts.active.operands
        if self.parts.moves_only:
            return [gradients[i] for i, chosen in enumerate(mask) if chosen]
        positions = self.differentiable_positions

        def hoisted(chosen: Arrays) -> Arrays:
            values = self.hoist(replace(operands, mask, chosen))
            return [values[i] for i in positions]

        _, vjp = jax.vjp(hoisted, select(operands, mask))
        (found,) = vjp([gradients[i] for i in positions])
        return list(found)

    def advance(
        self, constants: Arrays, carry: Arrays, xs: Arrays, n: int, into: Into | None = None
    ) -> tuple[Arrays, Arrays]:
        """Runs n steps and keeps nothing: (carry, ys), or (carry, the arrays of `into` with ys written)."""

        def step(carry: Arrays, x: Arrays, features: Arrays) -> Any:
            return *self.parts.loop(constants, carry, x, features), []

        return self._run(step, carry, xs, self._features(constants, xs), n, into, self.parts.reads_ahead)[:2]

    def record(
        self, constants: Arrays, carry: Arrays, xs: Arrays, n: int, into: Into | None = None
    ) -> tuple[Arrays, Arrays, Arrays]:
        """Runs n steps and keeps their residuals: (carry, ys as in `advance`, arrays of `Packing.kept`)."""
        vjp, n_carry = self._vjp, self.parts.n_carry
        features = self._features(constants, xs)
        feature_of = bind(vjp.invars[3], features)
        from_loop = self.packing.from_loop
        eqns = needed(vjp.eqns, [*vjp.outs, *from_loop])

        def step(carry: Arrays, x: Arrays, features: Arrays) -> Any:
            env = self._environment(constants, carry, x, features)
            evaluate(eqns, env)
            outs = [read(env, v) for v in vjp.outs]
            return outs[:n_carry], outs[n_carry:], self.packing.pack([env[v] for v in from_loop])

        carry, ys, stacks = self._run(step, carry, xs, features, n, into)
        return carry, ys, self.packing.kept(feature_of, stacks)

    def _run(
        self, step: Any, carry: Arrays, xs: Arrays, features: Arrays, n: int, into: Into | None, ahead: bool = False
    ) -> tuple[Arrays, Arrays, Arrays]:
        def body(state: Tree, at: Tree) -> Any:
            (carry, arrays), ((x, i), features) = state, at
            carry, y, kept = step(carry, x, features)
            if into is None:
                return (carry, arrays), (y, kept)
            return (carry, into.write(arrays, y, i)), ([], kept)

        init = list(carry), [] if into is None else list(into.arrays)
        places = None if into is None else jnp.arange(n, dtype=jnp.int32)
        over = list(xs), places
        if ahead:
            (carry, arrays), (ys, kept) = run_reading_ahead(self._call, body, init, over, features, n)
        else:
            (carry, arrays), (ys, kept) = run_loop(self._call, body, init, (over, features), n)
        return carry, ys if into is None else arrays, kept

    def pull(self, last: Mask, y: Mask) -> Pull:
        """The backward of a step, given cotangents of some active leaves of the last carry and of ys."""
        return pull_of(self._vjp.pull, last, y)

    def back(
        self,
        pull: Pull,
        weights: Weights,
        xs: Arrays,
        saved: Arrays,
        ct_carry: Arrays,
        ct_ys: Arrays,
        gradients: Gradients,
        n: int,
    ) -> tuple[Arrays, Arrays, Gradients]:
        """Takes n steps backwards.

        Args:
          pull: the backward of one step.
          weights: the constants of the step.
          xs: as given to `record`.
          saved: the residuals returned by `record`.
          ct_carry, ct_ys: cotangents of the last carry and of ys, for the leaves with a variable in `pull`.
          gradients: sums so far; the block's gradients of `weights.hoisted` are added to them.

        Returns:
          Cotangents of the first carry, for the same leaves; of the leaves in `x_with_cotangents`; and the gradients.
        """
        hoisted, constants = weights.hoisted, weights.constants
        summed = {i: ct for i, ct in zip(self._vjp.in_loop, pull.ct_constants, strict=True) if ct is not None}
        # Constants from position len(hoisted) on are derived from operands: `_add` passes their sums on to these.
        sums = {i: gradients[i] if i < len(hoisted) else zeros_like(constants[i]) for i in summed}
        carried = [v is not None for v in pull.ct_new]

        def body(state: Tree, at: Tree, pull: Pull = pull) -> Any:
            ct_new, sums = state
            env = self._pull(pull, constants, ct_new, *at)
            # A loop's carry keeps its type, so a cotangent found to be zero (None) becomes an array.
            ct_carry = [
                zeros_like(ct) if v is None else read(env, v)
                for v, ct in zip(select(pull.ct_carry, carried), ct_new, strict=True)
            ]
            return (ct_carry, {i: sums[i] + read(env, v) for i, v in summed.items()}), [env[v] for v in pull.stacked]

        over = (list(xs), list(saved), list(ct_ys))
        init = (list(ct_carry), sums)
        if self.makes_room_late:
            silent = functools.partial(body, pull=dataclasses.replace(pull, eqns=quiet(pull.eqns)))
            (ct_carry, sums), stacks = run_stacking_late(self._call, body, silent, init, over, n, saved)
        else:
            (ct_carry, sums), stacks = run_loop(self._call, body, init, over, n, backwards=True)
        stacked = bind(pull.stacked, stacks)
        ct_xs, new = self._of_features(pull, stacked, weights.typed, xs)
        gradients = gradients | {i: total for i, total in sums.items() if i < len(hoisted)}
        new.extend((i, total) for i, total in sums.items() if i >= len(hoisted))
        for tap, left, cts in self._of_taps(pull, stacked, xs, saved):
            weight = weights.typed[tap.const]
            # XLA holds the arrays of one loop at a time, so large products are given loops of their own.
            if self._in_turn and left is not None and is_large(weight):

                def add(gradients: Gradients, left: Leaf, cts: Any, tap: Tap = tap, weight: Leaf = weight) -> Gradients:
                    return self._add(gradients, [(tap.const, tap.gradient(weight, left, cts))], hoisted)

                gradients = by_halves(add, gradients, left, cts)
            else:
                new.append((tap.const, tap.gradient(weight, left, cts)))
        return ct_carry, ct_xs, self._add(gradients, new, hoisted)

    def _pull(self, pull: Pull, constants: Arrays, ct_new: Arrays, x: Arrays, saved: Arrays, ct_y: Arrays) -> Env:
        """Evaluates a step's backward: the values of its variables."""
        vjp = self._vjp
        env = vjp.base | bind(vjp.invars[0], constants) | bind(vjp.invars[2], x)
        env |= bind(vjp.saved, self.packing.unpack(saved))
        evaluate(self._rebuilding, env)
        back = pull.base | bind(pull.residuals, [read(env, v) for v in vjp.residuals])
        back |= bind(_present(pull.ct_new), ct_new) | bind(_present(pull.ct_y), ct_y)
        evaluate(pull.eqns, back)
        return back

    def _add(self, gradients: Gradients, new: Sequence[tuple[int, Any]], hoisted: Arrays) -> Gradients:
        """Adds gradients of constants to the gradients of the hoisted values."""
        gradients = dict(gradients)
        derived: Gradients = {}
        for i, gradient in new:
            into = gradients if i < len(hoisted) else derived
            into[i] = into[i] + gradient if i in into else gradient
        # Derived constants are moved operands here (`moves_only`): the move, transposed, brings gradients back.
        if derived:
            places = self.differentiable_positions
            mask = [i in places for i in range(len(hoisted))]
            _, vjp = jax.vjp(
                lambda chosen: [self.constants(replace(hoisted, mask, chosen))[i] for i in derived],
                select(hoisted, mask),
            )
            (moved,) = vjp(list(derived.values()))
            gradients |= {i: gradients[i] + ct for i, ct in zip(places, moved, strict=True)}
        return gradients

    def _environment(self, *given: Arrays) -> Env:
        pairs = zip(self._vjp.invars, given, strict=True)
        return self._vjp.base | {v: value for pair in pairs for v, value in zip(*pair, strict=True)}

    def _features(self, constants: Arrays, xs: Arrays) -> Arrays:
        if not self.parts.features:
            return []
        return self.parts.features_of_block(constants, xs)

    def _of_taps(self, pull: Pull, stacked: Env, xs: Arrays, saved: Arrays) -> Iterator[tuple[Tap, Any, Any]]:
        """Taps with cotangents: (tap, stacked factors of its weight or None for a sum, stacked cotangents)."""
        lefts = bind(self._vjp.invars[2], xs) | bind(self._vjp.saved, self.packing.unpack(saved, of_block=True))
        for tap, left, ct in zip(self._vjp.taps, self._vjp.lefts, pull.ct_taps, strict=True):
            if ct is not None:
                yield tap, None if left is None else lefts[left], cotangents_of(ct, stacked, pull)

    def _of_features(
        self, pull: Pull, stacked: Env, constants: Arrays, xs: Arrays
    ) -> tuple[Arrays, list[tuple[int, Any]]]:
        """Cotangents of the leaves of xs with one, and gradients of the constants used by features."""
        parts, mask = self.parts, self.parts.active.x
        ct_xs: list[Any] = [None if ct is None else stacked[ct] for ct in pull.ct_x]
        is_given = [ct is not None for ct in pull.ct_features]
        gradients: list[tuple[int, Any]] = []
        if any(is_given):
            used = [parts.constants.index(v) for v in parts.feature_constants]
            reached = self._features_reach(pull)

            def features(constants_f: Arrays, xs_f: Arrays) -> Arrays:
                own = list(constants)
                for i, constant in zip(used, constants_f, strict=True):
                    own[i] = constant
                found = self._features(own, replace(xs, mask, xs_f))
                return select(select(found, parts.active_features), is_given)

            _, vjp = jax.vjp(features, [constants[i] for i in used], select(xs, mask))
            ct_constants, ct_features_xs = vjp([stacked[ct] for ct in pull.ct_features if ct is not None])
            gradients.extend(zip(used, ct_constants, strict=True))
            # A leaf of x is read by the loop (a), by features (b), or by both.
            ct_xs = [
                (b if a is None else a + b) if has_some else a
                for a, b, has_some in zip(ct_xs, ct_features_xs, reached, strict=True)
            ]
        return [ct for ct in ct_xs if ct is not None], gradients

    def _features_reach(self, pull: Pull) -> list[bool]:
        """For each active leaf of x whether a feature with a cotangent depends on it."""
        return self.parts.x_reaching([ct is not None for ct in pull.ct_features])

    def x_with_cotangents(self, pull: Pull) -> Mask:
        """For each active leaf of x whether it has a cotangent: `back` returns these."""
        return tuple(
            ct is not None or of_features for ct, of_features in zip(pull.ct_x, self._features_reach(pull), strict=True)
        )


def _present(variables: Sequence[Any]) -> list[Any]:
    return [v for v in variables if v is not None]
