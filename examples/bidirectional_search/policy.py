"""The policy: one recurrent reader over one token stream per episode, an operation head, a pointer over node keys.

The stream is the task's tokens and then, for every action, the action and its new node: nothing is read twice. It comes
in chunks of a fixed number of tokens, and every node ends at the end of a chunk, so what leaves the loop is one state
per chunk: keys of nodes and states of decisions are picked out of these. The loop over chunks is a `bptt_jax.linen.RNN`
with a budget, whose step is the loop over the tokens of a chunk. A state per token out of the loop would grow with the
episode whatever the budget.

At a decision the policy gives logits over operations, then over nodes for each argument in turn, knowing the operation
and the arguments before. Everything is masked structurally: arity, type, groundedness, and nothing else.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import bptt_jax
from examples.bidirectional_search.domain import PAD


class Episodes(NamedTuple):
    """A batch of whole episodes, padded; N node slots, D decisions, A argument slots."""

    tokens: Any  # (chunks, batch, chunk) int32
    node_chunks: Any  # (batch, N) int32: the chunk that a node ends with
    decision_chunks: Any  # (batch, D) int32: the chunk before a decision
    operations: Any  # (batch, D) int32, as taken
    arguments: Any  # (batch, D, A) int32, as taken
    operation_masks: Any  # (batch, D, operations) bool
    argument_masks: Any  # (batch, D, A, N) bool, for the operation taken; a slot it does not have is all False
    weights: Any  # (batch, D) float32: of the log-probability in the loss, 0 for padding
    own: Any  # (batch,) bool: the policy's own play, which the entropy bonus is of: its gradient needs that
    valid: Any  # (batch, D) bool: what is no padding


class Choice(NamedTuple):
    """What a policy says of decisions, each (batch, D)."""

    log_probability: jax.Array
    entropy: jax.Array
    likeliest: jax.Array  # bool: whether the operation and the arguments taken are the ones it would take itself


class HoldingCell(nn.RNNCellBase):
    """A Flax GRU that reads integer tokens and keeps its state over padding."""

    features: int
    vocabulary: int

    @nn.compact
    def __call__(self, carry: jax.Array, tokens: jax.Array) -> tuple[jax.Array, None]:
        embedded = nn.Embed(self.vocabulary, self.features, name="embedding")(tokens)
        after, _ = nn.GRUCell(self.features, name="gru")(carry, embedded)
        return jnp.where((tokens == PAD)[..., None], carry, after), None

    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> jax.Array:
        return jnp.zeros((*input_shape, self.features), jnp.float32)

    num_feature_axes = 0


class ChunkCell(nn.RNNCellBase):
    """A recurrent cell whose step is a chunk of tokens: (batch, features), (batch, chunk) -> the state behind it.

    A chunk of padding in the whole batch is skipped, so episodes of all lengths can be one program of the longest.
    With `truncate` no gradient goes from a chunk into the one before: truncated backpropagation, for comparison.
    """

    features: int
    vocabulary: int
    truncate: bool = False
    make_rnn: Callable[..., nn.Module] = bptt_jax.linen.RNN

    @nn.compact
    def __call__(self, carry: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry = jax.lax.stop_gradient(carry) if self.truncate else carry
        reader = self.make_rnn(
            HoldingCell(self.features, self.vocabulary, name="token"), return_carry=True, name="tokens"
        )

        def read(reader: nn.Module, carry: jax.Array) -> jax.Array:
            return reader(tokens, initial_carry=carry)[0]

        if self.is_initializing():  # both branches would have to make the weights
            carry = read(reader, carry)
        else:
            carry = nn.cond(jnp.any(tokens != PAD), read, lambda _, carry: carry, reader, carry)
        return carry, carry

    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> jax.Array:
        return jnp.zeros((*input_shape[:-1], self.features), jnp.float32)

    num_feature_axes = 1


class Policy(nn.Module):
    """The reader and its two heads.

    Attributes:
      vocabulary, operations: how many tokens and operations there are.
      argument_slots: the most arguments that an operation has.
      features: of the GRU and of the heads.
      budget: for the backward pass of the reader, as `bptt_jax.scan` takes it; or "plain" for `flax.linen.RNN`, which
        keeps what every token needs.
      truncate: stops gradients between chunks.
    """

    vocabulary: int
    operations: int
    argument_slots: int
    features: int = 64
    budget: int | str | None = None
    truncate: bool = False

    def setup(self) -> None:
        plain = self.budget == "plain"
        cell = ChunkCell(self.features, self.vocabulary, self.truncate, nn.RNN if plain else bptt_jax.linen.RNN)
        if plain:
            self.reader = nn.RNN(cell, time_major=True, return_carry=True)
        else:
            self.reader = bptt_jax.linen.RNN(cell, time_major=True, return_carry=True, budget=self.budget)
        self.hidden = nn.Dense(self.features)
        self.operation_head = nn.Dense(self.operations)
        self.operation_embedding = nn.Embed(self.operations, self.features)
        self.query = nn.Dense(self.features)
        self.key = nn.Dense(self.features, use_bias=False)

    def read(self, carry: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Reads on from `carry`: (batch, features), (chunks, batch, chunk) -> the last state, each chunk's state."""
        last, states = self.reader(tokens, initial_carry=carry)
        return last, states

    def __call__(self, episodes: Episodes) -> Choice:
        """Reads whole episodes and judges their decisions as they were taken."""
        batch = episodes.tokens.shape[1]
        _, states = self.read(jnp.zeros((batch, self.features), jnp.float32), episodes.tokens)
        states = jnp.swapaxes(states, 0, 1)
        keys = jnp.take_along_axis(states, episodes.node_chunks[..., None], axis=1)
        decisions = jnp.take_along_axis(states, episodes.decision_chunks[..., None], axis=1)
        return self.judge(decisions, keys, episodes)

    def judge(self, states: jax.Array, keys: jax.Array, taken: Episodes) -> Choice:
        """Decisions as they were taken; states (batch, D, H), keys (batch, N, H)."""
        operation_log_p = masked_log_softmax(self.operation_logits(states), taken.operation_masks)
        total = _pick(operation_log_p, taken.operations)
        entropy = _entropy(operation_log_p, taken.operation_masks)
        likeliest = _argmax(operation_log_p) == taken.operations
        pointing = self.pointer(states, keys, taken.operations)
        for slot in range(self.argument_slots):
            argument, mask = taken.arguments[..., slot], taken.argument_masks[..., slot, :]
            log_p = masked_log_softmax(pointing.logits(), mask)
            used = mask.any(-1)  # an operation without this argument has no log-probability for it
            argument_entropy = jnp.where(used, _entropy(log_p, mask), 0.0)
            # This is the entropy behind what was taken, so its mean also depends on how that is chosen: the second term
            # is 0 and carries that part of the gradient.
            score = (total - jax.lax.stop_gradient(total)) * jax.lax.stop_gradient(argument_entropy)
            entropy += argument_entropy + score
            total += jnp.where(used, _pick(log_p, argument), 0.0)
            likeliest &= ~used | (_argmax(log_p) == argument)
            pointing = pointing.point(argument, used)
        return Choice(total, entropy, likeliest)

    def operation_logits(self, states: jax.Array) -> jax.Array:
        return self.operation_head(nn.relu(self.hidden(states)))

    def pointer(self, states: jax.Array, keys: jax.Array, operations: jax.Array) -> "Pointing":
        context = jnp.concatenate([states, self.operation_embedding(operations)], axis=-1)
        return Pointing(self.query, context, self.key(keys) / math.sqrt(self.features), keys, jnp.zeros_like(states))

    def choose(self, states: jax.Array, keys: jax.Array, masks: tuple[Any, Any], key: jax.Array, greedy: Any) -> Any:
        """Draws one decision each, or takes the likeliest operation and then the likeliest arguments.

        Args:
          states: (batch, H).
          keys: (batch, N, H).
          masks: of operations (batch, operations) and of the arguments of each (batch, operations, A, N).
          key: for drawing.
          greedy: bool (), an array, so that both ways are one program.

        Returns:
          operations (batch,), arguments (batch, A), log-probabilities (batch,).
        """
        operation_masks, argument_masks = masks
        keys_of_draws = jax.random.split(key, self.argument_slots + 1)
        states = states[:, None]
        log_p = masked_log_softmax(self.operation_logits(states), operation_masks[:, None])
        operation, total = _draw(log_p, keys_of_draws[0], greedy)
        possible = jnp.take_along_axis(argument_masks, operation[..., None, None], axis=1)  # (batch, 1, A, N)
        pointing = self.pointer(states, keys, operation)
        arguments = []
        for slot in range(self.argument_slots):
            mask = possible[:, :, slot]
            argument, log_p = _draw(masked_log_softmax(pointing.logits(), mask), keys_of_draws[slot + 1], greedy)
            total += jnp.where(mask.any(-1), log_p, 0.0)
            pointing = pointing.point(argument, mask.any(-1))
            arguments.append(argument[:, 0])
        arguments = jnp.stack(arguments, -1) if arguments else jnp.zeros((len(total), 0), jnp.int32)
        return operation[:, 0], arguments, total[:, 0]


class Pointing(NamedTuple):
    """An autoregressive pointer between two arguments."""

    query: Callable[[jax.Array], jax.Array]
    context: jax.Array  # (batch, D, 2H): the state and the operation
    projected: jax.Array  # (batch, N, H)
    keys: jax.Array  # (batch, N, H)
    before: jax.Array  # (batch, D, H): what has been pointed at

    def logits(self) -> jax.Array:
        query = self.query(jnp.concatenate([self.context, self.before], axis=-1))
        return jnp.einsum("bnh,bdh->bdn", self.projected, query)

    def point(self, argument: jax.Array, used: jax.Array) -> "Pointing":
        key = jnp.take_along_axis(self.keys, argument[..., None], axis=1)
        # Halved, so that the order of arguments is not lost in their sum.
        return self._replace(before=0.5 * self.before + jnp.where(used[..., None], key, 0.0))


def masked_log_softmax(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Log-probabilities under a mask; finite everywhere, also where a mask is empty."""
    return jax.nn.log_softmax(jnp.where(mask, logits, -1e9), axis=-1)


def _pick(log_probabilities: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(log_probabilities, index[..., None], axis=-1)[..., 0]


def _argmax(values: jax.Array) -> jax.Array:
    return jnp.argmax(values, axis=-1).astype(jnp.int32)


def _draw(log_probabilities: jax.Array, key: jax.Array, greedy: jax.Array) -> tuple[jax.Array, jax.Array]:
    noise = jax.random.gumbel(key, log_probabilities.shape, log_probabilities.dtype)
    drawn = _argmax(log_probabilities + jnp.where(greedy, 0.0, noise))
    return drawn, _pick(log_probabilities, drawn)


def _entropy(log_probabilities: jax.Array, mask: jax.Array) -> jax.Array:
    return -jnp.sum(jnp.where(mask, jnp.exp(log_probabilities) * log_probabilities, 0.0), axis=-1)


def remember(variables: Any, horizon: int, key: jax.Array) -> Any:
    """`variables` with the update gate's bias log U(1, 2 horizon): states that last from one token to the horizon.

    The expected time that a gate with bias b keeps a state is 1 + e^b (Tallec and Ollivier, Can recurrent neural
    networks warp time?, ICLR 2018).
    """

    def set_bias(path: Any, leaf: jax.Array) -> jax.Array:
        names = [getattr(entry, "key", None) for entry in path]
        if names[-2:] != ["iz", "bias"]:
            return leaf
        return jnp.log(jax.random.uniform(key, leaf.shape, leaf.dtype, 1.0, max(2.0 * horizon, 1.0 + 1e-3)))

    return jax.tree_util.tree_map_with_path(set_bias, variables)
