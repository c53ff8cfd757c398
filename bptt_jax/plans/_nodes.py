"""The plan language: four nodes to say which values a backward pass keeps and which it recomputes.

A plan is data: frozen, hashable, comparable, without callables or arrays. It reads as a tree and is a DAG in memory,
because equal parts may be one object: a plan for a million steps has some hundred nodes. Each node therefore stores
its length and its hash, computed from its children's. The pure interpreters of plans visit each distinct node once
and do not recurse (`fold`). Lowering a plan and printing its `repr` do recurse; compiled plans are small.

Reference: the policies of Gruslys et al. (2016), section 3, as a tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from bptt_jax.errors import as_count

T = TypeVar("T")


class Plan:
    """The common base of the four nodes. Not to be instantiated.

    >>> isinstance(Repeat(2, Remat(Steps(3))), Plan)
    True
    """

    _length: int
    _hash: int

    def _remember(self, length: int, *identity: int) -> None:
        # Set once in __post_init__, through object's setter because the nodes are frozen. Both are derived from the
        # fields; they are stored because recomputing them on a DAG takes time proportional to the unrolled tree.
        object.__setattr__(self, "_length", length)
        object.__setattr__(self, "_hash", hash(identity))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        # An explicit stack, because a plan may be deeper than Python's. Each pair of nodes is compared once, because
        # the unrolled tree may be larger than memory.
        todo: list[tuple[object, object]] = [(self, other)]
        seen: set[tuple[int, int]] = set()
        while todo:
            a, b = todo.pop()
            if a is b or (id(a), id(b)) in seen:
                continue
            seen.add((id(a), id(b)))
            if not (isinstance(a, Plan) and isinstance(b, Plan) and type(a) is type(b) and a._hash == b._hash):
                return False
            if a._size != b._size or len(a._children) != len(b._children):
                return False
            todo.extend(zip(a._children, b._children, strict=True))
        return True

    @property
    def _size(self) -> int:
        """The number of a node (`n` or `k`, else 0): nodes of one kind with equal children differ in it alone."""
        return 0

    @property
    def _children(self) -> tuple[Plan, ...]:
        return ()


def require_plan(child: Any, what: str) -> None:
    if not isinstance(child, Plan):
        raise TypeError(f"{what} must be a plan (Steps, Repeat, Chain or Remat), got {child!r}.")


def _as_tuple(children: Any) -> tuple[Any, ...]:
    if isinstance(children, Iterable):
        return tuple(children)
    kind = type(children).__name__
    found = f"one {kind}" if isinstance(children, Plan) else f"{children!r} of type {kind}"
    raise TypeError(f"Chain.children must be a sequence of plans, got {found}; put them into a tuple: Chain((a, b)).")


@dataclasses.dataclass(frozen=True, eq=False)
class Steps(Plan):
    """`n` ≥ 0 steps in one loop; keeps the residuals of all of them.

    >>> Steps(25)
    Steps(n=25)
    """

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", as_count(self.n, 0, "Steps.n"))
        self._remember(self.n, 1, self.n)

    @property
    def _size(self) -> int:
        return self.n


@dataclasses.dataclass(frozen=True, eq=False)
class Repeat(Plan):
    """`k` ≥ 1 equal children in one loop, one after another; keeps the values that each child keeps.

    >>> length(Repeat(40, Remat(Steps(25))))
    1000
    """

    k: int
    child: Plan

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", as_count(self.k, 1, "Repeat.k"))
        require_plan(self.child, "Repeat.child")
        self._remember(self.k * self.child._length, 2, self.k, hash(self.child))

    @property
    def _size(self) -> int:
        return self.k

    @property
    def _children(self) -> tuple[Plan, ...]:
        return (self.child,)


@dataclasses.dataclass(frozen=True, eq=False)
class Chain(Plan):
    """Children one after another, in the order of the steps; keeps the values that its children keep.

    >>> length(Chain((Repeat(40, Remat(Steps(25))), Steps(9))))
    1009
    """

    children: tuple[Plan, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "children", _as_tuple(self.children))
        if not self.children:
            raise ValueError("Chain.children must have at least one plan, got none.")
        for child in self.children:
            require_plan(child, "each of Chain.children")
        self._remember(sum(c._length for c in self.children), 3, *map(hash, self.children))

    @property
    def _children(self) -> tuple[Plan, ...]:
        return self.children


@dataclasses.dataclass(frozen=True, eq=False)
class Remat(Plan):
    """A rematerialised child: only the carry entering it is kept; the rest is recomputed for its backward.

    >>> length(Remat(Steps(25)))
    25
    """

    child: Plan

    def __post_init__(self) -> None:
        require_plan(self.child, "Remat.child")
        self._remember(self.child._length, 4, hash(self.child))

    @property
    def _children(self) -> tuple[Plan, ...]:
        return (self.child,)


def length(plan: Plan) -> int:
    """The number of steps of a plan.

    >>> length(Chain((Steps(3), Steps(4))))
    7
    """
    require_plan(plan, "the argument of length")
    return plan._length


def runs_single_steps(plan: Plan) -> bool:
    """Whether a plan is `Steps`, or one `Repeat` whose child has a single step.

    XLA then takes xs and ys as they are, also with axes of length 1, because no slice of them has several steps.

    >>> runs_single_steps(Repeat(4, Remat(Steps(1)))), runs_single_steps(Repeat(4, Remat(Steps(2))))
    (True, False)
    """
    return isinstance(plan, Steps) or (isinstance(plan, Repeat) and length(plan.child) == 1)


def is_normal_chain(chain: Chain) -> bool:
    """Whether XLA frees each child of `chain` before the backward of the child before it.

    Measurements show this where every child but the last is a loop over at least two rematerialised children, and the
    last is not itself rematerialised. Elsewhere XLA starts the recomputation of siblings early: for example,
    `Chain((Remat(Steps(32)), Steps(32)))` takes 97 units of memory where the recursion of `cost` alone gives 33.

    >>> is_normal_chain(Chain((Repeat(2, Remat(Steps(8))), Steps(3))))
    True
    >>> is_normal_chain(Chain((Remat(Steps(8)), Steps(3))))
    False
    """
    *loops, last = chain.children
    return not isinstance(last, Remat) and all(map(is_rematerialised_loop, loops))


def is_rematerialised_loop(node: Plan) -> bool:
    """Whether a node is a loop over at least two rematerialised children."""
    return isinstance(node, Repeat) and node.k >= 2 and isinstance(node.child, Remat)


def fold(plan: Plan, visit: Callable[[Plan, Sequence[T]], T]) -> T:
    """The root's `visit(node, results of its children)`, from the leaves up, once for each distinct node object.

    Time and memory are linear in the distinct nodes, whatever the depth and the unrolled size.

    >>> fold(Repeat(3, Remat(Steps(5))), lambda node, depths: 1 + max(depths, default=0))
    3
    """
    done: dict[int, T] = {}
    todo: list[Plan] = [plan]
    while todo:
        node = todo[-1]
        waiting = [c for c in node._children if id(c) not in done]
        if waiting and id(node) not in done:
            todo.extend(waiting)
            continue
        todo.pop()
        # A node with several parents may have been put on the stack by each of them.
        if id(node) not in done:
            done[id(node)] = visit(node, [done[id(c)] for c in node._children])
    return done[id(plan)]


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
        case Repeat(k):
            return Repeat(k, children[0])
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
