"""From a program to actions that solve its task: some edges are taken forward, others backward.

A program is *bidirectionalised* from its target down. The edge that makes the open node is turned into an inverse with
some probability, if there is one: the other arguments are made forward, the backward step asks for the one that is
missing, and this is the next open node. An edge that is left forward, and all edges before it, are made forward, which
ends the search. So backward steps form one chain down from the target.

What comes out is replayed, for not every plan works: a product of zero does not say what the other factor was.
"""

from collections.abc import Sequence

import numpy as np

from examples.bidirectional_search.domain import Action, Domain, Primitive, Task, Value
from examples.bidirectional_search.graph import Search, apply_to_all
from examples.bidirectional_search.programs import Call, Expression, Input

Values = tuple[Value, ...]
Move = tuple[Primitive, int | None, Values]  # a primitive, the missing argument, the values of its nodes


def lesson(
    domain: Domain, task: Task, program: Expression, rng: np.random.Generator, probability: float
) -> list[Action] | None:
    """Actions that solve `task` the way `program` does, each edge turned backward with `probability`.

    None if they take more than the task's limit, waste a step, or do not solve it.
    """
    plan = _Plan(task.inputs, rng, probability)
    if plan.value(program) != task.target:
        return None
    plan.down(program)
    return replayed(domain, task, plan.moves)


def replayed(domain: Domain, task: Task, moves: list[Move]) -> list[Action] | None:
    """The moves as actions on slots, up to the end; None if they do not solve the task in time, with no step wasted."""
    search = Search(domain, task)
    index = {(operation.primitive, operation.missing): at for at, operation in enumerate(domain.operations)}
    slots = {node.value: slot for slot, node in enumerate(search.nodes)}
    actions = []
    for primitive, missing, values in moves:
        if search.over:
            break
        action = Action(index[primitive, missing], tuple(slots[value] for value in values))
        step = search.step(action)
        actions.append(action)
        if not step.changed:
            return None
        if step.node is not None:
            slots[search.node(step.node).value] = step.node
    return actions if search.solved else None


def hindsight(search: Search, rng: np.random.Generator, probability: float) -> tuple[Task, list[Action]] | None:
    """The last grounded node of a lost search as the target of a task of its own, with a lesson that solves it.

    None if the search made no grounded node, if the lesson does not replay, or if training may not see it.
    """
    made = [slot for slot, node in enumerate(search.nodes) if node.grounded and slot > search.graph.target]
    if not made:
        return None
    node = search.slots[made[-1]]
    task = Task(search.task.inputs, search.graph.values[node], search.task.limit, "hindsight")
    program = search.graph.program(node)
    if search.domain.sets_apart(task, program):
        return None
    actions = lesson(search.domain, task, program, rng, probability)
    return None if actions is None else (task, actions)


def random_program(
    rng: np.random.Generator, primitives: Sequence[Primitive], inputs: Sequence[Value], length: int
) -> tuple[Expression, Value] | None:
    """A program of `length` calls, none of them idle, and what it makes of the inputs; None if the draw gave no such.

    Each call is drawn uniformly over primitives, then over inputs and earlier calls for each argument.
    """
    most_arguments = max(primitive.arity for primitive in primitives)
    draws = iter(rng.random(length * (1 + most_arguments)).tolist())
    values, sources = list(inputs), []
    idle: set[int] = set()  # calls whose result is not used yet
    for call in range(length):
        primitive = primitives[int(next(draws) * len(primitives))]
        source = tuple(int(next(draws) * len(values)) for _ in range(primitive.arity))
        value = apply_to_all(primitive.apply, [values[at] for at in source])
        if value is None or value in values:
            return None
        idle = idle.difference(source) | {len(values)}
        if len(idle) > 1 + (length - call - 1) * (most_arguments - 1):
            return None  # more idle values than the calls to come can take up
        values.append(value)
        sources.append((primitive, source))
    return (_expression(sources, len(inputs)), values[-1]) if len(idle) == 1 else None


def _expression(sources: Sequence[tuple[Primitive, tuple[int, ...]]], inputs: int) -> Expression:
    """The last call, of calls that name inputs and earlier calls by their place."""
    made: list[Expression] = [Input(index) for index in range(inputs)]
    for primitive, source in sources:
        made.append(Call(primitive, tuple(made[at] for at in source)))
    return made[-1]


class _Plan:
    """Moves that make a program's value, as they are being laid out."""

    def __init__(self, inputs: Sequence[Value], rng: np.random.Generator, probability: float) -> None:
        self.inputs, self.rng, self.probability = inputs, rng, probability
        self.grounded = set(inputs)
        self.moves: list[Move] = []
        self.values: dict[Expression, Value | None] = {}

    def value(self, program: Expression) -> Value | None:
        """Of a part of the program; None if it is undefined."""
        if program not in self.values:
            match program:
                case Input(index):
                    self.values[program] = self.inputs[index]
                case Call(primitive, arguments):
                    self.values[program] = None
                    if all(self.value(argument) is not None for argument in arguments):
                        self.values[program] = apply_to_all(primitive.apply, self.defined(*arguments))
        return self.values[program]

    def defined(self, *parts: Expression) -> Values:
        """The values of parts that are known to be defined."""
        return tuple(value for part in parts if (value := self.value(part)) is not None)

    def up(self, program: Expression) -> None:
        """Makes a part forward."""
        (value,) = self.defined(program)
        if isinstance(program, Input) or value in self.grounded:
            return
        for argument in program.arguments:
            self.up(argument)
        self.moves.append((program.primitive, None, self.defined(*program.arguments)))
        self.grounded.add(value)

    def down(self, program: Expression) -> None:
        """Grounds an open node, backward as far as the draws go."""
        if isinstance(program, Input) or self.value(program) in self.grounded:
            return
        invertible = [at for at in range(program.primitive.arity) if program.primitive.inverse(at) is not None]
        if not invertible or self.rng.random() >= self.probability:
            self.up(program)
            return
        missing = invertible[self.rng.integers(len(invertible))]
        others = [argument for at, argument in enumerate(program.arguments) if at != missing]
        for other in others:
            self.up(other)
        self.moves.append((program.primitive, missing, self.defined(program, *others)))
        self.down(program.arguments[missing])
