"""Plans as the sweep runs them: long `Steps` in blocks, and loops of several steps an iteration."""

from __future__ import annotations

from collections.abc import Sequence

from bptt_jax.plans._nodes import Chain, Plan, Remat, Repeat, Steps, fold


def in_blocks(plan: Plan, most_steps: int) -> Plan:
    """The same plan with each `Steps` of more than `most_steps` steps cut into a loop over shorter blocks.

    The kept values stay the same. Blocks are equal where the length has a divisor between half of `most_steps` and
    `most_steps`. Otherwise a shorter block comes last, with fewer steps than the loop has iterations.

    >>> in_blocks(Steps(100), 48), in_blocks(Steps(97), 48)
    (Repeat(k=4, child=Steps(n=25)), Chain(children=(Repeat(k=3, child=Steps(n=32)), Steps(n=1))))
    """
    return fold(plan, lambda node, children: _in_blocks(node, children, most_steps))


def _in_blocks(node: Plan, children: Sequence[Plan], most_steps: int) -> Plan:
    match node:
        case Steps(n) if n > most_steps:
            # Equal blocks are one body to compile, a remainder is a second one.
            equal = next((b for b in range(most_steps, max(most_steps // 2, 1) - 1, -1) if n % b == 0), None)
            if equal is not None:
                return Repeat(n // equal, Steps(equal))
            loops = -(-n // most_steps)
            return Chain((Repeat(loops, Steps(n // loops)), Steps(n % loops)))
        case Repeat(k, _, kept):
            return Repeat(k, children[0], kept)
        case Chain():
            return Chain(tuple(children))
        case Remat():
            return Remat(children[0])
    return node


def steps_together(n: int, most: int) -> int:
    """The steps in each iteration of a loop over n steps, all iterations alike: about `most`.

    A loop with a remainder would copy its arrays. So of the divisors of n, `most` is taken, else one more, else the
    largest below.

    >>> steps_together(40, 4), steps_together(25, 4), steps_together(27, 4), steps_together(29, 4)
    (4, 5, 3, 1)
    """
    if most <= 1:
        return 1
    return next((k for k in (most, most + 1, *range(most - 1, 1, -1)) if n % k == 0 and n), 1)


def leaf_lengths(plan: Plan) -> frozenset[int]:
    """The lengths of the `Steps` of a plan, without empty ones.

    >>> sorted(leaf_lengths(Chain((Repeat(3, Remat(Steps(25))), Steps(10)))))
    [10, 25]
    """

    def lengths(node: Plan, children: Sequence[frozenset[int]]) -> frozenset[int]:
        own: frozenset[int] = frozenset([node.n] if isinstance(node, Steps) and node.n else [])
        return own.union(*children)

    return fold(plan, lengths)
