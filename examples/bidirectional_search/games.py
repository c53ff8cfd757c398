"""Searches as games that a policy plays: the stream of each domain, and three encodings of double-and-add.

Encodings:
* "append", for every domain: the task's nodes; then for each action its tokens and those of the node that it made.
* "lsb", for double-and-add: after each action both numbers are read again, from the least bits, as one list of pairs of
  bits, each pair a token.
* "msb": likewise from each number's highest bit (left-aligned), with an end sign in the places behind it.
"""

from collections.abc import Sequence

import numpy as np

from examples.bidirectional_search.domain import Action, Domain, Task
from examples.bidirectional_search.graph import Search
from examples.bidirectional_search.rollout import Chunks
from examples.bidirectional_search.stream import Layout, Stream

ENCODINGS = ("append", "lsb", "msb")
_PAIRS = 9


class Arena:
    """A domain, the layout of its streams and their encoding: makes games and the teacher's streams.

    Attributes:
      chunk: tokens of a chunk. A node takes whole chunks, so few tokens waste less, and more make a faster loop.
    """

    def __init__(self, domain: Domain, chunk: int, bidirectional: bool, encoding: str = "append") -> None:
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
        if encoding != "append" and domain.keeps_nodes:
            raise ValueError(f"encoding {encoding!r} reads two numbers again, which {domain.name} does not have")
        self.domain, self.bidirectional, self.encoding = domain, bidirectional, encoding
        self.vocabulary = domain.vocabulary + (0 if encoding == "append" else _PAIRS)
        self.layout = self._layout(chunk)

    def game(self, task: Task) -> "SearchGame":
        return (SearchGame if self.encoding == "append" else RereadGame)(self, task)

    def lesson(self, rng: np.random.Generator) -> Stream:
        """A teacher's episode, replayed."""
        return self.replay(*self.domain.teacher_episode(rng, self.bidirectional))

    def replay(self, task: Task, actions: Sequence[Action]) -> Stream:
        game = self.game(task)
        game.begin()
        for action in actions:
            game.play(action.operation, action.arguments)
        return game.stream

    def _layout(self, chunk: int) -> Layout:
        domain = self.domain
        value, action = (
            -(-tokens // chunk) for tokens in (domain.value_tokens, domain.action_tokens + domain.value_tokens)
        )
        samples = np.random.default_rng(0)
        nodes = 1 + max(len(domain.random_task(samples).inputs) for _ in range(50))
        # Where nodes are forgotten the arguments are forced: the latest grounded node, or the latest open one.
        slots = domain.argument_slots if domain.keeps_nodes else 0
        task_chunks = nodes * value if self.encoding == "append" else action
        return Layout(
            chunk,
            task_chunks,
            action,
            domain.max_nodes,
            domain.max_actions,
            len(domain.operations),
            argument_slots=slots,
        )


class SearchGame:
    """One search as a game, its stream appended to."""

    def __init__(self, arena: Arena, task: Task) -> None:
        self.arena, self.search = arena, Search(arena.domain, task, arena.bidirectional)
        self.stream = Stream(arena.layout)
        self._masks: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def over(self) -> bool:
        return self.search.over

    @property
    def solved(self) -> bool:
        return self.search.solved

    def begin(self) -> Chunks:
        return [
            new for slot, tokens in enumerate(self.search.task_tokens()) for new in self.stream.append(tokens, slot)
        ]

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """The structural masks; once for each state."""
        if self._masks is None:
            self._masks = self.search.structural_mask()
        operations, arguments = self._masks
        return operations, arguments[:, : self.stream.layout.argument_slots]

    def play(self, operation: int, arguments: Sequence[int]) -> Chunks:
        recorded = arguments[: len(self.arena.domain.operations[operation].grounded)]
        if self.stream.layout.argument_slots == 0:
            self.masks()
            arguments, recorded = tuple(self._masks[1][operation].argmax(-1)), ()
        self.stream.decide(operation, recorded, *self.masks())
        step = self.search.step(Action(operation, tuple(arguments)))
        self._masks = None
        return self._append(step.tokens, step.node)

    def _append(self, tokens: list[int], node: int | None) -> Chunks:
        return self.stream.append(tokens, node)


class RereadGame(SearchGame):
    """Double-and-add, of which the current number and the target are read again after each action."""

    def begin(self) -> Chunks:
        return self.stream.append(self._pairs(), None)

    def _append(self, tokens: list[int], node: int | None) -> Chunks:
        return self.stream.append(tokens[:1] + self._pairs(), None)

    def _pairs(self) -> list[int]:
        """Both numbers as one list of pairs of digits; the digit 2 stands behind a left-aligned number."""
        bits, numbers = self.arena.domain.value_tokens, [node.value[0] for node in self.search.nodes]
        if self.arena.encoding == "lsb":
            digits = [[number >> place & 1 for place in range(bits)] for number in numbers]
        else:
            digits = [[int(digit) for digit in f"{number:b}".ljust(bits, "2")] for number in numbers]
        first = self.arena.domain.vocabulary
        return [first + 3 * current + target for current, target in zip(*digits, strict=True)]
