"""What a block of steps takes, in bytes, and what it does where: from the types of a step's variables."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from bptt_jax._lower.block import rebuilding
from bptt_jax._lower.jaxprs import bytes_of, narrowing_bytes, read_by, variables
from bptt_jax._lower.roofline import block_steps
from bptt_jax._lower.split import split
from bptt_jax._lower.step_vjp import StepVjp, floats, step_vjp
from bptt_jax._lower.style import Style
from bptt_jax._lower.taps import is_large
from bptt_jax._step import FlatStep


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Bytes of a block's arrays.

    Attributes:
      saved_bytes: what a step's backward needs, for each step.
      working_bytes: what is held for each step of the block that is worked on, beside that.
      stacked_bytes: of these, the cotangents that leave the loop.
      advance_bytes: what is held for each step of a block that is only advanced.
      left_bytes: of saved_bytes, the operands of the products at the end of a block.
      reread_bytes: of left_bytes, what the loop over a block's steps reads as well.
      reread_ct_bytes: the cotangents of ys that both read, the products as they are.
      product_bytes: the results of these products.
      fixed_bytes: what is held however long the blocks are.
    """

    saved_bytes: int
    working_bytes: int
    stacked_bytes: int
    advance_bytes: int
    left_bytes: int
    reread_bytes: int
    reread_ct_bytes: int
    product_bytes: int
    fixed_bytes: int

    @property
    def most_steps(self) -> int:
        """The length of the longest block."""
        return block_steps(self.saved_bytes + self.working_bytes)


def block_sizes(step: FlatStep, style: Style) -> BlockSizes:
    """The sizes of a step's block, from the types of its variables."""
    parts = split(step, style.joined)
    vjp = step_vjp(parts)
    x, y = parts.x, parts.jaxpr.outvars[parts.n_carry :]
    forward = bytes_of(parts.features) + bytes_of(x) + bytes_of(y)
    stacked = bytes_of(vjp.pull.stacked)
    backward = stacked + bytes_of(x) + bytes_of(floats(x)) + bytes_of(floats(y))
    derived = parts.constants[parts.n_operands :]
    sums = 0 if parts.moves_only else bytes_of(parts.differentiable.intersection(derived))
    lefts = {v for v in vjp.lefts if v in vjp.saved}
    left = bytes_of(lefts)
    tapped = variables(parts.constants[tap.const] for tap in vjp.taps)
    products = bytes_of(variables([*tapped, *parts.feature_constants]))
    alternating = _alternating(vjp) if style.in_turn else {}
    if alternating:
        products -= bytes_of(alternating) - max(bytes_of([weight]) for weight in alternating)
        left += max(alternating.values()) // 2  # a copy of the half that is worked on
    return BlockSizes(
        saved_bytes=bytes_of(vjp.saved) + narrowing_bytes(atom.aval for atom in vjp.saved),
        working_bytes=max(forward, backward),
        stacked_bytes=stacked,
        advance_bytes=forward,
        left_bytes=left,
        reread_bytes=bytes_of(lefts & _read_in_loop(vjp)),
        reread_ct_bytes=bytes_of({*vjp.pull.ct_y} & {ct for ct in vjp.pull.ct_taps if ct is not None}),
        product_bytes=products,
        fixed_bytes=bytes_of(derived) + sums,
    )


def _read_in_loop(vjp: StepVjp) -> set[Any]:
    """What a step's backward reads of what is saved."""
    read = read_by(vjp.pull.eqns)
    residuals = [v for v, inside in zip(vjp.residuals, vjp.pull.residuals, strict=True) if inside in read]
    return {*variables(residuals), *read_by(rebuilding(vjp))}


def _alternating(vjp: StepVjp) -> dict[Any, int]:
    """The weights whose gradients can be taken in turn, with the bytes of what is multiplied for one step."""
    found: dict[Any, int] = {}
    for tap, left, ct in zip(vjp.taps, vjp.lefts, vjp.pull.ct_taps, strict=True):
        weight = vjp.parts.constants[tap.const]
        if left is not None and ct is not None and is_large(weight.aval):
            found[weight] = max(found.get(weight, 0), bytes_of([left, ct]))
    return found


def styles(step: FlatStep) -> list[Style]:
    """The styles that differ for a step, the fastest first and the one that holds least last."""
    apart, joined = split(step, False), split(step, True)
    found = [Style(joined=False)] if joined is apart else [Style(), Style(joined=False)]
    if len(_alternating(step_vjp(apart))) > 1:
        found.append(Style(joined=False, in_turn=True))
    return found


@dataclasses.dataclass(frozen=True)
class BlockSummary:
    """What is done where, for people to read: weights as "float32[256, 1024]".

    Attributes:
      hoisted: weights of products that are evaluated for a block at once.
      deferred: weights, and terms of sums, of which the gradients are computed for a block at once.
      in_loop: other constants, of which the gradients are summed step by step.
      merged: whether products that share an operand run as one.
      in_turn: whether the products at the end of a block run one after another.
    """

    hoisted: tuple[str, ...]
    deferred: tuple[str, ...]
    in_loop: tuple[str, ...]
    merged: bool
    in_turn: bool


def summary(step: FlatStep, style: Style) -> BlockSummary:
    """The decisions that were taken for a step."""
    parts = split(step, style.joined)
    vjp = step_vjp(parts)

    def names(variables: Sequence[Any]) -> tuple[str, ...]:
        counts = collections.Counter(f"{v.aval.dtype}{list(v.aval.shape)}" for v in variables)
        return tuple(name if count == 1 else f"{count} of {name}" for name, count in counts.items())

    return BlockSummary(
        hoisted=names(parts.feature_constants),
        deferred=names([parts.constants[tap.const] for tap in vjp.taps]),
        in_loop=names([parts.constants[i] for i in vjp.in_loop]),
        in_turn=style.in_turn,
        merged=style.joined and parts is not split(step, joined=False),
    )
