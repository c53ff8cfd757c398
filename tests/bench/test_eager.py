"""Eager gradients of a step that is defined inside its caller, so a new function at each call, beside `jax.lax.scan`.
Not part of the suite; run it on a quiet machine:

python -m pytest tests/bench/test_eager.py -n 0 -s -o addopts=""
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import bptt_jax

ROUNDS = 8


@pytest.fixture(autouse=True)
def strict_jax():
    """Instead of the suite's double precision: the programs are those that users run."""


def seconds(scan, activation, arguments):
    weight, init, xs = arguments

    def step(carry, x):
        carry = activation(carry @ weight + x)
        return carry, None

    start = time.perf_counter()
    jax.block_until_ready(jax.grad(lambda init: scan(step, init, xs)[0].sum())(init))
    return time.perf_counter() - start


@pytest.mark.parametrize("options", [{}, {"budget": "120%"}, {"budget": "100kB"}, {"plan": "(5*[10])"}], ids=str)
@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.relu])
def test_a_step_made_anew_at_each_call(activation, options):
    arguments = 0.5 * jnp.eye(32), jnp.ones((4, 32)), jnp.ones((50, 4, 32))
    scan = functools.partial(bptt_jax.scan, **options)
    pairs = [(seconds(scan, activation, arguments), seconds(lax.scan, activation, arguments)) for _ in range(ROUNDS)]
    ratio = statistics.median(ours / theirs for ours, theirs in pairs[1:])
    print(f"{options}: {ratio:.3f} of lax.scan's {statistics.median(theirs for _, theirs in pairs):.3f} s")
    assert ratio <= 1.5
