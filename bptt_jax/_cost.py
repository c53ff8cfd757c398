"""What a plan costs in bytes, in evaluations of the step, and in size of the compiled program.

Bytes follow the *lowered* accounting: every level of the tree holds its own copy of what it keeps, as XLA does. With
h the bytes of a carry and s those of one step's residuals,

    kept(Steps n) = n·s    kept(Repeat k c) = k·kept(c)    kept(Chain cs) = Σ kept(c)    kept(Remat c) = h
    peak(Steps n) = n·s    peak(Remat c) = h + peak(c)     peak(Repeat k c) = (k−1)·kept(c) + peak(c) + loop(c)
    peak(Chain c1..cr) = max_i ( Σ_{j<i} kept(cj) + peak(ci) ) + parts(c1..cr)

Two terms come on top of the textbook recursion, because the plan is lowered to nested scans over slices:

* loop: while one child of a `Repeat` is worked on, its own xs, cotangents of xs and cotangents of ys exist, and its
  own sum of parameter gradients;
* parts: a `Chain` cuts xs and the cotangents of ys into parts, joins ys and the cotangents of xs from parts, and adds
  up the parameter gradients of its children.

Both vanish for a step without xs, ys and parameters. For nested loops the peak is within 4 % of what XLA reports; for a
`Chain` it is above it, by some per cent, inside a loop by up to half (CPU; tests/test_bytes.py holds it).

That is the nest. The sweep (`profile.plain` is not None) indexes one xs and sums gradients once, so it has neither
term. Instead, a block holds block_bytes for each of its steps while it is worked on, and long `Steps` are cut into
blocks; a loop over children that are not rematerialised works on a copy of what one of them keeps:

    peak(Steps n) = n·block_bytes + max(n·s + some of product_bytes, n·left_bytes + product_bytes)
    peak(Repeat k c) = k·kept(c) + peak(c) + what a block reads twice, for its products too    c not a Remat
    peak(Chain cs) = the textbook's + h + a sum of parameter gradients (+ what the last child keeps, where another child
                     is not a loop over rematerialised ones; at least what a last block takes at its fixed place)

Where blocks were measured (`profile.block_peaks`), peak(Steps n) is what XLA reports. For all loops of a plan but one
there are `profile.loop_bytes`, of either lowering, and `profile.margin` comes on top.

XLA starts the recomputation of bare `Remat` siblings early, so a `Chain` that is not in normal form (loops over
rematerialised children, then one last child that is not rematerialised) is charged the sum of its children's peaks.

Recursions: Gruslys et al. (2016), eq. 1 to 4, with a tree in place of a table. Time is linear in the distinct nodes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

from bptt_jax._plan import (
    Chain,
    Plan,
    Remat,
    Repeat,
    Steps,
    _require_plan,
    fold,
    in_blocks,
    is_normal_chain,
    is_rematerialised_loop,
    length,
    longest_leaf,
    runs_single_steps,
)
from bptt_jax._step_profile import StepProfile
from bptt_jax._time import evaluations


@dataclasses.dataclass(frozen=True)
class PlanCost:
    """The cost of a plan.

    Attributes:
      peak_bytes: temporary bytes of the backward pass at their highest.
      forward_steps: evaluations of the step, first pass and recording ones included. The backward evaluations, one
        per step, are not in it.
      program_size: copies of the step's loop in the plan; compile time grows with it, not with the length.

    >>> taken = cost(Steps(10), StepProfile(carry_bytes=4, residual_bytes=8))
    >>> taken.peak_bytes, taken.forward_steps, taken.program_size
    (80, 10, 1)
    """

    peak_bytes: int
    forward_steps: int
    program_size: int


class Sizes(Protocol):
    """What copies and sums are made of: of a `StepProfile`, or of a planner's lattice."""

    @property
    def x_bytes(self) -> int: ...

    @property
    def y_bytes(self) -> int: ...

    @property
    def param_bytes(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class _NodeCost:
    kept: int
    peak: int
    leaves: int
    loops: int = 0


def _require_profile(profile: Any) -> None:
    if not isinstance(profile, StepProfile):
        raise TypeError(f"the profile must be a StepProfile, as bptt_jax.profile measures one, got {profile!r}.")


def cost(plan: Plan, profile: StepProfile) -> PlanCost:
    """The cost of running `plan` on a step of this profile.

    Args:
      plan: a plan of any length.
      profile: sizes of one step in bytes, measured by `bptt_jax.profile` or given by hand.

    >>> profile = StepProfile(carry_bytes=2, residual_bytes=12)
    >>> cost(Repeat(40, Remat(Steps(25))), profile)
    PlanCost(peak_bytes=380, forward_steps=2000, program_size=1)

    Raises:
      TypeError: if `plan` is not a plan, or `profile` not a `StepProfile`.
    """
    _require_plan(plan, "the plan")
    _require_profile(profile)
    if profile.lowering == "sweep":
        plan = in_blocks(plan, profile.block_steps)
    total = fold(plan, lambda node, children: _node_cost(node, children, profile))
    always_bytes = profile.fixed_bytes + (profile.param_bytes if profile.lowering == "nested" else 0)
    copied_bytes = profile.copied_bytes + (0 if runs_single_steps(plan) else profile.nest_copied_bytes)
    peak_bytes = total.peak + always_bytes + length(plan) * copied_bytes + max(total.loops - 1, 0) * profile.loop_bytes
    if profile.lowering == "sweep" and total.leaves > _FEW_BODIES:
        peak_bytes += peak_bytes // 8
    peak_bytes = profile.with_margin(peak_bytes)
    return PlanCost(peak_bytes, evaluations(plan, profile.lowering).steps, total.leaves)


# In the sweep: a nest, and a rest that is cut into equal blocks and another one. The buffers of more bodies fit into
# each other less well: an eighth was seen with eight.
_FEW_BODIES = 3


def _node_cost(node: Plan, children: Sequence[_NodeCost], profile: StepProfile) -> _NodeCost:
    match node:
        case Steps(n):
            kept = n * profile.residual_bytes
            return _NodeCost(kept, _block_peak(n, profile), leaves=1)
        case Remat():
            (c,) = children
            return _NodeCost(profile.carry_bytes, profile.carry_bytes + c.peak, c.leaves, c.loops)
        case Repeat(k, child):
            (c,) = children
            if profile.lowering == "nested":
                beside = child_bytes(length(child), profile)
            else:
                beside = 0 if isinstance(child, Remat) or k == 1 else c.kept + _again_bytes(child, profile)
            peak = (k - 1) * c.kept + c.peak + beside
            return _NodeCost(k * c.kept, peak, c.leaves, c.loops + 1)
        case Chain((_,)):
            return children[0]
        case Chain():
            return _chain_cost(node, children, profile)
    raise TypeError(f"not a plan node: {node!r}")


def _again_bytes(child: Plan, profile: StepProfile) -> int:
    """Of blocks in a row, beside a copy of what one keeps, which its loop reads: what products at its end read as well.

    Cotangents of ys, which no block keeps, are there once more while the products run, which leave room for them in
    long blocks: there the loop takes more.
    """
    if not isinstance(child, Steps):
        return 0
    return child.n * profile.reread_bytes + min(child.n * profile.reread_ct_bytes, profile.product_bytes)


# How much of a block's residuals the products at its end find still in place: fitted to XLA (CPU), which frees them
# only as far as its buffers happen to fit.
_IN_PLACE = 0.55


def _block_peak(n: int, profile: StepProfile) -> int:
    """Bytes of a block, at their highest: as measured, or its residuals, or the products at its end."""
    if n == 0:
        return 0
    if profile.block_peaks:
        return _interpolated(n, profile)
    kept, products = n * profile.residual_bytes, profile.product_bytes
    at_end = n * profile.left_bytes + products
    return n * profile.block_bytes + max(kept + min(products, int(_IN_PLACE * kept)), at_end)


def _interpolated(n: int, profile: StepProfile) -> int:
    peaks = profile.block_peaks
    if n <= peaks[0][0]:
        return peaks[0][1]
    for (short, low), (long, high) in itertools.pairwise(peaks):
        if n <= long:
            return low - (low - high) * (n - short) // (long - short)
    longest, most = peaks[-1]
    return most + (n - longest) * (profile.residual_bytes + profile.block_bytes)


def _chain_cost(node: Chain, children: Sequence[_NodeCost], profile: StepProfile) -> _NodeCost:
    kept, peak = 0, 0
    for c in children:
        peak = max(peak, kept + c.peak)
        kept += c.kept
    if profile.lowering == "sweep":
        last, leaf = node.children[-1], max(map(longest_leaf, node.children[:-1]))
        at_rest = children[-1].peak
        if isinstance(last, Steps) and last.n:
            at_rest = max(at_rest, rest_bytes(last.n, leaf, profile)) + ahead_bytes(leaf, profile)
        peak = max(peak, kept - children[-1].kept + at_rest)
    if not (is_normal_chain(node) or (profile.lowering == "sweep" and _keeps_order(node))):
        peak = sum(c.peak for c in children)
    if profile.lowering == "sweep" and not all(is_rematerialised_loop(c) for c in node.children[:-1]):
        peak += children[-1].kept  # what the last child leaves free is too small for the blocks of the others
    loops = sum(c.loops for c in children)
    if profile.lowering == "nested":
        loops += len(children) - 2  # tables of the parts that each hands on
        parts = chain_bytes(length(node), length(node.children[-1]), profile, len(children))
    else:
        parts = chain_sums_bytes(profile)
    return _NodeCost(kept, peak + parts, sum(c.leaves for c in children), loops)


def _keeps_order(chain: Chain) -> bool:
    """Whether the sweep takes the children of `chain` one after another: none is a bare `Remat`."""
    return not any(isinstance(c, Remat) for c in chain.children)


def child_bytes(n: int, profile: StepProfile) -> int:
    """Bytes that a loop takes beside its children, each of n steps: its slices and its sum of parameter gradients."""
    sums = 1 if n > 1 else 0  # XLA inlines a child of one step, which then has no sum of its own
    return n * slice_bytes(profile) + sums * profile.param_bytes


def chain_bytes(n: int, last: int, profile: Sizes, children: int = 2) -> int:
    """Bytes that a `Chain` of n steps takes beside its children, the last of which has `last` steps.

    Its parts of xs, ys and cotangents of ys, the last child's xs and cotangents of xs, and the parameter gradients of
    each child but one, before they are added up.
    """
    return n * part_bytes(profile) + last * 2 * profile.x_bytes + (children - 1) * profile.param_bytes


def chain_sums_bytes(profile: StepProfile) -> int:
    """Bytes that a `Chain` takes in the sweep: what is handed from child to child, a carry and the gradients so far.

    XLA holds the gradients in place; where blocks have been measured nothing is added for them.
    """
    return profile.carry_bytes + (0 if profile.block_peaks else profile.param_bytes)


def rest_bytes(n: int, leaf: int, profile: StepProfile) -> int:
    """Bytes that n steps take in the sweep while they are worked on as the last block, beside loops over `leaf` steps.

    It records and reads at fixed places, for which XLA makes room before the first loop runs and until the block is
    done: residuals, cotangents, x, and cotangents of ys, and x or these once more where they have time elsewhere. And a
    block of the loops is advanced meanwhile, beside the sums of gradients.
    """
    if n == 0:
        return 0
    by_step = profile.residual_bytes + profile.stacked_bytes + profile.x_bytes + profile.y_bytes
    by_step += profile.moved_bytes
    return n * by_step + leaf * profile.advance_bytes + _sums_bytes(profile)


def ahead_bytes(leaf: int, profile: StepProfile) -> int:
    """Inputs of a block of `leaf` steps of the loops that are there beside a last block."""
    return leaf * profile.ahead_bytes


def _sums_bytes(profile: StepProfile) -> int:
    """Of the shortest block that was measured, what its steps do not take: sums of gradients, and products."""
    if not profile.block_peaks:
        return 0
    n, peak = profile.block_peaks[0]
    return max(peak - n * (profile.residual_bytes + profile.block_bytes), 0)


def slice_bytes(profile: Sizes) -> int:
    """Bytes that a loop copies for each step of a child."""
    return 2 * profile.x_bytes + profile.y_bytes


def part_bytes(profile: Sizes) -> int:
    """Bytes that a `Chain` copies for each of its steps."""
    return profile.x_bytes + 2 * profile.y_bytes
