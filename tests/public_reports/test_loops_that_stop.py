"""A loop with a stopping criterion: `lax.cond` in a scan of the most steps, as in the guide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bptt_jax
from tests.support import comparison


def settle(scan, weight, x, most=1000):
    def is_moving(carry):
        return jnp.max(jnp.abs(carry[0] - carry[1])) > 1e-4

    def move(carry):
        return jnp.tanh(carry[0] @ weight + x), carry[0]

    def step(carry, _):
        return lax.cond(is_moving(carry), move, lambda carry: carry, carry), None

    return scan(step, (jnp.zeros_like(x), jnp.ones_like(x)), None, most)[0][0]


@pytest.mark.parametrize("lowering", [None, "nested"])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_loop_that_stops(lowering, mapped):
    """A fixed point, with the derivative of its iterations, also where each example stops at a step of its own."""
    normal = np.random.default_rng(0).normal
    weight, x = 0.2 * normal(size=(6, 6)), normal(size=(3, 6))

    def gradient(scan):
        run = functools.partial(settle, scan, most=60)
        run = jax.vmap(run, (None, 0)) if mapped else run
        return jax.grad(lambda weight, x: jnp.sum(run(weight, x) ** 2), (0, 1))(weight, x)

    ours = functools.partial(bptt_jax.scan, plan="(6*[10])", lowering=lowering)
    comparison.assert_same(gradient(ours), gradient(lax.scan), tolerance=1e-12)


def test_bytes_of_a_loop_that_stops():
    """The guide's figures."""
    types = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 256), (16, 256))]

    def bytes_of(scan):
        gradient = jax.jit(jax.grad(lambda weight, x: settle(scan, weight, x).sum()))
        return gradient.lower(*types).compile().memory_analysis().temp_size_in_bytes

    ours, theirs = bytes_of(functools.partial(bptt_jax.scan, budget="5%")), bytes_of(lax.scan)
    print(f"a loop that stops: {ours / 2**20:.1f} MiB, {theirs / 2**20:.0f} with jax.lax.scan")
    assert ours < 0.05 * theirs
