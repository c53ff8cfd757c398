"""A block of consecutive steps, differentiated as one unit.

Forward, the features of all its steps are evaluated at once, and a loop runs the rest. Backward, a loop takes the steps
from the last to the first and multiplies with the transposed weights only: the cotangents of tapped products are
stacked, and the gradient of each weight is one product over the whole block.

A block has no length of its own: it is as long as the xs that it is given.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax import lax

from bptt_jax._lower.jaxprs import Env, bind, evaluate, is_float, needed, read, zeros_like
from bptt_jax._lower.partial_sums import Axes, partial_axes
from bptt_jax._lower.split import SplitStep, split
from bptt_jax._lower.step_vjp import Pull, StepVjp, floats, part_of, step_vjp, with_floats
from bptt_jax._lower.style import Style
from bptt_jax._lower.taps import Tap, by_halves, is_large
from bptt_jax._step import Arrays, FlatStep

Gradients = dict[int, Any]  # of the differentiable ones among what a block holds, or of its constants, by position


class Block:
    """The programs of a block of steps. Arrays over time are in the order of xs, also where `reverse`."""

    def __init__(self, step: FlatStep, style: Style, reverse: bool, unroll: int | bool):
        self.parts: SplitStep = split(step, style.joined)
        self._vjp: StepVjp = step_vjp(self.parts)
        self._rebuilding = rebuilding(self._vjp)
        self._in_turn = style.in_turn
        self.partial_axes: Axes = partial_axes(self.parts, self._vjp)
        self._scan = functools.partial(lax.scan, reverse=reverse, unroll=unroll)
        self._scan_back = functools.partial(lax.scan, reverse=not reverse, unroll=unroll)

    @property
    def differentiable_positions(self) -> list[int]:
        """The positions of what has a gradient among what `hold` returns."""
        return [i for i, v in enumerate(self.parts.held) if v in self.parts.differentiable]

    def hold(self, operands: Arrays) -> Arrays:
        """The values of `SplitStep.held`."""
        return list(operands) if self.parts.moves_only else self.parts.derive(operands)

    def constants(self, held: Arrays) -> Arrays:
        """The constants of what `hold` returned."""
        return self.parts.derive(held) if self.parts.moves_only else list(held)

    def advance(self, constants: Arrays, carry: Arrays, xs: Arrays, n: int) -> tuple[Arrays, Arrays]:
        """Runs n steps and keeps nothing: (carry, ys)."""

        def body(carry: Arrays, at: Any) -> Any:
            x, features = at
            return self.parts.loop(constants, carry, x, features)

        return self._scan(body, list(carry), (list(xs), self._features(constants, xs)), length=n)

    def record(self, constants: Arrays, carry: Arrays, xs: Arrays, n: int) -> tuple[Arrays, Arrays, Arrays]:
        """Runs n steps: (carry, ys, what their backward needs)."""
        vjp, n_carry = self._vjp, self.parts.n_carry
        features = self._features(constants, xs)
        feature_of = bind(vjp.invars[3], features)
        from_loop = [v for v in vjp.saved if v not in feature_of]
        eqns = needed(vjp.eqns, [*vjp.outs, *from_loop])

        def body(carry: Arrays, at: Any) -> Any:
            env = self._environment(constants, carry, *at)
            evaluate(eqns, env)
            outs = [read(env, v) for v in vjp.outs]
            return outs[:n_carry], (outs[n_carry:], [env[v] for v in from_loop])

        carry, (ys, stacks) = self._scan(body, list(carry), (list(xs), features), length=n)
        env = feature_of | bind(from_loop, stacks)
        return carry, ys, [env[v] for v in vjp.saved]

    def back(
        self,
        held: Arrays,
        constants: Arrays,
        typed: Arrays,
        xs: Arrays,
        saved: Arrays,
        ct_carry: Arrays,
        ct_ys: Arrays | None,
        gradients: Gradients,
        n: int,
    ) -> tuple[Arrays, Arrays, Gradients]:
        """Takes n steps backwards.

        Args:
          held: what `hold` returned, of the types that make the gradients what they are to be.
          constants: those of what `hold` returned.
          typed: the same, with the types of `held` (see `partial_sums`).
          xs: as given to `record`.
          saved: what `record` returned.
          ct_carry, ct_ys: cotangents of the floating leaves of the last carry and of ys; None for ys without any.
          gradients: to which those of `held` are added.

        Returns:
          Cotangents of the floating leaves of the first carry and of xs, and the gradients.
        """
        pull = self._vjp.pull_without_y if ct_ys is None else self._vjp.pull
        summed = {i: ct for i, ct in zip(self._vjp.in_loop, pull.ct_constants, strict=True) if ct is not None}
        sums = {i: gradients[i] if i < len(held) else zeros_like(constants[i]) for i in summed}

        def body(state: Any, at: Any) -> Any:
            ct_new, sums = state
            env = self._pull(pull, constants, ct_new, *at)
            ct_carry = [
                ct if v is None else read(env, v) for v, ct in zip(pull.ct_carry, map(zeros_like, ct_new), strict=True)
            ]
            return (ct_carry, {i: sums[i] + read(env, v) for i, v in summed.items()}), [env[v] for v in pull.stacked]

        over = (list(xs), list(saved), [] if ct_ys is None else list(ct_ys))
        (ct_carry, sums), stacks = self._scan_back(body, (list(ct_carry), sums), over, length=n)
        stacked = bind(pull.stacked, stacks)
        ct_xs, new = self._of_features(pull, stacked, typed, xs)
        gradients = gradients | {i: total for i, total in sums.items() if i < len(held)}
        new.extend((i, total) for i, total in sums.items() if i >= len(held))
        for tap, left, cts in self._of_taps(pull, stacked, xs, saved):
            weight = typed[tap.const]
            if self._in_turn and left is not None and is_large(weight):

                def add(gradients: Gradients, left: Any, cts: Any, tap: Tap = tap, weight: Any = weight) -> Gradients:
                    return self._add(gradients, [(tap.const, tap.gradient(weight, left, cts))], held)

                gradients = by_halves(add, gradients, left, cts)
            else:
                new.append((tap.const, tap.gradient(weight, left, cts)))
        return ct_carry, ct_xs, self._add(gradients, new, held)

    def _pull(self, pull: Pull, constants: Arrays, ct_new: Arrays, x: Arrays, saved: Arrays, ct_y: Arrays) -> Env:
        """The values of a step's backward program."""
        vjp = self._vjp
        env = vjp.base | bind(vjp.invars[0], constants) | bind(vjp.invars[2], x) | bind(vjp.saved, saved)
        evaluate(self._rebuilding, env)
        back = pull.base | bind(pull.residuals, [read(env, v) for v in vjp.residuals])
        back |= bind(pull.ct_new, ct_new) | bind(pull.ct_y, ct_y)
        evaluate(pull.eqns, back)
        return back

    def _add(self, gradients: Gradients, new: Sequence[tuple[int, Any]], held: Arrays) -> Gradients:
        """Adds the gradients of constants to those of what is held."""
        gradients = dict(gradients)
        derived: Gradients = {}
        for i, gradient in new:
            into = gradients if i < len(held) else derived
            into[i] = into[i] + gradient if i in into else gradient
        if derived:
            _, vjp = jax.vjp(
                lambda held_f: [self.constants(with_floats(held, held_f))[i] for i in derived], floats(held)
            )
            (moved,) = vjp(list(derived.values()))
            places = [i for i, leaf in enumerate(held) if is_float(leaf)]
            gradients |= {i: gradients[i] + ct for i, ct in zip(places, moved, strict=True)}
        return gradients

    def _environment(self, *given: Arrays) -> Env:
        pairs = zip(self._vjp.invars, given, strict=True)
        return self._vjp.base | {v: value for pair in pairs for v, value in zip(*pair, strict=True)}

    def _features(self, constants: Arrays, xs: Arrays) -> Arrays:
        if not self.parts.features:
            return []
        return jax.vmap(lambda x: self.parts.features_of(constants, x))(list(xs))

    def _of_taps(self, pull: Pull, stacked: Env, xs: Arrays, saved: Arrays) -> Iterator[tuple[Tap, Any, Any]]:
        """The taps, each with what its weight was multiplied with and with the cotangents of the results."""
        lefts = bind(self._vjp.invars[2], xs) | bind(self._vjp.saved, saved)
        for tap, left, ct in zip(self._vjp.taps, self._vjp.lefts, pull.ct_taps, strict=True):
            if ct is not None:
                yield tap, None if left is None else lefts[left], _cotangents(ct, stacked, pull)

    def _of_features(
        self, pull: Pull, stacked: Env, constants: Arrays, xs: Arrays
    ) -> tuple[Arrays, list[tuple[int, Any]]]:
        """Cotangents of xs, and the gradients of what the features are made with."""
        x_f = floats(xs)
        used = [self.parts.constants.index(v) for v in self.parts.feature_constants]
        ct_xs: list[Any] = [None if ct is None else stacked[ct] for ct in pull.ct_x]
        gradients: list[tuple[int, Any]] = []
        if any(ct is not None for ct in pull.ct_features):

            def features(constants_f: Arrays, xs_f: Arrays) -> Arrays:
                own = list(constants)
                for i, constant in zip(used, constants_f, strict=True):
                    own[i] = constant
                return floats(self._features(own, with_floats(xs, xs_f)))

            values, vjp = jax.vjp(features, [constants[i] for i in used], x_f)
            cts = [
                zeros_like(value) if ct is None else stacked[ct]
                for value, ct in zip(values, pull.ct_features, strict=True)
            ]
            ct_constants, ct_features_xs = vjp(cts)
            gradients.extend(zip(used, ct_constants, strict=True))
            ct_xs = [b if a is None else a + b for a, b in zip(ct_xs, ct_features_xs, strict=True)]
        return [zeros_like(x) if ct is None else ct for x, ct in zip(x_f, ct_xs, strict=True)], gradients


def rebuilding(vjp: StepVjp) -> Sequence[Any]:
    """The equations that make the residuals of what is saved, constants and x."""
    pure = [eqn for eqn in vjp.eqns if not eqn.effects]
    return needed(pure, vjp.residuals, {*vjp.saved, *vjp.invars[0], *vjp.invars[2], *vjp.base})


def _cotangents(ct: Any, stacked: Env, pull: Pull) -> Any:
    if ct in stacked:
        return stacked[ct]
    part = part_of(ct, stacked, pull)
    assert part is not None, "a tap whose cotangent is not stacked"
    whole, axis, start = part
    is_stacked = whole.aval.ndim > ct.aval.ndim
    found = lax.slice_in_dim(stacked[whole], start, start + (1 if is_stacked else ct.aval.shape[axis]), axis=axis + 1)
    return lax.squeeze(found, [axis + 1]) if is_stacked else found
