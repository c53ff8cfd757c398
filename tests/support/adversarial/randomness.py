"""Random numbers: the same bits must be drawn, whatever is batched, and hard thresholds must fall the same way."""

import jax
import jax.numpy as jnp

from tests.support.adversarial.table import adversary, batch, inputs, keys, weight


def dropout(key, v):
    return jnp.where(jax.random.uniform(key, v.shape, v.dtype) < 0.7, v / 0.7, 0.0)


for impl in ("threefry2x32", "rbg"):

    @adversary(xs=lambda n, impl=impl: (keys(3, n, impl=impl), inputs(n)), name=f"dropout_with_{impl}_keys_in_xs")
    def dropout_with_keys_in_xs(w, h, x):
        key, x = x
        h = jnp.tanh(dropout(key, h) @ w + dropout(key, x) @ w)
        return h, dropout(key, h)


@adversary(init=lambda: (batch(), keys(3, impl="rbg")))
def key_in_the_carry(w, carry, x):
    h, key = carry
    key, draw = jax.random.split(key)
    h = jnp.tanh(dropout(draw, h) @ w + x)
    return (h, key), key


@adversary(lambda: {"w": weight(), "key": keys(3)}, lambda: (batch(), jnp.uint32(5)))
def key_folded_from_a_count(params, carry, x):
    h, count = carry
    noise = jax.random.normal(jax.random.fold_in(params["key"], count), h.shape, h.dtype)
    h = jnp.tanh(h @ params["w"] + x + 0.3 * noise)
    return (h, count + 1), h


@adversary(xs=lambda n: (keys(3, n, impl="rbg"), inputs(n)))
def drawn_from_x_alone(w, h, x):
    """What to hoist: noise that is scaled and multiplied before it meets the carry."""
    key, x = x
    noise = jax.random.normal(key, x.shape, x.dtype) * x
    h = jnp.tanh(h @ w + noise @ w)
    return h, noise


@adversary(lambda: {"w": weight(), "key": keys(3, impl="rbg")})
def the_same_draw_in_every_step(params, h, x):
    """Variational dropout, of the carry, of a weight and of x: invariant keys and bits."""
    first, second = jax.random.split(params["key"])
    h = jnp.tanh(dropout(first, h) @ dropout(second, params["w"]) + dropout(first, x) @ params["w"])
    return h, h


@adversary(xs=lambda n: (keys(3, n, impl="rbg"), inputs(n)))
def accepted_by_chance_of_the_carry(w, h, x):
    """A hard threshold on random bits that the carry sets: one other bit, and the trajectory is another."""
    key, x = x
    u = jax.random.uniform(key, h.shape, h.dtype)
    accept = u < jax.nn.sigmoid(h)
    h = jnp.where(accept, jnp.tanh(h @ w + x), 0.9 * h)
    return h, accept


@adversary(xs=lambda n: (keys(3, n, impl="rbg"), inputs(n)))
def sampled_categories(w, h, x):
    key, x = x
    token = jax.random.categorical(key, x + h)
    h = jnp.tanh(h @ w + w[token] + x)
    return h, token


@adversary()
def threshold_on_the_carry(w, h, x):
    """A spiking neuron: which way an entry falls must not depend on how a product is arranged."""
    spike = h > 0.3
    h = jnp.where(spike, 0.1 * x, 0.8 * h + jnp.tanh(h @ w + x))
    return h, spike
