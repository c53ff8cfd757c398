"""What a search domain is: operations on values, tasks, a teacher, and tokens. Everything else builds on this file.

A *value* is a tuple with one entry per training example of a task, each hashable. A *primitive* is an operation of
programs. A search applies it forward (grounded arguments give a new grounded node) or backward: an *inverse* takes an
open node, what is asked for, and gives the one argument that it must have come from; a *conditional inverse* also takes
grounded nodes for all other arguments. Both kinds are operations of the search, and a domain lists them.

One stream of tokens stands for an episode, in this order: the tokens of each node of the task (its inputs in order, the
target last); then for each action the tokens of the action, followed by those of the node that it made, or by `WASTED`
if it made none. The key of a node is what the reader knows after the last token of that node. Token 0 is `PAD` and
never part of a stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # programs are made of primitives
    from examples.bidirectional_search.programs import Expression

PAD = 0
WASTED = 1  # ends an action that made no node
FIRST_TOKEN = 2  # of a domain's own

Value = tuple[Any, ...]  # hashable


@dataclass(frozen=True)
class Primitive:
    """An operation of programs, on the entries of one example.

    Attributes:
      name: as programs are printed.
      arity: how many arguments it has.
      apply: (*arguments) -> result, or None where it is undefined.
      inverses: one for each argument, (result, *other arguments) -> that argument or None; or None if there is none.
        What they give need not be right: a search runs it forward before it believes it.
    """

    name: str
    arity: int
    apply: Callable[..., Any]
    inverses: tuple[Callable[..., Any] | None, ...] = ()

    def inverse(self, missing: int) -> Callable[..., Any] | None:
        return self.inverses[missing] if self.inverses else None


@dataclass(frozen=True)
class Operation:
    """A search action without its nodes: a primitive forward, or backward to argument `missing`.

    Backward, the first node argument is the open node; the others are the primitive's other arguments, in its order.
    """

    primitive: Primitive
    missing: int | None = None

    @property
    def grounded(self) -> tuple[bool, ...]:
        """Of each node argument, whether it must be grounded (or else open); its length is the number of arguments."""
        return (self.missing is None,) + (True,) * (self.primitive.arity - 1)

    @property
    def name(self) -> str:
        """As `hstack`, `hstack:0` backward to the first argument."""
        return self.primitive.name if self.missing is None else f"{self.primitive.name}:{self.missing}"


def operations_of(primitives: Sequence[Primitive]) -> tuple[Operation, ...]:
    """Each primitive forward, then each inverse that exists, in the order of primitives and arguments."""
    forward = [Operation(primitive) for primitive in primitives]
    backward = [
        Operation(primitive, missing)
        for primitive in primitives
        for missing in range(primitive.arity)
        if primitive.inverse(missing) is not None
    ]
    return (*forward, *backward)


class Action(NamedTuple):
    operation: int  # index into the domain's operations
    arguments: tuple[int, ...]  # node slots, as many as the operation has arguments


class Node(NamedTuple):
    value: Value
    grounded: bool


@dataclass(frozen=True)
class Task:
    """Find a program that makes `target` of `inputs` on every training example, within `limit` actions.

    `held_out` are further examples, (inputs of one example, its output), that no search sees.
    """

    inputs: tuple[Value, ...]
    target: Value
    limit: int
    name: str = ""
    held_out: tuple[tuple[tuple[Any, ...], Any], ...] = ()


class Step(NamedTuple):
    """What an action did. A step that `changed` nothing is wasted, and counts like any other."""

    changed: bool
    node: int | None  # the slot of the node made; the next free one if nodes are kept
    tokens: list[int]  # of the action and the node, or of the action and `WASTED`


class Domain(ABC):
    """Operations, tasks, a teacher and tokens.

    Attributes:
      name: of the domain.
      operations: the search's operations in a fixed order; forward-only arms mask the backward ones and keep the list.
      vocabulary: tokens are 0..vocabulary - 1.
      max_actions: the largest limit of its tasks.
      max_nodes: node slots that suffice for every episode.
      value_tokens, action_tokens: the most tokens of one node's value, and of one action without its node.
      splits: of held-out tasks.
      keeps_nodes: whether all nodes stay. If not there are two slots, the latest grounded node in slot 0 and the latest
        open one in slot 1, and what they replace is forgotten.
    """

    name: str
    operations: tuple[Operation, ...]
    vocabulary: int
    max_actions: int
    max_nodes: int
    value_tokens: int
    action_tokens: int
    splits: tuple[str, ...] = ("",)
    keeps_nodes: bool = True

    @property
    def argument_slots(self) -> int:
        return max(len(operation.grounded) for operation in self.operations)

    @cached_property
    def needs(self) -> np.ndarray:
        """int (operations, argument_slots): 1 for an argument that must be grounded, 0 for an open one, -1 for none."""
        needs = np.full((len(self.operations), self.argument_slots), -1)
        for index, operation in enumerate(self.operations):
            needs[index, : len(operation.grounded)] = operation.grounded
        return needs

    @property
    def primitives(self) -> tuple[Primitive, ...]:
        return tuple(operation.primitive for operation in self.operations if operation.missing is None)

    @abstractmethod
    def random_task(self, rng: np.random.Generator) -> Task:
        """A task to train on; never one that is held out."""

    @abstractmethod
    def held_out(self, split: str = "") -> list[Task]:
        """Tasks to test on, the same at every call; which splits there are each domain says."""

    @abstractmethod
    def sets_apart(self, task: Task, program: Expression) -> bool:
        """Whether training may not see this task, or this program for it: what hindsight makes up has to ask."""

    @abstractmethod
    def teacher_episode(self, rng: np.random.Generator, bidirectional: bool) -> tuple[Task, list[Action]]:
        """A task to train on and actions that solve it when replayed, within its limit and with no step wasted."""

    @abstractmethod
    def tokens_of_value(self, value: Value, grounded: bool) -> list[int]:
        """At least one and at most `value_tokens` tokens of `FIRST_TOKEN`..vocabulary - 1."""

    @abstractmethod
    def tokens_of_action(self, action: Action, arguments: Sequence[Node]) -> list[int]:
        """At most `action_tokens` tokens; `arguments` are the nodes in the slots that the action names."""
