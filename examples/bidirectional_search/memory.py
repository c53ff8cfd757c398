"""Gradient temporaries of the training step against the length of the episode, by compiling only.

The same reader, heads and loss; `flax.linen.RNN` (`jax.lax.scan`) keeps what every token needs for its backward pass,
`bptt_jax.linen.RNN` stays within its budget. What grows with the length under a fixed budget are the states of chunks,
of which keys and decisions are picked, and their gradients.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from examples.bidirectional_search.policy import Choice, Episodes, Policy

NODES, DECISIONS, ARGUMENTS, OPERATIONS, VOCABULARY = 16, 12, 2, 14, 64


class Row(NamedTuple):
    tokens: int
    plain_bytes: int
    budget_bytes: int
    states_bytes: int  # of all chunks, the part that grows
    compile_seconds: float


def episodes_of(length: int, batch: int, chunk: int) -> Episodes:
    """The shapes of a batch of episodes of `length` tokens, rounded up to whole chunks."""
    shape = jax.ShapeDtypeStruct
    decisions = (batch, DECISIONS)
    return Episodes(
        tokens=shape((-(-length // chunk), batch, chunk), jnp.int32),
        node_chunks=shape((batch, NODES), jnp.int32),
        decision_chunks=shape(decisions, jnp.int32),
        operations=shape(decisions, jnp.int32),
        arguments=shape((*decisions, ARGUMENTS), jnp.int32),
        operation_masks=shape((*decisions, OPERATIONS), jnp.bool_),
        argument_masks=shape((*decisions, ARGUMENTS, NODES), jnp.bool_),
        weights=shape(decisions, jnp.float32),
        valid=shape(decisions, jnp.bool_),
    )


def loss_of(policy: Policy, variables: Any, episodes: Episodes) -> jax.Array:
    """Minus the log-probability of the decisions, per episode."""
    choice: Choice = policy.apply(variables, episodes)
    return -jnp.sum(choice.log_probability * episodes.weights) / episodes.weights.shape[0]


def compiled_update(policy: Policy, episodes: Episodes) -> Any:
    """One training step, (variables, optimiser's state, episodes) -> the first two, compiled for these shapes."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    def update(variables: Any, state: Any, episodes: Episodes) -> Any:
        gradient = jax.grad(lambda v: loss_of(policy, v, episodes))(variables)
        change, state = optimizer.update(gradient, state)
        return optax.apply_updates(variables, change), state

    variables = jax.eval_shape(policy.init, jax.random.key(0), episodes)
    return jax.jit(update).lower(variables, jax.eval_shape(optimizer.init, variables), episodes).compile()


def measure(length: int, batch: int, features: int, chunk: int, budget: int | str) -> Row:
    """Temporary bytes of one training step with `flax.linen.RNN` and within a budget."""
    episodes, bytes_ = episodes_of(length, batch, chunk), []
    for limit in ("plain", budget):
        policy = Policy(VOCABULARY, OPERATIONS, ARGUMENTS, features, limit)
        start = time.perf_counter()
        update = compiled_update(policy, episodes)
        seconds = time.perf_counter() - start
        bytes_.append(update.memory_analysis().temp_size_in_bytes)
    states = episodes.tokens.shape[0] * batch * features * 4
    return Row(episodes.tokens.shape[0] * chunk, bytes_[0], bytes_[1], states, seconds)
