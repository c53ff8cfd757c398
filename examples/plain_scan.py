"""A step of your own: its gradient within a budget, and the plan behind it.

python examples/plain_scan.py
"""

import functools

import jax
import jax.numpy as jnp

import bptt_jax

BUDGET = "10%"


def step(weights, carry, x):
    carry = jnp.tanh(carry @ weights + x)
    return carry, None


def loss(weights, init, xs):
    carry, _ = bptt_jax.scan(functools.partial(step, weights), init, xs, budget=BUDGET)
    return jnp.mean(carry**2)


weights = jax.random.normal(jax.random.key(0), (64, 64)) / 8
init, xs = jnp.zeros((16, 64)), jax.random.normal(jax.random.key(1), (1000, 16, 64))
print("norm of the gradient:", jnp.linalg.norm(jax.jit(jax.grad(loss))(weights, init, xs)))
print(bptt_jax.explain(functools.partial(step, weights), init, xs, budget=BUDGET))
