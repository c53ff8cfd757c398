"""From an episode to one stream of tokens in chunks, and from many to a padded batch.

What belongs to one node, the action that made it and its value, is padded to whole chunks, so that the node's key is
the reader's state at the end of a chunk. A decision is made from the state behind the last chunk.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from examples.bidirectional_search.domain import PAD
from examples.bidirectional_search.policy import Episodes


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sizes that a domain's programs are compiled for."""

    chunk: int  # tokens
    task_chunks: int  # of all nodes of a task
    action_chunks: int  # of an action and its new node
    nodes: int
    decisions: int
    operations: int
    argument_slots: int

    @property
    def chunks(self) -> int:
        return self.task_chunks + self.decisions * self.action_chunks


@dataclasses.dataclass
class Decision:
    chunk: int
    operation: int
    arguments: tuple[int, ...]
    operation_mask: np.ndarray  # (operations,) bool
    argument_masks: np.ndarray  # (A, N) bool, of the operation taken


class Stream:
    """One episode as it is being read."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.chunks: list[np.ndarray] = []
        self.node_chunks: dict[int, int] = {}
        self.decisions: list[Decision] = []

    def append(self, tokens: Sequence[int], node: int | None) -> list[tuple[np.ndarray, int]]:
        """Adds tokens that end with `node`, or with no node; returns new chunks, each with the node it ends, or N."""
        size, slots = self.layout.chunk, self.layout.nodes
        count = max(1, -(-len(tokens) // size))
        padded = np.full(count * size, PAD, np.int32)
        padded[: len(tokens)] = tokens
        new = [(chunk, slots) for chunk in padded.reshape(count, size)]
        self.chunks += [chunk for chunk, _ in new]
        if node is not None and node < slots:
            self.node_chunks[node] = len(self.chunks) - 1
            new[-1] = (new[-1][0], node)
        return new

    def decide(
        self, operation: int, arguments: Sequence[int], operation_mask: np.ndarray, argument_masks: np.ndarray
    ) -> None:
        """Records a decision; masks are those of operations, and of the arguments of each (operations, A, N)."""
        taken = tuple(arguments) + (0,) * (self.layout.argument_slots - len(arguments))
        self.decisions.append(
            Decision(len(self.chunks) - 1, operation, taken, operation_mask, argument_masks[operation])
        )


def pad(
    streams: Sequence[Stream],
    layout: Layout,
    weights: Sequence[float] | None = None,
    own: Sequence[bool] | None = None,
) -> Episodes:
    """A batch of episodes; `weights` are 1 each if not given, and none is the policy's own."""
    batch, decisions = len(streams), (len(streams), layout.decisions)
    arguments = (*decisions, layout.argument_slots)
    episodes = Episodes(
        tokens=np.full((layout.chunks, batch, layout.chunk), PAD, np.int32),
        node_chunks=np.zeros((batch, layout.nodes), np.int32),
        decision_chunks=np.zeros(decisions, np.int32),
        operations=np.zeros(decisions, np.int32),
        arguments=np.zeros(arguments, np.int32),
        operation_masks=np.ones((*decisions, layout.operations), np.bool_),
        argument_masks=np.zeros((*arguments, layout.nodes), np.bool_),
        weights=np.zeros(decisions, np.float32),
        own=np.zeros(batch, np.bool_) if own is None else np.array(own, np.bool_),
        valid=np.zeros(decisions, np.bool_),
    )
    for row, stream in enumerate(streams):
        _fill(episodes, row, stream, 1.0 if weights is None else weights[row])
    return episodes


def _fill(episodes: Episodes, row: int, stream: Stream, weight: float) -> None:
    kept = stream.decisions[: episodes.valid.shape[1]]
    # What follows the last decision is not read: nothing depends on it.
    used = kept[-1].chunk + 1 if kept else len(stream.chunks)
    if used > len(episodes.tokens):
        raise ValueError(f"an episode of {used} chunks does not fit {len(episodes.tokens)}: {stream.layout}")
    if used:
        episodes.tokens[:used, row] = stream.chunks[:used]
    for node, chunk in stream.node_chunks.items():
        episodes.node_chunks[row, node] = min(chunk, used - 1)
    for index, decision in enumerate(kept):
        episodes.decision_chunks[row, index] = decision.chunk
        episodes.operations[row, index] = decision.operation
        episodes.arguments[row, index] = decision.arguments
        episodes.operation_masks[row, index] = decision.operation_mask
        episodes.argument_masks[row, index] = decision.argument_masks
    episodes.weights[row, : len(kept)] = weight
    episodes.valid[row, : len(kept)] = True
