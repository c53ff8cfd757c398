"""Gradients: of one example, of a batch, and of each example of a batch."""

import jax
import jax.numpy as jnp

from tests.support.transformations.table import batch, row, scaled, weighed

# One gradient


@row()
def plain(m, floats):
    """An evaluation: nothing is differentiated."""
    return m.loss(floats), m.results(floats)


@row(jitted=False)
def without_jit(m, floats):
    """Tried out at a prompt: each operation is run by itself."""
    return jax.grad(m.loss)(floats), m.results(floats)


@row()
def value_and_gradient_with_results(m, floats):
    """A training step that logs."""
    return jax.value_and_grad(lambda f: (m.loss(f), m.results(f)), has_aux=True)(floats)


@row(jitted=False)
def gradient_of_a_jit(m, floats):
    """A model that is jitted by itself, with a gradient around it that is not."""
    return jax.value_and_grad(jax.jit(m.loss))(floats)


@row(jitted=False)
def jits_everywhere(m, floats):
    """Layers, models and updates that are each jitted."""
    loss = jax.jit(lambda f: jax.jit(m.loss)(f))
    return jax.jit(jax.grad(loss))(floats), jax.grad(loss)(floats)


# A batch


def gradient_of_batch(m, floats, axis=0, is_batched=lambda i: True, mapped=jax.vmap):
    examples, axes = batch(floats, axis, is_batched)
    return jax.value_and_grad(lambda f: weighed(mapped(m.results, in_axes=(axes,))(f)))(examples)


@row()
def gradient_of_vmap(m, floats):
    """The mean loss of a batch."""
    return gradient_of_batch(m, floats)


@row()
def gradient_of_vmap_over_axis_1(m, floats):
    """A batch whose axis is the second, as in time-major arrays."""
    return gradient_of_batch(m, floats, axis=1)


@row()
def gradient_of_vmap_over_axis_2(m, floats):
    """A batch whose axis is a later one, and the last of smaller arrays."""
    return gradient_of_batch(m, floats, axis=2)


@row()
def gradient_of_vmap_with_shared_weights(m, floats):
    """The usual batch: weights are shared, so their gradient is a sum over examples."""
    return gradient_of_batch(m, floats, is_batched=lambda i: i == len(floats) - 1)


@row()
def gradient_of_vmap_over_weights(m, floats):
    """An ensemble on the same inputs."""
    return gradient_of_batch(m, floats, is_batched=lambda i: i == 0)


@row()
def gradient_of_vmap_of_vmap(m, floats):
    """An ensemble of models on a batch."""

    def total(f):
        def one(scale, weight):
            return m.results([weight * scale, *scaled(f[1:], scale)])

        scales, weights = jnp.array([0.5, 1.0]), jnp.stack([f[0], -f[0], 2 * f[0]])
        return weighed(jax.vmap(lambda scale: jax.vmap(lambda weight: one(scale, weight))(weights))(scales))

    return jax.value_and_grad(total)(floats)


@row(jitted=False)
def gradient_of_jit_of_vmap_of_jit(m, floats):
    """A jitted model, mapped over a batch, in a jitted loss."""
    return gradient_of_batch(m, floats, mapped=lambda f, in_axes: jax.jit(jax.vmap(jax.jit(f), in_axes=in_axes)))


# A gradient for each example


@row()
def vmap_of_gradient(m, floats):
    """Gradients of single examples, for their norms or for privacy."""
    return jax.vmap(jax.value_and_grad(m.loss))(batch(floats)[0])


@row()
def vmap_of_gradient_with_shared_weights(m, floats):
    """As before, with the weights not batched, and examples along another axis."""
    examples, axes = batch(floats, 1, lambda i: i > 0)
    return jax.vmap(jax.grad(m.loss), in_axes=(axes,), out_axes=-1)(examples)


@row()
def vmap_of_vmap_of_gradient(m, floats):
    """Gradients of the examples of an ensemble."""
    scales = jnp.array([0.5, 1.0])
    of_one = jax.vmap(lambda f: jax.grad(m.loss)(f))
    return jax.vmap(lambda scale: of_one(scaled(batch(floats)[0], scale)))(scales)


@row()
def vmap_of_gradient_of_vmap(m, floats):
    """Several tasks, each with the gradient of a batch."""
    scales = jnp.array([0.5, 1.0])
    return jax.vmap(lambda scale: gradient_of_batch(m, scaled(floats, scale)))(scales)


@row(jitted=False)
def vmap_of_jit_of_gradient(m, floats):
    """A jitted gradient that is mapped afterwards: the program was made for one example."""
    return jax.vmap(jax.jit(jax.grad(m.loss)))(batch(floats)[0])


@row(jitted=False)
def jit_of_vmap_of_jit_of_gradient_of_jit(m, floats):
    """The same in a jitted update."""
    return jax.jit(jax.vmap(jax.jit(jax.grad(jax.jit(m.loss)))))(batch(floats)[0])


@row()
def gradient_of_vmap_of_jit_of_gradient(m, floats):
    """Meta-learning: the loss after a step of descent by each example."""

    @jax.jit
    def after(f):
        return m.loss([leaf - 0.1 * g for leaf, g in zip(f, jax.grad(m.loss)(f), strict=True)])

    return jax.grad(lambda f: jax.vmap(after)(batch(f)[0]).sum())(floats)
