"""The 24-Game at true depth: make a number of four others with +, −, × and exact ÷, on the integers 0..100.

Inputs are four different numbers from 1..9 in ascending order, targets are 1..100; numbers may be used again or not at
all. A task's *depth* is the least number of operations that makes its target, from a table of all sets and targets
(`depths`); a task of depth d has d + 2 actions. For each of the depths 1, 2, 3, 200 pairs of a set and a target are
held out. The teacher draws a depth, a task of this depth, and one of its shortest programs.

Operations: the 4 forward ones and 8 conditional inverses, for each the first and the second argument. An inverse that
has more than one answer (0 = 0 × ?) does not verify.

Tokens: one for each number and whether it is grounded. An action is its operation, then its arguments as numbers, then
its result or `WASTED`: four tokens.
"""

import random
from collections.abc import Sequence
from functools import cache
from itertools import combinations

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
from examples.bidirectional_search.programs import Call, Expression, Input
from examples.bidirectional_search.teacher import lesson

LARGEST, DEPTHS, HELD_OUT, BACKWARD = 100, (1, 2, 3), 200, 0.8
_OPERATION = FIRST_TOKEN + 2 * (LARGEST + 1)


def _number(value: int) -> int | None:
    return value if 0 <= value <= LARGEST else None


def _quotient(dividend: int, divisor: int) -> int | None:
    return dividend // divisor if divisor and dividend % divisor == 0 else None


def _divisor(result: int, dividend: int) -> int | None:
    return _quotient(dividend, result)


def _primitives() -> tuple[Primitive, ...]:
    def less(first: int, second: int) -> int | None:
        return _number(first - second)

    def more(first: int, second: int) -> int | None:
        return _number(first + second)

    def times(first: int, second: int) -> int | None:
        return _number(first * second)

    return (
        Primitive("+", 2, more, (less, less)),
        Primitive("-", 2, less, (more, lambda result, first: less(first, result))),
        Primitive("*", 2, times, (_quotient, _quotient)),
        Primitive("/", 2, _quotient, (times, _divisor)),
    )


PRIMITIVES = _primitives()


@cache
def depths() -> dict[tuple[tuple[int, ...], int], int]:
    """Of each set and target 1..100 the least number of operations, where it is at most 3.

    Sets of numbers are bits of an integer. The last operation is not carried out state by state: what one operation can
    make of a pair of numbers is in a table, and only pairs with the newest number are new.
    """
    results, table = _results(), dict[tuple[tuple[int, ...], int], int]()
    for numbers in combinations(range(1, 10), 4):
        found = [sum(1 << number for number in numbers)] + [0] * max(DEPTHS)
        _reach(numbers, 0, _of_pairs(numbers, numbers, results), found, results)
        for depth, reached in enumerate(found):
            for target in _members(reached >> 1 << 1):
                table.setdefault((numbers, target), depth)
    return table


def _reach(numbers: tuple[int, ...], depth: int, results: int, found: list[int], table: list[list[int]]) -> None:
    """Adds to found[d] what d operations can make, given that `results` is what one more can make of `numbers`."""
    found[depth + 1] |= results
    if depth + 1 == max(DEPTHS):
        return
    for new in _members(results):
        if new not in numbers:
            _reach((*numbers, new), depth + 1, results | _of_pairs((*numbers, new), (new,), table), found, table)


@cache
def _results() -> list[list[int]]:
    """For each pair of numbers the set of what one operation makes of them, in either order."""

    def of(first: int, second: int) -> int:
        made = [primitive.apply(*pair) for primitive in PRIMITIVES for pair in ((first, second), (second, first))]
        return sum(1 << result for result in {*made} - {None})

    return [[of(first, second) for second in range(LARGEST + 1)] for first in range(LARGEST + 1)]


def _of_pairs(firsts: Sequence[int], seconds: Sequence[int], table: list[list[int]]) -> int:
    made = 0
    for first in firsts:
        for second in seconds:
            made |= table[first][second]
    return made


def _members(numbers: int) -> list[int]:
    return [number for number in range(LARGEST + 1) if numbers >> number & 1]


class Game24(Domain):
    """`held_out("1")`, ("2"), ("3") give 200 tasks of that depth each, split off with `seed`; "" gives all 600."""

    name = "24-game"
    splits = ("1", "2", "3")
    operations = operations_of(PRIMITIVES)
    vocabulary = _OPERATION + len(operations)
    max_actions = max(DEPTHS) + 2
    max_nodes = 4 + 1 + max_actions
    value_tokens = 1
    action_tokens = 3

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._held_out: dict[int, list[Task]] = {}
        self._train: dict[int, list[Task]] = {}
        for depth in DEPTHS:
            tasks = [task_of(numbers, target, depth) for (numbers, target), at in depths().items() if at == depth]
            order = rng.permutation(len(tasks))
            self._held_out[depth] = [tasks[index] for index in order[:HELD_OUT]]
            self._train[depth] = [tasks[index] for index in order[HELD_OUT:]]
        self._set_apart = {(task.inputs, task.target) for task in self.held_out()}

    def random_task(self, rng: np.random.Generator) -> Task:
        """Of a depth that is drawn first."""
        tasks = self._train[int(rng.choice(DEPTHS))]
        return tasks[rng.integers(len(tasks))]

    def held_out(self, split: str = "") -> list[Task]:
        if split not in ("", *self.splits):
            raise ValueError(f"there is no split {split!r}, only {', '.join(self.splits)}")
        return [task for depth in DEPTHS if split in ("", str(depth)) for task in self._held_out[depth]]

    def sets_apart(self, task: Task, program: Expression) -> bool:
        return (task.inputs, task.target) in self._set_apart

    def teacher_episode(self, rng: np.random.Generator, bidirectional: bool) -> tuple[Task, list[Action]]:
        """A task like `random_task`'s, and a program for it that is as short as can be."""
        while True:
            task = self.random_task(rng)
            program = shortest_program(task, random.Random(int(rng.integers(1 << 62))))
            actions = lesson(self, task, program, rng, BACKWARD if bidirectional else 0.0)
            if actions is not None:
                return task, actions

    def tokens_of_value(self, value: Value, grounded: bool) -> list[int]:
        return [FIRST_TOKEN + 2 * value[0] + grounded]

    def tokens_of_action(self, action: Action, arguments: Sequence[Node]) -> list[int]:
        numbers = [token for node in arguments for token in self.tokens_of_value(*node)]
        return [_OPERATION + action.operation, *numbers]


def task_of(numbers: Sequence[int], target: int, depth: int) -> Task:
    inputs = tuple((number,) for number in numbers)
    return Task(inputs, (target,), depth + 2, f"{' '.join(map(str, numbers))} -> {target}")


def shortest_program(task: Task, rng: random.Random) -> Expression:
    """A random one of the programs for a task that have as many operations as its depth.

    All operations but the last are drawn until there is a last one that makes the target. With fewer operations there
    is none, so no call is idle, and the last one needs the newest number.
    """
    depth, (target,) = task.limit - 2, task.target
    while True:
        values = [value for (value,) in task.inputs]
        made: list[Expression] = [Input(index) for index in range(len(values))]
        for _ in range(depth - 1):
            primitive, first, second = rng.choice(PRIMITIVES), rng.randrange(len(values)), rng.randrange(len(values))
            value = primitive.apply(values[first], values[second])
            if value is None or value in values:
                break
            values.append(value)
            made.append(Call(primitive, (made[first], made[second])))
        else:
            if last := _last_calls(values, target, range(len(values)) if depth == 1 else (len(values) - 1,)):
                primitive, first, second = rng.choice(last)
                return Call(primitive, (made[first], made[second]))


def _last_calls(values: Sequence[int], target: int, newest: Sequence[int]) -> list[tuple[Primitive, int, int]]:
    """What makes the target of two values, one of which is among the newest."""
    results = _results()
    pairs = {
        pair
        for first in newest
        for second in range(len(values))
        if results[values[first]][values[second]] >> target & 1
        for pair in ((first, second), (second, first))
    }
    return [
        (primitive, first, second)
        for first, second in sorted(pairs)
        for primitive in PRIMITIVES
        if primitive.apply(values[first], values[second]) == target
    ]
