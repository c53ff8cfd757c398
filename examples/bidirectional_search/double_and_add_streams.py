"""Double-and-add as streams: three encodings of an episode, and the long version.

From 2 the target N is reached by +1 and ×2; the inverses take 1 from what is asked for, or halve it. Used nodes
disappear, so the state is exactly (current, target), every operation has one possible argument, and nothing is pointed
at: an action is an operation.

Encodings, of `BITS` tokens a number:
* "append": the target, then 2; then for each action its operation and the bits of the new number, from the least.
* "lsb": both numbers are read again after each action, from the least bits, as one stream of pairs of bits.
* "msb": likewise from the most significant bit, each number's first bit first (left-aligned), with an end sign behind.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from examples.bidirectional_search.policy import PAD
from examples.bidirectional_search.rollout import Chunks
from examples.bidirectional_search.stream import Layout, Stream

BITS, LIMIT = 23, 41
SMALLEST, LARGEST = 3, 5_000_000
OPERATIONS = ("+1", "*2", "-1", "/2")  # two forward operations and their inverses
ENCODINGS = ("append", "lsb", "msb")
FIRST_BIT, FIRST_OPERATION, FIRST_PAIR = PAD + 1, PAD + 3, PAD + 7
VOCABULARY = FIRST_PAIR + 9


def layout_of(encoding: str) -> Layout:
    """An action is one chunk: its operation and a number, or a number of pairs."""
    task_chunks = 2 if encoding == "append" else 1
    return Layout(BITS + 1, task_chunks, 1, nodes=1, decisions=LIMIT, operations=len(OPERATIONS), argument_slots=0)


class DoubleAndAdd:
    """One game: the current number, the target, and its stream in one of the encodings."""

    def __init__(self, target: int, encoding: str, bidirectional: bool, layout: Layout | None = None) -> None:
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
        self.current, self.target, self.encoding, self.bidirectional = 2, target, encoding, bidirectional
        self.stream, self.steps = Stream(layout or layout_of(encoding)), 0

    @property
    def solved(self) -> bool:
        return self.current == self.target

    @property
    def over(self) -> bool:
        return self.solved or self.steps == LIMIT

    def begin(self) -> Chunks:
        if self.encoding == "append":
            return self.stream.append(bits_of(self.target), None) + self.stream.append(bits_of(self.current), None)
        return self.stream.append(self._pairs(), None)

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        operations = np.array([True, True, self.bidirectional, self.bidirectional])
        return operations, np.zeros((len(OPERATIONS), 0, self.stream.layout.nodes), np.bool_)

    def play(self, operation: int, arguments: Any = ()) -> Chunks:
        """Takes an action. One that does not verify, or leaves what `BITS` bits can say, changes nothing."""
        self.stream.decide(operation, (), *self.masks())
        self.steps += 1
        token = [FIRST_OPERATION + operation]
        new = self._result(operation)
        if self.encoding != "append":
            return self.stream.append(token + self._pairs(), None)
        return self.stream.append(token if new is None else token + bits_of(new), None)

    def _result(self, operation: int) -> int | None:
        match operation:
            case 0 | 1:
                new = self.current + 1 if operation == 0 else 2 * self.current
                if new >= 1 << BITS:
                    return None
                self.current = new
            case _:
                if (operation == 3 and self.target % 2) or self.target <= 1:
                    return None
                new = self.target = self.target - 1 if operation == 2 else self.target // 2
        return new

    def _pairs(self) -> list[int]:
        """Both numbers as one list of pairs of digits; 2 stands behind the end of a left-aligned number."""
        numbers = (self.current, self.target)
        if self.encoding == "lsb":
            digits = [[number >> place & 1 for place in range(BITS)] for number in numbers]
        else:
            digits = [[int(digit) for digit in f"{number:b}".ljust(BITS, "2")] for number in numbers]
        return [FIRST_PAIR + 3 * first + second for first, second in zip(*digits, strict=True)]


def bits_of(number: int, count: int = BITS) -> list[int]:
    """Tokens of the bits, from the least."""
    return [FIRST_BIT + (number >> place & 1) for place in range(count)]


def teacher(target: int, bidirectional: bool) -> list[int]:
    """The operations that reach a target: backwards to 2 if there are inverses, else along its bits from the top."""
    if not bidirectional:
        first, *rest = f"{target:b}"[1:]
        start = [0] if first == "1" else []
        return start + [operation for bit in rest for operation in ((1, 0) if bit == "1" else (1,))]
    operations = []
    while target != 2:
        operations.append(2 if target % 2 else 3)
        target = target - 1 if target % 2 else target // 2
    return operations


def lesson(target: int, encoding: str, bidirectional: bool) -> Stream:
    """The teacher's episode, replayed."""
    game = DoubleAndAdd(target, encoding, bidirectional)
    game.begin()
    for operation in teacher(target, bidirectional):
        game.play(operation)
    if not game.solved:
        raise AssertionError(f"the teacher does not solve {target}")
    return game.stream


def targets(seed: int, train: int = 4500, held_out: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Different numbers, uniform in 3..5·10^6, to train on and held out."""
    drawn = np.random.default_rng(seed).choice(LARGEST - SMALLEST + 1, train + held_out, replace=False) + SMALLEST
    return drawn[:train], drawn[train:]


def batches(numbers: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless epochs, each in a new order; the rest of an epoch that fills no batch is left out."""
    while True:
        order = rng.permutation(numbers)
        yield from order[: len(order) // size * size].reshape(-1, size)
