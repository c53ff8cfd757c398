"""NNX cells with every kind of state, and what a layer of them does beside Flax's own."""

import jax
import jax.numpy as jnp
from flax import nnx

import bptt_jax
from tests.support import comparison

DOUBLE = {"param_dtype": jnp.float64}


@bptt_jax.nnx.rnn(budget="70%")
class Elman(nnx.RNNCellBase):
    """A cell of the user's own."""

    def __init__(self, features: int, gain: float = 0.5, *, rngs: nnx.Rngs):
        self.features, self.gain = features, gain
        self.mix = nnx.Linear(5, features, rngs=rngs, **DOUBLE)
        self.back = nnx.Linear(features, features, rngs=rngs, **DOUBLE)
        self.again = self.back  # one variable under two names

    def __call__(self, carry, x):
        carry = jnp.tanh(self.mix(x) + self.gain * self.back(carry))
        return carry, {"y": self.again(carry)}

    def initialize_carry(self, input_shape, rngs=None):
        return jax.random.normal(rngs(), (*input_shape[:-1], self.features), jnp.float64)

    @property
    def num_feature_axes(self):
        return 1


class Counter(nnx.Variable):
    """State that is neither a parameter nor statistics."""


class Busy(Elman.cell_class):
    """A cell with every kind of state: keys, statistics, a counter, a constant, and what it sows for each step."""

    def __init__(self, features: int, *, sows: bool = False, rngs: nnx.Rngs):
        super().__init__(features, rngs=rngs)
        self.sows = sows
        self.dropout = nnx.Dropout(0.4, rngs=rngs)
        self.norm = nnx.BatchNorm(features, rngs=rngs, **DOUBLE)
        for statistics in (self.norm.mean, self.norm.var):
            statistics.set_value(statistics[...].astype(jnp.float64))
        self.steps = Counter(jnp.int32(0))
        self.scale = nnx.Variable(jnp.float64(0.7))

    def __call__(self, carry, x):
        self.steps[...] += 1
        carry, y = super().__call__(self.dropout(carry), x)
        if self.sows:
            self.sow(nnx.Intermediate, "carries", carry)
        return carry, self.scale[...] * self.norm(y["y"])


def inputs(*shape):
    return jax.random.normal(jax.random.key(1), shape or (2, 30, 5), jnp.float64)


def outcome(layer, xs, **call):
    """All that a layer does: results, gradients of parameters and inputs, and its state behind the call."""

    @nnx.jit
    def run(layer, xs):
        def loss(layer, xs):
            result = layer(xs, **call)
            return sum(jnp.sum(jnp.sin(leaf)) / leaf.size for leaf in jax.tree.leaves(result)), result

        return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, xs)

    return run(layer, xs), nnx.state(layer)


def pair(cell, budget="70%", **options):
    """Ours and Flax's, with equal cells. Not verified: that compiles more, and changes no result."""
    ours = bptt_jax.nnx.RNN(nnx.clone(cell), budget=budget, verify=False, **options)
    return ours, nnx.RNN(nnx.clone(cell), **options)


def assert_equal(cell, xs, budget="70%", call=None, **options):
    ours, theirs = (outcome(layer, xs, **(call or {})) for layer in pair(cell, budget, **options))
    comparison.assert_same(ours, theirs, tolerance=1e-10)
    return ours
