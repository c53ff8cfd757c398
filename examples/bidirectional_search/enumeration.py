"""Bottom-up enumeration of programs for one task, with observational equivalence.

Programs come by size, the number of their calls. What two programs make of the training inputs is all that is known of
them, so of those that make the same the first, a smallest one, stands for all. The effort is the number of candidates,
that is of calls that are evaluated, new or not.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from examples.bidirectional_search.domain import Primitive, Task, Value
from examples.bidirectional_search.graph import apply_to_all
from examples.bidirectional_search.programs import Call, Expression, Input


class Part(NamedTuple):
    value: Value
    program: Expression


def enumerate_programs(task: Task, primitives: Sequence[Primitive], candidates: int) -> Expression | None:
    """A smallest program that makes the target of the training inputs, or None if so many candidates have none."""
    known: dict[Value, Expression] = {value: Input(index) for index, value in enumerate(task.inputs)}
    if task.target in known:
        return known[task.target]
    of_size = [[Part(value, source) for value, source in known.items()]]
    tried = 0
    while not _complete(primitives, of_size):
        made: list[Part] = []
        for primitive, parts in _calls(primitives, of_size):
            tried += 1
            value = apply_to_all(primitive.apply, [part.value for part in parts])
            if value is not None and value not in known:
                program = known[value] = Call(primitive, tuple(part.program for part in parts))
                if value == task.target:
                    return program
                made.append(Part(value, program))
            if tried == candidates:
                return None
        of_size.append(made)
    return None


def _complete(primitives: Sequence[Primitive], of_size: list[list[Part]]) -> bool:
    """Whether there are no larger programs: calls of the largest ones there are have been tried."""
    largest = max(size for size, parts in enumerate(of_size) if parts)
    return len(of_size) > 1 + largest * max(primitive.arity for primitive in primitives)


def _calls(primitives: Sequence[Primitive], of_size: list[list[Part]]) -> Iterator[tuple[Primitive, tuple[Part, ...]]]:
    """Every primitive on every choice of known parts whose sizes add up to the next size less one."""
    for primitive in primitives:
        for sizes in _compositions(len(of_size) - 1, primitive.arity):
            for parts in product(*(of_size[size] for size in sizes)):
                yield primitive, parts


def _compositions(total: int, count: int) -> Iterator[tuple[int, ...]]:
    """The ordered ways to write `total` as a sum of `count` numbers of at least 0."""
    if count == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _compositions(total - first, count - 1):
            yield (first, *rest)
