"""The recursion over a plan that both ways to run it share: what each node keeps, and what it holds at its highest."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

from bptt_jax.plans._nodes import Chain, Plan, Remat, Repeat, Steps, fold


@dataclasses.dataclass(frozen=True)
class NodeCost:
    """Of one node: bytes kept for its backward, bytes at their highest, and copies of the step's loop."""

    kept: int
    peak: int
    leaves: int = 1


class Rules(abc.ABC):
    """Rules of cost for one way to run plans. With h the bytes of a carry and s those of a step's residuals,

        kept(Steps n) = n·s   kept(Repeat k c) = k·kept(c)   kept(Chain cs) = Σ kept(c)   kept(Remat c) = h
        peak(Remat c) = h + peak(c)     peak(Repeat k c) = (k−1)·kept(c) + peak(c) + beside(c)

    The subclasses say what blocks and chains take, and what a loop takes beside its child.
    """

    carry_bytes: int
    residual_bytes: int

    def total(self, plan: Plan) -> NodeCost:
        """The cost of a whole plan."""
        return fold(plan, self._node)

    def _node(self, node: Plan, children: Sequence[NodeCost]) -> NodeCost:
        match node:
            case Steps(n):
                return NodeCost(n * self.residual_bytes, self.block(n))
            case Remat():
                (c,) = children
                return NodeCost(self.carry_bytes, self.carry_bytes + c.peak, c.leaves)
            case Repeat(k, child):
                (c,) = children
                peak = (k - 1) * c.kept + c.peak + self.beside(child, c, k)
                return NodeCost(k * c.kept, peak, c.leaves)
            case Chain((_,)):
                return children[0]
            case Chain():
                return self.chain(node, children)
        raise TypeError(f"not a plan node: {node!r}")

    @abc.abstractmethod
    def peak_bytes(self, plan: Plan, total: NodeCost) -> int:
        """Bytes of a whole plan, with what is there in any case."""

    @abc.abstractmethod
    def block(self, n: int) -> int:
        """Bytes of n steps at their highest."""

    @abc.abstractmethod
    def beside(self, child: Plan, cost: NodeCost, k: int) -> int:
        """Bytes that a loop over k children takes beside them while it works on one."""

    @abc.abstractmethod
    def chain(self, chain: Chain, children: Sequence[NodeCost]) -> NodeCost:
        """The cost of two children or more, one after another."""


def joined(children: Sequence[NodeCost], extra_bytes: int) -> NodeCost:
    """Children one after another, each held while those after it are worked on: the textbook's rule for a chain."""
    kept = peak = 0
    for c in children:
        peak = max(peak, kept + c.peak)
        kept += c.kept
    return NodeCost(kept, peak + extra_bytes, sum(c.leaves for c in children))
