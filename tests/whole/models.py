"""Training steps for `largest_budget`: a byte-level model of Flax layers with Adam, and its arguments' shapes."""

import flax.linen as nn
import jax
import optax

import bptt_jax

VOCABULARY, WIDTH, BATCH, LENGTH = 64, 16, 4, 300
ADAM = optax.adam(1e-2)


class Bytes(nn.Module):
    """Logits of the next byte: `layers` recurrent layers that share a budget."""

    budget: int | None
    layers: int = 2

    @nn.compact
    def __call__(self, text):
        hidden = nn.Embed(VOCABULARY, WIDTH)(text)
        part = bptt_jax.linen.share_budget(self.budget, self.layers)
        for _ in range(self.layers):
            hidden = bptt_jax.linen.RNN(nn.OptimizedLSTMCell(WIDTH), time_major=True, budget=part)(hidden)
        return nn.Dense(VOCABULARY)(hidden)


def loss_of(model, variables, text):
    logits = model.apply(variables, text[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[1:]).mean()


def make_for(layers, **options):
    """`make` for a model of so many layers; `options` are those of `jax.jit`."""

    def make(budget):
        model = Bytes(budget, layers)

        def update(state, text):
            variables, moments = state
            loss, gradient = jax.value_and_grad(lambda v: loss_of(model, v, text))(variables)
            change, moments = ADAM.update(gradient, moments)
            return (optax.apply_updates(variables, change), moments), loss

        return jax.jit(update, donate_argnums=0, **options)

    return make


def start(layers):
    """The first state, and a batch of shape (LENGTH + 1, BATCH)."""
    text = jax.random.randint(jax.random.key(1), (LENGTH + 1, BATCH), 0, VOCABULARY)
    variables = Bytes(None, layers).init(jax.random.key(0), text[:-1])
    return (variables, ADAM.init(variables)), text


def shapes_of(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def total_bytes(compiled):
    """As users count them, by XLA's report of the whole program."""
    analysis = compiled.memory_analysis()
    taken = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return taken + analysis.temp_size_in_bytes
