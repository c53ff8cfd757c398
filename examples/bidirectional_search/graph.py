"""The search graph, and an episode of search in it.

Nodes are values, equal values are one node (hash-consed), and edges say which primitive makes a node of which others.
The graph stores the forward direction only, also of what an inverse found, after it has been run forward: an edge is
true. A node is *grounded* when it is an input, or when all arguments of one of its edges are grounded; else it is open.
The search is over when the target is grounded, and then a program is read out.

Every backward step leaves one missing argument, and all others are grounded. So the target is grounded as soon as any
open node is, and until then nodes keep the state that they were made in.

Two masks are not to be mixed up. The structural mask knows how many arguments an operation has and whether each must be
grounded; it is all that a search may see. Whether an inverse verifies is found out by trying: it would give the answer
away (halving offered for even numbers only *is* the solution of double-and-add).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from examples.bidirectional_search.domain import WASTED, Action, Domain, Node, Operation, Primitive, Step, Task, Value
from examples.bidirectional_search.programs import Call, Expression, Input, run


class Edge(NamedTuple):
    """`primitive` applied to the nodes `arguments` makes a node; `backward` if it was found from that node."""

    primitive: Primitive
    arguments: tuple[int, ...]
    backward: bool = False


class Graph:
    """Value nodes and the edges between them, for one task."""

    def __init__(self, inputs: Sequence[Value], target: Value) -> None:
        self.values: list[Value] = []
        self.edges: list[list[Edge]] = []
        self.origin: list[Input | Edge | None] = []  # of each node what grounded it first; None while it is open
        self.known: dict[Value, int] = {}
        for index, value in enumerate(inputs):
            if value not in self.known:
                self.origin[self._add(value)] = Input(index)
        # An input that is the target already is a solved task; else the target is a node of its own.
        self.target = self.known[target] if target in self.known else self._add(target)

    def grounded(self, node: int) -> bool:
        return self.origin[node] is not None

    @property
    def solved(self) -> bool:
        return self.grounded(self.target)

    def apply(self, operation: Operation, arguments: Sequence[int]) -> int | None:
        """Does what the operation says; returns the node that it made or grounded, None if nothing changed.

        Nothing changes if the result is undefined or does not verify, and if it is a node that is there already, unless
        this grounds an open one.
        """
        if operation.missing is None:
            return self._forward(operation.primitive, tuple(arguments))
        return self._backward(operation.primitive, operation.missing, arguments[0], arguments[1:])

    def forget(self, node: int) -> None:
        """The node stays in edges, but its value may be made again as a node of its own."""
        if self.known.get(self.values[node]) == node:
            del self.known[self.values[node]]

    def program(self, node: int | None = None) -> Expression:
        """An expression over the inputs that makes a grounded node, by default the target."""
        node = self.target if node is None else node
        match self.origin[node]:
            case None:
                raise ValueError(f"node {node} is not grounded, so no program makes it yet")
            case Input() as source:
                return source
            case Edge(primitive, arguments, _):
                return Call(primitive, tuple(self.program(argument) for argument in arguments))

    def _add(self, value: Value) -> int:
        self.values.append(value)
        self.edges.append([])
        self.origin.append(None)
        self.known[value] = len(self.values) - 1
        return self.known[value]

    def _forward(self, primitive: Primitive, arguments: tuple[int, ...]) -> int | None:
        value = apply_to_all(primitive.apply, [self.values[argument] for argument in arguments])
        if value is None:
            return None
        node = self.known.get(value)
        if node is not None and self.grounded(node):
            return None
        node = self._add(value) if node is None else node
        self._connect(node, Edge(primitive, arguments))
        return node

    def _backward(self, primitive: Primitive, missing: int, result: int, others: Sequence[int]) -> int | None:
        inverse, given = primitive.inverse(missing), [self.values[other] for other in others]
        found = None if inverse is None else apply_to_all(inverse, [self.values[result], *given])
        if found is None:
            return None
        arguments = [*given[:missing], found, *given[missing:]]
        if apply_to_all(primitive.apply, arguments) != self.values[result]:
            return None
        node = self.known.get(found)
        if node is not None and not self.grounded(node):
            return None  # Another way down to an open node is of no use: any of them ends the search.
        node = self._add(found) if node is None else node
        self._connect(result, Edge(primitive, (*others[:missing], node, *others[missing:]), backward=True))
        return node

    def _connect(self, node: int, edge: Edge) -> None:
        self.edges[node].append(edge)
        self._propagate(node)

    def _propagate(self, node: int) -> None:
        """Grounds a node if one of its edges allows it, then what has waited for it."""
        if self.grounded(node):
            return
        for edge in self.edges[node]:
            if all(self.grounded(argument) for argument in edge.arguments):
                self.origin[node] = edge
                break
        else:
            return
        for other, edges in enumerate(self.edges):
            if any(node in edge.arguments for edge in edges):
                self._propagate(other)


def apply_to_all(function: Callable[..., Any], arguments: Sequence[Value]) -> Value | None:
    """On every example; None if it is undefined on any."""
    results = []
    for entries in zip(*arguments, strict=True):
        result = function(*entries)
        if result is None:
            return None
        results.append(result)
    return tuple(results)


class Search:
    """An episode of search for one task.

    Nodes are named by slots. Slots 0, 1, ... are the task's different inputs in order, then the target, then new nodes
    in the order in which they are made; where a domain keeps no nodes, 0 is the latest grounded and 1 the latest open.
    """

    def __init__(self, domain: Domain, task: Task, bidirectional: bool = True) -> None:
        self.domain, self.task, self.bidirectional = domain, task, bidirectional
        self.graph = Graph(task.inputs, task.target)
        self.slots = list(range(len(self.graph.values)))  # graph nodes
        self.steps = 0

    @property
    def nodes(self) -> list[Node]:
        return [self.node(slot) for slot in range(len(self.slots))]

    @property
    def grounded(self) -> np.ndarray:
        return np.array([self.graph.grounded(node) for node in self.slots])

    @property
    def solved(self) -> bool:
        return self.graph.solved

    @property
    def over(self) -> bool:
        return self.solved or self.steps >= self.task.limit

    def node(self, slot: int) -> Node:
        node = self.slots[slot]
        return Node(self.graph.values[node], self.graph.grounded(node))

    def task_tokens(self) -> list[list[int]]:
        """Of each node of the task, in the order of slots; to be called before the first step."""
        return [self.domain.tokens_of_value(*node) for node in self.nodes]

    def structural_mask(self) -> tuple[np.ndarray, np.ndarray]:
        """Which operations are possible, bool (operations,), and which nodes each of their arguments may be.

        The second is bool (operations, argument_slots, max_nodes), all False for arguments that an operation does not
        have. Possible nodes of one argument do not depend on the others.
        """
        state, needs = np.full(self.domain.max_nodes, -2), self.domain.needs
        state[: len(self.slots)] = self.grounded
        arguments = needs[..., None] == state
        operations = (arguments.any(-1) | (needs == -1)).all(-1)
        if not self.bidirectional:
            operations &= needs[:, 0] == 1  # a backward operation begins with an open node
        return operations, arguments

    def step(self, action: Action) -> Step:
        """Takes a structurally possible action; arguments beyond the operation's own are ignored."""
        operation = self.domain.operations[action.operation]
        slots = tuple(action.arguments[: len(operation.grounded)])
        self._check(operation, slots)
        tokens = self.domain.tokens_of_action(Action(action.operation, slots), [self.node(slot) for slot in slots])
        self.steps += 1
        count = len(self.graph.values)
        node = self.graph.apply(operation, [self.slots[slot] for slot in slots])
        if node is None:
            return Step(False, None, [*tokens, WASTED])
        if node < count:  # grounds what was open, so the search is over
            return Step(True, None, [*tokens, *self.domain.tokens_of_value(self.graph.values[node], True)])
        made = Node(self.graph.values[node], self.graph.grounded(node))
        return Step(True, self._place(node), [*tokens, *self.domain.tokens_of_value(*made)])

    def program(self) -> Expression:
        return self.graph.program()

    def generalises(self) -> bool:
        """Whether the search is over and its program also right on the held-out examples, if the task has any."""
        if not self.solved:
            return False
        program = self.program()
        return all(run(program, inputs) == output for inputs, output in self.task.held_out)

    def _place(self, node: int) -> int:
        if self.domain.keeps_nodes:
            self.slots.append(node)
            return len(self.slots) - 1
        slot = 0 if self.graph.grounded(node) else 1
        self.graph.forget(self.slots[slot])
        self.slots[slot] = node
        return slot

    def _check(self, operation: Operation, slots: tuple[int, ...]) -> None:
        if self.over:
            raise ValueError(f"the search is over after {self.steps} of {self.task.limit} steps; solved: {self.solved}")
        if operation.missing is not None and not self.bidirectional:
            raise ValueError(f"{operation.name} is backward, in a search that is forward only")
        found = tuple(self.graph.grounded(self.slots[slot]) for slot in slots)
        if found != operation.grounded:
            raise ValueError(f"{operation.name} takes nodes that are grounded {operation.grounded}, got {found}")
