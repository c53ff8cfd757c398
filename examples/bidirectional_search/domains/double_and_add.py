"""Double-and-add: from 2 reach N by adding 1 and doubling; backward, by taking 1 away and halving.

Operations: +1, ×2, and their inverses. Numbers are 1..2^bits - 1; anything else is undefined, and so is half of an odd
number: such a step is wasted. Used nodes disappear, so the state is exactly (current number, what is asked for).
Targets are uniform in 3..5,000,000, with 4,500 different ones to train on and 500 held out; 41 actions at most.

The bidirectional teacher is purely backward, for one step left forward makes all steps before it forward. The
forward-only teacher reads the target's bits from the top.

Tokens: a number is its bits, from the least, in a fixed width; the last bit's token says whether the node is grounded.
An action is one token.
"""

from collections.abc import Sequence

import numpy as np

from examples.bidirectional_search.domain import (
    FIRST_TOKEN,
    Action,
    Domain,
    Node,
    Primitive,
    Task,
    Value,
    operations_of,
)
from examples.bidirectional_search.programs import Expression

START, SMALLEST, LARGEST, BITS, LIMIT = 2, 3, 5_000_000, 23, 41
TRAIN, HELD_OUT = 4500, 500
ADD, DOUBLE, SUBTRACT, HALVE = range(4)
_BIT, _LAST_BIT, _OPERATION = FIRST_TOKEN, FIRST_TOKEN + 2, FIRST_TOKEN + 6
VOCABULARY = _OPERATION + 4


def primitives(bits: int) -> tuple[Primitive, Primitive]:
    """+1 and ×2 on the numbers 1..2^bits - 1."""

    def number(value: int) -> int | None:
        return value if 0 < value < 1 << bits else None

    def halve(result: int) -> int | None:
        return None if result % 2 else number(result // 2)

    add = Primitive("+1", 1, lambda value: number(value + 1), (lambda result: number(result - 1),))
    double = Primitive("*2", 1, lambda value: number(2 * value), (halve,))
    return add, double


def backward(target: int, most: int | None = None) -> list[int]:
    """The operations, all backward, that lead from `target` down to 2; or the first `most` of them."""
    operations: list[int] = []
    while target != START and len(operations) != most:
        operations.append(SUBTRACT if target % 2 else HALVE)
        target = target - 1 if target % 2 else target // 2
    return operations


def forward(target: int) -> list[int]:
    """The operations, all forward, that lead from 2 up to `target`, which is at least 2."""
    bits = f"{target:b}"
    operations = [ADD] if bits[1] == "1" else []
    for bit in bits[2:]:
        operations += [DOUBLE, ADD] if bit == "1" else [DOUBLE]
    return operations


class DoubleAndAdd(Domain):
    """The game as published; `held_out()` gives the 500 targets that are split off with `seed`."""

    name = "double-and-add"
    vocabulary = VOCABULARY
    max_nodes = 2
    action_tokens = 1
    keeps_nodes = False

    def __init__(self, seed: int = 0, bits: int = BITS, limit: int = LIMIT) -> None:
        self.bits, self.max_actions, self.value_tokens = bits, limit, bits
        self.operations = operations_of(primitives(bits))
        drawn = np.random.default_rng(seed).choice(LARGEST - SMALLEST + 1, TRAIN + HELD_OUT, replace=False)
        self._train, self._held_out = np.split(drawn + SMALLEST, [TRAIN])

    def task(self, target: int) -> Task:
        return Task(((START,),), (target,), self.max_actions, str(target))

    def random_task(self, rng: np.random.Generator) -> Task:
        return self.task(int(rng.choice(self._train)))

    def held_out(self, split: str = "") -> list[Task]:
        return [self.task(int(target)) for target in self._held_out]

    def sets_apart(self, task: Task, program: Expression) -> bool:
        return bool(np.isin(task.target[0], self._held_out))

    def teacher_episode(self, rng: np.random.Generator, bidirectional: bool) -> tuple[Task, list[Action]]:
        task = self.random_task(rng)
        return task, teacher_actions(task, bidirectional)

    def tokens_of_value(self, value: Value, grounded: bool) -> list[int]:
        (number,) = value
        bits = [number >> place & 1 for place in range(self.bits)]
        return [_BIT + bit for bit in bits[:-1]] + [_LAST_BIT + 2 * grounded + bits[-1]]

    def tokens_of_action(self, action: Action, arguments: Sequence[Node]) -> list[int]:
        return [_OPERATION + action.operation]


def teacher_actions(task: Task, bidirectional: bool) -> list[Action]:
    """The teacher's actions, as many as the task allows."""
    (target,) = task.target
    if bidirectional:
        return [Action(operation, (1,)) for operation in backward(target, task.limit)]
    return [Action(operation, (0,)) for operation in forward(target)[: task.limit]]
