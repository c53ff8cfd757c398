"""The bytes of a block of steps, and a summary of its work, from the types of a step's variables."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from bptt_jax._jaxprs.equations import variables
from bptt_jax._step.packing import Packing
from bptt_jax._step.style import Style
from bptt_jax._step.taps import is_large
from bptt_jax._step.vjp import StepVjp
from bptt_jax._trace.call import select


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Bytes of a block's arrays.

    Attributes:
      saved_bytes: the residuals of one step.
      working_bytes: further arrays for one step of the block being worked on.
      operand_bytes: the part of saved_bytes read by the products at the end of a block. With `Style.in_turn`, also a
        copy: half of the operands of the largest product.
      product_bytes: the results of these products, for a whole block.
      fixed_bytes: arrays of the whole scan, whatever the length of its blocks.
      most_steps: the length of the longest block.
    """

    saved_bytes: int
    working_bytes: int
    operand_bytes: int
    product_bytes: int
    fixed_bytes: int
    most_steps: int


def block_sizes(vjp: StepVjp, style: Style) -> BlockSizes:
    """The sizes of a step's block, from the types of its variables."""
    parts, machine = vjp.parts, vjp.parts.machine
    bytes_of = machine.bytes_of
    x, y = parts.x, parts.jaxpr.outvars[parts.n_carry :]
    # Forward and backward loops run one after the other, so the larger one counts.
    forward = bytes_of(parts.features) + bytes_of(x) + bytes_of(y)
    of_cotangents = bytes_of(select(x, parts.active.x)) + bytes_of(select(y, parts.active.y))
    backward = bytes_of(vjp.pull.stacked) + bytes_of(x) + of_cotangents
    derived = parts.constants[parts.n_operands :]
    sums = 0 if parts.moves_only else bytes_of(parts.differentiable.intersection(derived))
    operands = bytes_of({v for v in vjp.lefts if v in vjp.saved})
    tapped = variables(parts.constants[tap.const] for tap in vjp.taps)
    products = bytes_of(variables([*tapped, *parts.feature_constants]))
    in_turn = alternating(vjp) if style.in_turn else {}
    if in_turn:
        # One of these results exists at a time, so only the largest counts.
        products -= bytes_of(in_turn) - max(bytes_of([weight]) for weight in in_turn)
        operands += max(in_turn.values()) // 2  # a copy of the half being worked on
    saved_bytes, working_bytes = bytes_of(vjp.saved), max(forward, backward)
    saved_bytes += machine.narrowing_bytes(atom.aval for atom in vjp.saved)
    return BlockSizes(
        saved_bytes=saved_bytes,
        working_bytes=working_bytes,
        operand_bytes=operands,
        product_bytes=products,
        fixed_bytes=bytes_of(derived) + sums,
        most_steps=machine.block_steps(saved_bytes + working_bytes, products),
    )


def alternating(vjp: StepVjp) -> dict[Any, int]:
    """The weights with gradients to take in turn, and the bytes of both operands of their products, for one step."""
    bytes_of, found = vjp.parts.machine.bytes_of, dict[Any, int]()
    for tap, left, ct in zip(vjp.taps, vjp.lefts, vjp.pull.ct_taps, strict=True):
        weight = vjp.parts.constants[tap.const]
        if left is not None and ct is not None and is_large(weight.aval):
            found[weight] = max(found.get(weight, 0), bytes_of([left, ct]))
    return found


@dataclasses.dataclass(frozen=True)
class BlockSummary:
    """The work of a block and of its loop, for people to read: weights as "float32[256, 1024]".

    Attributes:
      hoisted: weights of products evaluated for a block at once.
      deferred: weights, and terms of sums, with gradients computed for a block at once.
      in_loop: other constants, with gradients summed step by step.
      merged: whether products with a common operand run as one.
      in_turn: whether the products at the end of a block run one after another.
      ahead: whether products of x are read a step ahead, where nothing is kept.
      saved, arrays: the values that a step saves, and the arrays in which they are written.
    """

    hoisted: tuple[str, ...]
    deferred: tuple[str, ...]
    in_loop: tuple[str, ...]
    merged: bool
    in_turn: bool
    ahead: bool
    saved: int
    arrays: int


def summary(vjp: StepVjp, style: Style) -> BlockSummary:
    """The decisions taken for a step."""
    parts = vjp.parts

    def names(variables: Sequence[Any]) -> tuple[str, ...]:
        counts = collections.Counter(f"{v.aval.dtype}{list(v.aval.shape)}" for v in variables)
        return tuple(name if count == 1 else f"{count} of {name}" for name, count in counts.items())

    return BlockSummary(
        hoisted=names(parts.feature_constants),
        deferred=names([parts.constants[tap.const] for tap in vjp.taps]),
        in_loop=names([parts.constants[i] for i in vjp.in_loop]),
        in_turn=style.in_turn,
        merged=style.merged,
        ahead=parts.reads_ahead,
        saved=len(vjp.saved),
        arrays=Packing(vjp).n_arrays,
    )
