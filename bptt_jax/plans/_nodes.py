"""The plan language: four nodes to say which values a backward pass keeps, where, and which it recomputes.

A plan is data: frozen, hashable, comparable, without callables or arrays. It reads as a tree and is a DAG in memory,
because equal parts may be one object: a plan for a million steps has some hundred nodes. Each node therefore stores
its length and its hash, computed from its children's. The pure interpreters of plans visit each distinct node once
and do not recurse (`fold`). Lowering a plan and printing its `repr` do recurse; compiled plans are small.

Reference: the policies of Gruslys et al. (2016), section 3, as a tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

from bptt_jax.errors import as_count

T = TypeVar("T")
Memory = Literal["device", "host"]


class Plan:
    """The common base of the four nodes. Not to be instantiated.

    >>> isinstance(Repeat(2, Remat(Steps(3))), Plan)
    True
    """

    _length: int
    _hash: int
    _uses_host: bool

    def _remember(self, length: int, *identity: int) -> None:
        # Set once in __post_init__, through object's setter because the nodes are frozen. All are derived from the
        # fields; they are stored because recomputing them on a DAG takes time proportional to the unrolled tree.
        object.__setattr__(self, "_length", length)
        object.__setattr__(self, "_hash", hash(identity))
        on_host = self._memory == "host" or any(child._uses_host for child in self._children)
        object.__setattr__(self, "_uses_host", on_host)

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
            if a._size != b._size or a._memory != b._memory or len(a._children) != len(b._children):
                return False
            todo.extend(zip(a._children, b._children, strict=True))
        return True

    @property
    def _size(self) -> int:
        """The number of a node (`n` or `k`, else 0): nodes of one kind with equal children differ in it alone."""
        return 0

    @property
    def _memory(self) -> Memory:
        """Where a loop keeps the values of its children."""
        return "device"

    @property
    def _children(self) -> tuple[Plan, ...]:
        return ()


def require_plan(child: Any, what: str) -> None:
    if not isinstance(child, Plan):
        raise TypeError(f"{what} must be a plan (Steps, Repeat, Chain or Remat), got {child!r}.")


def _require_on_device(child: Plan, parent: str) -> None:
    if child._uses_host:
        raise ValueError(
            f'{parent}.child has a loop with kept="host", but only outermost loops keep values on the host: the plan '
            "itself, or a part of a Chain."
        )


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

    Attributes:
      k: the number of children.
      child: the plan of each.
      kept: the memory for these values: "device", or "host", the host's memory. Only outermost loops keep values on
        the host, because inner ones keep theirs for a short time.

    >>> length(Repeat(40, Remat(Steps(25))))
    1000
    >>> Repeat(40, Remat(Steps(25)), kept="host")
    Repeat(k=40, child=Remat(child=Steps(n=25)), kept='host')
    """

    k: int
    child: Plan
    kept: Memory = "device"

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", as_count(self.k, 1, "Repeat.k"))
        require_plan(self.child, "Repeat.child")
        if self.kept not in ("device", "host"):
            raise ValueError(f'Repeat.kept must be "device" or "host", got {self.kept!r}.')
        _require_on_device(self.child, "Repeat")
        self._remember(self.k * self.child._length, 2, self.k, hash(self.child), self.kept == "host")

    def __repr__(self) -> str:
        return brief(self)  # without `kept` where it is the default, because nearly all loops have it

    @property
    def _memory(self) -> Memory:
        return self.kept

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
        _require_on_device(self.child, "Remat")
        self._remember(self.child._length, 4, hash(self.child))

    @property
    def _children(self) -> tuple[Plan, ...]:
        return (self.child,)


def brief(record: Any) -> str:
    """The `repr` of a dataclass without the fields that have their default.

    >>> brief(Repeat(2, Steps(3)))
    'Repeat(k=2, child=Steps(n=3))'
    """
    fields = [(f.name, getattr(record, f.name), f.default) for f in dataclasses.fields(record)]
    given = [f"{name}={value!r}" for name, value, usual in fields if value != usual]
    return f"{type(record).__name__}({', '.join(given)})"


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
