"""How a weight may be used: more than once, made from others, chosen by x, kept in the carry."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.support.adversarial.table import adversary, batch, draw, inputs, integers, weight


def pair_of_weights():
    return {"a": draw(0, 3, 3, scale=0.5), "b": draw(3, 3, 3, scale=0.5)}


@adversary()
def used_three_times(w, h, x):
    """Once transposed."""
    h = jnp.tanh(jnp.tanh(jnp.tanh(h @ w) @ w.T) @ w + x)
    return h, h


@adversary()
def used_in_products_of_carry_and_of_x(w, h, x):
    """One of the two can be hoisted, and both have a share in the gradient."""
    h = jnp.tanh(h @ w + x @ w)
    return h, h @ w


@adversary()
def used_elementwise_too(w, h, x):
    h = jnp.tanh(h @ w + x * w[0] + h * jnp.diag(w))
    return h, h[0] * w[:, 1]


@adversary(lambda: {"w": draw(0, 3, 3), "scale": draw(3, 3)})
def made_from_a_weight(params, h, x):
    w = jnp.tanh(params["w"]) * params["scale"]
    h = jnp.tanh(h @ w + x)
    return h, h * params["scale"]


@adversary(pair_of_weights)
def normalised_and_multiplied_with_another(params, h, x):
    w = params["a"] @ params["b"]
    h = jnp.tanh(h @ (w / jnp.linalg.norm(w)) + x @ params["b"])
    return h, h


@adversary()
def sliced(w, h, x):
    """Overlapping parts of one weight, apart and together."""
    h = jnp.concatenate([jnp.tanh(h @ w[:, :2] + x[:, :2]), h[:, 1:] @ w[1:, 2:]], axis=1)
    h = jnp.tanh(h @ jnp.concatenate([w[:, 1:], w[:, :1]], axis=1))
    return h, h


@adversary(lambda: draw(0, 4, 3, 3), xs=lambda n: (draw(2, n, 4), draw(3, n, 2, 3)))
def made_by_a_product_with_x(w, h, x):
    code, x = x
    h = jnp.tanh(h @ jnp.einsum("k,kij->ij", code, 0.3 * w) + x)
    return h, h


@adversary(lambda: {"table": draw(0, 5, 3), "w": weight()}, xs=lambda n: integers(2, 5, n, 2))
def embedding_tied_to_the_output(params, h, token):
    """The table is looked up, what it gives multiplied with a weight, and the table multiplied with on either side."""
    h = jnp.tanh(h @ params["w"] + params["table"][token] @ params["w"])
    return h, h @ params["table"].T + jax.nn.one_hot(token, 5, dtype=h.dtype) @ (params["table"] @ params["table"].T)


@adversary(lambda: draw(0, 4, 3, 3, scale=0.5), xs=lambda n: (integers(2, 4, n), inputs(n)))
def chosen_by_x(w, h, x):
    which, x = x
    h = jnp.tanh(h @ w[which] + x)
    return h, h


@adversary(lambda: draw(0, 4, 3, 3, scale=0.5), lambda: (batch(), jnp.int32(1)))
def chosen_by_a_count_in_the_carry(w, carry, x):
    h, count = carry
    h = jnp.tanh(h @ lax.dynamic_index_in_dim(w, count % 4, keepdims=False) + x)
    return (h, count + 1), h


@adversary(lambda: {"s": jnp.float64(0.7), "t": jnp.float64(-0.4)})
def scalars(params, h, x):
    h = jnp.tanh(params["s"] * h + params["t"] * x + params["s"])
    return h, h


@adversary(lambda: {"row": draw(0, 3), "one_row": draw(3, 1, 3), "column": draw(4, 2, 1), "whole": draw(5, 2, 3)})
def broadcast_against_the_batch(params, h, x):
    h = jnp.tanh(params["row"] * h + params["one_row"] * x + params["column"] * h * params["whole"])
    return h, params["column"] * x


@adversary(lambda: {"w": weight(), "b": draw(3, 3), "late": draw(4, 3), "unused": draw(5, 2)})
def bias(params, h, x):
    """Added and subtracted, on either side; and a parameter that nobody uses."""
    h = params["late"] - jnp.tanh(h @ params["w"] + params["b"] + x)
    return h, (params["b"] + h) * (h - params["late"])


@adversary()
def mask_of_a_weight(w, h, x):
    """Invariant booleans."""
    positive = w > 0
    h = jnp.tanh(h @ jnp.where(positive, w, 0.1 * w) + jnp.where(positive[0], h, x))
    return h, h


@adversary(lambda: {"k": draw(0, 4, 3), "v": draw(3, 4, 3), "w": weight()})
def attention_over_a_memory(params, h, x):
    """The memory is a weight that is multiplied with, normalised over, and multiplied with again."""
    read = jax.nn.softmax(h @ params["k"].T, axis=-1) @ params["v"]
    h = jnp.tanh(read @ params["w"] + x)
    return h, read


@adversary(lambda: {"w": weight(), "gain": draw(3, 3), "shift": draw(4, 3)})
def layer_norm(params, h, x):
    z = h @ params["w"] + x
    z = (z - z.mean(-1, keepdims=True)) * lax.rsqrt(z.var(-1, keepdims=True) + 1e-3)
    h = jnp.tanh(z * params["gain"] + params["shift"])
    return h, h


@adversary()
def solved_with(w, h, x):
    """An implicit step: a factorisation of a weight, and its use on the carry."""
    h = jnp.tanh(jnp.linalg.solve(w + 2 * jnp.eye(3), h.T + x.T).T)
    return h, h


@adversary(lambda: None, lambda: {"h": batch(), "w": weight()})
def read_only_in_the_carry(params, carry, x):
    h = jnp.tanh(carry["h"] @ carry["w"] + x)
    return {"h": h, "w": carry["w"]}, h


@adversary(lambda: None, lambda: {"h": batch(), "w": weight()})
def turned_over_in_the_carry(params, carry, x):
    """Passed on as its transpose: nearly read-only."""
    h = jnp.tanh(carry["h"] @ carry["w"] + x)
    return {"h": h, "w": carry["w"].T}, h


@adversary(lambda: jnp.float64(0.8), lambda: (draw(1, 3), weight()), lambda n: draw(2, n, 3))
def fast_weights(decay, carry, x):
    h, w = carry
    h = jnp.tanh(w @ h + x)
    return (h, decay * w + 0.1 * jnp.outer(h, x)), h


@adversary(pair_of_weights)
def only_weights_in_an_inner_loop(params, h, x):
    """A power of a weight: invariant, by a loop."""
    power = lax.fori_loop(0, 3, lambda _, w: jnp.tanh(w @ params["a"]), params["b"])
    h = jnp.tanh(h @ power + x)
    return h, h


@adversary(lambda: {"a": weight(), "b": draw(3, 3, 3, scale=0.5), "i": integers(4, 3, 3, 3)}, conservative=False)
def without_a_gradient(params, h, x):
    """Matrices and terms that the step makes, that are stopped, rounded or of integers; in a sum with one that is not.

    Used in products of the carry and of x, beside products of the same operand with weights that have a gradient.
    """
    made, stopped = 0.5 * jnp.eye(3) + jnp.tri(3), lax.stop_gradient(jnp.sin(params["a"]))
    rounded, counted = jnp.round(4 * params["b"]) / 4, params["i"] / 3
    h = jnp.tanh(h @ made + h @ stopped + h @ params["a"] + h @ (made + params["b"]) + jnp.cos(jnp.arange(3.0)))
    h = jnp.tanh(h + x @ rounded + x @ stopped + x @ params["a"] + h * counted[0] + rounded[1] + stopped[2])
    return h, h @ counted + x * made[1]


@adversary()
def constants(w, h, x):
    """Of NumPy, and arrays that are made while the step is traced."""
    h = jnp.tanh(h @ NUMPY_WEIGHT + x * NUMPY_WEIGHT[0] + x @ (w * jnp.asarray(NUMPY_WEIGHT)))
    return h, (np.arange(3.0), jnp.arange(3.0))


NUMPY_WEIGHT = np.linspace(-0.5, 0.5, 9).reshape(3, 3)
