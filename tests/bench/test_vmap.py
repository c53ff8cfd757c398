"""A model for one example under `jax.vmap`, beside the same with the batch inside, and an Equinox model. Not part of
the suite; run it on a quiet machine:

python -m pytest tests/bench/test_vmap.py -s -o addopts=""
"""

import functools
import statistics
import time

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import bptt_jax
from bptt_jax._bench.cells import CELLS

MIB = 2**20
ROUNDS = 15


@pytest.fixture(autouse=True)
def strict_jax():
    """Instead of the suite's double precision: the programs are those that users run."""


def compiled(function, *arguments):
    """The compiled function, and its temporary bytes."""
    program = jax.jit(function).lower(*arguments).compile()
    return program, program.memory_analysis().temp_size_in_bytes


def seconds(program, arguments):
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


def ratio(program, baseline, arguments, of_baseline):
    """The median of pairwise ratios of the times of two programs, run in turn."""
    pairs = [(seconds(program, arguments), seconds(baseline, of_baseline)) for _ in range(ROUNDS + 1)]
    return statistics.median(a / b for a, b in pairs[1:])


def lstm(width):
    """(params, step, init) of one example; the step takes a batch as well."""
    params = CELLS["lstm"](1, width).params

    def step(params, carry, x):
        c, h = carry
        i, f, g, o = jnp.split(x @ params["Wx"] + h @ params["Wh"] + params["b"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (c, jax.nn.sigmoid(o) * jnp.tanh(c)), None

    return params, step, (jnp.zeros(width, jnp.float32), jnp.zeros(width, jnp.float32))


def flax_gru(width):
    cell = nn.GRUCell(width)
    init = jnp.zeros(width, jnp.float32)
    params = cell.init(jax.random.key(1), init, init)
    return params, lambda params, carry, x: (cell.apply(params, carry, x)[0], None), init


def loss_of(make, width, scan, batch=None):
    """(params, xs) -> a loss, of one example without an axis for it, or of a batch inside the step."""
    _, step, init = make(width)
    if batch is not None:
        init = jax.tree.map(lambda leaf: jnp.zeros((batch, *leaf.shape), leaf.dtype), init)

    def loss(params, xs):
        xs = xs if batch is None else jnp.swapaxes(xs, 0, 1)
        carry, _ = scan(lambda c, x: step(params, c, x), init, xs)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(carry))

    return loss


@pytest.mark.parametrize("share", [0.2, None])
@pytest.mark.parametrize(("batch", "width"), [(64, 128), (16, 256)])
@pytest.mark.parametrize("make", [lstm, flax_gru])
def test_vmap_takes_the_time_of_the_batch_inside(make, batch, width, share):
    xs = jax.random.normal(jax.random.key(0), (batch, 500, width), jnp.float32)
    params = make(width)[0]

    def mapped(scan):
        model = loss_of(make, width, scan)
        return compiled(jax.grad(lambda p, xs: jax.vmap(functools.partial(model, p))(xs).sum()), params, xs)

    theirs, lax_bytes = mapped(lax.scan)
    ours = functools.partial(bptt_jax.scan, budget=None if share is None else int(share * lax_bytes))
    program, taken = mapped(ours)
    inside, of_inside = compiled(jax.grad(loss_of(make, width, ours, batch)), params, xs)
    arguments = (params, xs)
    found = ratio(program, inside, arguments, arguments)
    of_lax = ratio(program, theirs, arguments, arguments)
    print(f"{make.__name__} ({batch}, {width}), {share}: {taken / MIB:.1f} MiB under vmap, of {lax_bytes / MIB:.1f}")
    print(f"  {of_inside / MIB:.1f} with the batch inside; time {found:.2f} of that, {of_lax:.2f} of lax.scan")
    assert taken <= lax_bytes * (share or 1)
    assert found <= 1.1


@pytest.mark.parametrize(("share", "most_time"), [(None, 1.0), (0.2, 1.1)])
def test_an_equinox_model_under_vmap(share, most_time):
    cell = equinox.nn.LSTMCell(16, 256, key=jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (64, 100, 16), jnp.float32)

    def gradient(scan):
        def model(cell, xs):
            init = (jnp.zeros(256, jnp.float32), jnp.zeros(256, jnp.float32))
            carry, _ = scan(lambda carry, x: (cell(x, carry), None), init, xs)
            return carry[0]

        return jax.grad(lambda cell, xs: jnp.sum(jax.vmap(functools.partial(model, cell))(xs)))

    theirs, lax_bytes = compiled(gradient(lax.scan), cell, xs)
    budget = None if share is None else int(share * lax_bytes)
    ours, taken = compiled(gradient(functools.partial(bptt_jax.scan, budget=budget)), cell, xs)
    found = ratio(ours, theirs, (cell, xs), (cell, xs))
    print(f"Equinox LSTM, {share}: {taken / MIB:.1f} MiB of lax.scan's {lax_bytes / MIB:.1f}, time {found:.2f} of it")
    assert taken <= (lax_bytes if budget is None else budget)
    assert found <= most_time
