"""Names of axes and of meshes, programs that leave the process, and the modes that JAX is debugged with."""

import importlib.util

import jax
import jax.export
import jax.numpy as jnp
from jax import lax

from tests.support.transformations.programs import OWN
from tests.support.transformations.table import EVERY, batch, row


def normalised(m, w, init, x):
    """A step that subtracts the batch's mean and knows its place in the batch."""

    def step(h, x):
        h = jnp.tanh(h @ w + x)
        place = lax.axis_index("batch").astype(h.dtype)
        h = h - 0.5 * lax.pmean(h, "batch") + 0.1 * place
        return h, lax.psum(h, "batch") * place

    return m.scan(step, init, x)


def sum_of(results):
    carry, ys = results
    return jnp.sum(jnp.sin(carry)) + jnp.sum(jnp.sin(ys))


@row(OWN)
def collectives_in_gradient_of_vmap(m, floats):
    """Batch normalisation in the step, a loss of the batch."""

    def loss(w, init, xs):
        run = jax.vmap(lambda init, xs: normalised(m, w, init, xs), axis_name="batch", in_axes=(None, 1))
        return sum_of(run(init, xs))

    w, init, xs = floats
    return jax.value_and_grad(loss, (0, 1, 2))(w, init, jnp.stack([xs, 0.5 * xs, -xs], 1))


@row(OWN)
def collectives_in_vmap_of_gradient(m, floats):
    """Batch normalisation in the step, gradients of each example's own loss."""
    w, init, xs = floats

    def loss(w, init, xs):
        return sum_of(normalised(m, w, init, xs))

    run = jax.vmap(jax.value_and_grad(loss, (0, 1, 2)), axis_name="batch", in_axes=(None, None, 0))
    return run(w, init, jnp.stack([xs, 0.5 * xs, -xs]))


@row(OWN)
def collectives_in_jvp_of_vmap(m, floats):
    """The same in forward mode, where the batch is of weights."""

    def loss(w):
        return sum_of(jax.vmap(lambda w: normalised(m, w, *floats[1:]), axis_name="batch")(w))

    w = jnp.stack([floats[0], -floats[0]])
    return jax.jvp(loss, (w,), (jnp.cos(w),))


@row(OWN)
def only_the_index_of_an_example(m, floats):
    """Nothing of the scan is batched but what it makes of the place in the batch."""
    w, init, xs = floats

    def one(w):
        def step(h, x):
            h = jnp.tanh(h @ w + x * lax.axis_index("batch").astype(x.dtype))
            return h, h

        return sum_of(m.scan(step, init, xs))

    def each(one):
        return jax.vmap(lambda _: one(w), axis_name="batch")(jnp.arange(3))

    total = jax.grad(lambda w: jax.vmap(lambda _: one(w), axis_name="batch")(jnp.arange(3)).sum())
    return each(one), total(w), each(jax.grad(one)), each(jax.jit(jax.grad(one)))


@row(jitted=False)
def spmd_axis_name(m, floats):
    """A batch that is divided over an axis of a mesh."""
    examples = batch(floats)[0]
    with jax.set_mesh(jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))):
        of_batch = jax.grad(lambda f: jax.vmap(m.loss, spmd_axis_name="data")(f).sum())
        of_each = jax.vmap(jax.grad(m.loss), spmd_axis_name="data")
        return jax.jit(of_batch)(examples), jax.jit(of_each)(examples)


def arrived(exported):
    """A program after it was written and read; as it is where JAX cannot write it, for want of a package."""
    if importlib.util.find_spec("flatbuffers") is None:
        return exported
    return jax.export.deserialize(exported.serialize())


@row(jitted=False)
def export(m, floats):
    """A gradient as a program that leaves the process."""
    exported = jax.export.export(jax.jit(jax.value_and_grad(m.loss)), platforms=["cpu"])(floats)
    return arrived(exported).call(floats)


@row(jitted=False)
def export_of_vmap_of_gradient(m, floats):
    """Gradients of each example as such a program."""
    exported = jax.export.export(jax.jit(jax.vmap(jax.grad(m.loss))))(batch(floats)[0])
    return arrived(exported).call(batch(floats)[0])


@row(EVERY, jitted=False)
def checking_leaks(m, floats):
    """Looking for tracers that outlive their trace."""
    with jax.checking_leaks():
        return jax.jit(jax.value_and_grad(m.loss))(floats), jax.jit(jax.vmap(jax.grad(m.loss)))(batch(floats)[0])


@row(jitted=False)
def debug_nans(m, floats):
    """Looking for the first NaN, where there is none."""
    with jax.debug_nans(True):
        return jax.jit(jax.value_and_grad(m.loss))(floats), jax.grad(m.loss)(floats)


@row(EVERY, jitted=False)
def disable_jit(m, floats):
    """Looking at values in the step."""
    with jax.disable_jit():
        return jax.value_and_grad(m.loss)(floats), jax.jvp(m.loss, (floats,), (floats,))
