"""Abstractions from solved tasks: enumerate, compress the solutions into operations, repeat with the larger library.

Programs are enumerated for each task within a fixed effort (`enumeration`). Stitch compresses the solutions (Bowers et
al., Top-Down Synthesis for Library Learning, POPL 2023; the package `stitch-core`): s-expressions go in, abstractions
come out, each an expression over arguments #0, #1, ... that may call earlier ones. Each becomes a primitive, so the
next round needs smaller programs for the same grids. After Alford et al., Neural-guided, Bidirectional Program Search
for Abstraction and Reasoning, 2021, where DreamCoder compressed.

A learned primitive has an inverse for an argument if its body uses every argument once and each operation on the path
to this argument has one; what is beside the path is then known. Others can only be run forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from examples.bidirectional_search.domain import Primitive, Task
from examples.bidirectional_search.enumeration import enumerate_programs
from examples.bidirectional_search.programs import Call, Expression, Input, parse, run

CANDIDATES, MOST_ARGUMENTS, PER_ROUND = 20_000, 2, 10


@dataclass(frozen=True)
class Round:
    """What was solved with a library, and what was learned from it.

    Attributes:
      primitives: the library that the programs were made of.
      solutions: programs that are right on a task's training examples, by the task's name.
      right: the names of tasks whose program is right on the held-out examples too.
      learned: by the compression of the solutions; they are in the next round's library.
    """

    primitives: tuple[Primitive, ...]
    solutions: dict[str, Expression]
    right: frozenset[str]
    learned: tuple[Primitive, ...]


def abstract(
    tasks: Sequence[Task], primitives: Sequence[Primitive], rounds: int, candidates: int = CANDIDATES
) -> list[Round]:
    """Round 0 with the given primitives, then `rounds` more, each with what was learned before it.

    A task that was solved before and is not found again keeps its program.
    """
    library, done = tuple(primitives), list[Round]()
    for number in range(rounds + 1):
        solutions = dict(done[-1].solutions) if done else {}
        for task in tasks:
            program = enumerate_programs(task, library, candidates)
            if program is not None:
                solutions[task.name] = program
        right = frozenset(task.name for task in tasks if task.name in solutions and _right(solutions[task.name], task))
        learned = compress(list(solutions.values()), library, prefix=f"learned{number}_")
        done.append(Round(library, solutions, right, learned))
        library = (*library, *learned)
    return done


def compress(programs: Sequence[Expression], library: Sequence[Primitive], prefix: str) -> tuple[Primitive, ...]:
    """The abstractions that shorten the programs most, as primitives."""
    try:
        import stitch_core
    except ImportError as error:
        raise ImportError("compression needs the package stitch-core: python -m pip install stitch-core") from error
    if not programs:
        return ()
    found = stitch_core.compress(
        [str(program) for program in programs],
        iterations=PER_ROUND,
        max_arity=MOST_ARGUMENTS,
        abstraction_prefix=prefix,
        no_curried_metavars=True,  # an argument is a grid, never an operation
        no_curried_bodies=True,  # and so is the result
    )
    known = {primitive.name: primitive for primitive in library}
    for abstraction in found.abstractions:
        body = parse(abstraction.body, known, variable="#")
        known[abstraction.name] = learned_primitive(abstraction.name, abstraction.arity, body)
    return tuple(known[abstraction.name] for abstraction in found.abstractions)


def learned_primitive(name: str, arity: int, body: Expression) -> Primitive:
    """A primitive that runs `body`, whose inputs are its arguments."""

    def apply(*arguments: Any) -> Any:
        return run(body, arguments)

    once = sorted(_uses(body)) == list(range(arity))
    inverses = tuple(_inverse(body, argument) if once else None for argument in range(arity))
    return Primitive(name, arity, apply, inverses)


def _right(program: Expression, task: Task) -> bool:
    return all(run(program, inputs) == output for inputs, output in task.held_out)


def _uses(body: Expression) -> list[int]:
    """The arguments in the order of their uses, each as often as it is used."""
    if isinstance(body, Input):
        return [body.index]
    return [index for argument in body.arguments for index in _uses(argument)]


def _inverse(body: Expression, missing: int) -> Callable[..., Any] | None:
    """(result, *other arguments) -> argument `missing`, or None if an operation on the path to it has no inverse."""
    path: list[tuple[Callable[..., Any], list[Expression]]] = []  # from the result down; what is beside each step
    while isinstance(body, Call):
        at = next(at for at, argument in enumerate(body.arguments) if missing in _uses(argument))
        undo = body.primitive.inverse(at)
        if undo is None:
            return None
        path.append((undo, [argument for place, argument in enumerate(body.arguments) if place != at]))
        body = body.arguments[at]

    def inverse(result: Any, *others: Any) -> Any:
        arguments = {index + (index >= missing): other for index, other in enumerate(others)}
        for undo, parts in path:
            beside = [run(part, arguments) for part in parts]
            if result is None or None in beside:
                return None
            result = undo(result, *beside)
        return result

    return inverse
