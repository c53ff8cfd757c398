"""Functions with derivatives of their own. The rules here are wrong on purpose: one sees whether they are used."""

import jax
import jax.numpy as jnp

from tests.support.adversarial.table import adversary, draw, weight


@jax.custom_vjp
def tripled(v):
    """The sine, whose gradient is three times too large."""
    return jnp.sin(v)


tripled.defvjp(lambda v: (jnp.sin(v), v), lambda v, g: (3 * g * jnp.cos(v),))


@jax.custom_vjp
def linear(v, w):
    """A product, of which the weight's gradient is half of what it should be."""
    return v @ w


linear.defvjp(lambda v, w: (v @ w, (v, w)), lambda saved, g: (g @ saved[1].T, 0.5 * saved[0].T @ g))


@jax.custom_vjp
def clipped(v):
    """The identity, whose gradient is bent: not linear, so each step's must be bent before they are added."""
    return v


clipped.defvjp(lambda v: (v, None), lambda _, g: (0.2 * jnp.tanh(5 * g),))


@jax.custom_vjp
def gathered(v, index):
    """With an integer input, and the result by another name than the residual."""
    return v[index]


gathered.defvjp(
    lambda v, index: (v[index], (v, index)),
    lambda saved, g: (2 * jnp.zeros_like(saved[0]).at[saved[1]].add(g), None),
)


@jax.custom_jvp
def halved(v):
    return jnp.tanh(v)


halved.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), 0.5 * tangents[0] * (1 - jnp.tanh(primals[0]) ** 2)))


@adversary()
def relu_and_silu(w, h, x):
    h = jax.nn.relu(h @ w + x) - 0.4 * jax.nn.silu(x @ w)
    return h, jax.nn.silu(h)


@adversary(conservative=False)
def own_gradient_of_the_carry(w, h, x):
    h = tripled(0.3 * h @ w) + x
    return h, h


@adversary(conservative=False)
def own_gradient_of_x(w, h, x):
    h = jnp.tanh(h @ w + tripled(x) @ w)
    return h, tripled(x)


@adversary(conservative=False)
def own_gradient_of_the_weight(w, h, x):
    h = jnp.tanh(h @ tripled(w) + x)
    return h, h


@adversary(conservative=False)
def own_gradient_of_a_product(w, h, x):
    h = jnp.tanh(linear(h, w) + linear(x, w) + h @ w)
    return h, h


@adversary(conservative=False)
def bent_gradient_of_the_carry(w, h, x):
    h = jnp.tanh(clipped(h) @ w + x)
    return h, h


@adversary(conservative=False)
def bent_gradient_of_x(w, h, x):
    h = jnp.tanh(h @ w + clipped(x) @ w)
    return h, h


@adversary(conservative=False)
def bent_gradient_of_the_weight(w, h, x):
    """Each step's share of the gradient is bent, and not their sum."""
    h = jnp.tanh(h @ clipped(w) + x)
    return h, h


@adversary(lambda: {"w": weight(), "table": draw(3, 4, 3)}, xs=lambda n: jnp.arange(n) * 7 % 4, conservative=False)
def own_gradient_beside_an_integer(params, h, index):
    h = jnp.tanh(h @ params["w"] + gathered(params["table"], index))
    return h, index


@adversary(conservative=False)
def own_tangent(w, h, x):
    h = halved(h @ w) + halved(x)
    return h, halved(h @ halved(w))
