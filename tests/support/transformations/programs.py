"""Scans inside other loops and branches, inside themselves, and linear ones that are transposed."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.support.comparison import is_float
from tests.support.transformations.table import EVERY, batch, directions, row, scaled

SCALES = (0.5, 1.0)
# Rows with a step of their own: the floats of this one are a weight, a first carry, and xs.
OWN = ("tied",)


def summed(scan, m, floats, scales=SCALES):
    """The losses of differently scaled inputs, by an outer scan."""
    return scan(lambda total, s: (jnp.sin(total) + m.loss(scaled(floats, s)), total), 0.0, jnp.array(scales))[0]


@row()
def inside_lax_scan(m, floats):
    """A loop over episodes that is differentiated through."""
    return jax.grad(lambda f: summed(lax.scan, m, f))(floats)


@row()
def inside_itself(m, floats):
    """Words of letters: a scan in the step of a scan, both with the same options."""
    return jax.grad(lambda f: summed(m.scan, m, f))(floats)


@row()
def inside_itself_under_vmap(m, floats):
    """The same for a batch, and for each example."""
    of_each = jax.vmap(jax.grad(lambda f: summed(m.scan, m, f)))(batch(floats)[0])
    return of_each, jax.grad(lambda f: jax.vmap(lambda f: summed(m.scan, m, f))(batch(f)[0]).sum())(floats)


@row()
def three_deep(m, floats):
    """Paragraphs of words of letters."""

    def loss(f):
        return m.scan(lambda total, s: (total + summed(m.scan, m, scaled(f, s)), None), 0.0, jnp.array(SCALES))[0]

    return jax.grad(loss)(floats)


@row()
def inside_vmapped_lax_scan(m, floats):
    """Episodes of a batch of agents."""
    return jax.grad(lambda f: jax.vmap(lambda f: summed(lax.scan, m, f))(batch(f)[0]).sum())(floats)


@row()
def gradient_inside_lax_scan(m, floats):
    """A training loop."""

    def update(f, rate):
        value, gradient = jax.value_and_grad(m.loss)(f)
        return [leaf - rate * g for leaf, g in zip(f, gradient, strict=True)], value

    return lax.scan(update, floats, jnp.array([0.1, 0.05, 0.02]))


@row()
def inside_vmapped_cond(m, floats):
    """Examples of which only some go through the model."""

    def one(is_used, f):
        return lax.cond(is_used, m.loss, lambda f: jnp.sum(f[0]), f)

    return jax.grad(lambda f: jax.vmap(one)(jnp.array([True, False, True]), batch(f)[0]).sum())(floats)


@row()
def inside_vmapped_while_loop(m, floats):
    """Descent by each example, for as many steps as it needs."""

    def trained(n, f):
        def update(state):
            i, f = state
            return i + 1, [leaf - 0.1 * g for leaf, g in zip(f, jax.grad(m.loss)(f), strict=True)]

        return lax.while_loop(lambda state: state[0] < n, update, (0, f))

    return jax.vmap(trained)(jnp.array([1, 3, 2]), batch(floats)[0])


@row()
def inside_lax_map_and_switch(m, floats):
    """One example after another, each with a model of several."""
    models = [m.loss, lambda f: 2 * m.loss(scaled(f, 0.5)), lambda f: jnp.sum(f[0] ** 2)]
    which, examples = jnp.array([2, 0, 1]), batch(floats)[0]
    return jax.grad(lambda f: lax.map(lambda one: lax.switch(one[0], models, one[1]), (which, f)).sum())(examples)


@row()
def of_which_one_result_is_read(m, floats):
    """A model of whose results one is used, in a loop that is computed again; its gradient, mapped afterwards too."""

    def loss(f):
        def body(total, s):
            read = next(filter(is_float, jax.tree.leaves(m.results(scaled(f, s)))))
            return total + jnp.sum(jnp.sin(read)), None

        return lax.scan(jax.checkpoint(body), 0.0, jnp.array(SCALES))[0]

    gradient = jax.jit(jax.grad(loss))
    return gradient(floats), jax.vmap(gradient)(batch(floats)[0]), jax.jvp(gradient, (floats,), (directions(floats),))


# Linear scans


def filtered(m, w, xs, init=None):
    """A linear step in xs and the carry."""
    init = jnp.zeros_like(xs[0]) if init is None else init
    return m.scan(lambda c, x: (0.5 * c + x @ w, c.sum(0)), init, xs)


@row(OWN)
def linear_transpose(m, floats):
    """A linear filter, and its adjoint."""
    w, init, xs = floats
    cotangents = (init, jnp.sin(xs[:, 0]))
    of_xs = jax.linear_transpose(lambda xs: filtered(m, w, xs), xs)
    of_both = jax.linear_transpose(lambda init, xs: filtered(m, w, xs, init), init, xs)
    twice = jax.linear_transpose(lambda ct: of_xs(ct)[0], cotangents)
    return of_xs(cotangents), of_both(cotangents), twice(xs)


@row(OWN)
def vmap_of_linear_transpose(m, floats):
    """The adjoint, of a batch of cotangents and with a batch of weights; and its derivative with respect to these."""
    w, init, xs = floats
    cotangents = (init, jnp.sin(xs[:, 0]))

    def adjoint(w, cotangents):
        return jax.linear_transpose(lambda xs: filtered(m, w, xs), xs)(cotangents)[0]

    over_cotangents = jax.vmap(lambda s: adjoint(w, (s * cotangents[0], s * cotangents[1])))(jnp.array(SCALES))
    over_weights = jax.vmap(lambda s: adjoint(s * w, cotangents))(jnp.array(SCALES))
    return over_cotangents, over_weights, jax.grad(lambda w: jnp.sum(jnp.sin(adjoint(w, cotangents))))(w)


@row(OWN)
def rule_that_scans_over_tangents(m, floats):
    """A custom_jvp rule with a scan that is linear in the tangents: reverse mode transposes it."""
    w, _, xs = floats

    @jax.custom_jvp
    def smooth(w, xs):
        return lax.scan(lambda c, x: (0.5 * c + jnp.sin(x) @ w, c), jnp.zeros_like(xs[0]), xs)

    @smooth.defjvp
    def rule(primals, tangents):
        (w, xs), (dw, dxs) = primals, tangents

        def step(c, each):
            x, dx = each
            return 0.5 * c + 3 * (jnp.cos(x) * dx) @ w + jnp.sin(x) @ dw, c

        return smooth(w, xs), m.scan(step, jnp.zeros_like(xs[0]), (xs, dxs))

    def loss(w, xs):
        c, ys = smooth(w, xs)
        return jnp.sum(jnp.sin(c)) + jnp.sum(ys**2)

    of_each = jax.vmap(jax.grad(loss, (0, 1)), in_axes=(None, 0))(w, jnp.stack([xs, -xs]))
    return jax.grad(loss, (0, 1))(w, xs), jax.jvp(loss, (w, xs), (jnp.cos(w), jnp.cos(xs))), of_each


@row(OWN)
def rule_that_scans_over_values_and_tangents(m, floats):
    """The same, with one scan for values and tangents, of which the values are not linear."""
    w, _, xs = floats

    @jax.custom_jvp
    def smooth(xs):
        return lax.scan(lambda c, x: (jnp.tanh(c @ w + x),) * 2, jnp.zeros_like(xs[0]), xs)[1]

    @smooth.defjvp
    def rule(primals, tangents):
        def step(carry, each):
            (c, dc), (x, dx) = carry, each
            c = jnp.tanh(c @ w + x)
            dc = (1 - c**2) * (dc @ w + 3 * dx)
            return (c, dc), (c, dc)

        zero = jnp.zeros_like(xs[0])
        return m.scan(step, (zero, zero), (*primals, *tangents))[1]

    def loss(xs):
        return jnp.sum(smooth(xs) ** 2)

    return jax.grad(loss)(xs), jax.jvp(loss, (xs,), (jnp.cos(xs),)), jax.vmap(jax.grad(loss))(jnp.stack([xs, -xs]))


@row(tuple(name for name in EVERY if name != "cond"))  # under vmap, JAX cannot transpose it
def transpose_of_tangents(m, floats):
    """The tangent as a function of the direction, transposed by hand: the gradient once more.

    Of one example, and of a batch along one direction, whose gradients are then added.
    """

    def tangent(direction):
        return jax.jvp(m.loss, (floats,), (direction,))[1]

    def tangents(direction):
        examples, axes = batch(floats, 1, lambda i: i != 1)
        along = jax.vmap(lambda f: jax.jvp(m.loss, (f,), (direction,))[1], in_axes=(axes,))
        return along(examples)

    direction = directions(floats)
    of_one = jax.linear_transpose(tangent, direction)(jnp.float64(2.0))
    return of_one, jax.linear_transpose(tangents, direction)(jnp.array([0.5, 1.0, -2.0]))
