"""Forward mode, Jacobians, and derivatives of derivatives."""

import jax
import jax.numpy as jnp

from tests.support.comparison import is_float
from tests.support.transformations.table import EVERY, FORWARD, along, batch, directions, row, weighed

# Forward mode


@row(FORWARD)
def jvp(m, floats):
    """The change along one direction."""
    return jax.jvp(m.loss, (floats,), (directions(floats),))


@row(FORWARD)
def jvp_of_vmap(m, floats):
    """The change of a batch."""
    return jax.jvp(lambda f: weighed(jax.vmap(m.results)(batch(f)[0])), (floats,), (directions(floats),))


@row(FORWARD)
def jacfwd(m, floats):
    """A Jacobian of few inputs."""
    return jax.jacfwd(m.loss_of_first(floats))(floats[0])


@row()
def jacrev(m, floats):
    """A Jacobian of few results: several cotangents for one forward pass."""

    def some(weight):
        leaves = filter(is_float, jax.tree.leaves(m.results([weight, *floats[1:]])))
        return [jnp.sin(leaf.ravel()[-4:]) for leaf in leaves]

    return jax.jacrev(some)(floats[0])


@row(FORWARD)
def linearize(m, floats):
    """A linear model around a point, applied once."""
    value, linear = jax.linearize(m.loss, floats)
    return value, linear(directions(floats))


@row(EVERY)
def vmap_of_linearize(m, floats):
    """A linear model of each example, applied to each and, one of them, to a batch of directions."""
    examples = batch(floats)[0]
    of_each = jax.vmap(lambda f: jax.linearize(m.loss, f)[1](directions(f)))(examples)
    return of_each, jax.vmap(jax.linearize(m.loss, floats)[1])(examples)


# Derivatives of derivatives


@row()
def forward_over_reverse(m, floats):
    """A product of a Hessian and a vector."""
    return jax.jvp(jax.grad(m.loss), (floats,), (directions(floats),))


@row()
def reverse_over_reverse(m, floats):
    """A penalty on the norm of the gradient."""
    return jax.grad(lambda f: along(jax.grad(m.loss)(f)))(floats)


@row(EVERY)
def reverse_over_forward(m, floats):
    """A penalty on the change along a direction."""
    return jax.grad(lambda f: jax.jvp(m.loss, (f,), (directions(f),))[1])(floats)


@row(EVERY)
def forward_over_forward(m, floats):
    """A second derivative along a line."""
    return jax.jvp(lambda f: jax.jvp(m.loss, (f,), (directions(f),))[1], (floats,), (directions(floats),))


@row()
def hessian(m, floats):
    """Newton's method on a small weight."""
    return jax.hessian(m.loss_of_first(floats))(floats[0])


@row()
def vmap_of_hessian(m, floats):
    """A Hessian of each example."""
    return jax.vmap(lambda f: jax.hessian(m.loss_of_first(f))(f[0]))(batch(floats)[0])


@row()
def reverse_over_reverse_of_vmap(m, floats):
    """A penalty on the norm of the gradient of a batch."""

    def loss(f):
        return weighed(jax.vmap(m.results)(batch(f)[0]))

    return jax.grad(lambda f: along(jax.grad(loss)(f)))(floats)


@row()
def vmap_of_forward_over_reverse(m, floats):
    """A product of each example's Hessian and a vector."""
    return jax.vmap(lambda f: jax.jvp(jax.grad(m.loss), (f,), (directions(f),)))(batch(floats)[0])


# Around and inside other functions with derivatives


@row()
def checkpoint(m, floats):
    """A layer of a model that is computed again as a whole."""
    return jax.value_and_grad(jax.checkpoint(m.loss))(floats)


@row()
def checkpoint_with_a_policy(m, floats):
    """The same, where products are kept; and where nothing is."""
    policies = (jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.nothing_saveable)
    return [jax.grad(jax.checkpoint(lambda f: jnp.sin(m.loss(f)), policy=policy))(floats) for policy in policies]


@row()
def vmap_of_gradient_of_checkpoint(m, floats):
    """Gradients of examples of a layer that is computed again."""
    return jax.vmap(jax.grad(jax.checkpoint(m.loss)))(batch(floats)[0])


@row()
def vjp_functions_out_of_a_vmap(m, floats):
    """Pullbacks of a batch, kept as values: applied under another vmap, and one by one."""
    pulls = jax.vmap(lambda f: jax.vjp(m.loss, f)[1])(batch(floats)[0])
    cotangents = jnp.array([0.5, 1.0, -2.0])
    together = jax.vmap(lambda pull, ct: pull(ct))(pulls, cotangents)
    return together, [jax.tree.map(lambda leaf, i=i: leaf[i], pulls)(cotangents[i]) for i in (0, 2)]


@row(jitted=False)
def vjp_function_out_of_a_jit(m, floats):
    """Forward and backward pass as two programs."""
    results, pull = jax.jit(lambda f: jax.vjp(m.loss, f))(floats)
    return results, jax.jit(lambda pull, ct: pull(ct))(pull, jnp.float64(2.0)), jax.vmap(pull)(jnp.array([0.5, -1.0]))


@row()
def custom_vjp_around(m, floats):
    """A rule of the user's own, whose backward pass is the pullback of the scan, clipped."""

    @jax.custom_vjp
    def clipped(f):
        return m.loss(f)

    clipped.defvjp(
        lambda f: jax.vjp(m.loss, f), lambda pull, ct: ([jnp.clip(leaf, -0.1, 0.1) for leaf in pull(ct)[0]],)
    )
    return jax.grad(clipped)(floats), jax.vmap(jax.grad(clipped))(batch(floats)[0])
