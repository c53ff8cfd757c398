"""Scans within other programs: loops, checkpoints, other scans, callbacks, and no jit."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import bptt_jax
from bptt_jax import Remat, Repeat, Steps
from tests.support import comparison
from tests.support.adversarial import TABLE
from tests.support.adversarial.running import run_each

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")
BLOCKS = Repeat(3, Remat(Steps(4)))


def compare_losses(make_loss, *arguments):
    """The gradients of a loss, made of a scan, with `jax.lax.scan` and with blocks."""
    scans = (lax.scan, functools.partial(bptt_jax.scan, plan=BLOCKS))
    calls = [(jax.value_and_grad(make_loss(scan), argnums=tuple(range(len(arguments)))), *arguments) for scan in scans]
    theirs, ours = run_each(*calls)
    comparison.assert_same(ours, theirs, 1e-10)


def test_one_array_as_weight_and_first_carry_and_inputs():
    def make_loss(scan):
        def loss(w):
            def step(h, x):
                return jnp.tanh(h @ w + x @ w.T), h

            carry, ys = scan(step, w, jnp.stack([w * i for i in range(12)]))
            return jnp.sum(jnp.sin(carry)) + jnp.sum(ys[::2] * ys[1::2])

        return loss

    compare_losses(make_loss, TABLE["bias"].params()["w"])


def test_within_a_training_loop():
    """The weights are the carry of a loop around, and differentiated through it."""
    case = TABLE["bias"].case()

    def make_loss(scan):
        def loss(params, init, xs):
            carry, ys = scan(functools.partial(case.step, params), init, xs)
            return jnp.sum(jnp.sin(carry)) + jnp.sum(ys**2)

        def update(params, rate, init, xs):
            return jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(loss)(params, init, xs))

        def trained(params, init, xs):
            params, _ = lax.scan(lambda p, rate: (update(p, rate, init, xs), None), params, jnp.array([0.1, 0.05]))
            return loss(params, init, xs)

        return trained

    compare_losses(make_loss, case.params, case.init, case.xs(12))


def test_within_a_checkpoint():
    case = TABLE["shared_left_operand"].case()

    def make_loss(scan):
        @jax.checkpoint
        def part(params, init, xs):
            return scan(functools.partial(case.step, params), jnp.sin(init), xs)

        def loss(params, init, xs):
            carry, ys = part(params, part(params, init, xs)[0], xs)
            return jnp.sum(jnp.sin(carry)) + jnp.sum(ys**2)

        return loss

    compare_losses(make_loss, case.params, case.init, case.xs(12))


def test_within_itself():
    """The step scans as well: over layers, from the carry, with weights of the outer function."""
    case = TABLE["scan_over_layers"].case()

    def make_loss(scan):
        inner = lax.scan if scan is lax.scan else functools.partial(bptt_jax.scan, plan=Repeat(2, Remat(Steps(1))))

        def loss(params, init, xs):
            def step(h, x):
                return inner(lambda v, p: (jnp.tanh(v @ p["w"] + p["b"]), v), h + x, params)

            carry, ys = scan(step, init, xs)
            return jnp.sum(jnp.sin(carry)) + jnp.sum(ys**2)

        return loss

    compare_losses(make_loss, case.params, case.init, case.xs(12))


def test_without_jit():
    case = TABLE["shared_left_operand"].case()
    scans = (lax.scan, functools.partial(bptt_jax.scan, plan=BLOCKS))
    theirs, ours = (comparison.eager_grad(*comparison.make_loss(case, 12, scan)) for scan in scans)
    comparison.assert_same(ours, theirs, 1e-10)


def test_callbacks_see_each_step():
    """How often is not promised, but what they see is."""

    def seen_by(scan):
        seen = []

        def step(w, carry, x):
            carry = jnp.tanh(w * carry + x)
            jax.debug.callback(lambda carry, x: seen.append((round(float(carry), 9), float(x))), carry, x)
            return carry, None

        xs = jnp.arange(12.0) / 8
        jax.jit(jax.grad(lambda w: scan(functools.partial(step, w), 0.3, xs)[0]))(0.7)
        jax.effects_barrier()
        return set(seen)

    assert len(seen_by(lax.scan)) == 12
    assert seen_by(functools.partial(bptt_jax.scan, plan=BLOCKS)) == seen_by(lax.scan)
