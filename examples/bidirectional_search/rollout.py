"""Rolling out without a tape: the reader's state is kept, and at each decision only what is new is read.

Many games go in step. Two programs are compiled for a domain and a batch, of the length of a task and of an action.
Which games are over only masks can tell: a game that is over reads padding, and what is chosen for it is dropped.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from examples.bidirectional_search.domain import PAD
from examples.bidirectional_search.policy import Policy
from examples.bidirectional_search.stream import Layout, Stream

Chunks = list[tuple[np.ndarray, int]]  # tokens of a chunk and the node that it ends, or N


class Game(Protocol):
    """One episode being played."""

    stream: Stream
    over: bool
    solved: bool

    def begin(self) -> Chunks:
        """The task."""

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """Of operations, and of the arguments of each (operations, A, N)."""

    def play(self, operation: int, arguments: Sequence[int]) -> Chunks:
        """Takes an action; arguments beyond the operation's own are ignored. Records the decision."""


class Roller:
    """A policy's programs for rollouts of `batch` games at a time."""

    def __init__(self, policy: Policy, layout: Layout, batch: int) -> None:
        self.policy = policy.clone(budget=None)  # nothing is differentiated
        self.layout, self.batch = layout, batch
        self._step = jax.jit(self._read_and_choose)

    def __call__(
        self, variables: Any, games: Sequence[Game], key: jax.Array, greedy: bool = False
    ) -> list[list[float]]:
        """Plays games to their end; returns the log-probabilities of each game's decisions."""
        found: list[list[float]] = []
        for start in range(0, len(games), self.batch):
            key, now = jax.random.split(key)
            found += self._play(variables, games[start : start + self.batch], now, greedy)
        return found

    def _play(self, variables: Any, games: Sequence[Game], key: jax.Array, greedy: bool) -> list[list[float]]:
        layout, features = self.layout, self.policy.features
        state: Any = (
            jnp.zeros((self.batch, features), jnp.float32),
            jnp.zeros((self.batch, layout.nodes, features), jnp.float32),
        )
        log_probabilities: list[list[float]] = [[] for _ in games]
        new, length = [game.begin() for game in games], layout.task_chunks
        while not all(game.over for game in games):
            key, now = jax.random.split(key)
            arrays = (*self._chunks(new, length), *self._masks(games))
            state, chosen = self._step(variables, state, *arrays, now, np.bool_(greedy))
            operations, arguments, log_p = (np.asarray(leaf) for leaf in chosen)
            new, length = [[] for _ in games], layout.action_chunks
            for index, game in enumerate(games):
                if not game.over:
                    log_probabilities[index].append(float(log_p[index]))
                    new[index] = game.play(int(operations[index]), tuple(int(node) for node in arguments[index]))
        return log_probabilities

    def _read_and_choose(
        self,
        variables: Any,
        state: tuple[jax.Array, jax.Array],
        tokens: jax.Array,
        ends: jax.Array,
        operation_masks: jax.Array,
        argument_masks: jax.Array,
        key: jax.Array,
        greedy: jax.Array,
    ) -> Any:
        """Reads (chunks, batch, chunk) tokens, keeps the keys of the nodes that they end, and chooses."""
        carry, keys = state
        carry, states = self.policy.apply(variables, carry, tokens, method="read")
        rows = jnp.broadcast_to(jnp.arange(self.batch, dtype=ends.dtype)[None], ends.shape)
        keys = keys.at[rows, ends].set(states, mode="drop")
        masks = (operation_masks, argument_masks)
        return (carry, keys), self.policy.apply(variables, carry, keys, masks, key, greedy, method="choose")

    def _chunks(self, new: Sequence[Chunks], length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.full((length, self.batch, self.layout.chunk), PAD, np.int32)
        ends = np.full((length, self.batch), self.layout.nodes, np.int32)
        for row, chunks in enumerate(new):
            if len(chunks) > length:
                raise ValueError(f"{len(chunks)} new chunks in a layout for {length}: {self.layout}")
            for index, (chunk, node) in enumerate(chunks):
                tokens[index, row], ends[index, row] = chunk, node
        return tokens, ends

    def _masks(self, games: Sequence[Game]) -> tuple[np.ndarray, np.ndarray]:
        layout = self.layout
        operations = np.zeros((self.batch, layout.operations), np.bool_)
        arguments = np.zeros((self.batch, layout.operations, layout.argument_slots, layout.nodes), np.bool_)
        for row, game in enumerate(games):
            if not game.over:
                operations[row], arguments[row] = game.masks()
        return operations, arguments
