"""Functions within the step: jitted ones, loops, branches, checkpoints, callbacks, derivatives."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.support.adversarial.table import adversary, draw, inputs, integers, weight


@jax.jit
def dense(w, v):
    return jnp.tanh(v @ w)


@adversary()
def jitted_function_applied_twice(w, h, x):
    """To a carry and to an x, so one of the calls can be hoisted; and one that closes over the weight."""
    h = dense(w, h + dense(w, x))
    return h, jax.jit(lambda v: jnp.tanh(v @ w))(h)


@adversary(lambda: {"a": weight(), "b": draw(3, 3, 3, scale=0.5)})
def jitted_function_of_everything(params, h, x):
    """Calls within calls; some results of one call depend on the carry and others do not."""

    @jax.jit
    def parts(params, h, x):
        return dense(params["a"], h), dense(params["b"], x), params["a"] * params["b"], h

    of_carry, of_x, of_weights, same = parts(params, h, x)
    h = jnp.tanh((of_carry + of_x) @ of_weights + same)
    return h, of_x


@adversary(lambda: {"w": draw(0, 2, 3, 3, scale=0.5), "b": draw(3, 2, 3)})
def scan_over_layers(params, h, x):
    def layer(v, layer):
        return jnp.tanh(v @ layer["w"] + layer["b"]), v

    h, inner = lax.scan(layer, h + x, params)
    return h, inner[1]


@adversary(lambda: draw(0, 2, 3, 3, scale=0.5), lambda: draw(1, 2, 2, 3))
def scan_over_layers_with_a_carry_each(w, hs, x):
    """The inner loop's xs are weights and carries, its outputs the new carries."""

    def layer(v, layer):
        w, h = layer
        h = jnp.tanh(h @ w + v)
        return h, h

    _, hs = lax.scan(layer, x, (w, hs))
    return hs, hs[-1]


@adversary(xs=lambda n: draw(2, n, 3, 2, 3))
def scan_over_parts_of_x(w, h, x):
    """An inner loop that starts from zeros: it does not depend on the carry."""
    encoded, _ = lax.scan(lambda v, part: (jnp.tanh(v @ w + part), None), jnp.zeros((2, 3)), x)
    h = jnp.tanh(h @ w + encoded @ w)
    return h, encoded


@adversary(
    lambda: {"a": weight(), "b": draw(3, 3, 3, scale=0.5)}, xs=lambda n: (integers(3, 2, n, dtype=bool), inputs(n))
)
def cond_on_x_with_weights_in_the_branches(params, h, x):
    flag, x = x
    h = lax.cond(flag, lambda h: jnp.tanh(h @ params["a"] + x), lambda h: h * params["b"][0], h)
    seen = lax.cond(flag, lambda: x @ params["b"], lambda: jnp.sin(x)) @ params["a"]
    return h, seen


@adversary(lambda: {"a": weight(), "b": draw(3, 3, 3, scale=0.5)})
def cond_on_the_carry(params, h, x):
    h = lax.cond(h[0, 0] > 0, lambda h: jnp.tanh(h @ params["a"]), lambda h: jnp.sin(h @ params["b"] + x), h) + x
    return h, h


@adversary(lambda: {"a": weight(), "b": draw(3, 3, 3, scale=0.5)}, xs=lambda n: (integers(3, 3, n), inputs(n)))
def switch_on_x(params, h, x):
    which, x = x
    branches = [lambda v: v @ params["a"], lambda v: v @ params["b"].T, jnp.sin]
    h = jnp.tanh(lax.switch(which, branches, h) + lax.switch(which, branches, x) @ params["a"])
    return h, h


@adversary(xs=lambda n: (integers(3, 9, n), inputs(n)), conservative=False)
def while_loops_without_derivative(w, h, x):
    """Of x and of the carry, on what has no derivative; each takes its own number of iterations."""
    number, x = x
    collatz = lax.while_loop(lambda v: v[0] > 1, lambda v: ((v[0] // 2), v[1] + 1), (number, 0))[1]
    halved = lax.while_loop(lambda v: v > 0.1, lambda v: 0.5 * v, lax.stop_gradient(jnp.abs(h).max()))
    h = jnp.tanh(h @ w + (x * collatz.astype(h.dtype)) @ w + halved)
    return h, collatz


@adversary()
def counted_loop_on_the_carry(w, h, x):
    h = lax.fori_loop(0, 3, lambda i, v: v + 0.3 * jnp.tanh(v @ w + x), h)
    return h, h


@adversary()
def checkpoint_within(w, h, x):
    """With and without a policy, on the carry and on x; and barriers."""
    saved = jax.checkpoint(lambda v: jnp.sin(jnp.tanh(v @ w)), policy=jax.checkpoint_policies.dots_saveable)
    h, w = lax.optimization_barrier((h, w))
    h = jax.checkpoint(lambda v: jnp.tanh(v @ w) @ w)(h) + saved(lax.optimization_barrier(x))
    return h, saved(h)


@adversary(lambda: {"a": weight(), "b": draw(3, 3, 3, scale=0.5)}, conservative=False)
def stop_gradient_on_parts(params, h, x):
    """On one use of a weight, of the carry, and of x, beside another that is differentiated; and a rounding whose
    gradient is that of the identity.
    """
    stop = lax.stop_gradient
    h = jnp.tanh(h @ stop(params["a"]) + stop(h) @ params["b"] + stop(h @ params["b"]) + stop(x) @ params["a"] + x)
    h = h + stop(jnp.round(4 * h) / 4 - h)
    return h, stop(h) * x


@adversary()
def gradient_within_the_step(w, h, x):
    """A step of gradient descent; the weight is an argument of the inner function and closed over."""
    energy = jax.grad(lambda v: jnp.sum(jnp.sin(v @ w) * x) + jnp.sum(v**2))
    h = h - 0.1 * energy(h)
    return h, h


def nothing(_):
    return None


@adversary()
def debug_callbacks(w, h, x):
    """Effects, on a carry, an x and a weight."""
    h = jnp.tanh(h @ w + x)
    for seen in (h, x, w):
        jax.debug.callback(nothing, seen)
    return h, h


def on_host(v):
    return v + 1


@adversary(xs=lambda n: (integers(3, 5, n), inputs(n)))
def pure_callback_that_cannot_be_batched(w, h, x):
    """In a loop it is never asked to be. That of x precedes a product."""
    number, x = x
    number = jax.pure_callback(on_host, jax.ShapeDtypeStruct((), jnp.int32), number)
    h = jnp.tanh(h @ w + (x * number.astype(h.dtype)) @ w)
    return h, number


@jax.custom_batching.custom_vmap
def alone(v):
    return v + 1


@alone.def_vmap
def together(axis_size, in_batched, v):
    return 2 * v, True


@adversary(xs=lambda n: (integers(3, 5, n), inputs(n)))
def own_rule_for_batches(w, h, x):
    """Another function under vmap, on purpose. In a loop there is no batch."""
    number, x = x
    h = jnp.tanh(h @ w + (x * alone(number).astype(h.dtype)) @ w)
    return h, alone(number)
