"""The recursion of cost over a plan, shared by the nest and the sweep: kept bytes and peak bytes of each node."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

from bptt_jax.plans._nodes import Chain, Plan, Remat, Repeat, Steps, fold


@dataclasses.dataclass(frozen=True)
class NodeCost:
    """The cost of one node: bytes kept for its backward, peak bytes, copies of the step's loop, bytes on the host."""

    kept: int
    peak: int
    leaves: int = 1
    host: int = 0


class Rules(abc.ABC):
    """Rules of cost for one way to run plans. With h the bytes of a carry and s the bytes of a step's residuals,

        kept(Steps n) = n·s   kept(Repeat k c) = k·kept(c)   kept(Chain cs) = Σ kept(c)   kept(Remat c) = h
        peak(Remat c) = h + peak(c)     peak(Repeat k c) = (k−1)·kept(c) + peak(c) + beside(c)

    A loop with its values on the host keeps those of its last child on the device, and reads those of the child before
    while a child is worked on:

        kept(Repeat k c) = kept(c)      peak(Repeat k c) = kept(c) + peak(c)      host(Repeat k c) = k·kept(c)

    The subclasses add the peaks of blocks and of chains, and the bytes of a loop beside its child.
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
            case Repeat(k, _, kept="host") if k > 1:
                (c,) = children
                return NodeCost(c.kept, c.kept + c.peak, c.leaves, k * c.kept)
            case Repeat(k, child):
                (c,) = children
                # A scan frees nothing before its end, so the kept values of all other children are still there.
                peak = (k - 1) * c.kept + c.peak + self.beside(child, c, k)
                return NodeCost(k * c.kept, peak, c.leaves)
            case Chain((_,)):
                return children[0]
            case Chain():
                return self.chain(node, children)
        raise TypeError(f"not a plan node: {node!r}")

    @abc.abstractmethod
    def peak_bytes(self, plan: Plan, total: NodeCost) -> int:
        """Peak bytes of a whole plan, with the bytes held under any plan."""

    @abc.abstractmethod
    def block(self, n: int) -> int:
        """Peak bytes of a block of n steps."""

    @abc.abstractmethod
    def beside(self, child: Plan, cost: NodeCost, k: int) -> int:
        """Bytes of a loop over k children beside the children, while one of them is worked on."""

    @abc.abstractmethod
    def chain(self, chain: Chain, children: Sequence[NodeCost]) -> NodeCost:
        """The cost of two or more children, one after another."""


def joined(children: Sequence[NodeCost], extra_bytes: int) -> NodeCost:
    """The textbook's cost of a chain: a child's kept values are held while the children after it are worked on."""
    kept = peak = 0
    for c in children:
        peak = max(peak, kept + c.peak)
        kept += c.kept
    return NodeCost(kept, peak + extra_bytes, sum(c.leaves for c in children), sum(c.host for c in children))
