"""Temporaries of the training step against the length of the episode, by compiling; and updates that run.

The same reader, heads, loss and optimiser; `flax.linen.RNN` (`jax.lax.scan`) keeps what every token needs for its
backward pass, `bptt_jax.linen.RNN` stays within its budget. What grows with the length under a fixed budget are the
states of chunks, of which keys and decisions are picked, and their gradients.
"""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from examples.bidirectional_search.policy import Episodes
from examples.bidirectional_search.stream import Layout
from examples.bidirectional_search.training import Settings, Trainer

NODES, DECISIONS, ARGUMENTS, OPERATIONS, VOCABULARY = 16, 12, 2, 14, 64


class Row(NamedTuple):
    tokens: int
    plain_bytes: int
    budget_bytes: int
    states_bytes: int  # of all chunks, the part that grows


def trainer_of(length: int, chunk: int, settings: Settings) -> Trainer:
    """For episodes of `length` tokens, rounded up to whole chunks."""
    chunks = -(-length // chunk)
    layout = Layout(chunk, chunks - DECISIONS, 1, NODES, DECISIONS, OPERATIONS, ARGUMENTS)
    if layout.task_chunks < 1:
        raise ValueError(f"{length} tokens are {chunks} chunks, but {DECISIONS} decisions and a task need more")
    return Trainer(VOCABULARY, layout, settings)


def random_episodes(trainer: Trainer, seed: int) -> Episodes:
    """Episodes of a trainer's shapes, with random tokens, nodes and decisions."""
    rng, layout, batch = np.random.default_rng(seed), trainer.layout, trainer.settings.batch
    decisions = (batch, DECISIONS)

    def below(most: int, *shape: int) -> np.ndarray:
        return rng.integers(0, most, shape, np.int32)

    return Episodes(
        tokens=1 + below(VOCABULARY - 1, layout.chunks, batch, layout.chunk),
        node_chunks=below(layout.chunks, batch, NODES),
        decision_chunks=np.sort(below(layout.chunks, *decisions)),
        operations=below(OPERATIONS, *decisions),
        arguments=below(NODES, *decisions, ARGUMENTS),
        operation_masks=np.ones((*decisions, OPERATIONS), np.bool_),
        argument_masks=np.ones((*decisions, ARGUMENTS, NODES), np.bool_),
        weights=np.ones(decisions, np.float32),
        own=np.zeros(batch, np.bool_),
        valid=np.ones(decisions, np.bool_),
    )


def measure(length: int, chunk: int, settings: Settings) -> Row:
    """Temporary bytes of one training step with `flax.linen.RNN` and within the budget of the settings."""
    sizes = []
    for limit in ("plain", settings.budget):
        trainer = trainer_of(length, chunk, dataclasses.replace(settings, budget=limit))
        program = trainer.compile(jax.eval_shape(trainer.first_state), random_episodes(trainer, seed=0))
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    layout = trainer.layout
    return Row(layout.chunks * chunk, *sizes, layout.chunks * settings.batch * settings.features * 4)


def run_updates(length: int, chunk: int, settings: Settings, updates: int) -> list[float]:
    """Seconds of each of some training steps on random episodes, compiled before."""
    trainer = trainer_of(length, chunk, settings)
    state, seconds = trainer.first_state(), []
    program = trainer.compile(state, random_episodes(trainer, seed=0))
    for number in range(updates):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(program(state, random_episodes(trainer, seed=number)))
        seconds.append(time.perf_counter() - start)
        _check_finite(state.variables, f"update {number} on {length} tokens")
    return seconds


def _check_finite(variables: Any, where: str) -> None:
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables)):
        raise ValueError(f"{where} has left weights that are not finite")
