"""From a step to its `StepProfile`, by abstract evaluation: nothing is run and nothing is compiled.

For the sweep, the equations of a step say what is kept and what a block holds. For the nest, JAX decides: what a loop
of steps keeps for its backward is not what the vjp of the bare step keeps, since slices of xs and operands are there
anyway, and values that do not depend on the iteration are kept once. So the residuals of two short loops are counted;
the difference is the share of one step, and what is left over is fixed.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from bptt_jax._lower.block_sizes import block_sizes
from bptt_jax._lower.jaxprs import (
    explicit_sharding,
    has_own_gradient,
    inline,
    is_float,
    narrowing_bytes,
    needed,
    read_by,
    type_bytes,
    widened,
)
from bptt_jax._lower.nested import lower, with_unit_axes
from bptt_jax._lower.roofline import platform
from bptt_jax._lower.step_vjp import floats, with_floats
from bptt_jax._lower.style import FASTEST, Style
from bptt_jax._lower.sweep import can_sweep
from bptt_jax._plan import Steps
from bptt_jax._step import Arrays, FlatStep, TracedScan
from bptt_jax._step_profile import Lowering, StepProfile, StepTimes

_COUNTERS_BYTES = 256  # of loops and of the tables that they are called with
# Of each further loop, fitted to tiny steps (CPU); half as much again in a nest of checkpoints.
_LOOP_BYTES, _BY_ARRAY, _BY_PARAM = 512, 96, 48
# Of an LSTM on CPU, relative to a step that is advanced in the sweep; a block's products count as some steps.
_SWEEP_TIMES = StepTimes(forward=1.0, recording=1.2, backward=1.6, block=2.0)
_JOINED_TIMES = dataclasses.replace(_SWEEP_TIMES, backward=1.3)
_IN_TURN_TIMES = dataclasses.replace(_SWEEP_TIMES, backward=2.1)
_SHORT, _LONG = 2, 4  # at least 2: a loop of one step is not a loop

_profiles: weakref.WeakKeyDictionary[FlatStep, dict[Any, StepProfile]] = weakref.WeakKeyDictionary()


def check_differentiation(differentiation: str) -> None:
    """Raises ValueError unless `differentiation` is one that there is."""
    if differentiation not in ("reverse", "any"):
        raise ValueError(f'differentiation={differentiation!r} is unknown; use "reverse" (the default) or "any".')


def lowering_of(traced: TracedScan, differentiation: str) -> Lowering:
    """The sweep where only reverse mode is asked for, unless the step has something that only the nest takes."""
    return "sweep" if differentiation == "reverse" and traced.length > 0 and can_sweep(traced.step) else "nested"


def measure(traced: TracedScan, lowering: Lowering, style: Style = FASTEST) -> StepProfile:
    """The profile of a traced step under a lowering; remembered as long as the step lives.

    Args:
      traced: the call.
      lowering: "sweep" only where the step can be swept.
      style: for the sweep, how blocks take their products.
    """
    plain = _measure_plain(traced.step, traced.operands, traced.carry, traced.xs)
    return plain if lowering == "nested" else _of_sweep(traced.step, plain, style)


def _of_sweep(step: FlatStep, plain: StepProfile, style: Style) -> StepProfile:
    sizes = block_sizes(step, style)
    return StepProfile(
        carry_bytes=plain.carry_bytes,
        residual_bytes=sizes.saved_bytes,
        x_bytes=nbytes(step.x),
        y_bytes=nbytes(step.y),
        param_bytes=plain.param_bytes,
        fixed_bytes=sizes.fixed_bytes + 10 * plain.carry_bytes + _COUNTERS_BYTES,
        copied_bytes=nbytes(_widened(step)),
        block_bytes=sizes.working_bytes,
        stacked_bytes=sizes.stacked_bytes,
        advance_bytes=sizes.advance_bytes,
        left_bytes=sizes.left_bytes,
        reread_bytes=sizes.reread_bytes,
        reread_ct_bytes=sizes.reread_ct_bytes,
        product_bytes=sizes.product_bytes,
        block_steps=sizes.most_steps,
        loop_bytes=2 * plain.loop_bytes // 3,
        plain=plain,
        times=_JOINED_TIMES if style.joined else _IN_TURN_TIMES if style.in_turn else _SWEEP_TIMES,
    )


def _measure_plain(step: FlatStep, operands: Arrays, carry: Arrays, xs: Arrays) -> StepProfile:
    known = _profiles.setdefault(step, {})
    key: tuple[Any, ...] = (platform(),)
    key += tuple((leaf.shape, leaf.dtype, str(explicit_sharding(leaf))) for leaf in (*operands, *carry))
    key += tuple((leaf.shape[1:], leaf.dtype, str(explicit_sharding(leaf))) for leaf in xs)
    if key not in known:
        known[key] = _measure(step, operands, carry, xs)
    return known[key]


def _measure(step: FlatStep, operands: Arrays, carry: Arrays, xs: Arrays) -> StepProfile:
    def kept(n: int) -> Arrays:
        types: Arrays = jax.eval_shape(functools.partial(_residuals, step, n), operands, carry, _of_length(n, xs))
        return types

    short, long = kept(_SHORT), kept(_LONG)
    params = [leaf for leaf in operands if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    stepwise = len(step.jaxpr.jaxpr.outvars) + len(xs)
    by_length = [leaf for leaf, other in zip(short, long, strict=True) if leaf.shape != other.shape]
    once = [leaf for leaf, other in zip(short, long, strict=True) if leaf.shape == other.shape]
    residual_bytes = (nbytes(by_length) + narrowing_bytes(by_length)) // _SHORT
    # The backward of one step works on cotangents of its residuals and of both its carries, whatever is kept.
    working_bytes = residual_bytes + 2 * nbytes(carry) + _COUNTERS_BYTES
    fixed_bytes = nbytes(once) + narrowing_bytes(once) + working_bytes
    return StepProfile(
        carry_bytes=nbytes(carry) + narrowing_bytes(carry),
        residual_bytes=residual_bytes,
        x_bytes=_narrow_bytes(step.x),
        y_bytes=_narrow_bytes(step.y),
        param_bytes=nbytes(params),
        fixed_bytes=fixed_bytes,
        copied_bytes=nbytes(_widened(step)) + nbytes(_shared(step)),
        nest_copied_bytes=nbytes(with_unit_axes(step)),
        loop_bytes=3 * (_LOOP_BYTES + _BY_ARRAY * stepwise + _BY_PARAM * len(params)) // 2,
    )


def _widened(step: FlatStep) -> Arrays:
    """The leaves of x and y of which XLA keeps the whole in another type."""
    return [leaf for leaf in (*step.x, *step.y) if widened(leaf)]


def _shared(step: FlatStep) -> Arrays:
    """The types that both x and y have, of which XLA makes zeros for two loops in an array of its own.

    Results are written into them. Where the backward loop waits for carries of the forward one, one of the two is
    written into that array itself (CPU, JAX 0.10).
    """
    in_x = {(leaf.shape, leaf.dtype) for leaf in step.x if is_float(leaf)}
    found = {(leaf.shape, leaf.dtype): leaf for leaf in step.y if (leaf.shape, leaf.dtype) in in_x}
    return list(found.values()) if found and not _backward_reads_carry(step) else []


def _backward_reads_carry(step: FlatStep) -> bool:
    def residuals(*leaves: Any) -> Arrays:
        operands, carry = leaves[: step.n_operands], leaves[step.n_operands :]
        _, vjp = jax.vjp(step, operands, carry[: step.n_carry], carry[step.n_carry :])
        return jax.tree.leaves(vjp)

    flat = inline(jax.make_jaxpr(residuals)(*step.jaxpr.in_avals)).jaxpr
    read = read_by(needed(flat.eqns, flat.outvars), flat.outvars)
    return any(v in read for v in flat.invars[step.n_operands :][: step.n_carry])


def told_apart_by(step: FlatStep) -> Any:
    """Equal for steps that are compiled to equal programs.

    Rules of the user's own are printed by their names, and closures have the same one; so the equations of their
    gradient are added.
    """
    text = str(step.jaxpr)
    if not has_own_gradient(step.jaxpr.jaxpr):
        return text

    def gradient(*leaves: Any) -> Any:
        def run(given: Arrays) -> Arrays:
            return floats(core.jaxpr_as_fun(step.jaxpr)(*with_floats(leaves, given)))

        outs, vjp = jax.vjp(run, floats(leaves))
        return vjp(outs)

    try:
        return text, str(jax.make_jaxpr(gradient)(*step.jaxpr.in_avals))
    except (TypeError, ValueError, NotImplementedError):  # there is no reverse-mode derivative
        return step


def _narrow_bytes(leaves: Arrays) -> int:
    """As the leaves are handed in: where XLA widens them, it slices what it has copied."""
    return sum(type_bytes(leaf) // (2 if widened(leaf) else 1) for leaf in leaves)


def _of_length(n: int, xs: Arrays) -> Arrays:
    """The types of n steps' inputs. By slicing where there is something to slice: sharding comes along."""
    return [
        jax.eval_shape(lambda leaf: lax.broadcast(leaf[0], (n,)), leaf)
        if leaf.shape[0]
        else jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype)
        for leaf in xs
    ]


def _residuals(step: FlatStep, n: int, operands: Arrays, carry: Arrays, xs: Arrays) -> Arrays:
    """What the vjp of n steps keeps beyond its arguments."""
    _, vjp = jax.vjp(lower(Steps(n), step), operands, carry, xs)
    arguments = {id(leaf) for leaf in (*operands, *carry, *xs)}
    return [leaf for leaf in jax.tree.leaves(vjp) if id(leaf) not in arguments]


def nbytes(leaves: Arrays) -> int:
    """Bytes of all the leaves."""
    return sum(map(type_bytes, leaves))
