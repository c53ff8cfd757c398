"""Callbacks of `jax.debug` in a step run once a step, in the first pass, at every plan, under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax_tqdm import scan_tqdm

import bptt_jax
from tests.support import comparison

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")
INIT, XS = np.random.default_rng(0).normal(size=3), np.random.default_rng(1).normal(size=(12, 3))
WAYS = [
    {},
    {"plan": "(3*[4])"},
    {"plan": "(2*[2*[3]])"},
    {"plan": "(12*[1])", "lowering": "nested"},
    {"plan": "(2*[2*[3]])", "lowering": "nested"},
    {"budget": "8KiB"},
]
TRANSFORMATIONS = {
    "evaluated": lambda f: f,
    "grad": jax.grad,
    "jit": lambda f: jax.jit(jax.grad(f)),
    "jvp": lambda f: lambda init: jax.jvp(f, (init,), (init,))[1],
    "forward over reverse": lambda f: lambda init: jax.jvp(jax.grad(f), (init,), (init,))[1],
    "reverse over reverse": lambda f: jax.grad(lambda init: jnp.sum(jnp.sin(jax.grad(f)(init)))),
    "vmap": lambda f: lambda init: jax.vmap(jax.grad(f))(jnp.stack([init, init]))[0],
    "vmap of jit": lambda f: lambda init: jax.vmap(jax.jit(jax.grad(f)))(jnp.stack([init, init]))[0],
}


def in_a_branch(call, carry, x):
    return lax.cond(x[0] > -9, lambda carry: (call(carry), jnp.sin(carry))[1], lambda carry: carry, carry)


def in_a_loop(call, carry, _x):
    return lax.scan(lambda carry, _: (call(carry), (jnp.sin(carry), None))[1], carry, None, 1)[0]


def in_a_scan(call, carry, _x):
    def body(carry, _):
        call(carry)
        return jnp.sin(carry), None

    return bptt_jax.scan(body, carry, None, 1, plan="[1]")[0]


PLACES = {
    "step": lambda call, carry, _x: (call(carry), jnp.sin(carry))[1],
    "jit": lambda call, carry, _x: (jax.jit(call)(carry), jnp.sin(carry))[1],
    "checkpoint": lambda call, carry, _x: jax.checkpoint(lambda carry: (call(carry), jnp.sin(carry))[1])(carry),
    "branch": in_a_branch,
    "loop": in_a_loop,
    "scan": in_a_scan,
}


def seen_by(place, scan, transform=jax.grad, ordered=False):
    """The derivative of a loss, and the number of steps of which callbacks told."""
    seen = []

    def call(carry):
        jax.debug.callback(lambda carry: seen.append(carry), carry[0], ordered=ordered)

    def step(carry, x):
        carry = jnp.tanh(PLACES[place](call, carry, x) + x)
        return carry, carry

    def loss(init):
        carry, ys = scan(step, init, XS)
        return jnp.sum(jnp.sin(ys)) + jnp.sum(carry)

    found = jax.block_until_ready(transform(loss)(INIT))
    jax.effects_barrier()
    return found, len(seen)


@pytest.mark.one_in(29)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_callbacks_run_once_a_step(options, transformation, place):
    """`jax.debug.print` in a step printed again in recomputation: 80 lines for 40 steps."""
    transform = TRANSFORMATIONS[transformation]
    ours, count = seen_by(place, functools.partial(bptt_jax.scan, **options), transform)
    theirs, _ = seen_by(place, lax.scan, transform)
    comparison.assert_same(ours, theirs, tolerance=1e-11)
    assert count == (24 if transformation.startswith("vmap") else 12)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_ordered_callbacks_run_once_a_step_and_in_order(options):
    """`jax.debug.callback(..., ordered=True)` in a loop over the values of the carry."""
    told = []

    def step(carry, x):
        jax.debug.callback(lambda x: told.append(float(x)), x[0], ordered=True)
        return jnp.tanh(carry + x), None

    jax.block_until_ready(jax.grad(lambda init: bptt_jax.scan(step, init, XS, **options)[0].sum())(INIT))
    jax.effects_barrier()
    assert told == XS[:, 0].tolist()


@pytest.mark.parametrize(("options", "count"), [(WAYS[1], 24), (WAYS[2], 30), (WAYS[4], 36), (WAYS[0], 12)], ids=str)
def test_recomputation_shows_where_it_is_asked_for(options, count):
    """How often does a plan evaluate my step? The counts are those of the plan, of the nest one level more often."""
    with bptt_jax.show_recomputation():
        _, seen = seen_by("step", functools.partial(bptt_jax.scan, **options))
    assert seen == count


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("options", WAYS[:5:2], ids=str)
def test_a_bar_of_progress(options, ordered):
    """A step of `jax_tqdm.scan_tqdm` under grad: a KeyError in its callback, as it was called again after its end."""
    xs = jnp.arange(12), XS

    @scan_tqdm(12, print_rate=3)
    def step(carry, x):
        if ordered:
            jax.debug.callback(lambda i: None, x[0], ordered=True)
        return jnp.tanh(carry + x[1]), None

    def gradient(scan):
        return jax.jit(jax.grad(lambda init: scan(step, init, xs)[0].sum()))(INIT)

    ours = gradient(functools.partial(bptt_jax.scan, **options))
    jax.effects_barrier()  # a callback that raises, raises here
    comparison.assert_same(ours, gradient(lax.scan), tolerance=1e-12)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_callbacks_of_a_backward_rule(options):
    """The cotangent printed by a `custom_vjp`: once a step, beside a callback of the first pass."""
    told = []

    @jax.custom_vjp
    def probe(carry):
        return carry

    def backward(_, ct):
        jax.debug.callback(lambda _: told.append("backward"), ct)
        return (ct,)

    probe.defvjp(lambda carry: (carry, None), backward)

    def step(carry, x):
        jax.debug.callback(lambda _: told.append("forward"), carry)
        return jnp.tanh(lax.cond(x[0] > -9, probe, lambda carry: carry, probe(carry)) + x), None

    gradient = jax.grad(lambda init: bptt_jax.scan(step, init, XS, **options)[0].sum())
    jax.block_until_ready(jax.jit(gradient)(INIT))
    jax.effects_barrier()
    assert (told.count("forward"), told.count("backward")) == (12, 24)
