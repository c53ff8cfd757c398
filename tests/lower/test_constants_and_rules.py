"""Steps whose parts look alike and differ: constants that print alike, callbacks, rules given to functions of JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, Steps
from tests.support import comparison

PLAN = Chain((Repeat(2, Remat(Steps(2))), Steps(1)))
XS = np.linspace(0.1, 1.0, 5)
OPTIONS = [{}, {"plan": PLAN}, {"plan": PLAN, "lowering": "nested"}]


@pytest.fixture(params=OPTIONS, ids=str)
def ours(request):
    return functools.partial(bptt_jax.scan, **request.param)


def vjp_of_ones(scan, step, start=0.3):
    init = jnp.array(start)
    outs, vjp = jax.vjp(lambda init, xs: scan(step, init, xs), init, jnp.asarray(XS))
    return outs, vjp(jax.tree.map(jnp.ones_like, outs))


def assert_as_lax_scan(ours, step, tolerance=1e-12):
    comparison.assert_same(vjp_of_ones(ours, step), vjp_of_ones(lax.scan, step), tolerance)


def test_constants_that_differ_after_eight_digits(ours):
    near, other = np.float64(0.12345678901), np.float64(0.12345678999)
    # Of the difference nine digits are lost; merged, it would be 0 in place of 0.8.
    assert_as_lax_scan(ours, lambda c, x: (c + x, (c * near - c * other) * 1e10), tolerance=1e-4)


def test_constants_under_print_options_of_a_notebook(ours):
    with np.printoptions(precision=3):
        assert_as_lax_scan(ours, lambda c, x: (c * 1.00041 - c * 1.00011 + c + 0.0 * x, None))


def test_callbacks_that_print_alike(ours):
    def times(weights, x):
        return np.asarray(x) * weights[1000]

    zeros = np.zeros(2001)
    fives = zeros.copy()
    fives[1000] = 5

    def call(weights, x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        callback = functools.partial(times, weights)
        return jax.pure_callback(callback, shape, lax.stop_gradient(x), vmap_method="sequential")

    assert_as_lax_scan(ours, lambda c, x: (c + x, c * call(zeros, x) - c * call(fives, x)))


def test_a_rule_of_the_users_own_for_a_function_of_jax(ours):
    """A rule need not be the derivative of its function: second derivatives tell."""
    sine = jax.custom_jvp(jnp.sin)
    sine.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), 2 * jnp.cos(primals[0]) * tangents[0]))

    def second(scan):
        def loss(c):
            carry, ys = scan(lambda c, x: (sine(c + x), c * c), c, jnp.asarray(XS))
            return jnp.sin(carry) + jnp.sum(jnp.sin(ys) * jnp.arange(1.0, 6.0))

        return jax.grad(jax.grad(loss))(jnp.array(0.3))

    comparison.assert_same(second(ours), second(lax.scan), tolerance=1e-12)


@pytest.mark.parametrize("order", ["value", "vmap of grad", "grad of vmap"])
def test_a_step_that_names_an_axis_while_no_input_is_mapped(ours, order):
    def program(scan):
        def last(c):
            return scan(lambda c, x: (jnp.sin(c + x + lax.axis_index("i").astype(x.dtype)), c), c, jnp.asarray(XS))[0]

        def mapped(run):
            return lambda c: jax.vmap(lambda _: run(c), axis_name="i")(jnp.ones(2))

        run = {"value": mapped(last), "vmap of grad": mapped(jax.grad(last))}.get(order)
        run = jax.grad(lambda c: jnp.sum(mapped(last)(c))) if run is None else run
        return jax.jit(run)(jnp.array(0.3))

    comparison.assert_same(program(ours), program(lax.scan), tolerance=1e-12)
