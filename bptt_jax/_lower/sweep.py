"""The sweep: a scan whose backward walks the plan's tree with loops of static length.

    forward    run through the plan once, keeping the carries (and residuals) it names
    backward   take the nodes from the last to the first; for a `Remat`, run forward again from its carry, keep the
               carries (and residuals) named by its child, then go back through the child

There is one xs, one ys and one dxs; blocks read and write at an index, so no level of the tree holds copies. Gradients
of the constants are one running sum, of each device by itself where possible (`partial_sums`). Steps that are only
advanced are never linearised. A recomputed node does not advance its last child, because nobody reads the carry after
it.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

from bptt_jax._jaxprs.arrays import zeros_like
from bptt_jax._lower.block import Block
from bptt_jax._lower.late import late_zero, late_zeros
from bptt_jax._lower.partial_sums import summed, unreduced
from bptt_jax._lower.walk import Backward, Forward
from bptt_jax._progress.report import SILENT, Pass
from bptt_jax._step.form import Swept
from bptt_jax._trace.call import Arrays, Mask, ScanCall, replace, select
from bptt_jax.plans._blocks import in_blocks
from bptt_jax.plans._nodes import Chain, Plan, Remat, Repeat, Steps


class Sweep:
    """A plan run by the sweep.

    Args:
      call: the scan.
      wrt: the inputs to differentiate, among the active ones.
      plan: the plan.
      swept: the step.
      waits: whether gradients may wait to be summed over devices (see `partial_sums`).
    """

    def __init__(self, call: ScanCall, wrt: Mask, plan: Plan, swept: Swept, waits: bool = True):
        self._call = call
        self._plan = in_blocks(plan, swept.sizes.most_steps)
        # The first pass has the callbacks for debugging, and steps evaluated again have none.
        again = swept if call.options.show_recomputation else swept.quiet
        self._first = Block(swept, call, waits)
        self._again = self._first if again is swept else Block(again, call, waits)
        self._active = swept.parts.active
        self._wanted = call.step.split(wrt)[1]
        self._n_saved = self._again.packing.n_arrays

    def forward(self, inputs: Arrays) -> tuple[list[Any], list[Any]]:
        """(last carry and ys, the arrays kept for `backward`)."""
        progress = self._call.reporting("forward")
        walk, carry = self._walk(inputs, self._first, progress)
        last, ys, saved = walk.record(self._plan, 0, carry, walk.no_ys(carry))
        progress.end([*last, *(ys or [])])
        return [*last, *(ys or [])], jax.tree.leaves(saved)

    def kept(self, inputs: Arrays) -> list[Any]:
        """The second result of `forward`, evaluated again: without room for ys, and without callbacks."""
        walk, carry = self._walk(inputs, self._again)
        return jax.tree.leaves(walk.record(self._plan, 0, carry, None)[2])

    def _walk(self, inputs: Arrays, block: Block, progress: Pass = SILENT) -> tuple[Forward, list[Any]]:
        operands, carry, xs = self._call.step.split(inputs)
        constants = block.constants(block.hoist(operands))
        return Forward(block, self._call, constants, xs, self._call.lengths_of(inputs), progress), list(carry)

    def backward(self, inputs: Arrays, saved: Arrays, cotangents: Arrays) -> list[Any]:
        """The gradients of the differentiated inputs; None where one is zero.

        Args:
          inputs: the scan's inputs.
          saved: as returned by `forward`.
          cotangents: of the active leaves of the last carry and of ys; None where they are zero.
        """
        operands, carry, xs = self._call.step.split(inputs)
        active, block = self._active, self._again
        ct_last, ct_ys = cotangents[: sum(active.carry)], cotangents[sum(active.carry) :]
        pull = block.pull(*(tuple(ct is not None for ct in cts) for cts in (ct_last, ct_ys)))
        y_axes = [along.axis for along in select(self._call.y_along, active.y)]
        ys = [(ct, axis) for ct, axis in zip(ct_ys, y_axes, strict=True) if ct is not None and ct.size]
        zero = late_zero(ct_last, [lax.index_in_dim(ct, 0, axis) for ct, axis in ys])
        # A leaf of the carry may get cotangents from earlier steps only: it starts with zeros then.
        carried = [v is not None for v in pull.ct_new]
        like = select(select(carry, active.carry), carried)
        ct_carry = [zeros_like(a) if ct is None else ct for a, ct in zip(like, select(ct_last, carried), strict=True)]
        given = [ct for ct in ct_ys if ct is not None]
        hoisted, waiting = block.hoist(operands), block.partial_axes
        zeros = {i: late_zeros(hoisted[i], zero) for i in block.differentiable_positions}
        gradients = unreduced(zeros, waiting, [*hoisted, *carry, *xs, *ct_carry, *given])
        with_cotangents = select(select(xs, active.x), block.x_with_cotangents(pull))
        ct_xs = [late_zeros(leaf, zero) for leaf in with_cotangents]
        lengths = self._call.lengths_of(inputs)
        walk = Backward(block, self._call, pull, block.weights(hoisted), xs, given, lengths)
        kept, _ = _unflatten(self._plan, list(saved), len(carry), self._n_saved)
        ct_carry, ct_xs, gradients = walk.back(self._plan, 0, kept, (ct_carry, ct_xs, gradients))
        self._call.reporting("backward").end([*ct_carry, *ct_xs, *gradients.values()])
        gradients = summed(gradients, hoisted, waiting)
        all_carry = replace([None] * len(carried), carried, ct_carry)
        all_xs = replace([None] * sum(active.x), block.x_with_cotangents(pull), ct_xs)
        of_carry = select(all_carry, select(self._wanted, active.carry))
        return [*block.of_operands(gradients, operands), *of_carry, *all_xs]


def _unflatten(plan: Plan, saved: list[Any], n_carry: int, n_saved: int) -> tuple[Any, list[Any]]:
    """The kept leaves of a plan in the structure of `Forward.record`, and the leaves left over."""
    match plan:
        case Steps(0):
            return (), saved
        case Steps():
            return saved[:n_saved], saved[n_saved:]
        case Remat():
            return saved[:n_carry], saved[n_carry:]
        case Repeat(k, child, kept="host") if k > 1:
            stack, saved = _unflatten(child, saved, n_carry, n_saved)
            last, saved = _unflatten(child, saved, n_carry, n_saved)
            return [stack, last], saved
        case Repeat(_, child):  # a loop stacks the leaves of its child
            return _unflatten(child, saved, n_carry, n_saved)
        case Chain(children):
            kept = []
            for child in children:
                of_child, saved = _unflatten(child, saved, n_carry, n_saved)
                kept.append(of_child)
            return kept, saved
    raise TypeError(f"not a plan node: {plan!r}")
