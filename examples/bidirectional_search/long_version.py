"""Double-and-add with K-bit targets, of which the first backward decisions are asked: one bit must survive K tokens.

The target is read from its least bit, so the first decision, -1 or halving, depends on the first of K tokens. The
action and the new number are K tokens again (the operation is part of the first), and so on. What is learned at one K
is tested at the same K, on numbers drawn with another seed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from examples.bidirectional_search.domain import PAD
from examples.bidirectional_search.policy import Episodes
from examples.bidirectional_search.stream import Layout
from examples.bidirectional_search.training import Log, Settings, State, Trainer, run

DECISIONS = 3
OPERATIONS = ("+1", "*2", "-1", "/2")
FIRST_BIT = PAD + 1
VOCABULARY = FIRST_BIT + 2 * (1 + len(OPERATIONS))  # a bit alone, or with the operation before it


def layout_of(bits: int, window: int) -> Layout:
    """Chunks of the window, beyond which truncated backpropagation sees nothing."""
    chunk = min(window, bits)
    if bits % chunk:
        raise ValueError(f"the number of bits must be at most the window, {window}, or a multiple of it; got {bits}")
    count = bits // chunk
    return Layout(chunk, count, count, nodes=1, decisions=DECISIONS, operations=len(OPERATIONS), argument_slots=0)


def episodes(bits: int, window: int, batch: int, rng: np.random.Generator) -> Episodes:
    """The teacher's first decisions on random targets of so many bits."""
    layout = layout_of(bits, window)
    number = rng.integers(0, 2, (batch, bits), dtype=np.int32)
    number[:, -1] = 1
    streams, operations = [FIRST_BIT + number], np.zeros((batch, DECISIONS), np.int32)
    for index in range(DECISIONS):
        odd = number[:, :1] == 1
        operations[:, index] = np.where(odd[:, 0], 2, 3)
        halved = np.concatenate([number[:, 1:], np.zeros((batch, 1), np.int32)], axis=1)
        decremented = np.concatenate([np.zeros((batch, 1), np.int32), number[:, 1:]], axis=1)
        number = np.where(odd, decremented, halved)
        tokens = FIRST_BIT + number
        tokens[:, 0] += 2 * (1 + operations[:, index])
        streams.append(tokens)
    tokens = np.concatenate(streams, axis=1).reshape(batch, layout.chunks, layout.chunk).swapaxes(0, 1)
    ends = np.arange(1, DECISIONS + 1, dtype=np.int32) * layout.task_chunks - 1
    decisions = (batch, DECISIONS)
    return Episodes(
        tokens=tokens,
        node_chunks=np.zeros((batch, 1), np.int32),
        decision_chunks=np.broadcast_to(ends, decisions),
        operations=operations,
        arguments=np.zeros((*decisions, 0), np.int32),
        operation_masks=np.ones((*decisions, len(OPERATIONS)), np.bool_),
        argument_masks=np.zeros((*decisions, 0, 1), np.bool_),
        weights=np.ones(decisions, np.float32),
        own=np.zeros(batch, np.bool_),
        valid=np.ones(decisions, np.bool_),
    )


def train(stages: Sequence[tuple[int, int]], window: int, settings: Settings, log: Log) -> tuple[State, float]:
    """Trains for (bits, updates) in turn; returns the state and the held-out accuracy of decisions at the last bits.

    Raises ValueError if truncated backpropagation would see all of a target.
    """
    shortest = min(bits for bits, _ in stages)
    if settings.truncate and window >= shortest:
        raise ValueError(f"a window of {window} tokens truncates nothing of {shortest} bits; make it smaller")
    rng, state, accuracy = np.random.default_rng(settings.seed), None, 0.0
    settings = dataclasses.replace(settings, horizon=stages[-1][0])
    for bits, updates in stages:
        trainer = Trainer(VOCABULARY, layout_of(bits, window), settings)
        state = trainer.first_state() if state is None else state

        def step(
            state: State, number: int, trainer: Trainer = trainer, bits: int = bits
        ) -> tuple[State, dict[str, Any]]:
            return trainer.update(state, episodes(bits, window, settings.batch, rng))

        state = run(state, step, updates, log, f"K={bits}")
        accuracy = held_out(trainer, state, bits, window)
        log.write(stage="held out", bits=bits, accuracy=accuracy)
    assert state is not None
    return state, accuracy


def held_out(trainer: Trainer, state: State, bits: int, window: int, count: int = 512) -> float:
    """The fraction of decisions that are right, on targets of another seed."""
    rng, batch = np.random.default_rng(1_000_000 + trainer.settings.seed), trainer.settings.batch
    loss = jax.jit(trainer.loss)
    batches = [episodes(bits, window, batch, rng) for _ in range(-(-count // batch))]
    return float(np.mean([loss(state.variables, batch)[1]["likeliest"] for batch in batches]))
